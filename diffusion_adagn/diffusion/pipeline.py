"""ClassConditionalPipeline: classes and seeds -> pictures."""

import copy
import inspect
import json
import math
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..commands import command, then
from ..config import DiffusionConfig, NetworkConfig, apply, read_json, said
from ..errors import InputError, reading
from ..labels import ClassSpec, LabelSpace
from ..models.cost import check_size
from ..models.unet import AdaGNUNet
from ..run import pipeline_folder
from .guidance import Guidance
from .mixing import ClassPlan, Mix, teller
from .objective import from_x0, to_x0
from .schedule import (
    PREDICTIONS,
    SAMPLERS,
    Call,
    network_calls,
    sampler_name,
    set_steps,
    signal_and_noise,
    with_sampler,
)

MOST_SEED = 2**63 - 1
UNGUIDED = Guidance()
KIND_OF = {theirs: ours for ours, theirs in PREDICTIONS.items()}
SPACINGS = ("leading", "trailing", "linspace")


@dataclass
class ImagesOutput(BaseOutput):
    """images: N PIL pictures, a float tensor [N, C, H, W] or an array [N, H, W, C], in 0..1; the others: one a picture.

    class_ids: None for a picture that is not of one plain class; class_names then say what it was told.
    """

    images: list[Image.Image] | Tensor | np.ndarray
    class_ids: list[int | None]
    seeds: list[int]
    class_names: list[str]


class Watch(Protocol):
    """Looks on while pictures are sampled."""

    def guided(self, call: Call, cond: Tensor, against: Tensor) -> None:
        """The two predictions that guidance combines, [N, C, H, W]; not called where guidance is off."""

    def predicted(self, call: Call, x0: Tensor) -> None:
        """The x0 that is meant, guided and not yet clipped, [N, C, H, W]."""


StepCallback = Callable[["ClassConditionalPipeline", int, Tensor, dict[str, Any]], dict[str, Any] | None]


class ClassConditionalPipeline(DiffusionPipeline):
    """A trained network with its classes, its noise schedule and its sampler.

        pipe = ClassConditionalPipeline.from_pretrained("runs/digits")
        pipe(["cat", "dog"], guidance_scale=2.0, seeds=[0, 1]).images

    Calls may run side by side in several threads: each steps a scheduler of its own, and the one in `scheduler` is not changed.

    labels: the classes (a LabelSpace or its dict; None: named by their ids). clip_x0: clip the predicted x0 to [-1, 1], after guidance.
    ema_decay (None for raw weights), trained_steps and guidance_convention are kept for the record.
    """

    def __init__(
        self,
        unet: AdaGNUNet,
        scheduler: SchedulerMixin,
        labels: LabelSpace | dict | None = None,
        clip_x0: bool = True,
        ema_decay: float | None = None,
        trained_steps: int | None = None,
        guidance_convention: str = "pred = null + scale * (cond - null); scale 1 is no guidance",
    ):
        super().__init__()
        expected = unet.config.num_classes or 0
        if labels is None:
            labels = LabelSpace(tuple(map(str, range(expected))), has_null=unet.config.null_class or not expected)
        labels = labels if isinstance(labels, LabelSpace) else LabelSpace.from_dict(labels)
        if expected != labels.K:
            raise InputError(f"the network has {expected} classes, the label space {labels.K}: they must be the same.")
        if expected and labels.has_null != unet.config.null_class:
            raise InputError(
                f"the label space says has_null: {labels.has_null}, the network null_class: {unet.config.null_class}."
            )
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            labels=labels.to_dict(),
            clip_x0=clip_x0,
            ema_decay=ema_decay,
            trained_steps=trained_steps,
            guidance_convention=guidance_convention,
        )

    @property
    def labels(self) -> LabelSpace:
        return LabelSpace.from_dict(self.config.labels)

    def use_sampler(self, sampler: str | None = None, spacing: str | None = None) -> "ClassConditionalPipeline":
        """Make another sampler or timestep spacing the default of later calls; the process stays the same.

        Args:
            sampler: "ddpm", "ddim", "dpm++", "unipc", "euler" or "heun". None: the present one.
            spacing: "leading", "trailing" or "linspace". None: the present one.

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
        """A scheduler for one call alone: schedulers count their steps, and calls may run side by side."""
        if sampler is None and spacing is None:
            return copy.deepcopy(self.scheduler)  # whatever the user put there, such as Karras sigmas
        return with_sampler(self.scheduler, sampler, spacing, self.unet.config.learned_variance)

    def check_guidance(self, guidance: Guidance) -> None:
        """Raises InputError, with the remedy, if there is nothing to guide against: no null class, or a guide that does not fit."""
        if guidance.guide is not None:
            self._check_guide(guidance.guide)
        elif not guidance.off and (self.labels.null_id is None or not self.labels.K):
            raise InputError(
                "this model has no null class to be guided against: sample at guidance scale 1, guide it against another network "
                "(--guide RUN: an earlier checkpoint, or one without classes), or fine-tune it with a null row (adagn train with --init_from)."
            )

    def _check_guide(self, guide: "ClassConditionalPipeline") -> None:
        """Raises InputError unless `guide` answers the same question: same pictures, noise schedule, and classes (or none)."""
        ours, theirs = self.unet.config, guide.unet.config
        for name, what in (("in_channels", "channels"), ("sample_size", "pixels a side")):
            if ours[name] != theirs[name]:
                raise InputError(
                    f"the guide's pictures have {theirs[name]} {what}, the model's {ours[name]}: give another."
                )
        a, b = self.scheduler.alphas_cumprod, guide.scheduler.alphas_cumprod
        if a.shape != b.shape or not torch.allclose(a.cpu(), b.cpu(), atol=1e-5):
            raise InputError("the guide was trained on another noise schedule: give one with the model's own.")
        if guide.labels.K and guide.labels.names != self.labels.names:
            raise InputError(
                f"the guide knows other classes ({', '.join(guide.labels.names[:4])}, ...) than the model "
                f"({', '.join(self.labels.names[:4])}, ...): give one with the same classes, or with none."
            )

    def told_to(self, guide: "ClassConditionalPipeline", plans: list[ClassPlan]) -> list[ClassPlan]:
        """What a guide is told in place of the plans: the same; or any class, where it hears none, in place of mixes."""
        if guide.unet.embedding.classes is not None:
            return plans
        return [p if p.class_id is not None else Mix.everywhere(0, self.labels) for p in plans]

    def check_eta(self, eta: float, sampler: str | None = None) -> None:
        """Raises InputError unless eta is a number of at least 0, and 0 for samplers other than ddim. sampler: None for the pipeline's."""
        if not (math.isfinite(eta) and eta >= 0):
            raise InputError(f"eta is a number of at least 0 (0: no noise, 1: as much as ddpm), not {eta}.")
        sampler = sampler or sampler_name(self.scheduler)
        if eta and sampler != "ddim":
            raise InputError(f"eta is a setting of ddim; the sampler is {sampler}.")

    def mix(self, text: str) -> Mix:
        """Who is told which class where and when, as `diffusion.mixing.Mix` reads it: "cat@coarse,dog@fine"."""
        return Mix.parse(text, self.labels, self.unet.sites(), self.scheduler.config.num_train_timesteps)

    # ------------------------------------------------------------------ sampling

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
        told: "str | ClassPlan | Sequence[str | ClassPlan] | None" = None,
        guidance: Guidance | None = None,
        watch: Watch | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagesOutput | tuple:
        """Sample one picture for each class given (or one class for each seed given).

        classes: as LabelSpace.parse takes them: "cat", 3, ["cat", 3], "all", "null"; None: all (null without classes).
        guidance_scale: one, or one a picture; 1 (the default) is no guidance, and then there is no second pass.
        seeds: one a picture, or one number s for s, s + 1, ...; None draws fresh ones, which the output tells.
          A picture depends on (model, class, its own seed, settings), not on its batch, within 1e-5 in fp32.
        eta: ddim's noise, 0 none, 1 as much as ddpm. output_type: "pil" | "pt" | "np".
        told: in place of classes, pictures of several classes: "cat@coarse,dog@fine" (see `mixing.Mix`), a ClassPlan such as
          `mixing.Between`, or one a picture. Guidance is against null as ever.
        guidance: in place of guidance_scale, with an interval, a schedule, another network to guide against: see `Guidance`.
        watch: looks on (see `Watch`).
        sampler, spacing: for this call alone, as `use_sampler` takes them; None: the pipeline's own.
        callback_on_step_end: called as diffusers does, `callback(pipe, index, timestep, {"latents": x})`, after each network call of
          the sampler (heun makes two a step); x: the noisy images, [N, C, H, W] float32. A dict that it returns may hold other latents to go on from. To stop early, raise an
          exception: `pipe._interrupt` is not looked at, since calls may run side by side.
        callback_on_step_end_tensor_inputs: which tensors it receives: ("latents",) or ().
        Raises InputError for unknown classes, guidance without a null class, and grids that cannot be walked.
        """
        plans, seeds = _pair(self._plans(classes, told), seeds)
        count = len(plans)
        if guidance is not None and guidance_scale is not None:
            raise InputError("guidance_scale and guidance were given: give one of them.")
        if not isinstance(guidance, Guidance | None):
            raise InputError(f"guidance is a Guidance object, not {guidance!r}; guidance_scale takes numbers.")
        guidance = guidance or (UNGUIDED if guidance_scale is None else Guidance(guidance_scale))
        guidance.scales(count)
        self.check_guidance(guidance)
        if output_type not in ("pil", "pt", "np"):
            raise InputError(f"output_type is pil, pt or np, not {output_type!r}.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise InputError(
                f"callback_on_step_end is called at each step; {said(callback_on_step_end)} cannot be called."
            )
        # a PipelineCallback of diffusers names its tensors itself
        inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        if unknown := set(inputs) - {"latents"}:
            raise InputError(f"a callback may receive 'latents' alone, not {said(min(unknown))}.")
        scheduler = self._scheduler(sampler, spacing)
        self.check_eta(eta, sampler_name(scheduler))

        device = self._execution_device
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        extra = {"generator": generators} if sampler_name(scheduler) in ("ddpm", "ddim") else {}
        extra |= {"eta": eta} if eta else {}

        timesteps = set_steps(scheduler, num_inference_steps)
        predict = self._predictor(plans, scheduler, guidance, watch)
        config = self.unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        x = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
        x = x * scheduler.init_noise_sigma
        with self.progress_bar(total=len(timesteps)) as bar:
            for t, call in zip(timesteps, network_calls(scheduler)):
                x_t = scheduler.scale_model_input(x, t)
                prediction = predict(x_t, call)
                prediction = self._clip(
                    prediction, x_t, t, scheduler, guidance, watch and partial(watch.predicted, call)
                )
                x = scheduler.step(prediction, t, x, return_dict=False, **extra)[0]
                if callback_on_step_end is not None:
                    result = callback_on_step_end(self, call.index, t, {"latents": x} if inputs else {})
                    x = _latents(result, x)
                bar.update()

        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().float().numpy()
        if output_type == "pil":
            images = to_pil(images)
        names, class_ids = [p.name for p in plans], [p.class_id for p in plans]
        return ImagesOutput(images, class_ids, seeds, names) if return_dict else (images,)

    def _plans(
        self, classes: ClassSpec | None, told: "str | ClassPlan | Sequence[str | ClassPlan] | None"
    ) -> list[ClassPlan]:
        labels = self.labels
        if told is None:
            ids = labels.parse(("all" if labels.K else "null") if classes is None else classes)
            return [Mix.everywhere(i, labels) for i in ids]
        if classes is not None:
            raise InputError("classes and told were given: give one of them.")
        told = [told] if isinstance(told, str | ClassPlan) or not isinstance(told, Sequence) else told
        for plan in told:
            if not isinstance(plan, str | ClassPlan):
                raise InputError(f"told is a text such as 'cat@coarse,dog@fine' or a ClassPlan, not {plan!r}.")
        return [self.mix(plan) if isinstance(plan, str) else plan for plan in told]

    def _predictor(
        self, plans: list[ClassPlan], scheduler: SchedulerMixin, guidance: Guidance, watch: Watch | None = None
    ) -> Callable[[Tensor, Call], Tensor]:
        """(x_t [N, C, H, W], the call) -> the guided prediction, [N, C or 2C, H, W], float32; one pass where guidance is off.

        scheduler: the call's own, its timesteps set.
        """
        one = self._one_pass(plans, scheduler.timesteps)
        if guidance.off:
            return one
        both = self._two_passes(plans, scheduler, guidance.guide)
        scales = guidance.scales(len(plans)).to(self._execution_device)

        def predict(x: Tensor, call: Call) -> Tensor:
            strength = guidance.strength(call)
            if not strength:
                return one(x, call)
            # every mean channel is guided; a learned variance behind them is the conditional pass's
            prediction, against = both(x, call)
            cond, variance = prediction.split([x.shape[1], prediction.shape[1] - x.shape[1]], dim=1)
            if watch is not None:
                watch.guided(call, cond, against)
            return torch.cat([guidance.combine(cond, against, scales, strength), variance], dim=1)

        return predict

    def _one_pass(self, plans: list[ClassPlan], timesteps: Tensor) -> Callable[[Tensor, Call], Tensor]:
        """(x_t [N, C, H, W], the call) -> the network's answer, float32."""
        tell, dtype = teller(self.unet, plans, timesteps), self.unet.dtype
        return lambda x, call: self.unet.denoise(x.to(dtype), tell(call.index)).float()

    def _two_passes(
        self, plans: list[ClassPlan], scheduler: SchedulerMixin, guide: "ClassConditionalPipeline | None"
    ) -> Callable[[Tensor, Call], tuple[Tensor, Tensor]]:
        """(x_t, the call) -> the network's answer, and the one that is guided against, its C mean channels alone."""
        timesteps = scheduler.timesteps
        if guide is None:
            nulls = [Mix.everywhere(self.labels.null_id, self.labels)] * len(plans)
            together = self._one_pass([*plans, *nulls], timesteps)

            def null_pass(x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
                cond, null = together(torch.cat([x, x]), call).chunk(2)
                return cond, null[:, : x.shape[1]]

            return null_pass

        guide.unet.to(self._execution_device)
        cond, weak = self._one_pass(plans, timesteps), guide._one_pass(self.told_to(guide, plans), timesteps)
        ours, theirs = (KIND_OF[p.scheduler.config.prediction_type] for p in (self, guide))

        def guide_pass(x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
            against = weak(x, call)[:, : x.shape[1]]
            if ours != theirs:
                alpha, sigma = signal_and_noise(scheduler, timesteps[call.index])
                against = from_x0(to_x0(against, x, alpha, sigma, theirs), x, alpha, sigma, ours)
            return cond(x, call), against

        return guide_pass

    def _clip(
        self,
        prediction: Tensor,
        x_t: Tensor,
        t: Tensor,
        scheduler: SchedulerMixin,
        guidance: Guidance = UNGUIDED,
        see: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Clip the x0 that is meant, then say it again as eps or v, so that every sampler steps by what was clipped.

        Only ddpm is handed a learned variance.
        """
        prediction, variance = prediction.split([x_t.shape[1], prediction.shape[1] - x_t.shape[1]], dim=1)
        limited = self.config.clip_x0 or guidance.threshold is not None
        if limited or see is not None:
            kind = KIND_OF[scheduler.config.prediction_type]
            alpha, sigma = signal_and_noise(scheduler, t)
            x0 = to_x0(prediction, x_t, alpha, sigma, kind)
            if see is not None:
                see(x0)
        if limited:
            x0 = x0.clamp(-1, 1) if guidance.threshold is None else guidance.limit(x0)
            prediction = from_x0(x0, x_t, alpha, sigma, kind)
        learned = scheduler.config.get("variance_type") == "learned_range"
        return torch.cat([prediction, variance], dim=1) if learned else prediction

    # ------------------------------------------------------------------ files

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """A folder of safetensors and json: model_index.json, unet/, scheduler/."""
        super().save_pretrained(save_directory, **kwargs)
        index = Path(save_directory, "model_index.json")
        values = json.loads(index.read_text(encoding="utf-8"))
        values["unet"] = ["diffusion_adagn", "AdaGNUNet"]  # the public name, wherever the file may move
        index.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, revision: str | None = None, torch_dtype: torch.dtype | None = None
    ) -> "ClassConditionalPipeline":
        """Load a pipeline folder, a run folder or a hub id "owner/name".

        Raises InputError for a folder that is none, a missing or surplus weight, and a scheduler that is not ours.
        """
        folder = pipeline_folder(path, revision)
        with reading(folder):
            return cls._load(folder, torch_dtype)

    @classmethod
    def _load(cls, folder: Path, torch_dtype: torch.dtype | None) -> "ClassConditionalPipeline":
        index = read_json(folder / "model_index.json")
        known = {s.__name__: s for s in SAMPLERS.values()}
        scheduler_class = known.get((index.get("scheduler") or ["", ""])[1])
        if index.get("unet") == ["diffusers", "UNet2DModel"]:
            raise InputError(
                then(f"{folder} holds a stock UNet2DModel. Import it first:", command("import-diffusers", folder))
            )
        if "labels" not in index or scheduler_class is None:
            raise InputError(
                f"{folder} was not written by this package (labels or scheduler are missing in model_index.json)."
            )
        try:
            labels = LabelSpace.from_dict(index["labels"])
        except InputError as error:
            raise InputError(f"{folder / 'model_index.json'}: {error}") from None
        options = {k: index[k] for k in OPTIONS if k in index}
        wrong = [k for k, value in options.items() if type(value) not in OPTIONS[k]]
        if wrong:
            raise InputError(f"{folder / 'model_index.json'}: {wrong[0]} cannot be {said(options[wrong[0]])}.")
        return cls(
            unet=load_unet(folder / "unet", torch_dtype),
            scheduler=load_scheduler(folder / "scheduler", scheduler_class),
            labels=labels,
            **options,
        )


OPTIONS = {  # of model_index.json, and their types
    "clip_x0": (bool,),
    "ema_decay": (float, int, type(None)),
    "trained_steps": (int, type(None)),
    "guidance_convention": (str,),
}
WEIGHTS = "diffusion_pytorch_model"  # as diffusers names them; large ones are cut into WEIGHTS-00001-of-00002 and so on


def load_unet(folder: Path, torch_dtype: torch.dtype | None = None) -> AdaGNUNet:
    """An AdaGNUNet from its folder, in eval mode. Raises InputError for a config.json that is not its, and weights that do not fit."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no network (no config.json).")
    values = {k: v for k, v in read_json(folder / "config.json").items() if not k.startswith("_")}
    network = NetworkConfig()
    apply(network, values, where=f"in {folder / 'config.json'}")
    try:
        check_size(vars(network))
        with torch.device("meta"):
            unet = AdaGNUNet(**values)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None
    fill(unet, folder)
    return (unet if torch_dtype is None else unet.to(torch_dtype)).eval()


def fill(model: nn.Module, folder: Path) -> None:
    """Give a model on the meta device the weights of its folder. Raises InputError, before memory is taken, if they do not fit."""
    whole = folder / f"{WEIGHTS}.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{WEIGHTS}-*-of-*.safetensors"))
    if not files:
        raise InputError(
            f"{folder} cannot be loaded (safetensors only): it holds no {whole.name}; pickled weights are not read."
        )
    check_fits(model, files, f"{folder} cannot be loaded: the weights do not fit its config.json")
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    model.to_empty(device="cpu").load_state_dict(state)


def check_fits(model: nn.Module, files: Sequence[Path], wrong: str) -> None:
    """Raises InputError, which begins with `wrong`, unless the files hold the model's weights; only their headers are read."""
    found: dict[str, list[int]] = {}
    for file in files:
        try:
            if not file.is_file():
                raise FileNotFoundError("it is missing")
            with safe_open(file, "pt") as weights:
                found |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 - no dict
        except Exception as error:  # safetensors raises its own kinds
            raise InputError(f"{file} cannot be read as safetensors: {' '.join(str(error).split())[:300]}") from None
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    faults = {
        "size mismatch": [f"{n} {found[n]} for {s}" for n, s in wanted.items() if n in found and found[n] != s],
        "missing keys": [name for name in wanted if name not in found],
        "unexpected keys": [said(name) for name in found if name not in wanted],
    }
    told = [f"{what}: {', '.join(some[:4])}{', ...' * (len(some) > 4)}" for what, some in faults.items() if some]
    if told:
        raise InputError(f"{wrong} ({'; '.join(told)}).")


def load_scheduler(folder: Path, kind: type[SchedulerMixin]) -> SchedulerMixin:
    """A scheduler of this class from its folder. Raises InputError for settings that cannot be, or that make no process."""
    file = folder / "scheduler_config.json"
    config = read_json(file)
    apply(DiffusionConfig(), {k: v for k, v in config.items() if k == "num_train_timesteps"}, where=f"in {file}")
    defaults = {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}
    for name, value in config.items():
        default = defaults.get(name)
        kinds = (int, float) if type(default) is float else (type(default),)
        vast = type(value) is int and abs(value) > 10**6
        if default is not None and value is not None and (vast or type(value) not in kinds):
            raise InputError(f"{name}: {said(value)} cannot be, where {default!r} is usual (in {file}).")
    for name, expected in (("prediction_type", PREDICTIONS.values()), ("timestep_spacing", SPACINGS)):
        if config.get(name, defaults[name]) not in expected:
            raise InputError(f"{name} {said(config[name])} is not one of {', '.join(expected)} (in {file}).")
    try:
        scheduler = kind.from_config(config)
        betas, alphas = scheduler.betas, scheduler.alphas_cumprod
        sound = alphas.shape == (scheduler.config.num_train_timesteps,) and bool(
            ((betas >= 0) & (betas <= 1)).all() and alphas.isfinite().all()
        )
    except Exception as error:  # diffusers does not look at what it is given
        raise InputError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if not sound:
        raise InputError(
            f"the betas in {file} are no noise schedule: expected one between 0 and 1 for each of the timesteps."
        )
    return scheduler


def to_pixels(images: np.ndarray) -> np.ndarray:
    """[N, H, W, C] in 0..1 -> uint8 of the same shape."""
    return (images * 255).round().astype("uint8")


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """[N, H, W, C] in 0..1 -> N pictures, gray for C = 1."""
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in to_pixels(images)]


def _latents(result: object, x: Tensor) -> Tensor:
    """The latents in what a callback returned, in the shape and type of x; x itself if there are none."""
    if result is None:
        return x
    latents = result.get("latents", x) if isinstance(result, dict) else None
    if not isinstance(latents, Tensor) or latents.shape != x.shape:
        found = list(latents.shape) if isinstance(latents, Tensor) else said(result)
        raise InputError(f"callback_on_step_end returns None or a dict with latents {list(x.shape)}, not {found}.")
    return latents.to(x)


def _pair(plans: list[ClassPlan], seeds: int | Sequence[int] | None) -> tuple[list[ClassPlan], list[int]]:
    """One class (or plan) and one seed a picture."""
    if seeds is None:
        seeds = torch.randint(0, 2**31, (len(plans),)).tolist()
    elif isinstance(seeds, Integral):
        seeds = [int(seeds) + i for i in range(len(plans))]
    else:
        try:
            seeds = [operator.index(s) for s in (seeds.reshape(-1).tolist() if hasattr(seeds, "reshape") else seeds)]
        except TypeError:
            raise InputError(f"seeds are whole numbers, not {seeds!r}.") from None
    if len(plans) == 1:
        plans = plans * len(seeds)
    if len(plans) != len(seeds) or not seeds:
        raise InputError(
            f"{len(plans)} classes and {len(seeds)} seeds were given: give one seed for each picture, or one in all."
        )
    if min(seeds) < 0 or max(seeds) > MOST_SEED:
        raise InputError(
            f"a seed is a whole number from 0 to {MOST_SEED}, not {min(seeds) if min(seeds) < 0 else max(seeds)}."
        )
    return plans, seeds
