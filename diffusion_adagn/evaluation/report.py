"""The files of an evaluation: evaluation.json with every number and its origin, report.html, evaluation.md, per_class.csv."""

import csv
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import numpy as np
from PIL import Image

from ..atomic import atomic_write
from ..renamed import extractor_name
from ..render.report import Code, Report, Section, Shown, Table, table_lines
from .extractors import Extractor
from .extractors.base import described
from .metrics import METRICS
from .results import Results, versions
from .setup import EvalSetup

JSON, MARKDOWN, CLASSES, PAGE = "evaluation.json", "evaluation.md", "per_class.csv", "report.html"
NEIGHBOURS = "neighbours"  # the sheet of nearest real images, without its ending
FOREIGN = (
    "These numbers are not comparable with published ones: the features are not those of the FID's Inception network."
)
MIN_IMAGES = (
    "Published FIDs are of 50,000 images, mostly against the whole training set; with fewer the FID comes out higher."
)
PUBLISHED = 50_000


MIN_CLASS_IMAGES, MIN_CLASS_IMAGES_FOR_VALUES = 100, 50  # with fewer images, values are unreliable
MARK = "†"  # marks an unreliable value
MIN_CLASSIFIER_ACCURACY = 0.7  # on held-out images, below which the accuracy metric is unreliable
GROWING = (
    "Recall and coverage grow with the number of sampled images: compare them at equal numbers of sampled and real "
    "images only."
)
CERTAIN = (
    "A value without ± has a standard error of 0: all of the sampled images count, or none does. That is not certainty."
)


def titles(extractor: Mapping, classifier: Mapping | None, scorer: Mapping | None) -> dict[str, str]:
    """The title of each metric: FID only for features of the FID's Inception network.

    Args:
        extractor: The record of the extractor.
        classifier: The record of the classifier.
        scorer: The record of the network whose probabilities gave the inception score.
    """
    measured_by = {"frechet": extractor, "kid": extractor, "inception_score": scorer, "accuracy": classifier}
    metric_titles = {name: kind.title for name, kind in METRICS.items()}
    for metric, who in measured_by.items():
        if who and who.get("name") and not who.get("is_fid"):
            metric_titles[metric] += f" ({extractor_name(who['name'])})"
    return metric_titles | ({"frechet": "FID"} if extractor.get("is_fid") else {})


def note_not_comparable(extractor: Mapping, count: int) -> str | None:
    """The note on the comparison with published values; None if they are comparable."""
    if not extractor.get("is_fid"):
        return FOREIGN
    return MIN_IMAGES if count < PUBLISHED else None


def heldout_accuracy(classifier: Mapping | None) -> float | None:
    """The classifier's recorded accuracy on held-out images; None if it is not recorded."""
    fraction = (classifier or {}).get("heldout_accuracy")
    return fraction if isinstance(fraction, (int, float)) else None


def note_weak_classifier(classifier: Mapping | None) -> str | None:
    """The note on a classifier with low accuracy; None if it is accurate enough."""
    fraction = heldout_accuracy(classifier)
    if fraction is None or fraction >= MIN_CLASSIFIER_ACCURACY:
        return None
    return f"The classifier itself is right on {fraction:.0%} of held-out images: its accuracy says little."


def note_few_images(count: int, each: str = "") -> str | None:
    """The note on too few images; None if there are enough. each: "" or " per point"."""
    if count >= MIN_CLASS_IMAGES:
        return None
    images = "image" if count == 1 else "images"
    return f"{count:,} {images}{each} are too few: most differences are chance, and the standard errors are rough."


def taken_in(extractor: Mapping, height: int | None, width: int | None) -> str:
    """How an extractor resizes images of this size (None: unknown), such as "resized to 224 px by bicubic ..."."""
    side, how = extractor.get("resolution"), extractor.get("resize")
    if (side and (height, width) == (side, side)) or how == "none":
        return f"{side} px as they are" if side else "as they are"
    by = f" by {how}" if how else ""
    return f"resized to {side} px{by}" if side else f"resized{by}" if how else ""


def full_record(
    found: Results,
    about: dict,
    shape: tuple[int, int, int, int],
    labels: np.ndarray | None,
    scored: bool,
    setup: EvalSetup,
    memorisation: dict | None,
    notes: list[str],
    k: int,
    command: str,
) -> dict:
    """The content of evaluation.json: every number and its origin.

    Args:
        found: The results.
        about: Source, model and settings.
        shape: [N, H, W, C] of the images.
        labels: int64 [N]; None without labels.
        scored: Whether the extractor itself gives class probabilities.
        setup: The extractor, classifier and reference.
        memorisation: Its record; None if it was not computed.
        notes: Notes before those on the metrics.
        k: Neighbours of precision, recall, density and coverage.
        command: The command line.
    """
    by = described_by(setup)
    extractor, classifier = by["extractor"], by["judge"]
    metric_titles = titles(extractor, classifier, extractor if scored else classifier)
    metrics = {
        name: {"title": metric_titles[name], "better": METRICS[name].better, **measured}
        for name, measured in found.row["metrics"].items()
    }
    n, height, width, channels = shape
    return {
        "source": about["source"],
        "count": n,
        "pictures": {"height": height, "width": width, "channels": channels},
        "model": about["model"],
        "settings": about["settings"],
        "metrics": metrics,
        "class_names": list(setup.class_names),
        "class_counts": _counts(labels, setup),
        "per_class": found.row["per_class"],
        "diagnostics": found.row["diagnostics"],
        "memorisation": memorisation,
        "notes": [
            *notes,
            *filter(None, [note_not_comparable(extractor, n)]),
            *found.notes,
            *_cautions(found.row, n, classifier),
        ],
        "k": k,
        **by,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
    }


def described_by(setup: EvalSetup) -> dict:
    """The records of extractor, classifier, reference and versions in evaluation.json."""
    return {
        "against": setup.against,
        "extractor": _record(setup.extractor),
        "judge": None if setup.classifier is None else _record(setup.classifier),
        "reference": setup.reference.about,
        "versions": versions(),
    }


def _cautions(row: dict, count: int, classifier: dict | None) -> list[str]:
    """Notes on the reliability of the numbers."""
    overall, every = (
        row["metrics"],
        [*row["metrics"].values(), *(m for values in row["per_class"].values() for m in values)],
    )
    has = lambda name: overall.get(name, {}).get("value") is not None  # noqa: E731
    notes = [
        note_few_images(count),
        note_weak_classifier(classifier) if has("accuracy") else None,
        CERTAIN if any(m["standard_error"] == 0 for m in every) else None,
        GROWING if has("recall") or has("coverage") else None,
    ]
    return [note for note in notes if note]


def write_report(record: dict, out: Path) -> None:
    """Write report.html, evaluation.md, per_class.csv (with classes), and last evaluation.json.

    The sheet of neighbours is shown if `out` has it.
    """
    sheet = out / f"{NEIGHBOURS}.png"
    report_of(record, sheet if sheet.is_file() else None).save(out, PAGE, MARKDOWN)
    if record["per_class"]:
        write_classes(out / CLASSES, record)
    else:
        (out / CLASSES).unlink(missing_ok=True)
    # last, since this file marks a complete evaluation
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    atomic_write(out / JSON, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def _record(extractor: Extractor) -> dict:
    return described(extractor) | extractor.to_dict()


def _counts(labels: np.ndarray | None, setup: EvalSetup) -> dict[str, list[int] | None]:
    """The number of sampled and real images of each class."""

    def counts(class_ids: np.ndarray | None) -> list[int] | None:
        k = len(setup.class_names)
        return None if class_ids is None or not k else np.bincount(class_ids, minlength=k)[:k].tolist()

    return {"sampled": counts(labels), "reference": counts(setup.reference.labels)}


def report_of(record: dict, sheet: Path | None = None) -> Report:
    """The record as a page. sheet: the image of the nearest real images; None: there is none."""
    images = f"{record['count']:,} image{'s' * (record['count'] != 1)} against {record['against']}."
    sections = [Section("Metrics", [_metrics(record)])]
    if record["per_class"]:
        sections.append(Section("Each class", [_class_table(record)]))
    sections.append(Section("Looks", [_looks(record["diagnostics"])]))
    if record["memorisation"]:
        alt = "sampled images and the nearest real ones"
        shown = [Shown(NEIGHBOURS, lambda: Image.open(sheet), alt)] if sheet else []
        sections.append(Section("Copies", [record["memorisation"]["sentence"], *shown]))
    if record["notes"]:
        sections.append(Section("Notes", [record["notes"]]))
    return Report(f"Evaluation of {record['source']}", [*sections, _made(record)], about=images)


def overall_table(record: dict) -> str:
    """The table of metrics, one row each, aligned for a terminal."""
    return "\n".join(table_lines(_metrics(record)))


def _metrics(record: dict) -> Table:
    rows = []
    for name, m in record["metrics"].items():
        fraction = heldout_accuracy(record.get("judge")) if name == "accuracy" and m["value"] is not None else None
        notes = [
            "" if fraction is None else f"of held-out real images: {fraction:.4g}",
            "see the notes" if m["why"] else "",
        ]
        rows.append([m["title"], value_of(m), m["better"], "; ".join(filter(None, notes))])
    return Table(["metric", "value", "better", "note"], rows)


def value_of(m: dict, digits: int = 4) -> str:
    """ "0.0213 ± 0.0011", without a standard error of 0; "-" if there is no value."""
    value, error = m["value"], m["standard_error"]
    if value is None:
        return "-"
    return f"{value:.{digits}g} ± {error:.2g}" if error else f"{value:.{digits}g}"


def write_classes(file: Path, record: dict) -> Path:
    """Write one row per class: id, name, numbers of sampled and real images, and the fields of each metric."""
    columns = [(metric, key) for metric in record["per_class"] for key in ("value", "standard_error", "why")]
    header = ["class_id", "class_name", "sampled", "reference"]
    header += [metric if key == "value" else f"{metric}_{key}" for metric, key in columns]
    counts = record["class_counts"]

    def write(tmp: Path) -> None:
        with tmp.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(header)
            for i, name in enumerate(record["class_names"]):
                cells = [record["per_class"][metric][i][key] for metric, key in columns]
                reference = "" if counts["reference"] is None else counts["reference"][i]
                writer.writerow([i, name, counts["sampled"][i], reference, *("" if c is None else c for c in cells)])

    return atomic_write(file, write)


def _class_table(record: dict) -> Table:
    """One row per class; the caption explains marks, and metrics without a value for any class."""
    metrics = {m: values for m, values in record["per_class"].items() if any(v["value"] is not None for v in values)}
    sampled = record["class_counts"]["sampled"]
    few, rows = False, []
    for i, name in enumerate(record["class_names"]):
        thin = 0 < sampled[i] < MIN_CLASS_IMAGES_FOR_VALUES
        found = [values[i] for values in metrics.values()]
        doubts = [bool(m["why"]) or (thin and m["value"] is not None) for m in found]
        few |= any(doubts)
        cells = [value_of(m, 3) + f" {MARK}" * doubt for m, doubt in zip(found, doubts)]
        rows.append([name, str(sampled[i]), *cells])
    captions = [f"{MARK} {_marks_mean(record, metrics)}."] if few else []
    for metric, values in record["per_class"].items():
        if metric not in metrics:
            captions.append(f"{record['metrics'][metric]['title']} of each class left blank: {values[0]['why']}.")
    heads = [f"{record['metrics'][m]['title']}, {record['metrics'][m]['better']} is better" for m in metrics]
    return Table(["class", "sampled", *heads], rows, " ".join(captions))


def _marks_mean(record: dict, metrics: dict[str, list[dict]]) -> str:
    """The first reason of each metric."""
    reasons = []
    for metric, values in metrics.items():
        if whys := list(dict.fromkeys(m["why"] for m in values if m["why"])):
            more = f" ({len(whys) - 1} more in {CLASSES})" if len(whys) > 1 else ""
            reasons.append(f"{record['metrics'][metric]['title']}: {whys[0]}{more}")
    return "; ".join(reasons) or f"fewer than {MIN_CLASS_IMAGES_FOR_VALUES} sampled images"


def _looks(d: dict) -> Table:
    """The diagnostics that need no extractor."""
    shift, brighter = d.get("extremes_shift"), d.get("brightness_shift")
    ratio = lambda value: "-" if value is None else f"x {value:.3f}"  # noqa: E731
    real = "-" if shift is None else f"{max(d['extremes'] - shift, 0):.1%}"
    rows = [
        ["brightness (0 to 1)", f"{d['brightness']:.3f}", "-" if brighter is None else f"{brighter:+.3f}"],
        ["contrast (0 to 1)", f"{d['contrast']:.3f}", ratio(d["contrast_ratio"])],
        ["saturation (0 to 1)", f"{d['saturation']:.3f}", ratio(d["saturation_ratio"])],
        ["values at 0 or 255", f"{d['extremes']:.1%}", real],
    ]
    caption = "Against the real images: difference of brightness, ratios, and the real images' own part at 0 or 255."
    return Table(["statistic", "sampled images", "against the real images"], rows, caption)


def _made(record: dict) -> Section:
    e, r, p = record["extractor"], record["reference"], record["pictures"]
    count = "published statistics" if r["count"] is None else f"{r['count']:,} of {r['of']:,} images"
    seen = taken_in(e, p["height"], p["width"])
    fields = {
        "images": f"{record['count']:,}, {p['width']}x{p['height']}, {p['channels']} channel{'s' * (p['channels'] != 1)}",
        **{f"model's {key}": value for key, value in (record["model"] or {}).items()},
        **record["settings"],
        "extractor": f"{extractor_name(e['name'])} {e['hash']}, {e['dimension']:,} features of images {seen}",
        "judge": record["judge"] and _classifier_line(record["judge"]),
        "reference": f"{r['name']}, {count}, fingerprint {r['fingerprint'][:16]}",
        "reference's images": r.get("resized"),
        "neighbours": f"{record['k']} (precision, recall, density, coverage)",
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        "date": record["date"],
    }
    rows = [[key.replace("_", " "), _words(value)] for key, value in fields.items() if value not in (None, "")]
    command = [Code(record["command"])] if record["command"] else []
    return Section("How it was made", [Table(["what", "value"], rows), *command])


def _classifier_line(classifier: dict) -> str:
    fraction = heldout_accuracy(classifier)
    right = "" if fraction is None else f", right on {fraction:.1%} of held-out images"
    return f"{extractor_name(classifier['name'])} {classifier['hash']}{right}"


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
