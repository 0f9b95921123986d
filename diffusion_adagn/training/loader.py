"""The training batch at a position of the run: images, labels or null, timesteps and noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import RunConfig, TrainingConfig
from ..data import ImageDataset
from ..data.augment import Augmentations, augment_images, draw_augmentations
from ..data.rng import BalancedOrder, SampleOrder, normal, uniforms
from ..diffusion.loss import normalize_images
from ..errors import InputError
from .image_fetcher import ImageFetcher, choose_image_fetcher, to_device


@dataclass
class Batch:
    """x0 and noise [B, C, H, W] float32 (x0 in [-1, 1]); t [B] int64; labels [B] int64 (K where dropped), None without
    classes; indices [B]: the samples' places in the data set; augment [B, AUGMENT_DIM] float32: how x0 was augmented, None
    without augmentation."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    labels: Tensor | None
    indices: Tensor
    augment: Tensor | None = None


class BatchLoader:
    """Batches by position; every draw is a function of (seed, position).

    conditional: whether batches have labels. flip and label_dropout are drawn once per sample, here and nowhere else.
    pixels: the image fetcher; None: images are gathered when needed. balance: draw each class equally often. augment:
    probability of each augmentation, see data/augment.py; 0: none.
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
        pixels: ImageFetcher | None = None,
        balance: bool = False,
        augment: float = 0.0,
    ):
        self.dataset, self.seed, self.device = dataset, seed, device
        self.num_timesteps, self.conditional = num_timesteps, conditional
        self.label_dropout, self.flip, self.augment = label_dropout, flip, augment
        self.order = BalancedOrder(dataset.labels, seed) if balance else SampleOrder(len(dataset), seed)
        self.pixels = pixels or ImageFetcher(dataset, device)
        self.drawn_on = torch.device("cpu") if device.type == "mps" else device  # mps has no float64

    def batch(self, positions: Tensor) -> Batch:
        """positions [B] int64 on the CPU."""
        indices = self.order(positions)
        pixels = self.pixels(indices)
        # what is one number per sample is computed on the host, and copied at once
        flip, drop, place = uniforms(self.seed, ("flip", "label_drop", "timestep"), positions)
        labels = torch.from_numpy(self.dataset.labels.take(indices.numpy()))
        labels = labels.masked_fill(drop < self.label_dropout, self.dataset.label_space.K)
        small = torch.stack([(place * self.num_timesteps).long(), labels, (flip < 0.5).long(), positions])
        t, labels, mirrored, places = to_device(small, self.device)
        x0 = normalize_images(pixels)
        if self.flip:
            x0 = torch.where(mirrored.bool()[:, None, None, None], x0.flip(-1), x0)
        x0, augment = self._augmented(x0, positions) if self.augment else (x0, None)
        noise = normal(self.seed, "noise", places.to(self.drawn_on), tuple(x0.shape[1:])).to(self.device)
        return Batch(x0, noise, t, labels if self.conditional else None, indices, augment)

    def _augmented(self, x0: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The augmented images, and their parameters."""
        drawn = draw_augmentations(self.seed, positions, self.augment)
        # on mps the CPU does it: which modes of grid_sample mps has depends on torch's version
        there = Augmentations(*(to_device(part, self.drawn_on) for part in vars(drawn).values()))
        x0 = augment_images(x0.to(self.drawn_on), there).to(self.device)
        return x0, there.parameters.to(self.device)


def make_batches(config: RunConfig, dataset: ImageDataset, device: torch.device) -> BatchLoader:
    """The batches of a run. config: the resolved one."""
    training, data, conditional = config.training, config.data, config.model.class_conditional
    dropout = training.label_dropout if conditional else 0.0
    pixels = choose_image_fetcher(dataset, device, training.images_on)
    fixed = dataset, training.seed, config.diffusion.num_train_timesteps, device
    return BatchLoader(*fixed, conditional, dropout, data.flip, pixels, data.balance, data.augment)


def images_per_pass(training: TrainingConfig, processes: int) -> int:
    """Images per process and pass. Raises InputError if the batch cannot be split evenly."""
    parts = processes * training.gradient_accumulation
    if training.batch_size % parts:
        raise InputError(
            f"training.batch_size {training.batch_size} (for all processes together) cannot be split over {processes} process(es) in {training.gradient_accumulation} pass(es): make it a multiple of {parts}."
        )
    return training.batch_size // parts
