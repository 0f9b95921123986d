"""The command `adagn evaluate`: sample images, extract features, compute metrics, find the nearest real images."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import PartialState
from tqdm.auto import tqdm

from ..atomic import exclusive_lock
from ..commands import command, overwrite_hint, resume_hint, shell_line, with_commands
from ..data.npz import write_npz
from ..diffusion.schedule import ModelEval
from ..errors import InputError, writing
from ..render.text import listed
from ..runs.recorded import free_default_folder, recorded_data
from ..runtime.distributed import process_state
from ..sampling.load import ema_record, open_guide, open_pipeline
from ..sampling.pretrained import model_hash
from .diagnostics import image_values
from .extractors import features_of
from .features import FeatureSet
from .image_set import ImageSet, is_data, read_data, read_image_set, sampled_from
from .memorisation import draw_neighbours, memorisation
from .output import BATCHES, check_out, finished_record, resume_batches
from .points import (
    PointSampler,
    Sampled,
    SamplePlan,
    choose_precision,
    classes_of,
    inactive_interval_note,
    remove_batches,
    set_up,
)
from .reference import RealImages
from .report import CLASSES, JSON, MARKDOWN, PAGE, described_by, full_record, overall_table, write_report
from .results import results
from .settings import EvaluateRequest
from .setup import EvalSetup, check_reference, open_setup, setup_of_model

SHEET, NPZ = "neighbours.png", "samples.npz"


def evaluate_model(source: str, request: EvaluateRequest, out: Path) -> dict | None:
    """Sample a model, measure the images, and write the files into `out`.

    Under torchrun each process samples its share. A stopped evaluation is resumed if its settings are unchanged. If
    `out` contains a finished evaluation with the same settings, its record is returned.

    Args:
        source: A run, checkpoint, pipeline folder or hub id.
        request: How the model is sampled and measured.
        out: The output folder.

    Returns:
        The content of evaluation.json; None on the other processes, unless the evaluation was finished already.

    Raises:
        InputError: A setting is invalid. This is checked before sampling.
    """
    state = process_state(request.device)
    main = state.is_main_process
    finished = None if request.overwrite else finished_record(out)
    if main:
        check_out(out)
        if finished is not None and (not request.command or finished.get("command") != request.command):
            raise InputError(overwrite_hint(f"{out} already holds an evaluation", request.command, out))
    given = request.sampler
    texts = (request.classes, given.guidance.negative.text)
    pipe, what = open_pipeline(source, request.ema, texts)
    guide = None if given.guide is None else open_guide(given.guide, request.guide_ema or request.ema, texts)[0]
    precision = choose_precision(request.precision, state)
    set_up([pipe, guide], precision, state.device)
    point = pipe.resolved(given.at_scale(request.scale or 1.0)).canonical()
    ids = classes_of(pipe, request.classes)
    draw = SamplePlan(ids, request.count, request.seed, request.batch_size, precision, shown=0)
    pipe.prepare(point, guide)
    setup = setup_of_model(source, pipe, draw, request, state)
    sampler = PointSampler(pipe, point, draw, setup.extractors, guide, request.keep or request.neighbours > 0)
    about = {"source": str(source), "model": _made_by(sampler, source, what), "settings": _settings(sampler)}
    guided = guide is not None or (pipe.labels.K and pipe.labels.has_null)
    following = _next(source, request) if guided else ""
    if finished is not None:
        if not _same(finished, about, setup, request.k):
            raise InputError(overwrite_hint(f"{out} already holds an evaluation", request.command, out))
        if main:
            print(f"{out} holds this evaluation already, of {finished['date']}.")
            _say(finished, out, following)
        return finished
    if main:
        print(
            f"{what}\n{draw.count:,} images, guidance {point.guidance.scale:g}, {point.sampler}, {point.steps} steps, "
            f"{about['settings']['network_evaluations']} network evaluations each, on {state.num_processes} process(es), {state.device}, "
            f"{draw.precision}\nagainst {setup.against}"
        )
        if note := inactive_interval_note(point, point.guidance.evaluations(sampler.calls) - len(sampler.calls)):
            print(note)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    with writing(out), exclusive_lock(out) if main else contextlib.nullcontext():
        if main:
            resume_batches(out / BATCHES, _batches_of(sampler, about["model"]))
        state.wait_for_everyone()
        sampled = _sample(sampler, out, state, request.command)
        if sampled is None:
            return None
        config, own = pipe.unet.config, f"The real images are the run's own: {setup.against}."
        shape = (draw.count, config.sample_size, config.sample_size, config.in_channels)
        notes = [own] if request.own_data else []
        if request.own_data and (
            learned := [pipe.labels.name(c) for c in dict.fromkeys(ids) if c in pipe.labels.learned_ids]
        ):
            notes.append(
                f"None of these real images is of the class {listed(learned)}, which was learned later: to measure against "
                "images of it, give them by --against FOLDER."
            )
        record = _measure(sampled, shape, about, setup, sampler.calls, request, out, notes)
        remove_batches(out / BATCHES)
    _say(record, out, following)
    return record


def _made_by(sampler: PointSampler, source: str, what: str) -> dict:
    """The model, as it is recorded. what: a sentence on its weights."""
    pipe, guide = sampler.pipe, sampler.guide
    return {
        "source": str(source),
        "weights": what,
        "hash": model_hash(pipe.unet),
        "guide_hash": None if guide is None else model_hash(guide.unet),
        "trained_steps": pipe.config.trained_steps,
        "ema_decay": pipe.config.ema_decay,
        **ema_record(pipe),
    }


def _settings(sampler: PointSampler) -> dict:
    """How it is sampled, as it is recorded."""
    pipe, point, plan = sampler.pipe, sampler.point, sampler.plan
    return {
        **point.to_dict(),
        "network_evaluations": point.guidance.evaluations(sampler.calls, pipe.one_pass),
        "seeds": [plan.seed, plan.seed + plan.count - 1],
        "classes": [pipe.labels.name(c) for c in plan.classes],
        "batch_size": plan.batch_size,
        "precision": plan.precision,
    }


def _batches_of(sampler: PointSampler, made_by: dict) -> dict:
    """What the batches of a stopped evaluation depend on."""
    return {
        "model": made_by["hash"],
        "guide": made_by["guide_hash"],
        "point": sampler.point.to_dict(),
        "draw": sampler.plan.to_dict(),
        "extractors": [e.hash for e in sampler.extractors],
        "pixels": sampler.keep_pixels,
    }


def _same(record: dict, about: dict, setup: EvalSetup, k: int) -> bool:
    """Whether a finished evaluation has the same model, settings and data as the new one."""
    now = {"model": about["model"], "settings": about["settings"], "k": k, **described_by(setup)}
    return all(record.get(key) == value for key, value in json.loads(json.dumps(now)).items())


def _next(source: str, request: EvaluateRequest) -> str:
    """The sweep whose numbers compare with these."""
    s, default = request.sampler, EvaluateRequest()
    given = {key: getattr(request, key) for key in ("against", "classes", "extractor", "precision", "ema", "guide_ema")}
    given = {key: value for key, value in given.items() if value != getattr(default, key)}
    given |= {"guide": s.guide, "sampler": s.sampler, "steps": s.steps, "count": request.count, "spacing": s.spacing}
    given |= request.data
    return command("sweep", source, guidance="1:4:0.5", **given, out=free_default_folder("sweeps", source, request.ema))


def evaluate_images(what: str, request: EvaluateRequest, out: Path) -> dict:
    """Measure the images of a folder, an .npz file or a data set, and write the files into `out`.

    Args:
        what: The path or the data set.
        request: How the images are measured. Its scale selects images of a folder of `adagn sample` with several.
        out: The output folder.

    Returns:
        The content of evaluation.json.

    Raises:
        InputError: The images cannot be measured.
    """
    state = process_state(request.device)
    if state.num_processes > 1:
        raise InputError("images that are there already are measured by one process: leave torchrun out.")
    check_out(out)
    if not request.overwrite and finished_record(out) is not None:
        raise InputError(overwrite_hint(f"{out} already holds an evaluation", request.command, out))
    path, data = Path(what).expanduser(), is_data(what)
    source = None if data else sampled_from(path)
    recorded = None if source is None else recorded_data(source)
    check_reference(request, recorded, what)
    image_set = None if data else read_image_set(path, request.scale)
    real = RealImages(request.against, request.data, recorded)
    image_set = read_data(real.settings(None, what)) if data else image_set
    shape = real.image_shape
    pixels = image_set.with_channels(None if shape is None else shape[2])
    real.check_shape(*pixels.shape[1:])
    names = real.class_names or image_set.class_names or (real.learned.label_space.names if real.learned else ())
    labels = image_set.labels_among(names)
    names = names if labels is not None else ()
    setup = open_setup(real, request, names, labels, pixels.shape[3], state)
    print(f"{len(pixels):,} images of {what}\nagainst {setup.against}")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with writing(out), exclusive_lock(out):
        sampled = _features(pixels, labels, setup, request.batch_size)
        settings = image_set.about.get("settings", {}) | {"seeds": image_set.about.get("seeds")}
        about = {"source": what, "model": image_set.about.get("made_by"), "settings": settings}
        notes = _notes_on(image_set, pixels, setup, request)
        record = _measure(sampled, pixels.shape, about, setup, (), request, out, notes)
    _say(record, out)
    return record


def store_reference(request: EvaluateRequest, file: Path) -> FeatureSet:
    """Compute the reference of `request.against` and save it in `file`. Raises InputError if the file exists."""
    if file.suffix != ".npz" or (file.exists() and not request.overwrite):
        exists = overwrite_hint(f"{file} is there already", request.command, file)
        raise InputError(f"a reference is saved as .npz: type --out {file}.npz." if file.suffix != ".npz" else exists)
    real = RealImages(request.against, request.data)
    if real.dataset is None and real.found is None:
        raise InputError(f"{real.name} contains statistics, not images: expected a data set or images.")
    names, channels = real.class_names, real.image_shape[2]
    state = process_state(request.device)
    reference = open_setup(real, replace(request, classifier="none"), names, None, channels, state).reference
    reference.save(file)
    about = reference.about
    print(
        with_commands(
            f"{about['count']:,} of {about['of']:,} images of {about['name']}, {about['extractor']['dimension']:,} features each, in {file}\n"
            "A model or images are measured against it, by adagn evaluate or adagn sweep, with:",
            shell_line(["--against", str(file), "--extractor", request.extractor]),
        )
    )
    return reference


# ---------------------------------------------------------------------- sampling and measuring


def _sample(sampler: PointSampler, out: Path, state: PartialState, typed: str) -> Sampled | None:
    """Sample with a progress bar. typed: the command line, for the message of Ctrl-C."""
    mine = sum(map(len, sampler.plan.batches[state.process_index :: state.num_processes]))
    with tqdm(total=mine, unit="image", desc=out.name, disable=not state.is_main_process, leave=False) as bar:
        try:
            return sampler.sample(out / BATCHES, state, bar.update)
        except KeyboardInterrupt:
            print(resume_hint(f"\nStopped. Finished batches are in {out / BATCHES}.", typed))
            raise


def _features(pixels: np.ndarray, labels: np.ndarray | None, setup: EvalSetup, batch_size: int) -> Sampled:
    """Existing images as a `Sampled`, without the values that only sampling can provide."""
    batches = [pixels[i : i + batch_size] for i in range(0, len(pixels), batch_size)]
    features = {e.name: replace(features_of(e, batches, len(pixels)), labels=labels) for e in setup.extractors}
    values, unknown = np.concatenate([image_values(batch) for batch in batches]), np.zeros(0)
    return Sampled(features, labels, values, unknown, unknown, pixels[:0], pixels)


def _notes_on(image_set: ImageSet, pixels: np.ndarray, setup: EvalSetup, request: EvaluateRequest) -> list[str]:
    notes = []
    if request.own_data:
        notes.append(f"The real images are those of the run that was sampled: {setup.against}.")
    if pixels.shape[3] != image_set.pixels.shape[3]:
        notes.append("The images were written as colour and are gray: they were measured as gray ones.")
    if image_set.labels is not None and not setup.class_names:
        notes.append("The labels are of no use, since the classes they mean are not known.")
    return notes


def _measure(
    sampled: Sampled,
    shape: tuple[int, int, int, int],
    about: dict,
    setup: EvalSetup,
    calls: Sequence[ModelEval],
    request: EvaluateRequest,
    out: Path,
    notes: list[str],
) -> dict:
    """Compute the metrics and write all files; returns the record.

    shape: [N, H, W, C] of the images. about: source, model and settings, for the record.
    """
    e, reference, names = setup.extractor, setup.reference, setup.class_names
    measured = results(sampled, setup, calls, request.k, progress=True)
    memory, sheet = None, None
    if request.neighbours and reference.pooled is not None:
        gather = setup.real.gather(reference)
        memory = memorisation(sampled.features[e.name].pooled, sampled.pixels, reference, gather, progress=True)
        if gather is not None:
            names_by_image = _names_of(sampled.labels, names, setup.other_names)
            sheet = draw_neighbours(
                out / SHEET, memory, sampled.pixels, names_by_image, reference, gather, request.neighbours
            )
        else:
            notes = [*notes, f"No sheet of neighbours: the images of {reference.about['name']} are not available."]
    if sheet is None:
        (out / SHEET).unlink(missing_ok=True)
    if request.keep:
        write_npz(out / NPZ, sampled.pixels, sampled.labels if names else None, len(names) or None)
    else:
        (out / NPZ).unlink(missing_ok=True)
    memory_record = None if memory is None else memory.to_dict(request.neighbours)
    scored = sampled.features[e.name].probabilities is not None
    record = full_record(
        measured, about, shape, sampled.labels, scored, setup, memory_record, notes, request.k, request.command
    )
    write_report(record, out)
    return record


def _names_of(labels: np.ndarray | None, names: tuple[str, ...], other_names: tuple[str, ...]) -> list[str] | None:
    """The class name of each image; None without labels."""
    all_names = [*names, *other_names]
    return None if labels is None or not names else [all_names[c] for c in labels]


def _say(record: dict, out: Path, following: str = "") -> None:
    print(f"\n{overall_table(record)}\n")
    for note in record["notes"]:
        print(f"- {note}")
    if record["memorisation"]:
        print(f"- {record['memorisation']['sentence']}")
    files = [name for name in (PAGE, MARKDOWN, JSON, CLASSES, SHEET, NPZ) if (out / name).is_file()]
    print(f"\nLook at  {out / files[0]}\nBeside   {', '.join(files[1:])}")
    if following:
        print(with_commands("Next, other scales:", following))
