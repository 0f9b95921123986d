"""The best point of a sweep, the points that are not distinguishable from it, and where metrics disagree.

best_set(points, "kid").members -> ("g2_ddim20", "g1.5_ddim20")   # the best one first
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError
from ..evaluation.metrics import METRICS
from ..render.text import capital, listed, percent, plus_minus

SETTINGS = (
    "run",
    "checkpoint",
    "ema",
    "guide",
    "guide_ema",
    "rule",
    "negative",
    "schedule",
    "rescale",
    "threshold",
    "sampler",
    "spacing",
    "eta",
    "churn",
    "steps",
    "interval",
    "scale",
)
WHERE_VARIED = {"run", "checkpoint", "ema", "guide_ema", "churn"}  # settings that are recorded where they vary only
NAMES = {"ema": "EMA", "guide_ema": "guide EMA"}  # in sentences; the others are called as they are
CLASS_METRICS = ("kid", "accuracy", "frechet")
TRADEOFFS = (("precision", "recall"), ("density", "coverage"))

MAX_BLOCK_COUNTS = 1 << 22  # counts per block of bootstrap draws: 32 MB
RATIO_TOLERANCE = 0.1  # a ratio that differs from the data's by more is reported
MIN_GROWTH = 0.05  # ... if it also differs by this much from the base point; the same for fractions of values
MAX_NOTES = 4  # notes on too much guidance
CHANCE_ERRORS = 2.0  # a difference of at most this many standard errors is chance
MIN_POINT_IMAGES = 50  # images per point, below which agreement is not reported
COMPARISON_ROUNDING = 1e-9  # relative: smaller differences count as 0
RECOMMENDATION_METRICS = ("frechet", "kid", "accuracy", "coverage", "density", "precision", "recall", "inception_score")
NEUTRAL = {
    "interval": "all timesteps",
    "guide": "guide null",
    "rule": "rule cfg",
    "negative": "negative null",
}
UNGUIDED_SETTINGS = (
    "run",
    "checkpoint",
    "ema",
    "sampler",
    "churn",
    "steps",
    "eta",
    "spacing",
    "threshold",
)  # settings that change images at scale 1 too


@dataclass(frozen=True)
class PointResult:
    """One point: its settings, its measurements and their influence values.

    Args:
        row: JSON: id, settings (SETTINGS), nfe, count, metrics, per_class and diagnostics.
        influence: By metric with a value, float64 [N] of mean 0. Resampling the N images with counts w changes the metric by
            about (w . influence) / N. Image i has the same class and noise at every point.
        class_influence: By metric, for each class float64 [N_c] or None.
        shown: uint8 [classes, n, H, W, C] for the grid, or None.
    """

    row: dict
    influence: dict[str, np.ndarray] = field(default_factory=dict)
    class_influence: dict[str, list[np.ndarray | None]] = field(default_factory=dict)
    shown: np.ndarray | None = None

    @property
    def id(self) -> str:
        return self.row["id"]


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


# ---------------------------------------------------------------------- points and their names


def in_order(points: Iterable[PointResult]) -> list[PointResult]:
    """By the other settings, then by scale: an order that does not depend on the one given."""
    return sorted(points, key=lambda p: (*(_sort_key(p.row.get(s)) for s in SETTINGS), p.id))


def _sort_key(value: object) -> tuple:
    """Sorts None and "none" first and numbers inside of text by size."""
    if value is None or value == "none":
        return ((0, 0.0, ""),)
    if isinstance(value, (int, float)):
        return ((1, float(value), ""),)
    parts = re.split(r"(\d+(?:\.\d+)?)", str(value))
    return tuple((1, float(p), "") if i % 2 else (2, 0.0, p) for i, p in enumerate(parts) if p)


def unguided_settings(row: Mapping) -> tuple[str, ...]:
    """The settings that matter at scale 1, where intervals, schedules, rescalings and guides have no effect."""
    return tuple(str(row.get(s)) for s in UNGUIDED_SETTINGS)


def recorded_settings(points: Iterable[PointResult]) -> list[str]:
    """The settings that points record, the scale first."""
    rows = [p.row for p in points]
    return [s for s in ("scale", *SETTINGS[:-1]) if s not in WHERE_VARIED or any(s in row for row in rows)]


def differing(points: Iterable[PointResult]) -> list[str]:
    """The settings that are not the same at every point, the scale first."""
    rows = [p.row for p in points]
    return [s for s in ("scale", *SETTINGS[:-1]) if len({str(r.get(s)) for r in rows}) > 1]


def format_point(row: Mapping, settings: Sequence[str]) -> str:
    """A point by the settings that distinguish it: "scale 2 (interval t:200-800, 20 steps)"."""
    first, *rest = [format_setting(s, row.get(s)) for s in settings or ["scale"]]
    return f"{first} ({', '.join(rest)})" if rest else first


def format_setting(setting: str, value: object) -> str:
    if setting == "steps":
        return f"{value} step{'' if value == 1 else 's'}"
    name = NAMES.get(setting, setting)
    if value in (None, "none"):
        return NEUTRAL.get(setting, f"no {name}")
    if str(value).split(" ")[0] == setting:  # "guide", which stands for its path
        return str(value)
    return f"{name} {value:g}" if isinstance(value, (int, float)) else f"{name} {value}"


def format_points(ids: Iterable[str], points: Sequence[PointResult]) -> str:
    """Points in a sentence: "scale 1.25 to 2" where only the scale differs without gaps."""
    ids, settings, points = set(ids), differing(points), in_order(points)
    indices = [i for i, p in enumerate(points) if p.id in ids]
    rows = [points[i].row for i in indices]
    if settings != ["scale"] or len(rows) < 2:
        return listed([format_point(r, settings) for r in rows])
    if len(rows) > 2 and indices[-1] - indices[0] == len(indices) - 1:
        return f"scale {rows[0]['scale']:g} to {rows[-1]['scale']:g}"
    return "scale " + listed([f"{r['scale']:g}" for r in rows])


def metric_value(row: Mapping, metric: str, class_index: int | None = None) -> tuple[float | None, float | None, str]:
    """Value, standard error and the reason for a missing value; None for what is missing or not finite."""
    if class_index is None:
        record = row.get("metrics", {}).get(metric)
    else:
        by_class = row.get("per_class", {}).get(metric) or []
        record = by_class[class_index] if class_index < len(by_class) else None
    record = record or {}
    value, error = (
        float(x) if x is not None and math.isfinite(x) else None for x in map(record.get, ("value", "standard_error"))
    )
    return value, None if value is None else error, record.get("why") or ""


def metrics_with_values(points: Iterable[PointResult]) -> list[str]:
    """The metrics that have a value at some point, in their order."""
    points = list(points)
    return [m for m in METRICS if any(metric_value(p.row, m)[0] is not None for p in points)]


def class_count(points: Iterable[PointResult], metric: str) -> int:
    return max((len(p.row.get("per_class", {}).get(metric) or []) for p in points), default=0)


# ---------------------------------------------------------------------- best sets


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


# ---------------------------------------------------------------------- sentences


def rounded(value: float | None, error: float | None) -> str:
    """A value with as many decimals as its standard error has two digits for; "-" for none."""
    if value is None:
        return "-"
    return plus_minus(value, error).split(" ")[0] if error else f"{value:.4g}"


def format_count(count: int, one: str) -> str:
    """ "1 point", "2 points", "2 classes"."""
    return f"{count:,} {one}{'' if count == 1 else 'es' if one.endswith('s') else 's'}"


def metric_names(titles: Mapping[str, str] | None = None) -> dict[str, str]:
    """The name of every metric inside a sentence: "kernel distance", but "Frechet distance" and "FID"."""
    titles_of = {m: METRICS[m].title for m in METRICS} | dict(titles or {})
    return {m: t if t.startswith("Fr") or t[1:2].isupper() else t[:1].lower() + t[1:] for m, t in titles_of.items()}


def disagreement(
    choices: Mapping[str, BestSet | None], points: Sequence[PointResult], titles: Mapping[str, str] | None = None
) -> str:
    """Whether the metrics agree, by their best sets: metrics whose sets share a point do not disagree.

    titles: titles of metrics, in place of those in METRICS.
    """
    name = metric_names(titles)
    compared = {m: c for m, c in choices.items() if c is not None and c.intervals}
    if len(points) == 1:
        return "There is one point: nothing to choose between."
    if not compared:
        return "No metric has a value at two points: which point is better cannot be said."
    decisive = {m: c for m, c in compared.items() if c.is_decisive}
    if not decisive:
        return (
            f"No points can be distinguished: by {listed([name[m] for m in compared], 8)} no point differs from the best one by more "
            "than the sampling of the images explains."
        )
    silent = [name[m] for m in compared if m not in decisive]
    indecisive_note = (
        f" {capital(listed(silent, 8))} distinguish{'es' if len(silent) == 1 else ''} no point from the best."
        if silent
        else ""
    )
    return _agreement(decisive, points, name) + indecisive_note


def at_the_edge(
    choices: Mapping[str, BestSet | None],
    points: Sequence[PointResult],
    titles: Mapping[str, str] | None = None,
    largest: float | None = None,
) -> str:
    """Which metrics are best at the largest swept scale, so that a larger one may be better; "" for none.

    largest: that scale, if it is not among the points."""
    row = {p.id: p.row for p in points}
    scales = [r["scale"] for r in row.values()]
    largest = max(scales, default=1) if largest is None else largest
    if not scales or largest <= max(1, min(scales)):
        return ""
    name = metric_names(titles)
    best = [name[m] for m, c in choices.items() if c is not None and c.is_decisive and row[c.best]["scale"] == largest]
    if not best:
        return ""
    verb = "is" if len(best) == 1 else "are"
    return (
        f"{capital(listed(best, 8))} {verb} best at the largest scale that was swept, {largest:g}: sweep further to see "
        "where they turn."
    )


def _agreement(decisive: Mapping[str, BestSet], points: Sequence[PointResult], name: Mapping[str, str]) -> str:
    which = listed([name[m] for m in decisive], 8)
    shared = set.intersection(*(set(c.members) for c in decisive.values()))
    if len({c.best for c in decisive.values()}) == 1:
        best = _format_best([*decisive], decisive, points)
        if len(decisive) == 1:
            return f"{capital(which)} is best at {best}."
        count = min((p.row.get("count") or 0 for p in points), default=0)
        if count < MIN_POINT_IMAGES:
            note_few_images = f"{format_count(count, 'image')} per point are too few to say that the metrics agree"
            return f"{capital(which)} are best at {best}; {note_few_images}."
        return f"The metrics agree: {which} are best at {best}."
    if shared:
        verb = "is" if len(shared) == 1 else "are"
        return f"The metrics can be had together: {format_points(shared, points)} {verb} in the best set of each of {which}."
    by_best: dict[str, list[str]] = {}
    for m, c in decisive.items():
        by_best.setdefault(c.best, []).append(m)
    order = [p.id for p in in_order(points)]
    groups = [by_best[i] for i in sorted(by_best, key=order.index)]
    where = "; ".join(
        f"{listed([name[m] for m in group], 8)} {'is' if len(group) == 1 else 'are'} best at {_format_best(group, decisive, points)}"
        for group in groups
    )
    valued_at = [{c.best, *c.intervals} for c in decisive.values()]
    if any(not set(c.members) <= ids for c in decisive.values() for ids in valued_at):
        return f"{capital(where)}. Not all have values at the same points, so that whether they agree cannot be said."
    return f"No point is in the best set of every metric: {where}. {_tradeoff_note(decisive, points, name)}"


def _format_best(metrics: Sequence[str], choices: Mapping[str, BestSet], points: Sequence[PointResult]) -> str:
    """The best point of metrics that share it, and its set where they share that too."""
    first, settings = choices[metrics[0]], differing(points)
    best = format_point(next(p.row for p in points if p.id == first.best), settings)
    if len(first.members) == 1 or any(set(choices[m].members) != set(first.members) for m in metrics):
        return best
    if settings == ["scale"] and len(first.members) > 2:
        return f"{best} ({format_points(first.members, points).removeprefix('scale ')} cannot be distinguished)"
    others = first.members[1:]
    which = (
        format_points(others, points) if len(others) <= 2 or settings == ["scale"] else f"{len(others)} other points"
    )
    return f"{best}, not distinguished from {which}"


def _tradeoff_note(decisive: Mapping[str, BestSet], points: Sequence[PointResult], name: Mapping[str, str]) -> str:
    """Two metrics whose sets share no point, fidelity against diversity first: from the best of one to that of the other."""
    about = {m: METRICS[m].about for m in decisive}
    weight = {"fidelity": 0, "both": 1, "diversity": 2}
    apart = [
        (a, b)
        for a in decisive
        for b in decisive
        if not set(decisive[a].members) & set(decisive[b].members) and weight[about[a]] <= weight[about[b]] and a != b
    ]
    if not apart:
        return "Every two of them share a point all the same."
    preferred = ("accuracy", "precision", "density", "kid", "frechet", "coverage", "recall")
    rank = {m: i for i, m in enumerate((*preferred, *(m for m in decisive if m not in preferred)))}
    gain, cost = min(apart, key=lambda ab: (weight[about[ab[0]]] - weight[about[ab[1]]], rank[ab[0]], rank[ab[1]]))
    row = {p.id: p.row for p in points}
    start, end = row[decisive[cost].best], row[decisive[gain].best]
    settings = differing(points)
    change = lambda m: " to ".join(rounded(*metric_value(r, m)[:2]) for r in (start, end))  # noqa: E731
    aspects = about[gain], about[cost]
    tail = {
        ("fidelity", "diversity"): ", fidelity against diversity",
        ("fidelity", "both"): f"; {name[gain]} counts fidelity alone, {name[cost]} diversity too",
        ("both", "diversity"): f"; {name[cost]} counts diversity alone, {name[gain]} fidelity too",
    }.get(
        aspects,
        f"; {name[gain]} and {name[cost]} are both of {aspects[0]}" if aspects[0] == aspects[1] != "both" else "",
    )
    return (
        f"What gains {name[gain]} costs {name[cost]}{tail}: from {format_point(start, settings)} to {format_point(end, settings)} "
        f"{name[gain]} goes from {change(gain)} and {name[cost]} from {change(cost)}."
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


def format_advice(
    advice: Advice,
    points: Sequence[PointResult],
    choices: Mapping[str, BestSet],
    titles: Mapping[str, str] | None = None,
    again: Mapping[str, PointResult] | None = None,
    largest: float | None = None,
) -> str:
    """The advice as a line: what to use, by which metric, what it costs in the others.

    titles: titles of metrics, in place of those in METRICS. again: points measured with fresh seeds, by id. largest: the
    largest swept scale, if it is not among the points.
    """
    name, row, settings = metric_names(titles), {p.id: p.row for p in points}, differing(points) or ["scale"]
    best_end = lambda m: "lowest" if METRICS[m].better == "lower" else "highest"  # noqa: E731
    value = lambda m, i: rounded(*metric_value(row[i], m)[:2])  # noqa: E731
    where = lambda i: ", ".join(format_setting(s, row[i].get(s)) for s in settings)  # noqa: E731
    point, first, best = advice.point, advice.by[0], choices[advice.by[0]].best
    parts = [f"{name[first]} {_with_error(*metric_value(row[point], first)[:2])}"]
    if point == best:
        parts[0] += f", the {best_end(first)}"
    else:
        parts[0] += f", not distinguishable from the {best_end(first)} ({value(first, best)} at {where(best)})"
    if again and point in again and metric_value(again[point].row, first)[0] is not None:
        parts.append(f"with fresh seeds {_with_error(*metric_value(again[point].row, first)[:2])}")
    if len(advice.by) > 1:
        parts.append(f"accuracy {value('accuracy', point)}, not distinguishable from the highest of those")
    calls = f" ({format_count(row[point]['nfe'], 'network evaluation')} per image)" if row[point].get("nfe") else ""
    if len(advice.equal) == len(points) > 1:
        parts.append(
            f"the cheapest of all {len(points)} settings{calls}, at equal cost the nearest to scale 1; this many images do not distinguish them"
        )
    elif len(advice.equal) > 1:
        parts.append(f"the cheapest of {len(advice.equal)} such settings{calls}, at equal cost the nearest to scale 1")
    lost = [
        f"{name[m]} {_format_gap(value(m, point), value(m, i))} ({value(m, point)}; {value(m, i)} at {where(i)})"
        for m, i in advice.costs.items()
    ]
    cost_note = f" It costs {listed(lost, 8)}." if lost else " No other metric is distinguishably better elsewhere."
    cost_note = cost_note if len(choices) > len(advice.by) else ""
    scales = [r["scale"] for r in row.values()]
    at_largest = row[point]["scale"] == (largest or max(scales)) > max(1, min(scales))
    further = " It is the largest scale of this sweep: sweep further." if at_largest else ""
    return f"Use {where(point)}: {'; '.join(parts)}.{cost_note}{further}"


def _format_gap(one: str, other: str) -> str:
    """How far apart two rounded values are, with the decimals of the one with fewer."""
    decimals = min(len(v.partition(".")[2]) for v in (one, other))
    return f"{abs(float(one) - float(other)):.{decimals}f}"


def worse_by(before: PointResult, after: PointResult, metric: str) -> float | None:
    """By how many standard errors of the difference the later value is the worse; below 0 it is better, None where that is open."""
    (value, error, _), (fresh, fresh_error, _) = metric_value(before.row, metric), metric_value(after.row, metric)
    if None in (value, error, fresh, fresh_error):
        return None
    worse = (fresh - value) * (1 if METRICS[metric].better == "lower" else -1)
    size = math.hypot(error, fresh_error)
    return worse / size if size else math.copysign(math.inf, worse) if worse else 0.0


def _with_error(value: float, error: float | None) -> str:
    return plus_minus(value, error) if error else rounded(value, error)


# ---------------------------------------------------------------------- too much guidance, from the images alone


def overguidance_notes(points: Iterable[PointResult]) -> list[str]:
    """Sentences on how image statistics depart from the data's as the scale grows, then on clipping; at least one.

    The verdict uses contrast, saturation and, if the data's fraction is known, values at 0 or 255. Clipped predictions are
    reported without a verdict. Every group of points that differ in scale is compared with scale 1, if that was sampled.
    """
    points = in_order(points)
    others = [s for s in differing(points) if s != "scale"]
    groups: dict[tuple, list[PointResult]] = {}
    for p in points:
        groups.setdefault(tuple(str(p.row.get(s)) for s in others), []).append(p)
    unguided = {unguided_settings(p.row): p for p in points if p.row["scale"] == 1}
    groups_with_base = [(group, _base_point(group, unguided)) for group in groups.values()]
    sentences = list(
        dict.fromkeys(line for group, base in groups_with_base for line in _group_notes(group, base, others))
    )
    more = [f"{len(sentences) - MAX_NOTES} more stand out at other settings."] if len(sentences) > MAX_NOTES else []
    facts = _clipping_notes(groups_with_base, others)
    return [*(sentences[:MAX_NOTES] + more or [_nothing_stands_out(points, not facts)]), *facts]


def _base_point(group: Sequence[PointResult], unguided: Mapping[tuple, PointResult]) -> PointResult:
    """The point that a group is compared with."""
    return unguided.get(unguided_settings(group[0].row)) or next((p for p in group if p.row["scale"] >= 1), group[0])


def _group_notes(group: Sequence[PointResult], base: PointResult, others: Sequence[str]) -> list[str]:
    """Notes on points that differ only in scale, in order of scale."""
    sentences = []
    settings = ["scale", *others]
    start = _deviations_at_base(base)
    if start:
        whose = "guidance is not the cause" if base.row["scale"] == 1 else "no less guidance was tried"
        sentences.append(f"Already at {format_point(base.row, settings)} {listed(start)}: {whose}.")
    out = [(p, *_deviations(p, base)) for p in group if p.row["scale"] > base.row["scale"]]
    out = [(p, up, down) for p, up, down in out if up or down]
    if out:
        last, up, down = out[-1]
        if up:
            verdict = "more guidance than the data bears"
        else:
            verdict = "guidance takes away from what the data has"
        first = out[0][0].row["scale"]
        since = f"; scale {first:g} is the first to stand out" if len(out) > 1 else ""
        sentences.append(f"At {format_point(last.row, settings)} {listed([*up, *down])}: {verdict}{since}.")
    return sentences


def _deviations(point: PointResult, base: PointResult) -> tuple[list[str], list[str]]:
    """What exceeds the data's and grew from the base; what is below it and shrank."""
    up, down = [], []
    for what in ("contrast", "saturation"):
        ratio, at_base = (_diagnostic(p, f"{what}_ratio") for p in (point, base))
        if ratio is None or at_base is None:
            continue
        if ratio > 1 + RATIO_TOLERANCE and ratio > at_base + MIN_GROWTH:
            up.append(_format_ratio(what, ratio))
        if ratio < 1 - RATIO_TOLERANCE and ratio < at_base - MIN_GROWTH:
            down.append(_format_ratio(what, ratio))
    (shift, at_base), fraction = (_diagnostic(p, "extremes_shift") for p in (point, base)), extremes(point)
    if None not in (shift, at_base, fraction) and shift > MIN_GROWTH and shift > at_base + MIN_GROWTH:
        up.append(
            f"{percent(fraction)} of the values are at 0 or 255 (of the data's {_format_fraction(fraction - shift)})"
        )
    return up, down


def _clipping_notes(
    groups_with_base: Iterable[tuple[Sequence[PointResult], PointResult]], others: Sequence[str]
) -> list[str]:
    """Fractions of clipped values that grew with the scale, where they grew most. Black backgrounds clip too: no verdict."""
    pairs = [(p, base) for group, base in groups_with_base for p in group if p.row["scale"] > base.row["scale"]]
    fractions = [("of the predicted images' values lie beyond black and white and are clipped", clipped_fraction)]
    if not any(_diagnostic(p, "extremes_shift") is not None for p, _ in pairs):
        fractions.append(("of the finished images' values are at 0 or 255", extremes))
    growth = lambda fraction, p, base: -1 if None in (fraction(p), fraction(base)) else fraction(p) - fraction(base)  # noqa: E731
    if not pairs:
        return []
    point, base = max(pairs, key=lambda pair: max(growth(fraction, *pair) for _, fraction in fractions))
    grown = [
        f"{percent(fraction(point))} {what} ({_format_fraction(fraction(base))} at scale {base.row['scale']:g})"
        for what, fraction in fractions
        if growth(fraction, point, base) > MIN_GROWTH
    ]
    if not grown:
        return []
    where = format_point(point.row, ["scale", *others])
    return [f"At {where} {listed(grown)}. That alone is no fault: data with black or white backgrounds clip too."]


def _format_fraction(fraction: float) -> str:
    return percent(fraction) if fraction > 0 else "none"


def _deviations_at_base(base: PointResult) -> list[str]:
    ratios = {what: _diagnostic(base, f"{what}_ratio") for what in ("contrast", "saturation")}
    return [_format_ratio(what, r) for what, r in ratios.items() if r is not None and abs(r - 1) > RATIO_TOLERANCE]


def _format_ratio(what: str, ratio: float) -> str:
    return f"{what} is {ratio:.2f} of the data's"


def _nothing_stands_out(points: Sequence[PointResult], clipped: bool) -> str:
    """clipped: whether to say how much is."""
    spans = []
    for what in ("contrast", "saturation"):
        ratios = [r for r in (_diagnostic(p, f"{what}_ratio") for p in points) if r is not None]
        if ratios:
            low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
            spans.append(f"{what} is {low if low == high else f'{low} to {high}'} of the data's")
    if not spans:
        return "Whether there is too much guidance cannot be said: the images were not compared with the data."
    fractions = [s for s in map(clipped_fraction, points) if s is not None]
    if fractions and clipped:
        largest = max(fractions)
        fraction_text = f"{'at most ' if largest >= 0.01 else ''}{percent(largest)}" if largest else "none"
        spans.append(f"{fraction_text} of the predicted images' values are clipped")
    return f"Nothing stands out in the images: {listed(spans)}."


def _diagnostic(point: PointResult, name: str) -> float | None:
    value = point.row.get("diagnostics", {}).get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def clipped_fraction(point: PointResult) -> float | None:
    """The clipped fraction of the predicted images' values, over all network evaluations."""
    return mean_of(point.row.get("diagnostics", {}).get("clipped"))


def extremes(point: PointResult) -> float | None:
    return _diagnostic(point, "extremes")


def mean_of(values: Sequence[float | None] | None) -> float | None:
    """The mean of the finite values; None for none."""
    finite = [v for v in values or () if v is not None and math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None
