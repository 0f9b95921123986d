"""The report on a network's conditioning: one self-contained HTML page, and its images as PNG and SVG.

write_report(TraceResults(title, description, atlas, influence=[...], label_use=...), Path("trace"))
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from ..diffusion.process import Process
from ..evaluation.label_usage import LabelUse
from ..render.grids import labelled_grid
from ..render.report import Code, Part, Report, Section, Shown, Table, fragment
from ..render.text import capital, number, percent, plus_minus
from . import analysis, plots
from . import sentences as say
from .analysis import ChannelCounts, ClassGeometry, Variance
from .atlas import Atlas
from .learned import LearnedTrace
from .levels import NoiseLevels, training_bins
from .plots import BOTH, LABEL, TIME, Panel
from .probes import INTERVENTIONS, Influence, Sensitivity

LABEL_USE_BINS = 8  # of noise levels, equally frequent in training
MAX_CHANNEL_ROWS = 24  # sites in the table of channels
MAX_NEAREST = 12  # classes in the table of nearest classes
PARTS = (("time", TIME), ("class", LABEL), ("both together", BOTH))


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


def write_report(results: TraceResults, out: Path) -> list[Path]:
    """Write out/report.html and its images. Returns the files, the page first."""
    return TraceReport(results).report().save(Path(out))


class TraceReport:
    """The results, and what is computed from them once."""

    def __init__(self, results: TraceResults):
        self.results, self.atlas, self.levels = results, results.atlas, results.atlas.levels
        self.sites = [s.site for s in self.atlas.sites.values()]
        self.short = analysis.short_names([s.name for s in self.sites])
        self.display_names = {s.name: f"{analysis.resolution_of(s)} {self.short[s.name]}" for s in self.sites}
        self.classes = self.atlas.num_classes
        self.by_field = analysis.variances(self.atlas)
        self.by_site: dict[str, Variance] = {
            s.name: analysis.sum_variances(by_name[s.name] for by_name in self.by_field.values() if s.name in by_name)
            for s in self.sites
        }
        self.class_variance = sum(v.classes for v in self.by_site.values())
        self.main = analysis.main_field(self.atlas)

    def report(self) -> Report:
        """The page."""
        atlas, levels = self.atlas, self.levels
        state, headline, numbers = self.verdict()
        order = np.argsort(levels.places)
        null = " and null" if atlas.null_id is not None else ""
        about = (
            f"{self.results.description}; conditioning {atlas.conditioning}; {len(atlas.sites)} sites; "
            f"{len(levels)} noise levels, {levels.span(order[0], order[-1])}; {atlas.num_classes:,} classes{null}."
        )
        lead = [capital(numbers)] if numbers else []
        return Report(headline, list(self.sections()), lead, state, self.results.title, about, self._meanings())

    @staticmethod
    def _meanings() -> str:
        return fragment("trace/meanings.html.j2", say=say, analysis=analysis, label_use_bins=LABEL_USE_BINS)

    def verdict(self) -> tuple[str, str, str]:
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
        yield self._class_geometry()
        if results.influence:
            yield self.influence_section()
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
            yield Section("What to type next", [Code("\n".join(results.next_commands))])

    # ------------------------------------------------------------------ the modulation

    def _map(self) -> Section:
        pairs = [(s, self.by_field[self.main][s.name]) for s in self.sites if s.name in self.by_field[self.main]]
        rows = [
            [p.name, f"{p.sites}", percent(p.channels), _percent(p.between), _percent(p.class_fraction)]
            for p in analysis.by_place(pairs)
        ]
        head = ["place", "sites", "channels", "between-class variance", "class fraction"]
        caption = (
            f"Of {self.main}: the part of all channels and of all between-class variance at a place, and the class "
            "fraction of the variance there."
        )
        drawn = partial(plots.network_map, self.sites, [self.by_site[s.name].class_fraction for s in self.sites])
        sentence = say.class_entry(self.main, pairs, self.classes, self.short)
        shown = Shown("map", drawn, "the U-Net, its sites coloured by class fraction")
        return Section("Where time and class enter", [sentence, shown, Table(head, rows, caption)])

    def _shares(self) -> Section:
        strips = {
            parameter: {name: [part / v.total for part in v] if v.total else [] for name, v in by_name.items()}
            for parameter, by_name in self.by_field.items()
        }
        rows = []
        for parameter, by_name in self.by_field.items():
            total = analysis.sum_variances(by_name.values())
            fractions = {self.display_names[n]: v.class_fraction for n, v in by_name.items() if v.total}
            ends = [f"{n} ({percent(fractions[n])})" for n in (_argmax(fractions, 1), _argmax(fractions, -1)) if n]
            parts = [percent(part / total.total) if total.total else "none" for part in total]
            rows.append([parameter, *parts, *(ends or ["-", "-"])])
        head = ["field", "time", "class", "both together", "class fraction largest at", "smallest at"]
        drawn = partial(
            plots.site_bars, self.sites, strips, self.short, PARTS, "fraction of the variance", percent=True
        )
        shown = Shown("shares", drawn, "the variance of each site by time, class and both")
        table = Table(head, rows, "Fractions of the variance over all sites.")
        return Section("What each site follows", [shown, table])

    def _spread(self) -> Section:
        names = [self.display_names[s.site.name] for s in analysis.sites_with(self.atlas, self.main)]
        panels = [
            Panel(f"between the classes: how much {self.main} differs", analysis.class_spread(self.atlas, self.main)),
            Panel("over time: distance of the class mean from its mean", analysis.time_shift(self.atlas, self.main)),
        ]
        shown = Shown(
            "spread",
            partial(plots.heat_maps, panels, names, self.levels, f"RMS of {self.main}"),
            "RMS by site and noise level",
        )
        rows = [[what, *_peak(p.values, names, self.levels)] for what, p in zip(("the classes", "time"), panels)]
        table = Table([f"{self.main} differs by", "RMS, at most", "at site", "at noise level"], rows)
        return Section("Class against time", [shown, table])

    def _scale(self) -> Section:
        sites = analysis.sites_with(self.atlas, self.main)
        names, scales = [self.display_names[s.site.name] for s in sites], self.atlas.scales
        changes = np.stack([s.fields[self.main].by_scale for s in sites], axis=1)  # [scales, sites, T]
        panels = [Panel(f"guidance scale {scale:.3g} against 1", change) for scale, change in zip(scales, changes)]
        spread = np.square(analysis.class_spread(self.atlas, self.main)).mean()
        rows = [
            [f"{s:g}", *_peak(c, names, self.levels), number(np.sqrt(np.square(c).mean() / spread)) if spread else "-"]
            for s, c in zip(scales, changes)
        ]
        head = ["guidance scale", "RMS change, at most", "at site", "at noise level", "against the classes"]
        caption = "The last column: RMS over all sites and noise levels, as a multiple of what the classes differ by at scale 1."
        unread = (
            [] if changes.any() else ["The network has not learned to read the guidance scale: it changes nothing."]
        )
        drawn = partial(plots.heat_maps, panels, names, self.levels, f"RMS change of {self.main}")
        shown = Shown("scale", drawn, "change by guidance scale, site and noise level")
        return Section("What the guidance scale changes", [*unread, shown, Table(head, rows, caption)])

    def _channels(self) -> Section:
        counts = {
            self.display_names[name]: analysis.count_channels(s)
            for name, s in self.atlas.sites.items()
            if {"gamma", "beta"} & set(s.fields)
        }
        return Section("Channels", [_channel_table(counts)])

    def _class_geometry(self) -> Section:
        geometry = analysis.class_geometry(self.atlas)
        sentence = say.describe_geometry(geometry, self.class_variance, self.classes)
        heading = "Distances between classes"
        if geometry is None or not self.class_variance:
            return Section(heading, [sentence])
        shown = Shown(
            "classes", partial(plots.cosine_map, geometry.cosine, geometry.names), "cosines between the classes"
        )
        return Section(heading, [sentence, shown, _nearest_table(geometry)])

    # ------------------------------------------------------------------ the output

    def influence_section(self) -> Section:
        """How far each site moves the image; of interventions with the same sites and levels as the first."""
        first = self.results.influence[0]
        same = [i for i in self.results.influence if (i.groups, i.levels.times) == (first.groups, first.levels.times)]
        groups = [self.display_names.get(g, g) for g in first.groups]
        panels, rows = [], []
        for one in same:
            words = INTERVENTIONS.get(one.intervention, one.intervention)
            panels.append(Panel(words.replace("the modulation of the ", "the "), one.change, one.all_sites))
            together = f"{number(one.all_sites.max())} ({one.levels.words(int(one.all_sites.argmax()))})"
            still = int((~one.change.any(axis=1)).sum())
            rows.append([words, *_peak(one.change, groups, one.levels), together, f"{still} of {len(groups)}"])
        unit = "RMS change of the predicted x0 (pixels from -1 to 1)"
        drawn = partial(plots.heat_maps, panels, groups, first.levels, unit, "all sites at once")
        shown = Shown("influence", drawn, "influence by site and noise level")
        head = ["a site is", "x0 moves at most", "by site", "at noise level", "by all sites at once", "without effect"]
        caption = "The modulation of the middle noise level changes nothing at that level itself: its column is blank."
        table = Table(head, rows, caption if any(i.intervention == "freeze" for i in same) else "")
        return Section("Influence of each site on the image", [shown, table])

    def _sensitivity(self, s: Sensitivity) -> Section:
        unused = self.verdict()[0] == "unused"
        band = s.band_indices(say.BAND) if say.has_band(s) and not unused else None
        panels = [
            (f"RMS change of x0, class versus {s.against}", s.x0),
            (f"RMS of the prediction, class minus {s.against}", s.prediction),
        ]
        word = f"candidate: {s.levels.span(*band)}" if band else ""
        shown = Shown(
            "sensitivity",
            partial(plots.lines_over_levels, panels, s.levels, band, word),
            "effect of the label by noise level",
        )
        return Section("When the label matters", [say.guidance_band(s, unused), shown])

    def _label_use(self, use: LabelUse) -> Section:
        heading = "When the label is used"
        bins = training_bins(self.results.process, LABEL_USE_BINS)
        measured = {against: _gaps(use, against) for against in ("wrong", "null") if getattr(use, against) is not None}
        if "wrong" not in measured:
            return Section(heading, ["There is no wrong label to compare with the true one."])
        series = {f"{against} label minus true label": gaps for against, gaps in measured.items()}
        drawn = partial(plots.interval_bars, series, bins, "held-out loss, 95% intervals")
        rows = [[b.sigma, b.t or "-", *map(_interval, gaps)] for b, *gaps in zip(bins, *measured.values())]
        caption = "± half of the 95% interval. An interval above 0: the label is used at these noise levels."
        table = Table(["noise level sigma", "timestep t", *series], rows, caption)
        return Section(heading, [Shown("label_use", drawn, "held-out losses by noise level"), table])

    def _mixing(self, names: list[str], rows: list[list[np.ndarray]]) -> Section:
        difference = [
            [names[i], names[j], f"{np.sqrt(np.mean([np.square(a.astype(float) - b).mean() for a, b in pair])):.0f}"]
            for i, j in combinations(range(len(rows)), 2)
            if (pair := list(zip(rows[i], rows[j])))
        ]
        table = Table(
            ["images of", "and of", "differ by RMS"], difference, "Of 255 levels. 0: the mix makes no difference."
        )
        shown = Shown("mixing", partial(labelled_grid, rows, names, min_side=64), "classes mixed by layer")
        return Section("Classes mixed", ["The images of a column share the initial noise.", shown, table])

    def _learned(self, learned: LearnedTrace, name: str) -> Iterator[Section]:
        moved = learned.moved
        strips = {"distance": {site: [far] for site, far in moved.sites.items()}}
        part = ("distance to the nearest class; 1 is the mean distance between two classes there", LABEL)
        drawn = partial(plots.site_bars, self.sites, strips, self.short, [part])
        heading = f"Learned class {learned.name}"
        found = [s.sentence for s in (moved, learned.used) if s is not None]
        yield Section(heading, [*found, Shown(name, drawn, "distance of each site to the nearest class")])
        if learned.neighbours is not None:
            shown = Shown(f"{name}_nearest", learned.neighbours.sheet, "sampled images and the nearest ones")
            yield Section(f"{heading}: nearest images", [learned.neighbours.sentence, shown])

    def _drift(self, moved: dict) -> Section:
        flat = {(site, parameter): ratio for site, fields in moved.items() for parameter, ratio in fields.items()}
        fields = dict.fromkeys(parameter for _, parameter in flat)
        finite = [ratio for ratio in flat.values() if np.isfinite(ratio)]
        top = max(finite, default=0.0)
        strips = {f: {s: [min(ratio, top)] for (s, p), ratio in flat.items() if p == f} for f in fields}
        sites = [s for s in self.sites if s.name in moved]
        drawn = partial(plots.site_bars, sites, strips, self.short, [("change / earlier size", TIME)])
        rows = []
        for f in fields:
            ratios = {site: ratio for (site, p), ratio in flat.items() if p == f}
            ends = (
                f"{self.display_names.get(s, s)} ({_ratio(ratios[s])})"
                for s in (_argmax(ratios, 1), _argmax(ratios, -1))
            )
            rows.append([f, _ratio(float(np.median(list(ratios.values())))), *ends])
        table = Table(["field", "median", "largest at", "smallest at"], rows)
        same = [] if any(flat.values()) else ["The modulation is the same in the two checkpoints."]
        shown = Shown("drift", drawn, "change of each site between the checkpoints")
        return Section("What moved between the checkpoints", [*same, shown, table])


# ---------------------------------------------------------------------- tables


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None or not np.isfinite(fraction) else percent(fraction)


def _ratio(value: float) -> str:
    return "infinite" if not np.isfinite(value) else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def _argmax(values: dict[str, float], sign: int) -> str | None:
    return max(values, key=lambda key: sign * values[key], default=None)


def _peak(values: np.ndarray, names: Sequence[str], levels: NoiseLevels) -> list[str]:
    """The largest value of [rows, T], its row and its noise level."""
    if not values.any():
        return ["0", "-", "-"]
    row, column = np.unravel_index(values.argmax(), values.shape)
    return [number(values.max()), names[row], levels.words(column)]


def _gaps(use: LabelUse, against: str) -> list[tuple[float, float] | None]:
    bins = [(i / LABEL_USE_BINS, (i + 1) / LABEL_USE_BINS) for i in range(LABEL_USE_BINS)]
    nonempty = [((use.quantile >= a) & (use.quantile < b)).any() for a, b in bins]
    return [use.gap(against, a, b) if measured else None for (a, b), measured in zip(bins, nonempty)]


def _interval(gap: tuple[float, float] | None) -> str:
    return "-" if gap is None or not np.isfinite(gap[0]) else plus_minus(*gap)


def _channel_table(counts: dict[str, ChannelCounts]) -> Part:
    """All sites together, then those with the largest fractions of silenced, flipped or constant channels."""
    unusual = {name: (c.silenced, c.flipped, c.constant) for name, c in counts.items()}
    ranked = sorted(unusual, key=lambda name: -max(unusual[name]) / counts[name].total)[:MAX_CHANNEL_ROWS]
    shown = [name for name in counts if name in ranked and any(unusual[name])]
    total = [sum(c.total for c in counts.values()), *map(sum, zip(*unusual.values()))]
    rows = [["all sites", *total], *([name, counts[name].total, *unusual[name]] for name in shown)]
    head = ["site", "channels", "silenced", "flipped", "constant"]
    caption = f"The other {len(counts) - len(shown)} sites have fewer or none." if len(shown) < len(counts) else ""
    return Table(head, [[name, *(f"{n:,}" for n in numbers)] for name, *numbers in rows], caption)


def _nearest_table(geometry: ClassGeometry) -> Table:
    """The classes with the nearest neighbours, nearest first."""
    distance = geometry.distance + np.where(np.eye(len(geometry.names), dtype=bool), np.inf, 0)
    order = np.argsort(distance.min(1), kind="stable")[:MAX_NEAREST]
    rows = [[say.name(geometry.names[i]), say.name(geometry.nearest[i]), number(distance[i].min())] for i in order]
    null = geometry.null_distance
    caption = "" if null is None else f"Null is {number(null)} times as far from the mean of the classes as a class is."
    return Table(["class", "nearest", "distance"], rows, caption)
