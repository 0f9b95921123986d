"""The results of a sweep: its points, what is read out of them, and both as tables for programs."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

from ..errors import InputError
from ..evaluation.metrics import METRICS
from ..evaluation.report import titles
from ..render.text import one_line, shorten
from . import overguidance, point_results, selection, verdicts
from .comparison import own_bests, ranking
from .heat_map import axes_of
from .point_results import PointResult

RATIOS = ("contrast_ratio", "saturation_ratio", "brightness_shift", "extremes_shift")
IMAGE_STATISTICS = ("brightness", "contrast", "saturation", "extremes", *RATIOS)
CLASSIFIERS = (
    "efficientnet_lite0",
    "inception",
    "judge",
    "sklearn",
)  # extractors with class probabilities of their own


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


class SweepResults:
    """The points with what is read out of them once."""

    def __init__(self, sweep: Sweep, points: Iterable[PointResult], confirmed: Iterable[PointResult]):
        self.sweep, self.points, self.confirmed = (
            sweep,
            point_results.in_order(points),
            point_results.in_order(confirmed),
        )
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
        self.settings = point_results.differing(self.points)
        self.metrics = point_results.metrics_with_values(self.points)
        self.choices = selection.best_sets(self.points)
        self.largest = max(sweep.swept.get("scale") or [p.row["scale"] for p in self.points])
        self.by_class = selection.class_best_sets(self.points)
        metric = selection.primary_metric(self.choices)
        self.compared = own_bests(self.points, metric) if metric else []
        self.ranking = ranking(self.points, metric) if metric and sweep.rank else None
        self.heat_map_axes = axes_of(self.points, sweep.heat_map)
        self.trades = [t for t in selection.TRADEOFFS if set(t) <= set(self.metrics)]
        sentences = (
            verdicts.disagreement(self.choices, self.points, self.words),
            verdicts.at_the_edge(self.choices, self.points, self.words, self.largest),
        )
        self.verdict = " ".join(filter(None, sentences))
        self.same_network = _same(sweep.extractor, sweep.classifier)
        self.image_notes = overguidance.overguidance_notes(self.points)
        self.advice = selection.recommend(self.points, self.choices)
        self.again = {b.id: (b, p) for p in self.confirmed if (b := self._before(p))}
        again = {i: p for i, (_, p) in self.again.items()}
        self.use = (
            verdicts.format_advice(self.advice, self.points, self.choices, self.words, again, self.largest)
            if self.advice
            else ""
        )
        self.choices_again = selection.best_sets(
            [replace(p, row=p.row | {"id": i}) for i, (_, p) in self.again.items()]
        )

    def _before(self, point: PointResult) -> PointResult | None:
        """The point that was confirmed: of one id, or of the same settings."""
        same = lambda p: all(p.row.get(s) == point.row.get(s) for s in point_results.SETTINGS)  # noqa: E731
        return next((p for p in self.points if p.id == point.id), None) or next(
            (p for p in self.points if same(p)), None
        )

    def format_point(self, point: str | PointResult) -> str:
        return point_results.format_point(self.row[point] if isinstance(point, str) else point.row, self.settings)

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
        flat = {
            "id": row["id"],
            **{k: row.get(k) for k in (*point_results.recorded_settings(self.points), "nfe", "count")},
        }
        for metric in METRICS:
            value, error, _ = point_results.metric_value(row, metric)
            flat |= {metric: value, f"{metric}_standard_error": error}
        flat |= {
            "difference": point_results.mean_of(statistics.get("difference")),
            "clipped": point_results.mean_of(statistics.get("clipped")),
        }
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
            "pareto": {f"{a} and {b}": selection.pareto(self.points, a, b) for a, b in self.trades},
            "advice": self.advice and asdict(self.advice) | {"sentence": self.use},
            **({"guides": {name: path for path, name in self.guides.items()}} if len(self.guides) > 1 else {}),
            "sentences": [self.verdict, *self.image_notes],
            "confirmed": self.rows_again,
            "confirmed_choices": {m: asdict(c) for m, c in self.choices_again.items()},
        }
        return _bytes(json.dumps(_finite(contents), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def class_name(self, index: int) -> str:
        known = self.sweep.row_names or self.sweep.class_names
        if index < len(known):
            return shorten(known[index], 48)
        return f"class {index}" if known or self.by_class else ""

    def size(self) -> tuple[int | None, int | None]:
        """H and W of the images."""
        shown = next((p.shown for p in self.points if p.shown is not None and p.shown.size), None)
        side = self.sweep.reference.get("image_size")
        return (side, side) if shown is None else (shown.shape[2], shown.shape[3])


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


def _finite(value):
    """The same with None in place of numbers that JSON cannot represent."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # a name may contain lone surrogates
