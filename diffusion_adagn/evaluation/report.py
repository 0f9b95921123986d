"""What an evaluation leaves: evaluation.json with every number and what made it, evaluation.md to read, per_class.csv."""

import csv
import json
import platform
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from .. import __version__
from ..folders import file_into_place
from .bench import Bench
from .extractors import Extractor
from .extractors.base import described
from .metrics import METRICS
from .results import Results

JSON, MARKDOWN, CLASSES = "evaluation.json", "evaluation.md", "per_class.csv"
FOREIGN = (
    "These numbers are not comparable with published ones: the features are not those of the FID's Inception network."
)
FEWER = (
    "Published FIDs are of 50,000 pictures, mostly against the whole training set; with fewer the FID comes out higher."
)
PUBLISHED = 50_000


def titles(extractor: dict, judge: dict | None, scorer: dict | None) -> dict[str, str]:
    """How each metric is called: FID only where the features are those of the FID's Inception network.

    Takes records: of the extractor, of the judge, and of whichever of them gave the probabilities of the inception score."""
    measured_by = {"frechet": extractor, "kid": extractor, "inception_score": scorer, "accuracy": judge}
    said = {name: kind.title for name, kind in METRICS.items()}
    for name, who in measured_by.items():
        if who is not None and not who["is_fid"]:
            said[name] += f" ({who['name']})"
    return said | ({"frechet": "FID"} if extractor["is_fid"] else {})


def comparable(extractor: dict, count: int) -> str | None:
    """The note on published numbers, if there is one to make."""
    if not extractor["is_fid"]:
        return FOREIGN
    return FEWER if count < PUBLISHED else None


def full_record(
    found: Results,
    about: dict,
    shape: tuple[int, int, int, int],
    labels: np.ndarray | None,
    scored: bool,
    bench: Bench,
    memorisation: dict | None,
    notes: list[str],
    k: int,
    command: str,
) -> dict:
    """What evaluation.json holds: every number, and all that made it. shape: [N, H, W, C] of the pictures, labels theirs;
    scored: whether the extractor itself gives class probabilities; about: source, model and settings; memorisation: its record."""
    extractor, judge = _record(bench.extractor), None if bench.judge is None else _record(bench.judge)
    called = titles(extractor, judge, extractor if scored else judge)
    metrics = {
        name: {"title": called[name], "better": METRICS[name].better, **measured}
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
        "class_names": list(bench.class_names),
        "class_counts": _counts(labels, bench),
        "per_class": found.row["per_class"],
        "diagnostics": found.row["diagnostics"],
        "memorisation": memorisation,
        "notes": [*notes, *filter(None, [comparable(extractor, n)]), *found.notes],
        "against": bench.against,
        "k": k,
        "extractor": extractor,
        "judge": judge,
        "reference": bench.reference.about,
        "versions": {
            "diffusion_adagn": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "numpy")},
        },
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
    }


def write_report(record: dict, out: Path) -> None:
    """evaluation.md and per_class.csv (where there are classes), and evaluation.json last: it says that all is there."""
    _write(out / MARKDOWN, f"{markdown(record)}\n")
    if record["per_class"]:
        write_classes(out / CLASSES, record)
    else:
        (out / CLASSES).unlink(missing_ok=True)
    _write(out / JSON, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _write(file: Path, text: str) -> None:
    file_into_place(file, lambda beside: beside.write_text(text, encoding="utf-8"))


def _record(extractor: Extractor) -> dict:
    return described(extractor) | extractor.record()


def _counts(labels: np.ndarray | None, bench: Bench) -> dict[str, list[int] | None]:
    """How many pictures each class has, sampled and real."""

    def counts(some: np.ndarray | None) -> list[int] | None:
        k = len(bench.class_names)
        return None if some is None or not k else np.bincount(some, minlength=k)[:k].tolist()

    return {"sampled": counts(labels), "reference": counts(bench.reference.labels)}


def markdown(record: dict) -> str:
    """The whole record in words and tables."""
    parts = [
        f"# {record['source']}",
        f"{record['count']:,} pictures against {record['against']}.",
        overall_table(record),
    ]
    if record["per_class"]:
        parts += ["## Each class", _class_table(record)]
    parts += ["## Looks", _looks(record["diagnostics"])]
    if record["memorisation"]:
        parts += ["## Copies", record["memorisation"]["sentence"]]
    if record["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in record["notes"])]
    parts += ["## How it was made", _made(record)]
    return "\n\n".join(parts)


def overall_table(record: dict) -> str:
    """The metrics, a row each, with the columns under each other in a terminal too. Notes in words stand below it."""
    rows = [
        [m["title"], value_of(m), m["better"], "" if not m["why"] else "see below"] for m in record["metrics"].values()
    ]
    return _table(["metric", "value", "better", "note"], rows)


def value_of(m: dict, digits: int = 4) -> str:
    """ "0.0213 ± 0.0011" with the standard error; "-" where it could not be measured."""
    value, error = m["value"], m["standard_error"]
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if error is None else f"{value:.{digits}g} ± {error:.2g}"


def write_classes(file: Path, record: dict) -> Path:
    """A row a class: id, name, how many were sampled and in the reference; then of each metric value, standard error and why."""
    columns = [(metric, key) for metric in record["per_class"] for key in ("value", "standard_error", "why")]
    header = ["class_id", "class_name", "sampled", "reference"]
    header += [metric if key == "value" else f"{metric}_{key}" for metric, key in columns]
    counts = record["class_counts"]

    def write(beside: Path) -> None:
        with beside.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(header)
            for i, name in enumerate(record["class_names"]):
                cells = [record["per_class"][metric][i][key] for metric, key in columns]
                reference = "" if counts["reference"] is None else counts["reference"][i]
                writer.writerow([i, name, counts["sampled"][i], reference, *("" if c is None else c for c in cells)])

    return file_into_place(file, write)


def _class_table(record: dict) -> str:
    """A row a class; a metric that is blank for all of them is a sentence below."""
    metrics = {m: some for m, some in record["per_class"].items() if any(one["value"] is not None for one in some)}
    rows = []
    for i, name in enumerate(record["class_names"]):
        cells = [value_of(some[i], 3) for some in metrics.values()]
        rows.append([name, str(record["class_counts"]["sampled"][i]), *cells])
    heads = [f"{record['metrics'][m]['title']}, {record['metrics'][m]['better']} is better" for m in metrics]
    said = [_table(["class", "sampled", *heads], rows)]
    for metric, some in record["per_class"].items():
        if metric not in metrics:
            said.append(f"{record['metrics'][metric]['title']} of each class left blank: {some[0]['why']}.")
    return "\n\n".join(said)


def _looks(d: dict) -> str:
    """The diagnostics that need no extractor, in a sentence or two."""
    said = f"Brightness {d['brightness']:.3f}, contrast {d['contrast']:.3f}, saturation {d['saturation']:.3f} (each 0 to 1); "
    said += f"{d['extremes']:.1%} of the values are at 0 or 255."
    if d["contrast_ratio"] is not None:
        said += f" Against the real pictures: contrast x {d['contrast_ratio']:.3f}"
        said += "" if d["saturation_ratio"] is None else f", saturation x {d['saturation_ratio']:.3f}"
        said += f", brightness {d['brightness_shift']:+.3f}."
    return said


def _made(record: dict) -> str:
    e, r, p = record["extractor"], record["reference"], record["pictures"]
    resized = f"resized {e['resize']}" if e["resize"] != "none" else "not resized"
    count = "published statistics" if r["count"] is None else f"{r['count']:,} of {r['of']:,} pictures"
    said = {
        "pictures": f"{record['count']:,}, {p['width']}x{p['height']}, {p['channels']} channel{'s' * (p['channels'] != 1)}",
        **{f"model's {key}": value for key, value in (record["model"] or {}).items()},
        **record["settings"],
        "extractor": f"{e['name']} {e['hash']}, {e['dimension']:,} features at {e['resolution']} px, {resized}",
        "judge": record["judge"] and f"{record['judge']['name']} {record['judge']['hash']}",
        "reference": f"{r['name']}, {count}, fingerprint {r['fingerprint'][:16]}",
        "reference's pictures": r.get("resized"),
        "neighbours": f"{record['k']} (precision, recall, density, coverage)",
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        "date": record["date"],
        "command": record["command"] and f"`{record['command']}`",
    }
    return "\n".join(
        f"- {key.replace('_', ' ')}: {_words(value)}" for key, value in said.items() if value not in (None, "")
    )


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(header: list[str], rows: list[list[str]]) -> str:
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
