"""The same pictures at many settings of the sampler, measured: which guidance, over which interval, in how many steps?

A point is a setting. Its pictures are streamed into features a batch at a time, the batches dealt out to the processes; a finished
point is OUT/points/NAME and is never made again, a half-done one lies in OUT/batches and is never counted.
"""

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from ..config import DataConfig
from ..data import ImageDataset, open_dataset
from ..diffusion.pipeline import ClassConditionalPipeline
from ..errors import InputError
from ..evaluation.extractors import Extractor, open_extractor
from ..evaluation.points import Draw, Point, forget, sample_point
from ..evaluation.reference import Reference, reference_of
from ..evaluation.results import results
from ..folders import file_into_place, into_place
from ..loading import model_hash, open_pipeline, recorded_data
from ..run import RunFolder
from .choice import Finished, best_sets
from .sweep_report import Sweep, write_report

VERSION = 1  # of what a point is; points of another are not taken over


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
    precision: str = "fp32"
    weights: str = "ema"
    data: DataConfig | None = None  # None: the run's own
    extractor: str = "judge"  # "none": diagnostics alone
    judge: bool = True
    reference_count: int = 10_000
    k: int = 5
    shown: int = 4
    confirm: bool = False


@dataclass(frozen=True)
class Bench:
    """What every point is made and measured with."""

    pipe: ClassConditionalPipeline
    guide: ClassConditionalPipeline | None
    extractor: Extractor | None
    judge: Extractor | None
    reference: Reference | None
    k: int
    state: PartialState

    @property
    def extractors(self) -> list[Extractor]:
        return list({e.name: e for e in (self.extractor, self.judge) if e is not None}.values())


def sweep(source: str, request: SweepRequest, out: Path, command: str = "") -> list[Path]:
    """Sample and measure every point, and write sweep.md, sweep.csv, sweep.json, grid.png and the curves into `out`.

    Under torchrun the processes share the work. Returns the files (of the main process). Raises InputError before anything is
    sampled for whatever would fail later.
    """
    state = PartialState(cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()))
    pipe, what = open_pipeline(source, request.weights)
    guide, guide_what = (None, "") if request.guide is None else open_pipeline(request.guide, request.weights)
    pipe.to(state.device)
    points = make_points(request, pipe)
    cost = _check(points, pipe, guide)
    draw = _draw(request, pipe)
    dataset = _data(source, request, pipe)
    out.mkdir(parents=True, exist_ok=True)
    with RunFolder(out).lock() if state.is_main_process else contextlib.nullcontext():
        with state.main_process_first():
            bench = _bench(request, pipe, guide, dataset, state)
        plan = _plan(request, bench, draw, guide)
        if state.is_main_process:
            _claim(out, plan)
            _say(what, guide_what, points, draw, bench, out)
        state.wait_for_everyone()
        try:
            _make(points, cost, draw, bench, out / "points", out / "batches", out.name)
            done = [_read(out / "points" / p.name, p) for p in points]
            confirmed = _confirm(points, done, cost, draw, bench, out) if request.confirm else []
        except KeyboardInterrupt:
            print(f"\nStopped. What is finished lies in {out}; the same command goes on from there.")
            raise
        if not state.is_main_process:
            return []
        about = _about(source, what, request, bench, draw, points, command)
        files = write_report(about, done, out, confirmed)
    print(files[0].read_text(encoding="utf-8"))
    print("\n".join(str(file) for file in files))
    return files


def make_points(request: SweepRequest, pipe: ClassConditionalPipeline) -> list[Point]:
    """Every combination once; at scale 1 all intervals, schedules, rescalings and guides are one point."""
    own = Point.of(pipe)
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
        Point(
            scale, interval, schedule, rescale, threshold, request.guide,
            sampler or own.sampler, steps, eta, request.spacing or own.spacing,
        ).settled()
        for sampler, steps, eta, threshold, schedule, rescale, interval, scale in itertools.product(*lists)
    ]  # fmt: skip
    return list(dict.fromkeys(points))


# ---------------------------------------------------------------------- before the first picture


def _check(
    points: Sequence[Point], pipe: ClassConditionalPipeline, guide: ClassConditionalPipeline | None
) -> dict[str, int]:
    """Network evaluations a picture of every point. Raises InputError for a point that cannot be walked, naming it."""
    if guide is not None:
        pipe.check_guide(guide)
    elif any(p.scale != 1 for p in points):
        pipe.check_guidance()
    cost = {}
    for point in points:
        try:
            cost[point.name] = point.guidance(guide).evaluations(point.calls(pipe))
        except InputError as error:
            raise InputError(f"the point {point.name} cannot be sampled: {error}") from None
    return cost


def _draw(request: SweepRequest, pipe: ClassConditionalPipeline) -> Draw:
    classes = request.classes or ("all" if pipe.labels.K else "null")
    ids = tuple(dict.fromkeys(pipe.labels.parse(classes)))
    draw = Draw(ids, request.count, request.seed, request.batch_size, request.precision, request.shown)
    if request.count < len(draw.classes):
        raise InputError(
            f"--count {request.count} is the total over {len(draw.classes)} classes: give at least one a class, or name fewer --classes."
        )
    return draw


def _data(source: str, request: SweepRequest, pipe: ClassConditionalPipeline) -> ImageDataset | None:
    """The real pictures: the training part of the run's own data, or of those asked for."""
    data = request.data or recorded_data(source)
    if data is None:
        if request.extractor == "none":
            return None
        raise InputError(
            f"there is nothing to measure against: {source} is no run that knows its data. Name them: --against NAME_OR_PATH[:split], or "
            "give --extractor none for the diagnostics alone."
        )
    c = pipe.unet.config
    dataset = open_dataset(dataclasses.replace(data, image_size=c.sample_size, channels=c.in_channels))
    dataset.check_classes(pipe.labels)
    return dataset


def _bench(
    request: SweepRequest,
    pipe: ClassConditionalPipeline,
    guide: ClassConditionalPipeline | None,
    dataset: ImageDataset | None,
    state: PartialState,
) -> Bench:
    main = state.is_main_process
    if request.extractor == "none":
        reference = None if dataset is None else reference_of(dataset, None, request.reference_count, progress=main)
        return Bench(pipe, guide, None, None, reference, request.k, state)
    extractor = open_extractor(request.extractor, dataset, state.device, progress=main)
    judge = extractor if extractor.class_names is not None else None
    if judge is None and request.judge and pipe.labels.K > 1:
        judge = open_extractor("judge", dataset, state.device, progress=main)
    reference = reference_of(dataset, extractor, request.reference_count, progress=main)
    return Bench(pipe, guide, extractor, judge, reference, request.k, state)


def _plan(request: SweepRequest, bench: Bench, draw: Draw, guide: ClassConditionalPipeline | None) -> dict:
    """All that decides a point's numbers but the point itself."""
    return {
        "version": VERSION,
        "model": model_hash(bench.pipe.unet),
        "guide": None if guide is None else model_hash(guide.unet),
        "draw": draw.record(),
        "extractor": None if bench.extractor is None else bench.extractor.hash,
        "judge": None if bench.judge is None else bench.judge.hash,
        "reference": None
        if bench.reference is None
        else [bench.reference.about[k] for k in ("fingerprint", "count", "seed")],
        "k": request.k,
        "device": bench.state.device.type,
    }


def _claim(out: Path, plan: dict) -> None:
    """Make `out` this sweep's, or check that it is; points may be added to it later."""
    file = out / "plan.json"
    plan = json.loads(json.dumps(plan))
    if file.is_file():
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            old = {}
        changed = [k for k in plan if old.get(k) != plan[k]] if isinstance(old, dict) else ["plan.json"]
        if changed:
            raise InputError(
                f"{out} holds a sweep of something else (changed: {', '.join(changed)}), and its points would not compare: give another "
                "--out, or remove it."
            )
    elif any(out.iterdir()):
        raise InputError(f"{out} holds files that are not a sweep: give another --out.")
    else:
        file_into_place(file, lambda beside: beside.write_text(json.dumps(plan, indent=1), encoding="utf-8"))
    for leftover in out.glob("batches/*/.*.npz"):  # broken off while they were written
        leftover.unlink(missing_ok=True)


def _say(what: str, guide_what: str, points: Sequence[Point], draw: Draw, bench: Bench, out: Path) -> None:
    finished = sum((out / "points" / p.name).is_dir() for p in points)
    print(
        f"{what}\n{len(points)} points of {draw.count:,} pictures ({len(draw.classes)} classes), {finished} finished, on "
        f"{bench.state.num_processes} process(es), {bench.state.device}, in {out}"
    )
    if guide_what:
        print(f"guided against {guide_what}")
    if bench.extractor is not None:
        print(f"measured by {bench.extractor.name} against {len(bench.reference.features):,} pictures")


# ---------------------------------------------------------------------- the points


def _make(
    points: Sequence[Point], cost: dict[str, int], draw: Draw, bench: Bench, done: Path, batches: Path, title: str
) -> None:
    """Make and measure the points that are not in `done` yet."""
    state = bench.state
    waiting = [p for p in points if not (done / p.name).is_dir()]
    state.wait_for_everyone()  # all have looked before any is finished
    mine = sum(map(len, draw.batches[state.process_index :: state.num_processes]))
    bench.pipe.set_progress_bar_config(disable=True)
    with tqdm(
        total=sum(mine * cost[p.name] for p in waiting),
        desc=title,
        unit="eval",
        unit_scale=True,
        disable=not state.is_main_process or not waiting,
    ) as bar:
        for point in waiting:
            bar.set_postfix_str(point.name)
            nfe = cost[point.name]
            folder = batches / point.name
            sampled = sample_point(
                bench.pipe, point, draw, bench.extractors, folder, state, bench.guide,
                made=lambda count, nfe=nfe: bar.update(count * nfe),
            )  # fmt: skip
            if sampled is not None:
                _finish(sampled, point, nfe, draw, bench, done / point.name)
                forget(folder)
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(batches, ignore_errors=True)


def _finish(sampled, point: Point, nfe: int, draw: Draw, bench: Bench, folder: Path) -> None:
    """Measure a point and write its folder whole."""
    found = results(
        sampled,
        bench.reference,
        bench.extractor,
        bench.judge,
        bench.pipe.labels.names,
        point.calls(bench.pipe),
        bench.k,
    )
    row = {"id": point.name, **point.record(), "nfe": nfe, "count": draw.count, **found.row, "notes": found.notes}
    arrays = dict(found.influence)
    for metric, some in found.class_influence.items():
        arrays |= {f"{metric}.{c}": influence for c, influence in enumerate(some) if influence is not None}

    def write(beside: Path) -> None:
        beside.mkdir()
        np.savez(beside / "influence.npz", **arrays)
        np.save(beside / "shown.npy", sampled.shown)
        (beside / "row.json").write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    into_place(folder, write)


def _read(folder: Path, point: Point) -> Finished:
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
        return Finished(row, overall, classes, np.load(folder / "shown.npy", allow_pickle=False))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is damaged ({error}): remove it, and the same command makes it again.") from None


def _confirm(
    points: Sequence[Point], done: Sequence[Finished], cost: dict[str, int], draw: Draw, bench: Bench, out: Path
) -> list[Finished]:
    """The best sets once more, with noises that no point has seen: the best of many on shared noise is flattered."""
    wanted = {member for choice in best_sets(done).values() for member in choice.members}
    again = [p for p in points if p.name in wanted]
    fresh = dataclasses.replace(draw, seed=draw.seed + draw.count)
    if bench.state.is_main_process:
        print(
            f"{len(again)} points that are best, or cannot be told apart from the best, again with seeds {fresh.seed}..."
        )
    _make(again, cost, fresh, bench, out / "confirmed", out / "batches_confirmed", f"{out.name}, again")
    return [_read(out / "confirmed" / p.name, p) for p in again]


def _about(
    source: str,
    what: str,
    request: SweepRequest,
    bench: Bench,
    draw: Draw,
    points: Sequence[Point],
    command: str,
) -> Sweep:
    records = [p.record() for p in points]
    values = {name: list(dict.fromkeys(r[name] for r in records)) for name in records[0]}
    return Sweep(
        source=source,
        what=what,
        model_hash=model_hash(bench.pipe.unet),
        trained_steps=bench.pipe.config.trained_steps,
        ema_decay=bench.pipe.config.ema_decay,
        class_names=bench.pipe.labels.names,
        swept={name: some for name, some in values.items() if len(some) > 1},
        reference={} if bench.reference is None else bench.reference.about,
        extractor={} if bench.extractor is None else bench.extractor.record(),
        seed=draw.seed,
        count=draw.count,
        precision=draw.precision,
        batch_size=draw.batch_size,
        command=command,
    )
