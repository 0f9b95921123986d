"""Previews during training: a grid of images from the same seeds and classes, and the loss on held-out images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..config import RunConfig, TrainingConfig
from ..data import ImageDataset
from ..data.rng import normal
from ..diffusion.loss import DiffusionLoss, normalize_images
from ..diffusion.schedule import make_scheduler, set_timesteps
from ..models.unet import AdaGNUNet
from ..render.grids import labelled_grid
from ..runs.layout import RunFolder, label_space
from ..sampling.guidance import Guidance
from ..sampling.pipeline import ClassConditionalPipeline, to_pixels

MAX_PREVIEW_CLASSES = 10
MAX_HELDOUT = 512


def check_preview(config: RunConfig) -> None:
    """Raises InputError for preview settings that the first preview would stumble over, hours later."""
    training = config.training
    label_space(config).parse(training.preview_classes if config.model.class_conditional else "null")
    Guidance(training.preview_guidance)
    set_timesteps(make_scheduler(config.diffusion), training.preview_steps)


def draw_preview(
    run: RunFolder, pipe: ClassConditionalPipeline, training: TrainingConfig, step: int, max_rows: int | None = None
) -> Path:
    """previews/step-XXXXXXXX.png: a row a class, the same seeds at every step. Returns the file.

    most_rows: of a call of the network (two are the least under guidance); None: all images at once.
    """
    labels, count = pipe.labels, training.preview_count
    classes = labels.parse(training.preview_classes if labels.K else "null")[:MAX_PREVIEW_CLASSES]
    pipe.set_progress_bar_config(disable=True)
    scale = training.preview_guidance if labels.K and labels.has_null else 1.0
    ids = [c for c in classes for _ in range(count)]
    steps = training.preview_steps
    cut = len(ids) if max_rows is None else max(1, max_rows // (1 if scale == 1 else 2))
    parts = [
        pipe(
            ids[i : i + cut],
            guidance_scale=scale,
            num_inference_steps=steps,
            seeds=list(range(i, min(i + cut, len(ids)))),
            output_type="np",
        ).images
        for i in range(0, len(ids), cut)
    ]
    images = np.concatenate(parts)
    pixels = to_pixels(images).reshape(len(classes), count, *images.shape[1:])
    title = f"step {step}, EMA weights, guidance {scale:g}, {steps} steps"
    run.previews.mkdir(exist_ok=True)
    file = run.previews / f"step-{step:08d}.png"
    labelled_grid(list(pixels), [labels.name(c) for c in classes], title=title).save(file)
    return file


@torch.no_grad()
def heldout_loss(
    unet: AdaGNUNet,
    dataset: ImageDataset,
    objective: DiffusionLoss,
    training: TrainingConfig,
    autocast: Callable,
    device: torch.device,
    max_rows: int | None = None,
) -> float:
    """Mean loss on held-out images, evenly spread, with their true labels: always the same noise, t spread evenly over 0..T-1.

    most_rows: of a call of the network; None: training.batch_size.
    """
    n = min(len(dataset), MAX_HELDOUT)
    total = 0.0
    for positions in torch.arange(n).split(max_rows or training.batch_size):
        pixels, labels = dataset.gather((positions * len(dataset) // n).numpy())
        x0 = normalize_images(torch.from_numpy(pixels)).to(device)
        t = (positions * objective.num_timesteps // n).to(device)
        noise = normal(training.seed, "heldout", positions, tuple(x0.shape[1:])).to(device)
        y = torch.from_numpy(labels).to(device) if unet.config.num_classes else None
        with autocast():
            output = unet(objective.add_noise(x0, noise, t), t, y).sample
        total += objective.loss(output, x0, noise, t).sum().item()
    return total / n
