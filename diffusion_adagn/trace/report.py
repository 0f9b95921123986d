"""What was found about a network's condition, as one HTML page that needs nothing else, and its pictures as PNGs.

write_report(Findings(title, what, atlas, influence=[...], label_use=...), Path("trace"))
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from ..evaluation.label_usage import LabelUse
from ..render.grids import labelled_grid
from ..render.text import number, one_line, shorten
from . import sentences as say
from .analysis import SILENT, STILL, Channels, ClassGeometry, channels, class_geometry
from .atlas import Atlas
from .drawing import BOTH, LABEL, TIME, Drawing, data_uri
from .plots import (
    SHARE_LEGEND,
    Panel,
    Place,
    cosine_map,
    heat_maps,
    interval_bars,
    lines_over_time,
    network_map,
    site_bars,
)
from .probes import Influence, Sensitivity
from .readings import Variance, class_spread, main_field, short_names, sites_with, summed, time_move, variances, where

LABEL_USE_BINS = 8  # of timesteps, for the use of the label
MAX_CHANNEL_ROWS = 24  # of the table of channels
MAX_NEAREST = 12  # classes whose nearest one is written beside the map


@dataclass
class Findings:
    """What was measured of one model; None or empty where it was not.

    title, what: its path, and a sentence on what it is. influence: by intervention. sensitivity: what the label changes over t.
    label_use: held-out losses, the only evidence that the label is used. mixing: row names and rows of uint8 [H, W, C] cells.
    drift: `analysis.drift` between two checkpoints. next_commands: what to type next.
    """

    title: str
    what: str
    atlas: Atlas
    influence: list[Influence] = field(default_factory=list)
    sensitivity: Sensitivity | None = None
    label_use: LabelUse | None = None
    mixing: tuple[list[str], list[list[np.ndarray]]] | None = None
    drift: dict | None = None
    next_commands: list[str] = field(default_factory=list)


@dataclass
class Section:
    """One picture (or table) under its heading and its sentence. name: of its PNG; None for none."""

    heading: str
    sentence: str
    name: str | None = None
    picture: Drawing | Image.Image | None = None
    html: str = ""


def write_report(findings: Findings, out: Path) -> list[Path]:
    """out/report.html and a PNG of every picture. Returns them, the page first."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    seen = TraceReport(findings)
    state, verdict = seen.verdict()
    sections = list(seen.sections())
    pictures = [(out / f"{s.name}.png", s.picture) for s in sections if s.picture is not None]
    for file, picture in pictures:
        picture.save(file)
    page = out / "report.html"
    page.write_text(_page(findings, state, verdict, sections), encoding="utf-8")
    return [page, *(file for file, _ in pictures)]


class TraceReport:
    """The findings with what is computed from them once."""

    def __init__(self, findings: Findings):
        self.found, self.atlas = findings, findings.atlas
        self.sites = [s.site for s in self.atlas.sites.values()]
        self.short = short_names([s.name for s in self.sites])
        self.spoken = {s.name: f"{s.resolution}x{s.resolution} {self.short[s.name]}" for s in self.sites}
        self.classes = self.atlas.num_classes
        self.by_field = variances(self.atlas)
        self.by_site: dict[str, Variance] = {
            s.name: summed(some[s.name] for some in self.by_field.values() if s.name in some) for s in self.sites
        }
        self.told = sum(v.classes for v in self.by_site.values())
        self.main = main_field(self.atlas)

    def verdict(self) -> tuple[str, str]:
        return say.verdict(self.found.label_use, self.found.sensitivity, self.told, self.classes)

    def sections(self) -> Iterator[Section]:
        found = self.found
        yield self._map()
        yield self._shares()
        yield self._spread()
        if {"gamma", "beta"} & set(self.by_field):
            yield self._channels()
        yield from self._class_geometry()
        if found.influence:
            yield self._influence(found.influence)
        if found.sensitivity is not None:
            yield self._sensitivity(found.sensitivity)
        if found.label_use is not None and self.classes:
            yield self._label_use(found.label_use)
        if found.mixing is not None and found.mixing[1]:
            yield self._mixing(*found.mixing)
        if found.drift:
            yield self._drift(found.drift)
        if found.next_commands:
            commands = "\n".join(map(one_line, found.next_commands))
            yield Section("What to type next", "", html=f"<pre>{escape(commands)}</pre>")

    # ------------------------------------------------------------------ what sites are told

    def _map(self) -> Section:
        places = [Place(s, self.by_site[s.name].class_share, self._hover(s)) for s in self.sites]
        some = [(s, self.by_field[self.main][s.name]) for s in self.sites if s.name in self.by_field[self.main]]
        sentence = say.class_entry(self.main, some, self.classes, self.short)
        return Section("Where time and class enter", sentence, "map", network_map(places))

    def _hover(self, site) -> str:
        parts = [f"{what}: {say.follows(some[site.name])}" for what, some in self.by_field.items() if site.name in some]
        return f"{site.name}: {where(site)}, {site.channels} channels; variance of {'; of '.join(parts)}"

    def _shares(self) -> Section:
        strips = {what: {name: _stack(v) for name, v in some.items()} for what, some in self.by_field.items()}
        sentence = say.field_shares(self.by_field, self.classes, self.spoken)
        return Section(
            "What each site follows", sentence, "shares", site_bars(self.sites, strips, self.short, legend=SHARE_LEGEND)
        )

    def _spread(self) -> Section:
        names = [self.spoken[s.site.name] for s in sites_with(self.atlas, self.main)]
        spread, moved = class_spread(self.atlas, self.main), time_move(self.atlas, self.main)
        timesteps = self.atlas.timesteps
        panels = [
            Panel(f"how much {self.main} differs between the classes at t", spread),
            Panel(f"how far {self.main} at t stands from its mean over time", moved),
        ]
        sentence = say.spread_over_time(self.main, spread, moved, names, timesteps, self.classes)
        return Section(
            "Class against time", sentence, "spread", heat_maps(panels, names, timesteps, f"RMS of {self.main}")
        )

    def _channels(self) -> Section:
        health = {
            self.spoken[name]: channels(s) for name, s in self.atlas.sites.items() if {"gamma", "beta"} & set(s.fields)
        }
        return Section("Channels", say.channel_health(health), html=_channel_table(health))

    def _class_geometry(self) -> Iterator[Section]:
        geometry = class_geometry(self.atlas)
        sentence = say.classes_lie(geometry, self.told, self.classes)
        if geometry is None or not self.told:
            yield Section("How the classes lie", sentence)
            return
        picture = cosine_map(geometry.cosine, geometry.names)
        yield Section("How the classes lie", sentence, "classes", picture, _nearest_table(geometry))

    # ------------------------------------------------------------------ what the picture becomes

    def _influence(self, some: list[Influence]) -> Section:
        rows = [self.spoken.get(g, g) for g in some[0].groups]
        panels = [
            Panel(say.SHORTLY.get(i.intervention, i.intervention), i.change, i.whole, "every site at once")
            for i in some
        ]
        alike = [(i, p) for i, p in zip(some, panels) if (i.groups, i.timesteps) == (some[0].groups, some[0].timesteps)]
        sentence = " ".join(say.site_influence(i, self.spoken) for i, _ in alike)
        picture = heat_maps(
            [p for _, p in alike],
            rows,
            some[0].timesteps,
            "RMS change of the predicted x0, pixels from -1 to 1",
            one_scale=False,
        )
        return Section("What each site does to the picture", sentence, "influence", picture)

    def _sensitivity(self, s: Sensitivity) -> Section:
        unused = self.verdict()[0] == "unused"
        band = s.band(say.BAND) if say.has_band(s) and not unused else None
        panels = [
            (f"RMS change of x0 (pixels from -1 to 1), class against {s.against}", s.x0),
            (f"RMS of the network's own prediction, class less {s.against}", s.prediction),
        ]
        word = f"candidate: t = {band[0]} to {band[1]}" if band else ""
        picture = lines_over_time(panels, s.timesteps, band, word)
        return Section("When the label matters", say.guidance_band(s, unused), "sensitivity", picture)

    def _label_use(self, use: LabelUse) -> Section:
        edges = [round(use.num_timesteps * i / LABEL_USE_BINS) for i in range(LABEL_USE_BINS + 1)]
        measured = {against: _gaps(use, against) for against in ("wrong", "null") if getattr(use, against) is not None}
        if "wrong" not in measured:
            return Section("When the label is used", "There is no wrong label to compare the true one with.")
        words = {"wrong": "wrong label less true label", "null": "null label less true label"}
        picture = interval_bars(
            {words[a]: gaps for a, gaps in measured.items()},
            [f"{a}–{b - 1}" for a, b in pairwise(edges)],
            "held-out loss, 95% intervals",
        )
        return Section("When the label is used", say.use_over_time(measured["wrong"], edges), "label_use", picture)

    def _mixing(self, names: list[str], rows: list[list[np.ndarray]]) -> Section:
        sheet = labelled_grid(rows, names, min_side=64)
        return Section(
            "Classes mixed", f"{say.rows_differ(names, rows)} A column starts from one noise.", "mixing", sheet
        )

    def _drift(self, moved: dict) -> Section:
        finite = [r for fields in moved.values() for r in fields.values() if np.isfinite(r)]
        top = max(finite, default=0.0) or 1.0
        strips: dict[str, dict] = {}
        for site, fields in moved.items():
            for what, ratio in fields.items():
                strips.setdefault(what, {})[site] = [(min(ratio, top), TIME)] if ratio else []
        sites = [s for s in self.sites if s.name in moved]
        picture = site_bars(sites, strips, self.short, top, say.percent_of(top))
        return Section("What moved between the checkpoints", say.how_far_drifted(moved, self.spoken), "drift", picture)


def _stack(v: Variance) -> list[tuple[float, tuple[int, int, int]]]:
    if not v.total:
        return []
    return [(share / v.total, colour) for share, colour in zip(v, (TIME, LABEL, BOTH)) if share]


def _gaps(use: LabelUse, against: str) -> list[tuple[float, float] | None]:
    bins = [(i / LABEL_USE_BINS, (i + 1) / LABEL_USE_BINS) for i in range(LABEL_USE_BINS)]
    inside = [((use.t >= a * use.num_timesteps) & (use.t < b * use.num_timesteps)).any() for a, b in bins]
    return [use.gap(against, a, b) if some else None for (a, b), some in zip(bins, inside)]


# ---------------------------------------------------------------------- the page


def _channel_table(health: dict[str, Channels]) -> str:
    """The sites with something to tell, those with most of it first."""
    odd = {name: c for name, c in health.items() if c.silenced or c.flipped or c.constant}
    most = sorted(odd, key=lambda name: -max(odd[name].silenced, odd[name].flipped, odd[name].constant) / odd[name].of)
    if not odd:
        return ""
    kept = [name for name in odd if name in most[:MAX_CHANNEL_ROWS]]
    rows = [[escape(name), f"{odd[name].of:,}", *(_part(n, odd[name].of) for n in _counts(odd[name]))] for name in kept]
    left_out = len(health) - len(kept)
    foot = (
        f"<p class=faint>{left_out} more {'site has' if left_out == 1 else 'sites have'} fewer or none.</p>"
        if left_out
        else ""
    )
    return _table(["site", "channels", "silenced", "flipped", "constant"], rows) + foot


def _counts(c: Channels) -> tuple[int, int, int]:
    return c.silenced, c.flipped, c.constant


def _part(count: int, of: int) -> str:
    """A count with a bar of its share behind it."""
    share = 100 * count / of
    return (
        f'<span class=bar style="background-size:{share:.1f}% 100%">{count:,}</span>'
        if count
        else "<span class=bar>–</span>"
    )


def _nearest_table(geometry: ClassGeometry) -> str:
    """The classes that have the nearest neighbours, nearest first."""
    distance = geometry.distance + np.where(np.eye(len(geometry.names), dtype=bool), np.inf, 0)
    order = np.argsort(distance.min(1), kind="stable")[:MAX_NEAREST]
    rows = [
        [
            escape(shorten(geometry.names[i], 13, 190)),
            escape(shorten(geometry.nearest[i], 13, 190)),
            number(distance[i].min()),
        ]
        for i in order
    ]
    return _table(["class", "nearest", "distance"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells: Callable[[str, list[str]], str] = lambda tag, row: "".join(f"<{tag}>{c}</{tag}>" for c in row)  # noqa: E731
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _figure(s: Section) -> str:
    if isinstance(s.picture, Drawing):
        drawn = s.picture.svg(s.heading)
    elif s.picture is not None:
        drawn = f'<img alt="{escape(s.heading)}" src="{data_uri(s.picture)}">'
    else:
        drawn = ""
    parts = "".join(f"<div>{part}</div>" for part in (drawn, s.html) if part)
    sentence = f"<p class=says>{escape(one_line(s.sentence))}</p>" if s.sentence else ""
    return f"<section><h2>{escape(s.heading)}</h2>{sentence}<div class=figure>{parts}</div></section>"


def _page(findings: Findings, state: str, verdict: str, sections: list[Section]) -> str:
    atlas = findings.atlas
    about = (
        f"conditioning {atlas.conditioning}; {len(atlas.sites)} sites; {len(atlas.timesteps)} timesteps "
        f"({atlas.timesteps.min():g} to {atlas.timesteps.max():g}); {atlas.num_classes:,} classes"
        + (" and null" if atlas.null_id is not None else "")
    )
    meanings = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in MEANINGS)
    headline, _, numbers = one_line(verdict).partition(". ")
    headline = headline.rstrip(".") + "."
    title = escape(one_line(findings.title))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}: what the condition does</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"<header><p class=faint>{title}</p><h1 class={state}>{escape(headline)}</h1><p class=says>{escape(numbers)}</p>"
        f"<p class=faint>{escape(one_line(findings.what))}; {escape(about)}.</p></header>\n"
        + "\n".join(map(_figure, sections))
        + f"\n<details><summary>What each number means</summary><dl>{meanings}</dl></details>\n</body>\n</html>\n"
    )


STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; padding: 28px 40px 60px; max-width: 1180px; background: #fafaf8; color: #202226;
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; overflow-wrap: anywhere }
h1 { font-size: 34px; line-height: 1.25; margin: 8px 0 10px; padding-left: 18px; border-left: 8px solid #747880 }
h1.used { border-color: #009e73 } h1.unused { border-color: #d55e00 } h1.open { border-color: #e6b400 }
h2 { font-size: 14px; font-weight: 600; color: #747880; margin: 0 0 2px }
section { border-top: 1px solid #dcdcd6; margin-top: 26px; padding-top: 16px }
.says { font-size: 18px; line-height: 1.4; margin: 0 0 14px; max-width: 1040px }
.faint { color: #747880; margin: 4px 0 }
.figure { display: flex; flex-wrap: wrap; gap: 36px; align-items: flex-start }
.figure > div { max-width: 100% }
svg, img { max-width: 100%; height: auto; display: block }
.cells { image-rendering: pixelated }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 500; color: #747880; font-size: 13px }
td, th { padding: 2px 18px 2px 0; border-bottom: 1px solid #ecece8 }
.bar { display: inline-block; min-width: 90px; padding: 0 4px;
  background: linear-gradient(#f3c9a8, #f3c9a8) no-repeat; background-size: 0 100% }
pre { background: #f0f0ea; padding: 12px 16px; margin: 0; white-space: pre-wrap }
details { margin-top: 34px; border-top: 1px solid #dcdcd6; padding-top: 14px } summary { cursor: pointer }
dt { font-weight: 600; margin-top: 10px } dd { margin: 0; max-width: 1000px }
"""

MEANINGS = [
    (
        "Names of sites",
        "down, middle, up: the encoder, the middle, the decoder. up 1.0 is the first block of the decoder's second level; r is the block that "
        "resamples; a and b are the two norms of a block where both are told. Rest the pointer on a picture for the numbers.",
    ),
    (
        "Is the label used?",
        "Loss on held-out pictures told a wrong class (another held-out picture's, each class as often as it is true) less the loss told the "
        "true one, on the same picture, timestep and noise. Used: the whole 95% interval of the mean over pictures lies above 0. A network may "
        "respond to its label, and even an untrained one does, without using it: only held-out losses tell.",
    ),
    (
        "Shares of variance",
        "Of what a site is told, over the grid of timesteps and all classes (null left out), summed over channels: the part that depends on "
        "time alone, on the class alone, and on both together; they sum to 1. none: nothing varies beyond rounding.",
    ),
    (
        "The class share of a site",
        "Class alone and both together, of the variance of all that the site is told. Between-class variance is the same sum "
        "before it is divided: the variance between the classes at one timestep, averaged over the timesteps.",
    ),
    (
        "Words that turn on a threshold",
        f"The class enters mostly at one place: at least {say.MOSTLY:.0%} of all between-class variance. Sites follow time: a class share of at "
        f"most {say.FOLLOWS:.0%}; follow the class: of at least {1 - say.FOLLOWS:.0%}. Alone: a share of at least {say.ALONE:.1%}. Everywhere alike: no place's part of it is more than {say.EVEN:g} times its part of the channels, or less than 1 / {say.EVEN:g}. About as much: the "
        f"largest is at most {say.EVEN:g} times the smallest. Told the same: classes nearer than {say.SAME_CLASS_DISTANCE:g} of the mean distance of a class from "
        f"the mean of the classes. No kin: every cosine within {say.UNRELATED:g} of -1 / (classes - 1). Much the same: a cosine of at "
        f"least {say.CLEARLY_ALIKE:g}.",
    ),
    (
        "Class against time",
        "At one timestep: RMS over channels of the standard deviation over the classes whose values are kept (null left out); and how far "
        "the mean over all classes stands from its own mean over time, RMS over channels. Both on one colour scale.",
    ),
    (
        "Channels",
        "The gain that a channel meets is w (1 + gamma), the shift b (1 + gamma) + beta, with the norm's own w and b. Over all timesteps "
        f"and kept classes, silenced: |gain| stays below {SILENT:.0%} of the site's median |gain|; flipped: the gain changes its sign; constant: "
        f"neither gain nor shift moves by more than {STILL:.0%} of that median.",
    ),
    (
        "How the classes lie",
        "All that all sites are told about a class, averaged over time, as one vector, less the mean over the classes: the cosine between two of them, "
        "and their distance. Unrelated classes have cosines near -1 / (classes - 1).",
    ),
    (
        "Influence and sensitivity",
        "RMS over pictures, channels and positions of how far the predicted x0 moves (pixels run from -1 to 1, so 2 is from black to white) "
        "when one site, or all of them, are told something else, on the same noisy pictures. Each map and each line has a scale of its own.",
    ),
    (
        "The candidate band",
        f"From the first to the last timestep at which the label moves x0 by at least {say.BAND:.0%} of the most it does anywhere. Where to try "
        "guidance, not where it is known to help: a sweep over intervals says.",
    ),
    ("Drift", "RMS of the difference between the two checkpoints, over the RMS of the earlier one."),
]
