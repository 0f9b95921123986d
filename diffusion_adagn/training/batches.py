"""What the network is shown at a position of the run: the sample there, its label or null, its timestep, its noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import ImageDataset
from ..data.order import SampleOrder, normal, uniform
from ..diffusion.objective import to_unit


@dataclass
class Batch:
    """x0 and noise [B, C, H, W] float32 (x0 in [-1, 1]); t [B] int64; labels [B] int64 (K where dropped), None without
    classes; indices [B]: the samples' places in the data set."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    labels: Tensor | None
    indices: Tensor


class Batches:
    """Batches by position; every draw is a function of (seed, position).

    conditional: whether labels are given. flip and label_dropout are drawn once a sample, here and nowhere else.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        seed: int,
        num_timesteps: int,
        device: torch.device,
        conditional: bool = True,
        label_dropout: float = 0.0,
        flip: bool = False,
    ):
        self.dataset, self.seed, self.device = dataset, seed, device
        self.num_timesteps, self.conditional = num_timesteps, conditional
        self.label_dropout, self.flip = label_dropout, flip
        self.order = SampleOrder(len(dataset), seed)
        self.drawn_on = torch.device("cpu") if device.type == "mps" else device  # mps has no float64

    def at(self, positions: Tensor) -> Batch:
        """positions [B] int64 on the CPU."""
        indices = self.order(positions)
        pixels, labels = self.dataset.gather(indices.numpy())
        x0 = to_unit(torch.from_numpy(pixels).to(self.device, non_blocking=True))
        positions = positions.to(self.drawn_on)
        if self.flip:
            mirrored = (uniform(self.seed, "flip", positions) < 0.5).to(self.device)
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        labels = torch.from_numpy(labels).to(self.device) if self.conditional else None
        if self.conditional and self.label_dropout:
            dropped = uniform(self.seed, "label_drop", positions) < self.label_dropout
            labels = labels.masked_fill(dropped.to(self.device), self.dataset.label_space.K)
        t = (uniform(self.seed, "timestep", positions) * self.num_timesteps).long().to(self.device)
        noise = normal(self.seed, "noise", positions, tuple(x0.shape[1:])).to(self.device)
        return Batch(x0, noise, t, labels, indices)
