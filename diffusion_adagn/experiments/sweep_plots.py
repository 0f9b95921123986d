"""The figures of a sweep: metrics over the guidance scale, fidelity against diversity, image statistics, classes.

curves(points, swept, choices).savefig("curves.png"). Needs matplotlib (`available`); does not change its global state.
"""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..evaluation.metrics import METRICS
from ..render.text import listed, one_line
from .selection import (
    NAMES,
    BestSet,
    PointResult,
    class_count,
    differing,
    format_count,
    format_setting,
    in_order,
    metric_value,
    metrics_with_values,
    pareto,
    unguided_settings,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = "pip install 'diffusion-adagn[plots]'"
MISSING = f"plots need matplotlib: {INSTALL}"
WIDTH, DPI = 12.8, 100  # inches: 1280 px
PANEL, LINE = 3.0, 0.24  # inches: the height of a panel, and of a line of text
MAX_LINES, MAX_SCALES, MAX_SHOWN_CLASSES = 8, 7, 30
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#4D4D4D",
    "#B8A200",
)  # Okabe & Ito, nearly
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINE_STYLES = ("-", "--", "-.", ":")
LINE_OFFSET = 0.01  # fraction of the x axis between lines: equal values would hide each other
INK, FAINT, BLANK = "#202226", "#74787F", "#DADAD6"


def available() -> bool:
    """Whether matplotlib can be imported."""
    return importlib.util.find_spec("matplotlib") is not None


# ---------------------------------------------------------------------- the figures


def curves(
    points: Sequence[PointResult],
    swept: Iterable[str],
    choices: Mapping[str, BestSet],
    titles: Mapping[str, str] | None = None,
) -> Figure:
    """One panel per metric that has values, over the guidance scale or another swept setting. The notes say why others have none.

    Args:
        points: The finished points.
        swept: The settings with several values.
        choices: `best_sets` of the points; the best point and its set are marked.
        titles: Titles of metrics, in place of those in METRICS.
    """
    points, title = in_order(points), {m: METRICS[m].title for m in METRICS} | dict(titles or {})
    metrics = metrics_with_values(points)
    x_axis = XAxis(points, swept)
    lines = _lines(points, x_axis, [c.best for c in choices.values()])
    notes = _missing_notes(points, metrics, title) + _hidden_note(lines, points)
    entries = _legend_entries(lines, x_axis)
    marks = [("best", "ring"), ("not distinguishable from it", "thin")] if choices else []
    hint = "bars: one standard error" + ("; lines are slightly offset" if len(lines) > 1 else "")
    figure, axes = _panels(len(metrics), notes, [*entries, *marks] if metrics else [], hint if metrics else "")
    for metric, ax in zip(metrics, axes):
        for i, (_, line) in enumerate(lines):
            offset = x_axis.offset(i, len(lines))
            values = [(x_axis.position(p) + offset, *metric_value(p.row, metric)[:2]) for p in line]
            values = [(x, y, e or 0) for x, y, e in values if y is not None]
            if values:
                ax.errorbar(*zip(*[(x, y) for x, y, _ in values]), yerr=[e for _, _, e in values], color=COLOURS[i], marker=MARKERS[i],
                            linestyle=x_axis.line_style(i), markersize=5, linewidth=1.4, capsize=2.5, elinewidth=1)  # fmt: skip
            for p in line:
                _mark(ax, choices.get(metric), p.id, x_axis.position(p) + offset, metric_value(p.row, metric)[0])
        ax.set_title(title[metric], fontsize=11, color=INK)
        ax.set_ylabel(f"{METRICS[metric].better} is better", fontsize=9, color=FAINT)
        x_axis.label(ax)
    return figure


def tradeoff(
    points: Sequence[PointResult], fidelity: str, diversity: str, titles: Mapping[str, str] | None = None
) -> Figure:
    """One metric against the other, each point labelled by its scale (or another swept setting), with the Pareto front.

    A thin line joins points that differ only in that setting. The front is a step function: no setting between two of its
    points was measured.
    """
    points, title = in_order(points), {m: METRICS[m].title for m in METRICS} | dict(titles or {})
    front, x_axis = pareto(points, fidelity, diversity), XAxis(points)
    lines = _lines(points, x_axis, front, join=False)
    xy = {p.id: (metric_value(p.row, diversity)[0], metric_value(p.row, fidelity)[0]) for p in points}
    xy = {i: values for i, values in xy.items() if None not in values}
    entries = [(name, c, m, "none") for (name, _), c, m in zip(lines, COLOURS, MARKERS)]
    shown = {p.id for _, line in lines for p in line}
    steps = sorted({xy[i] for i in front if i in shown})
    if len(steps) > 1:
        entries.append(("Pareto front: no point is better in both", "line"))
    hint = f"labels: {x_axis.name}; bars: one standard error"
    figure, (ax,) = _panels(1, _hidden_note(lines, points), entries, hint, 1.9)
    # the step extends from a point towards worse diversity
    corner = "steps-pre" if METRICS[diversity].better == "higher" else "steps-post"
    ax.plot(*zip(*steps) if steps else ([], []), color=INK, linewidth=1.2, linestyle="--", drawstyle=corner, zorder=1)
    for (_, line), colour, marker in zip(lines, COLOURS, MARKERS):
        drawn = [p for p in line if p.id in xy]
        x, y = zip(*(xy[p.id] for p in drawn)) if drawn else ((), ())
        bars = ([metric_value(p.row, m)[1] or 0 for p in drawn] for m in (diversity, fidelity))
        style = {"color": colour, "marker": marker, "markersize": 7, "linewidth": 0.7, "zorder": 2}
        ax.errorbar(x, y, *reversed(list(bars)), elinewidth=0.6, linestyle="-" if x_axis.numeric else "none", **style)
    ax.margins(0.08)
    ax.set_xlabel(f"{title[diversity]} ({METRICS[diversity].better} is better)", fontsize=10)
    ax.set_ylabel(f"{title[fidelity]} ({METRICS[fidelity].better} is better)", fontsize=10)
    ax.set_title(f"{title[fidelity]} against {title[diversity]}", fontsize=11, color=INK)
    _label_points(ax, list(dict.fromkeys((xy[p.id], x_axis.text(p)) for p in points if p.id in xy and p.id in shown)))
    return figure


def diagnostics(points: Sequence[PointResult]) -> Figure:
    """The guidance term over the noise level for several scales, and contrast, saturation and brightness relative to the data."""
    points = in_order(points)
    x_axis = XAxis(points)
    lines = _lines(points, x_axis)
    settings, group = max(lines, key=lambda line: len(line[1]))
    group = _evenly_spaced(group, MAX_SCALES)
    shades = _shades(len(group))
    notes = [f"Over the noise: {settings}."] if len(lines) > 1 else []
    keys = [(f"{x_axis.name} {x_axis.text(p)}", shade, "") for p, shade in zip(group, shades)]
    keys += _legend_entries(lines, x_axis) if len(lines) > 1 else []
    place, label = "sigmas", "noise level sigma (sampling runs to the left)"
    if any(_diagnostics(p).get(place) is None for p in group):  # points of an earlier version
        place, label = "timesteps", "timestep t (sampling runs to the left)"
    over_t = (
        ("difference", "Conditional minus unconditional", "RMS, in the prediction's units"),
        ("clipped", "Clipped values of the predicted image", "fraction"),
    )
    over_scale = (
        ("extremes", "Values at 0 or 255", "fraction", _data_extremes(points)),
        ("contrast_ratio", "Contrast against the data", "ratio", 1),
        ("saturation_ratio", "Saturation against the data", "ratio", 1),
        ("brightness_shift", "Brightness against the data", "difference", 0),
    )
    present = {key for key, *_ in over_scale if any(_diagnostics(p).get(key) is not None for p in points)}
    over_t = [panel for panel in over_t if any(_by_noise(p, panel[0], place) for p in group)]
    over_scale = [panel for panel in over_scale if panel[0] in present]
    figure, axes = _panels(len(over_t) + len(over_scale), notes + _hidden_note(lines, points), keys)
    for (key, title, unit), ax in zip(over_t, axes):
        for p, shade in zip(group, shades):
            values = _by_noise(p, key, place)
            if values:
                ax.plot(*zip(*values), color=shade, marker="." if len(values) < 60 else None, linewidth=1.4)
        _label_panel(ax, title, unit)
        ax.set_xscale("log" if place == "sigmas" else "linear")
        ax.set_xlabel(label, fontsize=9)
    for (key, title, unit, data), ax in zip(over_scale, axes[len(over_t) :]):
        for i, (_, line) in enumerate(lines):
            values = [(x_axis.position(p) + x_axis.offset(i, len(lines)), _diagnostics(p).get(key)) for p in line]
            values = [xy for xy in values if xy[1] is not None]
            if values:
                ax.plot(*zip(*values), color=COLOURS[i], marker=MARKERS[i], markersize=5, linewidth=1.4, linestyle=x_axis.line_style(i))  # fmt: skip
        if data is not None:
            ax.axhline(data, color=INK, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        _label_panel(ax, title, unit if data is None else f"{unit} (dotted: the data)")
        x_axis.label(ax)
    return figure


def _diagnostics(point: PointResult) -> Mapping:
    return point.row.get("diagnostics", {})


def _data_extremes(points: Sequence[PointResult]) -> float | None:
    """The fraction of the data's values at 0 or 255; None if no point has it."""
    both = [(_diagnostics(p).get("extremes"), _diagnostics(p).get("extremes_shift")) for p in points]
    return next((fraction - shift for fraction, shift in both if None not in (fraction, shift)), None)


def per_class(
    points: Sequence[PointResult], metric: str, class_names: Sequence[str], titles: Mapping[str, str] | None = None
) -> Figure:
    """A heat map of class by point, of the first MAX_SHOWN_CLASSES classes. A dot marks each class's best point; grey: no value."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    points = in_order(points)
    total = class_count(points, metric)
    count = min(total, MAX_SHOWN_CLASSES)
    values = np.array([[metric_value(p.row, metric, c)[0] for p in points] for c in range(count)], dtype=float)
    names = [_shortened(class_names[c] if c < len(class_names) else f"class {c}", 28) for c in range(count)]
    settings = differing(points)
    columns = [_shortened(", ".join(_format_value(s, p.row.get(s)) for s in settings or ["scale"]), 34) for p in points]
    upright = max(map(len, columns)) * len(columns) > 90
    below = 0.6 + (0.085 * max(map(len, columns)) if upright else 0.15)
    figure = Figure(figsize=(WIDTH, 0.7 + below + max(0.28 * count, 1.2)), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    colours = colormaps["viridis_r" if METRICS[metric].better == "lower" else "viridis"].with_extremes(bad=BLANK)
    image = ax.imshow(np.ma.masked_invalid(values), aspect="auto", cmap=colours, interpolation="nearest")
    for c in range(count):
        best = _best_column(values[c], metric)
        if best is not None:
            ax.plot(best, c, marker="o", markersize=6, color="white", markeredgecolor=INK)
    ax.set_xticks(range(len(points)), columns, fontsize=9, rotation=90 if upright else 0)
    ax.set_yticks(range(count), names, fontsize=9)
    ax.set_xlabel(", ".join(settings or ["scale"]), fontsize=10)
    title = (titles or {}).get(metric, METRICS[metric].title)
    subset = f"; the first {count} of {total:,} classes" if count < total else ""
    ax.set_title(f"{title} by class; the dot: the best of a class{subset}", fontsize=11, color=INK)
    figure.colorbar(image, ax=ax, pad=0.01, label=f"{METRICS[metric].better} is better")
    return figure


# ---------------------------------------------------------------------- axes, lines and legends


class XAxis:
    """The setting on the x axis: the scale if it was swept, else the first swept setting. Values are numbers or categories."""

    ORDER = (
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
    )

    def __init__(self, points: Sequence[PointResult], swept: Iterable[str] | None = None):
        several = differing(points)
        candidates = [s for s in self.ORDER if s in several and (swept is None or s in swept)]
        self.setting = (candidates or [s for s in self.ORDER if s in several] or ["scale"])[0]
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
        return _format_value(self.setting, point.row.get(self.setting))

    def label(self, ax: Axes) -> None:
        ax.set_xlabel(self.name, fontsize=9)
        if not self.numeric:
            ax.set_xticks(
                range(len(self.values)), [_shortened(_format_value(self.setting, v), 12) for v in self.values]
            )
            ax.set_xlim(-0.5, len(self.values) - 0.5)
        elif len(self.values) == 1:
            ax.set_xticks(self.values, [f"{v:g}" for v in self.values])
        _style_axes(ax)


def _legend_entries(lines: Sequence[tuple[str, list[PointResult]]], x_axis: XAxis) -> list[tuple[str, str, str, str]]:
    """For the legend: name, colour, marker and line style of each line."""
    return [(name, COLOURS[i], MARKERS[i], x_axis.line_style(i)) for i, (name, _) in enumerate(lines)]


def _lines(
    points: Sequence[PointResult], x_axis: XAxis, required: Iterable[str] = (), join: bool = True
) -> list[tuple[str, list[PointResult]]]:
    """Groups of points that differ only in the setting of the x axis, each with its name; at most MAX_LINES.

    required: ids of points whose lines are selected first. join: add scale 1 to every line that starts from it.
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
    unguided = {unguided_settings(p.row): p for line in lines.values() for p in line if p.row.get("scale") == 1}
    guided = {k: line for k, line in lines.items() if any(p.row.get("scale") != 1 for p in line)}
    guided_settings = {unguided_settings(line[0].row) for line in guided.values()}
    alone = {
        k: line
        for k, line in lines.items()
        if k not in guided and unguided_settings(line[0].row) not in guided_settings
    }
    joined = {
        k: line
        if any(p.row.get("scale") == 1 for p in line)
        else [*line, *filter(None, [unguided.get(unguided_settings(line[0].row))])]
        for k, line in guided.items()
    }
    return {**joined, **alone}


def _hidden_note(lines: Sequence[tuple[str, list[PointResult]]], points: Sequence[PointResult]) -> list[str]:
    count = len(points) - len({p.id for _, line in lines for p in line})
    return (
        [
            f"{count} of the {format_count(len(points), 'point')} {'is' if count == 1 else 'are'} not shown here (at most {MAX_LINES} lines); sweep.csv has all."
        ]
        if count
        else []
    )


def _missing_notes(points: Sequence[PointResult], metrics: Sequence[str], title: Mapping[str, str]) -> list[str]:
    """Why the other metrics have no value, grouped by reason."""
    metrics_by_reason: dict[str, list[str]] = {}
    for m in METRICS:
        if m not in metrics:
            reason = next((r for p in points if (r := metric_value(p.row, m)[2])), "not measured")
            metrics_by_reason.setdefault(reason, []).append(title[m])
    return [f"No value: {listed(names, 8)}: {reason}" for reason, names in metrics_by_reason.items()]


def _panels(
    count: int,
    notes: Sequence[str],
    keys: Sequence[tuple[str, ...]],
    hint: str = "",
    taller: float = 1,
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, three per row, with the legend, a hint and the notes below. keys: name, colour, marker, line style."""
    from matplotlib.figure import Figure

    keys = [k for k in keys if k[0]]
    longest = max((len(_shortened(k[0], 60)) for k in keys), default=0)
    across = max(1, min(len(keys), int(WIDTH * DPI / (7.2 * longest + 52))))
    lines = [*([hint] if hint else []), *(line for n in notes for line in textwrap.wrap(one_line(n), 190)[:3])]
    rows, across_panels = -(-count // 3), min(count, 3)
    legend = LINE * -(-len(keys) // across) + 0.12 if keys else 0
    below = legend + LINE * len(lines) + 0.15
    figure = Figure(figsize=(WIDTH, PANEL * taller * rows + below), dpi=DPI, layout="constrained")
    if not count:
        foot, axes = figure, []
    else:
        head, foot = figure.subfigures(2, 1, height_ratios=[PANEL * taller * rows, below])
        axes = list(head.subplots(rows, across_panels, squeeze=False).flat)
    for ax in axes[count:]:
        ax.set_visible(False)
    for ax in axes[:count]:
        _style_axes(ax)
    if keys:
        foot.legend(
            handles=[_handle(*k) for k in keys],
            loc="upper center",
            ncols=across,
            fontsize=9,
            frameon=False,
            borderpad=0.1,
        )
    for i, line in enumerate(lines):
        foot.text(0.02, 1 - (legend + LINE * (i + 0.5)) / below, line, fontsize=9, color=FAINT, va="center")
    return figure, axes[:count]


def _handle(name: str, colour: str, marker: str = "", line_style: str = "-"):
    from matplotlib.lines import Line2D

    name = _shortened(name, 60)
    if colour == "line":
        return Line2D([], [], color=INK, linestyle="--", linewidth=1.2, label=name)
    if colour in RING_STYLES:
        return Line2D([], [], linestyle="none", marker="o", label=name, **RING_STYLES[colour])
    return Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1.6, linestyle=line_style, label=name)


RING_STYLES = {
    "ring": {"markersize": 12, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.8},
    "thin": {"markersize": 9.5, "markerfacecolor": "none", "markeredgecolor": FAINT, "markeredgewidth": 0.9},
}


def _mark(ax: Axes, choice: BestSet | None, point: str, x: float, y: float | None) -> None:
    """Draw a ring around the best point, and a thin one around points that are not distinguishable from it."""
    if choice is not None and y is not None and point in choice.members:
        ax.plot(x, y, linestyle="none", marker="o", zorder=4, **RING_STYLES["ring" if point == choice.best else "thin"])


def _label_panel(ax: Axes, title: str, y: str) -> None:
    ax.set_title(title, fontsize=11, color=INK)
    ax.set_ylabel(y, fontsize=9)


def _style_axes(ax: Axes) -> None:
    ax.tick_params(labelsize=9)
    ax.grid(color="#ECECE8", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _by_noise(point: PointResult, key: str, place: str) -> list[tuple[float, float]]:
    """(noise level or timestep, value) of the network evaluations that have both. place: "sigmas" or "timesteps"."""
    values = _diagnostics(point)
    pairs = zip(values.get(place) or (), values.get(key) or ())
    return [(x, v) for x, v in pairs if v is not None and x is not None]


def _evenly_spaced(points: Sequence[PointResult], max_count: int) -> list[PointResult]:
    """At most max_count of the points, from the first to the last."""
    if len(points) <= max_count:
        return list(points)
    return [points[round(i * (len(points) - 1) / (max_count - 1))] for i in range(max_count)]


def _shades(count: int) -> list[str]:
    """Colours from dark to light, distinguishable by lightness alone."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.88 * i / max(count - 1, 1))) for i in range(count)]


def _best_column(values: Sequence[float], metric: str) -> int | None:
    finite = [(v if METRICS[metric].better == "lower" else -v, i) for i, v in enumerate(values) if v == v]
    return min(finite)[1] if finite else None


def _format_value(setting: str, value: object) -> str:
    """A setting's value as short text."""
    if isinstance(value, (int, float)):
        return f"{value:g} steps" if setting == "steps" else f"{value:g}"
    if value in (None, "none"):
        return {"interval": "all t", "guide": "null"}.get(setting, "none")
    return one_line(str(value))


def _shortened(text: str, max_length: int) -> str:
    text = one_line(text).replace("$", r"\$")  # matplotlib typesets text between two $ as mathematics
    return text if len(text) <= max_length else text[: max_length - 1].rstrip() + "…"


def _label_points(ax: Axes, labels: Sequence[tuple[tuple[float, float], str]]) -> None:
    """Write each label at the nearest free position beside its point, with a line to the point if that is far."""
    import math

    ax.figure.figure.draw_without_rendering()  # positions are known only after the layout
    pixels = ax.transData.transform([xy for xy, _ in labels]) if labels else []
    occupied = [(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
    frame = ax.get_window_extent()
    for ((x, y), text), (px, py) in zip(labels, pixels):
        width, height = 6.5 * len(text) / 2 + 2, 7
        positions = [
            (dx * (r + width - 7), dy * r)
            for r in (13, 22, 33, 46, 62, 80)
            for dx, dy in ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (1, 0), (0, -1), (-1, 0))  # bars: up and across
        ]
        boxes = [(px + a - width, py + b - height, px + a + width, py + b + height) for a, b in positions]
        free = [i for i, b in enumerate(boxes) if _inside(b, frame) and not any(_overlap(b, t) for t in occupied)]
        i = free[0] if free else 0
        occupied.append(boxes[i])
        far = math.hypot(*positions[i]) > 30
        ax.annotate(text, (x, y), [v * 72 / DPI for v in positions[i]], textcoords="offset points", ha="center", va="center",
                    fontsize=9, color=INK, arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6} if far else None)  # fmt: skip


def _inside(box: tuple[float, ...], frame) -> bool:
    return box[0] >= frame.x0 and box[2] <= frame.x1 and box[1] >= frame.y0 and box[3] <= frame.y1


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
