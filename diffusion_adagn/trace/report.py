"""The report on a network's conditioning: one self-contained HTML page, and its images as PNGs.

write_report(TraceResults(title, description, atlas, influence=[...], label_use=...), Path("trace"))
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ..diffusion.process import Process
from ..evaluation.label_usage import LabelUse
from ..render.grids import labelled_grid
from ..render.text import number, one_line, shorten
from . import sentences as say
from .analysis import (
    CONSTANT,
    SILENCED,
    ChannelCounts,
    ClassGeometry,
    Variance,
    class_geometry,
    class_spread,
    count_channels,
    describe_position,
    main_field,
    short_names,
    sites_with,
    sum_variances,
    time_shift,
    variances,
)
from .atlas import Atlas
from .drawing import BOTH, LABEL, TIME, Drawing, data_uri
from .learned import LearnedTrace
from .levels import training_bins
from .plots import (
    FRACTION_LEGEND,
    Panel,
    SiteBox,
    cosine_map,
    heat_maps,
    interval_bars,
    lines_over_levels,
    network_map,
    site_bars,
)
from .probes import Influence, Sensitivity

LABEL_USE_BINS = 8  # of noise levels, equally frequent in training
MAX_CHANNEL_ROWS = 24  # sites in the table of channels
MAX_NEAREST = 12  # classes in the table of nearest classes


@dataclass
class TraceResults:
    """What was measured of one model; None or empty where it was not.

    Args:
        title: The model's path.
        description: A sentence on which weights it has.
        atlas: Its modulation.
        influence: One for each intervention.
        sensitivity: What the label changes, by noise level.
        label_use: Held-out losses, the only evidence that the label is used.
        process: Its training noise is that of `label_use`.
        mixing: Row names, and rows of uint8 [H, W, C] images.
        drift: `analysis.drift` between two checkpoints.
        learned: One for each learned class that was loaded.
        next_commands: Commands to type next.
    """

    title: str
    description: str
    atlas: Atlas
    influence: list[Influence] = field(default_factory=list)
    sensitivity: Sensitivity | None = None
    label_use: LabelUse | None = None
    process: Process | None = None
    mixing: tuple[list[str], list[list[np.ndarray]]] | None = None
    drift: dict | None = None
    learned: list[LearnedTrace] = field(default_factory=list)
    next_commands: list[str] = field(default_factory=list)


@dataclass
class Section:
    """One image (or table) under its heading and its sentence. name: file name of its PNG; None without an image."""

    heading: str
    sentence: str
    name: str | None = None
    image: Drawing | Image.Image | None = None
    html: str = ""


def write_report(results: TraceResults, out: Path) -> list[Path]:
    """Write out/report.html and a PNG of every image. Returns the files, the page first."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    report = TraceReport(results)
    state, verdict = report.verdict()
    sections = list(report.sections())
    images = [(out / f"{s.name}.png", s.image) for s in sections if s.image is not None]
    for file, image in images:
        image.save(file)
    page = out / "report.html"
    page.write_text(_page(results, state, verdict, sections), encoding="utf-8")
    return [page, *(file for file, _ in images)]


class TraceReport:
    """The results, and what is computed from them once."""

    def __init__(self, results: TraceResults):
        self.results, self.atlas = results, results.atlas
        self.sites = [s.site for s in self.atlas.sites.values()]
        self.short = short_names([s.name for s in self.sites])
        self.display_names = {s.name: f"{s.resolution}x{s.resolution} {self.short[s.name]}" for s in self.sites}
        self.classes = self.atlas.num_classes
        self.by_field = variances(self.atlas)
        self.by_site: dict[str, Variance] = {
            s.name: sum_variances(by_name[s.name] for by_name in self.by_field.values() if s.name in by_name)
            for s in self.sites
        }
        self.class_variance = sum(v.classes for v in self.by_site.values())
        self.main = main_field(self.atlas)

    def verdict(self) -> tuple[str, str]:
        return say.verdict(self.results.label_use, self.results.sensitivity, self.class_variance, self.classes)

    def sections(self) -> Iterator[Section]:
        results = self.results
        yield self._map()
        yield self._shares()
        yield self._spread()
        if len(self.atlas.scales):
            yield self._scale()
        if {"gamma", "beta"} & set(self.by_field):
            yield self._channels()
        yield from self._class_geometry()
        if results.influence:
            yield self._influence(results.influence)
        if results.sensitivity is not None:
            yield self._sensitivity(results.sensitivity)
        if results.label_use is not None and self.classes:
            yield self._label_use(results.label_use)
        if results.mixing is not None and results.mixing[1]:
            yield self._mixing(*results.mixing)
        if results.drift:
            yield self._drift(results.drift)
        for index, learned in enumerate(results.learned):
            yield from self._learned(learned, f"learned_{index}")
        if results.next_commands:
            commands = "\n".join(map(one_line, results.next_commands))
            yield Section("What to type next", "", html=f"<pre>{escape(commands)}</pre>")

    # ------------------------------------------------------------------ the modulation

    def _map(self) -> Section:
        boxes = [SiteBox(s, self.by_site[s.name].class_fraction, self._hover(s)) for s in self.sites]
        pairs = [(s, self.by_field[self.main][s.name]) for s in self.sites if s.name in self.by_field[self.main]]
        sentence = say.class_entry(self.main, pairs, self.classes, self.short)
        return Section("Where time and class enter", sentence, "map", network_map(boxes))

    def _hover(self, site) -> str:
        parts = [f"{name}: {say.follows(v[site.name])}" for name, v in self.by_field.items() if site.name in v]
        return f"{site.name}: {describe_position(site)}, {site.channels} channels; variance of {'; of '.join(parts)}"

    def _shares(self) -> Section:
        strips = {field: {name: _stack(v) for name, v in by_name.items()} for field, by_name in self.by_field.items()}
        sentence = say.field_fractions(self.by_field, self.classes, self.display_names)
        return Section(
            "What each site follows",
            sentence,
            "shares",
            site_bars(self.sites, strips, self.short, legend=FRACTION_LEGEND),
        )

    def _spread(self) -> Section:
        names = [self.display_names[s.site.name] for s in sites_with(self.atlas, self.main)]
        spread, moved = class_spread(self.atlas, self.main), time_shift(self.atlas, self.main)
        levels = self.atlas.levels
        panels = [
            Panel(f"how much {self.main} differs between the classes", spread),
            Panel(f"how far {self.main} is from its mean over time", moved),
        ]
        sentence = say.spread_over_time(self.main, spread, moved, names, levels, self.classes)
        return Section(
            "Class against time", sentence, "spread", heat_maps(panels, names, levels, f"RMS of {self.main}")
        )

    def _scale(self) -> Section:
        sites = sites_with(self.atlas, self.main)
        names, scales = [self.display_names[s.site.name] for s in sites], self.atlas.scales
        changes = np.stack([s.fields[self.main].by_scale for s in sites], axis=1)  # [scales, sites, T]
        panels = [Panel(f"guidance scale {scale:.3g} against 1", change) for scale, change in zip(scales, changes)]
        spread, levels = class_spread(self.atlas, self.main), self.atlas.levels
        sentence = say.change_by_scale(self.main, changes[-1], scales[-1], spread, names, levels)
        image = heat_maps(panels, names, levels, f"RMS change of {self.main}")
        return Section("What the guidance scale changes", sentence, "scale", image)

    def _channels(self) -> Section:
        counts = {
            self.display_names[name]: count_channels(s)
            for name, s in self.atlas.sites.items()
            if {"gamma", "beta"} & set(s.fields)
        }
        return Section("Channels", say.describe_channels(counts), html=_channel_table(counts))

    def _class_geometry(self) -> Iterator[Section]:
        geometry = class_geometry(self.atlas)
        sentence = say.describe_geometry(geometry, self.class_variance, self.classes)
        if geometry is None or not self.class_variance:
            yield Section("Distances between classes", sentence)
            return
        image = cosine_map(geometry.cosine, geometry.names)
        yield Section("Distances between classes", sentence, "classes", image, _nearest_table(geometry))

    # ------------------------------------------------------------------ the output

    def _influence(self, influences: list[Influence]) -> Section:
        rows = [self.display_names.get(g, g) for g in influences[0].groups]
        panels = [
            Panel(
                say.SHORT_INTERVENTIONS.get(i.intervention, i.intervention), i.change, i.all_sites, "all sites at once"
            )
            for i in influences
        ]
        comparable = [
            (i, p)
            for i, p in zip(influences, panels)
            if (i.groups, i.levels.times) == (influences[0].groups, influences[0].levels.times)
        ]
        sentence = " ".join(say.site_influence(i, self.display_names) for i, _ in comparable)
        image = heat_maps(
            [p for _, p in comparable],
            rows,
            influences[0].levels,
            "RMS change of the predicted x0, pixels from -1 to 1",
            one_scale=False,
        )
        return Section("Influence of each site on the image", sentence, "influence", image)

    def _sensitivity(self, s: Sensitivity) -> Section:
        unused = self.verdict()[0] == "unused"
        band = s.band_indices(say.BAND) if say.has_band(s) and not unused else None
        panels = [
            (f"RMS change of x0 (pixels from -1 to 1), class versus {s.against}", s.x0),
            (f"RMS of the network's own prediction, class minus {s.against}", s.prediction),
        ]
        word = f"candidate: {s.levels.span(*band)}" if band else ""
        image = lines_over_levels(panels, s.levels, band, word)
        return Section("When the label matters", say.guidance_band(s, unused), "sensitivity", image)

    def _label_use(self, use: LabelUse) -> Section:
        bins = training_bins(self.results.process, LABEL_USE_BINS)
        measured = {against: _gaps(use, against) for against in ("wrong", "null") if getattr(use, against) is not None}
        if "wrong" not in measured:
            return Section("When the label is used", "There is no wrong label to compare with the true one.")
        words = {"wrong": "wrong label minus true label", "null": "null label minus true label"}
        image = interval_bars(
            {words[a]: gaps for a, gaps in measured.items()},
            bins,
            "held-out loss, 95% intervals",
        )
        return Section("When the label is used", say.use_over_levels(measured["wrong"], bins), "label_use", image)

    def _mixing(self, names: list[str], rows: list[list[np.ndarray]]) -> Section:
        sheet = labelled_grid(rows, names, min_side=64)
        return Section(
            "Classes mixed",
            f"{say.rows_differ(names, rows)} The images of a column share the initial noise.",
            "mixing",
            sheet,
        )

    def _learned(self, learned: LearnedTrace, name: str) -> Iterator[Section]:
        moved = learned.moved
        top = max(moved.sites.values(), default=0.0) or 1.0
        strips = {"distance": {site: [(far, LABEL)] if far else [] for site, far in moved.sites.items()}}
        legend = [("distance to the nearest class; 1 is the mean distance between two classes there", LABEL)]
        image = site_bars(self.sites, strips, self.short, top, number(top), legend)
        heading = f"Learned class {learned.name}"
        yield Section(heading, " ".join(s.sentence for s in (moved, learned.used) if s is not None), name, image)
        if learned.neighbours is not None:
            sentence, sheet = learned.neighbours.sentence, learned.neighbours.sheet()
            yield Section(f"{heading}: nearest images", sentence, f"{name}_nearest", sheet)

    def _drift(self, moved: dict) -> Section:
        finite = [r for fields in moved.values() for r in fields.values() if np.isfinite(r)]
        top = max(finite, default=0.0) or 1.0
        strips: dict[str, dict] = {}
        for site, fields in moved.items():
            for parameter, ratio in fields.items():
                strips.setdefault(parameter, {})[site] = [(min(ratio, top), TIME)] if ratio else []
        sites = [s for s in self.sites if s.name in moved]
        image = site_bars(sites, strips, self.short, top, say.percent_of(top))
        return Section(
            "What moved between the checkpoints", say.how_far_drifted(moved, self.display_names), "drift", image
        )


def _stack(v: Variance) -> list[tuple[float, tuple[int, int, int]]]:
    if not v.total:
        return []
    return [(fraction / v.total, colour) for fraction, colour in zip(v, (TIME, LABEL, BOTH)) if fraction]


def _gaps(use: LabelUse, against: str) -> list[tuple[float, float] | None]:
    bins = [(i / LABEL_USE_BINS, (i + 1) / LABEL_USE_BINS) for i in range(LABEL_USE_BINS)]
    nonempty = [((use.quantile >= a) & (use.quantile < b)).any() for a, b in bins]
    return [use.gap(against, a, b) if measured else None for (a, b), measured in zip(bins, nonempty)]


# ---------------------------------------------------------------------- the page


def _channel_table(counts: dict[str, ChannelCounts]) -> str:
    """The sites with the largest fractions of silenced, flipped or constant channels."""
    odd = {name: c for name, c in counts.items() if c.silenced or c.flipped or c.constant}
    ranked = sorted(
        odd, key=lambda name: -max(odd[name].silenced, odd[name].flipped, odd[name].constant) / odd[name].total
    )
    if not odd:
        return ""
    shown = [name for name in odd if name in ranked[:MAX_CHANNEL_ROWS]]
    rows = [
        [escape(name), f"{odd[name].total:,}", *(_count_bar(n, odd[name].total) for n in _counts(odd[name]))]
        for name in shown
    ]
    hidden = len(counts) - len(shown)
    foot = (
        f"<p class=faint>{hidden} more {'site has' if hidden == 1 else 'sites have'} fewer or none.</p>"
        if hidden
        else ""
    )
    return _table(["site", "channels", "silenced", "flipped", "constant"], rows) + foot


def _counts(c: ChannelCounts) -> tuple[int, int, int]:
    return c.silenced, c.flipped, c.constant


def _count_bar(count: int, total: int) -> str:
    """A count with a bar of its fraction of the total behind it."""
    fraction = 100 * count / total
    return (
        f'<span class=bar style="background-size:{fraction:.1f}% 100%">{count:,}</span>'
        if count
        else "<span class=bar>–</span>"
    )


def _nearest_table(geometry: ClassGeometry) -> str:
    """The classes with the nearest neighbours, nearest first."""
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
    if isinstance(s.image, Drawing):
        figure = s.image.svg(s.heading)
    elif s.image is not None:
        figure = f'<img alt="{escape(s.heading)}" src="{data_uri(s.image)}">'
    else:
        figure = ""
    parts = "".join(f"<div>{part}</div>" for part in (figure, s.html) if part)
    sentence = f"<p class=sentence>{escape(one_line(s.sentence))}</p>" if s.sentence else ""
    return f"<section><h2>{escape(s.heading)}</h2>{sentence}<div class=figure>{parts}</div></section>"


def _page(results: TraceResults, state: str, verdict: str, sections: list[Section]) -> str:
    atlas = results.atlas
    order = np.argsort(atlas.levels.places)
    about = (
        f"conditioning {atlas.conditioning}; {len(atlas.sites)} sites; {len(atlas.timesteps)} noise levels, "
        f"{atlas.levels.span(order[0], order[-1])}; {atlas.num_classes:,} classes"
        + (" and null" if atlas.null_id is not None else "")
    )
    meanings = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in MEANINGS)
    headline, _, numbers = one_line(verdict).partition(". ")
    headline = headline.rstrip(".") + "."
    title = escape(one_line(results.title))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}: conditioning</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"<header><p class=faint>{title}</p><h1 class={state}>{escape(headline)}</h1><p "
        f"class=sentence>{escape(numbers)}</p><p class=faint>{escape(one_line(results.description))}; "
        f"{escape(about)}.</p></header>\n"
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
.sentence { font-size: 18px; line-height: 1.4; margin: 0 0 14px; max-width: 1040px }
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
        "down, middle, up: the encoder, the middle, the decoder. up 1.0 is the first block of the decoder's second "
        "level; r is the block that resamples; a and b are the two norms of a block where both are modulated. Move "
        "the pointer over an image for the numbers.",
    ),
    (
        "Noise level",
        "sigma = sigma_t / alpha_t of the noisy image alpha_t x0 + sigma_t eps: the standard deviation of the noise where "
        "the image keeps its size. It is the same quantity for every process and schedule. t is the timestep, 0 (image) "
        "to T - 1 under process ddpm, to 1000 under flow; edm has none. Modulation is measured at levels evenly spread "
        "from image to noise: in t, and under edm in sigma^(1/7).",
    ),
    (
        "Is the label used?",
        "Loss on held-out images under a wrong class minus the loss under the true one, on the same image, noise level "
        "and noise. The wrong class is that of another held-out image, so each class is as often wrong as it is true. "
        "Used: the whole 95% interval of the mean over images is above 0. A network may respond to its label without "
        "using it, even an untrained one: only held-out losses show the use.",
    ),
    (
        "Fractions of variance",
        "Of a site's modulation, over the grid of noise levels and all classes (without null), summed over channels: the "
        "part that depends on time alone, on the class alone, and on both together; they sum to 1. none: nothing "
        "varies beyond rounding.",
    ),
    (
        "The class fraction of a site",
        "Class alone and both together, as a fraction of the variance of the site's whole modulation. Between-class "
        "variance is the same sum before the division: the variance between the classes at one noise level, averaged "
        "over the noise levels.",
    ),
    (
        "Words that depend on a threshold",
        f"The class enters mostly at one place: at least {say.MOSTLY:.0%} of all between-class variance. Sites follow "
        f"time: a class fraction of at most {say.FOLLOWS:.0%}; follow the class: of at least {1 - say.FOLLOWS:.0%}. "
        f"Alone: a fraction of at least {say.ALONE:.1%}. Everywhere alike: no place's part of it is more than "
        f"{say.EVEN:g} times its part of the channels, or less than 1 / {say.EVEN:g}. About as much: the largest is at "
        f"most {say.EVEN:g} times the smallest. The same modulation: classes nearer than {say.SAME_CLASS_DISTANCE:g} "
        "of the mean distance of a class from the mean of the classes. Unrelated: every cosine within "
        f"{say.UNRELATED:g} of -1 / (classes - 1). Much the same modulation: a cosine of at least "
        f"{say.CLEARLY_ALIKE:g}.",
    ),
    (
        "Class against time",
        "At one noise level: RMS over channels of the standard deviation over the classes whose values are stored "
        "(without null); and the difference between the mean over all classes and its mean over time, RMS over "
        "channels. Both have one colour scale.",
    ),
    (
        "Channels",
        "The gain of a channel is w (1 + gamma), the shift b (1 + gamma) + beta, with the norm's own w and b. Over "
        f"all noise levels and stored classes, silenced: |gain| stays below {SILENCED:.0%} of the site's median |gain|; "
        f"flipped: the gain changes its sign; constant: neither gain nor shift moves by more than {CONSTANT:.0%} of "
        "that median.",
    ),
    (
        "Distances between classes",
        "The modulation of all sites under a class, averaged over time, as one vector, minus the mean over the "
        "classes: the cosine between two of them, and their distance. Unrelated classes have cosines near -1 / "
        "(classes - 1).",
    ),
    (
        "Influence and sensitivity",
        "RMS over images, channels and positions of how far the predicted x0 moves (pixels are from -1 to 1, so 2 is "
        "from black to white) when the modulation of one site, or of all, is changed, on the same noisy images. Each "
        "map and each line has its own scale.",
    ),
    (
        "The candidate band",
        f"From the lowest to the highest noise level at which the label moves x0 by at least {say.BAND:.0%} of the largest "
        "change at any. Guidance may help there; only a sweep over intervals shows whether it does.",
    ),
    (
        "When the label is used",
        f"The bins are the {LABEL_USE_BINS} equally frequent parts of the training noise, from image to noise.",
    ),
    (
        "Learned class",
        "RMS over noise levels and channels of the difference between its modulation and that of the nearest class at the "
        "site, in units of the mean distance between two classes there. The label check compares the losses on the same "
        "images and noises. It copies if the median distance of sampled images to the nearest image that it was learned "
        "from is less than half of the distance of these images to each other.",
    ),
    ("Drift", "RMS of the difference between the two checkpoints, divided by the RMS of the earlier one."),
]
