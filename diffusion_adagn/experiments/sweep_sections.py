"""The sections of a sweep's report: tables with fixed captions, and the sentences that decide something."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

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
)
from ..renamed import extractor_name
from ..render.report import Code, Part, Section, Shown, Strong, Table
from ..render.text import listed, percent, plus_minus
from . import point_results, selection, verdicts
from . import sweep_plots as plots
from .comparison import OwnBest
from .cost import duration
from .heat_map import heat_map
from .intervals import verdict
from .point_results import PointResult
from .selection import BestSet
from .sweep_results import SweepResults

MAX_WEIGHTS = 24  # in the page
NEIGHBOURS = ("precision", "recall", "density", "coverage")
EQUAL = (
    "A point is not distinguishable from the best if the 95% interval of their difference contains 0: a bootstrap over "
    "the images, which share classes and noise at every point."
)
FOREIGN = "Not the network that FID is defined by: compare its numbers with its own alone."


def charts(report: SweepResults) -> list[Section]:
    """What there is something to draw for."""
    points, titles, found = report.points, report.titles, []
    if report.metrics:
        draw = partial(plots.curves, points, report.settings, report.choices, titles)
        hidden = plots.hidden_points(points, [c.best for c in report.choices.values()])
        left = f" Not shown: {hidden} of {len(points)} points (at most {plots.MAX_LINES} lines)." if hidden else ""
        note = f"Bars: one standard error. Several lines are shifted a little, so that equal values can be seen.{left}"
        found.append(Section("Metrics", [Shown("curves", draw, "metrics by setting"), note]))
    if report.heat_map_axes and report.choices:
        draw = partial(heat_map, points, report.heat_map_axes, report.choices, titles)
        found.append(Section("Two settings", [Shown("heat_map", draw, "metrics by two settings")]))
    if report.trades:
        draw = partial(plots.tradeoff, points, *report.trades[0], titles)
        rows = [
            [
                " and ".join(verdicts.metric_names(report.words)[m] for m in pair),
                point_results.format_points(selection.pareto(points, *pair), points),
            ]
            for pair in report.trades
        ]
        table = Table(["metrics", "points that are not beaten in both"], rows)
        found.append(Section("Trade-off", [Shown("tradeoff", draw, "one metric against another"), table]))
    if any(p.row.get("diagnostics") for p in points):
        found.append(
            Section("Image statistics", [Shown("diagnostics", partial(plots.diagnostics, points), "image statistics")])
        )
    return found


def points_table(report: SweepResults) -> Section:
    """Every point with its metrics; without metrics, with its image statistics."""
    if not report.metrics:
        head = ["point", "evaluations per image", "contrast", "saturation", "clipped"]
        rows = []
        for p in report.points:
            d = p.row.get("diagnostics", {})
            values = (d.get("contrast_ratio"), d.get("saturation_ratio"), point_results.clipped_fraction(p))
            rows.append(
                [report.format_point(p), *(f"{v:.3g}" if v is not None else "-" for v in (p.row.get("nfe"), *values))]
            )
        return Section("Points", [Table(head, rows, "Contrast and saturation: as a ratio to the data's.")])
    head = ["point", "evaluations per image", *(report.titles[m] for m in report.metrics)]
    rows = [
        [report.format_point(p), str(p.row.get("nfe", "-")), *(_value(report, p, m) for m in report.metrics)]
        for p in report.points
    ]
    note = "± one standard error over the images, where it is not 0. Bold: best; *: not distinguishable from it."
    return Section("Points", [Table(head, rows, note)])


def _value(report: SweepResults, point: PointResult, metric: str) -> str:
    text = with_error(point.row, metric)
    choice = report.choices.get(metric)
    if choice is None or point.id not in choice.members:
        return text
    return Strong(text) if point.id == choice.best else f"{text} *"


def with_error(row: Mapping, metric: str, class_index: int | None = None) -> str:
    """A metric's value with its standard error."""
    value, error, _ = point_results.metric_value(row, metric, class_index)
    return plus_minus(value, error) if error else point_results.rounded(value, error)


def best(report: SweepResults) -> Section:
    """The best point of each metric, and which cannot be distinguished from it."""
    head = ["metric", "better", "best at", "value", "not distinguishable"]
    rows = [
        [
            report.titles[m],
            METRICS[m].better,
            report.format_point(c.best),
            with_error(report.row[c.best], m),
            _others(report, c),
        ]
        for m, c in report.choices.items()
    ]
    return Section("Best by each metric", [Table(head, rows, EQUAL)])


def _others(report: SweepResults, choice: BestSet) -> str:
    if not choice.intervals:
        return "(no other point has it)"
    others = choice.members[1:]
    if len(others) == len(choice.intervals):
        return "all others"
    return listed([report.format_point(i) for i in others], 6) if others else "none"


def compared(report: SweepResults, one: OwnBest) -> Section:
    """The values of a setting, each at its own best point."""
    name = point_results.NAMES.get(one.setting, one.setting)
    head = [name, "best at", "evaluations per image", *(report.titles[m] for m in report.metrics)]
    rows = []
    for value, point in one.best.items():
        row = report.row[point]
        values = [with_error(row, m) for m in report.metrics]
        rows.append([str(value), report.format_point(point), str(row.get("nfe", "-")), *values])
    return Section(f"Each {name} at its own best", [one.sentence(report.words), Table(head, rows)])


def ranked(report: SweepResults) -> Section:
    """Models unguided and each at its best guidance."""
    one = report.ranking
    if one is None:
        none = "No two models have points both at scale 1 and at other scales: none are ranked."
        return Section("Models", [none])
    places, rows = list(one.guided), []
    for i, (model, point) in enumerate(one.unguided.items()):
        best = one.guided[model]
        values = [with_error(report.row[p], one.metric) for p in (point, best)]
        rows.append(
            [str(model), f"{i + 1}", values[0], f"{places.index(model) + 1}", report.format_point(best), values[1]]
        )
    head = ["model", "place unguided", "value", "place at best guidance", "at", "value"]
    title = f"Models unguided and at their best guidance, by {verdicts.metric_names(report.words)[one.metric]}"
    return Section(title, [one.sentence(report.words), Table(head, rows)])


def intervals(report: SweepResults) -> Section:
    """The intervals that were proposed, and whether they held up."""
    found, metric = report.sweep.intervals, selection.primary_metric(report.choices)
    held = verdict(report.points, found["proposed"], metric, report.words) if metric else "No metric compares them."
    return Section("Proposed intervals", [found["sentence"], held])


def rounds(report: SweepResults) -> Section:
    """What was dropped in which round of a budget."""
    rows = []
    for i, one in enumerate(report.sweep.rounds):
        by = f"{verdicts.metric_names(report.words)[one['metric']]} ({METRICS[one['metric']].better} is better)"
        numbers = [f"{i + 1}", f"{len(one['points'])}", f"{one['count']:,}"]
        rows.append([*numbers, by, ", ".join(one["dropped"]) or "none", duration(one["seconds"])])
    head = ["round", "points", "images of each", "compared by", "dropped, the worst last", "time until its end"]
    note = (
        f"A budget of {duration(report.sweep.budget)}. Every round compares at equal numbers of images and gives more to "
        "the better half; everything else in this report is of the last round."
    )
    return Section("Rounds", [Table(head, rows, note)])


# ---------------------------------------------------------------------- classes


def classes(report: SweepResults) -> Section:
    """The best point of each class, by each metric that classes have."""
    parts: list[Part] = []
    first = next(iter(report.by_class))
    draw = partial(plots.per_class, report.points, first, report.sweep.class_names, report.titles)
    parts.append(Shown("classes", draw, "a metric by class and point"))
    for metric, sets in report.by_class.items():
        shown = [(c, k) for c, k in enumerate(sets[: plots.MAX_SHOWN_CLASSES]) if k is not None]
        rows, doubts = [], []
        for c, k in shown:
            why = point_results.metric_value(report.row[k.best], metric, c)[2] or _few_images(report, metric, c)
            doubts += [why] if why else []
            text = with_error(report.row[k.best], metric, c) + (f" {MARK}" if why else "")
            rows.append([report.class_name(c), report.format_point(k.best), text, _others(report, k)])
        caption = f"{METRICS[metric].better.capitalize()} is better."
        caption += f" {MARK} {doubts[0]}." if doubts else ""
        if len(sets) > plots.MAX_SHOWN_CLASSES:
            caption += f" The first {plots.MAX_SHOWN_CLASSES} of {len(sets):,} classes; sweep.json has all."
        missing = min(len(sets), plots.MAX_SHOWN_CLASSES) - len(shown)
        caption += f" Classes without a value: {missing}." if missing else ""
        parts += [report.titles[metric], Table(["class", "best at", "value", "not distinguishable"], rows, caption)]
    return Section("Best by class", parts)


def _few_images(report: SweepResults, metric: str, index: int) -> str:
    found = next((p.class_influence[metric] for p in report.points if p.class_influence.get(metric)), [])
    few = index < len(found) and found[index] is not None and len(found[index]) < MIN_CLASS_IMAGES_FOR_VALUES
    return f"fewer than {MIN_CLASS_IMAGES_FOR_VALUES} images of the class" if few else ""


# ---------------------------------------------------------------------- fresh seeds


def confirmed(report: SweepResults) -> Section:
    """The best sets before and after: as chosen, and sampled again with fresh seeds."""
    heading = "With fresh seeds"
    rows = []
    for metric, choice in report.choices.items():
        for i in report.again:
            if i in choice.members:
                rows.append(_before_and_after(report, metric, i))
    if not rows:
        return Section(heading, ["None of the points that were measured again was chosen by a metric."])
    note = (
        "The best of several is partly the luckiest of them. Bold: the best as chosen. Worse by: in standard errors of "
        "the difference; about one in twenty moves by more than 2 by chance."
    )
    head = ["metric", "point", "as chosen", "with fresh seeds", "worse by", "best again"]
    return Section(heading, [*_holds_up(report), Table(head, rows, note)])


def _before_and_after(report: SweepResults, metric: str, point: str) -> list[str]:
    choice, again = report.choices[metric], report.choices_again.get(metric)
    before, after = report.again[point]
    worse = selection.worse_by(before, after, metric)
    held = "-" if again is None or not again.intervals else "yes" if point in again.members else "no"
    text = with_error(before.row, metric)
    chosen = Strong(text) if point == choice.best else text
    error = "-" if worse is None else f"{worse + 0.0:+.1f}"  # no "-0.0"
    return [report.titles[metric], report.format_point(point), chosen, with_error(after.row, metric), error, held]


def _holds_up(report: SweepResults) -> list[str]:
    """How many best values were luck, and whether the best points are the best again."""
    best = {m: c.best for m, c in report.choices.items() if c.best in report.again}
    moved = {m: selection.worse_by(*report.again[i], m) for m, i in best.items()}
    luck = [report.words[m] for m, z in moved.items() if z is not None and z > selection.CHANCE_ERRORS]
    again = report.choices_again
    lost = [report.words[m] for m, i in best.items() if m in again and again[m].intervals and i not in again[m].members]
    sentences = []
    if luck:
        sentences.append(f"The value of the best was luck by {listed(luck, 8)}.")
    if lost:
        sentences.append(f"With fresh seeds another point is best by {listed(lost, 8)}.")
    if best and not luck and not lost:
        sentences.append("The best points hold up with fresh seeds.")
    return sentences


# ---------------------------------------------------------------------- notes and origin


def notes(report: SweepResults) -> Section | None:
    """Why values are missing, and cautions on those that are not."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for metric in METRICS:
        for p in report.points:
            value, _, why = point_results.metric_value(p.row, metric)
            if value is None or why:
                reasons.setdefault((report.titles[metric], why or "not measured"), []).append(p.id)
    every = len(report.points)
    rows = [
        [title, "every point" if len(ids) == every else point_results.format_points(ids, report.points), why]
        for (title, why), ids in reasons.items()
    ]
    table = [Table(["metric", "at", "no value, or with a caution"], rows)] if rows else []
    parts = [*table, *([found] if (found := _cautions(report)) else [])]
    return Section("Notes", parts) if parts else None


def _cautions(report: SweepResults) -> list[str]:
    if not report.metrics:
        return []
    count = min((p.row.get("count") or report.sweep.count for p in report.points), default=0)
    errors = [point_results.metric_value(p.row, m)[1] for p in report.points for m in report.metrics]
    for metric, sets in report.by_class.items():
        shown = [(c, k) for c, k in enumerate(sets[: plots.MAX_SHOWN_CLASSES]) if k is not None]
        errors += [point_results.metric_value(report.row[k.best], metric, c)[1] for c, k in shown]
    found = [
        note_few_images(count, " per point"),
        note_weak_classifier(report.sweep.classifier) if "accuracy" in report.metrics else None,
        CERTAIN if 0 in errors else None,
        GROWING if {"recall", "coverage"} & set(report.metrics) else None,
    ]
    return [note for note in found if note]


def origin(report: SweepResults, other_points: int) -> Section:
    """What was swept, and what made the numbers."""
    s, r = report.sweep, report.sweep.reference
    rows = [*_weights(report), ["points", f"{len(report.points):,}"], ["images per point", f"{s.count:,}"]]
    rows.append(["seed, precision, batch", f"{s.seed}, {s.precision}, {s.batch_size}"])
    if other_points:
        rows.append(["finished points that were not requested this time", f"{other_points:,} in points/"])
    for setting, values in s.swept.items():
        if setting != "guide" or len(report.guides) > 1:
            words = [report.guides.get(v, plots.format_value(setting, v)) for v in values]
            rows.append([f"swept: {point_results.NAMES.get(setting, setting)}", ", ".join(words)])
    rows += [[short, Code(path)] for path, short in report.guides.items()]
    if s.guide_hash and len(report.guides) == 1:
        rows.append(["hash of the guide", Code(s.guide_hash)])
    fixed = [
        point_results.format_setting(k, report.points[0].row.get(k))
        for k in point_results.recorded_settings(report.points)
        if k not in report.settings
    ]
    rows += [["at every point", ", ".join(fixed)]] if fixed else []
    rows += _measured_by(report)
    if r:
        rows.append(["reference", f"{r.get('name', '')}, {r.get('count') or 0:,} images"])
        rows += [["fingerprint of the reference", Code(r["fingerprint"])]] if r.get("fingerprint") else []
    rows += [["versions", ", ".join(f"{n} {v}" for n, v in s.versions.items())]] if s.versions else []
    rows += [["date", s.date]] if s.date else []
    note = "Every point has the same classes and noise. Scale 1 is no guidance."
    again = [Code(s.command)] if s.command else []
    return Section("How it was made", [Table(["what", "value"], rows, note), *again])


def _weights(report: SweepResults) -> list[list[str]]:
    s = report.sweep
    if s.weights:
        rows = [[record["what"], Code(record["hash"])] for record in s.weights.values()]
        more = (
            [["more sets of weights, in sweep.json", f"{len(rows) - MAX_WEIGHTS}"]] if len(rows) > MAX_WEIGHTS else []
        )
        return rows[:MAX_WEIGHTS] + more
    trained = f", trained for {s.trained_steps:,} steps" if s.trained_steps and "steps" not in s.what else ""
    ema = f", EMA decay {s.ema_decay:g}" if s.ema_decay is not None else ""
    return [["weights", f"{s.what}{trained}{ema}"], ["hash of the model", Code(s.model_hash)]]


def _measured_by(report: SweepResults) -> list[list[str]]:
    """Whose features, whose class probabilities, how many neighbours."""
    e, classifier, rows = report.sweep.extractor, report.sweep.classifier, []
    unnamed = "an extractor without a name"
    if e:
        seen = taken_in(e, *report.size())
        rows.append(["features", (extractor_name(e.get("name")) or unnamed) + (f" (images {seen})" if seen else "")])
        rows += [["hash of the features", Code(e["hash"])]] if e.get("hash") else []
        rows += [] if e.get("is_fid") else [["FID", FOREIGN]]
    if classifier:
        same = report.same_network
        fraction = heldout_accuracy(classifier)
        right = "" if fraction is None else f", which gets {percent(fraction)} of held-out images right"
        who = "the same network" if same else extractor_name(classifier.get("name")) or unnamed
        rows.append(["accuracy: class probabilities of", who + right])
        rows += [["hash of the classifier", Code(classifier["hash"])]] if classifier.get("hash") and not same else []
    near = [verdicts.metric_names(report.words)[m] for m in NEIGHBOURS if m in report.metrics]
    return [*rows, [f"nearest neighbours of {listed(near)}", f"{report.sweep.k}"]] if near else rows
