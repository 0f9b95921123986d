"""What a learned class does: which sites moved, the nearest classes, whether the label is used, whether it copies images."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..diffusion.loss import DiffusionLoss
from ..evaluation.heldout import HeldOut, losses_under
from ..evaluation.label_usage import VERDICTS, gap_verdict
from ..render.grids import labelled_grid
from ..render.text import counted
from ..sampling.pipeline import ClassConditionalPipeline, to_pixels
from .levels import evenly_spread

LEVELS = 10  # noise levels at which modulations are compared
MAX_CLASSES = 64  # classes that they are compared with
PAIRS = 256  # (image, noise level, noise) under each label
MIN_HELDOUT = 4  # images for the label check; with fewer, all are used
MAX_ROWS = 64  # per call of the network
SAMPLES, SAMPLER_STEPS = 64, 25
NEAR = 0.5  # of the distance between the images themselves: much nearer means copies
FAR = 2.0  # much farther means images of something else
SHOWN = 8  # sampled images in the sheet
NAMED = 3  # sites and classes in a sentence


@dataclass(frozen=True)
class Moved:
    """How far the modulation of a learned class is from those of the others.

    Attributes:
        sites: {site name: distance to the nearest class}, in units of the mean distance between two classes there; RMS
            over noise levels and channels.
        classes: {class: distance over all sites}, in the same unit, nearest first.
        layers: {layer: norm of its change / norm of its weight}.
    """

    sites: dict[str, float]
    classes: dict[str, float]
    layers: dict[str, float]

    @property
    def sentence(self) -> str:
        first = ", ".join(f"{name} ({far:.2f})" for name, far in list(self.classes.items())[:NAMED])
        far = sorted(self.sites, key=self.sites.get, reverse=True)[:NAMED]
        if far:
            text = f"The nearest classes by modulation are {first}; 1 is the mean distance between two classes."
            text += (
                f" The sites farthest from the nearest class: {', '.join(f'{n} ({self.sites[n]:.2f})' for n in far)}."
            )
        else:
            text = "How far the modulation moved has no unit here: the other classes do not differ in it."
        if self.layers:
            most = max(self.layers, key=self.layers.get)
            text += f" {len(self.layers)} layers are changed, most {most}, by {self.layers[most]:.1%} of its weight."
        return text


@dataclass(frozen=True)
class Used:
    """The loss under the new label against that under the nearest other class, paired by image.

    Attributes:
        other: the old class with the lowest loss, among the nearest ones.
        own_loss: mean loss under the new label.
        gap: mean difference, other - own.
        half: half of its 95% interval; NaN for one image.
        images: how many.
        heldout: whether they are images that were not learned from.
    """

    other: str
    own_loss: float
    gap: float
    half: float
    images: int
    heldout: bool

    @property
    def sentence(self) -> str:
        what = (
            counted(self.images, "held-out image") if self.heldout else f"{counted(self.images, 'image')} of the folder"
        )
        verdict = VERDICTS.get(gap_verdict(self.gap, self.half), "One image cannot show whether the label is used")
        interval = (
            ""
            if math.isnan(self.half)
            else f", 95% interval {self.gap - self.half:+.3g} to {self.gap + self.half:+.3g}"
        )
        return (
            f"{verdict}: on {what} the loss under {self.other}, the best of the nearest old classes, minus that under the new label "
            f"is {self.gap:+.3g} ({self.gap / self.own_loss:+.1%}){interval}."
        )


@dataclass(frozen=True)
class Neighbours:
    """Sampled images and the nearest of those that the class was learned from, by RMS of the pixels in 0..1.

    Attributes:
        sampled: uint8 [N, H, W, C], the nearest first.
        nearest: uint8 [N, H, W, C], beside each its nearest image.
        distance: median distance of a sampled image to the nearest one.
        between: median distance of these images to each other's nearest; None for one image.
    """

    sampled: np.ndarray = field(repr=False)
    nearest: np.ndarray = field(repr=False)
    distance: float = math.nan
    between: float | None = None

    @property
    def copies(self) -> bool:
        return self.between is not None and self.distance < NEAR * self.between

    @property
    def is_far(self) -> bool:
        return self.between is not None and self.distance > FAR * self.between

    @property
    def sentence(self) -> str:
        text = (
            "A sampled image differs from the nearest of the images that the class was learned from by "
            f"{self.distance:.3f} (RMS of pixels in 0..1, median)"
        )
        if self.between is None:
            return f"{text}. From one image nothing can be said about variety: every sampled image is a variant of it."
        text += f"; the images differ from the nearest of each other by {self.between:.3f}."
        if self.copies:
            text += (
                " WARNING: it copies. The sampled images are much nearer to those that it was learned from than these are to "
                "each other. Learn it from more images, with fewer steps, a lower rank or a smaller depth."
            )
        elif self.is_far:
            text += (
                " WARNING: the sampled images are much farther from those that it was learned from than these are from each "
                "other, so they probably do not look like them: look at the sheet. Learn it with a larger depth, or more steps."
            )
        return text

    def sheet(self):
        """The nearest pairs, as an image."""
        rows = [list(self.sampled[:SHOWN]), list(self.nearest[:SHOWN])]
        return labelled_grid(rows, ["sampled", "nearest"], title="Sampled images that are nearest to one of the images")


@dataclass(frozen=True)
class LearnedTrace:
    """What was measured of a learned class; None where images are needed and not there."""

    name: str
    moved: Moved
    used: Used | None = None
    neighbours: Neighbours | None = None

    @property
    def sentences(self) -> list[str]:
        return [part.sentence for part in (self.moved, self.used, self.neighbours) if part is not None]

    def figures(self) -> dict:
        """The numbers, as JSON values."""
        values = {"moved": asdict(self.moved)}
        if self.used is not None:
            values["used"] = asdict(self.used) | {"half": None if math.isnan(self.used.half) else self.used.half}
        if self.neighbours is not None:
            n = self.neighbours
            values["neighbours"] = {"distance": n.distance, "between": n.between, "copies": n.copies}
        return values


def trace_learned(
    pipe: ClassConditionalPipeline,
    label: int,
    loss: DiffusionLoss,
    x0: Tensor | None = None,
    heldout: Sequence[bool] = (),
) -> LearnedTrace:
    """Measure a learned class.

    Args:
        pipe: Its pipeline.
        label: Of the class.
        loss: Of the run.
        x0: The images that it was learned from and held-out ones, float32 [N, C, H, W] in [-1, 1]; None: not there.
        heldout: Which of them are held out, [N].
    """
    moved = how_far(pipe, label)
    if x0 is None:
        return LearnedTrace(pipe.labels.name(label), moved)
    x0, is_heldout = x0.to(pipe.device), torch.tensor(list(heldout))
    enough = int(is_heldout.sum()) >= MIN_HELDOUT
    tested = x0[is_heldout.to(x0.device)] if enough else x0
    used = is_used(pipe, label, loss, tested, list(moved.classes), enough)
    return LearnedTrace(pipe.labels.name(label), moved, used, neighbours(pipe, label, x0[~is_heldout.to(x0.device)]))


@torch.no_grad()
def how_far(pipe: ClassConditionalPipeline, label: int) -> Moved:
    """Compare the modulation of a learned class with those of the other classes."""
    unet, labels = pipe.unet, pipe.labels
    ids = list(range(min(labels.K, MAX_CLASSES)))
    y = torch.tensor([label, *ids], device=unet.device)
    modulations = [unet.modulation(torch.full((len(y),), t), y) for t in evenly_spread(pipe.process, LEVELS)]
    square = {s.name: _distances([m[s.name] for m in modulations]) for s in unet.sites()}
    unit = {name: _unit(d[1:, 1:]) for name, d in square.items()}
    sites = {name: math.sqrt(d[0, 1:].min().item() / unit[name]) for name, d in square.items() if unit[name]}
    total = sum(square.values())
    over_all = (total[0, 1:] / (_unit(total[1:, 1:]) or 1)).sqrt()
    order = over_all.argsort().tolist()
    classes = {labels.name(ids[i]): over_all[i].item() for i in order}
    one = unet.learned[label - (len(labels.label_names) - len(unet.learned))]
    weights = unet.changeable_layers()
    layers = {
        name: ((change.up @ change.down.flatten(1)).norm() / weights[name].weight.norm().clamp(min=1e-12)).item()
        for name, change in one.layers.items()
    }
    return Moved(sites, classes, layers)


def _distances(params: list[tuple[Tensor, ...]]) -> Tensor:
    """Mean squared differences between the rows over levels, fields and channels, float64 [rows, rows]."""
    flat = torch.cat([part.double().flatten(1) for mod in params for part in mod], dim=1)
    return torch.cdist(flat, flat).square() / flat.shape[1]


def _unit(square: Tensor) -> float:
    """The mean squared distance between two different classes; 0 for one class, or where all are the same."""
    count = len(square)
    return square.sum().item() / (count * (count - 1)) if count > 1 else 0.0


@torch.no_grad()
def is_used(
    pipe: ClassConditionalPipeline, label: int, loss: DiffusionLoss, x0: Tensor, near: list[str], heldout: bool
) -> Used:
    """Compare the losses on x0 [N, C, H, W] under the new label and under the nearest classes; `near`: nearest first."""
    rounds = max(1, PAIRS // len(x0))
    pairs = list(HeldOut.of(x0, rounds * len(x0), loss.process).batches(MAX_ROWS, x0.device))
    others = pipe.labels.parse([f"name:{name}" for name in near[:NAMED]])
    losses = {y: losses_under(pipe.unet, pairs, loss.process, loss.mse, y).cpu().double() for y in (label, *others)}
    losses = {y: values.view(rounds, len(x0)).mean(0) for y, values in losses.items()}
    best = min(others, key=lambda y: losses[y].mean().item())
    difference, n = losses[best] - losses[label], len(x0)
    half = 1.96 * difference.std().item() / math.sqrt(n) if n > 1 else math.nan
    return Used(pipe.labels.name(best), losses[label].mean().item(), difference.mean().item(), half, n, heldout)


def neighbours(pipe: ClassConditionalPipeline, label: int, x0: Tensor) -> Neighbours:
    """Sample the class, and find the nearest of the images x0 [N, C, H, W] that it was learned from."""
    parts = []
    for seeds in torch.arange(SAMPLES).split(MAX_ROWS):
        batch = {"seeds": seeds.tolist(), "num_inference_steps": SAMPLER_STEPS, "output_type": "np"}
        parts.append(pipe([label] * len(seeds), **batch).images)
    sampled = np.concatenate(parts)
    real = (x0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    distance = rms_distances(sampled, real)
    order = distance.min(1).argsort(kind="stable")
    between = None
    if len(real) > 1:
        apart = rms_distances(real, real) + np.where(np.eye(len(real), dtype=bool), np.inf, 0)
        between = float(np.median(apart.min(1)))
    nearest = to_pixels(real)[distance.argmin(1)[order]]
    return Neighbours(to_pixels(sampled)[order], nearest, float(np.median(distance.min(1))), between)


def rms_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """RMS of the pixel differences, float64 [N, M], between images [N, H, W, C] and [M, H, W, C]."""
    a, b = (torch.from_numpy(np.ascontiguousarray(x)).double().flatten(1) for x in (a, b))
    return (torch.cdist(a, b) / math.sqrt(a.shape[1])).numpy()
