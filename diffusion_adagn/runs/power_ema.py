"""The mathematics of the power-function EMA (Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C).

An average after step t gives the weights of step s the share (s^(g+1) - (s-1)^(g+1)) / t^(g+1), g > 0 its exponent: the
profile s^g, which grows with the run. Its length is the standard deviation of that profile divided by t, sigma_rel in
the paper. Two lengths are tracked in training and saved now and then; any other is a sum of the saved averages.

How far such a sum is from the exact average depends on how the weights moved. Here they are taken for a random walk from 0,
as the noise of the gradients moves them: then the error is a sum of squares (`fit`), whose minimum is a least-squares problem
in the coefficients. Fitting the profiles themselves, as the paper does, takes each step's weights for independent of the
step before: the residual of that fit is 30 to 190 times the error of such weights (64 snapshots). No torch is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_LENGTH = 0.005  # the shortest that is looked for
MAX_ERROR = 0.01  # relative L2 error of the weights above which a length is rejected
HALF_ROUNDING = 2e-4  # relative L2 error of weights that are rounded to float16 (2^-11 / sqrt(3) at a mantissa of 1.4)
MAX_POINTS = 4096  # steps at which profiles are compared; those of a longer run are spread evenly
CONSTANT = 1e3  # weight of the row that keeps the sum of the coefficients at 1, so that weights that never moved stay


@dataclass(frozen=True)
class Average:
    """An average that was saved.

    step: after how many steps. length: 0 for the plain weights of that step. half: it was rounded to float16.
    """

    step: int
    length: float
    half: bool = False


def exponent(length: float) -> float:
    """The exponent g of a length: length^2 = (g + 1) / ((g + 2)^2 (g + 3)). Infinite for length 0."""
    if length == 0:
        return math.inf
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])  # (g + 2)^2 (g + 3) = (g + 1) / length^2
    return float(max(roots[np.abs(roots.imag) < 1e-9].real))


def decay(step: int, exponent: float) -> float:
    """What is left of the average at step 1, 2, ...: average <- decay average + (1 - decay) weights. 0 at step 1."""
    return (1 - 1 / step) ** (exponent + 1)


def share_after(average: Average, steps: np.ndarray) -> np.ndarray:
    """The share [S] of an average that comes from weights after each of these steps [S] (0, 1, ...)."""
    return 1 - np.minimum(steps / average.step, 1) ** (exponent(average.length) + 1)


def fit(averages: Sequence[Average], end: int, lengths: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The sums of saved averages that are nearest to averages of other lengths.

    With weights that are a walk of independent steps d_s of equal size, an average is the sum over s of d_s times the share
    that comes from steps s and later. So the squared error of a sum is that of its shares, summed over the steps, plus that of
    the rounding of what is summed. Both are minimised, by one least-squares problem.

    Args:
        averages: What was saved, none after `end`.
        end: The step of the averages to make.
        lengths: Theirs, [L].

    Returns:
        The coefficients [L, averages], and the relative L2 errors of the weights to expect, [L].
    """
    points = np.arange(end) if end <= MAX_POINTS else np.arange(MAX_POINTS) * (end / MAX_POINTS)
    saved = np.stack([share_after(a, points) for a in averages], axis=1)
    wanted = np.stack([share_after(Average(end, length), points) for length in lengths], axis=1)
    weight = np.where(points == 0, CONSTANT, 1.0)[:, None]
    rounding = np.array([HALF_ROUNDING if a.half else 1e-7 for a in averages]) * np.linalg.norm(saved, axis=0)
    rows, sides = (
        np.vstack([weight * saved, np.diag(rounding)]),
        np.vstack([weight * wanted, np.zeros((len(averages), len(lengths)))]),
    )
    coefficients = np.linalg.lstsq(rows, sides, rcond=None)[0]
    errors = np.linalg.norm(rows @ coefficients - sides, axis=0) / np.linalg.norm(wanted, axis=0)
    return coefficients.T, errors


def possible_lengths(averages: Sequence[Average], end: int) -> tuple[float, float]:
    """The shortest and the longest length, of two digits, that can be made with an error of at most MAX_ERROR.

    Every length between them can be made too. The tracked lengths, saved at `end` itself, are among them.
    """
    tracked = [a.length for a in averages if a.step == end and a.length]
    spread = [float(f"{x:.2g}") for x in np.geomspace(MIN_LENGTH, 0.28, 80)]
    grid = sorted({*spread, *tracked})
    good = fit(averages, end, grid)[1] <= MAX_ERROR
    first, last = grid.index(min(tracked)), grid.index(max(tracked))
    while first > 0 and good[first - 1]:
        first -= 1
    while last < len(grid) - 1 and good[last + 1]:
        last += 1
    return grid[first], grid[last]


def snapshot_steps(last: int, spacing: int, limit: int) -> list[int]:
    """The steps whose snapshots remain after step `last`.

    A snapshot is taken at every multiple of `spacing`. When there are more than `limit`, the one that leaves the smallest gap
    goes, the earliest of several: so a run that is resumed with a larger max_steps thins out the earlier snapshots first.
    """
    steps: list[int] = []
    for step in range(spacing, last + 1, spacing):
        steps.append(step)
        if len(steps) > limit:
            gaps = [after - before for before, after in zip([0, *steps], steps[1:])]
            del steps[gaps.index(min(gaps))]
    return steps
