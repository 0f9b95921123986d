"""The trace's charts: numbers -> matplotlib Figure. None depends on the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..models.unet import Site
from ..render.figures import (
    COLOURS,
    DIVERGING,
    FAINT,
    HOLLOW,
    INK,
    RULE,
    SEQUENTIAL,
    WIDTH,
    category_axis,
    chart,
    colour_map,
    ink_on,
    new_figure,
    without_frame,
)
from ..render.text import shorten
from .analysis import network_half
from .levels import LevelBin, NoiseLevels, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TIME, LABEL, BOTH = COLOURS[0], COLOURS[1], "#BEAE78"
BAND = "#CDE6D8"
MAX_NAMED = 60  # sites whose names fit below one chart


# ---------------------------------------------------------------------- the network


@chart
def network_map(sites: Sequence[Site], fractions: Sequence[float | None]) -> Figure:
    """The U-Net: depth to the right, resolution downwards, one box per site, as wide as its channels.

    Args:
        sites: in the order of depth.
        fractions: of each site, the class fraction of its variance; None where nothing varies.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shade = colour_map(DIVERGING)
    fills = [HOLLOW if f is None else shade(f) for f in fractions]
    figure, ax = _network(sites, fills, ["–" if f is None else f"{f:.0%}" for f in fractions])
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), shade), ax=ax, location="bottom", shrink=0.5, aspect=45)
    bar.set_ticks([0, 0.5, 1], labels=["0%: follows time", "50%", "100%: follows the class"])
    constant = "; –: constant" if None in fractions else ""
    bar.set_label(f"class fraction of the variance{constant}; width of a box: channels")
    return figure


@chart
def class_map(sites: Sequence[Site], classes: Sequence[str], legend: Sequence[str]) -> Figure:
    """The U-Net of `network_map`, each site in the colour of the class that it receives.

    Args:
        sites: in the order of depth.
        classes: of each site, the name of its class.
        legend: the names of all classes, each with a colour of its own.
    """
    from matplotlib.patches import Patch

    colour = {name: COLOURS[(i + 1) % len(COLOURS)] for i, name in enumerate(dict.fromkeys(legend))}
    figure, _ = _network(sites, [colour[name] for name in classes], [shorten(name, 9) for name in classes])
    handles = [Patch(color=fill, label=f"class {shorten(name, 30)}") for name, fill in colour.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _network(sites: Sequence[Site], fills: Sequence, words: Sequence[str]) -> tuple[Figure, Axes]:
    """A box per site with its colour and its word, the path through them, and dashed skip connections."""
    from matplotlib.patches import Rectangle

    sides = sorted({s.resolution for s in sites}, reverse=True)
    figure = new_figure(0.75 * len(sides) + 0.9)
    ax = figure.subplots()
    widths = np.array([s.channels for s in sites]) / np.mean([s.channels for s in sites])
    left = np.concatenate([[0], np.cumsum(widths + 0.12)[:-1]])
    row = [sides.index(s.resolution) for s in sites]
    for i, side in enumerate(sides):
        half = {
            way: [j for j, s in enumerate(sites) if (s.resolution, network_half(s)) == (side, way)]
            for way in ("down", "up")
        }
        if all(half.values()):
            ends = left[half["down"][-1]] + widths[half["down"][-1]], left[half["up"][0]]
            ax.plot(ends, [i, i], color=FAINT, linestyle=":", zorder=1)
    for a, b in pairwise(range(len(sites))):
        if row[a] != row[b]:
            x = left[[a, b]] + widths[[a, b]] / 2
            y = row[a] + (0.3 if row[b] > row[a] else -0.3), row[b] - (0.3 if row[b] > row[a] else -0.3)
            ax.plot([x[0], x[0], x[1], x[1]], [y[0], sum(y) / 2, sum(y) / 2, y[1]], color=FAINT, linewidth=1, zorder=1)
    room = WIDTH * 0.9 * 13 / (left[-1] + widths[-1])  # characters in a box of width 1
    for s, x, width, y, fill, word in zip(sites, left, widths, row, fills, words):
        ax.add_patch(Rectangle((x, y - 0.3), width, 0.6, facecolor=fill, edgecolor=FAINT, linewidth=0.8))
        if len(word) <= room * width:
            ax.text(x + width / 2, y - 0.1, word, color=ink_on(fill), ha="center", va="center", fontsize=9)
            if len(f"{s.channels} ch") <= room * width:
                ax.text(
                    x + width / 2,
                    y + 0.14,
                    f"{s.channels} ch",
                    color=ink_on(fill),
                    ha="center",
                    va="center",
                    fontsize=7.5,
                )
    ax.set(xlim=(-0.15, left[-1] + widths[-1] + 0.15), ylim=(len(sides) - 0.5, -0.5), xticks=[])
    category_axis(ax.yaxis, [f"{side}x{side}" for side in sides])
    without_frame(ax)
    return figure, ax


# ---------------------------------------------------------------------- bars over depth


@chart
def site_bars(
    sites: Sequence[Site],
    strips: Mapping[str, Mapping[str, Sequence[float]]],
    names: Mapping[str, str],
    parts: Sequence[tuple[str, str]],
    unit: str = "",
    percent: bool = False,
) -> Figure:
    """Stacked bars over depth, one strip for each field.

    Args:
        sites: Sites in the order of depth.
        strips: {field: {site name: its parts, from bottom to top}}. A site without the field is skipped; without parts,
            or with parts of 0, it reads "none".
        names: Short names of the sites.
        parts: The name and colour of each part.
        unit: What the height is.
        percent: Heights are fractions of 1.
    """
    figure = new_figure(1.35 * len(strips) + 1.3)
    axes = figure.subplots(len(strips), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    order = {s.name: i for i, s in enumerate(sites)}
    for ax, (field, stacks) in zip(axes, strips.items()):
        here = [name for name in order if name in stacks]
        floor = np.zeros(len(here))
        for i, (label, colour) in enumerate(parts):
            heights = np.array([stacks[name][i] if len(stacks[name]) else 0.0 for name in here])
            ax.bar([order[name] for name in here], heights, bottom=floor, color=colour, width=0.84, label=label)
            floor += heights
        for name, height in zip(here, floor):
            if not height:
                ax.text(order[name], 0, " none", rotation=90, ha="center", va="bottom", color=FAINT, fontsize=8)
        ax.set_ylabel(field)
        ax.grid(False, axis="x")
        if percent:
            ax.set(ylim=(0, 1), yticks=[0, 0.5, 1], yticklabels=["0%", "50%", "100%"])
    _site_axis(axes, sites, names)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)
    if unit:
        figure.supylabel(unit, fontsize=10)
    return figure


def _site_axis(axes: Sequence[Axes], sites: Sequence[Site], names: Mapping[str, str]) -> None:
    """The sites' names below, their resolutions above, and lines between the resolutions."""
    every = -(-len(sites) // MAX_NAMED)
    shown = range(0, len(sites), every)
    axes[-1].set_xticks(shown, [names[sites[i].name] for i in shown], rotation=90)
    for side, group in groupby(range(len(sites)), key=lambda i: sites[i].resolution):
        first, *_, last = [*group] * 2
        transform = axes[0].get_xaxis_transform()
        axes[0].text((first + last) / 2, 1.04, f"{side}x{side}", transform=transform, ha="center", fontsize=9)
        for ax in axes:
            if last < len(sites) - 1:
                ax.axvline(last + 0.5, color=RULE, linewidth=1)
    axes[-1].set_xlim(-0.6, len(sites) - 0.4)


# ---------------------------------------------------------------------- over noise levels


def level_axis(ax: Axes, levels: NoiseLevels, limits: tuple[float, float] | None = None) -> None:
    """The measured noise levels on the x axis: sigma, on a logarithmic scale, and the timestep t below it."""
    places, across = levels.places, ax.get_subplotspec().get_gridspec().ncols
    low, high = places.min(), places.max()
    pad = 0.5 if high == low else 0.02 * (high - low)
    ax.set_xlim(*limits or (low - pad, high + pad))
    ax.grid(False, axis="x")
    shown: list[int] = []
    for i in np.argsort(places, kind="stable"):
        if not shown or places[i] - places[shown[-1]] >= 0.055 * across * (high - low):
            shown.append(i)
    axes = {"noise level sigma: clean to noise": levels.sigmas, "timestep t": levels.times if levels.has_t else None}
    axes = {name: values for name, values in axes.items() if values is not None}
    ax.set_xticks(places[shown], ["\n".join(short(values[i]) for values in axes.values()) for i in shown])
    ax.set_xlabel("\n".join(axes))


@dataclass(frozen=True)
class Panel:
    """values: [rows, T]. total: [T], drawn as a line above."""

    title: str
    values: np.ndarray
    total: np.ndarray | None = None


@chart
def heat_maps(panels: Sequence[Panel], rows: Sequence[str], levels: NoiseLevels, unit: str, total: str = "") -> Figure:
    """Heat maps of rows x noise levels, side by side, in one range of colours. total: what the lines above are."""
    lined = any(p.total is not None for p in panels)
    height = max(1.6, min(0.22 * len(rows), 9.0))
    figure = new_figure(height + 2.0 + 1.1 * lined)
    grid = figure.add_gridspec(1 + lined, len(panels), height_ratios=[1.1, height][1 - lined :])
    order, edges = np.argsort(levels.places, kind="stable"), _edges(np.sort(levels.places))
    shade, largest = colour_map(SEQUENTIAL), max(float(p.values.max()) for p in panels) or 1.0
    highest = 1.05 * max((float(p.total.max()) for p in panels if p.total is not None), default=0) or 1
    figure.get_layout_engine().set(wspace=0.05)
    line = heat = None
    for i, p in enumerate(panels):
        heat = top = figure.add_subplot(grid[-1, i], sharey=heat)
        corners = edges, np.arange(len(rows) + 1) - 0.5
        mesh = heat.pcolormesh(*corners, p.values[:, order], cmap=shade, vmin=0, vmax=largest, rasterized=True)
        heat.grid(False)
        if i == 0:
            category_axis(heat.yaxis, list(rows), 30)
            heat.invert_yaxis()
        heat.tick_params(axis="y", labelleft=i == 0, labelsize=9 if len(rows) <= 45 else 5.5)
        if lined:
            line = top = figure.add_subplot(grid[0, i], sharex=heat, sharey=line)
            line.plot(levels.places[order], p.total[order], color=TIME, marker="o", markersize=3)
            line.set_ylim(0, highest)
            line.set_ylabel(total if i == 0 else "")
            line.tick_params(labelbottom=False, labelleft=i == 0)
        level_axis(heat, levels, (edges[0], edges[-1]))
        top.set_title(p.title)
    figure.colorbar(mesh, ax=figure.axes, label=unit, pad=0.01, aspect=30)
    return figure


def _edges(places: np.ndarray) -> np.ndarray:
    """The ends of cells around places in order [T]: [T + 1], halfway between them."""
    if len(places) == 1:
        return np.array([places[0] - 0.5, places[0] + 0.5])
    return np.concatenate([places[:1], (places[1:] + places[:-1]) / 2, places[-1:]])


@chart
def lines_over_levels(
    panels: Sequence[tuple[str, np.ndarray]], levels: NoiseLevels, band: tuple[int, int] | None, label: str = ""
) -> Figure:
    """A curve in each panel, panels side by side, and in the first a shaded band from one index of the levels to another."""
    figure = new_figure(3.9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    order = np.argsort(levels.places, kind="stable")
    for i, (ax, (title, values)) in enumerate(zip(axes, panels)):
        if band is not None and i == 0:
            ax.axvspan(*levels.places[list(band)], color=BAND, zorder=0, label=label)
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        ax.plot(levels.places[order], values[order], color=(LABEL, TIME)[i % 2], marker="o")
        ax.set_ylim(bottom=0)
        ax.set_ylabel(title)
        level_axis(ax, levels)
    return figure


@chart
def interval_bars(
    series: Mapping[str, Sequence[tuple[float, float] | None]], bins: Sequence[LevelBin], unit: str
) -> Figure:
    """Points with their intervals, one for each series and bin; None and nan are skipped."""
    figure = new_figure(3.8)
    ax = figure.subplots()
    for i, (name, intervals) in enumerate(series.items()):
        found = [(j, *one) for j, one in enumerate(intervals) if one is not None and np.isfinite(one[0])]
        x, mean, half = np.array(found or np.empty((0, 3))).T
        offset = 0.18 * (i - (len(series) - 1) / 2)
        style = {"color": (LABEL, TIME)[i % 2], "marker": "os"[i % 2], "linestyle": "none", "label": name}
        ax.errorbar(x + offset, mean, np.nan_to_num(half), markersize=7, elinewidth=2, capsize=4, **style)
    ax.axhline(0, color=INK, linewidth=1)
    ax.set_ylabel(unit)
    ax.grid(False, axis="x")
    words = [f"{b.sigma}\nt {b.t}" if b.t else b.sigma for b in bins]
    ax.set_xticks(range(len(bins)), words)
    ax.set_xlim(-0.5, len(bins) - 0.5)
    ax.set_xlabel(f"noise level sigma{' and timestep t' * any(b.t for b in bins)}: clean to noise")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return figure


# ---------------------------------------------------------------------- classes


@chart
def cosine_map(cosine: np.ndarray, names: Sequence[str]) -> Figure:
    """Cosines between classes [K, K], with the class names on both axes."""
    k = len(names)
    side = min(max(0.42 * k + 1.8, 4.2), 8.5)
    figure = new_figure(side, side + 1.2)
    ax = figure.subplots()
    shade = colour_map(DIVERGING)
    image = ax.imshow(cosine, cmap=shade, vmin=-1, vmax=1)
    size = 9 if k <= 30 else max(3.5, 270 / k)
    category_axis(ax.yaxis, list(names), 22, fontsize=size)
    category_axis(ax.xaxis, list(names), 22, fontsize=size, rotation=0 if max(map(len, names)) <= 3 else 90)
    ax.xaxis.tick_top()
    without_frame(ax)
    if k <= 16:
        for i, j in ((i, j) for i in range(k) for j in range(k) if i != j):
            value = cosine[i, j]
            text = "0" if abs(value) < 0.05 else f"{value:+.1f}"
            ax.text(j, i, text, ha="center", va="center", fontsize=8.5, color=ink_on(shade((value + 1) / 2)))
    figure.colorbar(image, label="cosine between two classes", shrink=0.7)
    return figure
