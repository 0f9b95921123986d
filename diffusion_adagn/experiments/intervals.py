"""Guidance intervals that are found: the noise levels at which the label moves the predicted image (`adagn sweep --interval auto`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import StrictStr

from ..errors import InputError
from ..render.text import listed, number, percent
from ..sampling.guidance import Interval
from ..sampling.pipeline import ClassConditionalPipeline
from ..schema import document, read_document
from ..trace.levels import NoiseLevels
from ..trace.probes import Sensitivity, label_sensitivity
from ..trace.sentences import band_interval
from ..trace.tracing import heldout_images, objective_of, probe_images, probed_timesteps
from .comparison import own_best
from .point_results import NEUTRAL, PointResult
from .verdicts import metric_names

FILE = "intervals.json"
FRACTIONS = (0.5, 0.25)  # of the largest change: the narrow proposal and the wide one
LEVELS, IMAGES = 20, 64  # that are probed


@document
class Found:
    """What was found, in intervals.json.

    intervals: as `--interval` takes them. fractions: of the largest change, one per interval. sigmas and change: the noise
    levels probed, and the RMS change of the predicted image there. images: how many.
    """

    intervals: tuple[StrictStr, ...]
    fractions: tuple[float, ...]
    sigmas: tuple[float, ...]
    change: tuple[float, ...]
    images: int

    def sentence(self) -> str:
        """What is proposed, and from what."""
        peak = max(range(len(self.change)), key=lambda i: self.change[i])
        bands = [f"{band} (at least {percent(f)} of that)" for band, f in zip(self.intervals, self.fractions)]
        return (
            f"The label moves the predicted image most at sigma {number(self.sigmas[peak])}, by RMS {number(self.change[peak])}. "
            f"Proposed intervals: {listed(bands)}."
        )


def find_intervals(pipe: ClassConditionalPipeline, source: str | Path) -> Found:
    """Propose intervals for a model.

    Args:
        pipe: The model.
        source: Its path; the images held out of its run's data are probed, sampled ones where there are none.

    Raises:
        InputError: The label moves the predicted image nowhere, or as much at every noise level.
    """
    objective = objective_of(pipe, source)
    x0, labels = probe_images(pipe, heldout_images(source, pipe, None), IMAGES)
    if labels is None:
        raise InputError(
            f"{source} has no classes: --interval auto needs a label. Give intervals, such as sigma:0.3-5."
        )
    times = probed_timesteps(objective.process, LEVELS)
    times = [t for t, sigma in zip(times, NoiseLevels.of(objective.process, times).sigmas) if math.isfinite(sigma)]
    measured = label_sensitivity(pipe.unet, objective, x0, labels, times)
    whole = (0, len(measured.x0) - 1)
    bands = {_interval(measured, f): f for f in FRACTIONS if measured.band_indices(f) not in (None, whole)}
    if not bands:
        raise InputError(
            f"the label moves the predicted image of {source} about as much at every noise level, so that no interval can be proposed: "
            "give intervals, such as --interval none,sigma:0.3-5."
        )
    return Found(
        tuple(bands), tuple(bands.values()), tuple(measured.levels.sigmas), tuple(measured.x0.tolist()), len(x0)
    )


def _interval(measured: Sensitivity, fraction: float) -> str:
    """The band as `--interval` takes it; where it reaches the first or last level, to the end of sampling."""
    first, last = measured.band_indices(fraction)
    band = Interval.parse(band_interval(measured, fraction))
    return str(Interval("sigma", band.low if first else 0.0, band.high if last < len(measured.x0) - 1 else math.inf))


def saved_intervals(file: Path) -> Found | None:
    """What an earlier start of this sweep found; None if there was none."""
    return read_document(file, Found) if file.is_file() else None


def verdict(points: Sequence[PointResult], intervals: Sequence[str], metric: str, titles: Mapping[str, str]) -> str:
    """Whether a proposed interval holds up against guidance at every noise level, each at its own best setting.

    It does if its best point is not distinguishably worse than that of full guidance, with fewer network evaluations.

    Args:
        points: The points of the sweep.
        intervals: Those proposed.
        metric: The metric to compare by.
        titles: Titles of the metrics.
    """
    one = own_best(points, "interval", metric)
    full = NEUTRAL["interval"]
    if one is None or full not in one.best:
        return "The proposed intervals were not measured beside guidance at every noise level."
    rows = {p.id: p.row for p in points}
    members, calls = one.choice.members, {value: rows[point].get("nfe", 0) for value, point in one.best.items()}
    words, held = [], []
    for interval in intervals:
        if (value := f"interval {interval}") not in one.best:
            words.append(f"{interval} was not measured")
            continue
        ours, theirs = (one.best[name] in members for name in (value, full))
        how = "not distinguishable from" if ours and theirs else "better than" if ours else "worse than or equal to"
        words.append(f"{interval} is {how} full guidance ({calls[value]} evaluations per image against {calls[full]})")
        held += [interval] if ours and calls[value] <= calls[full] else []
    name = metric_names(titles)[metric]
    result = f"The proposal held: {listed(held)}" if held else "The proposal did not hold"
    return f"{result}. By {name}, each at its own best setting, {listed(words)}."
