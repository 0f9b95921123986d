"""From numbers to plain sentences. Each says what is so for the model at hand; the thresholds it turns on have names."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..evaluation.label_usage import LabelUse, judge
from ..models.unet import Site
from ..render.text import listed, number, percent, plus_minus, shorten
from .analysis import Channels, ClassGeometry
from .probes import INTERVENTIONS, Influence, Sensitivity
from .readings import Variance, summed, where

MOSTLY = 0.5  # of all between-class variance: the class enters "mostly" there
FOLLOWS = 0.1  # a class share of at most this: the sites "follow time"; of at least 1 minus it: they "follow the class"
ALONE = 0.999  # a share of at least this is "alone"
EVEN = 1.25  # a largest that is at most this times the smallest: "about the same"
SAME_CLASS_DISTANCE = (
    1e-4  # classes nearer than this, in mean distances of a class from the class mean, are told the same
)
UNRELATED = 0.25  # cosines this near to -1 / (K - 1), which unrelated classes have, show no kinship
CLEARLY_ALIKE = 0.5  # a cosine of at least this: two classes are told much the same
BAND = 0.5  # of the largest effect: the candidate guidance band

SHORTLY = {**INTERVENTIONS, "freeze": "told the middle timestep"}


# ---------------------------------------------------------------------- words for numbers


def name(text: str) -> str:
    """A class's name inside a sentence."""
    return shorten(text, 10, 200)


def _times(count: int, one: str) -> str:
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"


# ---------------------------------------------------------------------- is the label used?


def verdict(use: LabelUse | None, sensitivity: Sensitivity | None, told: float, classes: int) -> tuple[str, str]:
    """("used" | "unused" | "open", sentences: the verdict, then its numbers). told: the between-class variance of all that is told; classes: K.

    Only held-out losses can say that the label is used. Without them the network may be said to respond, no more.
    """
    if not classes:
        return "open", "This network has no classes: there is no label to use."
    if use is not None:
        return _from_losses(use)
    if told == 0 or (sensitivity is not None and not sensitivity.x0.any()):
        return "unused", "The label is not used. " + (
            "Nothing that a site is told depends on the class."
            if told == 0
            else "The predicted picture is the same whatever the label."
        )
    moved = (
        f" The predicted picture moves by up to RMS {number(sensitivity.x0.max())} (pixels from -1 to 1)."
        if sensitivity
        else ""
    )
    return "open", f"The network responds to its label; whether it uses it needs pictures.{moved}"


def _from_losses(use: LabelUse) -> tuple[str, str]:
    if use.wrong is None:
        return "open", (
            "Whether the label is used cannot be said. All held-out pictures are of one class, so that none can be told a wrong one."
        )
    (mean, half), (true, told, pictures) = use.gap("wrong"), use.losses("wrong")
    other = "a wrong one"
    short_repr = judge(mean, half)
    if short_repr == "open":
        return (
            "open",
            f"Whether the label is used cannot be said. {_times(pictures, 'held-out picture')} give no finite interval.",
        )
    losses = f"{true:.4f} against {told:.4f}"
    over = f"95% interval over {_times(pictures, 'held-out picture')}"
    if mean == half == 0:
        return (
            "unused",
            f"The label is not used. The held-out loss is the same told the true class or {other} ({losses}).",
        )
    if short_repr == "used":
        return "used", (
            f"The label is used. Told the true class, the held-out loss is {plus_minus(mean, half)} lower than told {other} "
            f"({losses}; {over})."
        )
    if short_repr == "misleads":
        return "unused", (
            f"The label misleads. Told the true class, the held-out loss is {plus_minus(-mean, half)} higher than told {other} "
            f"({losses}; {over})."
        )
    return "unused", (
        f"The label is not used. Told {other}, the held-out loss exceeds that under the true class by {plus_minus(mean, half)}, "
        f"which may as well be 0 ({losses}; {over})."
    )


# ---------------------------------------------------------------------- where class and time enter


def class_entry(field: str, sites: Sequence[tuple[Site, Variance]], classes: int, short: Mapping[str, str]) -> str:
    """Where the class enters, and which resolutions follow time. sites: each with the variance of that field there."""
    if not sites or not any(v.total for _, v in sites):
        return f"Nothing varies: every site is told the same {field} at every timestep and for every class."
    total = sum(v.classes for _, v in sites)
    if classes < 2:
        return f"There is {'one class' if classes else 'no class'} to compare: what varies in {field} is due to time."
    if not total:
        return f"Nothing a site is told depends on the class: {field} follows time alone at every site."
    heard = [site for site, v in sites if v.classes]
    few = f"; {_times(len(sites) - len(heard), 'other site')} hear nothing of it" if len(heard) < len(sites) else ""
    if len(heard) == 1:
        first = f"Class enters at one site alone: {short[heard[0].name]} ({where(heard[0])})"
    else:
        first = _largest_place(field, sites, total)
    return f"{first}{few}. {_who_follows(field, sites)}".strip()


def _largest_place(field: str, sites: Sequence[tuple[Site, Variance]], total: float) -> str:
    places: dict[str, list[tuple[Site, Variance]]] = {}
    for site, v in sites:
        places.setdefault(where(site), []).append((site, v))
    width = sum(site.channels for site, _ in sites)
    against_width = [
        sum(v.classes for _, v in some) / total / (sum(s.channels for s, _ in some) / width) for some in places.values()
    ]
    if max(against_width) <= EVEN and min(against_width) >= 1 / EVEN:
        return f"Class enters everywhere alike: each place has about its share of the channels in the between-class variance of {field}"
    most, of_all = _most(places, total)
    if of_all >= MOSTLY:
        return f"Class enters mostly at {most} ({_shared(field, places[most], sites, of_all)})"
    sides: dict[str, list[tuple[Site, Variance]]] = {}
    for site, v in sites:
        sides.setdefault(f"{site.resolution}x{site.resolution}", []).append((site, v))
    side, of_side = _most(sides, total)
    if of_side >= MOSTLY and len(sides) > 1:
        return f"Class enters mostly at {side} ({_shared(field, sides[side], sites, of_side)})"
    return f"Class enters in many places, most of all at {most} ({_shared(field, places[most], sites, of_all)})"


def _most(places: Mapping[str, list[tuple[Site, Variance]]], total: float) -> tuple[str, float]:
    part_of = {place: sum(v.classes for _, v in some) / total for place, some in places.items()}
    most = max(part_of, key=part_of.get)
    return most, part_of[most]


def _shared(
    field: str, some: list[tuple[Site, Variance]], sites: Sequence[tuple[Site, Variance]], of_all: float
) -> str:
    width = sum(s.channels for s, _ in some) / sum(s.channels for s, _ in sites)
    return f"{percent(of_all)} of all between-class variance of {field}, on {percent(width)} of the channels"


def _who_follows(field: str, sites: Sequence[tuple[Site, Variance]]) -> str:
    """The resolutions at which one of the two rules."""
    if not any(v.time or v.both for _, v in sites):
        return f"Time does not change {field}."
    by_side = {
        side: summed(v for s, v in sites if s.resolution == side) for side in sorted({s.resolution for s, _ in sites})
    }
    share = {side: v.class_share for side, v in by_side.items() if v.total}
    short_repr = []
    for whom, some in (
        ("time", {side: s for side, s in share.items() if s <= FOLLOWS}),
        ("the class", {side: s for side, s in share.items() if s >= 1 - FOLLOWS}),
    ):
        if some:
            who = (
                "All sites" if len(some) == len(by_side) else f"The {listed([f'{side}x{side}' for side in some])} sites"
            )
            bound = _at_most(max(some.values())) if whom == "time" else _at_least(min(some.values()))
            short_repr.append(f"{who} follow {whom} (the class is {bound} of the variance of {field} there).")
    return " ".join(short_repr)


def _at_most(share: float) -> str:
    return percent(share) if 0 < share < 0.01 else f"at most {percent(share)}" if share else "nothing"


def _at_least(share: float) -> str:
    return percent(share) if 0.99 < share < 1 else f"at least {percent(share)}" if share < 1 else "all"


def field_shares(by_field: Mapping[str, Mapping[str, Variance]], classes: int, short: Mapping[str, str]) -> str:
    """What each field follows, over all sites; then the sites that lean most to class and to time."""
    short_repr = "; of ".join(f"{field}: {follows(summed(some.values()))}" for field, some in by_field.items())
    return f"Over all sites, variance of {short_repr}.{_leaning(by_field, short) if classes > 1 else ''}"


def follows(v: Variance) -> str:
    if not v.total:
        return "none"
    time, label, both = (x / v.total for x in v)
    for share, whom in ((time, "time"), (label, "class")):
        if share >= ALONE:
            return f"{whom} alone"
    return f"time {percent(time)}, class {percent(label)}, both together {percent(both)}"


def _leaning(by_field: Mapping[str, Mapping[str, Variance]], short: Mapping[str, str]) -> str:
    of_all: dict[str, Variance] = {}
    for some in by_field.values():
        for site, v in some.items():
            of_all[site] = of_all.get(site, Variance()).plus(v)
    share = {site: v.class_share for site, v in of_all.items() if v.total}
    if len(share) < 2 or max(share.values()) - min(share.values()) < 0.01:
        return ""
    most, least = max(share, key=share.get), min(share, key=share.get)
    return (
        f" The class has most of a say at {short[most]}, with {percent(share[most])} of all variance there, and least at "
        f"{short[least]}, with {percent(share[least])}."
    )


def spread_over_time(
    field: str, spread: np.ndarray, moved: np.ndarray, names: Sequence[str], timesteps: Sequence[float], classes: int
) -> str:
    """spread, moved: [sites, T], how far classes differ at one timestep and how far time moves their mean."""
    time = f"time moves {field} by up to RMS {number(moved.max())} ({_peak(moved, names, timesteps)})"
    if not moved.any():
        time = "time does not move the mean of the classes"
    if classes < 2 or not spread.any():
        why = f"the classes nowhere differ in {field}" if classes > 1 else "there are no classes to differ"
        return f"{_capital(why)}; {time}."
    over_t = np.sqrt(np.square(spread).mean(0))
    t_most, t_least = timesteps[int(over_t.argmax())], timesteps[int(over_t.argmin())]
    if over_t.max() <= EVEN * over_t.min():
        when = f"over all sites they differ about as much at every timestep (RMS {_span(over_t)})"
    else:
        when = (
            f"over all sites they differ most at t = {t_most:g} (RMS {number(over_t.max())}) and least at t = {t_least:g} "
            f"({number(over_t.min())})"
        )
    return (
        f"The classes differ in {field} by up to RMS {number(spread.max())} ({_peak(spread, names, timesteps)}); {when}. "
        f"{_capital(time)}."
    )


def _span(values: np.ndarray) -> str:
    low, high = number(values.min()), number(values.max())
    return low if low == high else f"{low} to {high}"


def _peak(values: np.ndarray, names: Sequence[str], timesteps: Sequence[float]) -> str:
    row, column = np.unravel_index(values.argmax(), values.shape)
    return f"{names[row]}, t = {timesteps[column]:g}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------------- channels and classes


def channel_health(sites: Mapping[str, Channels]) -> str:
    total = sum(c.of for c in sites.values())
    short_repr = []
    for what in ("silenced", "flipped", "constant"):
        count = {site: getattr(c, what) for site, c in sites.items()}
        most = max(count, key=count.get)
        if sum(count.values()):
            share = percent(sum(count.values()) / total)
            short_repr.append(
                f"{sum(count.values()):,} are {what} ({share}, most at {most}: {count[most]} of {sites[most].of})"
            )
    quiet = [what for what in ("silenced", "flipped", "constant") if not any(getattr(c, what) for c in sites.values())]
    none = f"none is {' or '.join(quiet)}" if quiet else ""
    return f"Of {total:,} channels, {'; '.join([*short_repr, *([none] if none else [])])}."


def same_classes(geometry: ClassGeometry) -> list[tuple[int, int]]:
    """Pairs of classes that are told the same."""
    unit = np.linalg.norm(geometry.distance, axis=1).mean() / math.sqrt(2 * len(geometry.names))
    apart = geometry.distance <= SAME_CLASS_DISTANCE * unit
    return [(i, j) for i in range(len(apart)) for j in range(i + 1, len(apart)) if apart[i, j]]


def classes_lie(geometry: ClassGeometry | None, told: float, classes: int) -> str:
    """told: the between-class variance of all that is told."""
    if geometry is None:
        return f"There is {'one class' if classes else 'no class'}: nothing to compare."
    k = len(geometry.names)
    if not told:
        return f"All {k} classes are told the same: a picture of one cannot differ from that of another."
    some = f"Of the {k} classes kept (of {classes:,}): " if k < classes else ""
    same = same_classes(geometry)
    if same:
        pairs = [f"{name(geometry.names[i])} and {name(geometry.names[j])}" for i, j in same]
        largest = max(geometry.distance[i, j] for i, j in same)
        who = "Two classes are" if len(same) == 1 else f"{len(same)} pairs of classes are"
        first = f"{who} told the same: {listed(pairs) if len(pairs) == 1 else '; '.join(pairs[:4])} (distance {number(largest)})"
        first += f" and {len(same) - 4} more" if len(same) > 4 else ""
    else:
        first = _kinship(geometry)
    null = geometry.null_distance
    tmp = (
        f" Null lies {number(null)} times as far from the mean of the classes as a class does."
        if null is not None
        else ""
    )
    return f"{some}{first}.{tmp}"


def _kinship(geometry: ClassGeometry) -> str:
    k = len(geometry.names)
    cosine = np.where(np.eye(k, dtype=bool), np.nan, geometry.cosine)
    high, low = (
        np.unravel_index(np.nanargmax(cosine), cosine.shape),
        np.unravel_index(np.nanargmin(cosine), cosine.shape),
    )
    pair = lambda at: " and ".join(name(geometry.names[i]) for i in at)  # noqa: E731
    if k == 2:
        return f"{pair(high)} lie {number(geometry.distance[high])} apart (with two classes the cosine is always -1)"
    if np.nanmax(np.abs(cosine + 1 / (k - 1))) <= UNRELATED:
        return (
            f"No two classes are kin: every cosine lies within {UNRELATED:g} of {-1 / (k - 1):.2f}, which unrelated classes have "
            f"(largest {cosine[high]:+.2f}, {pair(high)})"
        )
    alike = "are told much the same" if cosine[high] >= CLEARLY_ALIKE else "are the nearest of kin"
    return f"{pair(high)} {alike} (cosine {cosine[high]:+.2f}); {pair(low)} are the most opposed ({cosine[low]:+.2f})"


# ---------------------------------------------------------------------- what it changes in the picture


def site_influence(influence: Influence, short: Mapping[str, str]) -> str:
    told = INTERVENTIONS.get(influence.intervention, influence.intervention)
    if not influence.change.any() and not influence.whole.any():
        return f"A site {told} changes nothing in the predicted picture, and neither do all of them."
    row, column = np.unravel_index(influence.change.argmax(), influence.change.shape)
    at, t = short.get(influence.groups[row], influence.groups[row]), influence.timesteps[column]
    whole = f"all at once by up to {number(influence.whole.max())} (t = {influence.timesteps[int(influence.whole.argmax())]})"
    quiet = int((~influence.change.any(axis=1)).sum())
    still = f"; {quiet} of {len(influence.groups)} move nothing" if quiet else ""
    if len(influence.groups) - quiet == 1:
        return f"Only {at} matters: {told}, it moves the predicted picture by up to RMS {number(influence.change.max())} (t = {t})."
    return f"{_capital(told)}, {at} moves the predicted picture most, by RMS {number(influence.change.max())} at t = {t}; {whole}{still}."


def has_band(sensitivity: Sensitivity, share: float = BAND) -> bool:
    """Whether some timesteps stand out from the others."""
    x0, t = sensitivity.x0, sensitivity.timesteps
    peak = t[int(np.argmax(x0))]
    return (
        bool(np.any(x0))
        and x0.max() > EVEN * x0.min()
        and sensitivity.band(share) not in ((min(t), max(t)), (peak, peak))
    )


def guidance_band(sensitivity: Sensitivity, unused: bool = False, share: float = BAND) -> str:
    """unused: held-out losses say that the label is not used, so that no band is worth trying."""
    x0, t = sensitivity.x0, sensitivity.timesteps
    if not np.any(x0):
        return "The predicted picture is the same whatever the label: there is nothing for guidance to amplify."
    low, high = sensitivity.band(share)
    edge = ", the noisiest timestep looked at" if int(np.argmax(x0)) == len(t) - 1 else ""
    peak = f"The label moves the predicted picture most at t = {t[int(np.argmax(x0))]}{edge} (RMS {number(np.max(x0))} against {sensitivity.against})"
    if unused:
        return f"{peak}, but it is not used: a band for guidance is of no use before it is."
    if has_band(sensitivity, share):
        return (
            f"{peak}, and by at least {percent(share)} of that between t = {low} and t = {high}: a candidate band for guidance, "
            f"in timesteps (--interval t:{low}-{high}), until a sweep confirms it."
        )
    if x0.max() <= EVEN * x0.min():
        return f"{peak}, and about as much at every other timestep: no band stands out."
    if low == high:
        return f"{peak}, and by less than {percent(share)} of that at every other timestep looked at: too narrow for a band."
    return f"{peak}, and by at least {percent(share)} of that from the first timestep looked at to the last: no band stands out."


def use_over_time(gaps: Sequence[tuple[float, float] | None], edges: Sequence[int]) -> str:
    """gaps: mean and half-width of loss(wrong) - loss(true) in each bin of timesteps."""
    known = [i for i, gap in enumerate(gaps) if gap is not None and math.isfinite(gap[0])]
    if not known:
        return "No timestep was measured."
    above = [i for i in known if gaps[i][0] - gaps[i][1] > 0]
    below = [i for i in known if gaps[i][0] + gaps[i][1] < 0]
    span = lambda i: f"t = {edges[i]} to {edges[i + 1] - 1}"  # noqa: E731
    worse = f" At {listed([span(i) for i in below])} the true label makes the loss higher." if below else ""
    if not above:
        return f"In no bin of timesteps does the loss under a wrong label exceed that under the true one by more than its 95% interval.{worse}"
    most = max(above, key=lambda i: gaps[i][0])
    return (
        f"The true label beats a wrong label beyond its 95% interval in {len(above)} of {len(known)} bins of timesteps, most at "
        f"{span(most)} (loss lower by {plus_minus(*gaps[most])}).{worse}"
    )


def rows_differ(names: Sequence[str], rows: Sequence[Sequence[np.ndarray]]) -> str:
    """How alike the rows of a mixing grid are, column by column."""
    apart = {
        (i, j): float(np.sqrt(np.mean([np.square(a.astype(float) - b).mean() for a, b in zip(rows[i], rows[j])])))
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
        if min(len(rows[i]), len(rows[j]))
    }
    if not apart:
        return f"One row of pictures: {name(names[0])}." if names else "No picture."
    if not any(apart.values()):
        return "Every row shows the same pictures: what is mixed makes no difference."
    near, far = min(apart, key=apart.get), max(apart, key=apart.get)
    pair = lambda at: f"“{name(names[at[0]])}” and “{name(names[at[1]])}”"  # noqa: E731
    if len(apart) == 1:
        return f"{pair(far)} differ by RMS {apart[far]:.0f} of 255 levels."
    return f"Most alike are {pair(near)} (RMS {apart[near]:.0f} of 255 levels), most different {pair(far)} (RMS {apart[far]:.0f})."


def how_far_drifted(moved: Mapping[str, Mapping[str, float]], short: Mapping[str, str]) -> str:
    flat = {(site, field): ratio for site, fields in moved.items() for field, ratio in fields.items()}
    if not any(flat.values()):
        return "The two checkpoints tell every site the same."
    most, least = max(flat, key=flat.get), min(flat, key=flat.get)
    middle = float(np.median(list(flat.values())))
    say = lambda at: f"{at[1]} at {short.get(at[0], at[0])} ({percent_of(flat[at])})"  # noqa: E731
    return f"{_capital(say(most))} moved most and {say(least)} least, as a share of its earlier size; the median is {percent_of(middle)}."


def percent_of(ratio: float) -> str:
    return "beyond measure" if not math.isfinite(ratio) else f"{ratio:.1%}" if ratio < 0.1 else f"{ratio:.0%}"
