"""What a sweep says of its best points, in sentences: which are best, where metrics disagree, which point to use."""

from collections.abc import Mapping, Sequence

from ..evaluation.metrics import METRICS
from ..render.text import capital, listed, plus_minus
from .point_results import (
    PointResult,
    differing,
    format_point,
    format_points,
    format_setting,
    in_order,
    metric_value,
    rounded,
)
from .selection import Advice, BestSet

MIN_POINT_IMAGES = 50  # images per point, below which agreement is not reported


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


def _with_error(value: float, error: float | None) -> str:
    return plus_minus(value, error) if error else rounded(value, error)
