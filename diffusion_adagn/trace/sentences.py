"""The findings of a trace as sentences. The thresholds have names; all other numbers are in the report's tables."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..evaluation.label_usage import LabelUse, verdict_from_losses
from ..models.unet import Site
from ..render.text import number, percent, shorten
from .analysis import ClassGeometry, Variance, by_place, describe_position, resolution_of, sum_variances
from .levels import short
from .probes import Sensitivity

MOSTLY = 0.5  # of all between-class variance: the class enters "mostly" there
EVEN = 1.25  # a largest that is at most this times the smallest: "about the same"
SAME_CLASS_DISTANCE = 1e-4  # in mean distances of a class from the class mean: nearer classes have the same modulation
BAND = 0.5  # of the largest effect: the candidate guidance band


def name(text: str) -> str:
    """A class's name inside a sentence."""
    return shorten(text, 32)


# ---------------------------------------------------------------------- is the label used?


def verdict(
    use: LabelUse | None, sensitivity: Sensitivity | None, class_variance: float, classes: int
) -> tuple[str, str, str]:
    """("used" | "unused" | "open", the verdict, its numbers).

    Only held-out losses show that the label is used. Without them, the verdict can only be that the network responds.

    Args:
        use: Held-out losses.
        sensitivity: What the label changes.
        class_variance: The between-class variance of all modulation.
        classes: K.
    """
    if not classes:
        return "open", "This network has no classes: there is no label to use.", ""
    if use is not None:
        found = verdict_from_losses(use)
        headline, _, numbers = found.sentence.partition(": ")
        return {True: "used", False: "unused", None: "open"}[found.used], f"{headline}.", numbers
    if class_variance == 0 or (sensitivity is not None and not sensitivity.x0.any()):
        reason = "The modulation does not depend on the class."
        if class_variance:
            reason = "The predicted image is the same whatever the label."
        return "unused", "The label is not used.", reason
    responds = "The network responds to its label; held-out images are needed to see whether it uses it."
    if sensitivity is None:
        return "open", responds, ""
    largest = number(sensitivity.x0.max())
    return "open", responds, f"The predicted image moves by up to RMS {largest} (pixels from -1 to 1)."


# ---------------------------------------------------------------------- where the class enters


def class_entry(field: str, sites: Sequence[tuple[Site, Variance]], classes: int, short: Mapping[str, str]) -> str:
    """Where the class enters. sites: each with the variance of that field there."""
    if not sites or not any(v.total for _, v in sites):
        return f"Nothing varies: {field} is the same at every noise level and for every class."
    if classes < 2:
        return f"There is {'one class' if classes else 'no class'} to compare: what varies in {field} is due to time."
    with_class = [site for site, v in sites if v.classes]
    if not with_class:
        return f"No modulation depends on the class: {field} follows time alone at every site."
    if len(with_class) == 1:
        one = with_class[0]
        return f"Class enters at one site of {len(sites)} alone: {short[one.name]} ({describe_position(one)})."
    places = by_place(sites)
    relative = [place.between / place.channels for place in places]
    if max(relative) <= EVEN and min(relative) >= 1 / EVEN:
        return "Class enters everywhere alike: each place has about its part of the channels."
    largest = [max(group, key=lambda place: place.between) for group in (places, by_place(sites, resolution_of))]
    mostly = [place for place in largest if place.between >= MOSTLY]
    place, words = (mostly[0], "mostly at") if mostly else (largest[0], "in many places, the most at")
    fraction = f"{percent(place.between)} of all between-class variance of {field}"
    return f"Class enters {words} {place.name} ({fraction}, on {percent(place.channels)} of the channels)."


def field_fractions(by_field: Mapping[str, Mapping[str, Variance]]) -> str:
    """What each field follows, over all sites."""
    parts = [f"{field} {follows(sum_variances(group.values()))}" for field, group in by_field.items()]
    return f"Variance over all sites: {'; '.join(parts)}."


def follows(v: Variance) -> str:
    """The parts of a variance in per cent."""
    if not v.total:
        return "none"
    return ", ".join(f"{factor} {percent(part / v.total)}" for factor, part in zip(("time", "class", "both"), v))


# ---------------------------------------------------------------------- classes


def same_classes(geometry: ClassGeometry) -> list[tuple[int, int]]:
    """Pairs of classes with the same modulation."""
    unit = np.linalg.norm(geometry.distance, axis=1).mean() / math.sqrt(2 * len(geometry.names))
    is_same = geometry.distance <= SAME_CLASS_DISTANCE * unit
    return [(i, j) for i in range(len(is_same)) for j in range(i + 1, len(is_same)) if is_same[i, j]]


def describe_geometry(geometry: ClassGeometry | None, class_variance: float, classes: int) -> str:
    """Which classes have the same modulation, else which are the most alike.

    Args:
        geometry: Of the stored classes.
        class_variance: The between-class variance of all modulation.
        classes: K.
    """
    if geometry is None:
        return f"There is {'one class' if classes else 'no class'}: nothing to compare."
    k = len(geometry.names)
    if not class_variance:
        return f"All {k} classes have the same modulation: their images cannot differ."
    subset = f"Of the {k} classes stored (of {classes:,}): " if k < classes else ""
    if same := same_classes(geometry):
        pairs = "; ".join(f"{name(geometry.names[i])} and {name(geometry.names[j])}" for i, j in same[:4])
        more = f"; and {len(same) - 4} more pairs" if len(same) > 4 else ""
        return f"{subset}These classes have the same modulation: {pairs}{more}."
    cosine = np.where(np.eye(k, dtype=bool), np.nan, geometry.cosine)
    i, j = np.unravel_index(np.nanargmax(cosine), cosine.shape)
    alike = f"{name(geometry.names[i])} and {name(geometry.names[j])} are the most alike (cosine {cosine[i, j]:+.2f})."
    return subset + alike


# ---------------------------------------------------------------------- the band of guidance


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
    """Whether there is a band of noise levels to try. unused: by the held-out losses the label is not used."""
    x0, levels = sensitivity.x0, sensitivity.levels
    if not np.any(x0):
        return "The predicted image is the same whatever the label: there is nothing for guidance to amplify."
    size = f"RMS {number(np.max(x0))} against {sensitivity.against}"
    peak = f"The label moves the predicted image most at {levels.words(int(np.argmax(x0)))} ({size})"
    if unused:
        return f"{peak}, but it is not used: guidance needs a label that is used."
    if has_band(sensitivity, fraction):
        span = levels.span(*sensitivity.band_indices(fraction))
        return (
            f"{peak}, and by at least {percent(fraction)} of that over {span}: a candidate band for guidance "
            f"(--interval {band_interval(sensitivity, fraction)}), until a sweep confirms it."
        )
    return f"{peak}; no band of noise levels stands out."


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
