"""A heat map of two settings of a sweep: the best value at each pair, with the best set outlined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..evaluation.metrics import METRICS
from ..render.figures import COLOURS, FAINT, category_axis, chart, colour_map, ink_on, new_figure, without_frame
from .comparison import value_of
from .point_results import (
    NAMES,
    UNGUIDED_SETTINGS,
    PointResult,
    differing,
    in_order,
    metric_value,
    recorded_settings,
    rounded,
)
from .selection import BestSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORDER = ("scale", "ema", "guide_ema", "checkpoint", "rule", "guide", "negative", "interval", "schedule", "steps", "run")
MAX_PANELS = 4
CELL = 0.42  # inches: the height of a cell


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


@chart
def heat_map(
    points: Sequence[PointResult], axes: tuple[str, str], choices: Mapping[str, BestSet], titles: Mapping[str, str]
) -> Figure:
    """A panel for each metric that has a best set, at most MAX_PANELS, two in a row.

    Args:
        points: All points. Where others share a pair of values, the best of them is shown.
        axes: The settings across and down.
        choices: `best_sets` of the points.
        titles: Titles of the metrics.
    """
    metrics = list(choices)[:MAX_PANELS]
    _, down, _ = cells(points, axes, metrics[0])
    columns, rows = min(2, len(metrics)), -(-len(metrics) // 2)
    figure = new_figure(max(2.0, CELL * len(down) + 1.3) * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax in grid.flat[len(metrics) :]:
        ax.set_visible(False)
    for metric, ax in zip(metrics, grid.flat):
        _panel(ax, points, axes, metric, choices[metric], titles.get(metric, METRICS[metric].title))
    others = [s for s in differing(points) if s not in axes]
    more = f"; best over {', '.join(NAMES.get(s, s) for s in others)}" if others else ""
    figure.suptitle(f"thick frame: best; thin: not distinguishable from it{more}", fontsize=10, color=FAINT)
    return figure


def _panel(
    ax: Axes, points: Sequence[PointResult], axes: tuple[str, str], metric: str, choice: BestSet, title: str
) -> None:
    from matplotlib.patches import Rectangle

    across, down, found = cells(points, axes, metric)
    best = {at: group[0] for at, group in found.items()}
    values = [[metric_value(best[x, y].row, metric)[0] if (x, y) in best else np.nan for x in across] for y in down]
    better = METRICS[metric].better
    shade = colour_map("viridis_r" if better == "lower" else "viridis")
    image = ax.imshow(np.ma.masked_invalid(np.array(values, float)), aspect="auto", cmap=shade)
    for (x, y), point in best.items():
        i, j = across.index(x), down.index(y)
        value, error, _ = metric_value(point.row, metric)
        colour = ink_on(shade(image.norm(value)))
        ax.text(i, j, rounded(value, error), ha="center", va="center", fontsize=8.5, color=colour)
        if members := {p.id for p in found[x, y]} & set(choice.members):
            line = {"edgecolor": COLOURS[1], "linewidth": 3 if choice.best in members else 1.2, "fill": False}
            ax.add_patch(Rectangle((i - 0.46, j - 0.46), 0.92, 0.92, **line))
    category_axis(ax.xaxis, [_text(v) for v in across], 24)
    category_axis(ax.yaxis, [_text(v) for v in down], 24)
    without_frame(ax)
    ax.set(
        xlabel=NAMES.get(axes[0], axes[0]), ylabel=NAMES.get(axes[1], axes[1]), title=f"{title} ({better} is better)"
    )


def _text(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, (int, float)) else str(value)
