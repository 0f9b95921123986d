"""Sample the same classes and noise at many sampler settings, and measure each: guidance scale, interval, steps and others.

A point is one combination of settings. Its images are sampled in batches, which the processes share, and only their features
are stored. OUT/points/NAME contains a finished point, which is not sampled again. OUT/batches contains the batches of
an unfinished point, which no result includes.
"""

import contextlib
import dataclasses
import datetime
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
from ..errors import InputError, writing
from ..evaluation.extractors.base import described
from ..evaluation.points import (
    Sampled,
    SamplePlan,
    choose_precision,
    classes_of,
    inactive_interval_note,
    metrics_device,
    remove_batches,
    sample_point,
    set_up,
)
from ..evaluation.results import Results, results, versions
from ..evaluation.setup import EvalSetup, bench_of_model
from ..runtime.distributed import process_state
from ..runtime.precision import AUTOCAST
from ..sampling.guidance import Guidance
from ..sampling.load import open_pipeline
from ..sampling.pipeline import ClassConditionalPipeline
from ..sampling.pretrained import model_hash
from ..sampling.settings import SamplerSettings
from ..schema import as_document, document, read_document
from .selection import PointResult, best_sets
from .settings import SweepRequest
from .sweep_plots import INSTALL
from .sweep_plots import available as plots_available
from .sweep_report import Sweep, summary, write_report

UNRECORDED = {"rule": "cfg", "negative": "null"}  # neutral values that a point's record omits, as older files do
POINT_VERSION = 1  # version of the stored points; a sweep does not reuse points of another version


@document
class Draw:
    """How the images of a sweep are drawn, in plan.json."""

    precision: str


@document
class SweepPlan:
    """The settings that all points of a sweep share, plan.json."""

    draw: Draw


@document
class SweepRow:
    """What is read of a finished point's row.json."""

    id: str
    per_class: dict[str, list]


def sweep(source: str, request: SweepRequest, out: Path, command: str = "") -> list[Path]:
    """Sample and measure every point, and write sweep.md, sweep.csv, sweep.json, grid.png and the curves into `out`.

    Under torchrun the processes share the work.

    Args:
        source: The model: a run folder, a checkpoint, a pipeline folder or a hub id.
        request: The settings to sweep.
        out: The output folder.
        command: The command that repeats this sweep, for messages and the report; empty: not printed.

    Returns:
        The report's files on the main process; an empty list on the others.

    Raises:
        InputError: Before anything is sampled, for whatever would fail later.
    """
    state = process_state(request.device)
    texts = (request.classes, *map(str, request.axes.get("guidance.negative", ())))
    pipe, name = open_pipeline(source, request.ema, texts)
    guide_source = request.sampler.guide
    guide, guide_name = (
        (None, "") if guide_source is None else open_pipeline(guide_source, request.guide_ema or request.ema, texts)
    )
    recorded = _recorded_precision(out) if state.is_main_process else None
    request = dataclasses.replace(request, precision=choose_precision(request.precision, state, recorded))
    set_up([pipe, guide], request.precision, state.device)
    points = make_points(request, pipe)
    evaluations = _check(points, pipe, guide)
    plan = _make_plan(request, pipe)
    eval_setup = bench_of_model(source, pipe, plan, request, state)
    runner = SweepRunner(pipe, guide, eval_setup, request.k, state, evaluations, request.save_images)
    if state.is_main_process:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out) if state.is_main_process else contextlib.nullcontext():
        if state.is_main_process:
            _open_output_dir(out, _comparable_settings(runner, plan), command)
            _print_plan(name, guide_name, points, plan, runner, out)
        state.wait_for_everyone()
        try:
            runner.run(points, plan, out / "points", out / "batches", out.name)
            finished = [_load_point(out / "points" / p.name, p) for p in points]
            confirmed = _confirm(runner, points, finished, plan, out) if request.confirm else []
            if not state.is_main_process:
                return []
            others = len(list((out / "points").iterdir())) - len(points)
            files = write_report(
                _sweep_record(source, name, runner, plan, points, command), finished, out, confirmed, others
            )
        except KeyboardInterrupt:
            print(resume_hint(f"\nStopped. {out} contains the finished points.", command))
            raise
        except OSError as error:
            raise InputError(
                resume_hint(
                    f"cannot write to {out} ({error}). The finished points are saved: free disk space.", command
                )
            ) from error
    print("\n" + "\n".join(summary(files)))
    print(f"\nReport  {files[0]}\nFiles   {', '.join(f.name for f in files[1:])}")
    if not plots_available():
        print(with_commands("Curves need matplotlib. Install it and repeat the command:", INSTALL))
    elif not request.confirm and len(points) > 1 and eval_setup.extractor is not None:
        confirm_command = [f"{command} --confirm"] if command else []
        print(
            with_commands(
                "Next, measure the best settings again with fresh seeds: the same command with --confirm",
                *confirm_command,
            )
        )
    return files


def make_points(request: SweepRequest, pipe: ClassConditionalPipeline) -> list[SamplerSettings]:
    """Every combination once. At scale 1, all intervals, schedules, rescalings and guides are one point."""
    points = [pipe.resolved(point).canonical() for point in request.points()]
    points = list(dict.fromkeys(points))
    names = [p.name for p in points]
    if repeated := [n for n in names if names.count(n) > 1]:
        raise InputError(f"two settings have the same name ({repeated[0]}): remove one.")
    return points


# ---------------------------------------------------------------------- before the first image


def _check(
    points: Sequence[SamplerSettings], pipe: ClassConditionalPipeline, guide: ClassConditionalPipeline | None
) -> dict[str, int]:
    """Network evaluations per image, by the point's name. Raises InputError for a point that cannot be sampled, naming it."""
    evaluations = {}
    if guide is not None:
        pipe.check_guidance(Guidance(), guide)
    for point in points:
        try:
            evaluations[point.name] = point.guidance.evaluations(pipe.prepare(point, guide), pipe.one_pass)
        except InputError as error:
            raise InputError(f"the point {point.name} cannot be sampled: {error}") from None
    return evaluations


def _make_plan(request: SweepRequest, pipe: ClassConditionalPipeline) -> SamplePlan:
    plan = SamplePlan(
        classes_of(pipe, request.classes),
        request.count,
        request.seed,
        request.batch_size,
        request.precision,
        request.shown,
    )
    if request.count < len(plan.classes):
        raise InputError(
            f"--count {request.count} is the total over {len(plan.classes)} classes: give at least one image per class, or fewer --classes."
        )
    return plan


def _comparable_settings(runner: "SweepRunner", plan: SamplePlan) -> dict:
    """Everything that a point's numbers depend on, except the point's own settings."""
    eval_setup = runner.eval_setup
    reference = None if eval_setup.reference is None else eval_setup.reference.about
    return {
        "version": POINT_VERSION,
        "model": model_hash(runner.pipe.unet),
        "guide": None if runner.guide is None else model_hash(runner.guide.unet),
        "draw": plan.to_dict(),
        "extractor": None if eval_setup.extractor is None else eval_setup.extractor.hash,
        "judge": None if eval_setup.classifier is None else eval_setup.classifier.hash,
        "reference": reference and {key: reference.get(key) for key in ("fingerprint", "count", "seed")},
        "k": runner.k,
        "device": runner.state.device.type,
    }


def _open_output_dir(out: Path, settings: dict, command: str) -> None:
    """Write plan.json into `out`, or check that an existing one has these settings. Points may be added later."""
    file = out / "plan.json"
    settings = json.loads(json.dumps(settings))
    if file.is_file():
        if changed := _differences(read_document(file), settings):
            text = f"{out} contains a sweep with other settings ({'; '.join(changed)}), which cannot be compared: restore them, or give another --out"
            again = [with_options(command, out=unused_path(str(out)))] if command and " --out" not in command else []
            raise InputError(with_commands(f"{text}:", *again) if again else f"{text}.")
    elif any(not p.name.startswith(".") for p in out.iterdir()):
        raise InputError(f"{out} contains files that are not a sweep: give another --out.")
    else:
        atomic_write(file, lambda tmp: tmp.write_text(json.dumps(settings, indent=1), encoding="utf-8"))
    for leftover in [*out.glob("batches*/*/.*.npz"), *out.glob(".*.*")]:  # temporary files of a killed process
        leftover.unlink(missing_ok=True)


def _recorded_precision(out: Path) -> str | None:
    """The precision of the sweep in `out`; None if there is none. `_open_output_dir` reports a corrupted plan."""
    try:
        precision = read_document(out / "plan.json", SweepPlan).draw.precision
    except InputError:
        return None
    return precision if precision in AUTOCAST else None


def _differences(old: object, new: object, key: str = "") -> list[str]:
    """What differs between two plans, as text."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for k in new for line in _differences(old.get(k), new[k], k)]
    return [] if old == new else [f"{key}: {_abbreviated(old)} -> {_abbreviated(new)}"]


def _abbreviated(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 30 else f"{text[:27]}..."


def _print_plan(
    name: str, guide_name: str, points: Sequence[SamplerSettings], plan: SamplePlan, runner: "SweepRunner", out: Path
) -> None:
    finished = sum((out / "points" / p.name).is_dir() for p in points)
    state = runner.state
    print(
        f"{name}\n{len(points)} points of {plan.count:,} images ({len(plan.classes)} classes), {finished} finished, on "
        f"{state.num_processes} process(es), {state.device}, {plan.precision}, in {out}"
    )
    if guide_name:
        print(f"guide: {guide_name}")
    print(f"measured against {runner.eval_setup.against}")
    for note in {inactive_interval_note(p, runner.pipe.prepare(p, runner.guide)) for p in points} - {""}:
        print(note)


# ---------------------------------------------------------------------- the points


@dataclass(frozen=True)
class SweepRunner:
    """Samples and measures points.

    evaluations: network evaluations per image, by the point's name. save_images: write each point's images to its folder.
    """

    pipe: ClassConditionalPipeline
    guide: ClassConditionalPipeline | None
    eval_setup: EvalSetup
    k: int
    state: PartialState
    evaluations: dict[str, int]
    save_images: bool

    def run(
        self, points: Sequence[SamplerSettings], plan: SamplePlan, finished: Path, batches: Path, title: str
    ) -> None:
        """Sample and measure the points that are not in `finished` yet. The progress bar counts network evaluations."""
        state, main = self.state, self.state.is_main_process
        unfinished = [p for p in points if not (finished / p.name).is_dir()]
        state.wait_for_everyone()  # every process lists the folder before one adds to it
        mine = sum(map(len, plan.batches[state.process_index :: state.num_processes]))
        total = sum(mine * self.evaluations[p.name] for p in unfinished)
        with tqdm(total=total, desc=title, unit="eval", unit_scale=True, disable=not main or not unfinished) as bar:
            for point in unfinished:
                bar.set_postfix_str(point.name)
                self._run_point(point, plan, finished / point.name, batches / point.name, bar)
        state.wait_for_everyone()
        if main:
            remove_batches(batches)

    def _run_point(self, point: SamplerSettings, plan: SamplePlan, out: Path, batches: Path, bar: tqdm) -> None:
        nfe = self.evaluations[point.name]
        sampled = sample_point(
            self.pipe, point, plan, self.eval_setup.extractors, batches, self.state, self.guide, self.save_images,
            on_batch=lambda count: bar.update(count * nfe),
        )  # fmt: skip
        if sampled is not None:
            measured = self._evaluate(sampled, point)
            settings = {"id": point.name, **point.to_dict(), "nfe": nfe, "count": plan.count}
            row = settings | measured.row | {"notes": measured.notes}
            _save_point(out, row, measured, sampled, self.pipe.labels.null_id)
            remove_batches(batches)

    def _evaluate(self, sampled: Sampled, point: SamplerSettings) -> Results:
        setup = self.eval_setup
        calls, device = self.pipe.prepare(point, self.guide), metrics_device(self.state)
        return results(
            sampled, setup.reference, setup.extractor, setup.classifier, setup.class_names, calls, self.k, device
        )


def _save_point(folder: Path, row: dict, measured: Results, sampled: Sampled, null_id: int | None) -> None:
    """Write a finished point's folder atomically."""
    arrays = dict(measured.influence)
    for metric, by_class in measured.class_influence.items():
        arrays |= {f"{metric}.{c}": influence for c, influence in enumerate(by_class) if influence is not None}

    def write(tmp: Path) -> None:
        tmp.mkdir()
        np.savez(tmp / "influence.npz", **arrays)
        np.save(tmp / "shown.npy", sampled.shown)
        if sampled.pixels is not None:
            write_npz(tmp / "samples.npz", sampled.pixels, sampled.labels, null_id)
        (tmp / "row.json").write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    atomic_dir(folder, write)


def _load_point(folder: Path, point: SamplerSettings) -> PointResult:
    try:
        row = read_document(folder / "row.json")
        read = as_document(row, SweepRow, folder / "row.json")
        if read.id != point.name:
            raise ValueError(f"it is {read.id}")
        with np.load(folder / "influence.npz", allow_pickle=False) as arrays:
            influence = {name: arrays[name] for name in arrays.files}
        classes = {
            metric: [influence.get(f"{metric}.{c}") for c in range(len(values))]
            for metric, values in read.per_class.items()
        }
        overall = {name: values for name, values in influence.items() if "." not in name}
        return PointResult(row, overall, classes, np.load(folder / "shown.npy", allow_pickle=False))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{folder} is corrupted ({error}): remove it, and the same command samples it again."
        ) from None


def _confirm(
    runner: SweepRunner, points: Sequence[SamplerSettings], finished: Sequence[PointResult], plan: SamplePlan, out: Path
) -> list[PointResult]:
    """Measure the best sets again with new noise: the best of many points on shared noise looks better than it is."""
    chosen = {member for choice in best_sets(finished).values() for member in choice.members}
    again = [p for p in points if p.name in chosen]
    fresh = dataclasses.replace(plan, seed=plan.seed + plan.count)
    if runner.state.is_main_process:
        print(f"measuring {len(again)} points of the best sets again with seeds {fresh.seed}...")
    runner.run(again, fresh, out / "confirmed", out / "batches_confirmed", f"{out.name}, again")
    return [_load_point(out / "confirmed" / p.name, p) for p in again]


def _sweep_record(
    source: str, name: str, runner: SweepRunner, plan: SamplePlan, points: Sequence[SamplerSettings], command: str
) -> Sweep:
    records = [p.to_dict() for p in points]
    keys = dict.fromkeys(key for record in records for key in record)
    values = {key: list(dict.fromkeys(record.get(key, UNRECORDED.get(key)) for record in records)) for key in keys}
    pipe, eval_setup = runner.pipe, runner.eval_setup
    return Sweep(
        source=source,
        what=name,
        model_hash=model_hash(pipe.unet),
        trained_steps=pipe.config.trained_steps,
        ema_decay=pipe.config.ema_decay,
        ema_length=pipe.config.ema_length,
        class_names=pipe.labels.names,
        row_names=tuple(map(pipe.labels.name, plan.classes)),
        swept={key: distinct for key, distinct in values.items() if len(distinct) > 1},
        reference={} if eval_setup.reference is None else eval_setup.reference.about,
        extractor={}
        if eval_setup.extractor is None
        else described(eval_setup.extractor) | eval_setup.extractor.to_dict(),
        seed=plan.seed,
        count=plan.count,
        precision=plan.precision,
        batch_size=plan.batch_size,
        command=command,
        classifier={}
        if eval_setup.classifier is None
        else described(eval_setup.classifier) | eval_setup.classifier.to_dict(),
        guide_hash=None if runner.guide is None else model_hash(runner.guide.unet),
        k=runner.k,
        versions=versions(),
        date=datetime.date.today().isoformat(),
    )
