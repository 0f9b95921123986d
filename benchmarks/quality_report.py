"""The page of benchmarks.quality: all points, the best of each method against the spread of seeds, a sheet, a curve over the time."""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from diffusion_adagn.data.npz import read_npz
from diffusion_adagn.render.figures import chart, new_figure
from diffusion_adagn.render.grids import labelled_grid
from diffusion_adagn.render.report import Report, Section, Shown, Strong, Table
from diffusion_adagn.render.text import number

METRICS, RATIOS = ("frechet", "accuracy", "precision", "recall"), ("saturation_ratio", "contrast_ratio")
EACH = 2  # images of a class in the sheet


def value(row: dict, metric: str) -> float | None:
    return row["diagnostics"][metric] if metric in RATIOS else row["metrics"][metric]["value"]


def finished(rows: Sequence[dict]) -> list[dict]:
    """The rows at the end of the training."""
    longest = max((row.get("minutes", 0) for row in rows), default=0)
    return [row for row in rows if row.get("minutes", 0) == longest]


def best_rows(rows: Sequence[dict]) -> dict[str, dict]:
    """By run the row with the least Frechet distance, the best run first."""
    best: dict[str, dict] = {}
    for row in sorted(rows, key=lambda row: value(row, "frechet")):
        best.setdefault(row["run"], row)
    return best


def by_method(best: dict[str, dict], metric: str) -> dict[str, list[float]]:
    """Values of the seeds of each method: the runs eps-small-0 and eps-small-1 are eps-small."""
    values: dict[str, list[float]] = {}
    for run, row in best.items():
        values.setdefault(re.sub(r"-\d+$", "", run), []).append(value(row, metric))
    return values


def spread_of_seeds(values: dict[str, list[float]], metric: str) -> float | None:
    """How far seeds of one method are apart at most: a ratio for distances, whose errors grow with them, else a difference.

    None if no method has two seeds.
    """
    spreads = [max(v) / min(v) if metric == "frechet" else max(v) - min(v) for v in values.values() if len(v) > 1]
    return max(spreads, default=None)


def comparison(best: dict[str, dict], metric: str, at: str = "its own best scale, by Frechet distance") -> Table:
    """Methods in order of their means, and what a difference to the best one means. at: what the rows have in common."""
    values = by_method(best, metric)
    spread, is_distance = spread_of_seeds(values, metric), metric == "frechet"
    means = {method: statistics.mean(v) for method, v in values.items()}
    order = sorted(means, key=means.get, reverse=not is_distance)
    rows = []
    for method in order:
        mean, top = means[method], means[order[0]]
        behind = mean / top if is_distance else top - mean
        verdict = f"{number(behind)} times" if is_distance else f"{number(behind)} less"
        if not is_distance and mean:
            verdict += f"; the best has {number(top / mean)} times as much"
        if spread is not None and behind <= spread:
            verdict = "no difference"
        verdict = Strong("best") if method == order[0] else verdict
        rows.append([method, str(len(values[method])), number(mean), verdict])
    text = f"Each run at {at}; means over seeds. "
    if spread is not None:
        by = f"a factor of up to {number(spread)}" if is_distance else f"up to {number(spread)}"
        text += f"Two seeds of one method differ by {by}; a smaller difference is reported as none."
    return Table(["method", "seeds", metric, "against the best"], rows, text)


def points_table(rows: Sequence[dict]) -> Table:
    with_minutes = any("minutes" in row for row in rows)
    head = ["run", *(["minutes"] if with_minutes else []), "images seen", "scale", *METRICS]
    lines = []
    for row in rows:
        first = [row["run"], *([f"{row['minutes']:g}"] if with_minutes else []), f"{row['images']:,}"]
        values = [value(row, name) for name in (*METRICS, *RATIOS)]
        lines.append([*first, f"{row['scale']:g}", *("" if v is None else number(v) for v in values)])
    return Table([*head, *(name.removesuffix("_ratio") for name in RATIOS)], lines, "Ratios are relative to the data.")


def sheet(best: dict[str, dict], classes: Sequence[str], out: Path):
    """The first images of each class of every run, not selected, at its best scale."""
    rows, names = [], []
    for run, row in best.items():
        images = read_npz(out / row["samples"])
        rows.append([image for k in range(len(classes)) for image in images.pixels[images.labels == k][:EACH]])
        names.append(f"{run} ({row['scale']:g})")
    heads = [name if i == 0 else "" for name in classes for i in range(EACH)]
    title = "The first images of every class, each run at its best scale (in brackets)"
    return labelled_grid(rows, names, heads, title, min_side=96)  # the width of "automobile"


def at_all_times(rows: Sequence[dict]) -> list[dict]:
    """The rows at scales that every run was measured at, at each time: more scales at the end would make it look better."""
    measured: dict[tuple[str, float], set[float]] = {}
    for row in rows:
        measured.setdefault((row["run"], row["minutes"]), set()).add(row["scale"])
    common = set.intersection(*measured.values())
    return [row for row in rows if row["scale"] in common]


@chart
def curve(rows: Sequence[dict]) -> Figure:
    """Frechet distance and accuracy over the minutes of training, each point at the best of the scales measured at all times."""
    rows = at_all_times(rows)
    figure = new_figure(3.6)
    panels = figure.subplots(1, 2)
    for ax, metric in zip(panels, ("frechet", "accuracy")):
        for run in best_rows(finished(rows)):
            marks = sorted({row["minutes"] for row in rows if row["run"] == run})
            at = [best_rows([r for r in rows if r["run"] == run and r["minutes"] == m])[run] for m in marks]
            ax.plot(marks, [value(row, metric) for row in at], marker="o", label=run)
        ax.set_xticks(sorted({row["minutes"] for row in rows}))
        ax.set(xlabel="minutes of training", title={"frechet": "Frechet distance (classifier)"}.get(metric, metric))
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].minorticks_off()
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=len(names))
    return figure


def quality_report(
    rows: Sequence[dict], classes: Sequence[str], out: Path, about: str, speeds: Mapping[str, float]
) -> Report:
    """The page of all measured points. rows: those of results.json, whose samples are in `out`; speeds: images per second."""
    best, plain = best_rows(finished(rows)), {row["run"]: row for row in finished(rows) if row["scale"] == 1}
    tables = [comparison(best, metric) for metric in ("frechet", "accuracy")]
    tables += [comparison(plain, "accuracy", "scale 1")] if plain else []
    sections = [Section("Methods", tables)]
    if any("minutes" in row for row in rows):
        scales = " and ".join(f"{scale:g}" for scale in sorted({row["scale"] for row in at_all_times(rows)}))
        words = f"Frechet distance and accuracy over the minutes of training, each at the better of the scales {scales}"
        shown = Shown("curve", lambda: curve(rows), words)
        sections.append(Section("Over the training", [shown]))
    images = Shown("sheet", lambda: sheet(best, classes, out), "The first images of every class for each run")
    sections += [Section("Images", [images]), Section("All points", [points_table(rows)])]
    text = "Training images per second of each network on one core, measured in a short run."
    speed = Table(["network", "images/s"], [[name, number(value)] for name, value in speeds.items()], text)
    sections.append(Section("Speed", [speed]))
    return Report("Image quality in equal time", sections, about=about)
