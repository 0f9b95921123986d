"""Numbers as plain sentences about the model. The thresholds have names."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..evaluation.label_usage import LabelUse, gap_verdict
from ..models.unet import Site
from ..render.text import listed, number, percent, plus_minus, shorten
from .analysis import ChannelCounts, ClassGeometry, Variance, describe_position, sum_variances
from .levels import LevelBin, NoiseLevels, short
from .probes import INTERVENTIONS, Influence, Sensitivity

MOSTLY = 0.5  # of all between-class variance: the class enters "mostly" there
FOLLOWS = (
    0.1  # a class fraction of at most this: the sites "follow time"; of at least 1 minus it: they "follow the class"
)
ALONE = 0.999  # a fraction of at least this is "alone"
EVEN = 1.25  # a largest that is at most this times the smallest: "about the same"
SAME_CLASS_DISTANCE = (
    1e-4  # classes nearer than this, in mean distances of a class from the class mean, have the same modulation
)
UNRELATED = 0.25  # cosines this near to -1 / (K - 1), which unrelated classes have, show no relation
CLEARLY_ALIKE = 0.5  # a cosine of at least this: two classes have much the same modulation
BAND = 0.5  # of the largest effect: the candidate guidance band

SHORT_INTERVENTIONS = {**INTERVENTIONS, "freeze": "given the middle noise level"}


# ---------------------------------------------------------------------- words for numbers


def name(text: str) -> str:
    """A class's name inside a sentence."""
    return shorten(text, 10, 200)


def _times(count: int, one: str) -> str:
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"


# ---------------------------------------------------------------------- is the label used?


def verdict(
    use: LabelUse | None, sensitivity: Sensitivity | None, class_variance: float, classes: int
) -> tuple[str, str]:
    """("used" | "unused" | "open", sentences: the verdict, then its numbers).

    class_variance: the between-class variance of all modulation; classes: K. Only held-out losses show that the label is used.
    Without them, the verdict can only be that the network responds.
    """
    if not classes:
        return "open", "This network has no classes: there is no label to use."
    if use is not None:
        return _from_losses(use)
    if class_variance == 0 or (sensitivity is not None and not sensitivity.x0.any()):
        return "unused", "The label is not used. " + (
            "The modulation does not depend on the class."
            if class_variance == 0
            else "The predicted image is the same whatever the label."
        )
    moved = (
        f" The predicted image moves by up to RMS {number(sensitivity.x0.max())} (pixels from -1 to 1)."
        if sensitivity
        else ""
    )
    return "open", f"The network responds to its label; held-out images are needed to see whether it uses it.{moved}"


def _from_losses(use: LabelUse) -> tuple[str, str]:
    if use.wrong is None:
        return "open", (
            "Whether the label is used cannot be decided. All held-out images are of one class, so there is no wrong label."
        )
    (mean, half), (true, wrong, images) = use.gap("wrong"), use.losses("wrong")
    state = gap_verdict(mean, half)
    if state == "open":
        return (
            "open",
            f"Whether the label is used cannot be decided. {_times(images, 'held-out image')} give no finite interval.",
        )
    losses = f"{true:.4f} against {wrong:.4f}"
    over = f"95% interval over {_times(images, 'held-out image')}"
    if mean == half == 0:
        return (
            "unused",
            f"The label is not used. The held-out loss is the same under the true class and a wrong one ({losses}).",
        )
    if state == "used":
        return "used", (
            f"The label is used. Under the true class, the held-out loss is {plus_minus(mean, half)} lower than under a wrong one "
            f"({losses}; {over})."
        )
    if state == "misleads":
        return "unused", (
            f"The label misleads. Under the true class, the held-out loss is {plus_minus(-mean, half)} higher than under a wrong one "
            f"({losses}; {over})."
        )
    return "unused", (
        f"The label is not used. Under a wrong class, the held-out loss is higher by {plus_minus(mean, half)}, "
        f"which may be 0 ({losses}; {over})."
    )


# ---------------------------------------------------------------------- where class and time enter


def class_entry(field: str, sites: Sequence[tuple[Site, Variance]], classes: int, short: Mapping[str, str]) -> str:
    """Where the class enters, and which resolutions follow time. sites: each with the variance of that field there."""
    if not sites or not any(v.total for _, v in sites):
        return f"Nothing varies: {field} is the same at every noise level and for every class."
    total = sum(v.classes for _, v in sites)
    if classes < 2:
        return f"There is {'one class' if classes else 'no class'} to compare: what varies in {field} is due to time."
    if not total:
        return f"No modulation depends on the class: {field} follows time alone at every site."
    with_class = [site for site, v in sites if v.classes]
    few = (
        f"; {_times(len(sites) - len(with_class), 'other site')} do not receive it"
        if len(with_class) < len(sites)
        else ""
    )
    if len(with_class) == 1:
        first = f"Class enters at one site alone: {short[with_class[0].name]} ({describe_position(with_class[0])})"
    else:
        first = _largest_place(field, sites, total)
    return f"{first}{few}. {_time_or_class(field, sites)}".strip()


def _largest_place(field: str, sites: Sequence[tuple[Site, Variance]], total: float) -> str:
    places: dict[str, list[tuple[Site, Variance]]] = {}
    for site, v in sites:
        places.setdefault(describe_position(site), []).append((site, v))
    width = sum(site.channels for site, _ in sites)
    relative = [
        sum(v.classes for _, v in group) / total / (sum(s.channels for s, _ in group) / width)
        for group in places.values()
    ]
    if max(relative) <= EVEN and min(relative) >= 1 / EVEN:
        return f"Class enters everywhere alike: each place has about the same fraction of the between-class variance of {field} as of the channels"
    largest, of_all = _largest_group(places, total)
    if of_all >= MOSTLY:
        return f"Class enters mostly at {largest} ({_fraction_of_variance(field, places[largest], sites, of_all)})"
    sides: dict[str, list[tuple[Site, Variance]]] = {}
    for site, v in sites:
        sides.setdefault(f"{site.resolution}x{site.resolution}", []).append((site, v))
    side, of_side = _largest_group(sides, total)
    if of_side >= MOSTLY and len(sides) > 1:
        return f"Class enters mostly at {side} ({_fraction_of_variance(field, sides[side], sites, of_side)})"
    return f"Class enters in many places, the most at {largest} ({_fraction_of_variance(field, places[largest], sites, of_all)})"


def _largest_group(places: Mapping[str, list[tuple[Site, Variance]]], total: float) -> tuple[str, float]:
    part_of = {place: sum(v.classes for _, v in group) / total for place, group in places.items()}
    largest = max(part_of, key=part_of.get)
    return largest, part_of[largest]


def _fraction_of_variance(
    field: str, group: list[tuple[Site, Variance]], sites: Sequence[tuple[Site, Variance]], of_all: float
) -> str:
    width = sum(s.channels for s, _ in group) / sum(s.channels for s, _ in sites)
    return f"{percent(of_all)} of all between-class variance of {field}, on {percent(width)} of the channels"


def _time_or_class(field: str, sites: Sequence[tuple[Site, Variance]]) -> str:
    """The resolutions that follow time, and those that follow the class."""
    if not any(v.time or v.interaction for _, v in sites):
        return f"Time does not change {field}."
    by_side = {
        side: sum_variances(v for s, v in sites if s.resolution == side)
        for side in sorted({s.resolution for s, _ in sites})
    }
    fraction = {side: v.class_fraction for side, v in by_side.items() if v.total}
    parts = []
    for factor, group in (
        ("time", {side: s for side, s in fraction.items() if s <= FOLLOWS}),
        ("the class", {side: s for side, s in fraction.items() if s >= 1 - FOLLOWS}),
    ):
        if group:
            who = (
                "All sites"
                if len(group) == len(by_side)
                else f"The {listed([f'{side}x{side}' for side in group])} sites"
            )
            bound = _at_most(max(group.values())) if factor == "time" else _at_least(min(group.values()))
            parts.append(f"{who} follow {factor} (the class is {bound} of the variance of {field} there).")
    return " ".join(parts)


def _at_most(fraction: float) -> str:
    return percent(fraction) if 0 < fraction < 0.01 else f"at most {percent(fraction)}" if fraction else "nothing"


def _at_least(fraction: float) -> str:
    return percent(fraction) if 0.99 < fraction < 1 else f"at least {percent(fraction)}" if fraction < 1 else "all"


def field_fractions(by_field: Mapping[str, Mapping[str, Variance]], classes: int, short: Mapping[str, str]) -> str:
    """What each field follows, over all sites; then the sites that with the largest and the smallest class fraction."""
    parts = "; of ".join(f"{field}: {follows(sum_variances(group.values()))}" for field, group in by_field.items())
    return f"Over all sites, variance of {parts}.{_extremes(by_field, short) if classes > 1 else ''}"


def follows(v: Variance) -> str:
    if not v.total:
        return "none"
    time, label, interaction = (x / v.total for x in v)
    for fraction, factor in ((time, "time"), (label, "class")):
        if fraction >= ALONE:
            return f"{factor} alone"
    return f"time {percent(time)}, class {percent(label)}, both together {percent(interaction)}"


def _extremes(by_field: Mapping[str, Mapping[str, Variance]], short: Mapping[str, str]) -> str:
    of_all: dict[str, Variance] = {}
    for group in by_field.values():
        for site, v in group.items():
            of_all[site] = of_all.get(site, Variance()).plus(v)
    fraction = {site: v.class_fraction for site, v in of_all.items() if v.total}
    if len(fraction) < 2 or max(fraction.values()) - min(fraction.values()) < 0.01:
        return ""
    largest, smallest = max(fraction, key=fraction.get), min(fraction, key=fraction.get)
    return (
        f" The class has the largest fraction at {short[largest]}, with {percent(fraction[largest])} of all variance there, and the smallest at "
        f"{short[smallest]}, with {percent(fraction[smallest])}."
    )


def spread_over_time(
    field: str, spread: np.ndarray, moved: np.ndarray, names: Sequence[str], levels: NoiseLevels, classes: int
) -> str:
    """spread, moved: [sites, T], how far classes differ at one noise level and how far time moves their mean."""
    time = f"time moves {field} by up to RMS {number(moved.max())} ({_peak(moved, names, levels)})"
    if not moved.any():
        time = "time does not move the mean of the classes"
    if classes < 2 or not spread.any():
        reason = f"the classes nowhere differ in {field}" if classes > 1 else "there are no classes to differ"
        return f"{_capital(reason)}; {time}."
    over_t = np.sqrt(np.square(spread).mean(0))
    highest, lowest = levels.words(int(over_t.argmax())), levels.words(int(over_t.argmin()))
    if over_t.max() <= EVEN * over_t.min():
        when = f"over all sites they differ about as much at every noise level (RMS {_span(over_t)})"
    else:
        when = (
            f"over all sites they differ most at {highest} (RMS {number(over_t.max())}) and least at {lowest} "
            f"({number(over_t.min())})"
        )
    return (
        f"The classes differ in {field} by up to RMS {number(spread.max())} ({_peak(spread, names, levels)}); {when}. "
        f"{_capital(time)}."
    )


def change_by_scale(
    field: str, change: np.ndarray, scale: float, spread: np.ndarray, names: Sequence[str], levels: NoiseLevels
) -> str:
    """change, spread: [sites, T], RMS change from guidance scale 1 to `scale`, and how far classes differ at scale 1."""
    if not change.any():
        return f"The guidance scale does not change {field} at any site: the network has not learned to read it."
    by_site = np.sqrt(np.square(change).mean(1))
    least = int(by_site.argmin())
    ratio = np.sqrt(np.square(change).mean() / np.square(spread).mean()) if spread.any() else None
    compared = (
        ""
        if ratio is None
        else f" Over all sites and noise levels that is {number(ratio)} times what the classes differ by."
    )
    return (
        f"From scale 1 to {scale:g} {field} changes by up to RMS {number(change.max())} ({_peak(change, names, levels)}), and "
        f"least at {names[least]} (RMS {number(by_site[least])}).{compared}"
    )


def _span(values: np.ndarray) -> str:
    low, high = number(values.min()), number(values.max())
    return low if low == high else f"{low} to {high}"


def _peak(values: np.ndarray, names: Sequence[str], levels: NoiseLevels) -> str:
    row, column = np.unravel_index(values.argmax(), values.shape)
    return f"{names[row]}, {levels.words(column)}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------------- channels and classes


def describe_channels(sites: Mapping[str, ChannelCounts]) -> str:
    total = sum(c.total for c in sites.values())
    parts = []
    for property_name in ("silenced", "flipped", "constant"):
        count = {site: getattr(c, property_name) for site, c in sites.items()}
        largest = max(count, key=count.get)
        if sum(count.values()):
            fraction = percent(sum(count.values()) / total)
            parts.append(
                f"{sum(count.values()):,} are {property_name} ({fraction}, most at {largest}: {count[largest]} of {sites[largest].total})"
            )
    unaffected = [
        property_name
        for property_name in ("silenced", "flipped", "constant")
        if not any(getattr(c, property_name) for c in sites.values())
    ]
    none = f"none is {' or '.join(unaffected)}" if unaffected else ""
    return f"Of {total:,} channels, {'; '.join([*parts, *([none] if none else [])])}."


def same_classes(geometry: ClassGeometry) -> list[tuple[int, int]]:
    """Pairs of classes with the same modulation."""
    unit = np.linalg.norm(geometry.distance, axis=1).mean() / math.sqrt(2 * len(geometry.names))
    is_same = geometry.distance <= SAME_CLASS_DISTANCE * unit
    return [(i, j) for i in range(len(is_same)) for j in range(i + 1, len(is_same)) if is_same[i, j]]


def describe_geometry(geometry: ClassGeometry | None, class_variance: float, classes: int) -> str:
    """class_variance: the between-class variance of all modulation."""
    if geometry is None:
        return f"There is {'one class' if classes else 'no class'}: nothing to compare."
    k = len(geometry.names)
    if not class_variance:
        return f"All {k} classes have the same modulation: their images cannot differ."
    subset = f"Of the {k} classes stored (of {classes:,}): " if k < classes else ""
    same = same_classes(geometry)
    if same:
        pairs = [f"{name(geometry.names[i])} and {name(geometry.names[j])}" for i, j in same]
        largest = max(geometry.distance[i, j] for i, j in same)
        who = "Two classes have" if len(same) == 1 else f"{len(same)} pairs of classes have"
        first = f"{who} the same modulation: {listed(pairs) if len(pairs) == 1 else '; '.join(pairs[:4])} (distance {number(largest)})"
        first += f" and {len(same) - 4} more" if len(same) > 4 else ""
    else:
        first = _most_alike(geometry)
    null = geometry.null_distance
    null_part = (
        f" The distance of null from the mean of the classes is {number(null)} times that of a class."
        if null is not None
        else ""
    )
    return f"{subset}{first}.{null_part}"


def _most_alike(geometry: ClassGeometry) -> str:
    k = len(geometry.names)
    cosine = np.where(np.eye(k, dtype=bool), np.nan, geometry.cosine)
    high, low = (
        np.unravel_index(np.nanargmax(cosine), cosine.shape),
        np.unravel_index(np.nanargmin(cosine), cosine.shape),
    )
    pair = lambda index: " and ".join(name(geometry.names[i]) for i in index)  # noqa: E731
    if k == 2:
        return f"{pair(high)} are {number(geometry.distance[high])} apart (with two classes the cosine is always -1)"
    if np.nanmax(np.abs(cosine + 1 / (k - 1))) <= UNRELATED:
        return (
            f"No two classes are related: every cosine is within {UNRELATED:g} of {-1 / (k - 1):.2f}, as for unrelated classes "
            f"(largest {cosine[high]:+.2f}, {pair(high)})"
        )
    alike = "have much the same modulation" if cosine[high] >= CLEARLY_ALIKE else "are the most alike"
    return f"{pair(high)} {alike} (cosine {cosine[high]:+.2f}); {pair(low)} are the most opposed ({cosine[low]:+.2f})"


# ---------------------------------------------------------------------- what it changes in the image


def site_influence(influence: Influence, short: Mapping[str, str]) -> str:
    change = INTERVENTIONS.get(influence.intervention, influence.intervention)
    if not influence.change.any() and not influence.all_sites.any():
        return f"A site {change} changes nothing in the predicted image, and neither do all of them."
    row, column = np.unravel_index(influence.change.argmax(), influence.change.shape)
    site, where = short.get(influence.groups[row], influence.groups[row]), influence.levels.words(column)
    most = influence.levels.words(int(influence.all_sites.argmax()))
    together = f"all at once by up to {number(influence.all_sites.max())} ({most})"
    unaffected = int((~influence.change.any(axis=1)).sum())
    without_effect = f"; {unaffected} of {len(influence.groups)} move nothing" if unaffected else ""
    if len(influence.groups) - unaffected == 1:
        return f"Only {site} matters: {change}, it moves the predicted image by up to RMS {number(influence.change.max())} ({where})."
    return f"{_capital(change)}, {site} moves the predicted image most, by RMS {number(influence.change.max())} at {where}; {together}{without_effect}."


def has_band(sensitivity: Sensitivity, fraction: float = BAND) -> bool:
    """Whether some noise levels stand out from the others."""
    x0 = sensitivity.x0
    peak = int(np.argmax(x0))
    return (
        bool(np.any(x0))
        and x0.max() > EVEN * x0.min()
        and sensitivity.band_indices(fraction) not in ((0, len(x0) - 1), (peak, peak))
    )


def guidance_band(sensitivity: Sensitivity, unused: bool = False, fraction: float = BAND) -> str:
    """unused: by the held-out losses the label is not used, so no band is worth trying."""
    x0, levels = sensitivity.x0, sensitivity.levels
    if not np.any(x0):
        return "The predicted image is the same whatever the label: there is nothing for guidance to amplify."
    low, high = sensitivity.band_indices(fraction)
    edge = ", the highest noise level probed" if int(np.argmax(x0)) == len(x0) - 1 else ""
    peak = f"The label moves the predicted image most at {levels.words(int(np.argmax(x0)))}{edge} (RMS {number(np.max(x0))} against {sensitivity.against})"
    if unused:
        return f"{peak}, but it is not used: guidance needs a label that is used."
    if has_band(sensitivity, fraction):
        return (
            f"{peak}, and by at least {percent(fraction)} of that over {levels.span(low, high)}: a candidate band for guidance "
            f"(--interval {band_interval(sensitivity, fraction)}), until a sweep confirms it."
        )
    if x0.max() <= EVEN * x0.min():
        return f"{peak}, and about as much at every other noise level: no band stands out."
    if low == high:
        return f"{peak}, and by less than {percent(fraction)} of that at every other noise level probed: too narrow for a band."
    return f"{peak}, and by at least {percent(fraction)} of that from the lowest noise level probed to the highest: no band stands out."


def band_interval(sensitivity: Sensitivity, fraction: float = BAND) -> str:
    """The band as `--interval` takes it, such as "sigma:0.3-5"."""
    low, high = sensitivity.band(fraction)
    return f"sigma:{_rounded(low, math.floor)}-{_rounded(high, math.ceil)}"


def _rounded(sigma: float, direction: Callable[[float], int]) -> str:
    """Three significant digits, rounded up or down, so that the interval includes its ends."""
    if not 0 < sigma < math.inf:
        return short(sigma)
    unit = 10.0 ** (math.floor(math.log10(sigma)) - 2)
    return short(direction(round(sigma / unit, 6)) * unit)


def use_over_levels(gaps: Sequence[tuple[float, float] | None], bins: Sequence[LevelBin]) -> str:
    """gaps: mean and half-width of loss(wrong) - loss(true) in each bin of noise levels."""
    known = [i for i, gap in enumerate(gaps) if gap is not None and math.isfinite(gap[0])]
    if not known:
        return "No noise level was measured."
    above = [i for i in known if gaps[i][0] - gaps[i][1] > 0]
    below = [i for i in known if gaps[i][0] + gaps[i][1] < 0]
    worse = f" At {listed([bins[i].words for i in below])} the true label makes the loss higher." if below else ""
    if not above:
        return f"In no bin of noise levels does the loss under a wrong label exceed that under the true one by more than its 95% interval.{worse}"
    largest = max(above, key=lambda i: gaps[i][0])
    return (
        f"The loss under the true label is lower than under a wrong one, beyond its 95% interval, in {len(above)} of {len(known)} bins of noise levels, most at "
        f"{bins[largest].words} (by {plus_minus(*gaps[largest])}).{worse}"
    )


def rows_differ(names: Sequence[str], rows: Sequence[Sequence[np.ndarray]]) -> str:
    """How alike the rows of a mixing grid are, column by column."""
    difference = {
        (i, j): float(np.sqrt(np.mean([np.square(a.astype(float) - b).mean() for a, b in zip(rows[i], rows[j])])))
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
        if min(len(rows[i]), len(rows[j]))
    }
    if not difference:
        return f"One row of images: {name(names[0])}." if names else "No image."
    if not any(difference.values()):
        return "Every row shows the same images: the mix makes no difference."
    near, far = min(difference, key=difference.get), max(difference, key=difference.get)
    pair = lambda index: f"“{name(names[index[0]])}” and “{name(names[index[1]])}”"  # noqa: E731
    if len(difference) == 1:
        return f"{pair(far)} differ by RMS {difference[far]:.0f} of 255 levels."
    return f"Most alike are {pair(near)} (RMS {difference[near]:.0f} of 255 levels), most different {pair(far)} (RMS {difference[far]:.0f})."


def how_far_drifted(moved: Mapping[str, Mapping[str, float]], short: Mapping[str, str]) -> str:
    flat = {(site, field): ratio for site, fields in moved.items() for field, ratio in fields.items()}
    if not any(flat.values()):
        return "The modulation is the same in the two checkpoints."
    largest, smallest = max(flat, key=flat.get), min(flat, key=flat.get)
    middle = float(np.median(list(flat.values())))
    say = lambda index: f"{index[1]} at {short.get(index[0], index[0])} ({percent_of(flat[index])})"  # noqa: E731
    return f"{_capital(say(largest))} moved most and {say(smallest)} least, as a fraction of its earlier size; the median is {percent_of(middle)}."


def percent_of(ratio: float) -> str:
    return "infinite" if not math.isfinite(ratio) else f"{ratio:.1%}" if ratio < 0.1 else f"{ratio:.0%}"
