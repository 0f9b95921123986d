"""The charts of a sweep: metrics over the guidance scale, fidelity against diversity, image statistics, classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..evaluation.metrics import METRICS
from ..render.figures import (
    COLOURS,
    FAINT,
    INK,
    LINE_STYLES,
    MARKERS,
    PAPER,
    WIDTH,
    category_axis,
    chart,
    colour_map,
    new_figure,
)
from ..render.text import one_line, shorten
from .point_results import (
    NAMES,
    PointResult,
    class_count,
    differing,
    format_setting,
    in_order,
    metric_value,
    metrics_with_values,
    unguided_settings,
)
from .selection import BestSet, pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LINES, MAX_SCALES, MAX_SHOWN_CLASSES = 8, 7, 30
PANEL = 2.7  # inches: the height of a panel
LINE_OFFSET = 0.01  # fraction of the x axis between lines: equal values would hide each other
ORDER = [
    "scale",
    "ema",
    "guide_ema",
    "checkpoint",
    "rule",
    "negative",
    "steps",
    "eta",
    "churn",
    "rescale",
    "threshold",
    "interval",
    "schedule",
    "sampler",
    "spacing",
    "guide",
    "run",
]  # of settings, for the x axis
OVER_NOISE = {
    "difference": "Conditional minus unconditional\nRMS, in the prediction's units",
    "clipped": "Clipped values of the predicted image\nfraction",
}
OVER_SCALE = {
    "extremes": "Values at 0 or 255\nfraction",
    "contrast_ratio": "Contrast against the data\nratio",
    "saturation_ratio": "Saturation against the data\nratio",
    "brightness_shift": "Brightness against the data\ndifference",
}
RING = {"linestyle": "none", "marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.8}  # fmt: skip
THIN = RING | {"markersize": 9.5, "markeredgecolor": FAINT, "markeredgewidth": 0.9}
Titles = Mapping[str, str] | None


# ---------------------------------------------------------------------- the charts


@chart
def curves(
    points: Sequence[PointResult], swept: Iterable[str], choices: Mapping[str, BestSet], titles: Titles = None
) -> Figure:
    """One panel per metric that has values, over the guidance scale or another swept setting.

    Args:
        points: The finished points.
        swept: The settings with several values.
        choices: `best_sets` of the points; the best point and its set are marked.
        titles: Titles of metrics, in place of those in METRICS.
    """
    points = in_order(points)
    metrics, x_axis = metrics_with_values(points), XAxis(points, swept)
    lines = lines_of(points, x_axis, [c.best for c in choices.values()])
    figure, axes = _panels(len(metrics))
    for metric, ax in zip(metrics, axes):
        choice = choices.get(metric)
        for i, (name, line) in enumerate(lines):
            values = [(p, *metric_value(p.row, metric)[:2]) for p in line]
            values = [(p, y, e or 0) for p, y, e in values if y is not None]
            x = [x_axis.position(p) + x_axis.offset(i, len(lines)) for p, *_ in values]
            y, error = [y for _, y, _ in values], [e for *_, e in values]
            ax.errorbar(
                x,
                y,
                error,
                color=COLOURS[i],
                marker=MARKERS[i],
                linestyle=x_axis.line_style(i),
                elinewidth=1,
                label=name,
            )
            for p, at, value in zip((p for p, *_ in values), x, y):
                if choice is not None and p.id in choice.members:
                    ax.plot(at, value, zorder=4, **(RING if p.id == choice.best else THIN))
        ax.set_title(f"{_title(metric, titles)}\n{METRICS[metric].better} is better", fontsize=10)
        x_axis.label(ax)
    marks = [("best", RING), ("not distinguishable from it", THIN)] if choices else []
    _legend(figure, axes, marks)
    return figure


@chart
def tradeoff(points: Sequence[PointResult], fidelity: str, diversity: str, titles: Titles = None) -> Figure:
    """One metric against the other, each point labelled by its scale (or another swept setting), with the Pareto front.

    A line joins points that differ only in that setting. The front is a step function: no setting between two of its
    points was measured.
    """
    points = in_order(points)
    front, x_axis = pareto(points, fidelity, diversity), XAxis(points)
    lines = lines_of(points, x_axis, front, join=False)
    xy = {p.id: (metric_value(p.row, diversity)[0], metric_value(p.row, fidelity)[0]) for p in points}
    xy = {i: values for i, values in xy.items() if None not in values}
    figure = new_figure(6.2)
    ax = figure.subplots()
    shown = [p for _, line in lines for p in line if p.id in xy]
    steps = sorted({xy[p.id] for p in shown if p.id in front})
    if len(steps) > 1:  # the step extends from a point towards worse diversity
        corner = "steps-pre" if METRICS[diversity].better == "higher" else "steps-post"
        label = "Pareto front: no point is better in both"
        ax.plot(*zip(*steps), color=INK, linewidth=1.8, linestyle="--", drawstyle=corner, zorder=4, label=label)
    for (name, line), colour, marker in zip(lines, COLOURS, MARKERS):
        drawn = [p for p in line if p.id in xy]
        x, y = zip(*(xy[p.id] for p in drawn)) if drawn else ((), ())
        x_error, y_error = ([metric_value(p.row, m)[1] or 0 for p in drawn] for m in (diversity, fidelity))
        bars = {"ecolor": (colour, 0.4), "elinewidth": 0.9, "capsize": 0}
        style = {"color": colour, "marker": marker, "markersize": 7, "linewidth": 1.2, "zorder": 3, **bars}
        ax.errorbar(x, y, y_error, x_error, linestyle="-" if x_axis.numeric else "none", label=name, **style)
    ax.margins(0.08)
    ax.set_xlabel(f"{_title(diversity, titles)} ({METRICS[diversity].better} is better)")
    ax.set_ylabel(f"{_title(fidelity, titles)} ({METRICS[fidelity].better} is better)")
    ax.set_title(f"labels: {x_axis.name}; bars: one standard error", fontsize=10, color=FAINT)
    _legend(figure, [ax])
    _label_points(ax, list(dict.fromkeys((xy[p.id], x_axis.text(p)) for p in shown)))
    return figure


@chart
def diagnostics(points: Sequence[PointResult]) -> Figure:
    """The guidance term over the noise level for several scales, and contrast, saturation and brightness relative to the data."""
    points = in_order(points)
    x_axis = XAxis(points)
    lines = lines_of(points, x_axis)
    settings, group = max(lines, key=lambda line: len(line[1]))
    group = _evenly_spaced(group, MAX_SCALES)
    earlier = any(_statistics(p).get("sigmas") is None for p in group)  # points of an earlier version
    place, where = ("timesteps", "timestep t") if earlier else ("sigmas", "noise level sigma")
    over_noise = [(key, t) for key, t in OVER_NOISE.items() if any(_by_noise(p, key, place) for p in group)]
    over_scale = [(key, t) for key, t in OVER_SCALE.items() if any(_statistics(p).get(key) is not None for p in points)]
    of_data = {"extremes": _data_extremes(points), "contrast_ratio": 1, "saturation_ratio": 1, "brightness_shift": 0}
    figure, axes = _panels(len(over_noise) + len(over_scale))
    for (key, title), ax in zip(over_noise, axes):
        for i, p in enumerate(group):
            name = f"{x_axis.name} {x_axis.text(p)}" + (f" ({settings})" if settings else "")
            values = _by_noise(p, key, place) or [(np.nan, np.nan)]
            shade = colour_map("viridis")(0.88 * i / max(len(group) - 1, 1))
            ax.plot(*zip(*values), color=shade, marker="." if len(values) < 60 else None, label=name)
        ax.set(xscale="linear" if earlier else "log", xlabel=f"{where} (sampling runs to the left)")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_title(title, fontsize=10)
    for (key, title), ax in zip(over_scale, axes[len(over_noise) :]):
        for i, (name, line) in enumerate(lines):
            values = [(x_axis.position(p) + x_axis.offset(i, len(lines)), _statistics(p).get(key)) for p in line]
            values = [xy for xy in values if xy[1] is not None] or [(np.nan, np.nan)]
            ax.plot(*zip(*values), color=COLOURS[i], marker=MARKERS[i], linestyle=x_axis.line_style(i), label=name)
        if of_data[key] is not None:
            ax.axhline(of_data[key], color=INK, linewidth=1, linestyle=(0, (1, 2)), zorder=1, label="the data")
        ax.set_title(title, fontsize=10)
        x_axis.label(ax)
    _legend(figure, axes)
    return figure


@chart
def per_class(points: Sequence[PointResult], metric: str, class_names: Sequence[str], titles: Titles = None) -> Figure:
    """A heat map of class by point, of the first MAX_SHOWN_CLASSES classes. A dot marks each class's best point; grey: no value."""
    points = in_order(points)
    total = class_count(points, metric)
    count = min(total, MAX_SHOWN_CLASSES)
    values = np.array([[metric_value(p.row, metric, c)[0] for p in points] for c in range(count)], dtype=float)
    names = [class_names[c] if c < len(class_names) else f"class {c}" for c in range(count)]
    settings = differing(points) or ["scale"]
    columns = [shorten(", ".join(format_value(s, p.row.get(s)) for s in settings), 34) for p in points]
    upright = max(map(len, columns)) * len(columns) > 90
    figure = new_figure(1.4 + 0.085 * max(map(len, columns)) * upright + max(0.28 * count, 1.2))
    ax = figure.subplots()
    better = METRICS[metric].better
    image = ax.imshow(
        np.ma.masked_invalid(values), aspect="auto", cmap=colour_map("viridis_r" if better == "lower" else "viridis")
    )
    for c in range(count):
        if np.isfinite(values[c]).any():
            best = int((np.nanargmin if better == "lower" else np.nanargmax)(values[c]))
            ax.plot(best, c, marker="o", markersize=6, color="white", markeredgecolor=INK)
    category_axis(ax.xaxis, columns, 34, rotation=90 if upright else 0)
    category_axis(ax.yaxis, names, 28)
    ax.grid(False)
    ax.set_xlabel(", ".join(settings))
    subset = f"; the first {count} of {total:,} classes" if count < total else ""
    ax.set_title(f"{_title(metric, titles)} by class; dot: the best of a class{subset}")
    figure.colorbar(image, ax=ax, pad=0.01, label=f"{better} is better")
    return figure


def _title(metric: str, titles: Titles) -> str:
    return shorten((titles or {}).get(metric, METRICS[metric].title), 60)


def _statistics(point: PointResult) -> Mapping:
    return point.row.get("diagnostics", {})


def _data_extremes(points: Sequence[PointResult]) -> float | None:
    """The fraction of the data's values at 0 or 255; None if no point has it."""
    both = [(_statistics(p).get("extremes"), _statistics(p).get("extremes_shift")) for p in points]
    return next((fraction - shift for fraction, shift in both if None not in (fraction, shift)), None)


def _by_noise(point: PointResult, key: str, place: str) -> list[tuple[float, float]]:
    """(noise level or timestep, value) of the network evaluations that have both. place: "sigmas" or "timesteps"."""
    values = _statistics(point)
    pairs = zip(values.get(place) or (), values.get(key) or ())
    return [(x, v) for x, v in pairs if v is not None and x is not None]


def _evenly_spaced(points: Sequence[PointResult], max_count: int) -> list[PointResult]:
    """At most max_count of the points, from the first to the last."""
    if len(points) <= max_count:
        return list(points)
    return [points[round(i * (len(points) - 1) / (max_count - 1))] for i in range(max_count)]


# ---------------------------------------------------------------------- axes, lines and legends


class XAxis:
    """The setting on the x axis: the scale if it was swept, else the first swept setting. Values are numbers or categories."""

    def __init__(self, points: Sequence[PointResult], swept: Iterable[str] | None = None):
        several = differing(points)
        candidates = [s for s in ORDER if s in several and (swept is None or s in swept)]
        self.setting = (candidates or [s for s in ORDER if s in several] or ["scale"])[0]
        self.name = {"scale": "guidance scale", **NAMES}.get(self.setting, self.setting)
        self.values = list(dict.fromkeys(p.row.get(self.setting) for p in points))
        self.numeric = all(isinstance(v, (int, float)) for v in self.values)
        self.span = max(self.values) - min(self.values) if self.numeric else len(self.values)

    def line_style(self, line: int) -> str:
        """The line style; categories are not joined by a line."""
        return LINE_STYLES[line % len(LINE_STYLES)] if self.numeric else "none"

    def offset(self, line: int, count: int) -> float:
        """The shift of line `line` of `count` along the axis."""
        return (line - (count - 1) / 2) * LINE_OFFSET * self.span * (1 if self.numeric else 4)

    def position(self, point: PointResult) -> float:
        value = point.row.get(self.setting)
        return float(value) if self.numeric else float(self.values.index(value))

    def text(self, point: PointResult) -> str:
        return format_value(self.setting, point.row.get(self.setting))

    def label(self, ax: Axes) -> None:
        ax.set_xlabel(self.name)
        if not self.numeric:
            long = sum(len(self.text_of(v)) for v in self.values) > 36
            category_axis(
                ax.xaxis,
                [self.text_of(v) for v in self.values],
                18,
                rotation=30 * long,
                ha="right" if long else "center",
            )
            ax.set_xlim(-0.5, len(self.values) - 0.5)
        elif len(self.values) == 1:
            ax.set_xticks(self.values, [f"{v:g}" for v in self.values])

    def text_of(self, value: object) -> str:
        return format_value(self.setting, value)


def format_value(setting: str, value: object) -> str:
    """A setting's value as short text."""
    if isinstance(value, (int, float)):
        return f"{value:g} steps" if setting == "steps" else f"{value:g}"
    if value in (None, "none"):
        return {"interval": "all t", "guide": "null"}.get(setting, "none")
    return one_line(str(value))


def lines_of(
    points: Sequence[PointResult], x_axis: XAxis, required: Iterable[str] = (), join: bool = True
) -> list[tuple[str, list[PointResult]]]:
    """Groups of points that differ only in the setting of the x axis, each with its name; at most MAX_LINES.

    Args:
        points: All points.
        x_axis: The axis.
        required: Ids of points whose lines are selected first.
        join: Add scale 1 to every line that starts from it.
    """
    others = [s for s in differing(points) if s != x_axis.setting]
    lines: dict[tuple, list[PointResult]] = {}
    for p in points:
        lines.setdefault(tuple(str(p.row.get(s)) for s in others), []).append(p)
    if join and x_axis.setting == "scale":
        lines = _with_unguided(lines)
    required = set(required)
    first = sorted(lines, key=lambda k: not required & {p.id for p in lines[k]})[:MAX_LINES]
    return [
        (", ".join(format_setting(s, line[0].row.get(s)) for s in others), sorted(line, key=x_axis.position))
        for k, line in lines.items()
        if k in first
    ]


def _with_unguided(lines: dict[tuple, list[PointResult]]) -> dict[tuple, list[PointResult]]:
    """Scale 1 is one point for all intervals: add it to every line with its `unguided_settings`."""
    alone = lambda line: all(p.row.get("scale") == 1 for p in line)  # noqa: E731
    unguided = {unguided_settings(p.row): p for line in lines.values() for p in line if p.row.get("scale") == 1}
    guided = {k: line for k, line in lines.items() if not alone(line)}
    used = {unguided_settings(line[0].row) for line in guided.values()}
    joined = {}
    for k, line in guided.items():
        one = unguided.get(unguided_settings(line[0].row))
        joined[k] = line if one is None or any(p.row.get("scale") == 1 for p in line) else [*line, one]
    rest = {k: line for k, line in lines.items() if alone(line) and unguided_settings(line[0].row) not in used}
    return {**joined, **rest}


def hidden_points(points: Sequence[PointResult], required: Iterable[str] = ()) -> int:
    """How many points the curves leave out, since they have at most MAX_LINES lines."""
    points = in_order(points)
    return len(points) - len({p.id for _, line in lines_of(points, XAxis(points), required) for p in line})


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, three per row."""
    rows, across = -(-count // 3), min(count, 3)
    figure = new_figure(PANEL * rows + 0.5)
    axes = list(figure.subplots(rows, across, squeeze=False).flat)
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes[:count]


def _legend(figure: Figure, axes: Sequence[Axes], marks: Sequence[tuple[str, dict]] = ()) -> None:
    """One legend below all panels; a name that is in several panels is in it once. marks: names and styles of rings."""
    from matplotlib.lines import Line2D

    handles = {shorten(n, 60): handle for ax in axes for handle, n in zip(*ax.get_legend_handles_labels())}
    handles |= {name: Line2D([], [], **style) for name, style in marks}
    longest = max(map(len, handles), default=1)
    across = max(1, min(len(handles), int(WIDTH * 13 / (longest + 7))))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=across)
    rows = -(-len(handles) // across)
    figure.set_figheight(figure.get_figheight() + 0.21 * rows)


def _label_points(ax: Axes, labels: Sequence[tuple[tuple[float, float], str]]) -> None:
    """Write each label where it covers least of what is drawn, near its point; with a line to it if that is far."""
    from matplotlib.patheffects import withStroke

    figure = ax.figure
    figure.draw_without_rendering()  # positions are known only after the layout
    unit = figure.dpi / 72
    taken = _drawn_pixels(ax)
    low, high = ax.transAxes.transform([(0, 0), (1, 1)])
    for xy, text in labels:
        half = np.array([3.2 * len(text) + 2, 6.5]) * unit
        at = ax.transData.transform(xy)
        centres = []
        for radius in (9, 16, 25, 36, 50):
            for angle in np.radians([45, -45, 135, -135, 90, -90, 0, 180, 20, -20, 160, -160]):
                direction = np.array([np.cos(angle), np.sin(angle)])
                centres.append((at + direction * (radius * unit + half * np.abs(direction)), radius))
        inside = [(c, r) for c, r in centres if (c - half >= low).all() and (c + half <= high).all()] or centres
        covered = [(np.abs(taken - c) < half + 1.5 * unit).all(1).sum() for c, _ in inside]
        centre, radius = inside[int(np.argmin(covered))]
        arrow = (
            {"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4} if radius > 16 else None
        )
        offset = (centre - at) / unit
        note = ax.annotate(
            text, xy, offset, textcoords="offset points", ha="center", va="center", fontsize=9, arrowprops=arrow
        )
        note.set_path_effects([withStroke(linewidth=2.5, foreground=PAPER)])
        across, up = (np.linspace(centre[i] - half[i], centre[i] + half[i], 9) for i in (0, 1))
        taken = np.concatenate([taken, np.stack(np.meshgrid(across, up), -1).reshape(-1, 2)])


def _drawn_pixels(ax: Axes) -> np.ndarray:
    """Pixels on all lines and error bars, [N, 2], about 3 pixels apart."""
    paths = [line.get_transform().transform_path(line.get_path()) for line in ax.lines]
    for bars in ax.collections:
        paths += [bars.get_transform().transform_path(path) for path in bars.get_paths()]
    found = []
    for path in paths:
        for polygon in path.interpolated(1).to_polygons(closed_only=False):
            for a, b in zip(polygon, polygon[1:] if len(polygon) > 1 else polygon):
                count = max(2, int(np.hypot(*(b - a)) / 3))
                found.append(np.linspace(a, b, count))
    return np.concatenate(found) if found else np.empty((0, 2))
