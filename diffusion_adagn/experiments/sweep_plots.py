"""A sweep in pictures: metrics over the guidance scale, fidelity against diversity, what guidance does to a picture, classes.

curves(points, swept, choices).savefig("curves.png"). Needs matplotlib (`available`), whose global state is left alone.
"""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..evaluation.metrics import METRICS
from ..render.text import listed, one_line
from .selection import (
    BestSet,
    PointResult,
    class_count,
    counted,
    differing,
    heard,
    in_order,
    measured,
    pareto,
    setting_called,
    valued,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = "pip install 'diffusion-adagn[plots]'"
MISSING = f"plots need matplotlib: {INSTALL}"
WIDTH, DPI = 12.8, 100  # inches: 1280 px
PANEL, LINE = 3.0, 0.24  # inches: a panel's height, a line of text's
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
STROKES = ("-", "--", "-.", ":")
ASIDE = 0.01  # of the x axis, that lines stand beside each other: equal values would hide each other
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
    """A panel a metric that has values, over the guidance scale or what else was swept; why the others have none below.

    swept: the settings with several values. choices: of `best_sets`; the best point and its set are marked.
    titles: what to call a metric, where not by METRICS.
    """
    points, title = in_order(points), {m: METRICS[m].title for m in METRICS} | dict(titles or {})
    metrics = valued(points)
    over = XAxis(points, swept)
    lines = _lines(points, over, [c.best for c in choices.values()])
    notes = _blank(points, metrics, title) + _left_out(lines, points)
    shown = _keys(lines, over)
    marks = [("best", "ring"), ("cannot be told apart from it", "thin")] if choices else []
    hint = "bars: one standard error" + ("; lines stand a little beside each other" if len(lines) > 1 else "")
    figure, axes = _sheet(len(metrics), notes, [*shown, *marks] if metrics else [], hint if metrics else "")
    for metric, ax in zip(metrics, axes):
        for i, (_, line) in enumerate(lines):
            aside = over.aside(i, len(lines))
            some = [(over.at(p) + aside, *measured(p.row, metric)[:2]) for p in line]
            some = [(x, y, e or 0) for x, y, e in some if y is not None]
            if some:
                ax.errorbar(*zip(*[(x, y) for x, y, _ in some]), yerr=[e for _, _, e in some], color=COLOURS[i], marker=MARKERS[i],
                            linestyle=over.stroke(i), markersize=5, linewidth=1.4, capsize=2.5, elinewidth=1)  # fmt: skip
            for p in line:
                _mark(ax, choices.get(metric), p.id, over.at(p) + aside, measured(p.row, metric)[0])
        ax.set_title(title[metric], fontsize=11, color=INK)
        ax.set_ylabel(f"{METRICS[metric].better} is better", fontsize=9, color=FAINT)
        over.label(ax)
    return figure


def tradeoff(
    points: Sequence[PointResult], fidelity: str, diversity: str, titles: Mapping[str, str] | None = None
) -> Figure:
    """The two metrics against each other, each point labelled by its scale (or what else was swept), with the Pareto front.

    Points that differ in that alone are joined by a thin line. The front is a step: between two of its points nothing is reached.
    """
    points, title = in_order(points), {m: METRICS[m].title for m in METRICS} | dict(titles or {})
    front, over = pareto(points, fidelity, diversity), XAxis(points)
    lines = _lines(points, over, front, join=False)
    at = {p.id: (measured(p.row, diversity)[0], measured(p.row, fidelity)[0]) for p in points}
    at = {i: xy for i, xy in at.items() if None not in xy}
    names = [(name, c, m, "none") for (name, _), c, m in zip(lines, COLOURS, MARKERS)]
    shown = {p.id for _, line in lines for p in line}
    steps = sorted({at[i] for i in front if i in shown})
    if len(steps) > 1:
        names.append(("Pareto front: not beaten in both", "line"))
    hint = f"labels: {over.name}; bars: one standard error"
    figure, (ax,) = _sheet(1, _left_out(lines, points), names, hint, 1.9)
    # the level of a point holds on the side where the diversity is worse
    corner = "steps-pre" if METRICS[diversity].better == "higher" else "steps-post"
    ax.plot(*zip(*steps) if steps else ([], []), color=INK, linewidth=1.2, linestyle="--", drawstyle=corner, zorder=1)
    for (_, line), colour, marker in zip(lines, COLOURS, MARKERS):
        some = [p for p in line if p.id in at]
        x, y = zip(*(at[p.id] for p in some)) if some else ((), ())
        bars = ([measured(p.row, m)[1] or 0 for p in some] for m in (diversity, fidelity))
        style = {"color": colour, "marker": marker, "markersize": 7, "linewidth": 0.7, "zorder": 2}
        ax.errorbar(x, y, *reversed(list(bars)), elinewidth=0.6, linestyle="-" if over.numeric else "none", **style)
    ax.margins(0.08)
    ax.set_xlabel(f"{title[diversity]} ({METRICS[diversity].better} is better)", fontsize=10)
    ax.set_ylabel(f"{title[fidelity]} ({METRICS[fidelity].better} is better)", fontsize=10)
    ax.set_title(f"{title[fidelity]} against {title[diversity]}", fontsize=11, color=INK)
    _beside(ax, list(dict.fromkeys((at[p.id], over.text(p)) for p in points if p.id in at and p.id in shown)))
    return figure


def diagnostics(points: Sequence[PointResult]) -> Figure:
    """What guidance adds over the timesteps for several scales, and contrast, saturation and brightness against the data."""
    points = in_order(points)
    over = XAxis(points)
    lines = _lines(points, over)
    settings, group = max(lines, key=lambda line: len(line[1]))
    group = _spread(group, MAX_SCALES)
    shades = _shades(len(group))
    notes = [f"Over t: {settings}."] if len(lines) > 1 else []
    keys = [(f"{over.name} {over.text(p)}", shade, "") for p, shade in zip(group, shades)]
    keys += _keys(lines, over) if len(lines) > 1 else []
    over_t = (
        ("difference", "Conditional minus unconditional", "RMS, in the prediction's units"),
        ("clipped", "Clipped values of the predicted picture", "share"),
    )
    over_scale = (
        ("extremes", "Values at 0 or 255", "share", _data_extremes(points)),
        ("contrast_ratio", "Contrast against the data", "ratio", 1),
        ("saturation_ratio", "Saturation against the data", "ratio", 1),
        ("brightness_shift", "Brightness against the data", "difference", 0),
    )
    there = {key for key, *_ in over_scale if any(_looks(p).get(key) is not None for p in points)}
    over_t = [some for some in over_t if any(_over_t(p, some[0]) for p in group)]
    over_scale = [some for some in over_scale if some[0] in there]
    figure, axes = _sheet(len(over_t) + len(over_scale), notes + _left_out(lines, points), keys)
    for (key, title, unit), ax in zip(over_t, axes):
        for p, shade in zip(group, shades):
            some = _over_t(p, key)
            if some:
                ax.plot(*zip(*some), color=shade, marker="." if len(some) < 60 else None, linewidth=1.4)
        _finish(ax, title, unit)
        ax.set_xlabel("timestep t (sampling runs to the left)", fontsize=9)
    for (key, title, unit, data), ax in zip(over_scale, axes[len(over_t) :]):
        for i, (_, line) in enumerate(lines):
            some = [(over.at(p) + over.aside(i, len(lines)), _looks(p).get(key)) for p in line]
            some = [xy for xy in some if xy[1] is not None]
            if some:
                ax.plot(*zip(*some), color=COLOURS[i], marker=MARKERS[i], markersize=5, linewidth=1.4, linestyle=over.stroke(i))  # fmt: skip
        if data is not None:
            ax.axhline(data, color=INK, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        _finish(ax, title, unit if data is None else f"{unit} (dotted: the data)")
        over.label(ax)
    return figure


def _looks(point: PointResult) -> Mapping:
    return point.row.get("diagnostics", {})


def _data_extremes(points: Sequence[PointResult]) -> float | None:
    """The data's share of values at 0 or 255, where the points know it."""
    both = [(_looks(p).get("extremes"), _looks(p).get("extremes_shift")) for p in points]
    return next((share - beyond for share, beyond in both if None not in (share, beyond)), None)


def per_class(
    points: Sequence[PointResult], metric: str, class_names: Sequence[str], titles: Mapping[str, str] | None = None
) -> Figure:
    """A map of class by point, of the first MOST_CLASSES classes; a dot on each class's best point, grey where there is no value."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    points = in_order(points)
    total = class_count(points, metric)
    count = min(total, MAX_SHOWN_CLASSES)
    values = np.array([[measured(p.row, metric, c)[0] for p in points] for c in range(count)], dtype=float)
    names = [_short(class_names[c] if c < len(class_names) else f"class {c}", 28) for c in range(count)]
    settings = differing(points)
    columns = [_short(", ".join(_brief(s, p.row.get(s)) for s in settings or ["scale"]), 34) for p in points]
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
    some = f"; the first {count} of {total:,} classes" if count < total else ""
    ax.set_title(f"{title} by class; the dot: the best of a class{some}", fontsize=11, color=INK)
    figure.colorbar(image, ax=ax, pad=0.01, label=f"{METRICS[metric].better} is better")
    return figure


# ---------------------------------------------------------------------- what they share


class XAxis:
    """The setting on the x axis: the scale where that was swept, else the first one that was. A number, or places in a row."""

    ORDER = ("scale", "steps", "eta", "rescale", "threshold", "interval", "schedule", "sampler", "spacing", "guide")

    def __init__(self, points: Sequence[PointResult], swept: Iterable[str] | None = None):
        several = differing(points)
        wanted = [s for s in self.ORDER if s in several and (swept is None or s in swept)]
        self.setting = (wanted or [s for s in self.ORDER if s in several] or ["scale"])[0]
        self.name = {"scale": "guidance scale", "steps": "steps"}.get(self.setting, self.setting)
        self.values = list(dict.fromkeys(p.row.get(self.setting) for p in points))
        self.numeric = all(isinstance(v, (int, float)) for v in self.values)
        self.span = max(self.values) - min(self.values) if self.numeric else len(self.values)

    def stroke(self, line: int) -> str:
        """How a line is drawn; nothing lies between two samplers."""
        return STROKES[line % len(STROKES)] if self.numeric else "none"

    def aside(self, line: int, of: int) -> float:
        """By how much a line is moved along the axis."""
        return (line - (of - 1) / 2) * ASIDE * self.span * (1 if self.numeric else 4)

    def at(self, point: PointResult) -> float:
        value = point.row.get(self.setting)
        return float(value) if self.numeric else float(self.values.index(value))

    def text(self, point: PointResult) -> str:
        return _brief(self.setting, point.row.get(self.setting))

    def label(self, ax: Axes) -> None:
        ax.set_xlabel(self.name, fontsize=9)
        if not self.numeric:
            ax.set_xticks(range(len(self.values)), [_short(_brief(self.setting, v), 12) for v in self.values])
            ax.set_xlim(-0.5, len(self.values) - 0.5)
        elif len(self.values) == 1:
            ax.set_xticks(self.values, [f"{v:g}" for v in self.values])
        _ticks(ax)


def _keys(lines: Sequence[tuple[str, list[PointResult]]], over: XAxis) -> list[tuple[str, str, str, str]]:
    """For the legend: name, colour, marker and stroke of each line."""
    return [(name, COLOURS[i], MARKERS[i], over.stroke(i)) for i, (name, _) in enumerate(lines)]


def _lines(
    points: Sequence[PointResult], over: XAxis, keep: Iterable[str] = (), join: bool = True
) -> list[tuple[str, list[PointResult]]]:
    """Points that differ in what the x axis shows alone, each line with its name; of too many, those with an id in `keep` first.

    join: scale 1 is on every line that starts from it."""
    others = [s for s in differing(points) if s != over.setting]
    lines: dict[tuple, list[PointResult]] = {}
    for p in points:
        lines.setdefault(tuple(str(p.row.get(s)) for s in others), []).append(p)
    if join and over.setting == "scale":
        lines = _joined_to_unguided(lines)
    keep = set(keep)
    first = sorted(lines, key=lambda k: not keep & {p.id for p in lines[k]})[:MAX_LINES]
    return [
        (", ".join(setting_called(s, line[0].row.get(s)) for s in others), sorted(line, key=over.at))
        for k, line in lines.items()
        if k in first
    ]


def _joined_to_unguided(lines: dict[tuple, list[PointResult]]) -> dict[tuple, list[PointResult]]:
    """Scale 1 is one point whatever the interval: it is on every line that differs in nothing that is heard there."""

    unguided = {heard(p.row): p for line in lines.values() for p in line if p.row.get("scale") == 1}
    guided = {k: line for k, line in lines.items() if any(p.row.get("scale") != 1 for p in line)}
    met = {heard(line[0].row) for line in guided.values()}
    alone = {k: line for k, line in lines.items() if k not in guided and heard(line[0].row) not in met}
    joined = {
        k: line
        if any(p.row.get("scale") == 1 for p in line)
        else [*line, *filter(None, [unguided.get(heard(line[0].row))])]
        for k, line in guided.items()
    }
    return {**joined, **alone}


def _left_out(lines: Sequence[tuple[str, list[PointResult]]], points: Sequence[PointResult]) -> list[str]:
    count = len(points) - len({p.id for _, line in lines for p in line})
    return (
        [
            f"{count} of the {counted(len(points), 'point')} {'is' if count == 1 else 'are'} left out here ({MAX_LINES} lines at most); sweep.csv has all."
        ]
        if count
        else []
    )


def _blank(points: Sequence[PointResult], metrics: Sequence[str], title: Mapping[str, str]) -> list[str]:
    """Why the other metrics have no value, those of one reason together."""
    reasons: dict[str, list[str]] = {}
    for m in METRICS:
        if m not in metrics:
            why = next((w for p in points if (w := measured(p.row, m)[2])), "not measured")
            reasons.setdefault(why, []).append(title[m])
    return [f"Without a value: {listed(some, 8)}: {why}" for why, some in reasons.items()]


def _sheet(
    count: int,
    notes: Sequence[str],
    keys: Sequence[tuple[str, ...]],
    hint: str = "",
    taller: float = 1,
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, three in a row, and below them the legend, a hint and the notes. keys: name, colour, marker, stroke."""
    from matplotlib.figure import Figure

    keys = [k for k in keys if k[0]]
    longest = max((len(_short(k[0], 60)) for k in keys), default=0)
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
        _ticks(ax)
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


def _handle(name: str, colour: str, marker: str = "", stroke: str = "-"):
    from matplotlib.lines import Line2D

    name = _short(name, 60)
    if colour == "line":
        return Line2D([], [], color=INK, linestyle="--", linewidth=1.2, label=name)
    if colour in RINGS:
        return Line2D([], [], linestyle="none", marker="o", label=name, **RINGS[colour])
    return Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1.6, linestyle=stroke, label=name)


RINGS = {
    "ring": {"markersize": 12, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.8},
    "thin": {"markersize": 9.5, "markerfacecolor": "none", "markeredgecolor": FAINT, "markeredgewidth": 0.9},
}


def _mark(ax: Axes, choice: BestSet | None, point: str, x: float, y: float | None) -> None:
    """A ring around the best point, a thin one around what cannot be told apart from it."""
    if choice is not None and y is not None and point in choice.members:
        ax.plot(x, y, linestyle="none", marker="o", zorder=4, **RINGS["ring" if point == choice.best else "thin"])


def _finish(ax: Axes, title: str, y: str) -> None:
    ax.set_title(title, fontsize=11, color=INK)
    ax.set_ylabel(y, fontsize=9)


def _ticks(ax: Axes) -> None:
    ax.tick_params(labelsize=9)
    ax.grid(color="#ECECE8", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _over_t(point: PointResult, key: str) -> list[tuple[float, float]]:
    """(timestep, value) of the network calls that have one."""
    found = point.row.get("diagnostics", {})
    return [(t, v) for t, v in zip(found.get("timesteps") or (), found.get(key) or ()) if v is not None]


def _spread(some: Sequence[PointResult], most: int) -> list[PointResult]:
    """At most that many of them, from the first to the last."""
    if len(some) <= most:
        return list(some)
    return [some[round(i * (len(some) - 1) / (most - 1))] for i in range(most)]


def _shades(count: int) -> list[str]:
    """Colours from dark to light, which lightness alone orders."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.88 * i / max(count - 1, 1))) for i in range(count)]


def _best_column(values: Sequence[float], metric: str) -> int | None:
    there = [(v if METRICS[metric].better == "lower" else -v, i) for i, v in enumerate(values) if v == v]
    return min(there)[1] if there else None


def _brief(setting: str, value: object) -> str:
    """A setting's value where there is little room."""
    if isinstance(value, (int, float)):
        return f"{value:g} steps" if setting == "steps" else f"{value:g}"
    if value in (None, "none"):
        return {"interval": "all t", "guide": "null"}.get(setting, "none")
    return one_line(str(value))


def _short(text: str, most: int) -> str:
    text = one_line(text).replace("$", r"\$")  # matplotlib reads what stands between two as mathematics
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _beside(ax: Axes, labels: Sequence[tuple[tuple[float, float], str]]) -> None:
    """Writes each label at the nearest free place beside its point, with a line to it where that is far."""
    import math

    ax.figure.figure.draw_without_rendering()  # places are known only once the layout is
    at = ax.transData.transform([xy for xy, _ in labels]) if labels else []
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    frame = ax.get_window_extent()
    for ((x, y), text), (px, py) in zip(labels, at):
        wide, high = 6.5 * len(text) / 2 + 2, 7
        places = [
            (dx * (r + wide - 7), dy * r)
            for r in (13, 22, 33, 46, 62, 80)
            for dx, dy in ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (1, 0), (0, -1), (-1, 0))  # bars: up and across
        ]
        boxes = [(px + a - wide, py + b - high, px + a + wide, py + b + high) for a, b in places]
        free = [i for i, b in enumerate(boxes) if _inside(b, frame) and not any(_meet(b, t) for t in taken)]
        i = free[0] if free else 0
        taken.append(boxes[i])
        far = math.hypot(*places[i]) > 30
        ax.annotate(text, (x, y), [v * 72 / DPI for v in places[i]], textcoords="offset points", ha="center", va="center",
                    fontsize=9, color=INK, arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6} if far else None)  # fmt: skip


def _inside(box: tuple[float, ...], frame) -> bool:
    return box[0] >= frame.x0 and box[2] <= frame.x1 and box[1] >= frame.y0 and box[3] <= frame.y1


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
