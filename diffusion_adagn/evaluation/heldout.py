"""Held-out images at fixed noise levels and noises, which are the same for every network: what losses are compared on."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import ImageDataset
from ..data.rng import normal
from ..diffusion.loss import normalize_images
from ..diffusion.process import Level, Process
from ..models.unet import AdaGNUNet


class Batch(NamedTuple):
    """Some of the pairs of `HeldOut`.

    Attributes:
        places: int64 [B], which.
        x0: float32 [B, C, H, W] in [-1, 1].
        noise: float32 [B, C, H, W].
        level: of tensors [B].
    """

    places: Tensor
    x0: Tensor
    noise: Tensor
    level: Level

    def noisy(self, process: Process) -> Tensor:
        """x_t, float32 [B, C, H, W]."""
        return process.add_noise(self.x0, self.noise, self.level)


@dataclass(frozen=True)
class HeldOut:
    """Pairs of an image and a noise level. The noise of a pair depends on its place and the seed.

    Args:
        images: The images: a data set, or x0 [N, C, H, W] in [-1, 1].
        image: int64 [P], the index of each pair's image.
        level: Of tensors [P].
        seed: Of the noise.
    """

    images: ImageDataset | Tensor
    image: Tensor
    level: Level
    seed: int = 0

    @classmethod
    def of(cls, images: Tensor, count: int, process: Process, seed: int = 0) -> "HeldOut":
        """`count` pairs: the levels evenly spread over the training noise, the images in turn."""
        places = torch.arange(count)
        return cls(images, places % len(images), process.draw((places.double() + 0.5) / count, cell=0.0)[0], seed)

    def batches(self, size: int, device: torch.device, title: str | None = None) -> Iterator[Batch]:
        """The pairs, `size` at a time. title: of a progress bar; None: no bar."""
        parts = torch.arange(len(self.image)).split(size)
        for places in tqdm(parts, desc=title, unit="batch", disable=title is None, leave=False):
            x0 = self._x0(self.image[places])
            noise = normal(self.seed, "heldout", places, tuple(x0.shape[1:])).to(device)
            yield Batch(places, x0.to(device), noise, Level(*(value[places] for value in self.level)).to(device))

    def _x0(self, image: Tensor) -> Tensor:
        if isinstance(self.images, Tensor):
            return self.images[image]
        return normalize_images(torch.from_numpy(self.images.gather(image.numpy())[0]))


@torch.no_grad()
def losses_under(
    unet: AdaGNUNet, batches: Iterable[Batch], process: Process, loss: Callable[..., Tensor], label: int
) -> Tensor:
    """The loss of each pair under a label, float32 [P]. loss: `DiffusionLoss.loss` or `mse`."""
    parts = []
    for batch in batches:
        y = torch.full((len(batch.places),), label, device=batch.x0.device)
        output = unet(batch.noisy(process), batch.level.time, y).sample
        parts.append(loss(output, batch.x0, batch.noise, batch.level))
    return torch.cat(parts)
