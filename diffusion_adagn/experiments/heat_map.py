"""A heat map of two settings of a sweep: the best value at each pair, with the best set outlined. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import InputError
from ..evaluation.metrics import METRICS
from .comparison import value_of
from .selection import (
    NAMES,
    UNGUIDED_SETTINGS,
    BestSet,
    PointResult,
    differing,
    in_order,
    metric_value,
    recorded_settings,
    rounded,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORDER = ("scale", "ema", "guide_ema", "checkpoint", "rule", "guide", "negative", "interval", "schedule", "steps", "run")
MAX_PANELS = 4
CELL = (1.0, 0.5)  # inches


def axes_of(points: Sequence[PointResult], chosen: Sequence[str] = ()) -> tuple[str, str] | None:
    """The settings across and down; None where fewer than two vary.

    Args:
        points: The points of a sweep.
        chosen: Two settings; (): the first two of ORDER that vary.

    Raises:
        InputError: A chosen setting does not vary.
    """
    varied = differing(points)
    if wrong := [s for s in chosen if s not in varied]:
        expected = f"the settings that vary here are {', '.join(varied)}" if varied else "nothing varies here"
        raise InputError(
            f"--heat_map: {wrong[0]!r} does not vary; {expected} (of {', '.join(recorded_settings(points))})."
        )
    chosen = tuple(chosen) or tuple([s for s in ORDER if s in varied][:2])
    return chosen if len(chosen) == 2 else None


def cells(
    points: Sequence[PointResult], axes: tuple[str, str], metric: str
) -> tuple[list, list, dict[tuple, list[PointResult]]]:
    """The values across, the values down, and the points of each pair, the best one first.

    A point of scale 1 is in the cells of every value of a setting that has no effect on it.
    """
    points = in_order(points)
    across, down = (_values(points, setting) for setting in axes)
    sign = 1 if METRICS[metric].better == "lower" else -1
    found: dict[tuple, list[PointResult]] = {}
    for point in points:
        if metric_value(point.row, metric)[0] is not None:
            for x in _places(point, axes[0], across):
                for y in _places(point, axes[1], down):
                    found.setdefault((x, y), []).append(point)
    for at in found:
        found[at].sort(key=lambda p: sign * metric_value(p.row, metric)[0])
    return across, down, found


def _values(points: Sequence[PointResult], setting: str) -> list:
    guided = [p for p in points if not _everywhere(p, setting)]
    values = list(dict.fromkeys(value_of(p, setting) for p in guided or points))
    return sorted(values) if all(isinstance(v, (int, float)) for v in values) else values


def _everywhere(point: PointResult, setting: str) -> bool:
    return point.row["scale"] == 1 and setting not in ("scale", *UNGUIDED_SETTINGS)


def _places(point: PointResult, setting: str, values: Sequence) -> list:
    return list(values) if _everywhere(point, setting) else [value_of(point, setting)]


def heat_map(
    points: Sequence[PointResult], axes: tuple[str, str], choices: Mapping[str, BestSet], titles: Mapping[str, str]
) -> Figure:
    """A panel for each metric that has a best set, at most MAX_PANELS.

    Args:
        points: All points. Where others share a pair of values, the best of them is shown.
        axes: The settings across and down.
        choices: `best_sets` of the points.
        titles: Titles of the metrics.
    """
    from matplotlib.figure import Figure

    metrics = list(choices)[:MAX_PANELS]
    across, down, _ = cells(points, axes, metrics[0])
    width, height = max(3.6, CELL[0] * len(across) + 1.8), max(2.2, CELL[1] * len(down) + 1.2)
    figure = Figure(figsize=(width * len(metrics), height), dpi=100, layout="constrained")
    for metric, ax in zip(metrics, figure.subplots(1, len(metrics), squeeze=False).flat):
        _panel(ax, points, axes, metric, choices[metric], titles.get(metric, METRICS[metric].title))
    others = [s for s in differing(points) if s not in axes]
    more = f"; best over {', '.join(NAMES.get(s, s) for s in others)}" if others else ""
    figure.suptitle(f"thick: best; thin: not distinguishable from it{more}", fontsize=9, color="#74787F")
    return figure


def _panel(
    ax: Axes, points: Sequence[PointResult], axes: tuple[str, str], metric: str, choice: BestSet, title: str
) -> None:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    across, down, found = cells(points, axes, metric)
    best = {at: group[0] for at, group in found.items()}
    values = [[metric_value(best[x, y].row, metric)[0] if (x, y) in best else np.nan for x in across] for y in down]
    colours = colormaps["viridis_r" if METRICS[metric].better == "lower" else "viridis"].with_extremes(bad="#DADAD6")
    image = ax.imshow(np.ma.masked_invalid(np.array(values, float)), aspect="auto", cmap=colours)
    for (x, y), point in best.items():
        i, j = across.index(x), down.index(y)
        value, error, _ = metric_value(point.row, metric)
        shade = image.norm(value) if METRICS[metric].better == "higher" else 1 - image.norm(value)
        ax.text(
            i, j, rounded(value, error), ha="center", va="center", fontsize=8, color="black" if shade > 0.6 else "white"
        )
        if members := {p.id for p in found[x, y]} & set(choice.members):
            line = {"edgecolor": "#D55E00", "linewidth": 3 if choice.best in members else 1.2, "fill": False}
            ax.add_patch(Rectangle((i - 0.46, j - 0.46), 0.92, 0.92, **line))
    ax.set_xticks(range(len(across)), [_text(v) for v in across], fontsize=9)
    ax.set_yticks(range(len(down)), [_text(v) for v in down], fontsize=9)
    ax.set_xlabel(NAMES.get(axes[0], axes[0]), fontsize=9)
    ax.set_ylabel(NAMES.get(axes[1], axes[1]), fontsize=9)
    ax.set_title(f"{title} ({METRICS[metric].better} is better)", fontsize=10)


def _text(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)[:24].replace("$", r"\$")
