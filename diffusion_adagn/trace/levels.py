"""Noise levels in numbers, words and places on an axis: sigma = sigma_t / alpha_t, the same quantity under every process."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from ..diffusion.process import RHO, Process


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """The noise levels of a measurement.

    Args:
        times: What the network receives: t under ddpm, 1000 t under flow, ln(sigma) / 4 under edm.
        sigmas: sigma_t / alpha_t, as many; inf where nothing of the image is left. None: not known.
        process: "ddpm", "edm" or "flow".
    """

    times: Sequence[float]
    sigmas: Sequence[float] | None
    process: str = "ddpm"

    @classmethod
    def of(cls, process: Process, times: Sequence[float]) -> "NoiseLevels":
        """The levels at these times of a process."""
        level = process.level(torch.tensor(list(times), dtype=torch.float64))
        return cls(list(times), (level.sigma.double() / level.alpha.double()).tolist(), process.name)

    def __len__(self) -> int:
        return len(self.times)

    @property
    def has_t(self) -> bool:
        """Whether users know the times: edm's are only numbers for the network."""
        return self.process != "edm"

    def words(self, index: int) -> str:
        """Such as "sigma = 1.34, t = 500"."""
        t = f"t = {short(self.times[index])}"
        if self.sigmas is None:
            return t
        return f"sigma = {short(self.sigmas[index])}{f', {t}' * self.has_t}"

    def span(self, low: int, high: int) -> str:
        """Such as "sigma = 0.3 to 1.34 (t = 200 to 500)"."""
        t = f"t = {short(self.times[low])} to {short(self.times[high])}"
        if self.sigmas is None:
            return t
        return f"sigma = {short(self.sigmas[low])} to {short(self.sigmas[high])}{f' ({t})' * self.has_t}"

    @property
    def places(self) -> np.ndarray:
        """Places on an axis [T]: ln sigma; t where sigma is not known. 0 and infinity follow the others at their distance."""
        if self.sigmas is None:
            return np.asarray(self.times, dtype=float)
        with np.errstate(divide="ignore"):
            logs = np.log(np.asarray(self.sigmas, dtype=float))
        finite = np.unique(logs[np.isfinite(logs)])
        if not len(finite):
            return np.arange(len(logs), dtype=float)
        first, last = (finite[1] - finite[0], finite[-1] - finite[-2]) if len(finite) > 1 else (1.0, 1.0)
        return np.clip(logs, finite[0] - first, finite[-1] + last)


class LevelBin(NamedTuple):
    """A range of noise levels.

    Attributes:
        sigma: such as "0.3 to 1.34".
        t: such as "200 to 500"; empty under edm.
        words: such as "sigma = 0.3 to 1.34 (t = 200 to 500)".
    """

    sigma: str
    t: str
    words: str


def short(value: float) -> str:
    """Three significant digits; whole numbers as they are."""
    return f"{value:.0f}" if value == round(value, 0) and abs(value) < 1e6 else f"{float(f'{value:.3g}'):g}"


def evenly_spread(process: Process, count: int, last: float | None = None) -> list[float]:
    """Times whose `process.share` is evenly spread between the ends of sampling; of ddpm whole ones, without repetitions.

    Args:
        process: The process.
        count: How many.
        last: The largest. None: where sampling starts.
    """
    if process.name == "edm":
        low, high = (math.exp(4 * time / RHO) for time in process.times)
        return (np.log(np.linspace(low, high, count)) * RHO / 4).tolist()
    first, end = process.times
    times = np.linspace(first, end if last is None else last, count)
    return np.unique(times.round().astype(int)).tolist() if process.name == "ddpm" else times.tolist()


def training_bins(process: Process, count: int) -> list[LevelBin]:
    """The noise levels of `count` equally frequent parts of the training noise."""
    if not process.continuous:
        total = len(process.alphas_cumprod)
        edges = [-(-i * total // count) for i in range(count + 1)]
        pairs = [NoiseLevels.of(process, [a, max(a, b - 1)]) for a, b in pairwise(edges)]
        return [LevelBin(_range(p.sigmas), _range(p.times), p.span(0, 1)) for p in pairs]
    edges = NoiseLevels.of(process, process.quantile(torch.arange(1, count, dtype=torch.float64) / count).tolist())
    t_of = (lambda text: text) if edges.has_t else lambda text: ""

    def end(where: str, index: int) -> LevelBin:
        sigma, t = (f"{where} {short(values[index])}" for values in (edges.sigmas, edges.times))
        return LevelBin(sigma, t_of(t), f"sigma {sigma}{t_of(f' (t {t})')}")

    pairs = [(slice(i, i + 2), edges.span(i, i + 1)) for i in range(count - 2)]
    inner = [LevelBin(_range(edges.sigmas[of]), t_of(_range(edges.times[of])), words) for of, words in pairs]
    return [end("below", 0), *inner, end("above", -1)]


def _range(ends: Sequence[float]) -> str:
    return f"{short(ends[0])} to {short(ends[-1])}"
