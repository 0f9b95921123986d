"""A guidance sweep as a page (sweep.md), a table (sweep.csv), all of it (sweep.json), one sheet of pictures and figures.

write_report(Sweep(source="runs/digits", ...), points, Path("sweep"))
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import InputError
from ..evaluation.metrics import METRICS
from ..grids import labelled_grid
from ..trace.drawing import one_line, shorten
from ..trace.sentences import listed, plus_minus
from . import sweep_plots as plots
from .choice import (
    SETTINGS,
    TRADES,
    Choice,
    Finished,
    best_sets,
    called,
    class_best_sets,
    clipped_share,
    differing,
    disagreement,
    flattered,
    in_order,
    mean_of,
    measured,
    names,
    pareto,
    rounded,
    several_called,
    too_much,
    valued,
)

MOST_COLUMNS, MOST_ROWS = 24, 24  # of the sheet of pictures
MOST_CLASSES = 30  # in the page's table; sweep.json has all
FIGURES = ("grid.png", "curves.png", "tradeoff.png", "diagnostics.png", "classes.png")
LOOKS = ("brightness", "contrast", "saturation", "extremes", "contrast_ratio", "saturation_ratio", "brightness_shift")


@dataclass(frozen=True)
class Sweep:
    """What was swept, and with what.

    what: which weights. swept: the settings that had several values, with them. reference: name, count, fingerprint; extractor:
    name, hash, resolution, resize, dimension, is_fid; either is empty where there was none. count: pictures a point.
    command: what to type to repeat it.
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


def write_report(sweep: Sweep, points: Iterable[Finished], out: Path, confirmed: Iterable[Finished] = ()) -> list[Path]:
    """Writes the files into `out`, each beside its place and renamed. Returns them, the page first.

    confirmed: points measured again with fresh seeds. The order of the points does not matter: equal sweeps give equal files.
    Figures are left out where matplotlib is not installed, and those of an earlier report that this one lacks are removed.
    Raises InputError where there is no point, and where two have one id.
    """
    reading = Reading(sweep, points, confirmed)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = dict(reading.pictures())
    files = {
        "sweep.csv": reading.csv(),
        "sweep.json": reading.json(),
        **pictures,
        "sweep.md": reading.page(list(pictures)),
    }
    for name, content in files.items():
        _put(out / name, content)
    for name in FIGURES:
        if name not in pictures:
            (out / name).unlink(missing_ok=True)
    return [out / name for name in ("sweep.md", "sweep.csv", "sweep.json", *pictures)]


def _put(file: Path, content: bytes) -> None:
    beside = file.with_name(f".{file.name}.new")
    beside.write_bytes(content)
    beside.replace(file)


def titles(extractor: Mapping) -> dict[str, str]:
    """What to call the metrics: a Frechet distance is an FID only by the network that FID is defined by."""
    found = {m: kind.title for m, kind in METRICS.items()}
    if extractor.get("is_fid"):
        return found | {"frechet": "FID"}
    name = one_line(extractor.get("name", ""))
    return found | ({"frechet": f"{found['frechet']} ({name})"} if name else {})


class Reading:
    """The points with what is read out of them once."""

    def __init__(self, sweep: Sweep, points: Iterable[Finished], confirmed: Iterable[Finished]):
        self.sweep, self.points, self.confirmed = sweep, in_order(points), in_order(confirmed)
        ids = [p.id for p in self.points]
        if not ids:
            raise InputError("a sweep without a finished point has nothing to report: let at least one point finish.")
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise InputError(f"two points of the sweep have the id {twice[0]!r}; every point needs one of its own.")
        self.row = {p.id: p.row for p in self.points}
        self.titles = titles(sweep.extractor)
        self.settings = differing(self.points)
        self.metrics = valued(self.points)
        self.choices = best_sets(self.points)
        self.by_class = class_best_sets(self.points)
        self.trades = [t for t in TRADES if set(t) <= set(self.metrics)]
        self.verdict = disagreement(self.choices, self.points, self.titles)
        self.looks = too_much(self.points)
        self.again = [(self._before(p), p) for p in self.confirmed]

    def _before(self, point: Finished) -> Finished | None:
        """The point that was confirmed: of one id, or of the same settings."""
        same = lambda p: all(p.row.get(s) == point.row.get(s) for s in SETTINGS)  # noqa: E731
        return next((p for p in self.points if p.id == point.id), None) or next(
            (p for p in self.points if same(p)), None
        )

    def called(self, point: str | Finished) -> str:
        return called(self.row[point] if isinstance(point, str) else point.row, self.settings)

    # ------------------------------------------------------------------ tables of numbers

    def csv(self) -> bytes:
        text = io.StringIO(newline="")
        rows = [self._flat(p.row) for p in self.points]
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return _bytes(text.getvalue())

    def _flat(self, row: Mapping) -> dict:
        """One row: settings, metrics, what the pictures look like, and what made the numbers."""
        s, e, r, looks = self.sweep, self.sweep.extractor, self.sweep.reference, row.get("diagnostics", {})
        flat = {"id": row["id"], **{k: row.get(k) for k in ("scale", *SETTINGS[:-1], "nfe", "count")}}
        for metric in METRICS:
            value, error, _ = measured(row, metric)
            flat |= {metric: value, f"{metric}_standard_error": error}
        flat |= {"difference": mean_of(looks.get("difference")), "clipped": mean_of(looks.get("clipped"))}
        flat |= {k: _finite(looks.get(k)) for k in LOOKS}
        flat |= {
            f"extractor_{k}".removesuffix("_name"): e.get(k) for k in ("name", "hash", "resolution", "resize", "is_fid")
        }
        flat |= {f"reference_{k}".removesuffix("_name"): r.get(k) for k in ("name", "count", "fingerprint")}
        return flat | {
            "seed": s.seed,
            "sampling_precision": s.precision,  # beside the metric of that name
            "batch_size": s.batch_size,
            "source": s.source,
            "weights": s.what,
            "model_hash": s.model_hash,
            "trained_steps": s.trained_steps,
            "ema_decay": s.ema_decay,
        }

    def json(self) -> bytes:
        found = {
            "sweep": asdict(self.sweep),
            "rows": [p.row for p in self.points],
            "choices": {m: asdict(c) for m, c in self.choices.items()},
            "class_choices": {m: [c and asdict(c) for c in some] for m, some in self.by_class.items()},
            "pareto": {f"{a} and {b}": pareto(self.points, a, b) for a, b in self.trades},
            "sentences": [self.verdict, *self.looks],
            "confirmed": [p.row for p in self.confirmed],
        }
        return _bytes(json.dumps(_finite(found), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    # ------------------------------------------------------------------ pictures

    def pictures(self) -> Iterable[tuple[str, bytes]]:
        """Name and PNG of each."""
        sheet = self._sheet()
        if sheet is not None:
            yield "grid.png", _png(lambda file: sheet.save(file, format="PNG"))
        if not plots.available():
            return
        figures = {}
        if self.metrics:
            figures["curves.png"] = plots.curves(self.points, self.settings, self.choices, self.titles)
        if self.trades:
            figures["tradeoff.png"] = plots.tradeoff(self.points, *self.trades[0], self.titles)
        if any(p.row.get("diagnostics") for p in self.points):
            figures["diagnostics.png"] = plots.diagnostics(self.points)
        if self.by_class:
            figures["classes.png"] = plots.per_class(
                self.points, next(iter(self.by_class)), self.sweep.class_names, self.titles
            )
        for name, figure in figures.items():
            yield name, _png(lambda file, figure=figure: figure.savefig(file, format="png"))

    def _sheet(self):
        """Classes in rows, points in columns, a column's pictures from the same noise as those of the others; None without pictures."""
        judge = next((m for m in ("kid", "frechet", *self.choices) if m in self.choices), None)
        best = {self.choices[judge].best} if judge else set()
        points = [p for p in self.points if p.shown is not None and p.shown.size]
        if not points:
            return None
        left_out = len(self.points) - MOST_COLUMNS if len(points) > MOST_COLUMNS else len(self.points) - len(points)
        points = _some(points, best)
        classes = min(min(len(p.shown) for p in points), MOST_ROWS)
        each = max(1, min(min(p.shown.shape[1] for p in points), MOST_ROWS // classes))
        rows = [[p.shown[c, i] for p in points] for c in range(classes) for i in range(each)]
        labels = [self._class_name(c) if i == 0 else "" for c in range(classes) for i in range(each)]
        heads = [("* " if p.id in best else "") + _head(p.row, self.settings) for p in points]
        title = "one row, one noise"
        title += f"; * best by {self.titles[judge]}" if judge else ""
        title += f"; {left_out} points are not shown" if left_out else ""
        return labelled_grid(rows, labels, heads, title, min_side=64 if max(map(len, heads)) <= 16 else 128)

    def _class_name(self, index: int) -> str:
        known = self.sweep.class_names
        if index < len(known):
            return shorten(known[index], 10, 300)
        return f"class {index}" if known or self.by_class else ""

    # ------------------------------------------------------------------ the page

    def page(self, pictures: Sequence[str]) -> bytes:
        parts = [
            [f"# Guidance sweep of {_plain(self.sweep.source)}", "", *self._made_of()],
            ["## What it says", "", _plain(self.verdict), *[f"\n{_plain(s)}" for s in self.looks]],
            ["## Points", "", *self._points()],
            self._best(),
            self._classes(),
            self._confirmed(),
            self._figures(pictures),
            self._notes(),
            ["## Again", "", *_code(self.sweep.command)] if self.sweep.command else [],
        ]
        return _bytes("\n\n".join("\n".join(part) for part in parts if part) + "\n")

    def _made_of(self) -> list[str]:
        s, e, r = self.sweep, self.sweep.extractor, self.sweep.reference
        trained = f", trained for {s.trained_steps:,} steps" if s.trained_steps and "steps" not in s.what else ""
        ema = f", EMA decay {s.ema_decay:g}" if s.ema_decay is not None else ""
        said = lambda v: "none" if v is None else f"{v:g}" if isinstance(v, float) else str(v)  # noqa: E731
        swept = listed([f"{k} ({', '.join(map(said, some))})" for k, some in s.swept.items()], 12)
        fixed = [called(self.points[0].row, [k]) for k in ("scale", *SETTINGS[:-1]) if k not in self.settings]
        lines = [
            f"{_plain(s.what)}{trained}{ema}; model hash `{_tick(s.model_hash)}`.",
            f"{len(self.points)} point{'' if len(self.points) == 1 else 's'}, {s.count:,} pictures each: the same classes and noise "
            f"at every point, seed {s.seed}, {_plain(s.precision)}, batches of {s.batch_size}.",
            f"Swept: {_plain(swept)}." if swept else "Nothing was swept.",
            f"At every point: {_plain(', '.join(fixed))}. Scale 1 is no guidance."
            if fixed
            else "Scale 1 is no guidance.",
        ]
        if e:
            how = [f"{e['resolution']} px" if e.get("resolution") else "", str(e.get("resize") or "")]
            hashed = f", hash `{_tick(e['hash'])}`" if e.get("hash") else ""
            detail = ", ".join(_plain(h) for h in how if h)
            fid = (
                ""
                if e.get("is_fid")
                else " It is not the network that FID is defined by: compare its numbers with its own alone."
            )
            lines.append(f"Features: {_plain(e.get('name', ''))}{f' ({detail})' if detail else ''}{hashed}.{fid}")
        if r:
            print_ = f", fingerprint `{_tick(r['fingerprint'])}`" if r.get("fingerprint") else ""
            lines.append(f"Reference: {_plain(r.get('name', ''))}, {r.get('count') or 0:,} pictures{print_}.")
        return [f"- {line}" for line in lines]

    def _points(self) -> list[str]:
        if not self.metrics:
            head = ["point", "evaluations a picture", "contrast", "saturation", "clipped"]
            looks = [p.row.get("diagnostics", {}) for p in self.points]
            rows = [
                [_plain(self.called(p)), str(p.row.get("nfe", "-"))]
                + [_number(d.get("contrast_ratio")), _number(d.get("saturation_ratio")), _number(clipped_share(p))]
                for p, d in zip(self.points, looks)
            ]
            return [*_table(head, rows), "", "Contrast and saturation: as a ratio to the data's."]
        head = ["point", "evaluations a picture", *(_plain(self.titles[m]) for m in self.metrics)]
        rows = [
            [_plain(self.called(p)), str(p.row.get("nfe", "-")), *(self._value(p, m) for m in self.metrics)]
            for p in self.points
        ]
        return [
            *_table(head, rows),
            "",
            "± one standard error over the pictures. **Bold**: best; *: cannot be told apart from it.",
        ]

    def _value(self, point: Finished, metric: str) -> str:
        text = _with_error(point.row, metric)
        choice = self.choices.get(metric)
        if choice is None or point.id not in choice.members:
            return text
        return f"**{text}**" if point.id == choice.best else f"{text} \\*"

    def _best(self) -> list[str]:
        if not self.choices:
            return []
        head = ["metric", "better", "best at", "value", "cannot be told apart"]
        rows = [
            [
                _plain(self.titles[m]),
                METRICS[m].better,
                _plain(self.called(c.best)),
                _with_error(self.row[c.best], m),
                self._others(c),
            ]
            for m, c in self.choices.items()
        ]
        told = (
            "A point cannot be told apart from the best where the 95% interval of their difference has 0 in it: a bootstrap over the "
            "pictures, which are the same at every point."
        )
        fronts = []
        for a, b in self.trades:
            front = pareto(self.points, a, b)
            what = " and ".join(names(self.titles)[m] for m in (a, b))
            fronts += ["", f"Not beaten in both {what}: {_plain(several_called(front, self.points))}."]
        return ["## Best by each metric", "", *_table(head, rows), "", told, *fronts]

    def _others(self, choice: Choice) -> str:
        if not choice.intervals:
            return "(no other point has it)"
        others = choice.members[1:]
        if len(others) == len(choice.intervals):
            return "all others"
        return _plain(listed([self.called(i) for i in others], 6)) if others else "none"

    def _classes(self) -> list[str]:
        if not self.by_class:
            return []
        lines = ["## Best by class"]
        for metric, some in self.by_class.items():
            rows = [
                [
                    _plain(self._class_name(c)),
                    _plain(self.called(k.best)),
                    _with_error(self.row[k.best], metric, c),
                    self._others(k),
                ]
                for c, k in enumerate(some[:MOST_CLASSES])
                if k is not None
            ]
            left = (
                f" The first {MOST_CLASSES} of {len(some):,} classes; sweep.json has all."
                if len(some) > MOST_CLASSES
                else ""
            )
            blank = sum(k is None for k in some[:MOST_CLASSES])
            none = f" {blank} without a value." if blank else ""
            head = ["class", "best at", "value", "cannot be told apart"]
            lines += [
                "",
                f"{_plain(self.titles[metric])}, {METRICS[metric].better} is better.{left}{none}",
                "",
                *_table(head, rows),
            ]
        return lines

    def _confirmed(self) -> list[str]:
        if not self.again:
            return []
        head = ["point", "metric", "as chosen", "with fresh seeds"]
        rows, said = [], []
        for before, after in self.again:
            chosen_by = [m for m, c in self.choices.items() if before and c.best == before.id] or list(METRICS)
            for m in METRICS:
                if measured(after.row, m)[0] is None:
                    continue
                was = _with_error(before.row, m) if before else "-"
                rows.append([_plain(self.called(after)), _plain(self.titles[m]), was, _with_error(after.row, m)])
                if before and m in chosen_by and measured(before.row, m)[0] is not None:
                    said.append(
                        f"- {_plain(self.called(after))}: {_plain(flattered(before, after, m, self.titles[m]))}"
                    )
        if not rows:
            return ["## With fresh seeds", "", "No metric has a value."]
        why = "The best of several is partly the luckiest of them, so that it was sampled again with fresh seeds."
        return ["## With fresh seeds", "", why, "", *_table(head, rows), "", *said]

    def _figures(self, pictures: Sequence[str]) -> list[str]:
        lines = [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
        if not plots.available():
            lines.append(_plain(f"{plots.MISSING[:1].upper()}{plots.MISSING[1:]}"))
        return ["## Pictures", "", "\n\n".join(lines)] if lines else []

    def _notes(self) -> list[str]:
        """Why columns are blank, and what is to be said of those that are not."""
        notes: dict[tuple[bool, str], dict[str, list[Finished]]] = {}
        for p in self.points:
            for m in METRICS:
                value, _, why = measured(p.row, m)
                if value is None or why:
                    notes.setdefault((value is None, why or "not measured"), {}).setdefault(m, []).append(p)
        lines: dict[tuple[str, bool, str], list[str]] = {}
        for (blank, why), by_metric in notes.items():
            for m, some in by_metric.items():
                where = (
                    "" if len(some) == len(self.points) else f" at {several_called([p.id for p in some], self.points)}"
                )
                lines.setdefault((where, blank, why), []).append(self.titles[m])
        said = []
        for (where, blank, why), some in lines.items():
            none = f" {'has' if len(some) == 1 else 'have'} no value" if blank else ""
            said.append(f"- {_plain(f'{listed(some, 8)}{none}{where}: {why}')}")
        return ["## Notes", "", *said] if said else []


# ---------------------------------------------------------------------- small things


def _some(points: Sequence[Finished], best: set[str]) -> list[Finished]:
    """At most MOST_COLUMNS points in their order: the best ones, and evenly of the others."""
    others = [p.id for p in points if p.id not in best]
    room = MOST_COLUMNS - sum(p.id in best for p in points)
    if len(others) > room:
        others = [others[round(i * (len(others) - 1) / max(room - 1, 1))] for i in range(max(room, 0))]
    return [p for p in points if p.id in best or p.id in others]


def _head(row: Mapping, settings: Sequence[str]) -> str:
    """A point over its column: the scale, and in few letters what else differs."""
    return " ".join(_brief_setting(s, row.get(s)) for s in (settings or ["scale"]))


def _brief_setting(setting: str, value: object) -> str:
    if isinstance(value, (int, float)):
        return {"scale": f"{value:g}", "steps": f"{value}st"}.get(setting, f"{setting}={value:g}")
    return (
        {"interval": "all-t", "guide": "null"}.get(setting, f"{setting}=no") if value in (None, "none") else str(value)
    )


def _with_error(row: Mapping, metric: str, class_index: int | None = None) -> str:
    value, error, _ = measured(row, metric, class_index)
    return plus_minus(value, error) if error else rounded(value, error)


def _number(value: float | None) -> str:
    return "-" if _finite(value) is None else f"{value:.3g}"


def _finite(value):
    """The same with None in place of every number that JSON has no word for."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # a name may hold lone surrogates


def _png(save) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def _plain(text: str) -> str:
    """Text from anywhere as one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>\[\]|#~])", r"\\\1", one_line(text))


def _tick(text: str) -> str:
    return one_line(text).replace("`", "'").replace("|", "/")


def _code(text: str) -> list[str]:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}bash", text, fence]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]]
