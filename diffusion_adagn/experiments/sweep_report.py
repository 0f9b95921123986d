"""The report of a guidance sweep: a page (sweep.md), a table (sweep.csv), all results (sweep.json), an image grid and figures.

write_report(Sweep(source="runs/digits", ...), points, Path("sweep"))
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..atomic import atomic_write
from ..errors import InputError
from ..evaluation.metrics import METRICS
from ..evaluation.report import (
    CERTAIN,
    GROWING,
    MARK,
    MIN_CLASS_IMAGES_FOR_VALUES,
    heldout_accuracy,
    note_few_images,
    note_weak_classifier,
    taken_in,
    titles,
)
from ..render.grids import labelled_grid
from ..render.markdown import code, plain, table, tick
from ..render.text import listed, one_line, percent, plus_minus, shorten
from . import sweep_plots as plots
from .comparison import own_bests, ranking
from .heat_map import axes_of, heat_map
from .selection import (
    CHANCE_ERRORS,
    NAMES,
    SETTINGS,
    TRADEOFFS,
    BestSet,
    PointResult,
    at_the_edge,
    best_sets,
    class_best_sets,
    clipped_fraction,
    differing,
    disagreement,
    format_advice,
    format_count,
    format_point,
    format_points,
    in_order,
    mean_of,
    metric_names,
    metric_value,
    metrics_with_values,
    overguidance_notes,
    pareto,
    primary_metric,
    recommend,
    recorded_settings,
    rounded,
    selection_bias_note,
    worse_by,
)
from .sweep_sections import compared, intervals, ranked, rounds

MAX_COLUMNS, MAX_GRID_CLASSES = 24, 24  # of the image grid
MAX_SHOWN_CLASSES = 30  # in the page's table; sweep.json has all
MAX_WEIGHTS = 24  # in the page
FIGURES = ("grid.png", "curves.png", "heat_map.png", "tradeoff.png", "diagnostics.png", "classes.png")
RATIOS = ("contrast_ratio", "saturation_ratio", "brightness_shift", "extremes_shift")
IMAGE_STATISTICS = ("brightness", "contrast", "saturation", "extremes", *RATIOS)
NEIGHBOURS = ("precision", "recall", "density", "coverage")
CLASSIFIERS = (
    "efficientnet_lite0",
    "inception",
    "judge",
    "sklearn",
)  # extractors with class probabilities of their own
UNNAMED = "an extractor without a name"


@dataclass(frozen=True)
class Sweep:
    """What was swept, and with what.

    what: which weights. swept: the settings that had several values, with them. reference: name, count, fingerprint;
    extractor: name, hash, resolution, resize, dimension, is_fid; either is empty where there was none, and a user's
    own extractor may say less. count: images per point. command: repeats the sweep. judge: the record of the
    extractor whose class probabilities give the accuracy. k: neighbours of precision, recall, density and coverage.
    versions: of what made the numbers. row_names: of the sampled classes; empty: class_names. weights: where they vary, the
    record of each set; `what`, `model_hash` and so on are then of the first. rounds: those of a budget, in seconds.
    intervals: those proposed, and from what. rank: rank the models. heat_map: the two settings of the heat map.
    """

    source: str
    what: str
    model_hash: str
    trained_steps: int | None
    ema_decay: float | None
    class_names: tuple[str, ...] = ()
    swept: dict[str, list] = field(default_factory=dict)
    reference: dict = field(default_factory=dict)
    extractor: dict = field(default_factory=dict)
    seed: int = 0
    count: int = 0
    precision: str = "fp32"
    batch_size: int = 64
    command: str = ""
    classifier: dict = field(default_factory=dict)
    guide_hash: str | None = None
    weights: dict[str, dict] = field(default_factory=dict)
    ema_length: float | None = None
    rounds: list[dict] = field(default_factory=list)
    budget: float | None = None
    intervals: dict = field(default_factory=dict)
    rank: bool = False
    heat_map: tuple[str, ...] = ()
    k: int = 5
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    row_names: tuple[str, ...] = ()


def write_report(
    sweep: Sweep, points: Iterable[PointResult], out: Path, confirmed: Iterable[PointResult] = (), other_points: int = 0
) -> list[Path]:
    """Write the files into `out` atomically. Returns them, the page first.

    confirmed: points measured again with fresh seeds. left_out: finished points that are not among these. The order
    of the points does not matter: equal sweeps give equal tables. Where matplotlib is not installed no figure is
    drawn, and those of an earlier report stay. Those that no longer apply are removed. Raises InputError where there
    is no point, and where two have one id.
    """
    report = SweepReport(sweep, points, confirmed)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    figures = report.figures()
    images = {name: _png(draw) for name, draw in figures.items() if name == "grid.png" or plots.available()}
    earlier = [name for name in figures if name not in images and (out / name).exists()]
    files = {
        "sweep.csv": report.csv(),
        "sweep.json": report.json(),
        **images,
        "sweep.md": report.page(list(images), earlier, other_points),
    }
    for name, content in files.items():
        atomic_write(out / name, lambda tmp, content=content: tmp.write_bytes(content))
    for name in FIGURES:
        if name not in figures:
            (out / name).unlink(missing_ok=True)
    return [out / name for name in ("sweep.md", "sweep.csv", "sweep.json", *images)]


def summary(files: Sequence[Path]) -> list[str]:
    """What a written report says in a few lines, the advice first."""
    report = json.loads(next(f for f in files if f.suffix == ".json").read_text(encoding="utf-8"))
    verdict, *image_notes = report["sentences"]
    return [report["advice"]["sentence"] if report["advice"] else verdict, *image_notes]


class SweepReport:
    """The points with what is read out of them once."""

    def __init__(self, sweep: Sweep, points: Iterable[PointResult], confirmed: Iterable[PointResult]):
        self.sweep, self.points, self.confirmed = sweep, in_order(points), in_order(confirmed)
        ids = [p.id for p in self.points]
        if not ids or len(set(ids)) < len(ids):
            twice = next((i for i in ids if ids.count(i) > 1), None)
            fault = "without a finished point has nothing to report: let at least one point finish"
            raise InputError(
                f"a sweep {fault if not ids else f'needs one id per point; two points of the sweep have the id {twice!r}'}."
            )
        self.rows, self.rows_again = ([p.row for p in group] for group in (self.points, self.confirmed))
        self.guides = _guides(self.points)
        self.points, self.confirmed = (
            [_renamed(p, self.guides) for p in group] for group in (self.points, self.confirmed)
        )
        self.row = {p.id: p.row for p in self.points}
        self.titles = _titles(sweep)
        self.words = {m: t.partition(" (")[0] for m, t in self.titles.items()}  # inside a sentence
        self.settings = differing(self.points)
        self.metrics = metrics_with_values(self.points)
        self.choices = best_sets(self.points)
        self.largest = max(sweep.swept.get("scale") or [p.row["scale"] for p in self.points])
        self.by_class = class_best_sets(self.points)
        metric = primary_metric(self.choices)
        self.compared = own_bests(self.points, metric) if metric else []
        self.ranking = ranking(self.points, metric) if metric and sweep.rank else None
        self.heat_map_axes = axes_of(self.points, sweep.heat_map)
        self.trades = [t for t in TRADEOFFS if set(t) <= set(self.metrics)]
        sentences = (
            disagreement(self.choices, self.points, self.words),
            at_the_edge(self.choices, self.points, self.words, self.largest),
        )
        self.verdict = " ".join(filter(None, sentences))
        self.image_notes = overguidance_notes(self.points)
        self.advice = recommend(self.points, self.choices)
        self.again = {b.id: (b, p) for p in self.confirmed if (b := self._before(p))}
        again = {i: p for i, (_, p) in self.again.items()}
        self.use = (
            format_advice(self.advice, self.points, self.choices, self.words, again, self.largest)
            if self.advice
            else ""
        )
        self.choices_again = best_sets([replace(p, row=p.row | {"id": i}) for i, (_, p) in self.again.items()])

    def _before(self, point: PointResult) -> PointResult | None:
        """The point that was confirmed: of one id, or of the same settings."""
        same = lambda p: all(p.row.get(s) == point.row.get(s) for s in SETTINGS)  # noqa: E731
        return next((p for p in self.points if p.id == point.id), None) or next(
            (p for p in self.points if same(p)), None
        )

    def format_point(self, point: str | PointResult) -> str:
        return format_point(self.row[point] if isinstance(point, str) else point.row, self.settings)

    # ------------------------------------------------------------------ tables of numbers

    def csv(self) -> bytes:
        text = io.StringIO(newline="")
        rows = [self._flat(row) for row in self.rows]
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return _bytes(text.getvalue())

    def _flat(self, row: Mapping) -> dict:
        """One row: settings, metrics, image statistics, and what produced the numbers."""
        s, e, r, statistics = self.sweep, self.sweep.extractor, self.sweep.reference, row.get("diagnostics", {})
        flat = {"id": row["id"], **{k: row.get(k) for k in (*recorded_settings(self.points), "nfe", "count")}}
        for metric in METRICS:
            value, error, _ = metric_value(row, metric)
            flat |= {metric: value, f"{metric}_standard_error": error}
        flat |= {"difference": mean_of(statistics.get("difference")), "clipped": mean_of(statistics.get("clipped"))}
        flat |= {k: _finite(statistics.get(k)) for k in IMAGE_STATISTICS}
        flat |= {
            f"extractor_{k}".removesuffix("_name"): e.get(k) for k in ("name", "hash", "resolution", "resize", "is_fid")
        }
        flat |= {f"reference_{k}".removesuffix("_name"): r.get(k) for k in ("name", "count", "fingerprint")}
        return flat | {
            "seed": s.seed,
            "sampling_precision": s.precision,  # "precision" is a metric
            "batch_size": s.batch_size,
            "source": s.source,
            **self._weights_of(row),
            "judge": s.classifier.get("name"),
            "judge_hash": s.classifier.get("hash"),
            "k": s.k,
        }

    def _weights_of(self, row: Mapping) -> dict:
        """Which weights gave a row."""
        s = self.sweep
        by_hash = {record["hash"]: record for record in s.weights.values()}
        about = by_hash.get(row.get("model_hash")) or asdict(s) | {"hash": s.model_hash}
        return {
            "weights": about["what"],
            "model_hash": about["hash"],
            "trained_steps": about["trained_steps"],
            "ema_decay": about["ema_decay"],
            **({"ema_length": about["ema_length"]} if s.weights or s.ema_length is not None else {}),
            "guide_hash": row.get("guide_hash") if s.weights else s.guide_hash,
        }

    def json(self) -> bytes:
        contents = {
            "sweep": asdict(self.sweep),
            "rows": self.rows,
            "choices": {m: asdict(c) for m, c in self.choices.items()},
            "class_choices": {m: [c and asdict(c) for c in sets] for m, sets in self.by_class.items()},
            "own_best": [asdict(one) for one in self.compared],
            "ranking": self.ranking and asdict(self.ranking) | {"sentence": self.ranking.sentence(self.words)},
            "pareto": {f"{a} and {b}": pareto(self.points, a, b) for a, b in self.trades},
            "advice": self.advice and asdict(self.advice) | {"sentence": self.use},
            "sentences": [self.verdict, *self.image_notes],
            "confirmed": self.rows_again,
            "confirmed_choices": {m: asdict(c) for m, c in self.choices_again.items()},
        }
        return _bytes(json.dumps(_finite(contents), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    # ------------------------------------------------------------------ images

    def figures(self) -> dict[str, Callable]:
        """By name, what writes the PNG of each that there is something to draw for into a file."""
        grid = self._grid()
        writers = {} if grid is None else {"grid.png": lambda file: grid.save(file, format="PNG")}
        points, titles = self.points, self.titles
        drawn = {}
        if self.metrics:
            drawn["curves.png"] = lambda: plots.curves(points, self.settings, self.choices, titles)
        if self.heat_map_axes and self.choices:
            drawn["heat_map.png"] = lambda: heat_map(points, self.heat_map_axes, self.choices, titles)
        if self.trades:
            drawn["tradeoff.png"] = lambda: plots.tradeoff(points, *self.trades[0], titles)
        if any(p.row.get("diagnostics") for p in points):
            drawn["diagnostics.png"] = lambda: plots.diagnostics(points)
        if self.by_class:
            first = next(iter(self.by_class))
            drawn["classes.png"] = lambda: plots.per_class(points, first, self.sweep.class_names, titles)
        return writers | {
            name: lambda file, draw=draw: draw().savefig(file, format="png") for name, draw in drawn.items()
        }

    def _grid(self):
        """Classes in rows, points in columns, all columns from the same noise; None without images."""
        best = {self.advice.point} if self.advice else set()
        points = [p for p in self.points if p.shown is not None and p.shown.size]
        if not points:
            return None
        points = _select_columns(points, best)
        hidden = len(self.points) - len(points)
        classes = min(min(len(p.shown) for p in points), MAX_GRID_CLASSES)
        each = max(1, min(min(p.shown.shape[1] for p in points), MAX_GRID_CLASSES // classes))
        rows = [[p.shown[c, i] for p in points] for c in range(classes) for i in range(each)]
        labels = [self._class_name(c) if i == 0 else "" for c in range(classes) for i in range(each)]
        heads = [("* " if p.id in best else "") + _head(p.row, self.settings) for p in points]
        title = "one row, one noise"
        title += "; * use this: see sweep.md" if best else ""
        title += f"; {format_count(hidden, 'point')} {'is' if hidden == 1 else 'are'} not shown" if hidden else ""
        return labelled_grid(rows, labels, heads, title, min_side=64 if max(map(len, heads)) <= 24 else 128)

    def _class_name(self, index: int) -> str:
        known = self.sweep.row_names or self.sweep.class_names
        if index < len(known):
            return shorten(known[index], 10, 300)
        return f"class {index}" if known or self.by_class else ""

    # ------------------------------------------------------------------ the page

    def page(self, images: Sequence[str], earlier: Sequence[str] = (), other_points: int = 0) -> bytes:
        """earlier: figures of an earlier report, which could not be drawn again."""
        parts = [
            [f"# Guidance sweep of {plain(self.sweep.source)}", *(["", plain(self.use)] if self.use else [])],
            self._provenance(other_points),
            ["## What it says", "", plain(self.verdict), *[f"\n{plain(s)}" for s in self.image_notes]],
            ["## Points", "", *self._points()],
            self._best(),
            *self._sections(),
            self._classes(),
            self._confirmed(),
            self._figures_section(images, earlier),
            self._notes(),
            ["## Again", "", *code(self.sweep.command)] if self.sweep.command else [],
        ]
        return _bytes("\n\n".join("\n".join(part) for part in parts if part) + "\n")

    def _sections(self) -> list[list[str]]:
        sections = [compared(self, one) for one in self.compared]
        if self.sweep.rank:
            sections.append(ranked(self, self.ranking))
        if self.sweep.intervals:
            sections.append(intervals(self, self.sweep.intervals))
        if self.sweep.rounds:
            sections.append(rounds(self.sweep.budget, self.sweep.rounds, self.words))
        return sections

    @staticmethod
    def with_error(row: Mapping, metric: str) -> str:
        """A metric's value with its standard error."""
        return _with_error(row, metric)

    def _provenance(self, other_points: int) -> list[str]:
        s, r = self.sweep, self.sweep.reference
        trained = f", trained for {s.trained_steps:,} steps" if s.trained_steps and "steps" not in s.what else ""
        ema = f", EMA decay {s.ema_decay:g}" if s.ema_decay is not None else ""

        def format_value(value):
            if value is None:
                return "none"
            return f"{value:g}" if isinstance(value, float) else self.guides.get(value, str(value))

        swept = {k: values for k, values in s.swept.items() if k != "guide" or len(self.guides) > 1}
        swept = listed(
            [f"{NAMES.get(k, k)} ({', '.join(map(format_value, values))})" for k, values in swept.items()], 12
        )
        fixed = [
            format_point(self.points[0].row, [k]) for k in recorded_settings(self.points) if k not in self.settings
        ]
        lines = [
            *(
                [f"{plain(record['what'])}; hash `{tick(record['hash'])}`." for record in s.weights.values()][
                    :MAX_WEIGHTS
                ]
                or [f"{plain(s.what)}{trained}{ema}; model hash `{tick(s.model_hash)}`."]
            ),
            f"{format_count(len(s.weights) - MAX_WEIGHTS, 'more set')} of weights; sweep.json has all."
            if len(s.weights) > MAX_WEIGHTS
            else "",
            f"{format_count(len(self.points), 'point')}, {format_count(s.count, 'image')} each: the same classes and noise "
            f"at every point, seed {s.seed}, {plain(s.precision)}, batches of {s.batch_size}.",
            f"{format_count(other_points, 'more finished point')} {'is' if other_points == 1 else 'are'} in points/, not requested this time."
            if other_points
            else "",
            f"Swept: {plain(swept)}." if swept else "Nothing was swept.",
            *self._guided_by(),
            f"At every point: {plain(', '.join(fixed))}. Scale 1 is no guidance."
            if fixed
            else "Scale 1 is no guidance.",
            *self._measured_by(),
        ]
        if r:
            print_ = f", fingerprint `{tick(r['fingerprint'])}`" if r.get("fingerprint") else ""
            lines.append(
                f"Reference: {plain(r.get('name', ''))}, {format_count(r.get('count') or 0, 'image')}{print_}."
            )
        made = [f"{name} {number}" for name, number in s.versions.items()]
        if made or s.date:
            with_ = f" with {plain(', '.join(made))}" if made else ""
            lines.append(f"Made{with_}{f' on {plain(s.date)}' if s.date else ''}.")
        return [f"- {line}" for line in lines if line]

    def _guided_by(self) -> list[str]:
        """The path of the guide, which is "guide" everywhere else."""
        hashed = f", hash `{tick(self.sweep.guide_hash)}`" if self.sweep.guide_hash and len(self.guides) == 1 else ""
        paths = [f"{short}: `{tick(path)}`" for path, short in self.guides.items()]
        return [f"Guided against another network. {_capital(listed(paths, 12))}{hashed}."] if paths else []

    def _measured_by(self) -> list[str]:
        """Whose features, whose class probabilities, how many neighbours."""
        e, classifier, lines = self.sweep.extractor, self.sweep.classifier, []
        if e:
            seen = taken_in(e, *self._size())
            hashed = f", hash `{tick(e['hash'])}`" if e.get("hash") else ""
            own = " It is not the network that FID is defined by: compare its numbers with its own alone."
            detail = f" (images {plain(seen)})" if seen else ""
            lines.append(
                f"Features: {plain(e.get('name') or UNNAMED)}{detail}{hashed}.{'' if e.get('is_fid') else own}"
            )
        if classifier:
            who = "the same network" if _same(e, classifier) else plain(classifier.get("name") or UNNAMED)
            hashed = (
                f", hash `{tick(classifier['hash'])}`" if classifier.get("hash") and not _same(e, classifier) else ""
            )
            fraction = heldout_accuracy(classifier)
            right = "" if fraction is None else f": the classifier gets {percent(fraction)} of held-out images right"
            lines.append(f"Accuracy is by the class probabilities of {who}{hashed}{right}.")
        near = [metric_names(self.words)[m] for m in NEIGHBOURS if m in self.metrics]
        return [*lines, f"{_capital(listed(near))}: k = {self.sweep.k} nearest neighbours."] if near else lines

    def _size(self) -> tuple[int | None, int | None]:
        """H and W of the images."""
        shown = next((p.shown for p in self.points if p.shown is not None and p.shown.size), None)
        side = self.sweep.reference.get("image_size")
        return (side, side) if shown is None else (shown.shape[2], shown.shape[3])

    def _points(self) -> list[str]:
        if not self.metrics:
            head = ["point", "evaluations per image", "contrast", "saturation", "clipped"]
            statistics = [p.row.get("diagnostics", {}) for p in self.points]
            rows = [
                [plain(self.format_point(p)), str(p.row.get("nfe", "-"))]
                + [_number(d.get("contrast_ratio")), _number(d.get("saturation_ratio")), _number(clipped_fraction(p))]
                for p, d in zip(self.points, statistics)
            ]
            return [*table(head, rows), "", "Contrast and saturation: as a ratio to the data's."]
        head = ["point", "evaluations per image", *(plain(self.titles[m]) for m in self.metrics)]
        rows = [
            [plain(self.format_point(p)), str(p.row.get("nfe", "-")), *(self._value(p, m) for m in self.metrics)]
            for p in self.points
        ]
        return [
            *table(head, rows),
            "",
            "± one standard error over the images, where it is not 0. **Bold**: best; \\*: not distinguishable from it.",
        ]

    def _value(self, point: PointResult, metric: str) -> str:
        text = _with_error(point.row, metric)
        choice = self.choices.get(metric)
        if choice is None or point.id not in choice.members:
            return text
        return f"**{text}**" if point.id == choice.best else f"{text} \\*"

    def _best(self) -> list[str]:
        if not self.choices:
            return []
        head = ["metric", "better", "best at", "value", "not distinguishable"]
        rows = [
            [
                plain(self.titles[m]),
                METRICS[m].better,
                plain(self.format_point(c.best)),
                _with_error(self.row[c.best], m),
                self._others(c),
            ]
            for m, c in self.choices.items()
        ]
        note = (
            "A point is not distinguishable from the best if the 95% interval of their difference contains 0: a bootstrap over the "
            "images, which share classes and noise at every point."
        )
        fronts = []
        for a, b in self.trades:
            front = pareto(self.points, a, b)
            what = " and ".join(metric_names(self.words)[m] for m in (a, b))
            fronts += ["", f"Not beaten in both {what}: {plain(format_points(front, self.points))}."]
        return ["## Best by each metric", "", *table(head, rows), "", note, *fronts]

    def _others(self, choice: BestSet) -> str:
        if not choice.intervals:
            return "(no other point has it)"
        others = choice.members[1:]
        if len(others) == len(choice.intervals):
            return "all others"
        return plain(listed([self.format_point(i) for i in others], 6)) if others else "none"

    def _classes(self) -> list[str]:
        if not self.by_class:
            return []
        lines = ["## Best by class"]
        for metric, sets in self.by_class.items():
            rows = [
                [
                    plain(self._class_name(c)),
                    plain(self.format_point(k.best)),
                    self._class_value(k, metric, c),
                    self._others(k),
                ]
                for c, k in enumerate(sets[:MAX_SHOWN_CLASSES])
                if k is not None
            ]
            left = (
                f" The first {MAX_SHOWN_CLASSES} of {len(sets):,} classes; sweep.json has all."
                if len(sets) > MAX_SHOWN_CLASSES
                else ""
            )
            blank = sum(k is None for k in sets[:MAX_SHOWN_CLASSES])
            none = f" {blank} without a value." if blank else ""
            head = ["class", "best at", "value", "not distinguishable"]
            lines += [
                "",
                f"{plain(self.titles[metric])}, {METRICS[metric].better} is better.{left}{none}",
                "",
                *table(head, rows),
                *self._warnings(metric),
            ]
        return lines

    def _class_value(self, choice: BestSet, metric: str, index: int) -> str:
        """With a mark where `_warnings` says why."""
        text = _with_error(self.row[choice.best], metric, index)
        doubt = metric_value(self.row[choice.best], metric, index)[2] or self._few_images(metric, index)
        return f"{text} {MARK}" if doubt else text

    def _few_images(self, metric: str, index: int) -> bool:
        influence = (
            next((p.class_influence.get(metric) for p in self.points if p.class_influence.get(metric)), None) or []
        )
        return (
            index < len(influence)
            and influence[index] is not None
            and len(influence[index]) < MIN_CLASS_IMAGES_FOR_VALUES
        )

    def _warnings(self, metric: str) -> list[str]:
        """What the mark beside a class's value means."""
        sets = self.by_class[metric][:MAX_SHOWN_CLASSES]
        whys = [metric_value(self.row[k.best], metric, c)[2] for c, k in enumerate(sets) if k is not None]
        few_images = any(self._few_images(metric, c) for c, k in enumerate(sets) if k is not None)
        reasons = [why for why in dict.fromkeys(whys) if why][:1]
        reasons += (
            [f"fewer than {MIN_CLASS_IMAGES_FOR_VALUES} images of the class"] if few_images and not reasons else []
        )
        return ["", f"{MARK} {plain('; '.join(reasons))}."] if reasons else []

    def _confirmed(self) -> list[str]:
        """Before and after of the metrics by which a point is in the best set; sentences on the best only."""
        if not self.confirmed:
            return []
        chosen_by = [m for m, c in self.choices.items() if set(c.members) & set(self.again)]
        rows = [
            [plain(self.format_point(i)), *(self._before_and_after(i, m) for m in chosen_by)]
            for i in self.again
            if any(i in self.choices[m].members for m in chosen_by)
        ]
        if not rows:
            return ["## With fresh seeds", "", "None of the points that were measured again was chosen by a metric."]
        why = (
            "The best of several is partly the luckiest of them, so that it was sampled again with fresh seeds: as chosen, then "
            "(→) with fresh seeds, where a point was best (bold) or not distinguishable from the best."
        )
        before_and_after = table(["point", *(plain(self.titles[m]) for m in chosen_by)], rows)
        sentences = [
            f"- {plain(self.format_point(i))}: {plain(selection_bias_note(*self.again[i], m, self.words[m]))}"
            for m, i in self._best_again().items()
        ]
        return ["## With fresh seeds", "", why, "", *before_and_after, "", " ".join(self._holds_up()), "", *sentences]

    def _best_again(self) -> dict[str, str]:
        """By metric, the best point, of those that were measured again."""
        return {
            m: c.best
            for m, c in self.choices.items()
            if c.best in self.again and metric_value(self.again[c.best][1].row, m)[0] is not None
        }

    def _before_and_after(self, point: str, metric: str) -> str:
        choice, (before, after) = self.choices[metric], self.again[point]
        if point not in choice.members:
            return ""
        text = f"{_with_error(before.row, metric)} → {_with_error(after.row, metric)}"
        return f"**{text}**" if point == choice.best else text

    def _holds_up(self) -> list[str]:
        """How many best values were luck, and whether the best points are the best again."""
        best = self._best_again()
        if not best:
            return ["No best point was measured again."]
        moved = {m: worse_by(*self.again[i], m) for m, i in best.items()}
        known = [z for z in moved.values() if z is not None]
        worse = sum(z > CHANCE_ERRORS for z in known)
        of = f"Of {format_count(len(known), 'best value')}, {worse or 'none'} {'is' if worse < 2 else 'are'}"
        sentences = [
            f"{of} worse with fresh seeds by more than {CHANCE_ERRORS:g} standard errors (about one in twenty moves so far by chance, "
            "for the worse or the better)."
        ]
        compared = [m for m in best if m in self.choices_again and self.choices_again[m].intervals]
        if not compared:
            return [*sentences, "Too few points were measured again to compare them."]
        lost = [m for m in compared if best[m] not in self.choices_again[m].members]
        of = f"among the {format_count(len(self.again), 'point')} measured again, by the fresh values alone, the best point"
        if not lost:
            return [*sentences, f"The best sets hold up: {of} is still in the best set of every metric."]
        now = [
            f"{metric_names(self.words)[m]} (now best at {plain(self.format_point(self.choices_again[m].best))})"
            for m in lost
        ]
        held = f"{len(compared) - len(lost)} of {format_count(len(compared), 'metric')}"
        return [*sentences, f"{_capital(of)} is still in the best set of {held}; not by {listed(now, 8)}."]

    def _figures_section(self, images: Sequence[str], earlier: Sequence[str]) -> list[str]:
        lines = [f"![{name.removesuffix('.png')}]({name})" for name in images]
        if not plots.available():
            what, _, command = plots.MISSING.partition(": ")
            old = (
                f" {listed(earlier, 8)} here {'is' if len(earlier) == 1 else 'are'} of an earlier report."
                if earlier
                else ""
            )
            lines.append(f"{_capital(what)}: `{command}`.{old}")
        return ["## Images", "", "\n\n".join(lines)] if lines else []

    def _notes(self) -> list[str]:
        """Why columns are blank, and what is to be said of those that are not."""
        notes: dict[tuple[bool, str], dict[str, list[PointResult]]] = {}
        for p in self.points:
            for m in METRICS:
                value, _, why = metric_value(p.row, m)
                if value is None or why:
                    notes.setdefault((value is None, why or "not measured"), {}).setdefault(m, []).append(p)
        lines: dict[tuple[str, bool, str], list[str]] = {}
        for (blank, why), by_metric in notes.items():
            for m, points in by_metric.items():
                where = (
                    ""
                    if len(points) == len(self.points)
                    else f" at {format_points([p.id for p in points], self.points)}"
                )
                lines.setdefault((where, blank, why), []).append(self.titles[m])
        items = []
        for (where, blank, why), metrics in lines.items():
            none = f" {'has' if len(metrics) == 1 else 'have'} no value" if blank else ""
            items.append(f"- {plain(f'{listed(metrics, 8)}{none}{where}: {why}')}")
        items += [f"- {plain(caution)}" for caution in self._cautions()]
        return ["## Notes", "", *items] if items else []

    def _cautions(self) -> list[str]:
        """Cautions about these numbers."""
        if not self.metrics:
            return []
        count = min((p.row.get("count") or self.sweep.count for p in self.points), default=0)
        errors = [metric_value(p.row, m)[1] for p in self.points for m in self.metrics]
        errors += [
            metric_value(self.row[k.best], m, c)[1]
            for m, sets in self.by_class.items()
            for c, k in enumerate(sets[:MAX_SHOWN_CLASSES])
            if k is not None
        ]
        notes = [
            note_few_images(count, " per point"),
            note_weak_classifier(self.sweep.classifier) if "accuracy" in self.metrics else None,
            CERTAIN if 0 in errors else None,
            GROWING if {"recall", "coverage"} & set(self.metrics) else None,
        ]
        return [note for note in notes if note]


# ---------------------------------------------------------------------- small things


def _titles(sweep: Sweep) -> dict[str, str]:
    """What to call the metrics, with whose they are."""
    clean = lambda record: record | {"name": one_line(record.get("name") or "")}  # noqa: E731
    extractor, classifier = clean(sweep.extractor), clean(sweep.classifier)
    return titles(extractor, classifier, _scorer(extractor, classifier))


def _scorer(extractor: Mapping, classifier: Mapping) -> Mapping | None:
    """Whose probabilities the inception score is of: the extractor's own, if it has any; None where the records do not say."""
    if (
        _same(extractor, classifier)
        or extractor.get("class_names")
        or extractor["name"] in CLASSIFIERS
        or not classifier["name"]
    ):
        return extractor
    return classifier if extractor["name"] == "dinov2" else None


def _same(extractor: Mapping, classifier: Mapping) -> bool:
    return all(extractor.get(key) == classifier.get(key) for key in ("name", "hash"))


def _guides(points: Iterable[PointResult]) -> dict[str, str]:
    """What stands for each guide's path: "guide", or "guide 1", "guide 2", or for checkpoints of one run "guide step 200"."""
    paths = [p.row.get("guide") for p in points]
    paths = list(dict.fromkeys(str(g) for g in paths if g not in (None, "none")))
    steps = [re.fullmatch(r"(.*)/step-0*([0-9]+)(:.*)?", path) for path in paths]
    if len(paths) > 1 and all(steps) and len({step[1] for step in steps}) == 1:
        return {path: f"guide step {step[2]}{step[3] or ''}" for path, step in zip(paths, steps)}
    return {path: f"guide {i + 1}" if len(paths) > 1 else "guide" for i, path in enumerate(paths)}


def _renamed(point: PointResult, guides: Mapping[str, str]) -> PointResult:
    guide = point.row.get("guide")
    return replace(point, row=point.row | {"guide": guides.get(guide, guide)}) if guide else point


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _select_columns(points: Sequence[PointResult], best: set[str]) -> list[PointResult]:
    """At most MAX_COLUMNS points in their order: the best ones, and evenly of the others."""
    others = [p.id for p in points if p.id not in best]
    room = MAX_COLUMNS - sum(p.id in best for p in points)
    if len(others) > room:
        others = [others[round(i * (len(others) - 1) / max(room - 1, 1))] for i in range(max(room, 0))]
    return [p for p in points if p.id in best or p.id in others]


def _head(row: Mapping, settings: Sequence[str]) -> str:
    """A point over its column: the scale, and briefly what else differs."""
    return " / ".join(_brief_setting(s, row.get(s)) for s in (settings or ["scale"]))


def _brief_setting(setting: str, value: object) -> str:
    if isinstance(value, (int, float)):
        return f"{value} steps" if setting == "steps" else f"{setting} {value:g}"
    return (
        {"interval": "all t", "guide": "null"}.get(setting, f"no {setting}") if value in (None, "none") else str(value)
    )


def _with_error(row: Mapping, metric: str, class_index: int | None = None) -> str:
    value, error, _ = metric_value(row, metric, class_index)
    return plus_minus(value, error) if error else rounded(value, error)


def _number(value: float | None) -> str:
    return "-" if _finite(value) is None else f"{value:.3g}"


def _finite(value):
    """The same with None in place of numbers that JSON cannot represent."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # a name may contain lone surrogates


def _png(save) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()
