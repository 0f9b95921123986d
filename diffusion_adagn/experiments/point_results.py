"""A measured point of a sweep: its settings, its name in a sentence, its values."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..evaluation.metrics import METRICS
from ..render.text import listed, plus_minus

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


def rounded(value: float | None, error: float | None) -> str:
    """A value with as many decimals as its standard error has two digits for; "-" for none."""
    if value is None:
        return "-"
    return plus_minus(value, error).split(" ")[0] if error else f"{value:.4g}"


def diagnostic(point: PointResult, name: str) -> float | None:
    """A finite diagnostic of a point; None without."""
    value = point.row.get("diagnostics", {}).get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def clipped_fraction(point: PointResult) -> float | None:
    """The clipped fraction of the predicted images' values, over all network evaluations."""
    return mean_of(point.row.get("diagnostics", {}).get("clipped"))


def extremes(point: PointResult) -> float | None:
    return diagnostic(point, "extremes")


def mean_of(values: Sequence[float | None] | None) -> float | None:
    """The mean of the finite values; None for none."""
    finite = [v for v in values or () if v is not None and math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None
