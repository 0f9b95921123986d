"""What a server can do, as plain functions: the API, the tools for agents and the page all call these.

What takes time returns a `Job`: `job.wait()` gives its result in a thread, `job.future` in an event loop, `job.stop()`
drops it. Models are looked up by name; nothing here takes a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from typing import Any

from torch import nn

from ..commands import command, with_options
from ..data import ImageDataset
from ..errors import InputError, reject_first
from ..evaluation.label_usage import label_check as check_label
from ..render.report import Section
from ..sampling.class_mix import ClassMix, ClassPlan
from ..sampling.pipeline import MAX_SEED, to_pixels
from ..sampling.plan import PlannedImage, image_record, planned_images, plans_of
from ..sampling.settings import SampleRequest, SamplerSettings
from ..schema import fields_of
from ..trace.report import TraceReport, TraceResults
from ..trace.tracing import heldout_images, measure_influence, objective_of
from .explain import explain_class, explain_model
from .images import Images
from .models import ImageItem, ServedModel, find
from .settings import ClassQuery, ImagesQuery, Limits, ModelQuery
from .worker import Batch, Job

Models = dict[str, ServedModel]
PROBED_IMAGES = 4
NO_IMAGES = (
    "The network responds to its label. Only labelled images can show whether it uses it, and the data of this model's "
    "run cannot be opened on this server."
)


def list_models(models: Models) -> list[dict]:
    """Of each model: name, weights, hash, classes, image size, process and sampler."""
    return [_about(model) for model in models.values()]


def list_classes(models: Models, query: ModelQuery) -> dict:
    """The classes of a model by id; the null label samples without a class."""
    model = find(models, query.model)
    labels = model.pipe.labels
    classes = [{"id": i, "name": labels.name(i)} for i in (*range(labels.K), *labels.learned_ids)]
    return {"model": model.name, "classes": classes, "null_id": labels.null_id}


def images(models: Models, query: ImagesQuery) -> Job:
    """Sample images of classes, of mixed classes, between two classes, or of sums of class vectors.

    Args:
        models: of the server.
        query: a SampleQuery, MixQuery, InterpolateQuery or StyleQuery.

    Returns:
        A job whose result is `Images`.

    Raises:
        InputError: the query does not fit the model, or is over the limits.
        Unavailable: the queue is full.
    """
    model = find(models, query.model)
    request, plans = _checked(model, query)
    sampler = model.pipe.resolved(request.sampler)
    planned = list(planned_images(request, plans))
    record = _record(model, request, sampler, plans, planned)

    def finish(results: list) -> Images:
        pixels = [to_pixels(one.pixels) for one in results]
        return Images(record, pixels, [[to_pixels(step) for step in one.strip] for one in results])

    return model.sample([ImageItem(one, query.strip) for one in planned], sampler, finish)


def images_command(models: Models, query: ImagesQuery) -> str:
    """The `adagn sample` command of a request for images. Raises InputError where `images` does."""
    model = find(models, query.model)
    return sample_command(model, _checked(model, query)[0])


def modulation(models: Models, query: ClassQuery) -> Job:
    """What the modulation says about a model, or about one of its classes; see `explain_model` and `explain_class`.

    Returns:
        A job whose result is a dict of plain JSON types.

    Raises:
        InputError: there is no such model or class.
        Unavailable: the queue is full.
    """
    model = find(models, query.model)
    class_id = None if query.class_name is None else _one_class(model, query.class_name)

    def explain(batch: Batch) -> dict:
        atlas = model.atlas
        if class_id is None:
            return {"model": model.name, **explain_model(atlas)}
        if class_id not in atlas.class_ids:
            raise InputError(f"only the first {len(atlas.class_ids) - 1} classes of this model can be explained.")
        return {"model": model.name, **explain_class(atlas, model.pipe.labels, class_id)}

    return model.call(explain)


def sections(models: Models, query: ModelQuery, influence: bool = False) -> Job:
    """Parts of a trace report, for people: what the modulation says, or the influence of each site on the image.

    Args:
        models: of the server.
        query: which model.
        influence: measure the influence on a few images: held-out ones of the run's data if they are here, else sampled.

    Returns:
        A job whose result is a list of `render.report.Section`.

    Raises:
        InputError: there is no such model.
        Unavailable: the queue is full.
    """
    model = find(models, query.model)

    def report(batch: Batch) -> list[Section]:
        results = TraceResults(model.name, model.description, model.atlas)
        if not influence:
            return list(TraceReport(results).sections())
        with _stoppable(model.pipe.unet.conv_in, batch):
            results.influence = measure_influence(model.pipe, model.source, _heldout(model), PROBED_IMAGES)
        return [TraceReport(results).influence_section()]

    return model.call(report)


def label_check(models: Models, query: ModelQuery) -> Job:
    """Whether a model uses its label, measured on held-out images of its run's data if they are here.

    Returns:
        A job whose result is {"model", "used": true, false or null (undecided), "sentence"}.

    Raises:
        InputError: there is no such model.
        Unavailable: the queue is full.
    """
    model = find(models, query.model)

    def check(batch: Batch) -> dict:
        if model.verdict is None:
            unet, heldout = model.pipe.unet, _heldout(model)
            with _stoppable(unet, batch):
                verdict = check_label(unet, objective_of(model.pipe, model.source), heldout)
            undecided = heldout is None and unet.config.num_classes and verdict.used is None
            model.verdict = replace(verdict, sentence=NO_IMAGES) if undecided else verdict
        return {"model": model.name, "used": model.verdict.used, "sentence": model.verdict.sentence}

    return model.call(check)


def sample_command(model: ServedModel, request: SampleRequest) -> str:
    """The `adagn sample` command that samples the same images, also after a run went on to train."""
    guide = model.guide(request.sampler)
    sampler = request.sampler if guide is None else replace(request.sampler, guide=guide.checkpoint)
    request, usual = replace(request, sampler=sampler, ema=model.ema), SampleRequest()
    options: dict[str, Any] = {}
    for setting in fields_of(SampleRequest):
        value = attrgetter(setting.key)(request)
        if value != attrgetter(setting.key)(usual) and setting.key not in ("mixes", "styles"):
            name = setting.option.name or setting.key.rpartition(".")[2]
            options[name] = ",".join(repr(v).removesuffix(".0") for v in value) if name == "guidance" else value
            if name in ("classes", "interpolate", "negative"):
                options[name] = model.pipe.labels.with_files(str(value))
    line = command("sample", model.checkpoint, **options)
    for mix in request.mixes:
        line = with_options(line, mix=model.pipe.labels.with_files(mix))
    for style in request.styles:
        line = with_options(line, style=model.pipe.labels.sum_with_files(style))
    return line


@contextmanager
def _stoppable(module: nn.Module, batch: Batch) -> Iterator[None]:
    """Stop at the next call of a module once nobody waits for the batch."""
    hook = module.register_forward_pre_hook(lambda *args: batch.report(0.5))
    try:
        yield
    finally:
        hook.remove()


def _about(model: ServedModel) -> dict:
    pipe, config = model.pipe, model.pipe.unet.config
    sampler = pipe.resolved(SampleRequest.sampler)
    return {
        "name": model.name,
        "weights": model.weights,
        "hash": model.hash,
        "classes": pipe.labels.K,
        "null_label": pipe.labels.has_null,
        "image_size": config.sample_size,
        "channels": config.in_channels,
        "conditioning": config.conditioning,
        "process": pipe.process.name,
        "sampler": sampler.sampler,
        "spacing": sampler.spacing,
        "trained_steps": pipe.config.trained_steps,
    }


def _record(
    model: ServedModel,
    request: SampleRequest,
    sampler: SamplerSettings,
    plans: Sequence[ClassPlan],
    planned: Sequence[PlannedImage],
) -> dict:
    """The record of `Images`. sampler: resolved. Raises InputError if it does not fit the model."""
    network_calls = {}
    for scale in request.scales:
        one = sampler.at_scale(scale)
        network_calls[scale] = one.guidance.evaluations(model.evaluations(one), model.pipe.one_pass)
    records = [image_record(one, sampler, model.speed, network_calls[one.scale], model.hash) for one in planned]
    mixes = [plan for plan in plans if isinstance(plan, ClassMix) and plan.class_id is None]
    sites = model.pipe.unet.sites()
    described = {"mixes": {mix.name: mix.describe(sites) for mix in mixes}} if mixes else {}
    return {"model": _about(model), "command": sample_command(model, request), "images": records, **described}


def _checked(model: ServedModel, query: ImagesQuery) -> tuple[SampleRequest, list[ClassPlan]]:
    """The request and what each of its images receives. Raises InputError if the model or the limits do not allow it."""
    request = query.request()
    reject_first(_over_limits(request, model.limits))
    model.pipe.resolved(request.sampler)
    plans = plans_of(request, model.pipe)
    total = len(plans) * request.count * len(request.scales)
    faults = {
        f"{total:,} images are more than the limit of {model.limits.max_images} per request: ask for fewer classes, "
        "scales or images of each.": total > model.limits.max_images,
        f"the seeds exceed {MAX_SEED}: give a smaller seed.": request.seed + total > MAX_SEED,
    }
    reject_first(faults)
    for plan in plans:
        if plan.class_id is None:
            plan.modulation(model.pipe.unet, 0)  # raises if the network cannot be conditioned in this way
    for scale in request.scales:
        model.evaluations(request.sampler.at_scale(scale))
    return request, plans


def _over_limits(request: SampleRequest, limits: Limits) -> dict[str, bool]:
    steps, count = request.sampler.steps, request.count
    return {
        f"{steps:,} steps are more than the limit of {limits.max_steps} per request: set steps to {limits.max_steps} or "
        "fewer.": steps > limits.max_steps,
        f"{count:,} images are more than the limit of {limits.max_images} per request: set a smaller count.": count
        > limits.max_images,
    }


def _one_class(model: ServedModel, name: str) -> int:
    ids = model.pipe.labels.parse(name)
    if len(ids) != 1:
        raise InputError(f"class_name is one class, and {name[:80]!r} means {len(ids)}.")
    return ids[0]


def _heldout(model: ServedModel) -> ImageDataset | None:
    """Held-out images of the run's data, if they can still be opened."""
    try:
        return heldout_images(model.source, model.pipe, None)
    except InputError:
        return None
