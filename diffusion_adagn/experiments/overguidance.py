"""Too much guidance, from the images alone: how their statistics depart from the data's as the scale grows."""

from collections.abc import Iterable, Mapping, Sequence

from ..render.text import listed, percent
from .point_results import (
    PointResult,
    clipped_fraction,
    diagnostic,
    differing,
    extremes,
    format_point,
    in_order,
    unguided_settings,
)

RATIO_TOLERANCE = 0.1  # a ratio that differs from the data's by more is reported
MIN_GROWTH = 0.05  # ... if it also differs by this much from the base point; the same for fractions of values
MAX_NOTES = 4  # notes on too much guidance


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
        ratio, at_base = (diagnostic(p, f"{what}_ratio") for p in (point, base))
        if ratio is None or at_base is None:
            continue
        if ratio > 1 + RATIO_TOLERANCE and ratio > at_base + MIN_GROWTH:
            up.append(_format_ratio(what, ratio))
        if ratio < 1 - RATIO_TOLERANCE and ratio < at_base - MIN_GROWTH:
            down.append(_format_ratio(what, ratio))
    (shift, at_base), fraction = (diagnostic(p, "extremes_shift") for p in (point, base)), extremes(point)
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
    if not any(diagnostic(p, "extremes_shift") is not None for p, _ in pairs):
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
    ratios = {what: diagnostic(base, f"{what}_ratio") for what in ("contrast", "saturation")}
    return [_format_ratio(what, r) for what, r in ratios.items() if r is not None and abs(r - 1) > RATIO_TOLERANCE]


def _format_ratio(what: str, ratio: float) -> str:
    return f"{what} is {ratio:.2f} of the data's"


def _nothing_stands_out(points: Sequence[PointResult], clipped: bool) -> str:
    """clipped: whether to say how much is."""
    spans = []
    for what in ("contrast", "saturation"):
        ratios = [r for r in (diagnostic(p, f"{what}_ratio") for p in points) if r is not None]
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
