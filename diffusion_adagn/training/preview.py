"""Previews during training: a grid of images from the same seeds and classes."""

from collections.abc import Callable

import numpy as np
import torch

from ..render.grids import labelled_grid
from ..sampling.guidance import Guidance
from ..sampling.load import make_pipeline
from ..sampling.pipeline import to_pixels
from ..sampling.settings import SamplerSettings
from .trainer import Trainer

MAX_PREVIEW_CLASSES = 10


class Preview:
    """previews/step-XXXXXXXX.png, every `training.preview_every` steps and at the end: one row per class, the same seeds each time."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.training = trainer, trainer.config.training

    def due(self, step: int) -> bool:
        every = self.training.preview_every if self.trainer.accelerator.is_main_process else 0
        return every > 0 and (step % every == 0 or step == self.training.max_steps)

    def run(self, step: int, say: Callable[[str], None]) -> dict[str, float]:
        """Draw the grid. A call of the network has at most as many rows as a pass of training (2 under guidance, if a pass is 1)."""
        trainer, training = self.trainer, self.training
        pipe = make_pipeline(trainer.config, trainer.ema.model, training.ema_decay, step)
        pipe.set_progress_bar_config(disable=True)
        labels, count, steps = pipe.labels, training.preview_count, training.preview_steps
        classes = labels.parse(training.preview_classes if labels.K else "null")[:MAX_PREVIEW_CLASSES]
        scale = training.preview_guidance if labels.K and labels.has_null else 1.0
        ids, parts = [c for c in classes for _ in range(count)], []
        size = max(1, trainer.images_per_pass // (1 if scale == 1 or pipe.one_pass else 2))
        settings = SamplerSettings(Guidance(scale), steps=steps)
        with trainer.accelerator.autocast():
            for seeds in torch.arange(len(ids)).split(size):
                batch = {"classes": [ids[i] for i in seeds], "seeds": seeds.tolist(), "output_type": "np"}
                parts.append(pipe.sample(settings, **batch).images)
        images = np.concatenate(parts)
        pixels = to_pixels(images).reshape(len(classes), count, *images.shape[1:])
        title = f"step {step}, EMA weights, guidance {scale:g}, {steps} steps"
        trainer.run.previews.mkdir(exist_ok=True)
        file = trainer.run.previews / f"step-{step:08d}.png"
        labelled_grid(list(pixels), [labels.name(c) for c in classes], title=title).save(file)
        say(f"preview {file}")
        return {}
