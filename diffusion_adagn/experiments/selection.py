"""What the finished points of a sweep say: which one is best, which cannot be told apart from it, where metrics disagree.

best_set(points, "kid").members -> ("g2_ddim20", "g1.5_ddim20")   # the best one first
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError
from ..evaluation.metrics import METRICS
from ..render.text import listed, percent, plus_minus

SETTINGS = ("guide", "schedule", "rescale", "threshold", "sampler", "spacing", "eta", "steps", "interval", "scale")
CLASS_METRICS = ("kid", "accuracy", "frechet")
TRADES = (("precision", "recall"), ("density", "coverage"))

MAX_BLOCK_COUNTS = 1 << 22  # counts of pictures drawn at a time: 32 MB
OFF = 0.1  # a ratio this far from the data's stands out
GROWS = 0.05  # ... if it also moved by this much from that of the least scale; and so does a share of the values
MAX_SAID = 4  # sentences on too much guidance
CHANCE = 2.0  # standard errors of a difference that chance explains
MIN_POINT_IMAGES = 50  # pictures a point, below which no agreement is claimed
COMPARISON_ROUNDING = 1e-9  # of what is compared: a difference below is none
CHOOSES = ("frechet", "kid", "accuracy", "coverage", "density", "precision", "recall", "inception_score")
HEARD = ("sampler", "steps", "eta", "spacing", "threshold")  # settings that change pictures at scale 1 too


@dataclass(frozen=True)
class PointResult:
    """One point: its settings and measurements, and what they are made of.

    row: JSON; id, settings (SETTINGS), nfe, count, metrics, per_class and diagnostics. influence: by metric, float64 [N] of
    mean 0: drawing the N pictures anew with counts w moves the metric by about (w . influence) / N; only metrics with a value.
    class_influence: by metric, one float64 [N_c] or None a class. Picture i is the same class and noise at every point.
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
    """The best point by a metric and those that the pictures cannot tell apart from it.

    members: ids, the best first, in order of value. intervals: of every other point, the difference of its value to the best's.
    """

    metric: str
    best: str
    members: tuple[str, ...]
    intervals: dict[str, tuple[float, float]]

    @property
    def is_decisive(self) -> bool:
        """Whether some point is told apart from the best."""
        return len(self.members) <= len(self.intervals)


# ---------------------------------------------------------------------- points and their names


def in_order(points: Iterable[PointResult]) -> list[PointResult]:
    """By the other settings, then by scale: an order that does not depend on the one given."""
    return sorted(points, key=lambda p: (*(_natural(p.row.get(s)) for s in SETTINGS), p.id))


def _natural(value: object) -> tuple:
    """Sorts None and "none" first and numbers inside of text by size."""
    if value is None or value == "none":
        return ((0, 0.0, ""),)
    if isinstance(value, (int, float)):
        return ((1, float(value), ""),)
    parts = re.split(r"(\d+(?:\.\d+)?)", str(value))
    return tuple((1, float(p), "") if i % 2 else (2, 0.0, p) for i, p in enumerate(parts) if p)


def heard(row: Mapping) -> tuple[str, ...]:
    """What tells points of scale 1 apart: intervals, schedules, rescalings and guides are not heard there."""
    return tuple(str(row.get(s)) for s in HEARD)


def differing(points: Iterable[PointResult]) -> list[str]:
    """The settings that are not the same at every point, the scale first."""
    rows = [p.row for p in points]
    return [s for s in ("scale", *SETTINGS[:-1]) if len({str(r.get(s)) for r in rows}) > 1]


def format_point(row: Mapping, settings: Sequence[str]) -> str:
    """A point by the settings that tell it apart from others: "scale 2 (interval t:200-800, 20 steps)"."""
    first, *rest = [setting_called(s, row.get(s)) for s in settings or ["scale"]]
    return f"{first} ({', '.join(rest)})" if rest else first


def setting_called(setting: str, value: object) -> str:
    if setting == "steps":
        return f"{value} step{'' if value == 1 else 's'}"
    if value in (None, "none"):
        return {"interval": "all timesteps", "guide": "guide null"}.get(setting, f"no {setting}")
    if str(value).split(" ")[0] == setting:  # "guide", which stands for its path
        return str(value)
    return f"{setting} {value:g}" if isinstance(value, (int, float)) else f"{setting} {value}"


def format_points(ids: Iterable[str], points: Sequence[PointResult]) -> str:
    """Points in a sentence: "scale 1.25 to 2" where only the scale differs and none between is left out."""
    ids, settings, points = set(ids), differing(points), in_order(points)
    at = [i for i, p in enumerate(points) if p.id in ids]
    rows = [points[i].row for i in at]
    if settings != ["scale"] or len(rows) < 2:
        return listed([format_point(r, settings) for r in rows])
    if len(rows) > 2 and at[-1] - at[0] == len(at) - 1:
        return f"scale {rows[0]['scale']:g} to {rows[-1]['scale']:g}"
    return "scale " + listed([f"{r['scale']:g}" for r in rows])


def measured(row: Mapping, metric: str, class_index: int | None = None) -> tuple[float | None, float | None, str]:
    """Value, standard error and why there is no value; None for what is not there or not finite."""
    if class_index is None:
        found = row.get("metrics", {}).get(metric)
    else:
        some = row.get("per_class", {}).get(metric) or []
        found = some[class_index] if class_index < len(some) else None
    found = found or {}
    value, error = (
        float(x) if x is not None and math.isfinite(x) else None for x in map(found.get, ("value", "standard_error"))
    )
    return value, None if value is None else error, found.get("why") or ""


def valued(points: Iterable[PointResult]) -> list[str]:
    """The metrics that have a value at some point, in their order."""
    points = list(points)
    return [m for m in METRICS if any(measured(p.row, m)[0] is not None for p in points)]


def class_count(points: Iterable[PointResult], metric: str) -> int:
    return max((len(p.row.get("per_class", {}).get(metric) or []) for p in points), default=0)


# ---------------------------------------------------------------------- the best, and what equals it


def best_set(
    points: Iterable[PointResult],
    metric: str,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    class_index: int | None = None,
) -> BestSet | None:
    """The best point and those whose difference to it has 0 in its interval, ends included: a paired bootstrap over the pictures.

    class_index: over the pictures of that class alone. Points without the metric are left out; None where no point has it.
    Raises InputError for points of unequal numbers of pictures.
    """
    found = {p.id: p for p in in_order(points) if _influence(p, metric, class_index) is not None}
    if not found:
        return None
    value = {i: measured(p.row, metric, class_index)[0] for i, p in found.items()}
    sign = 1 if METRICS[metric].better == "lower" else -1
    ranked = sorted(value, key=lambda i: sign * float(f"{value[i]:.12g}"))  # stable: of equals the one of less guidance
    best, others = ranked[0], ranked[1:]
    influence = {i: np.asarray(_influence(p, metric, class_index), dtype=np.float64) for i, p in found.items()}
    sizes = {len(x) for x in influence.values()}
    if len(sizes) > 1:
        raise InputError(
            f"the points of a sweep have unequal numbers of pictures ({', '.join(map(str, sorted(sizes)))}), so that {metric} "
            "cannot be compared picture by picture: sample every point with one --count."
        )
    if not others:
        return BestSet(metric, best, (best,), {})
    apart = np.stack([influence[i] - influence[best] for i in others], axis=1)
    moved = np.concatenate([w @ apart for w in _bootstrap_draws(sizes.pop(), draws, seed)]) / len(apart)
    least, most = (1 - level) / 2, (1 + level) / 2
    low = np.quantile(moved, least, axis=0, method="lower")  # outwards: what few pictures make of it moves in steps
    high = np.quantile(moved, most, axis=0, method="higher")
    size = {i: max(abs(value[i]), np.abs(x).max(initial=0)) for i, x in influence.items()}

    def end(i: str, moved_by: float) -> float:
        found = float(value[i] - value[best] + moved_by)
        return 0.0 if abs(found) <= COMPARISON_ROUNDING * max(size[i], size[best]) else found

    intervals = {i: (end(i, a), end(i, b)) for i, a, b in zip(others, low, high)}
    equal = [i for i in others if intervals[i][0] <= 0 <= intervals[i][1]]
    return BestSet(metric, best, (best, *equal), intervals)


def _influence(point: PointResult, metric: str, class_index: int | None) -> np.ndarray | None:
    """What a point's metric is made of; None where it has no value."""
    if measured(point.row, metric, class_index)[0] is None:
        return None
    if class_index is None:
        return point.influence.get(metric)
    some = point.class_influence.get(metric) or []
    return some[class_index] if class_index < len(some) else None


def _bootstrap_draws(count: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks, float64 [some, count], of how often each picture is drawn when `count` are drawn with replacement."""
    random = np.random.default_rng(seed)
    most = max(1, MAX_BLOCK_COUNTS // max(count, 1))
    for start in range(0, draws, most):
        rows = min(most, draws - start)
        drawn = random.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def best_sets(points: Sequence[PointResult], **how) -> dict[str, BestSet]:
    """`best_set` by every metric that has values."""
    found = {m: best_set(points, m, **how) for m in valued(points)}
    return {m: c for m, c in found.items() if c is not None}


def class_best_sets(points: Sequence[PointResult], **how) -> dict[str, list[BestSet | None]]:
    """`best_set` within each class, by those of PER_CLASS that have values; None for a class without."""
    found = {
        m: [best_set(points, m, class_index=c, **how) for c in range(class_count(points, m))]
        for m in CLASS_METRICS
        if m in METRICS
    }
    return {m: some for m, some in found.items() if any(some)}


def pareto(points: Iterable[PointResult], fidelity: str, diversity: str) -> list[str]:
    """Ids of the points that no other beats in one metric without losing in the other, the best by `fidelity` first.

    Equal points do not beat each other. Points without one of the two are left out.
    """
    points = in_order(points)
    sign = [-1 if METRICS[m].better == "lower" else 1 for m in (fidelity, diversity)]
    both = {p.id: [measured(p.row, m)[0] for m in (fidelity, diversity)] for p in points}
    both = {i: (sign[0] * a, sign[1] * b) for i, (a, b) in both.items() if a is not None and b is not None}
    beaten = lambda at: any(a >= at[0] and b >= at[1] and (a, b) != at for a, b in both.values())  # noqa: E731
    return sorted((i for i, at in both.items() if not beaten(at)), key=lambda i: (-both[i][0], -both[i][1]))


# ---------------------------------------------------------------------- in sentences


def rounded(value: float | None, error: float | None) -> str:
    """A value with as many decimals as its standard error has two digits for; "-" for none."""
    if value is None:
        return "-"
    return plus_minus(value, error).split(" ")[0] if error else f"{value:.4g}"


def counted(count: int, one: str) -> str:
    """ "1 point", "2 points", "2 classes"."""
    return f"{count:,} {one}{'' if count == 1 else 'es' if one.endswith('s') else 's'}"


def names(titles: Mapping[str, str] | None = None) -> dict[str, str]:
    """What to call every metric inside a sentence: "kernel distance", but "Frechet distance" and "FID"."""
    found = {m: METRICS[m].title for m in METRICS} | dict(titles or {})
    return {m: t if t.startswith("Fr") or t[1:2].isupper() else t[:1].lower() + t[1:] for m, t in found.items()}


def disagreement(
    choices: Mapping[str, BestSet | None], points: Sequence[PointResult], titles: Mapping[str, str] | None = None
) -> str:
    """Whether the metrics choose alike. Told of sets, not of best values: where sets share a point there is no disagreement.

    titles: what to call a metric, where not by METRICS.
    """
    name = names(titles)
    compared = {m: c for m, c in choices.items() if c is not None and c.intervals}
    if len(points) == 1:
        return "There is one point: nothing to choose between."
    if not compared:
        return "No metric has a value at two points: which point is better cannot be said."
    is_decisive = {m: c for m, c in compared.items() if c.is_decisive}
    if not is_decisive:
        return (
            f"Nothing can be told apart: by {listed([name[m] for m in compared], 8)} no point differs from the best one by more "
            "than the draw of the pictures explains."
        )
    silent = [name[m] for m in compared if m not in is_decisive]
    rest = (
        f" {_capital(listed(silent, 8))} tell{'s' if len(silent) == 1 else ''} no point apart from the best."
        if silent
        else ""
    )
    return _agreed_or_not(is_decisive, points, name) + rest


def at_the_edge(
    choices: Mapping[str, BestSet | None], points: Sequence[PointResult], titles: Mapping[str, str] | None = None
) -> str:
    """Which metrics are best at the largest scale that was swept, so that the best may lie beyond; "" for none."""
    row = {p.id: p.row for p in points}
    scales = [r["scale"] for r in row.values()]
    if not scales or max(scales) <= max(1, min(scales)):
        return ""
    name = names(titles)
    best = [
        name[m] for m, c in choices.items() if c is not None and c.is_decisive and row[c.best]["scale"] == max(scales)
    ]
    if not best:
        return ""
    verb = "is" if len(best) == 1 else "are"
    return (
        f"{_capital(listed(best, 8))} {verb} best at the largest scale that was swept, {max(scales):g}: sweep further to see "
        "where they turn."
    )


def _agreed_or_not(is_decisive: Mapping[str, BestSet], points: Sequence[PointResult], name: Mapping[str, str]) -> str:
    which = listed([name[m] for m in is_decisive], 8)
    shared = set.intersection(*(set(c.members) for c in is_decisive.values()))
    if len({c.best for c in is_decisive.values()}) == 1:
        best = _where_best([*is_decisive], is_decisive, points)
        if len(is_decisive) == 1:
            return f"{_capital(which)} is best at {best}."
        count = min((p.row.get("count") or 0 for p in points), default=0)
        if count < MIN_POINT_IMAGES:
            few = f"{counted(count, 'picture')} a point are too few to say that the metrics agree"
            return f"{_capital(which)} are best at {best}; {few}."
        return f"The metrics agree: {which} are best at {best}."
    if shared:
        verb = "is" if len(shared) == 1 else "are"
        return f"The metrics can be had together: {format_points(shared, points)} {verb} in the best set of each of {which}."
    by_best: dict[str, list[str]] = {}
    for m, c in is_decisive.items():
        by_best.setdefault(c.best, []).append(m)
    order = [p.id for p in in_order(points)]
    groups = [by_best[i] for i in sorted(by_best, key=order.index)]
    where = "; ".join(
        f"{listed([name[m] for m in some], 8)} {'is' if len(some) == 1 else 'are'} best at {_where_best(some, is_decisive, points)}"
        for some in groups
    )
    valued_at = [{c.best, *c.intervals} for c in is_decisive.values()]
    if any(not set(c.members) <= at for c in is_decisive.values() for at in valued_at):
        return f"{_capital(where)}. Not all have values at the same points, so that whether they agree cannot be said."
    return f"No point is in the best set of every metric: {where}. {_what_it_costs(is_decisive, points, name)}"


def _where_best(metrics: Sequence[str], choices: Mapping[str, BestSet], points: Sequence[PointResult]) -> str:
    """The best point of metrics that share it, and its set where they share that too."""
    first, settings = choices[metrics[0]], differing(points)
    best = format_point(next(p.row for p in points if p.id == first.best), settings)
    if len(first.members) == 1 or any(set(choices[m].members) != set(first.members) for m in metrics):
        return best
    if settings == ["scale"] and len(first.members) > 2:
        return f"{best} ({format_points(first.members, points).removeprefix('scale ')} cannot be told apart)"
    others = first.members[1:]
    which = (
        format_points(others, points) if len(others) <= 2 or settings == ["scale"] else f"{len(others)} other points"
    )
    return f"{best}, not told apart from {which}"


def _what_it_costs(is_decisive: Mapping[str, BestSet], points: Sequence[PointResult], name: Mapping[str, str]) -> str:
    """Two metrics whose sets share no point, fidelity against diversity first: from the best of one to that of the other."""
    about = {m: METRICS[m].about for m in is_decisive}
    weight = {"fidelity": 0, "both": 1, "diversity": 2}
    apart = [
        (a, b)
        for a in is_decisive
        for b in is_decisive
        if not set(is_decisive[a].members) & set(is_decisive[b].members)
        and weight[about[a]] <= weight[about[b]]
        and a != b
    ]
    if not apart:
        return "Every two of them share a point all the same."
    preferred = ("accuracy", "precision", "density", "kid", "frechet", "coverage", "recall")
    rank = {m: i for i, m in enumerate((*preferred, *(m for m in is_decisive if m not in preferred)))}
    gain, cost = min(apart, key=lambda ab: (weight[about[ab[0]]] - weight[about[ab[1]]], rank[ab[0]], rank[ab[1]]))
    row = {p.id: p.row for p in points}
    start, end = row[is_decisive[cost].best], row[is_decisive[gain].best]
    settings = differing(points)
    went = lambda m: " to ".join(rounded(*measured(r, m)[:2]) for r in (start, end))  # noqa: E731
    kinds = about[gain], about[cost]
    tail = {
        ("fidelity", "diversity"): ", fidelity against diversity",
        ("fidelity", "both"): f"; {name[gain]} counts fidelity alone, {name[cost]} diversity too",
        ("both", "diversity"): f"; {name[cost]} counts diversity alone, {name[gain]} fidelity too",
    }.get(kinds, f"; {name[gain]} and {name[cost]} are both of {kinds[0]}" if kinds[0] == kinds[1] != "both" else "")
    return (
        f"What gains {name[gain]} costs {name[cost]}{tail}: from {format_point(start, settings)} to {format_point(end, settings)} "
        f"{name[gain]} goes from {went(gain)} and {name[cost]} from {went(cost)}."
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


def advised(points: Sequence[PointResult], choices: Mapping[str, BestSet], **how) -> Advice | None:
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
    first = next((m for m in CHOOSES if m in choices and choices[m].intervals), None)
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


def advice_said(
    advice: Advice,
    points: Sequence[PointResult],
    choices: Mapping[str, BestSet],
    titles: Mapping[str, str] | None = None,
    again: Mapping[str, PointResult] | None = None,
) -> str:
    """The advice as a line: what to use, by which metric, what it costs in the others.

    titles: what to call a metric, where not by METRICS. again: points measured with fresh seeds, by id.
    """
    name, row, settings = names(titles), {p.id: p.row for p in points}, differing(points) or ["scale"]
    end = lambda m: "lowest" if METRICS[m].better == "lower" else "highest"  # noqa: E731
    value = lambda m, i: rounded(*measured(row[i], m)[:2])  # noqa: E731
    where = lambda i: ", ".join(setting_called(s, row[i].get(s)) for s in settings)  # noqa: E731
    at, first, best = advice.point, advice.by[0], choices[advice.by[0]].best
    short_repr = [f"{name[first]} {_with_error(*measured(row[at], first)[:2])}"]
    if at == best:
        short_repr[0] += f", the {end(first)}"
    else:
        short_repr[0] += f", not distinguishable from the {end(first)} ({value(first, best)} at {where(best)})"
    if again and at in again and measured(again[at].row, first)[0] is not None:
        short_repr.append(f"with fresh seeds {_with_error(*measured(again[at].row, first)[:2])}")
    if len(advice.by) > 1:
        short_repr.append(f"accuracy {value('accuracy', at)}, not distinguishable from the highest of those")
    calls = f" ({counted(row[at]['nfe'], 'network evaluation')} per image)" if row[at].get("nfe") else ""
    if len(advice.equal) == len(points) > 1:
        short_repr.append(
            f"the cheapest of all {len(points)} settings{calls}, at equal cost the nearest to scale 1; this many images do not distinguish them"
        )
    elif len(advice.equal) > 1:
        short_repr.append(
            f"the cheapest of {len(advice.equal)} such settings{calls}, at equal cost the nearest to scale 1"
        )
    lost = [
        f"{name[m]} {_apart(value(m, at), value(m, i))} ({value(m, at)}; {value(m, i)} at {where(i)})"
        for m, i in advice.costs.items()
    ]
    costs = f" It costs {listed(lost, 8)}." if lost else " No other metric is distinguishably better elsewhere."
    costs = costs if len(choices) > len(advice.by) else ""
    scales = [r["scale"] for r in row.values()]
    edge = row[at]["scale"] == max(scales) > max(1, min(scales))
    further = " It is the largest scale of this sweep: sweep further." if edge else ""
    return f"Use {where(at)}: {'; '.join(short_repr)}.{costs}{further}"


def _apart(one: str, other: str) -> str:
    """How far apart two rounded values are, with the decimals of the one with fewer."""
    decimals = min(len(v.partition(".")[2]) for v in (one, other))
    return f"{abs(float(one) - float(other)):.{decimals}f}"


def worse_by(before: PointResult, after: PointResult, metric: str) -> float | None:
    """By how many standard errors of the difference the later value is the worse; below 0 it is better, None where that is open."""
    (value, error, _), (fresh, fresh_error, _) = measured(before.row, metric), measured(after.row, metric)
    if None in (value, error, fresh, fresh_error):
        return None
    worse = (fresh - value) * (1 if METRICS[metric].better == "lower" else -1)
    size = math.hypot(error, fresh_error)
    return worse / size if size else math.copysign(math.inf, worse) if worse else 0.0


def selection_bias_note(before: PointResult, after: PointResult, metric: str, title: str = "") -> str:
    """What fresh seeds made of the value that a point was chosen by."""
    (value, error, _), (fresh, fresh_error, why) = measured(before.row, metric), measured(after.row, metric)
    name = title or METRICS[metric].title
    if value is None or fresh is None:
        return f"{_capital(name)} has no value to compare{f': {why}' if why else ''}."
    both = f"{_capital(name)} was {_with_error(value, error)} where it was chosen and is {_with_error(fresh, fresh_error)} with fresh seeds"
    moved = worse_by(before, after, metric)
    if moved is None:
        return f"{both}; whether that is chance cannot be said without standard errors."
    if abs(moved) <= CHANCE:
        times = f"{abs(moved):.1f} standard errors" if moved else "nothing"
        return f"{both}: a difference of {times}, no more than chance explains."
    times = f"by {abs(moved):.1f} standard errors" if math.isfinite(moved) else "without a standard error"
    short_repr = (
        "the seeds it was chosen by flattered it" if moved > 0 else "the seeds it was chosen by did it no favour"
    )
    return f"{both}, {'worse' if moved > 0 else 'better'} {times}: {short_repr}."


def _with_error(value: float, error: float | None) -> str:
    return plus_minus(value, error) if error else rounded(value, error)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------------- too much guidance, by the pictures alone


def overguidance_notes(points: Iterable[PointResult]) -> list[str]:
    """Sentences on the finished pictures leaving the data's looks as the scale grows, then on what is clipped; at least one.

    The verdict is by contrast, saturation and, where the data's share is known, by the values at 0 or 255: clipped predictions
    are a fact alone. Every group of points that differ in their scale is judged from scale 1, where that was sampled.
    """
    points = in_order(points)
    others = [s for s in differing(points) if s != "scale"]
    groups: dict[tuple, list[PointResult]] = {}
    for p in points:
        groups.setdefault(tuple(str(p.row.get(s)) for s in others), []).append(p)
    unguided = {heard(p.row): p for p in points if p.row["scale"] == 1}
    judged = [(some, _start(some, unguided)) for some in groups.values()]
    short_repr = list(dict.fromkeys(line for some, base in judged for line in _too_much_of(some, base, others)))
    more = [f"{len(short_repr) - MAX_SAID} more stand out at other settings."] if len(short_repr) > MAX_SAID else []
    facts = _grown(judged, others)
    return [*(short_repr[:MAX_SAID] + more or [_nothing_stands_out(points, not facts)]), *facts]


def _start(group: Sequence[PointResult], unguided: Mapping[tuple, PointResult]) -> PointResult:
    """What a group is judged from."""
    return unguided.get(heard(group[0].row)) or next((p for p in group if p.row["scale"] >= 1), group[0])


def _too_much_of(group: Sequence[PointResult], base: PointResult, others: Sequence[str]) -> list[str]:
    """Of points that differ in their scale alone, in order of it."""
    short_repr = []
    settings = ["scale", *others]
    start = _off_from_the_start(base)
    if start:
        whose = "guidance is not the cause" if base.row["scale"] == 1 else "no less guidance was tried"
        short_repr.append(f"Already at {format_point(base.row, settings)} {listed(start)}: {whose}.")
    out = [(p, *_stands_out(p, base)) for p in group if p.row["scale"] > base.row["scale"]]
    out = [(p, up, down) for p, up, down in out if up or down]
    if out:
        last, up, down = out[-1]
        if up:
            verdict = "more guidance than the data bears"
        else:
            verdict = "guidance takes away from what the data has"
        first = out[0][0].row["scale"]
        since = f"; scale {first:g} is the first to stand out" if len(out) > 1 else ""
        short_repr.append(f"At {format_point(last.row, settings)} {listed([*up, *down])}: {verdict}{since}.")
    return short_repr


def _stands_out(point: PointResult, base: PointResult) -> tuple[list[str], list[str]]:
    """What is more than the data's and grew from the base; what is less and shrank."""
    up, down = [], []
    for what in ("contrast", "saturation"):
        ratio, at_base = (_diagnostic(p, f"{what}_ratio") for p in (point, base))
        if ratio is None or at_base is None:
            continue
        if ratio > 1 + OFF and ratio > at_base + GROWS:
            up.append(_ratio_said(what, ratio))
        if ratio < 1 - OFF and ratio < at_base - GROWS:
            down.append(_ratio_said(what, ratio))
    (beyond, at_base), share = (_diagnostic(p, "extremes_shift") for p in (point, base)), extremes(point)
    if None not in (beyond, at_base, share) and beyond > GROWS and beyond > at_base + GROWS:
        up.append(f"{percent(share)} of the values are at 0 or 255 (of the data's {_share(share - beyond)})")
    return up, down


def _grown(judged: Iterable[tuple[Sequence[PointResult], PointResult]], others: Sequence[str]) -> list[str]:
    """Shares of clipped values that grew with the scale, where they grew most. Black backgrounds clip too: no verdict."""
    pairs = [(p, base) for some, base in judged for p in some if p.row["scale"] > base.row["scale"]]
    shares = [("of the predicted pictures' values lie beyond black and white and are clipped", clipped_share)]
    if not any(_diagnostic(p, "extremes_shift") is not None for p, _ in pairs):
        shares.append(("of the finished pictures' values are at 0 or 255", extremes))
    growth = lambda share, p, base: -1 if None in (share(p), share(base)) else share(p) - share(base)  # noqa: E731
    if not pairs:
        return []
    point, base = max(pairs, key=lambda pair: max(growth(share, *pair) for _, share in shares))
    short_repr = [
        f"{percent(share(point))} {what} ({_share(share(base))} at scale {base.row['scale']:g})"
        for what, share in shares
        if growth(share, point, base) > GROWS
    ]
    if not short_repr:
        return []
    where = format_point(point.row, ["scale", *others])
    return [f"At {where} {listed(short_repr)}. That alone is no fault: data with black or white backgrounds clip too."]


def _share(share: float) -> str:
    return percent(share) if share > 0 else "none"


def _off_from_the_start(base: PointResult) -> list[str]:
    ratios = {what: _diagnostic(base, f"{what}_ratio") for what in ("contrast", "saturation")}
    return [_ratio_said(what, r) for what, r in ratios.items() if r is not None and abs(r - 1) > OFF]


def _ratio_said(what: str, ratio: float) -> str:
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
        return "Whether there is too much guidance cannot be said: the pictures were not compared with the data."
    shares = [s for s in map(clipped_share, points) if s is not None]
    if shares and clipped:
        most = max(shares)
        share = f"{'at most ' if most >= 0.01 else ''}{percent(most)}" if most else "none"
        spans.append(f"{share} of the predicted pictures' values are clipped")
    return f"Nothing stands out in the pictures: {listed(spans)}."


def _diagnostic(point: PointResult, name: str) -> float | None:
    value = point.row.get("diagnostics", {}).get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def clipped_share(point: PointResult) -> float | None:
    """Of the values of the predicted pictures, over all network calls."""
    return mean_of(point.row.get("diagnostics", {}).get("clipped"))


def extremes(point: PointResult) -> float | None:
    return _diagnostic(point, "extremes")


def mean_of(values: Sequence[float | None] | None) -> float | None:
    """Of those that are there; None for none."""
    some = [v for v in values or () if v is not None and math.isfinite(v)]
    return sum(some) / len(some) if some else None
