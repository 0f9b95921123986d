"""Which class is this image? The class under which the network denoises it best (Li et al. 2023, arXiv 2303.16203).

Every class denoises the same noisy versions of the image. A class whose loss is clearly higher than the lowest one
drops out, so most of the network's evaluations compare the classes that are hard to distinguish.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.rng import normal
from ..diffusion.loss import normalize_images
from ..diffusion.process import Process
from ..models.unet import AdaGNUNet
from .label_usage import GOLDEN

FIRST = 4  # draws before a class may drop out: standard errors of fewer are too rough
MAX_DRAWS = 4096  # also the distance between the positions of two images' draws
BEHIND = 2.0  # standard errors by which a class that drops out is behind
PROBED_LEVELS, PROBED_IMAGES, PROBED_CLASSES = 16, 16, 16


@dataclass(frozen=True)
class LabelLevels:
    """The noise levels at which the label has influence. They are cells of the training noise of equal probability.

    Args:
        sigma: float64 [L], the noise level at the middle of each cell.
        influence: float64 [L], the variance of the prediction over the classes, relative to the loss.
        weight: float64 [L], 1 / loss. With it, the sum of the losses is a log-likelihood up to a factor.
    """

    sigma: Tensor
    influence: Tensor
    weight: Tensor

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Places in the training noise, drawn in proportion to the influence, and their weights.

        Args:
            u: float64 [J] in [0, 1).

        Returns:
            float64 [J]: the fraction of the training noise below the level; float64 [J]: its weight.
        """
        share = self.influence / self.influence.sum()
        ends = share.cumsum(0)
        cell = torch.searchsorted(ends, u, right=True).clamp(max=len(share) - 1)
        inside = ((u - ends[cell] + share[cell]) / share[cell]).clamp(0, 1 - 1e-9)
        return (cell + inside) / len(share), self.weight[cell]


@dataclass(frozen=True)
class Stage:
    """The state after a stage. draws: noisy versions of each image until then, if several classes remained.

    Args:
        draws: The number of noisy versions.
        predicted: int64 [N], the class with the lowest loss.
        evaluations: int64 [N], network evaluations of each image until then.
    """

    draws: int
    predicted: Tensor
    evaluations: Tensor


@dataclass(frozen=True)
class ZeroShot:
    """The classes of N images.

    Args:
        stages: At least one; the last one has the result.
        margin: float64 [N], by how many standard errors the loss of the second class was higher than that of the
            first, when both were last compared.
        second: int64 [N], the second class.
        levels: Where the label has influence.
        probing: Network evaluations that measured this, for all images together.
    """

    stages: tuple[Stage, ...]
    margin: Tensor
    second: Tensor
    levels: LabelLevels
    probing: int

    @property
    def predicted(self) -> Tensor:
        """int64 [N], the class of each image."""
        return self.stages[-1].predicted

    def evaluations(self, stage: Stage) -> float:
        """Network evaluations per image until the end of a stage, with a share of the probing."""
        return (int(stage.evaluations.sum()) + self.probing) / len(stage.predicted)

    def curve(self, labels: Tensor) -> list[tuple[float, float]]:
        """(evaluations per image, share of images whose class is right) after each stage. labels: int64 [N]."""
        return [(self.evaluations(s), (s.predicted == labels).double().mean().item()) for s in self.stages]


class _Losses:
    """The loss of images under classes, at noisy versions that depend on the image's index and the draw only."""

    def __init__(self, unet: AdaGNUNet, process: Process, pixels: Tensor, batch_size: int, autocast: Callable):
        self.unet, self.process, self.pixels = unet, process, pixels
        self.batch_size, self.autocast = batch_size, autocast

    def predictions(self, image: Tensor, draw: Tensor, u: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The network's output and its target, float32 [R, C, H, W] each.

        Args:
            image: int64 [R], indices.
            draw: int64 [R], below MAX_DRAWS.
            u: float64 [R], the fraction of the training noise below each level.
            label: int64 [R].
        """
        device = self.unet.device
        x0 = normalize_images(self.pixels[image])
        noise = normal(0, "zero_shot", image * MAX_DRAWS + draw, tuple(x0.shape[1:])).to(device)
        level = self.process.draw(u, cell=0.0)[0].to(device)
        x0 = x0.to(device)
        with self.autocast():
            output = self.unet(self.process.add_noise(x0, noise, level), level.time, label.to(device)).sample
        return output[:, : x0.shape[1]].float(), self.process.target(x0, noise, level).float()

    def of_rows(self, *rows: Tensor) -> Tensor:
        """float64 [R], the mean squared error of each row of the arguments of `predictions`."""
        parts = []
        for batch in zip(*(values.split(self.batch_size) for values in rows)):
            output, target = self.predictions(*batch)
            parts.append((output - target).square().flatten(1).mean(1).cpu().double())
        return torch.cat(parts)


@torch.no_grad()
def classify(
    unet: AdaGNUNet,
    process: Process,
    pixels: Tensor,
    draws: int = 64,
    batch_size: int = 256,
    autocast: Callable = nullcontext,
    progress: bool = False,
) -> ZeroShot:
    """The class of each image: the one with the lowest denoising loss.

    The levels are drawn where the label has influence (`label_levels`). All classes of an image have the same levels and
    noises. After each of 4, 8, 16, ... draws, a class drops out if its mean loss is two standard errors above the lowest one,
    paired by draw. An image is finished when one class remains.

    Args:
        unet: A network with two or more classes.
        process: Its process, with the training noise.
        pixels: uint8 [N, H, W, C], in the size and channels of the network.
        draws: Noisy versions of an image at most; 4 to 4,096.
        batch_size: Rows per call of the network.
        autocast: Creates the context of the network's calls.
        progress: Show a progress bar.

    Returns:
        The classes, and what was measured at each stage. The result depends on an image, its index and on `pixels`, of
        which up to 16 images measure the influence.
    """
    losses = _Losses(unet, process, pixels, batch_size, autocast)
    levels, probing = label_levels(losses)
    ends = _stage_ends(draws)
    u, weight = levels.draw((torch.arange(draws).double() * GOLDEN + 0.5) % 1)
    parts = []
    with tqdm(total=len(pixels), desc="zero-shot classes", unit="image", disable=not progress, leave=False) as bar:
        for images in torch.arange(len(pixels)).split(max(1, batch_size // 4)):
            parts.append(_stages(losses, images, u, weight, ends))
            bar.update(len(images))
    predicted, evaluations, margin, second = (torch.cat(values, dim=-1) for values in zip(*parts))
    stages = tuple(Stage(end, *values) for end, *values in zip(ends, predicted, evaluations))
    return ZeroShot(stages, margin, second, levels, probing)


def label_levels(losses: _Losses) -> tuple[LabelLevels, int]:
    """Measure where the label has influence, on up to 16 images and 16 classes; and the number of evaluations.

    The loss at a level is that of the best class of each image.
    """
    n, k = len(losses.pixels), losses.unet.config.num_classes
    images = torch.arange(min(n, PROBED_IMAGES)) * n // min(n, PROBED_IMAGES)
    classes = torch.arange(min(k, PROBED_CLASSES)) * k // min(k, PROBED_CLASSES)
    middles = (torch.arange(PROBED_LEVELS).double() + 0.5) / PROBED_LEVELS
    influence, loss = [], []
    for place, u in enumerate(middles):
        variance, lowest = 0.0, 0.0
        for some in images.split(max(1, losses.batch_size // len(classes))):
            row, label = some.repeat_interleave(len(classes)), classes.repeat(len(some))
            draw = torch.full_like(row, MAX_DRAWS - 1 - place)
            output, target = (
                values.unflatten(0, (len(some), len(classes)))
                for values in losses.predictions(row, draw, u.expand(len(row)), label)
            )
            variance += output.double().var(1, unbiased=False).flatten(1).mean(1).sum().item()
            lowest += (output - target).square().flatten(2).mean(2).amin(1).sum().item()
        influence.append(variance / max(lowest, 1e-12))
        loss.append(lowest / len(images))
    values = torch.tensor(influence, dtype=torch.float64)
    if not values.sum() > 0:  # the label changes nothing
        values = torch.ones_like(values)
    level = losses.process.draw(middles, cell=0.0)[0]
    sigma = level.sigma.double() / level.alpha.double()
    weight = 1 / torch.tensor(loss, dtype=torch.float64).clamp(min=1e-12)
    return LabelLevels(sigma, values, weight), PROBED_LEVELS * len(images) * len(classes)


def _stage_ends(draws: int) -> list[int]:
    """1, 2, 4, 8, ... and `draws`."""
    return [*(1 << i for i in range((draws - 1).bit_length())), draws]


def _stages(losses: _Losses, images: Tensor, u: Tensor, weight: Tensor, ends: list[int]) -> tuple[Tensor, ...]:
    """All stages of some images [n]: predicted and evaluations [stages, n]; margin and second [n]."""
    n, k = len(images), losses.unet.config.num_classes
    measured = torch.full((n, k, ends[-1]), math.nan, dtype=torch.float64)
    remaining = torch.ones(n, k, dtype=torch.bool)
    best, second = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    margin, spent = torch.full((n,), math.nan, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
    predicted, evaluations = [], []
    for start, end in zip([0, *ends], ends):
        open_ = remaining.sum(1) > 1
        pair = (remaining & open_[:, None]).nonzero()
        if len(pair):
            draw = torch.arange(start, end)
            row, label = (column.repeat_interleave(len(draw)) for column in pair.T)
            j = draw.repeat(len(pair))
            values = losses.of_rows(images[row], j, u[j], label) * weight[j]
            measured[pair[:, 0], pair[:, 1], start:end] = values.view(len(pair), -1)
            spent += remaining.sum(1) * open_ * len(draw)
            for i in open_.nonzero().flatten().tolist():
                best[i], second[i], margin[i] = _compare(measured[i, :, :end], remaining[i])
        predicted.append(best.clone())
        evaluations.append(spent.clone())
    return torch.stack(predicted), torch.stack(evaluations), margin, second


def _compare(losses: Tensor, remaining: Tensor) -> tuple[int, int, float]:
    """Compare the remaining classes of an image; those that are clearly behind drop out of `remaining`.

    Args:
        losses: float64 [K, J] of each class and draw.
        remaining: bool [K], two or more; changed in place.

    Returns:
        The best class, the second, and how many standard errors it is behind.
    """
    ids = remaining.nonzero().flatten()
    mean = losses[ids].mean(1)
    order = ids[mean.argsort(stable=True)]
    if losses.shape[1] == 1:
        return int(order[0]), int(order[1]), math.nan
    difference = losses[ids] - losses[order[0]]
    error = difference.std(1) / math.sqrt(losses.shape[1])
    behind = difference.mean(1) / error.clamp(min=1e-300)
    if losses.shape[1] >= FIRST:
        remaining[ids[behind > BEHIND]] = False
    return int(order[0]), int(order[1]), float(behind[ids == order[1]])
