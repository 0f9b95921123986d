"""What a sweep costs, before it starts: network evaluations, and the time of them from two timed batches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..evaluation.extractors import Extractor
from ..runtime.precision import use_precision
from ..sampling.pipeline import ClassConditionalPipeline


@dataclass(frozen=True)
class PointCost:
    """What one image of a point costs.

    Attributes:
        calls: network evaluations of the model for the class.
        guided: of these, those that are guided.
        seconds: of all of them, in one process, without the extraction of features.
        one_pass: whether guided ones have no second evaluation, of the guide or of the model.
    """

    calls: int
    guided: int
    seconds: float = 0.0
    one_pass: bool = False

    @property
    def evaluations(self) -> int:
        """Network evaluations."""
        return self.calls + self.guided * (not self.one_pass)


def seconds_per_image(pipe: ClassConditionalPipeline, batch_size: int, precision: str) -> float:
    """Seconds of one network evaluation of one image: the mean of two batches, after one that is not timed."""
    unet, device = pipe.unet, pipe.device
    side = [unet.config.sample_size] * 2
    x = torch.randn(batch_size, unet.config.in_channels, *side, generator=torch.Generator().manual_seed(0)).to(device)
    time_of_net = torch.full((batch_size,), pipe.process.times[0], device=device)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device) if unet.config.num_classes else None

    def one_batch() -> None:
        with torch.no_grad(), use_precision(precision, device):
            unet.denoise(x.to(unet.dtype), unet.modulation(time_of_net, labels)).sum().item()  # waits for the device

    one_batch()
    began = time.perf_counter()
    for _ in range(2):
        one_batch()
    return (time.perf_counter() - began) / (2 * batch_size)


def extraction_seconds(extractors: Sequence[Extractor], batch_size: int, shape: tuple[int, int, int]) -> float:
    """Seconds of the extractors for one image [H, W, C], from a batch after one that is not timed."""
    pixels = np.random.default_rng(0).integers(256, size=(batch_size, *shape), dtype=np.uint8)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        for extractor in extractors:
            extractor(pixels)
        seconds.append(time.perf_counter() - began)
    return seconds[1] / batch_size


def format_cost(costs: Iterable[PointCost], images: int, extraction: float, processes: int, batch_size: int) -> str:
    """The cost of points as a sentence.

    Args:
        costs: Of the points that are not finished.
        images: Per point.
        extraction: `extraction_seconds`.
        processes: That share the images.
        batch_size: Of the timed batches.
    """
    costs = list(costs)
    if not costs:
        return "cost: nothing is left to sample"
    evaluations = images * sum(cost.evaluations for cost in costs)
    seconds = images * sum(cost.seconds + extraction for cost in costs) / processes
    points = f"{len(costs)} point{'s' * (len(costs) > 1)}"
    return (
        f"cost: {points} of {images:,} images, {evaluations:,} network evaluations, about {duration(seconds)} "
        f"(from two timed batches of {batch_size} images)"
    )


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
