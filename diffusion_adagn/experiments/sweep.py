"""The same pictures at many settings of the sampler, measured: which guidance, over which interval, in how many steps?

A point is a setting. Its pictures are streamed into features a batch at a time, the batches dealt out to the processes; a finished
point is OUT/points/NAME and is never made again, a half-done one lies in OUT/batches and is never counted.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from tqdm.auto import tqdm

from ..atomic import atomic_dir, atomic_write, exclusive_lock
from ..commands import resume_hint, unused_path, with_commands, with_options
from ..data.npz import write_npz
from ..errors import InputError
from ..evaluation.bench import EvalConfig, EvalSetup, bench_of_model
from ..evaluation.extractors.base import described
from ..evaluation.points import (
    Sampled,
    SamplePlan,
    SamplerSettings,
    choose_precision,
    classes_of,
    metrics_device,
    remove_batches,
    sample_point,
    set_up,
)
from ..evaluation.results import Results, results, versions
from ..runtime.distributed import process_state
from ..runtime.precision import AUTOCAST
from ..sampling.guidance import Guidance
from ..sampling.load import open_pipeline
from ..sampling.pipeline import ClassConditionalPipeline
from ..sampling.pretrained import model_hash
from .selection import PointResult, best_sets
from .sweep_plots import INSTALL
from .sweep_plots import available as plots_available
from .sweep_report import Sweep, summary, write_report

POINT_VERSION = 1  # of what a point is; points of another are not taken over


@dataclass(frozen=True)
class SweepRequest:
    """What to sweep: every combination of the lists. None: the model's own."""

    scales: list[float]
    intervals: list[str]
    schedules: list[str]
    rescales: list[float]
    thresholds: list[float | None]
    samplers: list[str | None]
    steps: list[int]
    etas: list[float]
    spacing: str | None = None
    guide: str | None = None
    classes: str | None = None
    count: int = 1000  # over all classes together
    seed: int = 0
    batch_size: int = 64
    precision: str = "auto"  # as `points.choose_precision` takes it
    device: str = "auto"
    weights: str = "ema"
    measuring: EvalConfig = EvalConfig()
    shown: int = 4
    keep: bool = False  # the pictures, as the ADM evaluator's files
    confirm: bool = False


def sweep(source: str, request: SweepRequest, out: Path, command: str = "") -> list[Path]:
    """Sample and measure every point, and write sweep.md, sweep.csv, sweep.json, grid.png and the curves into `out`.

    Under torchrun the processes share the work. Returns the files (of the main process). Raises InputError before anything is
    sampled for whatever would fail later.
    """
    state = process_state(request.device)
    pipe, what = open_pipeline(source, request.weights)
    guide, guide_what = (None, "") if request.guide is None else open_pipeline(request.guide, request.weights)
    recorded = _recorded_precision(out) if state.is_main_process else None
    request = dataclasses.replace(request, precision=choose_precision(request.precision, state, recorded))
    set_up([pipe, guide], request.precision, state.device)
    points = make_points(request, pipe)
    cost = _check(points, pipe, guide)
    draw = _draw(request, pipe)
    bench = bench_of_model(source, pipe, draw, request.measuring, state)
    table = SweepRunner(pipe, guide, bench, request.measuring.k, state, cost, request.keep)
    if state.is_main_process:
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file: give another --out.")
        out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out) if state.is_main_process else contextlib.nullcontext():
        if state.is_main_process:
            _open_run_dir(out, _plan(table, draw), command)
            _say(what, guide_what, points, draw, table, out)
        state.wait_for_everyone()
        try:
            table.make(points, draw, out / "points", out / "batches", out.name)
            done = [_read(out / "points" / p.name, p) for p in points]
            confirmed = _confirm(table, points, done, draw, out) if request.confirm else []
            if not state.is_main_process:
                return []
            others = len(list((out / "points").iterdir())) - len(points)
            files = write_report(_about(source, what, table, draw, points, command), done, out, confirmed, others)
        except KeyboardInterrupt:
            print(resume_hint(f"\nStopped. What is finished lies in {out}.", command))
            raise
        except OSError as error:
            raise InputError(
                resume_hint(f"{out} cannot be written to ({error}). What is finished is safe: make room.", command)
            ) from error
    print("\n" + "\n".join(summary(files)))
    print(f"\nLook at  {files[0]}\nBeside   {', '.join(f.name for f in files[1:])}")
    if not plots_available():
        print(with_commands("Curves need matplotlib; with it, the same command draws them:", INSTALL))
    elif not request.confirm and len(points) > 1 and bench.extractor is not None:
        again = [f"{command} --confirm"] if command else []
        print(
            with_commands(
                "Next, the best settings once more, with fresh seeds: the same command with --confirm", *again
            )
        )
    return files


def make_points(request: SweepRequest, pipe: ClassConditionalPipeline) -> list[SamplerSettings]:
    """Every combination once; at scale 1 all intervals, schedules, rescalings and guides are one point."""
    own = SamplerSettings.of(pipe)
    lists = (
        request.samplers,
        request.steps,
        request.etas,
        request.thresholds,
        request.schedules,
        request.rescales,
        request.intervals,
        request.scales,
    )
    points = [
        SamplerSettings(
            scale, interval, schedule, rescale, threshold, request.guide,
            sampler or own.sampler, steps, eta, request.spacing or own.spacing,
        ).canonical()
        for sampler, steps, eta, threshold, schedule, rescale, interval, scale in itertools.product(*lists)
    ]  # fmt: skip
    points = list(dict.fromkeys(points))
    names = [p.name for p in points]
    if twice := [n for n in names if names.count(n) > 1]:
        raise InputError(f"two settings look alike ({twice[0]}): leave one out.")
    return points


# ---------------------------------------------------------------------- before the first picture


def _check(
    points: Sequence[SamplerSettings], pipe: ClassConditionalPipeline, guide: ClassConditionalPipeline | None
) -> dict[str, int]:
    """Network evaluations a picture of every point. Raises InputError for a point that cannot be walked, naming it."""
    cost = {}
    if guide is not None:
        pipe.check_guidance(Guidance(), guide)
    for point in points:
        try:
            guidance = point.guidance()
            pipe.check_guidance(guidance, guide)
            cost[point.name] = guidance.evaluations(point.calls(pipe))
        except InputError as error:
            raise InputError(f"the point {point.name} cannot be sampled: {error}") from None
    return cost


def _draw(request: SweepRequest, pipe: ClassConditionalPipeline) -> SamplePlan:
    draw = SamplePlan(
        classes_of(pipe, request.classes),
        request.count,
        request.seed,
        request.batch_size,
        request.precision,
        request.shown,
    )
    if request.count < len(draw.classes):
        raise InputError(
            f"--count {request.count} is the total over {len(draw.classes)} classes: give at least one a class, or name fewer --classes."
        )
    return draw


def _plan(table: "SweepRunner", draw: SamplePlan) -> dict:
    """All that decides a point's numbers but the point itself."""
    bench = table.bench
    known = None if bench.reference is None else bench.reference.about
    return {
        "version": POINT_VERSION,
        "model": model_hash(table.pipe.unet),
        "guide": None if table.guide is None else model_hash(table.guide.unet),
        "draw": draw.to_dict(),
        "extractor": None if bench.extractor is None else bench.extractor.hash,
        "judge": None if bench.judge is None else bench.judge.hash,
        "reference": known and {key: known.get(key) for key in ("fingerprint", "count", "seed")},
        "k": table.k,
        "device": table.state.device.type,
    }


def _open_run_dir(out: Path, plan: dict, command: str) -> None:
    """Make `out` this sweep's, or check that it is; points may be added to it later."""
    file = out / "plan.json"
    plan = json.loads(json.dumps(plan))
    if file.is_file():
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"{file}, which says what the points of this sweep have in common, is damaged ({error}): give another --out."
            ) from None
        if changed := _changed(old, plan):
            text = f"{out} holds a sweep of something else ({'; '.join(changed)}), and its points would not compare: put it back, or give another --out"
            if command and " --out" not in command:
                raise InputError(with_commands(f"{text}:", with_options(command, out=unused_path(str(out)))))
            raise InputError(f"{text}.")
    elif any(not p.name.startswith(".") for p in out.iterdir()):
        raise InputError(f"{out} holds files that are not a sweep: give another --out.")
    else:
        atomic_write(file, lambda tmp: tmp.write_text(json.dumps(plan, indent=1), encoding="utf-8"))
    for leftover in [*out.glob("batches*/*/.*.npz"), *out.glob(".*.*")]:  # broken off while they were written
        leftover.unlink(missing_ok=True)


def _recorded_precision(out: Path) -> str | None:
    """What the sweep in `out` was begun in; None where there is none. `_open_run_dir` says what is wrong with a plan."""
    try:
        found = json.loads((out / "plan.json").read_text(encoding="utf-8"))["draw"]["precision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found in AUTOCAST else None


def _changed(old: object, new: object, key: str = "") -> list[str]:
    """What differs between two plans, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [word for k in new for word in _changed(old.get(k), new[k], k)]
    return [] if old == new else [f"{key}: {_brief(old)} -> {_brief(new)}"]


def _brief(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 30 else f"{text[:27]}..."


def _say(
    what: str, guide_what: str, points: Sequence[SamplerSettings], draw: SamplePlan, table: "SweepRunner", out: Path
) -> None:
    finished = sum((out / "points" / p.name).is_dir() for p in points)
    state = table.state
    print(
        f"{what}\n{len(points)} points of {draw.count:,} pictures ({len(draw.classes)} classes), {finished} finished, on "
        f"{state.num_processes} process(es), {state.device}, {draw.precision}, in {out}"
    )
    if guide_what:
        print(f"guided against {guide_what}")
    print(f"measured against {table.bench.against}")
    for note in {p.inactive_interval_note(p.calls(table.pipe)) for p in points} - {""}:
        print(note)


# ---------------------------------------------------------------------- the points


@dataclass(frozen=True)
class SweepRunner:
    """What every point is made and measured with. cost: network evaluations a picture, by the point's name.
    keep: whether the pictures are kept."""

    pipe: ClassConditionalPipeline
    guide: ClassConditionalPipeline | None
    bench: EvalSetup
    k: int
    state: PartialState
    cost: dict[str, int]
    keep: bool

    def make(self, points: Sequence[SamplerSettings], draw: SamplePlan, done: Path, batches: Path, title: str) -> None:
        """Make and measure the points that are not in `done` yet; the bar counts network evaluations."""
        state, main = self.state, self.state.is_main_process
        waiting = [p for p in points if not (done / p.name).is_dir()]
        state.wait_for_everyone()  # all have looked before any is finished
        mine = sum(map(len, draw.batches[state.process_index :: state.num_processes]))
        total = sum(mine * self.cost[p.name] for p in waiting)
        with tqdm(total=total, desc=title, unit="eval", unit_scale=True, disable=not main or not waiting) as bar:
            for point in waiting:
                bar.set_postfix_str(point.name)
                self._make(point, draw, done / point.name, batches / point.name, bar)
        state.wait_for_everyone()
        if main:
            remove_batches(batches)

    def _make(self, point: SamplerSettings, draw: SamplePlan, done: Path, folder: Path, bar: tqdm) -> None:
        nfe = self.cost[point.name]
        sampled = sample_point(
            self.pipe, point, draw, self.bench.extractors, folder, self.state, self.guide, self.keep,
            made=lambda count: bar.update(count * nfe),
        )  # fmt: skip
        if sampled is not None:
            found = self._measured(sampled, point)
            settings = {"id": point.name, **point.to_dict(), "nfe": nfe, "count": draw.count}
            _keep(done, settings | found.row | {"notes": found.notes}, found, sampled, self.pipe.labels.null_id)
            remove_batches(folder)

    def _measured(self, sampled: Sampled, point: SamplerSettings) -> Results:
        b = self.bench
        calls, device = point.calls(self.pipe), metrics_device(self.state)
        return results(sampled, b.reference, b.extractor, b.judge, b.class_names, calls, self.k, device)


def _keep(folder: Path, row: dict, found: Results, sampled: Sampled, null_id: int | None) -> None:
    """A finished point's folder, written whole."""
    arrays = dict(found.influence)
    for metric, some in found.class_influence.items():
        arrays |= {f"{metric}.{c}": influence for c, influence in enumerate(some) if influence is not None}

    def write(tmp: Path) -> None:
        tmp.mkdir()
        np.savez(tmp / "influence.npz", **arrays)
        np.save(tmp / "shown.npy", sampled.shown)
        if sampled.pixels is not None:
            write_npz(tmp / "samples.npz", sampled.pixels, sampled.labels, null_id)
        (tmp / "row.json").write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    atomic_dir(folder, write)


def _read(folder: Path, point: SamplerSettings) -> PointResult:
    try:
        row = json.loads((folder / "row.json").read_text(encoding="utf-8"))
        if row["id"] != point.name:
            raise ValueError(f"it is {row['id']}")
        with np.load(folder / "influence.npz", allow_pickle=False) as arrays:
            influence = {name: arrays[name] for name in arrays.files}
        classes = {
            metric: [influence.get(f"{metric}.{c}") for c in range(len(some))]
            for metric, some in row["per_class"].items()
        }
        overall = {name: values for name, values in influence.items() if "." not in name}
        return PointResult(row, overall, classes, np.load(folder / "shown.npy", allow_pickle=False))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{folder} is damaged ({error}): remove it, and the same command makes it again.") from None


def _confirm(
    table: SweepRunner, points: Sequence[SamplerSettings], done: Sequence[PointResult], draw: SamplePlan, out: Path
) -> list[PointResult]:
    """The best sets once more, with noises that no point has seen: the best of many on shared noise is flattered."""
    wanted = {member for choice in best_sets(done).values() for member in choice.members}
    again = [p for p in points if p.name in wanted]
    fresh = dataclasses.replace(draw, seed=draw.seed + draw.count)
    if table.state.is_main_process:
        print(
            f"{len(again)} points that are best, or cannot be told apart from the best, again with seeds {fresh.seed}..."
        )
    table.make(again, fresh, out / "confirmed", out / "batches_confirmed", f"{out.name}, again")
    return [_read(out / "confirmed" / p.name, p) for p in again]


def _about(
    source: str, what: str, table: SweepRunner, draw: SamplePlan, points: Sequence[SamplerSettings], command: str
) -> Sweep:
    records = [p.to_dict() for p in points]
    values = {name: list(dict.fromkeys(r[name] for r in records)) for name in records[0]}
    pipe, bench = table.pipe, table.bench
    return Sweep(
        source=source,
        what=what,
        model_hash=model_hash(pipe.unet),
        trained_steps=pipe.config.trained_steps,
        ema_decay=pipe.config.ema_decay,
        class_names=pipe.labels.names,
        swept={name: some for name, some in values.items() if len(some) > 1},
        reference={} if bench.reference is None else bench.reference.about,
        extractor={} if bench.extractor is None else described(bench.extractor) | bench.extractor.to_dict(),
        seed=draw.seed,
        count=draw.count,
        precision=draw.precision,
        batch_size=draw.batch_size,
        command=command,
        judge={} if bench.judge is None else described(bench.judge) | bench.judge.to_dict(),
        guide_hash=None if table.guide is None else model_hash(table.guide.unet),
        k=table.k,
        versions=versions(),
        date=datetime.date.today().isoformat(),
    )
