"""Sample the same classes and noise at many sampler settings, and measure each: guidance scale, interval, steps and others.

A point is one combination of weights and settings. Its images are sampled in batches, which the processes share.
"""

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..atomic import atomic_json, atomic_write, exclusive_lock
from ..commands import resume_hint, unused_path, with_commands, with_options
from ..errors import InputError, writing
from ..evaluation.extractors.base import record_of
from ..evaluation.points import (
    SamplePlan,
    choose_precision,
    classes_of,
    inactive_interval_note,
)
from ..evaluation.results import versions
from ..evaluation.setup import setup_of_model
from ..runtime.distributed import process_state
from ..runtime.precision import AUTOCAST
from ..sampling.guidance import Guidance
from ..sampling.pipeline import ClassConditionalPipeline
from ..schema import document, read_document
from .budget import BudgetSearch, Round, budget_record, rounds_json
from .cost import PointCost, extraction_seconds, format_cost
from .intervals import FILE, Found, find_intervals, saved_intervals
from .models import SweepModels, check_alike, kind_of_images
from .point_results import SETTINGS, PointResult
from .points import Grid, SweepPoint, grid_of
from .runner import REFERENCE, SweepRunner, load_point
from .selection import best_sets
from .settings import SweepRequest
from .sweep_report import Sweep, summary, write_report

UNRECORDED = {"rule": "cfg", "negative": "null"}  # neutral values that a point's record omits, as older files do
MAX_PRINTED = 12  # sets of weights
POINT_VERSION = 1  # version of the stored points; a sweep does not reuse points of another version


@document
class Draw:
    """How the images of a sweep are drawn, in plan.json."""

    precision: str


@document
class SweepPlan:
    """What is read of the settings that all points of a sweep share, plan.json. varied: of WEIGHT_AXES."""

    draw: Draw | None = None
    varied: tuple[str, ...] = ()


def sweep(sources: str | Sequence[str], request: SweepRequest, out: Path, command: str = "") -> list[Path]:
    """Sample and measure every point, and write report.html, sweep.md, sweep.csv, sweep.json and the images into `out`.

    Under torchrun the processes share the work.

    Args:
        sources: The models: run folders, checkpoints, pipeline folders or hub ids, as texts of `Weights`.
        request: The settings to sweep.
        out: The output folder.
        command: The command that repeats this sweep, for messages and the report; empty: not printed.

    Returns:
        The report's files on the main process; an empty list on the others.

    Raises:
        InputError: Before anything is sampled, for whatever would fail later.
    """
    state = process_state(request.device)
    sources = [str(sources)] if isinstance(sources, str | Path) else [str(source) for source in sources]
    earlier = _earlier_plan(out)
    grid = grid_of(sources, request.with_intervals(()), earlier.varied)
    recorded = earlier.draw.precision if earlier.draw is not None and earlier.draw.precision in AUTOCAST else None
    request = dataclasses.replace(request, precision=choose_precision(request.precision, state, recorded))
    texts = (request.classes, *map(str, request.axes.get("guidance.negative", ())))
    models = SweepModels(request.precision, state.device, min(request.batch_size, request.count), texts)
    found = _intervals(models.model(grid.models[0]), grid, state, out) if request.finds_intervals else None
    if found is not None:
        grid = grid_of(sources, request.with_intervals(found.intervals), earlier.varied)
    costs, notes = prepare_points(grid, models)
    points = list(costs)
    plan = _make_plan(request, models.model(grid.models[0]))
    eval_setup = setup_of_model(grid.models[0].path, models.model(grid.models[0]), plan, request, state)
    runner = SweepRunner(models, eval_setup, request.k, state, costs, request.save_images, request.save_features)
    if state.is_main_process:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out) if state.is_main_process else contextlib.nullcontext():
        if state.is_main_process:
            _open_output_dir(out, _comparable_settings(runner, grid, plan) | budget_record(request.budget), command)
            if found is not None:
                atomic_json(out / FILE, dataclasses.asdict(found))
                notes = [found.sentence(), *notes]
            _print_plan(grid, points, plan, runner, notes, out)
        state.wait_for_everyone()
        try:
            finished, rounds = _run(runner, points, plan, request.budget, out)
            confirmed = _confirm(runner, points, finished, plan, out) if request.confirm else []
            if not state.is_main_process:
                return []
            if request.save_features and eval_setup.extractor is not None:
                eval_setup.reference.save(out / REFERENCE)
            others = [] if rounds else sorted({f.name for f in (out / "points").iterdir()} - {p.name for p in points})
            if request.earlier:
                finished, others = [*finished, *(load_point(out / "points" / name) for name in others)], []
            files = write_report(
                _sweep_record(sources, grid, runner, plan, request, finished, rounds, found, command),
                finished,
                out,
                confirmed,
                len(others),
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
    page, *others = sorted(files, key=lambda file: file.suffix != ".html")
    print(f"\nReport  {page}\nFiles   {', '.join(f.name for f in others if f.suffix != '.svg')}")
    if not request.confirm and len(points) > 1 and eval_setup.extractor is not None:
        confirm_command = [f"{command} --confirm"] if command else []
        print(
            with_commands(
                "Next, measure the best settings again with fresh seeds: the same command with --confirm",
                *confirm_command,
            )
        )
    return files


# ---------------------------------------------------------------------- before the first image


def prepare_points(grid: Grid, models: SweepModels) -> tuple[dict[SweepPoint, PointCost], list[str]]:
    """Every combination once, checked with its networks; at scale 1, all intervals, schedules and guides are one point.

    Args:
        grid: What was asked for.
        models: Loads each set of weights once, which records it.

    Returns:
        The cost of each point, in an order in which weights are loaded rarely; and notes.

    Raises:
        InputError: For a point that cannot be sampled, naming it.
    """
    costs, notes, kinds, order = {}, {}, {}, []
    for weights in grid.models:
        pipe = models.model(weights)
        kinds[weights] = kind_of_images(pipe)
        check_alike(kinds, grid.models[0], weights)
        points = grid.points_of(weights, pipe.resolved)
        for guide in [None, *grid.guides_of(weights)]:  # each is loaded once
            if guide is not None:
                pipe.check_guidance(Guidance(), models.guide(guide))
            for point in points:
                if point.guide == guide:
                    costs[point] = _cost(point, models)
                    notes[inactive_interval_note(point.sampler, costs[point].guided)] = None
        order += points
        del pipe  # the next model is loaded without this one in memory
    names = [p.name for p in order]
    if repeated := [n for n in names if names.count(n) > 1]:
        raise InputError(f"two settings have the same name ({repeated[0]}): remove one.")
    return {point: costs[point] for point in order}, [note for note in notes if note]


def _cost(point: SweepPoint, models: SweepModels) -> PointCost:
    try:
        return models.cost(point.sampler, point.model, point.guide)
    except InputError as error:
        raise InputError(f"the point {point.name} cannot be sampled: {error}") from None


def _intervals(pipe: ClassConditionalPipeline, grid: Grid, state: PartialState, out: Path) -> Found:
    """The intervals found for the first model, by the main process; of a resumed sweep those of its start."""
    found = None
    if state.is_main_process:
        found = saved_intervals(out / FILE) or find_intervals(pipe, grid.models[0].path)
    return broadcast_object_list([found])[0]


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


def _comparable_settings(runner: "SweepRunner", grid: Grid, plan: SamplePlan) -> dict:
    """Everything that a point's numbers depend on, except the point's own settings.

    Where weights vary, their hashes are in "weights", to which later ones are added.
    """
    eval_setup = runner.eval_setup
    reference = None if eval_setup.reference is None else eval_setup.reference.about
    hashes = {str(weights): about.hash for weights, about in runner.models.about.items()}
    guide = next(iter(grid.guides_of(grid.models[0])), None)
    one = {"model": hashes[str(grid.models[0])], "guide": None if guide is None else hashes[str(guide)]}
    return {
        "version": POINT_VERSION,
        **({"model": None, "guide": None, "varied": list(grid.varied), "weights": hashes} if grid.varied else one),
        "draw": plan.to_dict(),
        "extractor": None if eval_setup.extractor is None else eval_setup.extractor.hash,
        "judge": None if eval_setup.classifier is None else eval_setup.classifier.hash,
        "reference": reference and {key: reference.get(key) for key in ("fingerprint", "count", "seed")},
        "k": runner.k,
        "device": runner.state.device.type,
    }


def _open_output_dir(out: Path, settings: dict, command: str) -> None:
    """Write plan.json into `out`, or check that an existing one has these settings. Points and weights may be added later."""
    file = out / "plan.json"
    settings = json.loads(json.dumps(settings))
    if file.is_file():
        earlier = read_document(file)
        added = {}
        if isinstance(weights := earlier.get("weights"), dict) and "weights" in settings:
            added = {name: settings["weights"][name] for name in settings["weights"] if name not in weights}
            settings["weights"] = weights | settings["weights"]
            earlier["weights"] = weights | added
        if changed := _differences(earlier, settings):
            text = f"{out} contains a sweep with other settings ({'; '.join(changed)}), which cannot be compared: restore them, or give another --out"
            again = [with_options(command, out=unused_path(str(out)))] if command and " --out" not in command else []
            raise InputError(with_commands(f"{text}:", *again) if again else f"{text}.")
    if not file.is_file() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise InputError(f"{out} contains files that are not a sweep: give another --out.")
    if not file.is_file() or added:
        atomic_write(file, lambda tmp: tmp.write_text(json.dumps(settings, indent=1), encoding="utf-8"))
    for leftover in [*out.glob("batches*/*/.*.npz"), *out.glob(".*.*")]:  # temporary files of a killed process
        leftover.unlink(missing_ok=True)


def _earlier_plan(out: Path) -> SweepPlan:
    """What an earlier command recorded in `out`; empty if there was none. `_open_output_dir` reports a corrupted plan."""
    try:
        return read_document(out / "plan.json", SweepPlan)
    except InputError:
        return SweepPlan()


def _differences(old: object, new: object, key: str = "") -> list[str]:
    """What differs between two plans, as text."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for k in new for line in _differences(old.get(k), new[k], k)]
    if old == new:
        return []
    if key in ("extractor", "judge"):  # hashes
        return ["another extractor of features" if key == "extractor" else "another classifier"]
    return [f"{key}: {_abbreviated(old)} -> {_abbreviated(new)}"]


def _abbreviated(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 30 else f"{text[:27]}..."


def _print_plan(
    grid: Grid, points: Sequence[SweepPoint], plan: SamplePlan, runner: "SweepRunner", notes: Sequence[str], out: Path
) -> None:
    left = [p for p in points if not (out / "points" / p.name).is_dir()]
    state, about = runner.state, runner.models.about
    guides = dict.fromkeys(guide for weights in grid.models for guide in grid.guides_of(weights))
    for weights in grid.models[:MAX_PRINTED]:
        print(about[weights].what)
    if len(grid.models) > MAX_PRINTED:
        print(f"and {len(grid.models) - MAX_PRINTED} more sets of weights")
    print(
        f"{len(points)} points of {plan.count:,} images ({len(plan.classes)} classes), {len(points) - len(left)} finished, on "
        f"{state.num_processes} process(es), {state.device}, {plan.precision}, in {out}"
    )
    for guide in list(guides)[:MAX_PRINTED]:
        print(f"guide: {about[guide].what}")
    print(f"measured against {runner.eval_setup.against}")
    shown, timed = runner.models.model(points[0].model).unet.config, min(plan.batch_size, plan.count)
    extraction = extraction_seconds(
        runner.eval_setup.extractors, timed, (shown.sample_size, shown.sample_size, shown.in_channels)
    )
    print(format_cost([runner.costs[p] for p in left], plan.count, extraction, state.num_processes, timed))
    for note in notes:
        print(note)


def _run(
    runner: SweepRunner, points: Sequence[SweepPoint], plan: SamplePlan, budget: float | None, out: Path
) -> tuple[list[PointResult], list[Round]]:
    """Sample and measure the points: all with every image, or by successive halving within the budget.

    Returns:
        The points with the most images, on every process; and the rounds of a budget.
    """
    if budget is None:
        runner.run(points, plan, out / "points", out / "batches", out.name)
        return [load_point(out / "points" / p.name) for p in points], []
    search = BudgetSearch(runner, points, plan, budget, out)
    return search.run(), search.rounds


# ---------------------------------------------------------------------- after the last image


def _confirm(
    runner: SweepRunner, points: Sequence[SweepPoint], finished: Sequence[PointResult], plan: SamplePlan, out: Path
) -> list[PointResult]:
    """Measure the best sets again with new noise: the best of many points on shared noise looks better than it is."""
    chosen = {member for choice in best_sets(finished).values() for member in choice.members}
    again = [p for p in points if p.name in chosen]
    fresh = dataclasses.replace(plan, seed=plan.seed + plan.count, count=finished[0].row["count"])
    if runner.state.is_main_process:
        print(f"measuring {len(again)} points of the best sets again with seeds {fresh.seed}...")
    runner.run(again, fresh, out / "confirmed", out / "batches_confirmed", f"{out.name}, again")
    return [load_point(out / "confirmed" / p.name) for p in again]


def _sweep_record(
    sources: Sequence[str],
    grid: Grid,
    runner: SweepRunner,
    plan: SamplePlan,
    request: SweepRequest,
    points: Sequence[PointResult],
    rounds: Sequence[Round],
    found: Found | None,
    command: str,
) -> Sweep:
    rows = [p.row for p in points]
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key in SETTINGS]
    values = {key: list(dict.fromkeys(row.get(key, UNRECORDED.get(key)) for row in rows)) for key in keys}
    if request.earlier:  # whose points come after those of this command
        values = {key: sorted(of) if all(isinstance(v, int | float) for v in of) else of for key, of in values.items()}
    eval_setup, about = runner.eval_setup, runner.models.about
    labels = runner.models.labels
    first, guide = about[grid.models[0]], next(iter(grid.guides_of(grid.models[0])), None)
    return Sweep(
        source=", ".join(sources),
        what=first.what,
        model_hash=first.hash,
        trained_steps=first.trained_steps,
        ema_decay=first.ema_decay,
        ema_length=first.ema_length,
        class_names=labels.names,
        row_names=tuple(map(labels.name, plan.classes)),
        swept={key: distinct for key, distinct in values.items() if len(distinct) > 1},
        reference={} if eval_setup.reference is None else eval_setup.reference.about,
        extractor=record_of(eval_setup.extractor),
        seed=plan.seed,
        count=plan.count,
        precision=plan.precision,
        batch_size=plan.batch_size,
        command=command,
        classifier=record_of(eval_setup.classifier),
        guide_hash=None if guide is None else about[guide].hash,
        weights={str(weights): record.to_dict() for weights, record in about.items()} if grid.varied else {},
        rounds=rounds_json(rounds)["rounds"],
        budget=request.budget,
        intervals={} if found is None else {"proposed": list(found.intervals), "sentence": found.sentence()},
        rank=request.rank,
        heat_map=request.heat_map,
        k=runner.k,
        versions=versions(),
        date=datetime.date.today().isoformat(),
    )
