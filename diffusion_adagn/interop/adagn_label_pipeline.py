# SPDX-License-Identifier: Apache-2.0
"""LabelPipeline: images from class names and seeds; it needs only diffusers.

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)  # runs this file in FOLDER
    pipe(["cat", 3, "null"], guidance_scale=2.0, seeds=0).images

This file is distributed with the weights: it imports only torch, numpy, PIL and diffusers, and `save_pretrained` copies
it. Another sampler for one call:

    pipe("cat", sampler="dpm++", spacing="karras", num_inference_steps=10)

Another stock scheduler, of the same process:

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
"""

import copy
import difflib
import inspect
import itertools
import json
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

SAMPLERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
}
NOISE_GRIDS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "lu": "use_exponential_sigmas"}
SPACINGS = ("leading", "trailing", "linspace", *NOISE_GRIDS)
MAX_SIGMA = 80.0  # of a grid over noise levels; the cosine schedule ends at 20,000

# Of EDM and of flow matching: an ODE in the noise level s, where x = x0 + s noise, or in the time t = s / (1 + s), where
# x = (1 - t) x0 + t noise.
ODE_SAMPLERS = {
    "edm": {"dpm++": EDMDPMSolverMultistepScheduler, "euler": EDMEulerScheduler},
    "flow": {
        "heun": FlowMatchHeunDiscreteScheduler,
        "euler": FlowMatchEulerDiscreteScheduler,
        "dpm++": DPMSolverMultistepScheduler,
        "unipc": UniPCMultistepScheduler,
    },
}
ODE_SPACINGS = {"edm": ("karras", "exponential"), "flow": ("linear", "shifted", "karras", "exponential")}
SHIFT = 3.0  # of spacing shifted
MAX_ODE_STEPS = 10_000


@dataclass
class LabelPipelineOutput(ImagePipelineOutput):
    """images: as in ImagePipelineOutput. seeds: one per image (None for a generator that was used before)."""

    seeds: list[int | None] | None = None


class LabelPipeline(DiffusionPipeline):
    """A class-conditional UNet2DModel with its class names.

    `save_pretrained` saves all arguments. diffusers copies this file to one flat folder for all models at every load:
    after another version of the file was loaded, saving writes that version.

    Args:
        unet: The network, conditioned on class labels.
        scheduler: A stock scheduler.
        id2label: {"0": name, ...}; a name may contain synonyms, separated by commas; {} for a network without classes.
        null_id: The label that means "no class"; None: there is none, and so no guidance.
        clip_x0: Clip x0 to [-1, 1].
        sample_defaults: num_inference_steps and guidance_scale of a call that gives none.
        guidance_convention: A note on the meaning of guidance_scale.
        record: Where the weights come from.
        process: None for a DDPM's. Else "name" (edm or flow), "sigma_data" (of edm), and the noise levels of a call:
            "spacing", "sigma_min", "sigma_max", "rho". Under edm the levels are those of the scheduler's config.
        patch_size: Side p of the patches whose pixels are the network's channels: it receives pixel_unshuffle(images, p),
            [N, C p^2, H / p, W / p], and pixel_shuffle of its output is the prediction. 1: it receives images.
    """

    model_cpu_offload_seq = "unet"
    _interrupt = False

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        null_id: int | None = None,
        clip_x0: bool = True,
        sample_defaults: dict | None = None,
        guidance_convention: str = "pred = null + scale * (cond - null); scale 1 is no guidance",
        record: dict | None = None,
        process: dict | None = None,
        patch_size: int = 1,
    ):
        super().__init__()
        if patch_size < 1 or unet.config.in_channels % patch_size**2 or unet.config.out_channels % patch_size**2:
            raise ValueError(
                f"a network of {unet.config.in_channels} input and {unet.config.out_channels} output channels has no patches "
                f"of {patch_size}x{patch_size} pixels: both must be multiples of patch_size^2."
            )
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            id2label={str(i): name for i, name in (id2label or {}).items()},
            null_id=null_id,
            clip_x0=clip_x0,
            sample_defaults=sample_defaults or {"num_inference_steps": 50, "guidance_scale": 1.0},
            guidance_convention=guidance_convention,
            record=record or {},
            process=process,
            patch_size=patch_size,
        )

    @property
    def labels(self) -> dict[int, str]:
        """{class id: name}."""
        return dict(sorted((int(i), name) for i, name in self.config.id2label.items()))  # JSON sorts "10" before "2"

    def get_label_ids(self, classes) -> list[int | None]:
        """Class ids of the given classes.

        Args:
            classes: A name, one of its synonyms, an id, "null", "all", or a list of these. None: all. A string is one
                name.

        Returns:
            One id per class; None for "null" of a network without classes.

        Raises:
            ValueError: For an unknown or ambiguous class.
        """
        names = self.labels
        if classes is None:
            classes = "all" if names else "null"
        classes = classes.tolist() if hasattr(classes, "tolist") else classes
        is_single = isinstance(classes, str | bytes) or not isinstance(classes, Iterable)
        ids = []
        for label in [classes] if is_single else classes:
            is_all = isinstance(label, str) and label == "all" and names and "all" not in names.values()
            ids += list(names) if is_all else [self._label_id(label, names)]
        return ids

    def _label_id(self, label, names: dict[int, str]) -> int | None:
        null_id = self.config.null_id
        known = f"Classes are 0..{len(names) - 1}" if names else "There are no classes: give 'null'"
        known += f", and {null_id} or 'null'." if null_id is not None else "."
        if not isinstance(label, str):
            try:
                index = None if isinstance(label, bool) else operator.index(label)
            except TypeError:
                index = None
            if index is None or (index not in names and index != null_id):
                raise ValueError(f"{label!r} is not a class. {known}")
            return index
        spelling = ", ".join(" ".join(word.split()) for word in label.split(","))
        folded = spelling.casefold()
        spelled = {i: (name.casefold(), *name.casefold().split(", ")) for i, name in names.items()}
        matches = [i for i, name in names.items() if name == spelling] or [
            i for i, names_of in spelled.items() if folded in names_of
        ]
        if len(matches) > 1:
            raise ValueError(f"{label!r} is ambiguous. Give an id: {', '.join(map(str, matches))}.")
        if matches:
            return matches[0]
        if spelling == "null" and (null_id is not None or not names):
            return null_id
        words = {word.casefold(): word for name in names.values() for word in (name, *name.split(", "))}
        nearest = ", ".join(repr(words[word]) for word in difflib.get_close_matches(folded, words, n=3, cutoff=0.5))
        raise ValueError(f"there is no class {label!r}. " + (f"Nearest: {nearest}. " if nearest else "") + known)

    @torch.no_grad()
    def __call__(
        self,
        classes=None,
        guidance_scale=None,
        num_inference_steps: int | None = None,
        seeds=None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        sampler: str | None = None,
        spacing: str | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Iterable[str] = ("latents",),
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        num_images_per_class: int = 1,
        class_labels=None,
        num_images_per_prompt: int | None = None,
    ) -> LabelPipelineOutput | tuple:
        """Sample one image per class, or per seed, generator or latent if one class is given.

        Args:
            classes: See `get_label_ids`.
            guidance_scale: One number, or one per image; 1 is no guidance and needs no second pass. None: the default.
            num_inference_steps: Sampling steps. None: the default.
            seeds: One per image, or one number s for s, s + 1, ...; None: random ones. The noise is drawn on the CPU.
            eta: DDIM's noise, 0..1.
            output_type: "pil", "pt" [N, C, H, W] or "np" (also "numpy") [N, H, W, C]; arrays are in 0..1.
            return_dict: Return a `LabelPipelineOutput`, else a tuple.
            sampler: ddpm, ddim, dpm++, unipc, euler or heun; under edm dpm++ or euler, under flow dpm++, unipc, euler or
                heun. None: `scheduler`.
            spacing: leading, trailing, linspace; for samplers that step between timesteps also karras, exponential, lu
                (the same as exponential). Under edm karras or exponential, under flow these, linear and shifted. None:
                the scheduler's.
            callback_on_step_end: `callback(pipe, index, timestep, {"latents": x})`, called after each network call.
                pipe is a view of this call; `pipe._interrupt = True` ends the call. A returned dict may contain other
                latents.
            callback_on_step_end_tensor_inputs: Names of the callback's tensors; only "latents" exists.
            generator: Instead of seeds: a list of one per image, or one that draws one seed per image.
            latents: Initial noise of unit variance, [N, C, H, W].
            num_images_per_class: Images of each class.
            class_labels: The same as classes.
            num_images_per_prompt: The same as num_images_per_class.

        Returns:
            The images and their seeds.

        Raises:
            ValueError: For invalid or contradictory arguments.
        """
        if classes is not None and class_labels is not None:
            raise ValueError("classes and class_labels are the same argument: give one of them.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"callback_on_step_end {callback_on_step_end!r} cannot be called.")
        if num_images_per_prompt is not None and num_images_per_class != 1:
            raise ValueError("num_images_per_class and num_images_per_prompt are the same argument: give one of them.")
        per_class = num_images_per_class if num_images_per_prompt is None else num_images_per_prompt
        if isinstance(per_class, bool) or not isinstance(per_class, int) or per_class < 1:
            raise ValueError(f"num_images_per_class must be a whole number of at least 1, not {per_class!r}.")
        ids = [i for i in self.get_label_ids(class_labels if classes is None else classes) for _ in range(per_class)]
        config, patch = self.unet.config, self.config.patch_size
        shape = (config.in_channels // patch**2, config.sample_size * patch, config.sample_size * patch)
        if latents is not None:
            if (
                not isinstance(latents, torch.Tensor)
                or tuple(latents.shape[1:]) != shape
                or not latents.isfinite().all()
            ):
                raise ValueError(f"latents must be a tensor [N, {', '.join(map(str, shape))}] of finite numbers.")
            ids = ids * len(latents) if len(ids) == 1 else ids
        has_noise_source = seeds is not None or generator is not None
        ids, seeds, generators = _match_lengths(ids, seeds, generator)
        seeds = seeds if has_noise_source or latents is None else [None] * len(seeds)
        if latents is not None and len(latents) != len(ids):
            raise ValueError(f"{len(latents)} latents for {len(ids)} images: give one per image.")
        defaults = self.config.sample_defaults
        scales = _scales(defaults["guidance_scale"] if guidance_scale is None else guidance_scale, len(ids))
        guided = bool((scales != 1).any())
        if guided and self.config.null_id is None:
            fixed = self.config.record.get("scale")
            why = "has no null class to guide against"
            why = why if fixed is None else f"has guidance scale {fixed:g} in its weights"
            raise ValueError(f"this model {why}: only guidance_scale=1 is possible.")
        scheduler = self._copy_scheduler(sampler, spacing)
        heun = HeunDiscreteScheduler | FlowMatchHeunDiscreteScheduler
        if hasattr(scheduler, "state_in_first_order") and not isinstance(scheduler, heun):
            raise ValueError(f"{type(scheduler).__name__} calls the network between its timesteps: use another one.")
        if output_type not in ("pil", "pt", "np", "numpy"):
            raise ValueError(f"output_type must be pil, pt or np, not {output_type!r}.")
        inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        if set(inputs) - {"latents"}:
            raise ValueError(f"a callback may only receive 'latents', not {', '.join(map(repr, inputs))}.")
        accepted = inspect.signature(scheduler.step).parameters
        if eta and "eta" not in accepted:
            raise ValueError(f"{type(scheduler).__name__} has no eta; DDIMScheduler has.")
        extra = {k: v for k, v in {"generator": generators, "eta": eta}.items() if k in accepted}

        device = self._execution_device
        y = torch.tensor(ids, device=device) if self.config.id2label else None
        if guided:
            y = torch.cat([y, torch.full_like(y, self.config.null_id)])
            scales = scales.to(device)[:, None, None, None]
        steps = defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        timesteps = self._timesteps(scheduler, steps, spacing)
        if latents is None:
            latents = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])
        x = latents.float().to(device) * self._start(scheduler)
        self._interrupt = False
        view = copy.copy(self)  # calls may run concurrently: a callback sees and interrupts only its own
        view.__dict__ |= {"scheduler": scheduler, "_num_timesteps": len(timesteps)}
        for index, t in enumerate(self.progress_bar(timesteps)):
            x_t = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            inputs_ = pixel_unshuffle(torch.cat([x_t, x_t]) if guided else x_t, patch)
            out = self.unet(inputs_.to(self.unet.dtype), t.to(device).expand(len(inputs_)), class_labels=y).sample
            out = pixel_shuffle(out.float(), patch)
            if guided:  # only the mean channels; a learned variance comes from the conditional pass
                (cond, variance), (null, _) = (_split(part, x_t) for part in out.chunk(2))
                out = torch.cat([torch.lerp(null, cond, scales), variance], dim=1)  # lerp: at scale 1 exactly cond
            x = scheduler.step(self._clip(scheduler, out, x_t, t), t, x, return_dict=False, **extra)[0]
            if callback_on_step_end is not None:
                result = callback_on_step_end(view, index, t, {"latents": x} if inputs else {})
                latents = x if result is None else result.get("latents", x)
                if latents.shape != x.shape:
                    raise ValueError(f"a callback must return latents {list(x.shape)}, not {list(latents.shape)}.")
                x = latents.to(x)
            if view._interrupt or self._interrupt:
                break
        self.maybe_free_model_hooks()

        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().float().numpy()
        if output_type == "pil":
            pixels = (images * 255).round().astype(np.uint8)
            images = [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
        return LabelPipelineOutput(images=images, seeds=seeds) if return_dict else (images,)

    @property
    def interrupt(self) -> bool:
        """Whether the call ends after its current step."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int | None:
        """Number of network calls of this call's sampler; for use in a callback."""
        return self.__dict__.get("_num_timesteps")

    def _copy_scheduler(self, sampler: str | None, spacing: str | None) -> SchedulerMixin:
        """A scheduler for this call only: schedulers have state, and calls may run concurrently."""
        if self.config.process:
            return _copy_ode_scheduler(self.scheduler, self.config.process, sampler, spacing)
        if sampler is None and spacing is None:
            return copy.deepcopy(self.scheduler)
        for name, value, known in (("sampler", sampler, SAMPLERS), ("spacing", spacing, SPACINGS)):
            if value is not None and value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}.")
        scheduler_class = SAMPLERS[sampler] if sampler else type(self.scheduler)
        config, accepted = dict(self.scheduler.config), inspect.signature(scheduler_class.__init__).parameters
        if spacing is not None:
            config |= dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"), False)
            config |= {NOISE_GRIDS[spacing]: True} if spacing in NOISE_GRIDS else {"timestep_spacing": spacing}
        if spacing in NOISE_GRIDS and "use_karras_sigmas" not in accepted:
            raise ValueError(
                f"{scheduler_class.__name__} steps over whole timesteps: spacing {spacing} needs dpm++, unipc, euler "
                "or heun."
            )
        grid, zero_snr = _noise_grid(config, scheduler_class), bool(config.get("rescale_betas_zero_snr"))
        if zero_snr and (
            grid or config.get("timestep_spacing") != "trailing" or "rescale_betas_zero_snr" not in accepted
        ):
            raise ValueError("a zero-SNR schedule needs spacing trailing, and a sampler other than heun.")
        learned = self.unet.config.out_channels == 2 * self.unet.config.in_channels
        config |= {"clip_sample": False, "steps_offset": 0}
        config |= {"variance_type": "learned_range" if learned else "fixed_small"}
        return scheduler_class(**{k: v for k, v in config.items() if k in accepted})

    def _timesteps(self, scheduler: SchedulerMixin, steps: int, spacing: str | None = None) -> torch.Tensor:
        if self.config.process:
            return _set_ode_levels(scheduler, _ode_settings(scheduler, self.config.process, spacing), steps)
        total = scheduler.config.num_train_timesteps
        if scheduler.config.get("rescale_betas_zero_snr") and scheduler.config.prediction_type == "epsilon":
            raise ValueError("a zero-SNR schedule with eps-prediction divides by zero at its first step.")
        if not isinstance(steps, int) or not 1 <= steps <= total:
            raise ValueError(f"num_inference_steps must be a whole number from 1 to {total}, not {steps!r}.")
        scheduler.set_timesteps(steps)  # on the CPU, to avoid synchronizations with the device
        if grid := _noise_grid(scheduler.config, type(scheduler)):
            _use_noise_grid(scheduler, grid, steps)
        if isinstance(scheduler, DDIMScheduler):
            # DDIM steps to t - T // steps, which may not be the next timestep
            times, stride = scheduler.timesteps.tolist(), total // steps
            if any(a - b != stride for a, b in itertools.pairwise(times)) or times[-1] >= stride:
                spacing = scheduler.config.timestep_spacing
                raise ValueError(f"DDIM cannot take {steps} {spacing} steps: use a number that divides {total}.")
        return scheduler.timesteps

    def _start(self, scheduler: SchedulerMixin) -> float:
        """The standard deviation of the first noise. Stock EDM schedulers give sqrt(sigma_max^2 + 1), flow's none."""
        return float(scheduler.sigmas[0]) if self.config.process else getattr(scheduler, "init_noise_sigma", 1.0)

    def _clip(self, scheduler: SchedulerMixin, out: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Clip the predicted x0, after guidance, and convert it back to the prediction type for any sampler."""
        prediction, variance = _split(out, x_t)
        if self.config.clip_x0 and self.config.process:
            skip, scale = _skip_and_scale(scheduler, self.config.process)
            x0 = (skip * x_t + scale * prediction).clamp(-1, 1)
            prediction = (x0 - skip * x_t) / scale
        elif self.config.clip_x0:
            prediction_type, (alpha, sigma) = scheduler.config.prediction_type, _alpha_sigma(scheduler, t)
            if prediction_type == "epsilon":
                x0 = ((x_t - sigma * prediction) / alpha).clamp(-1, 1)
                prediction = (x_t - alpha * x0) / sigma
            elif prediction_type == "v_prediction":
                x0 = (alpha * x_t - sigma * prediction).clamp(-1, 1)
                prediction = (alpha * x_t - x0) / sigma
            else:
                prediction = prediction.clamp(-1, 1)
        learned = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type == "learned_range"
        return torch.cat([prediction, variance], dim=1) if learned else prediction

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Write model_index.json, and a copy of this file, which loading needs."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        source, index = Path(__file__), Path(save_directory, self.config_name)
        values = json.loads(index.read_text(encoding="utf-8")) | {"_class_name": [source.stem, type(self).__name__]}
        index.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        index.with_name(source.name).write_bytes(source.read_bytes())


def _alpha_sigma(scheduler: SchedulerMixin, t: torch.Tensor) -> tuple[float, float]:
    """alpha, sigma of x_t = alpha x0 + sigma eps; from the scheduler's noise-to-signal ratios if it has them."""
    ratios = getattr(scheduler, "sigmas", None)
    if ratios is not None:
        ratio = float(ratios[scheduler.step_index or 0])
        return 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
    alpha_bar = float(scheduler.alphas_cumprod[int(t)])
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def make_ode_scheduler(process: dict, sampler: str) -> SchedulerMixin:
    """A stock scheduler of edm or flow.

    Args:
        process: As `LabelPipeline` takes it.
        sampler: A name in ODE_SAMPLERS. The EDM schedulers call the network's output "epsilon"; under flow it is noise - x0.

    Raises:
        ValueError: For another sampler or spacing.
    """
    name, spacing = process["name"], process["spacing"]
    choices = (("sampler", sampler, ODE_SAMPLERS[name]), ("spacing", spacing, ODE_SPACINGS[name]))
    for kind, value, known in choices:
        if value not in known:
            raise ValueError(f"{kind} of process {name} must be one of {', '.join(known)}, not {value!r}.")
    scheduler_class, shift = ODE_SAMPLERS[name][sampler], SHIFT if spacing == "shifted" else 1.0
    if name == "edm":
        numbers = {key: process[key] for key in ("sigma_data", "sigma_min", "sigma_max", "rho")}
        return scheduler_class(**numbers, sigma_schedule=spacing, prediction_type="epsilon")
    if sampler in ("dpm++", "unipc"):
        return scheduler_class(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if sampler == "heun":
        return scheduler_class(shift=shift)
    grids = {"use_karras_sigmas": spacing == "karras", "use_exponential_sigmas": spacing == "exponential"}
    return scheduler_class(shift=shift, **grids)


def _copy_ode_scheduler(
    scheduler: SchedulerMixin, process: dict, sampler: str | None, spacing: str | None
) -> SchedulerMixin:
    """A scheduler of edm or flow for one call."""
    names = {scheduler_class: name for name, scheduler_class in ODE_SAMPLERS[process["name"]].items()}
    own, settings = names.get(type(scheduler)), _ode_settings(scheduler, process, spacing)
    made = make_ode_scheduler(settings, sampler or own or next(iter(names.values())))
    if sampler not in (None, own):
        return made
    same = ("sigma_data", "prediction_type", "use_flow_sigmas")
    if own is None or any(scheduler.config.get(key) != made.config.get(key) for key in same):
        raise ValueError(
            f"the model's process is {process['name']}, and this {type(scheduler).__name__} samples another one. Choose a "
            f"sampler in the call instead: {', '.join(names.values())}."
        )
    return copy.deepcopy(scheduler)


def _ode_settings(scheduler: SchedulerMixin, process: dict, spacing: str | None) -> dict:
    """The process of a call: its noise levels are those of the scheduler's config where it has them, under edm."""
    config = scheduler.config
    if process["name"] == "edm" and "sigma_schedule" in config:
        numbers = {key: config[key] for key in ("sigma_min", "sigma_max", "rho")}
        process = process | numbers | {"spacing": config["sigma_schedule"]}
    spacing = "exponential" if spacing == "lu" else spacing
    return process | ({} if spacing is None else {"spacing": spacing})


def _ode_levels(process: dict, steps: int) -> np.ndarray:
    """Where the steps start: noise levels s of edm, times t of flow."""
    spacing, (low, high, rho) = process["spacing"], (process[key] for key in ("sigma_min", "sigma_max", "rho"))
    if spacing in ("linear", "shifted"):
        t = 1 - np.arange(steps) / steps
        return SHIFT * t / (1 + (SHIFT - 1) * t) if spacing == "shifted" else t
    if spacing == "karras":
        s = np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho
    else:
        s = np.exp(np.linspace(np.log(high), np.log(low), steps))
    return s / (1 + s) if process["name"] == "flow" else s


def _set_ode_levels(scheduler: SchedulerMixin, process: dict, steps: int) -> torch.Tensor:
    """Set the noise levels of a call, and return the times that the network receives: ln(s) / 4 or 1000 t.

    Stock flow grids end at t = 0.001, so that the last of N steps is lost. dpm++ and unipc round the times.
    """
    if not isinstance(steps, int) or not 1 <= steps <= MAX_ODE_STEPS:
        raise ValueError(f"num_inference_steps must be a whole number from 1 to {MAX_ODE_STEPS}, not {steps!r}.")
    scheduler.set_timesteps(steps)  # clears the state
    levels = _ode_levels(process, steps)
    times = 1000 * levels if process["name"] == "flow" else np.log(levels) / 4
    sigmas, times = (torch.from_numpy(a).float() for a in (np.append(levels, 0.0), times))
    if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):  # two calls per step
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        times = torch.cat([times[:1], times[1:].repeat_interleave(2)])
    scheduler.sigmas, scheduler.timesteps = sigmas, times
    scheduler.set_begin_index(0)
    return times


def _skip_and_scale(scheduler: SchedulerMixin, process: dict) -> tuple[float, float]:
    """The numbers in x0 = skip x_t + scale F, F the network's output, at the next call under edm or flow."""
    level = float(scheduler.sigmas[scheduler.step_index or 0])
    if process["name"] == "flow":
        return 1.0, -level
    data, length = process["sigma_data"], math.hypot(level, process["sigma_data"])
    return data**2 / length, level * data / length


def _split(out: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return out[:, : x.shape[1]], out[:, x.shape[1] :]


def _scales(scale, count: int) -> torch.Tensor:
    scales = torch.as_tensor(scale, dtype=torch.float32).cpu().reshape(-1)
    if len(scales) not in (1, count) or not scales.isfinite().all() or (scales < 0).any():
        raise ValueError(
            f"guidance_scale must be one number of at least 0, or one for each of {count} images, not {scale}."
        )
    return scales.expand(count)


def _noise_grid(config: dict, scheduler_class: type[SchedulerMixin]) -> str | None:
    """The spacing over noise levels in a config; None for a scheduler without one, even if its config has the entry."""
    if "use_karras_sigmas" not in inspect.signature(scheduler_class.__init__).parameters:
        return None
    if config.get("use_karras_sigmas"):
        return "karras"
    return "exponential" if config.get("use_exponential_sigmas") or config.get("use_lu_lambdas") else None


def _use_noise_grid(scheduler: SchedulerMixin, spacing: str, steps: int) -> None:
    """Noise levels from at most MAX_SIGMA down, in equal steps of sigma^(1/7) (Karras et al. 2022) or of log sigma.

    The network is called at their fractional timesteps. In dpm++ and unipc diffusers rounds these timesteps, and with a
    cosine schedule most of them become equal.
    """
    alpha_bar = scheduler.alphas_cumprod.cpu().double().numpy()
    levels = np.sqrt((1 - alpha_bar) / alpha_bar)
    ends = np.array([min(levels[-1], MAX_SIGMA), levels[0]])
    if spacing == "karras":
        sigmas = np.linspace(*ends ** (1 / 7), steps) ** 7
    else:
        sigmas = np.exp(np.linspace(*np.log(ends), steps))
    times = np.interp(np.log(sigmas), np.log(levels), np.arange(len(levels)))
    sigmas, times = (torch.from_numpy(a).float() for a in (np.append(sigmas, 0.0), times))
    if isinstance(scheduler, HeunDiscreteScheduler):  # two calls per step
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        times = torch.cat([times[:1], times[1:].repeat_interleave(2)])
    scheduler.sigmas, scheduler.timesteps = sigmas, times.to(scheduler.timesteps.device)


def _seed_of(generator: torch.Generator) -> int | None:
    """The seed of a generator; None if numbers were drawn from it."""
    unused = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    return generator.initial_seed() if torch.equal(unused.get_state(), generator.get_state()) else None


def _match_lengths(ids: list, seeds, generator) -> tuple[list, list, list[torch.Generator]]:
    """One class, one seed and one generator per image."""
    if generator is not None and seeds is not None:
        raise ValueError("seeds and generator were given: give one of them.")
    if generator is not None and not isinstance(generator, torch.Generator | list | tuple):
        raise ValueError(f"generator must be one torch.Generator, or a list of one per image, not {generator!r}.")
    if isinstance(generator, list | tuple):
        ids = ids * len(generator) if len(ids) == 1 else ids
        if not generator or len(ids) != len(generator) or not all(isinstance(g, torch.Generator) for g in generator):
            raise ValueError(f"generator must be one torch.Generator, or a list of one for each of {len(ids)} images.")
        first = [all(g is not earlier for earlier in generator[:i]) for i, g in enumerate(generator)]
        return ids, [_seed_of(g) if is_first else None for g, is_first in zip(generator, first)], list(generator)
    if seeds is None:
        device = "cpu" if generator is None else generator.device
        seeds = torch.randint(0, 2**31, (len(ids),), generator=generator, device=device)
    seeds = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    seeds = [seeds + i for i in range(len(ids))] if isinstance(seeds, int) else seeds
    if not isinstance(seeds, Iterable) or not all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in seeds):
        raise ValueError(f"seeds must be whole numbers from 0 to 2^63 - 1, not {seeds}.")
    ids = ids * len(seeds) if len(ids) == 1 else ids
    if len(ids) != len(seeds) or not seeds:
        raise ValueError(f"{len(ids)} classes and {len(seeds)} seeds: give one seed per image, or one for all.")
    return ids, list(seeds), [torch.Generator().manual_seed(seed) for seed in seeds]
