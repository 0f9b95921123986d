"""What the page reads of a run: its log, previews, sweeps and reports, which are found by name.

Clients send names and numbers, never a path.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...runs.layout import RunFolder
from ...runs.recorded import default_folder, run_of
from ...runs.shipped import model_folder
from ..models import ServedModel

REPORT, SWEEP = "report.html", "sweep.json"
MAX_POINTS = 400  # of a curve
MAX_PREVIEWS = 12


@dataclass
class Folders:
    """What there is of a model.

    Args:
        run: its own folder; None if it is on the hub.
        traces: the folder of its trace reports, as `default_folder` names it.
        swept: that of its sweeps.
        evaluated: that of its evaluations.
        log: of the run.
    """

    run: RunFolder | None
    traces: Path
    swept: Path
    evaluated: Path
    log: Log = field(init=False)

    def __post_init__(self) -> None:
        self.log = Log(None if self.run is None else self.run.metrics_file)

    @property
    def reports(self) -> dict[str, Path]:
        """The reports that there are now, by name: traces such as "step-00000400", then the others."""
        others = {"evaluation": self.evaluated, "sweep": self.swept}
        found = {
            f"{kind} {name}": file for kind, folder in others.items() for name, file in _found(folder, REPORT).items()
        }
        return _found(self.traces, REPORT) | found

    @property
    def sweeps(self) -> dict[str, Path]:
        """The folders of the sweeps that there are now, by name."""
        return {name: file.parent for name, file in _found(self.swept, SWEEP).items()}


def find_folders(model: ServedModel) -> Folders:
    """The run of a model, and its traces/, sweeps/ and evaluations/ folders in the working directory."""
    source = model_folder(model.source)
    run = RunFolder(run_of(source)) if source.exists() else None
    parents = ("traces", "sweeps", "evaluations")
    return Folders(run, *(default_folder(parent, model.source, model.ema).absolute() for parent in parents))


def _found(folder: Path, file: str) -> dict[str, Path]:
    """{name: file} in the folders that commands write by default for any step of this run, those with -2, ... too."""
    run = folder.parent if folder.name.startswith("step-") else folder
    again = [
        one for one in run.parent.glob(f"*/{file}") if re.fullmatch(rf"{re.escape(run.name)}-\d+", one.parent.name)
    ]
    found = [*run.glob(file), *run.glob(f"step-*/{file}"), *(again if run is folder else [])]
    return {one.parent.name: one.resolve() for one in sorted(found)}


class Log:
    """The rows of a metrics.jsonl, which grows; each call reads only what is new.

    Args:
        file: None: there is none.
    """

    def __init__(self, file: Path | None):
        self.file, self.rows, self.position = file, [], 0

    def read(self) -> list[dict]:
        """All rows so far; a last line without its end is read later."""
        try:
            size = self.file.stat().st_size if self.file else 0
            if size < self.position:  # the run started again
                self.rows, self.position = [], 0
            if size > self.position:
                with self.file.open("rb") as f:
                    f.seek(self.position)
                    new = f.read()
                whole = new[: new.rfind(b"\n") + 1]
                self.rows = self.rows + list(filter(None, map(_row, whole.splitlines())))
                self.position += len(whole)
        except OSError:
            pass  # the folder was deleted: the rows so far are shown
        return self.rows

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of each row that has the value, thinned out to at most 2 * MAX_POINTS."""
        points = [(row["step"], row[name]) for row in self.read() if isinstance(row.get(name), int | float)]
        return points[:: max(1, len(points) // MAX_POINTS)]


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int | float) else None


def newest_previews(folders: Folders) -> list[Path]:
    """The last previews of a run, the oldest first."""
    return [] if folders.run is None else sorted(folders.run.previews.glob("step-*.png"))[-MAX_PREVIEWS:]


def read_sweep(folder: Path) -> dict:
    """A sweep.json."""
    return json.loads((folder / SWEEP).read_text(encoding="utf-8"))


def shown_images(folder: Path, point: str) -> np.ndarray | None:
    """uint8 [classes, images, H, W, C] of a point of a sweep; None if they were not saved."""
    file = folder / "points" / Path(point).name / "shown.npy"
    return np.load(file, allow_pickle=False) if file.is_file() else None
