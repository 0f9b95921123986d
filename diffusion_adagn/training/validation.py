"""The loss on held-out images during training."""

from collections.abc import Callable

import torch

from ..config import TrainingConfig
from ..data import ImageDataset
from ..data.rng import normal
from ..diffusion.loss import DiffusionLoss, normalize_images
from ..models.unet import AdaGNUNet
from .trainer import Trainer

MAX_HELDOUT = 512


class Validation:
    """The held-out loss of the EMA weights, every `training.heldout_every` steps. heldout: None where it is not measured."""

    def __init__(self, trainer: Trainer, heldout: ImageDataset | None):
        self.trainer, self.heldout, self.every = trainer, heldout, trainer.config.training.heldout_every

    def due(self, step: int) -> bool:
        return self.heldout is not None and self.every > 0 and step % self.every == 0

    def run(self, step: int, say: Callable[[str], None]) -> dict[str, float]:
        t, accelerator = self.trainer, self.trainer.accelerator
        settings = t.config.training, accelerator.autocast, accelerator.device, t.images_per_pass
        return {"heldout_loss": heldout_loss(t.ema.model, self.heldout, t.loss, *settings)}


@torch.no_grad()
def heldout_loss(
    unet: AdaGNUNet, dataset: ImageDataset, loss: DiffusionLoss, training: TrainingConfig, autocast: Callable,
    device: torch.device, max_rows: int | None = None,
) -> float:  # fmt: skip
    """Mean loss on held-out images, evenly spread, with their true labels: always the same noise, its levels spread evenly over the training noise.

    max_rows: images per call of the network; None: training.batch_size.
    """
    n = min(len(dataset), MAX_HELDOUT)
    total = 0.0
    for positions in torch.arange(n).split(max_rows or training.batch_size):
        pixels, labels = dataset.gather((positions * len(dataset) // n).numpy())
        x0 = normalize_images(torch.from_numpy(pixels)).to(device)
        # the next float64 above: then floor(u T) is exact for timesteps
        u = torch.nextafter(positions.double() / n, torch.tensor(1.0, dtype=torch.float64))
        level = loss.process.draw(u, cell=1 / n)[0].to(device)
        noise = normal(training.seed, "heldout", positions, tuple(x0.shape[1:])).to(device)
        y = torch.from_numpy(labels).to(device) if unet.config.num_classes else None
        with autocast():
            output = unet(loss.process.add_noise(x0, noise, level), level.time, y).sample
        total += loss.loss(output, x0, noise, level).sum().item()
    return total / n
