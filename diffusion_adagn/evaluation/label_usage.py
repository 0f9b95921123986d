"""How much a network uses its label: its loss on held-out images with the true class, a wrong one, or null.

An untrained net already answers differently to different labels; only a loss that is lower for the true label says that
the label is used.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import ImageDataset
from ..data.rng import normal, uniform
from ..diffusion.loss import DiffusionLoss, normalize_images
from ..models.unet import AdaGNUNet

GOLDEN = (math.sqrt(5) - 1) / 2


def gap_verdict(mean: float, half: float) -> Literal["used", "misleads", "unused", "open"]:
    """Verdict on the loss gap of a wrong label: whether the 95% interval mean +- half is above 0, below it, or contains it; "open" for nan."""
    if not (math.isfinite(mean) and math.isfinite(half)):
        return "open"
    return "used" if mean - half > 0 else "misleads" if mean + half < 0 else "unused"


@dataclass(frozen=True)
class LabelUse:
    """Losses (simple, [N], float64) of the same x_t under each label, and what they were measured at.

    t: [N] timesteps of 0..num_timesteps-1. image: [N], which held-out image. true: with its class; wrong: with the
    class of another image, nan where that is the same class (None if it is for all); null: with the null label (None without one).
    """

    num_timesteps: int
    t: Tensor
    image: Tensor
    true: Tensor
    wrong: Tensor | None
    null: Tensor | None

    def gap(self, against: Literal["wrong", "null"], low: float = 0.0, high: float = 1.0) -> tuple[float, float] | None:
        """Mean of loss(against) - loss(true) over low <= t / T < high, and the half-width of its 95% interval.

        Paired: same image, timestep and noise. The interval is over images: what is measured several times on one counts as
        one cluster. None where there is no such label; nan for an interval over fewer than two images. Only the gap to a *wrong*
        label says that the label is used: the null row may simply be trained less.
        """
        other = getattr(self, against)
        if other is None:
            return None
        inside = (self.t >= low * self.num_timesteps) & (self.t < high * self.num_timesteps) & ~other.isnan()
        images, place = self.image[inside].unique(return_inverse=True)
        if not len(images):
            return math.nan, math.nan
        difference, groups = (other - self.true)[inside], len(images)
        mean = difference.mean()
        sums = torch.zeros(groups, dtype=torch.float64).index_add_(0, place, difference - mean)
        variance = sums.square().sum() / len(difference) ** 2 * groups / max(groups - 1, 1)
        return mean.item(), 1.96 * variance.sqrt().item() if groups > 1 else math.nan

    def losses(self, against: Literal["wrong", "null"]) -> tuple[float, float, int]:
        """Mean loss with the true label and with the other, where both were measured, and the number of images."""
        other = getattr(self, against)
        both = ~other.isnan()
        return self.true[both].mean().item(), other[both].mean().item(), len(self.image[both].unique())


@torch.no_grad()
def label_use(
    unet: AdaGNUNet,
    dataset: ImageDataset,
    objective: DiffusionLoss,
    evaluations: int = 2048,
    batch_size: int = 128,
    autocast: Callable = nullcontext,
    progress: bool = False,
    max_rows: int | None = None,
) -> LabelUse:
    """Measure it on about that many (image, timestep, noise); each is shared by the three labels.

    dataset: held-out images, of which that many at most are taken, evenly spread. The draws depend on nothing but the data set,
    so two networks meet the same ones: noise and wrong labels of seed 0, and in each round over the images the timesteps
    evenly spread over 0..T-1, otherwise paired in each round.

    batch_size: evaluations at a time, each of up to three rows. most_rows: of a call of the network, where memory is scarce;
    None: three times batch_size.
    """
    device, n, k = unet.device, min(len(dataset), evaluations), unet.config.num_classes
    rounds = max(1, round(evaluations / n))
    positions = torch.arange(n * rounds)
    image = positions % n * len(dataset) // n
    spread = (positions % n / n + positions // n * GOLDEN) % 1
    t = (spread * objective.num_timesteps).long()
    true = torch.from_numpy(dataset.labels[image.numpy()])
    labels_by_kind = {"true": true}
    wrong = torch.cat([other_labels(true[:n], r) for r in range(rounds)])
    if (wrong != true).any():
        labels_by_kind["wrong"] = wrong
    if unet.config.null_class:
        labels_by_kind["null"] = torch.full_like(true, k)
    losses: dict[str, list[Tensor]] = {label: [] for label in labels_by_kind}
    if max_rows is not None:
        batch_size = min(batch_size, max(1, max_rows // len(labels_by_kind)))
    batches = positions.split(batch_size)
    for places in tqdm(batches, desc="label use", unit="batch", disable=not progress, leave=False):
        pixels, _ = dataset.gather(image[places].numpy())
        x0 = normalize_images(torch.from_numpy(pixels))
        noise = normal(0, "heldout", places, tuple(x0.shape[1:])).to(device)
        x0, timesteps = x0.to(device), t[places].to(device)
        x_t = objective.add_noise(x0, noise, timesteps)
        labels = torch.cat([some[places] for some in labels_by_kind.values()]).to(device)
        rows = x_t.repeat(len(labels_by_kind), 1, 1, 1), timesteps.repeat(len(labels_by_kind)), labels
        calls = zip(*(some.split(max_rows or len(labels)) for some in rows))
        with autocast():
            output = torch.cat([unet(*some).sample for some in calls])
        for label, output_rows in zip(labels_by_kind, output.chunk(len(labels_by_kind))):
            losses[label].append(objective.mse(output_rows, x0, noise, timesteps).cpu().double())
    joined = {label: torch.cat(parts) for label, parts in losses.items()}
    if "wrong" in joined:
        joined["wrong"][wrong == true] = math.nan
    return LabelUse(objective.num_timesteps, t, image, *(joined.get(label) for label in ("true", "wrong", "null")))


def other_labels(labels: Tensor, round: int) -> Tensor:
    """These labels [n], dealt out again so that as few as can be fall to an image of their own class.

    Every label is used as often as it is true. So a label that is unrelated to its image, but is trained more or less than
    another (uneven classes), moves the mean by nothing: what one image gains by a well-trained wrong label, another loses.
    """
    n = len(labels)
    order = torch.argsort(uniform(0, "wrong_label", torch.arange(n) + round * n))
    dealt = labels[order]
    same = (dealt == labels).nonzero().flatten()
    if len(same):
        # sorted and shifted by the largest class, each of these meets another class, if none is over half of them
        by_class = same[torch.argsort(labels[same], stable=True)]
        largest = int(torch.bincount(labels[same]).max())
        dealt[by_class] = dealt[by_class].roll(largest)
    return dealt
