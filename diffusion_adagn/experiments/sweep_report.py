"""The report of a guidance sweep: report.html and sweep.md, sweep.csv, sweep.json, an image grid and charts.

write_report(Sweep(source="runs/digits", ...), points, Path("sweep"))
"""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from ..atomic import atomic_write
from ..render.grids import labelled_grid
from ..render.report import Report, Section, Shown
from . import sweep_sections as sections
from .point_results import PointResult, format_setting
from .sweep_results import Sweep, SweepResults

MAX_COLUMNS, MAX_GRID_CLASSES = 24, 24  # of the image grid
PAGE, TEXT = "report.html", "sweep.md"
IMAGES = ("grid", "curves", "heat_map", "tradeoff", "diagnostics", "classes")


def write_report(
    sweep: Sweep, points: Iterable[PointResult], out: Path, confirmed: Iterable[PointResult] = (), other_points: int = 0
) -> list[Path]:
    """Write the files into `out` atomically. The order of the points does not matter: equal sweeps give equal files.

    Args:
        sweep: What was swept.
        points: The finished points.
        out: A folder. Images that no longer apply are removed.
        confirmed: Points measured again with fresh seeds.
        other_points: How many finished points are not among these.

    Returns:
        The files: both forms of the page, the tables, the images.

    Raises:
        InputError: There is no point, or two have one id.
    """
    report, out = SweepReport(sweep, points, confirmed), Path(out)
    for name, content in (("sweep.csv", report.csv()), ("sweep.json", report.json())):
        atomic_write(out / name, lambda tmp, content=content: tmp.write_bytes(content))
    page, text, *images = report.report(other_points).save(out, PAGE, TEXT)
    for name in {f"{image}.{kind}" for image in IMAGES for kind in ("png", "svg")} - {file.name for file in images}:
        (out / name).unlink(missing_ok=True)
    return [text, out / "sweep.csv", out / "sweep.json", page, *images]


def summary(files: Sequence[Path]) -> list[str]:
    """What a written report says in a few lines, the advice first."""
    report = json.loads(next(f for f in files if f.suffix == ".json").read_text(encoding="utf-8"))
    verdict, *image_notes = report["sentences"]
    first = report["advice"]["sentence"] if report["advice"] else verdict
    guides = [f"{name} is {path}" for name, path in report.get("guides", {}).items() if name in first]
    return [first, *guides, *image_notes]


class SweepReport(SweepResults):
    """The results, and their page."""

    def report(self, other_points: int = 0) -> Report:
        """The page. other_points: finished ones that are not among these."""
        parts = [
            Section("What it says", [self.verdict, *self.image_notes]),
            sections.best(self) if self.choices else None,
            *sections.charts(self),
            self._grid_section(),
            sections.points_table(self),
            *(sections.compared(self, one) for one in self.compared),
            sections.ranked(self) if self.sweep.rank else None,
            sections.intervals(self) if self.sweep.intervals else None,
            sections.rounds(self) if self.sweep.rounds else None,
            sections.classes(self) if self.by_class else None,
            sections.confirmed(self) if self.confirmed else None,
            sections.notes(self),
            sections.origin(self, other_points),
        ]
        lead = [self.use] if self.use else []
        return Report(f"Guidance sweep of {self.sweep.source}", [part for part in parts if part is not None], lead)

    def _grid_section(self) -> Section | None:
        """Classes in rows, points in columns, all columns from the same noise; None without images."""
        points = [p for p in self.points if p.shown is not None and p.shown.size]
        if not points:
            return None
        best = {self.advice.point} if self.advice else set()
        columns = _select_columns(points, best)
        note = "Each row has one noise." + (" Use this: the settings of the advice above." if best else "")
        if hidden := len(self.points) - len(columns):
            note += f" Points that are not shown: {hidden}."
        return Section("Images", [Shown("grid", partial(self._grid, columns, best), "images by class and point"), note])

    def _grid(self, points: Sequence[PointResult], best: set[str]):
        classes = min(min(len(p.shown) for p in points), MAX_GRID_CLASSES)
        each = max(1, min(min(p.shown.shape[1] for p in points), MAX_GRID_CLASSES // classes))
        rows = [[p.shown[c, i] for p in points] for c in range(classes) for i in range(each)]
        labels = [self.class_name(c) if i == 0 else "" for c in range(classes) for i in range(each)]
        heads = [[_brief(s, p.row.get(s)) for s in self.settings or ["scale"]] for p in points]
        heads = [["use this", *head] if p.id in best else head for p, head in zip(points, heads)]
        return labelled_grid(rows, labels, heads, min_side=96)


def _brief(setting: str, value: object) -> str:
    """A setting as a line over a column, such as "scale 3" or "interval 0.2-0.8"."""
    if setting == "interval":
        return "all noise levels" if value in (None, "none") else f"interval {value}"
    return format_setting(setting, value)


def _select_columns(points: Sequence[PointResult], best: set[str]) -> list[PointResult]:
    """At most MAX_COLUMNS points in their order: the best ones, and evenly of the others."""
    others = [p.id for p in points if p.id not in best]
    room = MAX_COLUMNS - sum(p.id in best for p in points)
    if len(others) > room:
        others = [others[round(i * (len(others) - 1) / max(room - 1, 1))] for i in range(max(room, 0))]
    return [p for p in points if p.id in best or p.id in others]
