"""The report's images: numbers -> Drawing. Each fits a page of 1280 px and does not depend on the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..models.unet import Site
from ..render.grids import FAINT, HOLLOW, INK, PAPER
from ..render.text import shorten, text_width
from .analysis import describe_position, network_half
from .drawing import BAND, BOTH, LABEL, TIME, Colour, Drawing, diverging, sequential
from .levels import LevelBin, NoiseLevels, short

WIDTH = 1160
RULE = (214, 214, 208)
CELLS = 240  # of a row of a heat map, each with the nearest noise level
MAP_LEFT, MAP_TOP, MAP_PITCH = 74, 44, 70
CLASS_COLOURS = (LABEL, TIME, (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))  # Okabe & Ito
Stack = Sequence[tuple[float, Colour]]


def ticks(top: float, max_count: int = 5) -> list[float]:
    """At most about `max_count` round numbers from 0 to `top`."""
    if top <= 0:
        return [0.0]
    raw = top / max_count
    unit = 10 ** np.floor(np.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    return [float(step * i) for i in range(int(top / step + 1e-9) + 1)]


def _legend(d: Drawing, x: float, y: float, entries: Sequence[tuple[str, Colour]]) -> None:
    for label, colour in entries:
        d.rect(x, y - 10, 12, 12, colour, RULE)
        d.text(x + 17, y, label, 12, FAINT)
        x += 17 + text_width(label, 12) + 22


def _scale(d: Drawing, right: float, y: float, low: str, high: str, palette, signed: bool = False) -> None:
    """A colour scale; its right end is at `right`."""
    width = 160
    start = right - text_width(high, 11) - 6 - width
    d.cells(start, y - 10, width, 12, palette(np.linspace(-1 if signed else 0, 1, 64))[None])
    d.text(start - 6, y, low, 11, FAINT, "end")
    d.text(start + width + 6, y, high, 11, FAINT)


# ---------------------------------------------------------------------- the network


@dataclass(frozen=True)
class SiteBox:
    """One site of the map: its class fraction (None: its modulation is constant), and the text under the pointer."""

    site: Site
    fraction: float | None
    hover: str


def network_map(boxes: Sequence[SiteBox]) -> Drawing:
    """The U-Net: depth to the right, resolution downwards, one box per site, as wide as its channels."""
    sites = [p.site for p in boxes]
    d = _network_page(sites)
    if any(p.fraction is None for p in boxes):
        _legend(d, MAP_LEFT, 16, [("constant", HOLLOW)])
    d.text(WIDTH / 2 - 60, 16, "colour: class fraction; width: channels", 12, FAINT, "middle")
    _scale(d, WIDTH - 4, 16, "follows time", "follows the class", lambda v: _fraction_colours((v + 1) / 2), signed=True)
    fills = [HOLLOW if p.fraction is None else tuple(_fraction_colours(np.array(p.fraction))) for p in boxes]
    _draw_network(d, sites, fills, [_format_fraction(p.fraction) for p in boxes], [p.hover for p in boxes])
    return d


def class_map(sites: Sequence[Site], classes: Sequence[str], legend: Sequence[str]) -> Drawing:
    """The U-Net of `network_map`, each site in the colour of the class that it receives.

    Args:
        sites: in the order of depth.
        classes: of each site, the name of its class.
        legend: the names of all classes, each with a colour of its own.
    """
    d = _network_page(sites)
    colour = {name: CLASS_COLOURS[i % len(CLASS_COLOURS)] for i, name in enumerate(dict.fromkeys(legend))}
    _legend(d, MAP_LEFT, 16, [(f"class {shorten(name, 12, 200)}", fill) for name, fill in colour.items()])
    d.text(WIDTH - 4, 16, "width: channels", 12, FAINT, "end")
    hovers = [f"{s.name}: {describe_position(s)}, receives {name}" for s, name in zip(sites, classes)]
    words = [shorten(name, 12, 60) for name in classes]
    _draw_network(d, sites, [colour[name] for name in classes], words, hovers)
    return d


def _network_page(sites: Sequence[Site]) -> Drawing:
    return Drawing(WIDTH, MAP_TOP + MAP_PITCH * len({s.resolution for s in sites}) + 4)


def _draw_network(
    d: Drawing, sites: Sequence[Site], fills: Sequence[Colour], words: Sequence[str], hovers: Sequence[str]
) -> None:
    """A box per site with its colour, its word, and the text under the pointer."""
    sides = sorted({s.resolution for s in sites}, reverse=True)
    gap, height = 4 if len(sites) <= 60 else 2, 42
    room = WIDTH - MAP_LEFT - 10 - gap * (len(sites) - 1)
    channels = sum(s.channels for s in sites)
    unit = min(110 / max(s.channels for s in sites), room / channels)
    x = MAP_LEFT + (WIDTH - MAP_LEFT - unit * channels - gap * (len(sites) - 1)) / 2
    rects = []
    for s in sites:
        rects.append((x, MAP_TOP + MAP_PITCH * sides.index(s.resolution), unit * s.channels))
        x += unit * s.channels + gap
    for row, side in enumerate(sides):
        y = MAP_TOP + MAP_PITCH * row + height / 2
        d.text(MAP_LEFT - 14, y + 4, f"{side}x{side}", 13, INK, "end")
        _skip(d, [(s, r) for s, r in zip(sites, rects) if s.resolution == side], y)
    _path(d, rects, height)
    for s, (x, y, width), fill, word, hover in zip(sites, rects, fills, words, hovers):
        d.rect(x, y, width, height, fill, FAINT, hover)
        if width >= 30:
            d.text(x + width / 2, y + 18, word, 12, _ink_on(fill), "middle")
            d.text(x + width / 2, y + 33, f"{s.channels} ch", min(10, width / 4), _ink_on(fill), "middle")


def _fraction_colours(fraction: np.ndarray) -> np.ndarray:
    return diverging(2 * np.asarray(fraction) - 1)


def _format_fraction(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.0%}"


def _ink_on(fill: Colour) -> Colour:
    return PAPER if 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] < 135 else INK


def _skip(d: Drawing, row: Sequence, y: float) -> None:
    """The skip connections of one resolution, as a dashed line from the encoder to the decoder."""
    ends = [b[0] + b[2] for s, b in row if network_half(s) == "down"]
    starts = [b[0] for s, b in row if network_half(s) == "up"]
    if not ends or not starts:
        return
    a, b = max(ends) + 4, min(starts) - 4
    for x in np.arange(a, b - 4, 9) if b - a > 20 else ():
        d.line([(x, y), (min(x + 4, b), y)], RULE, 1.5)


def _path(d: Drawing, rects: Sequence[tuple[float, float, float]], height: float) -> None:
    for (x, y, width), (next_x, next_y, next_width) in pairwise(rects):
        if y != next_y:
            down = next_y > y
            a = (x + width / 2, y + height if down else y)
            b = (next_x + next_width / 2, next_y if down else next_y + height)
            d.line([a, (a[0], (a[1] + b[1]) / 2), (b[0], (a[1] + b[1]) / 2), b], FAINT, 1.2)


# ---------------------------------------------------------------------- bars over depth


def site_bars(
    sites: Sequence[Site],
    strips: Mapping[str, Mapping[str, Stack]],
    names: Mapping[str, str],
    top: float = 1.0,
    unit: str = "100%",
    legend: Sequence[tuple[str, Colour]] = (),
) -> Drawing:
    """One strip of bars over depth for each field.

    Args:
        sites: Sites in the order of depth.
        strips: {field: {site name: its stack, from bottom to top}}. An empty stack reads "none"; a site without the
            field is skipped.
        names: Short names of the sites.
        top: Value of the full height.
        unit: Label of the full height.
        legend: Labels and colours.
    """
    left, height, between, head = 96, 96 if len(strips) > 2 else 120, 18, 30 if legend else 10
    pitch = (WIDTH - left - 8) / len(sites)
    foot = max(text_width(names[s.name], _label_size(pitch)) for s in sites) + 30
    d = Drawing(WIDTH, head + len(strips) * (height + between) + foot)
    _legend(d, left, 16, legend)
    for row, (field, stacks) in enumerate(strips.items()):
        y = head + row * (height + between)
        d.text(left - 34, y + height / 2 + 4, field, 14, INK, "end")
        d.text(left - 6, y + 9, unit, 10, FAINT, "end")
        d.text(left - 6, y + height, "0", 10, FAINT, "end")
        d.line([(left, y + height), (WIDTH - 8, y + height)], RULE)
        for column, site in enumerate(sites):
            if site.name in stacks:
                x = left + column * pitch
                parts = ", ".join(f"{fraction / top * 100:.1f}%" for fraction, _ in stacks[site.name])
                hover = f"{site.name}: {field} {parts}"
                _stack(
                    d,
                    x + 0.08 * pitch,
                    y,
                    0.84 * pitch,
                    height,
                    stacks[site.name],
                    top,
                    hover if top == 1 else site.name,
                )
    _site_axis(d, sites, names, left, head + len(strips) * (height + between) - between + 6, pitch)
    return d


def _stack(d: Drawing, x, y, width, height, stack: Stack, top: float, hover: str) -> None:
    foot = y + height
    if not stack:
        d.rect(x, y, width, height, HOLLOW, None, hover)
        d.text(x + width / 2 + 4, y + height / 2, "none", min(11, max(7, width * 0.8)), FAINT, "middle", upright=True)
    for fraction, colour in stack:
        part_height = height * fraction / top
        foot -= part_height
        d.rect(x, foot, width, part_height, colour, None, hover)


def _label_size(pitch: float) -> float:
    return min(11.0, max(8.0, pitch * 0.85))


def _site_axis(
    d: Drawing, sites: Sequence[Site], names: Mapping[str, str], left: float, y: float, pitch: float
) -> None:
    """A bracket for each run of sites of one resolution, and vertical names below; names that would touch are skipped."""
    runs: list[list[int]] = []
    for column, site in enumerate(sites):
        if not runs or sites[runs[-1][-1]].resolution != site.resolution:
            runs.append([])
        runs[-1].append(column)
    for run in runs:
        a, b = left + run[0] * pitch + 2, left + (run[-1] + 1) * pitch - 2
        label = f"{sites[run[0]].resolution}x{sites[run[0]].resolution}"
        d.line([(a, y), (b, y)], FAINT, 1)
        if text_width(label, 11) <= b - a:
            d.text((a + b) / 2, y + 13, label, 11, INK, "middle")
    size = _label_size(pitch)
    every = max(1, int(np.ceil(size * 1.05 / pitch)))
    for column in range(0, len(sites), every):
        middle = left + (column + 0.5) * pitch + size * 0.35
        d.text(middle, y + 20, names[sites[column].name], size, FAINT, "end", upright=True)


# ---------------------------------------------------------------------- heat maps over noise levels


@dataclass(frozen=True)
class Panel:
    """values: [rows, T]. total: [T], drawn as a line above with its own scale and label."""

    title: str
    values: np.ndarray
    total: np.ndarray | None = None
    label: str = ""


def heat_maps(
    panels: Sequence[Panel], rows: Sequence[str], levels: NoiseLevels, unit: str, one_scale: bool = True
) -> Drawing:
    """Heat maps of rows x noise levels, side by side; noise levels go from clean (left) to noise (right).

    Colours go from 0 to the largest value, of all panels or (one_scale False) of each panel.
    """
    row_height = min(22.0, max(9.5, 640 / len(rows)))
    size = min(11.0, row_height * 0.86)
    left = max(min(max(text_width(r, size) for r in rows), 200) + 10, 40)
    between, lined = 28, any(p.total is not None for p in panels)
    width = (WIDTH - left - between * (len(panels) - 1) - 8) / len(panels)
    head = 70 + (78 if lined else 0)
    d = Drawing(WIDTH, head + row_height * len(rows) + axis_height(levels))
    ranges = "" if one_scale or len(panels) == 1 else "; every panel has its own range"
    d.text(left, 14, f"colour: {unit}{ranges}", 11.5, FAINT)
    largest = max(float(p.values.max()) for p in panels)
    for i, row in enumerate(rows):
        d.text(left - 8, head + (i + 0.5) * row_height + size * 0.36, shorten(row, size, left - 10), size, INK, "end")
    for column, p in enumerate(panels):
        x, top = left + column * (width + between), largest if one_scale else float(p.values.max())
        d.text(x, 36, shorten(p.title, 13, width), 13)
        _scale(d, x + width, 58, "0", f"{top:.3g}", sequential)
        if p.total is not None:
            _total_line(d, LevelAxis(levels, x, width), 72, 62, p.total, p.label)
        _heat(d, LevelAxis(levels, x, width), head, row_height, p.values, top, rows)
    return d


def _heat(d: Drawing, axis: "LevelAxis", y, row_height, values: np.ndarray, top: float, rows: Sequence[str]) -> None:
    x, width = axis.x, axis.width
    nearest = np.abs(axis.places[:, None] - np.linspace(axis.places.min(), axis.places.max(), CELLS)).argmin(0)
    d.cells(x, y, width, row_height * len(rows), sequential(values[:, nearest] / (top or 1)))
    d.rect(x, y, width, row_height * len(rows), None, RULE)
    for i, row in enumerate(rows):
        peak = int(values[i].argmax())
        hover = f"{row}: at most {values[i, peak]:.3g} ({axis.levels.words(peak)}), {values[i].mean():.3g} on average"
        d.rect(x, y + i * row_height, width, row_height, None, None, hover)
    axis.draw(d, y + row_height * len(rows))


def _total_line(d: Drawing, axis: "LevelAxis", y, height, values: np.ndarray, label: str) -> None:
    top, x, width = float(values.max()), axis.x, axis.width
    points = [(axis.of(i), y + height - (height - 16) * values[i] / (top or 1)) for i in axis.order]
    d.line([(x, y + height), (x + width, y + height)], RULE)
    d.line(points if len(points) > 1 else [(x, points[0][1]), (x + width, points[0][1])], TIME, 2)
    d.text(x + width, y + 8, f"{label}, at most {top:.3g}", 11, TIME, "end")


def axis_height(levels: NoiseLevels) -> float:
    """Room for sigma, and for t."""
    return 36 * (levels.sigmas is not None) + 36 * levels.has_t


class LevelAxis:
    """An axis of noise levels, sigma on a logarithmic scale and t below it, from `x` on and `width` wide."""

    def __init__(self, levels: NoiseLevels, x: float, width: float):
        self.levels, self.x, self.width, self.places = levels, x, width, levels.places
        self.order = np.argsort(self.places, kind="stable")

    def at(self, place: float) -> float:
        low, high = self.places.min(), self.places.max()
        return self.x + self.width * ((place - low) / (high - low) if high > low else 0.5)

    def of(self, index: int) -> float:
        return self.at(self.places[index])

    def _label(self, d: Drawing, x: float, y: float, label: str, size: float) -> None:
        """A label below a tick, inside the page."""
        d.text(min(x, d.width - text_width(label, size) / 2), y, label, size, FAINT, "middle")

    def draw(self, d: Drawing, y: float) -> None:
        """Ticks and labels, in the `axis_height` pixels below y."""
        levels, below = self.levels, y
        for place, label in levels.ticks(int(self.width / 46)):
            d.line([(self.at(place), y), (self.at(place), y + 4)], FAINT)
            self._label(d, self.at(place), y + 16, label, 10.5)
        if levels.sigmas is not None:
            below = y + 30
            d.text(self.x + self.width / 2, below, "noise level sigma: clean to noise", 11, FAINT, "middle")
        if levels.has_t:
            labelled = -np.inf
            for i in self.order:
                label = short(levels.times[i])
                if self.of(i) - labelled >= text_width(label, 10) + 8:
                    labelled = self.of(i)
                    d.line([(labelled, below + 6), (labelled, below + 9)], FAINT)
                    self._label(d, labelled, below + 19, label, 10)
            d.text(self.x + self.width / 2, below + 33, "timestep t", 11, FAINT, "middle")


# ---------------------------------------------------------------------- classes


def cosine_map(cosine: np.ndarray, names: Sequence[str]) -> Drawing:
    """Cosines between classes [K, K], with the class names on both axes."""
    k = len(names)
    cell = min(40.0, max(11.0, 620 / k))
    size = min(12.0, cell * 0.85)
    labels = [shorten(n, size, 150) for n in names]
    longest = max(text_width(w, size) for w in labels)
    vertical = longest > cell - 4
    left, top = longest + 16, 34 + (longest if vertical else size) + 10
    d = Drawing(max(left + cell * k + 16, 420), top + cell * k + 8)
    _scale(d, d.width - 4, 16, "cosine  -1", "+1", diverging, signed=True)
    d.cells(left, top, cell * k, cell * k, diverging(cosine))
    for i, label in enumerate(labels):
        middle = top + (i + 0.5) * cell
        d.text(left - 8, middle + size * 0.36, label, size, INK, "end")
        centre_x = left + (i + 0.5) * cell
        d.text(
            centre_x + (size * 0.36 if vertical else 0),
            top - 6,
            label,
            size,
            INK,
            "start" if vertical else "middle",
            vertical,
        )
        for j in range(k):
            x = left + j * cell
            if k <= 20:
                d.rect(x, top + i * cell, cell, cell, None, None, f"{names[i]} and {names[j]}: {cosine[i, j]:+.3f}")
            if cell >= 30 and i != j:
                fill = tuple(int(c) for c in diverging(np.array(cosine[i, j])))
                d.text(x + cell / 2, middle + 3.5, _tenths(cosine[i, j]), 10, _ink_on(fill), "middle")
        if k > 20:
            best = max((j for j in range(k) if j != i), key=lambda j: cosine[i, j])
            d.rect(
                left,
                top + i * cell,
                cell * k,
                cell,
                None,
                None,
                f"{names[i]}: most like {names[best]} ({cosine[i, best]:+.2f})",
            )
    return d


def _tenths(value: float) -> str:
    return "0" if abs(value) < 0.05 else f"{value:+.1f}"


# ---------------------------------------------------------------------- lines and bars over noise levels


def lines_over_levels(
    panels: Sequence[tuple[str, np.ndarray]],
    levels: NoiseLevels,
    band: tuple[int, int] | None,
    label: str = "",
) -> Drawing:
    """A curve in each panel, panels side by side, and in the first a shaded band from one index of the levels to another."""
    left, between, head, height = 52, 70, 42, 220
    width = (WIDTH - left - between * (len(panels) - 1) - 16) / len(panels)
    d = Drawing(WIDTH, head + height + axis_height(levels))
    for column, (title, values) in enumerate(panels):
        x0 = left + column * (width + between)
        axis = LevelAxis(levels, x0, width)
        top = float(values.max()) or 1.0
        d.text(x0, 16, title, 13)
        if band is not None and column == 0:
            a, b = axis.of(band[0]), axis.of(band[1])
            d.rect(a, head, max(b - a, 3), height, BAND, None, levels.span(*band))
            d.text(
                min(max((a + b) / 2, x0 + text_width(label, 11) / 2), x0 + width - text_width(label, 11) / 2),
                head - 7,
                label,
                11,
                (40, 110, 70),
                "middle",
            )
        for v in ticks(top):
            y = head + height - height * v / top
            d.line([(x0, y), (x0 + width, y)], RULE, 0.8)
            d.text(x0 - 7, y + 4, f"{v:.3g}", 10.5, FAINT, "end")
        points = [(axis.of(i), head + height - height * values[i] / top) for i in axis.order]
        d.line(
            points if len(points) > 1 else [(x0, points[0][1]), (x0 + width, points[0][1])],
            LABEL if column == 0 else TIME,
            2.2,
        )
        for i, (x, y) in zip(axis.order, points):
            hover = f"{levels.words(i)}: {values[i]:.3g}"
            d.rect(x - 2.5, y - 2.5, 5, 5, LABEL if column == 0 else TIME, None, hover)
        axis.draw(d, head + height)
    return d


def interval_bars(
    series: Mapping[str, Sequence[tuple[float, float] | None]], bins: Sequence[LevelBin], unit: str
) -> Drawing:
    """Bars with their intervals, one per series and bin; None and nan are skipped."""
    left, head, height = 78, 40, 240
    colours = [LABEL, TIME]
    finite = [
        (m, h if np.isfinite(h) else 0.0)
        for intervals in series.values()
        for m, h in filter(None, intervals)
        if np.isfinite(m)
    ]
    top = max([m + h for m, h in finite] + [0.0])
    low = min([m - h for m, h in finite] + [0.0])
    top = top if top > low else 1.0
    span = top - low
    has_t = any(b.t for b in bins)
    d = Drawing(WIDTH, head + height + 48 + 16 * has_t)
    _legend(d, left, 16, [(label, colour) for label, colour in zip(series, colours)])
    d.text(WIDTH - 8, 16, unit, 12, FAINT, "end")
    y_of = lambda v: head + height * (top - v) / span  # noqa: E731
    marks = ticks(max(top, -low))
    for v in [v for v in (*(-v for v in marks[:0:-1]), *marks) if low <= v <= top]:
        d.line([(left, y_of(v)), (WIDTH - 8, y_of(v))], INK if v == 0 else RULE, 1)
        d.text(left - 8, y_of(v) + 4, f"{v:.3g}", 10.5, FAINT, "end")
    pitch = (WIDTH - left - 8) / len(bins)
    width = pitch * 0.8 / len(series)
    for i, bin in enumerate(bins):
        d.text(left + (i + 0.5) * pitch, head + height + 18, bin.sigma, 10.5, FAINT, "middle")
        d.text(left + (i + 0.5) * pitch, head + height + 33, bin.t and f"t {bin.t}", 10, FAINT, "middle")
        for j, (name, intervals) in enumerate(series.items()):
            if intervals[i] is not None and np.isfinite(intervals[i][0]):
                _bar(
                    d,
                    left + i * pitch + 0.1 * pitch + j * width,
                    width * 0.9,
                    *intervals[i],
                    y_of,
                    colours[j],
                    f"{name}, {bin.words}",
                )
    middle, foot = left + (WIDTH - left) / 2, head + height + 38 + 14 * has_t
    d.text(middle, foot, f"noise level sigma{' and timestep t' * has_t}: clean to noise", 11, FAINT, "middle")
    return d


def _bar(d: Drawing, x, width, mean: float, half: float, y_of, colour: Colour, label: str) -> None:
    a, b = sorted((y_of(0), y_of(mean)))
    d.rect(x, a, width, max(b - a, 0.5), colour, None, f"{label}: {mean:.3g} ± {half:.2g}")
    if np.isfinite(half):
        middle, low, high = x + width / 2, y_of(mean - half), y_of(mean + half)
        d.line([(middle, low), (middle, high)], INK, 1.4)
        for y in (low, high):
            d.line([(middle - 4, y), (middle + 4, y)], INK, 1.4)


FRACTION_LEGEND = (("time", TIME), ("class", LABEL), ("both together", BOTH))
