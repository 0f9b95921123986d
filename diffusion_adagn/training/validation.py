"""The loss on held-out images during training."""

import math
from collections.abc import Callable

import torch

from ..commands import command
from ..config import TrainingConfig
from ..data import ImageDataset
from ..diffusion.loss import DiffusionLoss
from ..evaluation.heldout import HeldOut
from ..evaluation.zero_shot import classify
from ..models.unet import AdaGNUNet
from ..runs.layout import label_space
from .noise_report import loss_by_level, suggest_noise
from .setup import measure_sigma_data
from .trainer import Trainer

MAX_HELDOUT = 512
# of the classes found at the end: shorter runs and more classes would make it more than a few percent of the training
CLASSIFIED, DRAWS, MIN_IMAGES_SEEN, MAX_CLASSES = 64, 16, 50_000, 100


class Validation:
    """The held-out loss of the EMA weights, every `training.heldout_every` steps.

    After the last step it also measures whether the loss finds the class of held-out images and, under edm and flow,
    which training noise the loss suggests. heldout: None where nothing is measured.
    """

    def __init__(self, trainer: Trainer, heldout: ImageDataset | None):
        self.trainer, self.heldout, self.every = trainer, heldout, trainer.config.training.heldout_every
        self.suggests = trainer.config.diffusion.process != "ddpm"
        seen = trainer.max_steps * trainer.config.training.batch_size
        self.classifies = seen >= MIN_IMAGES_SEEN and 2 <= label_space(trainer.config).K <= MAX_CLASSES

    def due(self, step: int) -> bool:
        last = (self.suggests or self.classifies) and step == self.trainer.max_steps
        return self.heldout is not None and self.every > 0 and (step % self.every == 0 or last)

    def run(self, step: int, say: Callable[[str], None]) -> dict[str, float]:
        t, accelerator = self.trainer, self.trainer.accelerator
        settings = t.config.training, accelerator.autocast, accelerator.device, t.images_per_pass
        values = {"heldout_loss": heldout_loss(t.ema.model, self.heldout, t.loss, *settings)}
        if step < t.max_steps:
            return values
        values |= self._suggested_noise(say) if self.suggests else {}
        return values | (self._accuracy(say) if self.classifies else {})

    def _suggested_noise(self, say: Callable[[str], None]) -> dict[str, float]:
        t = self.trainer
        sigma_data = t.config.diffusion.sigma_data or measure_sigma_data(self.heldout)
        table = t.loss.process, sigma_data, t.accelerator.autocast, t.images_per_pass
        mean, std = suggest_noise(*loss_by_level(t.ema.model, self.heldout, *table))
        if math.isnan(mean):  # the network explains nothing yet
            return {}
        say(
            f"noise     the held-out loss by noise level suggests --diffusion.noise_mean {mean:.2f} --diffusion.noise_std {std:.2f} "
            "for the next run"
        )
        return {"suggested_noise_mean": mean, "suggested_noise_std": std}

    def _accuracy(self, say: Callable[[str], None]) -> dict[str, float]:
        t = self.trainer
        pixels, labels = self.heldout.gather(self.heldout.evenly_spread(CLASSIFIED))
        images, rows = torch.from_numpy(pixels), t.images_per_pass
        found = classify(t.ema.model, t.loss.process, images, DRAWS, rows, t.accelerator.autocast, progress=True)
        accuracy = (found.predicted == torch.from_numpy(labels)).double().mean().item()
        say(
            f"classes   the loss finds the right class of {accuracy:.0%} of {len(labels)} held-out images "
            f"(by chance {1 / label_space(t.config).K:.0%}); more by: {command('classify', t.run.path)}"
        )
        return {"zero_shot_accuracy": accuracy}


@torch.no_grad()
def heldout_loss(
    unet: AdaGNUNet, dataset: ImageDataset, loss: DiffusionLoss, training: TrainingConfig, autocast: Callable,
    device: torch.device, max_rows: int | None = None,
) -> float:  # fmt: skip
    """Mean loss on held-out images, evenly spread, with their true labels: always the same noise, its levels spread evenly over the training noise.

    max_rows: images per call of the network; None: training.batch_size.
    """
    image = torch.from_numpy(dataset.evenly_spread(MAX_HELDOUT))
    n, labels, total = len(image), torch.from_numpy(dataset.labels[image.numpy()]), 0.0
    # the next float64 above: then floor(u T) is exact for timesteps
    u = torch.nextafter(torch.arange(n).double() / n, torch.tensor(1.0, dtype=torch.float64))
    pairs = HeldOut(dataset, image, loss.process.draw(u, cell=1 / n)[0], training.seed)
    for batch in pairs.batches(max_rows or training.batch_size, device):
        y = labels[batch.places].to(device) if unet.config.num_classes else None
        with autocast():
            output = unet(batch.noisy(loss.process), batch.level.time, y).sample
        total += loss.loss(output, batch.x0, batch.noise, batch.level).sum().item()
    return total / n
