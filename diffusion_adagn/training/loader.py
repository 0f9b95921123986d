"""The training batch at a position of the run: images, labels or null, noise levels and noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import RunConfig, TrainingConfig
from ..data import ImageDataset
from ..data.augment import Augmentations, augment_images, draw_augmentations
from ..data.rng import BalancedOrder, SampleOrder, normal, uniform, uniforms
from ..diffusion.loss import normalize_images
from ..diffusion.process import Level, Process
from ..errors import InputError
from ..runtime.distributed import has_float64
from .image_fetcher import ImageFetcher, choose_image_fetcher, to_device


@dataclass
class Batch:
    """x0 and noise [B, C, H, W] float32 (x0 in [-1, 1]); level: of tensors [B]; quantile [B] float64 on the CPU: the
    fraction of the training noise below the level; labels [B] int64 (K where dropped), None without classes; indices [B]:
    the samples' places in the data set; augment [B, AUGMENT_DIM] float32: how x0 was augmented, None without
    augmentation; scale [B] float32: guidance scales, 1 where the label was dropped, None for a network that reads none."""

    x0: Tensor
    noise: Tensor
    level: Level
    quantile: Tensor
    labels: Tensor | None
    indices: Tensor
    augment: Tensor | None = None
    scale: Tensor | None = None


@dataclass
class BatchLoader:
    """Batches by position; every draw is a function of (seed, position).

    conditional: whether batches have labels. flip and label_dropout are drawn once per sample, here and nowhere else.
    pixels: the image fetcher; None: images are gathered when needed. balance: draw each class equally often. augment:
    probability of each augmentation, see data/augment.py; 0: none. max_scale: the largest guidance scale that is drawn;
    None: none is.
    """

    dataset: ImageDataset
    seed: int
    process: Process
    device: torch.device
    conditional: bool = True
    label_dropout: float = 0.0
    flip: bool = False
    pixels: ImageFetcher | None = None
    balance: bool = False
    augment: float = 0.0
    max_scale: float | None = None

    def __post_init__(self) -> None:
        dataset, seed = self.dataset, self.seed
        self.order = BalancedOrder(dataset.labels, seed) if self.balance else SampleOrder(len(dataset), seed)
        self.pixels = self.pixels or ImageFetcher(dataset, self.device)
        self.drawn_on = self.device if has_float64(self.device) else torch.device("cpu")

    def batch(self, positions: Tensor) -> Batch:
        """positions [B] int64 on the CPU."""
        indices = self.order(positions)
        pixels = self.pixels(indices)
        # what is one number per sample is computed on the host, and copied at once
        flip, drop, u = uniforms(self.seed, ("flip", "label_drop", "timestep"), positions)
        labels = torch.from_numpy(self.dataset.labels.take(indices.numpy()))
        dropped = drop < self.label_dropout
        labels = labels.masked_fill(dropped, self.dataset.label_space.K)
        scale = self._scales(positions).masked_fill(dropped, 1) if self.max_scale else None
        level, quantile = self.process.draw(u, cell=2**-32)
        labels, mirrored, places = to_device(torch.stack([labels, (flip < 0.5).long(), positions]), self.device)
        x0 = normalize_images(pixels)
        if self.flip:
            x0 = torch.where(mirrored.bool()[:, None, None, None], x0.flip(-1), x0)
        x0, augment = self._augmented(x0, positions) if self.augment else (x0, None)
        noise = normal(self.seed, "noise", places.to(self.drawn_on), tuple(x0.shape[1:])).to(self.device)
        labels = labels if self.conditional else None
        scale = None if scale is None else to_device(scale, self.device)
        return Batch(x0, noise, level.to(self.device), quantile, labels, indices, augment, scale)

    def _scales(self, positions: Tensor) -> Tensor:
        """Guidance scales [B], float32 on the CPU: 1 / scale is uniform from 1 / max_scale to 1 (Tang et al. 2025)."""
        low = 1 / self.max_scale
        return (1 / (low + (1 - low) * uniform(self.seed, "guidance", positions))).float()

    def _augmented(self, x0: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The augmented images, and their parameters."""
        drawn = draw_augmentations(self.seed, positions, self.augment)
        # on mps the CPU does it: which modes of grid_sample mps has depends on torch's version
        there = Augmentations(*(to_device(part, self.drawn_on) for part in vars(drawn).values()))
        x0 = augment_images(x0.to(self.drawn_on), there).to(self.device)
        return x0, there.parameters.to(self.device)


def make_batches(config: RunConfig, dataset: ImageDataset, process: Process, device: torch.device) -> BatchLoader:
    """The batches of a run. config: the resolved one."""
    training, data, conditional = config.training, config.data, config.model.class_conditional
    dropout = training.label_dropout if conditional else 0.0
    pixels = choose_image_fetcher(dataset, device, training.images_on)
    fixed = dataset, training.seed, process, device
    drawn = data.flip, pixels, data.balance, data.augment, config.model.max_guidance_scale
    return BatchLoader(*fixed, conditional, dropout, *drawn)


def images_per_pass(training: TrainingConfig, processes: int) -> int:
    """Images per process and pass. Raises InputError if the batch cannot be split evenly."""
    parts = processes * training.gradient_accumulation
    if training.batch_size % parts:
        text = f"training.batch_size {training.batch_size} (for all processes together) cannot be split over {processes} process(es) in {training.gradient_accumulation} pass(es)"
        raise InputError(f"{text}: make it a multiple of {parts}.")
    return training.batch_size // parts
