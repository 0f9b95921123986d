"""The models of a server: each loaded once, with a worker that samples for all clients."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from ..diffusion.schedule import ModelEval
from ..errors import InputError, did_you_mean, failed_allocation, out_of_memory
from ..evaluation.label_usage import Verdict
from ..models.cost import estimate_cost
from ..runs.layout import checkpoint_of
from ..runs.recorded import run_name_parts
from ..runs.shipped import model_folder, shipped_folder
from ..runs.weights import Weights
from ..runtime.distributed import choose_device
from ..runtime.precision import use_precision
from ..runtime.speed import apply_speed, describe_speed, resolve_speed
from ..sampling.load import open_pipeline
from ..sampling.pipeline import ClassConditionalPipeline
from ..sampling.plan import PlannedImage
from ..sampling.pretrained import model_hash
from ..sampling.settings import SamplerSettings
from ..trace.atlas import Atlas
from .metrics import Metrics
from .settings import ModelSettings
from .worker import Batch, Job, Unavailable, Worker

ATLAS_TIMESTEPS = 50


@dataclass(frozen=True)
class ImageItem:
    """One image to sample. strip: how many predicted images on the way to it."""

    image: PlannedImage
    strip: int = 0


@dataclass
class SampledImage:
    """pixels: float32 [H, W, C] in 0..1; strip: the predicted images on the way, of the same shape, noisiest first."""

    pixels: np.ndarray
    strip: list[np.ndarray]


class Watch:
    """The sampler's callback: reports how far the batch is, and collects the strips."""

    def __init__(self, batch: Batch, evaluations: int):
        self.batch, self.evaluations, self.done = batch, evaluations, 0
        strips = [item.strip for item in batch.items]
        self.steps = [set(np.linspace(0, evaluations - 1, n).round().astype(int).tolist()) for n in strips]
        self.strips: list[list[np.ndarray]] = [[] for _ in strips]

    def on_guidance(self, call: ModelEval, cond: Tensor, uncond: Tensor) -> None:
        """Part of `SamplingCallback`; not used."""

    def on_pred_x0(self, call: ModelEval, x0: Tensor) -> None:
        """See `SamplingCallback`."""
        for i in [i for i, steps in enumerate(self.steps) if call.index in steps]:
            self.strips[i].append((x0[i] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().float().numpy())
        self.done += 1
        self.batch.report(self.done / self.evaluations)


class Work:
    """A function to call in the worker's thread, as a job of its own kind."""

    def __init__(self, function: Any):
        self.function = function


class ServedModel:
    """A model with its worker.

    Args:
        name: what clients call it.
        source: as `open_pipeline` takes it.
        settings: of the server.
        metrics: of the server.
    """

    def __init__(self, name: str, source: str, settings: ModelSettings, metrics: Metrics):
        weights = Weights.parse(source).with_ema(settings.ema)
        self.name, self.source, self.ema, self.limits = name, weights.path, weights.ema, settings.limits
        self.checkpoint = str(checkpoint_of(self.source, self.ema) or self.source)  # a run may get newer ones
        self.pipe, self.weights = open_pipeline(self.checkpoint, self.ema)
        self.pipe.set_progress_bar_config(disable=True)
        self.rejected = load_classes(self.pipe, settings.learned)
        device = choose_device(settings.speed.device.lower())
        self.speed = resolve_speed(settings.speed, device, estimate_cost(self.pipe.unet.config).flops)
        self.description = f"{self.weights}, on {device}, {describe_speed(self.speed, settings.speed, device)}"
        self.pipe.to(device)
        apply_speed(self.pipe.unet, self.speed)
        self.hash = model_hash(self.pipe.unet)
        self.metrics = metrics
        self.others: dict[str, ServedModel] = {}
        self.verdict: Verdict | None = None  # of the label check, once it was made
        self.worker = Worker(self._work, settings.limits.max_batch, settings.limits.max_waiting, self._count)
        metrics.watch(name, lambda: self.worker.waiting, lambda: len(self.worker.running))

    @property
    def kind(self) -> str:
        """The served weights in some words, such as "EMA weights, step 80"."""
        config = self.pipe.config
        kind = "weights" if config.ema_decay is None else "EMA weights"
        kind = "raw weights" if self.ema == "raw" else kind
        kind = kind if config.ema_length is None else f"EMA weights of length {config.ema_length:g}"
        return kind if config.trained_steps is None else f"{kind}, step {config.trained_steps:,}"

    def sample(self, items: Sequence[ImageItem], sampler: SamplerSettings, finish: Any) -> Job:
        """Put images into the queue. sampler: resolved, its guide is the name of a model."""
        single = all(item.image.plan.class_id is not None for item in items)
        steps = len(self.evaluations(sampler))
        return self._submit(items, (sampler.at_scale(1.0), single), finish, steps)

    def call(self, function: Any) -> Job:
        """Put a function into the queue, which receives the job's batch."""
        return self._submit([Work(function)], object(), lambda results: results[0])

    def guide(self, sampler: SamplerSettings) -> ServedModel | None:
        """The model that guidance moves away from. Raises InputError if there is none of this name."""
        return None if sampler.guide is None else find(self.others, sampler.guide)

    @cached_property
    def atlas(self) -> Atlas:
        """The modulation over noise levels and classes; computed in the worker's thread by `call`."""
        return Atlas.of(self.pipe.unet, self.pipe.labels, ATLAS_TIMESTEPS, process=self.pipe.process)

    def _submit(self, items: Sequence, kind: Hashable, finish: Any, steps: int = 1) -> Job:
        return self.worker.submit(Job(items, kind, finish, self.limits.max_seconds, steps))

    def _count(self, batch: Batch, seconds: float) -> None:
        self.metrics.batch(self.name, sum(isinstance(item, ImageItem) for item in batch.items), seconds)

    def _work(self, batch: Batch) -> list:
        first = batch.items[0]
        try:
            if isinstance(first, Work):
                return [first.function(batch)]
            return self._sample(batch)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            text = f"out of memory{failed_allocation(error)} with {len(batch.items)} images: ask for fewer, or later."
            raise Unavailable(text, 503) from error

    def _sample(self, batch: Batch) -> list[SampledImage]:
        sampler = batch.parts[0][0].kind[0]
        images = [item.image for item in batch.items]
        guidance = replace(sampler.guidance, scale=tuple(image.scale for image in images))
        guide, watch = self.guide(sampler), Watch(batch, len(self.pipe.evaluations(sampler.at_scale(1.0))))
        with use_precision(self.speed.precision, self.pipe.device):
            pixels = self.pipe.sample(
                replace(sampler, guidance=guidance),
                class_plan=[image.plan for image in images],
                guide=None if guide is None else guide.pipe,
                seeds=[image.seed for image in images],
                output_type="np",
                callback=watch,
            ).images
        return [SampledImage(one, strip) for one, strip in zip(pixels, watch.strips)]

    def evaluations(self, sampler: SamplerSettings) -> list[ModelEval]:
        """The network evaluations of a call. Raises InputError if the settings do not fit the model."""
        guide = self.guide(sampler)
        return self.pipe.evaluations(sampler, None if guide is None else guide.pipe)


def load_classes(pipe: ClassConditionalPipeline, files: Sequence[str]) -> dict[str, str]:
    """Load the learned classes that fit the model. Returns {file: why it was rejected} of the others."""
    rejected = {}
    for file in files:
        try:
            pipe.load_class(file)
        except InputError as error:
            rejected[file] = str(error)
    return rejected


def find(models: dict[str, ServedModel], name: str | None) -> ServedModel:
    """The model of this name; the first one for None. Raises InputError if there is none."""
    name = next(iter(models)) if name is None else name
    if name not in models:
        hint = did_you_mean(name[:80], models, most=1)
        raise InputError(f"there is no model {name[:80]!r}.{hint} Models of this server: {', '.join(models)}.")
    return models[name]


def open_models(sources: Sequence[str], settings: ModelSettings, metrics: Metrics) -> dict[str, ServedModel]:
    """Load the models, and name each after its run: digits for digits and runs/digits, digits-2 for a second one."""
    models: dict[str, ServedModel] = {}
    for source in sources:
        name = own = model_name(source)
        number = 2
        while name in models:
            name, number = f"{own}-{number}", number + 1
        models[name] = ServedModel(name, source, settings, metrics)
    for model in models.values():
        model.others = models
    for file in settings.learned:
        reasons = [model.rejected.get(file) for model in models.values()]
        if None not in reasons:
            raise InputError(f"--learned: no model of this server takes the class: {reasons[0]}")
    return models


def model_name(source: str) -> str:
    """What clients call a model: the run's name, without folders that only order runs."""
    source = Weights.parse(source).path
    path = model_folder(source)
    if shipped_folder(source) or not path.exists():
        return source  # a hub id
    path = path.resolve()
    run = path.parent if path.name == "pipeline" else path.parent.parent if path.parent.name == "checkpoints" else path
    return "-".join(run_name_parts(run))
