"""The report's pictures: numbers -> Drawing. Each fits a page of 1280 px and knows nothing of the report around it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..models.unet import Site
from ..render.grids import FAINT, HOLLOW, INK, PAPER
from ..render.text import shorten, text_width
from .drawing import BAND, BOTH, LABEL, TIME, Colour, Drawing, diverging, sequential
from .readings import part

WIDTH = 1160
RULE = (214, 214, 208)
Stack = Sequence[tuple[float, Colour]]


def ticks(top: float, most: int = 5) -> list[float]:
    """Round numbers from 0 to at most `top`."""
    if top <= 0:
        return [0.0]
    raw = top / most
    unit = 10 ** np.floor(np.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    return [float(step * i) for i in range(int(top / step + 1e-9) + 1)]


def _legend(d: Drawing, x: float, y: float, words: Sequence[tuple[str, Colour]]) -> None:
    for word, colour in words:
        d.rect(x, y - 10, 12, 12, colour, RULE)
        d.text(x + 17, y, word, 12, FAINT)
        x += 17 + text_width(word, 12) + 22


def _scale(d: Drawing, right: float, y: float, low: str, high: str, palette, signed: bool = False) -> None:
    """A colour scale that ends at `right`."""
    wide = 160
    start = right - text_width(high, 11) - 6 - wide
    d.cells(start, y - 10, wide, 12, palette(np.linspace(-1 if signed else 0, 1, 64))[None])
    d.text(start - 6, y, low, 11, FAINT, "end")
    d.text(start + wide + 6, y, high, 11, FAINT)


# ---------------------------------------------------------------------- the network


@dataclass(frozen=True)
class Place:
    """One site of the map: its class share (None: it is always told the same), and what to say when the pointer rests on it."""

    site: Site
    share: float | None
    hover: str


def network_map(places: Sequence[Place]) -> Drawing:
    """The U: depth to the right, resolution downwards, a box for each site, as wide as its channels."""
    sides = sorted({p.site.resolution for p in places}, reverse=True)
    left, gap, high, pitch, top = 74, 4 if len(places) <= 60 else 2, 42, 70, 44
    room = WIDTH - left - 10 - gap * (len(places) - 1)
    widest = max(p.site.channels for p in places)
    unit = min(110 / widest, room / sum(p.site.channels for p in places))
    start = left + (WIDTH - left - unit * sum(p.site.channels for p in places) - gap * (len(places) - 1)) / 2
    d = Drawing(WIDTH, top + pitch * len(sides) + 4)
    boxes, x = [], start
    for p in places:
        boxes.append((x, top + pitch * sides.index(p.site.resolution), unit * p.site.channels))
        x += unit * p.site.channels + gap
    if any(p.share is None for p in places):
        _legend(d, left, 16, [("always told the same", HOLLOW)])
    d.text(WIDTH / 2 - 60, 16, "colour: class share; width: channels", 12, FAINT, "middle")
    _scale(d, WIDTH - 4, 16, "follows time", "follows the class", lambda v: _share_colours((v + 1) / 2), signed=True)
    for row, side in enumerate(sides):
        y = top + pitch * row + high / 2
        d.text(left - 14, y + 4, f"{side}x{side}", 13, INK, "end")
        _skip(d, [(p, b) for p, b in zip(places, boxes) if p.site.resolution == side], y)
    _path(d, boxes, high)
    for p, (x, y, wide) in zip(places, boxes):
        fill = HOLLOW if p.share is None else tuple(_share_colours(np.array(p.share)))
        d.rect(x, y, wide, high, fill, FAINT, p.hover)
        if wide >= 30:
            d.text(x + wide / 2, y + 18, _share_word(p.share), 12, _ink_on(fill), "middle")
            d.text(x + wide / 2, y + 33, f"{p.site.channels} ch", min(10, wide / 4), _ink_on(fill), "middle")
    return d


def _share_colours(share: np.ndarray) -> np.ndarray:
    return diverging(2 * np.asarray(share) - 1)


def _share_word(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _ink_on(fill: Colour) -> Colour:
    return PAPER if 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] < 135 else INK


def _skip(d: Drawing, row: Sequence, y: float) -> None:
    """The skip connections of one resolution, as a dashed line from the encoder to the decoder."""
    ends = [b[0] + b[2] for p, b in row if part(p.site) == "down"]
    starts = [b[0] for p, b in row if part(p.site) == "up"]
    if not ends or not starts:
        return
    a, b = max(ends) + 4, min(starts) - 4
    for x in np.arange(a, b - 4, 9) if b - a > 20 else ():
        d.line([(x, y), (min(x + 4, b), y)], RULE, 1.5)


def _path(d: Drawing, boxes: Sequence[tuple[float, float, float]], high: float) -> None:
    for (x, y, wide), (next_x, next_y, next_wide) in pairwise(boxes):
        if y != next_y:
            down = next_y > y
            a = (x + wide / 2, y + high if down else y)
            b = (next_x + next_wide / 2, next_y if down else next_y + high)
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
    """One strip of bars over depth for each field. strips: {field: {site name: its stack, from the foot up}}.

    An empty stack is written "none"; a site without the field is left out. top, unit: what the whole height stands for.
    """
    left, high, between, head = 96, 96 if len(strips) > 2 else 120, 18, 30 if legend else 10
    pitch = (WIDTH - left - 8) / len(sites)
    foot = max(text_width(names[s.name], _label_size(pitch)) for s in sites) + 30
    d = Drawing(WIDTH, head + len(strips) * (high + between) + foot)
    _legend(d, left, 16, legend)
    for row, (field, stacks) in enumerate(strips.items()):
        y = head + row * (high + between)
        d.text(left - 34, y + high / 2 + 4, field, 14, INK, "end")
        d.text(left - 6, y + 9, unit, 10, FAINT, "end")
        d.text(left - 6, y + high, "0", 10, FAINT, "end")
        d.line([(left, y + high), (WIDTH - 8, y + high)], RULE)
        for column, site in enumerate(sites):
            if site.name in stacks:
                x = left + column * pitch
                hover = (
                    f"{site.name}: {field} {', '.join(f'{share / top * 100:.1f}%' for share, _ in stacks[site.name])}"
                )
                _stack(
                    d, x + 0.08 * pitch, y, 0.84 * pitch, high, stacks[site.name], top, hover if top == 1 else site.name
                )
    _site_axis(d, sites, names, left, head + len(strips) * (high + between) - between + 6, pitch)
    return d


def _stack(d: Drawing, x, y, wide, high, stack: Stack, top: float, hover: str) -> None:
    foot = y + high
    if not stack:
        d.rect(x, y, wide, high, HOLLOW, None, hover)
        d.text(x + wide / 2 + 4, y + high / 2, "none", min(11, max(7, wide * 0.8)), FAINT, "middle", upright=True)
    for share, colour in stack:
        tall = high * share / top
        foot -= tall
        d.rect(x, foot, wide, tall, colour, None, hover)


def _label_size(pitch: float) -> float:
    return min(11.0, max(8.0, pitch * 0.85))


def _site_axis(
    d: Drawing, sites: Sequence[Site], names: Mapping[str, str], left: float, y: float, pitch: float
) -> None:
    """A bracket for each run of one resolution, and the names below, turned; every second one where they would touch."""
    runs: list[list[int]] = []
    for column, site in enumerate(sites):
        if not runs or sites[runs[-1][-1]].resolution != site.resolution:
            runs.append([])
        runs[-1].append(column)
    for run in runs:
        a, b = left + run[0] * pitch + 2, left + (run[-1] + 1) * pitch - 2
        word = f"{sites[run[0]].resolution}x{sites[run[0]].resolution}"
        d.line([(a, y), (b, y)], FAINT, 1)
        if text_width(word, 11) <= b - a:
            d.text((a + b) / 2, y + 13, word, 11, INK, "middle")
    size = _label_size(pitch)
    every = max(1, int(np.ceil(size * 1.05 / pitch)))
    for column in range(0, len(sites), every):
        middle = left + (column + 0.5) * pitch + size * 0.35
        d.text(middle, y + 20, names[sites[column].name], size, FAINT, "end", upright=True)


# ---------------------------------------------------------------------- heat maps over time


@dataclass(frozen=True)
class Panel:
    """values: [rows, T]. whole: [T] drawn as a line above, on a scale of its own, with its word."""

    title: str
    values: np.ndarray
    whole: np.ndarray | None = None
    word: str = ""


def heat_maps(
    panels: Sequence[Panel], rows: Sequence[str], timesteps: Sequence[float], unit: str, one_scale: bool = True
) -> Drawing:
    """Rows x timesteps, panel beside panel; time runs from clean (left) to noise (right).

    Colours run from 0 to the largest value, of all panels or (one_scale False) of each, as its scale says.
    """
    order = np.argsort(timesteps, kind="stable")
    at = np.asarray(timesteps, dtype=float)[order]
    tall = min(22.0, max(9.5, 640 / len(rows)))
    size = min(11.0, tall * 0.86)
    left = max(min(max(text_width(r, size) for r in rows), 200) + 10, 40)
    between, lined = 28, any(p.whole is not None for p in panels)
    wide = (WIDTH - left - between * (len(panels) - 1) - 8) / len(panels)
    head = 70 + (78 if lined else 0)
    d = Drawing(WIDTH, head + tall * len(rows) + 40)
    ranges = "" if one_scale or len(panels) == 1 else "; every panel has a range of its own"
    d.text(left, 14, f"colour: {unit}{ranges}", 11.5, FAINT)
    largest = max(float(p.values.max()) for p in panels)
    for i, row in enumerate(rows):
        d.text(left - 8, head + (i + 0.5) * tall + size * 0.36, shorten(row, size, left - 10), size, INK, "end")
    for column, p in enumerate(panels):
        x, top = left + column * (wide + between), largest if one_scale else float(p.values.max())
        d.text(x, 36, shorten(p.title, 13, wide), 13)
        _scale(d, x + wide, 58, "0", f"{top:.3g}", sequential)
        if p.whole is not None:
            _whole(d, x, 72, wide, 62, p.whole[order], p.word)
        _heat(d, x, head, wide, tall, p.values[:, order], top, rows, at)
    return d


def _heat(d: Drawing, x, y, wide, tall, values: np.ndarray, top: float, rows: Sequence[str], at: np.ndarray) -> None:
    d.cells(x, y, wide, tall * len(rows), sequential(values / (top or 1)))
    d.rect(x, y, wide, tall * len(rows), None, RULE)
    for i, row in enumerate(rows):
        most = int(values[i].argmax())
        short_repr = f"{row}: at most {values[i, most]:.3g} (t = {at[most]:g}), {values[i].mean():.3g} on average"
        d.rect(x, y + i * tall, wide, tall, None, None, short_repr)
    _time_ticks(d, x, y + tall * len(rows), wide, at)


def _whole(d: Drawing, x, y, wide, high, values: np.ndarray, word: str) -> None:
    top = float(values.max())
    step = wide / len(values)
    points = [(x + (i + 0.5) * step, y + high - (high - 16) * v / (top or 1)) for i, v in enumerate(values)]
    d.line([(x, y + high), (x + wide, y + high)], RULE)
    d.line(points if len(points) > 1 else [(x, points[0][1]), (x + wide, points[0][1])], TIME, 2)
    d.text(x + wide, y + 8, f"{word}, at most {top:.3g}", 11, TIME, "end")


def _time_ticks(d: Drawing, x, y, wide, timesteps: np.ndarray) -> None:
    """Cells are columns: a tick stands under the middle of its own."""
    for i in _some(len(timesteps), max(2, int(wide / 70))):
        middle = x + (i + 0.5) * wide / len(timesteps)
        d.line([(middle, y), (middle, y + 4)], FAINT)
        d.text(middle, y + 16, f"{timesteps[i]:g}", 10.5, FAINT, "middle")
    d.text(x + wide / 2, y + 32, "timestep t: clean to noise", 11, FAINT, "middle")


def _some(count: int, most: int) -> range:
    """At most that many places of 0..count-1, evenly spaced."""
    return range(0, count, -(-count // most))


# ---------------------------------------------------------------------- classes


def cosine_map(cosine: np.ndarray, names: Sequence[str]) -> Drawing:
    """Cosines between classes, with their names beside and above."""
    k = len(names)
    cell = min(40.0, max(11.0, 620 / k))
    size = min(12.0, cell * 0.85)
    words = [shorten(n, size, 150) for n in names]
    longest = max(text_width(w, size) for w in words)
    turned = longest > cell - 4
    left, top = longest + 16, 34 + (longest if turned else size) + 10
    d = Drawing(max(left + cell * k + 16, 420), top + cell * k + 8)
    _scale(d, d.width - 4, 16, "cosine  -1", "+1", diverging, signed=True)
    d.cells(left, top, cell * k, cell * k, diverging(cosine))
    for i, word in enumerate(words):
        middle = top + (i + 0.5) * cell
        d.text(left - 8, middle + size * 0.36, word, size, INK, "end")
        along = left + (i + 0.5) * cell
        d.text(
            along + (size * 0.36 if turned else 0), top - 6, word, size, INK, "start" if turned else "middle", turned
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


# ---------------------------------------------------------------------- lines and bars over time


def lines_over_time(
    panels: Sequence[tuple[str, np.ndarray]],
    timesteps: Sequence[float],
    band: tuple[float, float] | None,
    word: str = "",
) -> Drawing:
    """A curve in each panel, side by side, and a shaded band of timesteps in the first."""
    order = np.argsort(timesteps, kind="stable")
    at = np.asarray(timesteps, dtype=float)[order]
    left, between, head, high = 52, 70, 42, 220
    wide = (WIDTH - left - between * (len(panels) - 1) - 16) / len(panels)
    d = Drawing(WIDTH, head + high + 46)
    span = at[-1] - at[0] or 1.0
    for column, (title, values) in enumerate(panels):
        x0 = left + column * (wide + between)
        place = lambda t, x0=x0: x0 + wide * (t - at[0]) / span  # noqa: E731
        top = float(values.max()) or 1.0
        d.text(x0, 16, title, 13)
        if band is not None and column == 0:
            a, b = place(band[0]), place(band[1])
            d.rect(a, head, max(b - a, 3), high, BAND, None, f"t = {band[0]:g} to {band[1]:g}")
            d.text(
                min(max((a + b) / 2, x0 + text_width(word, 11) / 2), x0 + wide - text_width(word, 11) / 2),
                head - 7,
                word,
                11,
                (40, 110, 70),
                "middle",
            )
        for v in ticks(top):
            y = head + high - high * v / top
            d.line([(x0, y), (x0 + wide, y)], RULE, 0.8)
            d.text(x0 - 7, y + 4, f"{v:.3g}", 10.5, FAINT, "end")
        points = [(place(t), head + high - high * v / top) for t, v in zip(at, values[order])]
        d.line(
            points if len(points) > 1 else [(x0, points[0][1]), (x0 + wide, points[0][1])],
            LABEL if column == 0 else TIME,
            2.2,
        )
        for t, v, (x, y) in zip(at, values[order], points):
            d.rect(x - 2.5, y - 2.5, 5, 5, LABEL if column == 0 else TIME, None, f"t = {t:g}: {v:.3g}")
        for i in _some(len(at), 8):
            d.text(place(at[i]), head + high + 18, f"{at[i]:g}", 10.5, FAINT, "middle")
        d.text(x0 + wide / 2, head + high + 36, "timestep t: clean to noise", 11, FAINT, "middle")
    return d


def interval_bars(
    series: Mapping[str, Sequence[tuple[float, float] | None]], bins: Sequence[str], unit: str
) -> Drawing:
    """Bars with their intervals, one of each series in each bin; None and nan are left out."""
    left, head, high = 78, 40, 240
    colours = [LABEL, TIME]
    finite = [
        (m, h if np.isfinite(h) else 0.0) for some in series.values() for m, h in filter(None, some) if np.isfinite(m)
    ]
    top = max([m + h for m, h in finite] + [0.0])
    low = min([m - h for m, h in finite] + [0.0])
    top = top if top > low else 1.0
    span = top - low
    d = Drawing(WIDTH, head + high + 48)
    _legend(d, left, 16, [(word, colour) for word, colour in zip(series, colours)])
    d.text(WIDTH - 8, 16, unit, 12, FAINT, "end")
    y_of = lambda v: head + high * (top - v) / span  # noqa: E731
    for v in [*ticks(top), *(-v for v in ticks(-low)[1:])]:
        d.line([(left, y_of(v)), (WIDTH - 8, y_of(v))], INK if v == 0 else RULE, 1)
        d.text(left - 8, y_of(v) + 4, f"{v:.3g}", 10.5, FAINT, "end")
    pitch = (WIDTH - left - 8) / len(bins)
    wide = pitch * 0.8 / len(series)
    for i, word in enumerate(bins):
        d.text(left + (i + 0.5) * pitch, head + high + 18, word, 10.5, FAINT, "middle")
        for j, (what, some) in enumerate(series.items()):
            if some[i] is not None and np.isfinite(some[i][0]):
                _bar(
                    d,
                    left + i * pitch + 0.1 * pitch + j * wide,
                    wide * 0.9,
                    *some[i],
                    y_of,
                    colours[j],
                    f"{what}, t = {word}",
                )
    d.text(left + (WIDTH - left) / 2, head + high + 38, "timestep t: clean to noise", 11, FAINT, "middle")
    return d


def _bar(d: Drawing, x, wide, mean: float, half: float, y_of, colour: Colour, word: str) -> None:
    a, b = sorted((y_of(0), y_of(mean)))
    d.rect(x, a, wide, max(b - a, 0.5), colour, None, f"{word}: {mean:.3g} ± {half:.2g}")
    if np.isfinite(half):
        middle, low, high = x + wide / 2, y_of(mean - half), y_of(mean + half)
        d.line([(middle, low), (middle, high)], INK, 1.4)
        for y in (low, high):
            d.line([(middle - 4, y), (middle + 4, y)], INK, 1.4)


SHARE_LEGEND = (("time", TIME), ("class", LABEL), ("both together", BOTH))
