"""The folder of an evaluation: checks of its contents, and batches of a stopped evaluation."""

import json
from pathlib import Path
from typing import Any

from pydantic import StrictStr

from ..atomic import atomic_write
from ..errors import InputError
from ..schema import as_document, document, read_document
from .points import remove_batches
from .report import JSON

BATCHES, PLAN = "batches", "plan.json"


@document
class EvaluationRecord:
    """What is read of an evaluation.json."""

    date: StrictStr
    notes: list[StrictStr]
    metrics: dict[str, dict[str, Any]]
    memorisation: dict[str, Any] | None
    command: StrictStr = ""


def check_out(out: Path) -> None:
    """Raises InputError unless the folder is missing, empty, or contains a finished or stopped evaluation."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / JSON).is_file() and not (out / BATCHES / PLAN).is_file():
        raise InputError(
            f"{out} {'holds files that are not an evaluation' if out.is_dir() else 'is a file'}: give another --out."
        )


def finished_record(out: Path) -> dict | None:
    """The content of evaluation.json, {} if it cannot be read; None if no evaluation has finished here."""
    if not (out / JSON).is_file():
        return None
    try:
        record = read_document(out / JSON)
        as_document(record, EvaluationRecord, out / JSON)
        return record
    except InputError:
        return {}


def resume_batches(folder: Path, plan: dict) -> None:
    """Keep the batches of a stopped evaluation if its plan equals the new one; otherwise remove them."""
    file, expected = folder / PLAN, json.dumps(plan, indent=1)
    try:
        same = file.read_text(encoding="utf-8") == expected
    except (OSError, ValueError):
        same = False
    if not same:
        remove_batches(folder)
        atomic_write(file, lambda tmp: tmp.write_text(expected, encoding="utf-8"))
    for leftover in folder.glob(".*.npz"):  # partially written
        leftover.unlink(missing_ok=True)
    if done := len(list(folder.glob("batch-*.npz"))):
        print(f"going on with {done} finished batch{'es' * (done > 1)} in {folder}")
