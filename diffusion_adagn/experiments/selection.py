"""The best point of a sweep, and the points that are not distinguishable from it.

best_set(points, "kid").members -> ("g2_ddim20", "g1.5_ddim20")   # the best one first
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..evaluation.metrics import METRICS
from .point_results import PointResult, class_count, in_order, metric_value, metrics_with_values

CLASS_METRICS = ("kid", "accuracy", "frechet")
TRADEOFFS = (("precision", "recall"), ("density", "coverage"))
MAX_BLOCK_COUNTS = 1 << 22  # counts per block of bootstrap draws: 32 MB
CHANCE_ERRORS = 2.0  # a difference of at most this many standard errors is chance
COMPARISON_ROUNDING = 1e-9  # relative: smaller differences count as 0
RECOMMENDATION_METRICS = ("frechet", "kid", "accuracy", "coverage", "density", "precision", "recall", "inception_score")


@dataclass(frozen=True)
class BestSet:
    """The best point by a metric, and the points that are not distinguishable from it.

    members: ids, the best first, in order of value. intervals: of every other point, the difference of its value to the best's.
    """

    metric: str
    best: str
    members: tuple[str, ...]
    intervals: dict[str, tuple[float, float]]

    @property
    def is_decisive(self) -> bool:
        """Whether some point is distinguishable from the best."""
        return len(self.members) <= len(self.intervals)


def best_set(
    points: Iterable[PointResult],
    metric: str,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    class_index: int | None = None,
) -> BestSet | None:
    """The best point, and the points whose difference to it has 0 in its interval (bounds included).

    The interval is that of a paired bootstrap over the images. Points without the metric are skipped.

    Args:
        points: The finished points.
        metric: A key of METRICS.
        draws: Bootstrap draws.
        seed: Seed of the draws.
        level: Level of the interval.
        class_index: Use the images of this class only; None: all images.

    Returns:
        The set; None if no point has the metric.

    Raises:
        InputError: If the points have unequal numbers of images.
    """
    measured = {p.id: p for p in in_order(points) if _influence(p, metric, class_index) is not None}
    if not measured:
        return None
    value = {i: metric_value(p.row, metric, class_index)[0] for i, p in measured.items()}
    sign = 1 if METRICS[metric].better == "lower" else -1
    # stable: of equal values, the one with less guidance is first
    ranked = sorted(value, key=lambda i: sign * float(f"{value[i]:.12g}"))
    best, others = ranked[0], ranked[1:]
    influence = {i: np.asarray(_influence(p, metric, class_index), dtype=np.float64) for i, p in measured.items()}
    sizes = {len(x) for x in influence.values()}
    if len(sizes) > 1:
        raise InputError(
            f"the points of a sweep have unequal numbers of images ({', '.join(map(str, sorted(sizes)))}), so that {metric} "
            "cannot be compared image by image: sample every point with the same --count."
        )
    if not others:
        return BestSet(metric, best, (best,), {})
    influence_difference = np.stack([influence[i] - influence[best] for i in others], axis=1)
    count = sizes.pop()
    moved = np.concatenate([w @ influence_difference for w in _bootstrap_draws(count, draws, seed)]) / count
    # outwards: with few images the quantiles move in steps
    low = np.quantile(moved, (1 - level) / 2, axis=0, method="lower")
    high = np.quantile(moved, (1 + level) / 2, axis=0, method="higher")
    size = {i: max(abs(value[i]), np.abs(x).max(initial=0)) for i, x in influence.items()}

    def bound(i: str, moved_by: float) -> float:
        difference = float(value[i] - value[best] + moved_by)
        return 0.0 if abs(difference) <= COMPARISON_ROUNDING * max(size[i], size[best]) else difference

    intervals = {i: (bound(i, a), bound(i, b)) for i, a, b in zip(others, low, high)}
    equal = [i for i in others if intervals[i][0] <= 0 <= intervals[i][1]]
    return BestSet(metric, best, (best, *equal), intervals)


def _influence(point: PointResult, metric: str, class_index: int | None) -> np.ndarray | None:
    """The influence values of a point's metric; None without a value."""
    if metric_value(point.row, metric, class_index)[0] is None:
        return None
    if class_index is None:
        return point.influence.get(metric)
    by_class = point.class_influence.get(metric) or []
    return by_class[class_index] if class_index < len(by_class) else None


def _bootstrap_draws(count: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks, float64 [rows, count], of how often each image is drawn when `count` are drawn with replacement."""
    random = np.random.default_rng(seed)
    max_rows = max(1, MAX_BLOCK_COUNTS // max(count, 1))
    for start in range(0, draws, max_rows):
        rows = min(max_rows, draws - start)
        drawn = random.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def best_sets(points: Sequence[PointResult], **how) -> dict[str, BestSet]:
    """`best_set` by every metric that has values."""
    choices = {m: best_set(points, m, **how) for m in metrics_with_values(points)}
    return {m: c for m, c in choices.items() if c is not None}


def class_best_sets(points: Sequence[PointResult], **how) -> dict[str, list[BestSet | None]]:
    """`best_set` within each class, by the metrics of CLASS_METRICS that have values; None for a class without."""
    choices = {
        m: [best_set(points, m, class_index=c, **how) for c in range(class_count(points, m))]
        for m in CLASS_METRICS
        if m in METRICS
    }
    return {m: by_class for m, by_class in choices.items() if any(by_class)}


def pareto(points: Iterable[PointResult], fidelity: str, diversity: str) -> list[str]:
    """Ids of the Pareto front: no other point is better in one metric and as good in the other; best `fidelity` first.

    Equal points do not exclude each other. Points without one of the two metrics are skipped.
    """
    points = in_order(points)
    sign = [-1 if METRICS[m].better == "lower" else 1 for m in (fidelity, diversity)]
    values_of = {p.id: [metric_value(p.row, m)[0] for m in (fidelity, diversity)] for p in points}
    values_of = {i: (sign[0] * a, sign[1] * b) for i, (a, b) in values_of.items() if a is not None and b is not None}
    beaten = lambda xy: any(a >= xy[0] and b >= xy[1] and (a, b) != xy for a, b in values_of.values())  # noqa: E731
    return sorted(
        (i for i, xy in values_of.items() if not beaten(xy)), key=lambda i: (-values_of[i][0], -values_of[i][1])
    )


@dataclass(frozen=True)
class Advice:
    """Which point to use.

    point: its id. equal: ids of the points among which it is the cheapest, itself included. by: the metrics that chose them,
    the first over all points, a second among those that the first leaves. costs: of every other metric by which the point is
    distinguishable from the best, the best point.
    """

    point: str
    equal: tuple[str, ...]
    by: tuple[str, ...]
    costs: dict[str, str]


def primary_metric(choices: Mapping[str, BestSet]) -> str | None:
    """The metric that decides first: the first of RECOMMENDATION_METRICS with values at two points; None without."""
    return next((m for m in RECOMMENDATION_METRICS if m in choices and choices[m].intervals), None)


def recommend(points: Sequence[PointResult], choices: Mapping[str, BestSet], **how) -> Advice | None:
    """The cheapest point among those that are not distinguishable from the best; None where there is nothing to choose.

    The rule is that of the one-standard-error rule (Breiman et al. 1984): of models that the data do not distinguish, the
    simplest. 1. The best set by the Frechet distance, else the kernel distance, else the next metric of CHOOSES. 2. Of
    these, the best set by accuracy, which the distance hardly sees. 3. Of these, the point with the fewest network
    evaluations per image, then the scale nearest to 1, then the fewest settings that are not neutral.

    Args:
        points: All points.
        choices: `best_sets` of them.
        **how: As `best_set` takes it.
    """
    first = primary_metric(choices)
    if first is None:
        return None
    equal, by = choices[first].members, (first,)
    if first != "accuracy" and "accuracy" in choices and len(equal) > 1:
        among = best_set([p for p in points if p.id in equal], "accuracy", **how)
        if among is not None and among.is_decisive:
            equal, by = among.members, (first, "accuracy")
    chosen = min((p for p in in_order(points) if p.id in equal), key=_cost).id
    costs = {m: c.best for m, c in choices.items() if m not in by and chosen in c.intervals and chosen not in c.members}
    return Advice(chosen, equal, by, costs)


def _cost(point: PointResult) -> tuple[float, float, int]:
    """Evaluations per image, distance from scale 1, settings that are not neutral."""
    row = point.row
    extra = [row.get("guide"), row.get("interval"), row.get("threshold")]
    count = sum(v not in (None, "none") for v in extra) + (row.get("schedule") not in (None, "constant"))
    return row.get("nfe") or 0, abs(row.get("scale", 1) - 1), count + bool(row.get("rescale"))


def worse_by(before: PointResult, after: PointResult, metric: str) -> float | None:
    """By how many standard errors of the difference the later value is the worse; below 0 it is better, None where that is open."""
    (value, error, _), (fresh, fresh_error, _) = metric_value(before.row, metric), metric_value(after.row, metric)
    if None in (value, error, fresh, fresh_error):
        return None
    worse = (fresh - value) * (1 if METRICS[metric].better == "lower" else -1)
    size = math.hypot(error, fresh_error)
    return worse / size if size else math.copysign(math.inf, worse) if worse else 0.0
