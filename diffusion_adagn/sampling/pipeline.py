"""ClassConditionalPipeline: classes and seeds -> images."""

import copy
import inspect
import io
import json
import math
import operator
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from ..diffusion.churn import Churn
from ..diffusion.ode_scheduler import OdeScheduler
from ..diffusion.process import Level, Process, ddpm_level
from ..diffusion.schedule import (
    ModelEval,
    model_evals,
    process_of,
    sampler_name,
    set_timesteps,
    spacing_name,
    with_sampler,
)
from ..errors import InputError, errors_as_input_error, reject_first
from ..labels import ClassSpec, LabelSpace
from ..models.unet import AdaGNUNet, check_guidance_scales
from ..renamed import CALL_ARGUMENTS, renamed_arguments
from ..render.grids import captioned_grid
from ..runs.class_file import run_id
from ..runs.layout import loads_checkpoint, pipeline_folder
from ..runs.recorded import recorded_config
from ..runs.weights import Weights
from ..schema import short_repr
from .card import model_card
from .class_mix import ClassBySteps, ClassMix, ClassPlan, modulation_table
from .classes import load_class
from .guidance import Guidance
from .negative import Negative
from .pretrained import check_has, checkpoint_parts, pipeline_parts
from .rules import Evaluation, Memory, Rule
from .settings import SamplerSettings
from .style import Style, find_directions

MAX_SEED = 2**63 - 1
MAX_GUIDE_SIGMA = 1000.0  # pure noise has an infinite noise level
UNGUIDED = Guidance()


@dataclass
class ImagesOutput(BaseOutput):
    """What a pipeline returns; a notebook shows it as a grid.

    Attributes:
        images: N PIL images, a float tensor [N, C, H, W] or an array [N, H, W, C], in 0..1.
        class_ids: one per image; None for an image of several classes, which class_names then describes.
        seeds: one per image, which reproduces it; None if a generator had been used before, or latents were given.
        class_names: one per image.
    """

    images: list[Image.Image] | Tensor | np.ndarray
    class_ids: list[int | None]
    seeds: list[int | None]
    class_names: list[str]

    def grid(self, columns: int = 8) -> Image.Image:
        """All images on one sheet, with class and seed above each.

        Args:
            columns: images per row.

        Returns:
            An RGB image; small images are enlarged.
        """
        images = self.images
        if isinstance(images, Tensor):
            images = images.permute(0, 2, 3, 1).cpu().float().numpy()
        cells = list(to_pixels(images)) if isinstance(images, np.ndarray) else [np.atleast_3d(i) for i in images]
        seeds = ["" if seed is None else f" #{seed}" for seed in self.seeds]
        return captioned_grid(cells, [f"{n}{s}" for n, s in zip(self.class_names, seeds)], columns)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.grid().save(file, "png")
        return file.getvalue()


class SamplingCallback(Protocol):
    """Receives the predictions of every sampling step."""

    def on_guidance(self, call: ModelEval, cond: Tensor, uncond: Tensor) -> None:
        """Called where guidance is applied.

        Args:
            call: the network evaluation.
            cond: conditional prediction, [N, C, H, W].
            uncond: the prediction that guidance moves away from, [N, C, H, W].
        """

    def on_pred_x0(self, call: ModelEval, x0: Tensor) -> None:
        """Called at every evaluation.

        Args:
            call: the network evaluation.
            x0: predicted x0 after guidance, before clipping, [N, C, H, W].
        """


StepCallback = Callable[["ClassConditionalPipeline", int, Tensor, dict[str, Any]], dict[str, Any] | None]


class ClassConditionalPipeline(DiffusionPipeline):
    """A trained network with its classes, its noise schedule and its sampler.

        pipe = ClassConditionalPipeline.from_pretrained("runs/digits")
        pipe(["cat", "dog"], guidance_scale=2.0, seeds=[0, 1]).images

    Calls may run concurrently in several threads: each uses a copy of the scheduler, and `scheduler` is not changed.
    `torch.compile(pipe.unet)`, `pipe.unet.compile()` and `pipe.unet.compile_repeated_blocks()` compile what a call runs;
    `enable_model_cpu_offload()` moves the network to the CPU between calls.

    Args:
        unet: the network.
        scheduler: of diffusers; see `diffusion.schedule.make_scheduler`.
        labels: the classes, a LabelSpace or its dict. None: named by their ids.
        clip_x0: clip the predicted x0 to [-1, 1], after guidance.
        ema_decay: of the weights, saved for information; None for raw weights and those of an ema_length.
        ema_length: of the weights, if they are a power-function EMA; saved for information.
        trained_steps: saved for information.
        guidance_convention: saved for information.

    Raises:
        InputError: the network and the label space do not match.
    """

    model_cpu_offload_seq = "unet"
    run_id: str | None = None  # of the run that the weights are of, where it is recorded
    _interrupt = False

    def __init__(
        self,
        unet: AdaGNUNet,
        scheduler: SchedulerMixin,
        labels: LabelSpace | dict | None = None,
        clip_x0: bool = True,
        ema_decay: float | None = None,
        trained_steps: int | None = None,
        guidance_convention: str = "pred = null + scale * (cond - null); scale 1 is no guidance",
        ema_length: float | None = None,
    ):
        super().__init__()
        expected = unet.config.num_classes or 0
        if labels is None:
            labels = LabelSpace(tuple(map(str, range(expected))), has_null=unet.config.null_class or not expected)
        labels = labels if isinstance(labels, LabelSpace) else LabelSpace.from_dict(labels)
        nulls = labels.has_null, unet.config.null_class
        if expected != labels.K or (expected and nulls[0] != nulls[1]):
            raise InputError(
                f"the network has {expected} classes, the label space {labels.K}; has_null of the label space is {nulls[0]}, null_class "
                f"of the network {nulls[1]}: they must be the same."
            )
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            labels=labels.to_dict(),
            clip_x0=clip_x0,
            ema_decay=ema_decay,
            ema_length=ema_length,
            trained_steps=trained_steps,
            guidance_convention=guidance_convention,
        )

    @property
    def labels(self) -> LabelSpace:
        """The classes, with those that were loaded. Cached: cleaning a thousand names takes milliseconds."""
        learned = tuple((one.name, one.file) for one in self.unet.learned)
        source, seen, labels = self.__dict__.get("_labels", (None, (), None))
        if source is not self.config.labels or seen != learned:
            source, labels = self.config.labels, LabelSpace.from_dict(self.config.labels)
            for name, file in learned:
                labels = labels.with_learned(name, file)
            self.__dict__["_labels"] = source, learned, labels
        return labels

    def load_class(self, file: str | os.PathLike) -> str:
        """Load a class that `adagn learn-class` learned. It is then a class like the others, by its name or its file.

        The network's weights do not change, and `save_pretrained` does not save the class.

        Args:
            file: of the class. A file that was loaded already is not loaded again.

        Returns:
            The name of the class.

        Raises:
            InputError: the file is corrupted, was learned with another run, for images of another size or number of
                channels, or there is a class of its name.
        """
        return load_class(self.unet, self.labels, self.run_id, file)

    @property
    def process(self) -> Process:
        """How an image becomes noise, and what the network predicts."""
        return process_of(self.scheduler)

    @property
    def one_pass(self) -> bool:
        """Whether the network reads the guidance scale, so that guided images take one pass per step."""
        return self.unet.config.max_guidance_scale is not None

    @property
    def interrupt(self) -> bool:
        """Whether the call ends after the current step; `callback_on_step_end` sets it as `pipe._interrupt`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int | None:
        """Network evaluations of this call's sampler; for use in a callback."""
        return self.__dict__.get("_num_timesteps")

    def enable_sequential_cpu_offload(self, *args, **kwargs) -> None:
        """Not supported: it moves layer by layer, while the modulation of all layers is one product."""
        raise InputError("enable_sequential_cpu_offload is not supported: use enable_model_cpu_offload().")

    def use_sampler(self, sampler: str | None = None, spacing: str | None = None) -> "ClassConditionalPipeline":
        """Make another sampler or timestep spacing the default of later calls; the process stays the same.

        Args:
            sampler: "ddpm", "ddim", "dpm++", "unipc", "euler" or "heun". None: the current one.
            spacing: "leading", "trailing" or "linspace", over the timesteps; "karras", "exponential" or "lu" (the same as
                exponential), over the noise levels, for dpm++, unipc, euler and heun. None: the current one.

        Returns:
            This pipeline.

        Raises:
            InputError: for a name that is none of these, and a combination that does not work.
        """
        self.register_modules(
            scheduler=with_sampler(self.scheduler, sampler, spacing, self.unet.config.learned_variance)
        )
        return self

    def _scheduler(self, sampler: str | None, spacing: str | None) -> SchedulerMixin:
        """A scheduler for one call: schedulers have state, and calls may run concurrently."""
        names = {None, sampler_name(self.scheduler)}, {None, spacing_name(self.scheduler)}
        if sampler in names[0] and spacing in names[1]:
            return copy.deepcopy(self.scheduler)  # the user may have replaced it
        return with_sampler(self.scheduler, sampler, spacing, self.unet.config.learned_variance)

    def check_guidance(self, guidance: Guidance, guide: "ClassConditionalPipeline | None" = None) -> None:
        """Check that guidance is possible.

        Args:
            guidance: its settings.
            guide: the model that guidance moves away from. None: this model's null class.

        Raises:
            InputError: the model has no null class, the guide does not fit, the rule is of another process, the interval is
                in timesteps, which process edm does not have, or the network reads the scale and the settings need two passes.
        """
        if guidance.interval is not None and guidance.interval.unit == "t" and self.process.name == "edm":
            low, high = (math.exp(4 * time) for time in self.process.times)
            raise InputError(
                f"the interval {guidance.interval} is in timesteps, which process edm does not have: write noise levels, such as "
                f"sigma:0.3-5; sampling goes from {high:g} to {low:g}."
            )
        guidance.rule.check(self.process)
        if self.one_pass:
            self._check_one_pass(guidance, guide)
        elif guide is not None:
            self._check_guide(guide)
            if guidance.negative != Negative():
                raise InputError(
                    f"guidance moves away from one of both: the guide, or the negative {guidance.negative}. Leave one out."
                )
        elif not guidance.is_neutral and (
            not self.labels.K or (guidance.negative.needs_null and self.labels.null_id is None)
        ):
            raise InputError(
                "guidance needs a null class, which this model lacks: sample at guidance scale 1, move away from a random class "
                "(--negative random), use another model as the guide (--guide RUN: an earlier checkpoint, or one without classes), "
                "or fine-tune with a null row (adagn train --init_from)."
            )

    def _check_one_pass(self, guidance: Guidance, guide: "ClassConditionalPipeline | None") -> None:
        """Raises InputError for what needs two predictions, and for scales that the network was not trained for."""
        faults = {
            "a guide": guide is not None,
            f"the negative {guidance.negative}": guidance.negative != Negative(),
            f"the rule {guidance.rule}": guidance.rule != Rule(),
            f"rescale {guidance.rescale:g}": guidance.rescale != 0,
        }
        reason = (
            " works on two predictions, and this network reads the guidance scale and makes one: leave it out, or sample its teacher "
            "or another network in two passes. Scale, interval, schedule and threshold work."
        )
        reject_first(faults, "", reason)
        check_guidance_scales(guidance.scales_given, self.unet.config.max_guidance_scale)

    def _check_guide(self, guide: "ClassConditionalPipeline") -> None:
        """Raises InputError unless `guide` has the same image shape, and the same classes or none."""
        if not hasattr(guide, "unet"):
            raise InputError(
                f"guide is a ClassConditionalPipeline, such as from_pretrained(...) returns, not {short_repr(guide)}."
            )
        ours, theirs = self.unet.config, guide.unet.config
        sides, channels = (ours.sample_size, theirs.sample_size), (ours.in_channels, theirs.in_channels)
        faults = {
            f"images of {sides[1]} pixels per side and {channels[1]} channels, the model's have {sides[0]} and {channels[0]}": (
                sides[0] != sides[1] or channels[0] != channels[1]
            ),
            f"other classes ({', '.join(guide.labels.names[:4])}, ...) than the model ({', '.join(self.labels.names[:4])}, ...)": (
                guide.labels.K and guide.labels.names != self.labels.names
            ),
        }
        reject_first(faults, "the guide has ", ": choose one with the same, or without classes.")

    def plans_for(self, guide: "ClassConditionalPipeline", plans: list[ClassPlan]) -> list[ClassPlan]:
        """The plans for a guide: the same, or any single class in place of mixes if it ignores classes.

        Args:
            guide: the guide.
            plans: of this model, one per image.

        Raises:
            InputError: a plan has a learned class that the guide does not have.
        """
        if guide.unet.embedding.classes is not None:
            used = {i for plan in plans for i in getattr(plan, "class_ids", [plan.class_id])} & set(
                self.labels.learned_ids
            )
            theirs = dict(enumerate(guide.labels.label_names))
            missing = [self.labels.name(i) for i in sorted(used) if theirs.get(i) != self.labels.name(i)]
            if missing:
                raise InputError(
                    f"the guide does not have the learned class {missing[0]}: load the same files into it, in the same order "
                    "(guide.load_class), or use a guide without classes."
                )
            return plans
        return [p if p.class_id is not None else ClassMix.single(0, self.labels) for p in plans]

    def check_eta(self, eta: float, sampler: str | None = None) -> None:
        """Check eta.

        Args:
            eta: a number of at least 0; samplers other than ddim need 0.
            sampler: its name. None: of the pipeline.

        Raises:
            InputError: eta is out of range for the sampler.
        """
        sampler = sampler or sampler_name(self.scheduler)
        if not 0 <= eta < math.inf or (eta and sampler != "ddim"):
            raise InputError(
                f"eta is a number of at least 0 for ddim (0: no noise, 1: as much as ddpm), and 0 for others, not {eta} for {sampler}."
            )

    def prepare(self, settings: SamplerSettings, guide: "ClassConditionalPipeline | None" = None) -> list[ModelEval]:
        """Make the sampler of these settings the default of later calls, and check all of them.

        Args:
            settings: how to sample.
            guide: see `check_guidance`.

        Returns:
            The network evaluations of a call.

        Raises:
            InputError: the settings do not fit this model, or each other.
        """
        self.use_sampler(settings.sampler, settings.spacing)
        return self.evaluations(settings, guide)

    def evaluations(
        self, settings: SamplerSettings, guide: "ClassConditionalPipeline | None" = None
    ) -> list[ModelEval]:
        """Check all of these settings; the pipeline does not change.

        Args:
            settings: how to sample.
            guide: see `check_guidance`.

        Returns:
            The network evaluations of a call.

        Raises:
            InputError: the settings do not fit this model, or each other.
        """
        scheduler = self._scheduler(settings.sampler, settings.spacing)
        self.check_eta(settings.eta, sampler_name(scheduler))
        self.check_guidance(settings.guidance, guide)
        set_timesteps(scheduler, settings.steps, churn=settings.churn)
        return model_evals(scheduler)

    def resolved(self, settings: SamplerSettings) -> SamplerSettings:
        """The settings with this pipeline's sampler and spacing where they have none.

        Args:
            settings: how to sample.
        """
        sampler, spacing = sampler_name(self.scheduler), spacing_name(self.scheduler)
        return replace(settings, sampler=settings.sampler or sampler, spacing=settings.spacing or spacing)

    def sample(self, settings: SamplerSettings, **arguments: Any) -> "ImagesOutput":
        """Sample images with these settings.

        Args:
            settings: how to sample; None in them is the pipeline's own.
            arguments: the other arguments of a call, such as classes and seeds.
        """
        s = settings
        return self(
            guidance=s.guidance, num_inference_steps=s.steps, eta=s.eta, sampler=s.sampler, spacing=s.spacing, churn=s.churn,
            **arguments,
        )  # fmt: skip

    def mix(self, text: str) -> ClassMix:
        """Read a class mix for this network.

        Args:
            text: such as "cat@coarse,dog@fine"; see `ClassMix`.

        Raises:
            InputError: see `ClassMix.parse`.
        """
        return ClassMix.parse(text, self.labels, self.unet.sites(), self.process)

    def style(self, text: str, psi: float | str | None = None) -> Style:
        """Read a sum of class vectors for this network.

        Args:
            text: such as "cat - dog + truck" or "cat + 1.5*direction:1"; see `Style`.
            psi: truncation; see `Style.truncated`. None: none.

        Raises:
            InputError: see `Style.parse` and `Style.truncated`.
        """
        sites = self.unet.sites()
        read = Style.parse(text, self.labels, sites, lambda: find_directions(self.unet, self.process).vectors)
        return read if psi is None else read.truncated(psi, sites)

    # ------------------------------------------------------------------ sampling

    @renamed_arguments(**CALL_ARGUMENTS)
    @torch.no_grad()
    def __call__(
        self,
        classes: ClassSpec | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        num_inference_steps: int = 50,
        seeds: int | Sequence[int] | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        class_plan: "str | ClassPlan | Sequence[str | ClassPlan] | None" = None,
        guidance: Guidance | None = None,
        callback: SamplingCallback | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        num_images_per_class: int = 1,
        class_labels: ClassSpec | None = None,
        num_images_per_prompt: int | None = None,
        guide: "ClassConditionalPipeline | None" = None,
        churn: Churn | None = None,
    ) -> ImagesOutput | tuple:
        """Sample images: one for each class given, or of one class for each seed, generator or latent given.

        An image depends on (model, class, its own seed, settings), not on its batch, within 1e-5 in fp32.

        Args:
            classes: as LabelSpace.parse takes them: "cat", 3, ["cat", 3], "all", "null". None: all (null without classes).
            guidance_scale: one, or one per image; 1 (the default) is no guidance, without a second pass. A network that reads
                the scale never makes one.
            num_inference_steps: steps of the sampler, from 1 to T.
            seeds: one per image, or one number s for s, s + 1, ... None: random ones, which the output lists.
            eta: noise of ddim, from 0 (none) to 1 (as much as ddpm).
            output_type: "pil", "pt" or "np" (also "numpy").
            return_dict: False: the tuple (images,).
            class_plan: in place of classes, for images of several classes: "cat@coarse,dog@fine" (see `ClassMix`), a ClassPlan
                such as `ClassInterpolation`, or one per image.
            guidance: in place of guidance_scale, with an interval, a schedule and so on; see `Guidance`.
            callback: receives the predictions of each step; see `SamplingCallback`.
            sampler: for this call only; see `use_sampler`. None: of the pipeline.
            spacing: for this call only; see `use_sampler`. None: of the pipeline.
            callback_on_step_end: called as in diffusers, `callback(pipe, index, timestep, {"latents": x})`, after each network
                evaluation (heun has two per step); x: noisy images [N, C, H, W] float32. It may return a dict with other latents
                to continue from. `pipe` is a view for this call: `pipe._interrupt = True` ends the call after this step, with
                the noisy images as they are. Set on the pipeline itself, it ends all of its calls.
            callback_on_step_end_tensor_inputs: which tensors it receives: ("latents",) or ().
            generator: in place of seeds. A list: image i uses generator i, and after `manual_seed(s)` is bit-equal to the image of
                seed s. A single generator draws one seed per image.
            latents: initial noise of unit variance, [N, C, H, W], one per image. Seeds then affect only the noise of ddpm, and
                the output lists none unless they were given.
            num_images_per_class: images of each class, one after another.
            class_labels: the same as classes.
            num_images_per_prompt: the same as num_images_per_class.
            guide: the model that guidance moves away from, in place of the null class: an earlier checkpoint of the same run,
                a smaller model, or one without classes (autoguidance, Karras et al. 2024). It may have another process.
            churn: noise added before steps, for euler and heun under edm; see `Churn`.

        Returns:
            ImagesOutput, in the order of the classes.

        Raises:
            InputError: for unknown classes, guidance without a null class, grids that a sampler would not follow exactly, and
                numbers of classes, seeds, generators and latents that differ.
        """
        # a PipelineCallback of diffusers lists its tensors
        inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        unknown = set(inputs) - {"latents"}
        copies = num_images_per_class if num_images_per_prompt is None else num_images_per_prompt
        several = "were given: give one of them."
        faults = {
            f"classes and class_labels are the same, and {several}": classes is not None and class_labels is not None,
            f"num_images_per_class and num_images_per_prompt {several}": num_images_per_prompt is not None
            and num_images_per_class != 1,
            f"classes and class_plan {several}": class_plan is not None
            and (classes is not None or class_labels is not None),
            f"seeds and generator {several}": seeds is not None and generator is not None,
            f"guidance_scale and guidance {several}": guidance is not None and guidance_scale is not None,
            f"num_images_per_class is a whole number of at least 1, not {short_repr(copies)}.": (
                isinstance(copies, bool) or not isinstance(copies, Integral) or copies < 1
            ),
            f"guidance is a Guidance object, not {short_repr(guidance)}; guidance_scale takes numbers.": (
                not isinstance(guidance, Guidance | None)
            ),
            f"output_type is pil, pt or np, not {short_repr(output_type)}.": output_type
            not in ("pil", "pt", "np", "numpy"),
            f"callback_on_step_end is called at each step; {short_repr(callback_on_step_end)} cannot be called.": (
                callback_on_step_end is not None and not callable(callback_on_step_end)
            ),
            f"a callback may receive 'latents' alone, not {', '.join(map(str, unknown))}.": bool(unknown),
        }
        reject_first(faults)
        plans = self._plans(class_labels if classes is None else classes, class_plan)
        plans = [plan for plan in plans for _ in range(copies)]
        config = self.unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        given = seeds is not None or generator is not None
        plans, seeds, generators = _pair(plans, seeds, generator, _check_latents(latents, shape))
        seeds = seeds if given or latents is None else [None] * len(seeds)
        count = len(plans)
        guidance = guidance or (UNGUIDED if guidance_scale is None else Guidance(guidance_scale))
        guide = getattr(guidance, "_guide", None) if guide is None else guide
        guidance.scales(count)
        self.check_guidance(guidance, guide)
        scheduler = self._scheduler(sampler, spacing)
        self.check_eta(eta, sampler_name(scheduler))

        if (hook := getattr(self.unet, "_hf_hook", None)) is not None:  # enable_model_cpu_offload: to its device now
            hook.pre_forward(self.unet)
        device = self._execution_device
        extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        extra |= {"eta": eta} if eta else {}

        timesteps = set_timesteps(scheduler, num_inference_steps, churn=churn)  # on the CPU, where the tables are
        calls, process = model_evals(scheduler), process_of(scheduler)
        draws = [index if seed is None else seed for index, seed in enumerate(seeds)]
        predict = self._predictor(plans, calls, process, guidance, guide, callback, draws)
        x = (_noise(shape, generators) if latents is None else latents.float()).to(device)
        x = x * scheduler.init_noise_sigma
        self._interrupt = False
        view = copy.copy(self)  # calls run concurrently: a callback reads and interrupts its own call
        view.__dict__ |= {"scheduler": scheduler, "_num_timesteps": len(timesteps)}
        with self.progress_bar(total=len(timesteps)) as bar:
            for t, call in zip(timesteps, calls):
                x_t = scheduler.scale_model_input(x, t)
                prediction = predict(x_t, call)
                prediction = self._clip(prediction, x_t, call, scheduler, process, guidance, callback)
                x = scheduler.step(prediction, t, x, return_dict=False, **extra)[0]
                if callback_on_step_end is not None:
                    result = callback_on_step_end(view, call.index, t, {"latents": x} if inputs else {})
                    x = _latents(result, x)
                bar.update()
                if view._interrupt or self._interrupt:
                    break
        self.maybe_free_model_hooks()

        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().float().numpy()
        if output_type == "pil":
            images = to_pil(images)
        names, class_ids = [p.name for p in plans], [p.class_id for p in plans]
        return ImagesOutput(images, class_ids, seeds, names) if return_dict else (images,)

    def _plans(
        self, classes: ClassSpec | None, given: "str | ClassPlan | Sequence[str | ClassPlan] | None"
    ) -> list[ClassPlan]:
        labels = self.labels
        if given is None:
            ids = labels.parse(("all" if labels.K else "null") if classes is None else classes)
            return [ClassMix.single(i, labels) for i in ids]
        given = [given] if isinstance(given, str | ClassPlan) or not isinstance(given, Sequence) else given
        if not all(isinstance(plan, str | ClassPlan) for plan in given):
            raise InputError(
                f"class_plan is a text such as 'cat@coarse,dog@fine', a ClassPlan or several, not {given!r}."
            )
        return [self.mix(plan) if isinstance(plan, str) else plan for plan in given]

    def _predictor(
        self,
        plans: list[ClassPlan],
        calls: Sequence[ModelEval],
        process: Process,
        guidance: Guidance,
        guide: "ClassConditionalPipeline | None" = None,
        callback: SamplingCallback | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Callable[[Tensor, ModelEval], Tensor]:
        """A function (x_t [N, C, H, W], evaluation) -> guided prediction [N, C or 2C, H, W], float32; one pass where not guided.

        seeds: one per image, for random negatives. None: 0, 1, ...
        """
        times, scales = [call.t for call in calls], guidance.scales(len(plans))
        if self.one_pass:
            return self._one_pass(plans, times, torch.stack([guidance.scales_at(call, scales) for call in calls]))
        one = self._one_pass(plans, times)
        if guidance.is_neutral:
            return one
        seeds = range(len(plans)) if seeds is None else seeds
        both = self._two_passes(plans, calls, process, guide, guidance.negative, seeds)
        scales, memory = scales.to(self._execution_device), Memory()

        def predict(x: Tensor, call: ModelEval) -> Tensor:
            weight = guidance.weight(call)
            if not weight:
                return one(x, call)
            # all mean channels are guided; a learned variance is taken from the conditional pass
            prediction, uncond = both(x, call)
            cond, variance = prediction.split([x.shape[1], prediction.shape[1] - x.shape[1]], dim=1)
            if callback is not None:
                callback.on_guidance(call, cond, uncond)
            guided = guidance.combine(cond, uncond, scales, weight, Evaluation(x, process, call, memory))
            return torch.cat([guided, variance], dim=1)

        return predict

    def _one_pass(
        self, plans: list[ClassPlan], times: list[float], scales: Tensor | None = None
    ) -> Callable[[Tensor, ModelEval], Tensor]:
        """A function (x_t [N, C, H, W], evaluation) -> the network's output, float32.

        times: one per evaluation. scales: [evaluations, N], of a network that reads them; None: 1.
        """
        at_step = modulation_table(self.unet, plans, torch.tensor(times), scales=scales)
        dtype, denoise = self.unet.dtype, _denoise(self.unet)
        return lambda x, call: denoise(x.to(dtype), at_step(call.index)).float()

    def _two_passes(
        self,
        plans: list[ClassPlan],
        calls: Sequence[ModelEval],
        process: Process,
        guide: "ClassConditionalPipeline | None",
        negative: Negative,
        seeds: Sequence[int],
    ) -> Callable[[Tensor, ModelEval], tuple[Tensor, Tensor]]:
        """A function (x_t, evaluation) -> the network's output, and the C mean channels that guidance moves away from."""
        times = [call.t for call in calls]
        if guide is None and negative.shift is None:
            classes = negative.class_ids(self.labels, calls, seeds)
            together = self._one_pass([*plans, *(ClassBySteps(tuple(ids)) for ids in classes)], times)

            def double_pass(x: Tensor, call: ModelEval) -> tuple[Tensor, Tensor]:
                cond, uncond = together(torch.cat([x, x]), call).chunk(2)
                return cond, uncond[:, : x.shape[1]]

            return double_pass

        cond = self._one_pass(plans, times)
        if guide is None:
            shifted = self._one_pass(plans, negative.times(process, calls))
            return lambda x, call: (cond(x, call), shifted(x, call)[:, : x.shape[1]])

        guide.unet.to(self._execution_device)
        theirs = guide.process
        same, converts = process.same_levels(theirs), process.prediction != theirs.prediction
        if same:
            levels = [ddpm_level(*c.level[:3], theirs.prediction) if converts else c.level for c in calls]
        else:  # the same noise level in the guide's own table
            levels = [theirs.at(min(call.sigma, MAX_GUIDE_SIGMA)) for call in calls]
        weak = guide._one_pass(self.plans_for(guide, plans), [level.time for level in levels])

        def guide_pass(x: Tensor, call: ModelEval) -> tuple[Tensor, Tensor]:
            level = levels[call.index]
            their_x = x if same else x * _ratio(level, call.level)
            uncond = weak(their_x, call)[:, : x.shape[1]]
            if converts or not same:
                uncond = process.from_x0(theirs.to_x0(uncond, their_x, level), x, call.level)
            return cond(x, call), uncond

        return guide_pass

    def _clip(
        self,
        prediction: Tensor,
        x_t: Tensor,
        call: ModelEval,
        scheduler: SchedulerMixin,
        process: Process,
        guidance: Guidance = UNGUIDED,
        callback: SamplingCallback | None = None,
    ) -> Tensor:
        """What the scheduler receives: of ddpm the prediction, of edm and flow x0. Both after x0 was clipped.

        Only sampler ddpm receives a learned variance.
        """
        prediction, variance = prediction.split([x_t.shape[1], prediction.shape[1] - x_t.shape[1]], dim=1)
        clipped, takes_x0 = self.config.clip_x0 or guidance.threshold is not None, process.name != "ddpm"
        if clipped or takes_x0 or callback is not None:
            x0 = process.to_x0(prediction, x_t, call.level)
            if callback is not None:
                callback.on_pred_x0(call, x0)
            if clipped:
                x0 = x0.clamp(-1, 1) if guidance.threshold is None else guidance.threshold_x0(x0)
            if clipped or takes_x0:
                prediction = x0 if takes_x0 else process.from_x0(x0, x_t, call.level)
        learned = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type == "learned_range"
        return torch.cat([prediction, variance], dim=1) if learned else prediction

    # ------------------------------------------------------------------ files

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Write a folder of safetensors and json: model_index.json, unet/, scheduler/.

        Args:
            save_directory: the folder.
            push_to_hub: upload it too, as `push_to_hub` does; repo_id (the folder's name by default), private, token,
                commit_message and create_pr are its arguments.
            kwargs: of diffusers' `save_pretrained`.
        """
        hub = {k: kwargs.pop(k) for k in ("repo_id", "private", "token", "commit_message", "create_pr") if k in kwargs}
        if kwargs.get("variant") is not None or kwargs.get("safe_serialization") is False:
            raise InputError(
                "a pipeline is saved as safetensors without a variant: leave variant and safe_serialization out."
            )
        super().save_pretrained(save_directory, **kwargs)
        index = Path(save_directory, "model_index.json")
        values = json.loads(index.read_text(encoding="utf-8"))
        values["unet"] = ["diffusion_adagn", "AdaGNUNet"]  # the public names, wherever the files may move
        if isinstance(self.scheduler, OdeScheduler):
            values["scheduler"] = ["diffusion_adagn", "OdeScheduler"]
        index.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(**({"repo_id": Path(save_directory).name} | hub))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a diffusion_adagn pipeline",
        create_pr: bool = False,
    ) -> str:
        """Upload the pipeline and its model card to the Hugging Face hub.

        Args:
            repo_id: "owner/name"; made if it is not there.
            private: whether a new repository is private. None: the owner's default.
            token: access token. None: the one of `hf auth login`.
            commit_message: of the upload.
            create_pr: open a pull request instead of a commit.

        Returns:
            The commit's address.
        """
        from huggingface_hub import create_repo, upload_folder

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            Path(folder, "README.md").write_text(
                model_card(self, repo_id.split("/")[-1], where=repo_id), encoding="utf-8"
            )
            repo = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            return upload_folder(
                repo_id=repo, folder_path=folder, token=token, commit_message=commit_message, create_pr=create_pr
            )

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        revision: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        ema: float | str = "run",
    ) -> "ClassConditionalPipeline":
        """Load a model.

        Args:
            path: a run folder, one of its checkpoints, a pipeline folder, a hub id "owner/name", or the name of a model that
                is shipped with the package, such as "digits". An existing path takes precedence over such a name.
                "runs/x@400:0.1" is the checkpoint of step 400 with ema 0.1 (`runs.weights.Weights`).
            revision: of the hub's repository.
            torch_dtype: the weights' dtype, such as torch.bfloat16. None: float32.
            dtype: the same as torch_dtype.
            ema: which weights: the length of a power-function EMA, a fraction of the run such as 0.13 (`adagn ema RUN` compares
                lengths); "raw", unaveraged; or "run", the EMA of training.ema_decay. A pipeline folder has one of them only.

        Raises:
            InputError: for a folder that is none, a missing or surplus weight, a scheduler that is not ours, and weights that it does
                not have or that cannot be made of what it has.
        """
        dtype = torch_dtype if dtype is None else dtype
        is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        faults = {
            f"torch_dtype is a floating type such as torch.bfloat16, not {short_repr(dtype)}.": dtype is not None
            and not is_float,
            f"a model is a folder or a hub id, not {short_repr(path)}.": not isinstance(path, str | os.PathLike),
        }
        reject_first(faults)
        weights = Weights.of(path, ema)
        path, ema = weights.path, weights.ema
        if loads_checkpoint(path, ema):
            pipe = cls(**checkpoint_parts(path, ema))
            pipe = pipe if dtype is None else pipe.to(dtype)
        else:
            check_has(path, ema)
            folder = pipeline_folder(path, revision)
            with errors_as_input_error(folder):
                pipe = cls(**pipeline_parts(folder, dtype))
        pipe.run_id = run_id(recorded_config(path))
        return pipe


def to_pixels(images: np.ndarray) -> np.ndarray:
    """[N, H, W, C] in 0..1 -> uint8 of the same shape."""
    return (images * 255).round().astype("uint8")


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """[N, H, W, C] in 0..1 -> N PIL images, gray for C = 1."""
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in to_pixels(images)]


def _ratio(theirs: Level, ours: Level) -> float:
    """The guide's input over ours at the same noise level; at pure noise alpha is 0, near the image sigma is."""
    return theirs.alpha / ours.alpha if ours.alpha > ours.sigma else theirs.sigma / ours.sigma


def _latents(result: object, x: Tensor) -> Tensor:
    """The latents in what a callback returned, in the shape and type of x; x itself if there are none."""
    if result is None:
        return x
    latents = result.get("latents", x) if isinstance(result, dict) else None
    if not isinstance(latents, Tensor) or latents.shape != x.shape:
        found = list(latents.shape) if isinstance(latents, Tensor) else short_repr(result)
        raise InputError(f"callback_on_step_end returns None or a dict with latents {list(x.shape)}, not {found}.")
    return latents.to(x)


def _denoise(unet: AdaGNUNet) -> Callable[[Tensor, Any], Tensor]:
    """`unet.denoise`, compiled where the network is: torch.compile affects only forward, which a call does not run."""
    if hasattr(unet, "dynamo_ctx"):  # what torch.compile(unet) returns, with its options
        return unet.dynamo_ctx(unet._orig_mod.denoise)
    return unet.denoise if unet.compiled_denoise is None else partial(unet.compiled_denoise, unet)


def _check_latents(latents: Tensor | None, shape: tuple[int, int, int]) -> Tensor | None:
    """The latents, unchanged. Raises InputError unless they are finite numbers [N, *shape]."""
    if latents is None:
        return None
    is_tensor = isinstance(latents, Tensor)
    finite = not is_tensor or bool(latents.isfinite().all())
    if not is_tensor or latents.shape[1:] != shape or not len(latents) or not latents.is_floating_point() or not finite:
        found = (
            f"{list(latents.shape)} {latents.dtype}{' with NaN or infinity' * (not finite)}"
            if is_tensor
            else short_repr(latents)
        )
        raise InputError(
            f"latents are initial noise of unit variance, a float tensor [N, {', '.join(map(str, shape))}], not {found}."
        )
    return latents


def _noise(shape: tuple[int, int, int], generators: Sequence[torch.Generator]) -> Tensor:
    """Unit normal noise, [N, C, H, W], image i from generator i, on the generators' device."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def _seed_of(generator: torch.Generator) -> int | None:
    """The seed of a generator that was not used yet, else None."""
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed)
    return seed if torch.equal(fresh.get_state(), generator.get_state()) else None


def _pair(
    plans: list[ClassPlan],
    seeds: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: Tensor | None = None,
) -> tuple[list[ClassPlan], list[int | None], list[torch.Generator]]:
    """One class (or plan), one seed and one generator per image."""
    plans = plans if latents is None else _one_each(plans, latents, "latents")
    if generator is not None and not isinstance(generator, torch.Generator):
        generators = list(generator) if isinstance(generator, Sequence) else [generator]
        if not all(isinstance(g, torch.Generator) for g in generators):
            raise InputError(f"generator is a torch.Generator, or one per image, not {short_repr(generator)}.")
        first = [all(g is not earlier for earlier in generators[:i]) for i, g in enumerate(generators)]
        known_seeds = [_seed_of(g) if alone else None for g, alone in zip(generators, first)]
        return _one_each(plans, generators, "generators"), known_seeds, generators
    if seeds is None:
        device = "cpu" if generator is None else generator.device
        seeds = torch.randint(0, 2**31, (len(plans),), generator=generator, device=device).tolist()
    elif isinstance(seeds, Integral):
        seeds = [int(seeds) + i for i in range(len(plans))]
    try:
        seeds = [operator.index(s) for s in (seeds.reshape(-1).tolist() if hasattr(seeds, "reshape") else seeds)]
        valid = all(0 <= s <= MAX_SEED for s in seeds)
    except TypeError:
        valid = False
    if not valid:
        raise InputError(f"seeds are whole numbers from 0 to {MAX_SEED}, not {short_repr(seeds)}.")
    return _one_each(plans, seeds, "seeds"), seeds, [torch.Generator().manual_seed(seed) for seed in seeds]


def _one_each(plans: list[ClassPlan], values: Sequence, what: str) -> list[ClassPlan]:
    """The plans, one for each of the values; a single plan is repeated."""
    plans = plans * len(values) if len(plans) == 1 else plans
    if len(plans) != len(values) or not plans:
        raise InputError(f"{len(values)} {what} for {len(plans)} images were given: give one per image, or one.")
    return plans
