"""The settings of a run: read from YAML files, mappings and dotted command-line overrides.

The string below a setting is its documentation, its --help and its description in the JSON schema.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, model_validator

from . import recipes
from .commands import option_value
from .errors import InputError, UsageError, reject_first
from .labels import LabelSpace
from .models.config import ModelConfig, check_size
from .renamed import CONFIG_KEYS
from .schema import NO_OPTION, RESUMABLE, Layer, Option, build, fields_of, flatten, read_document, settings, short_repr

DEVICE = r"(?i:auto|cpu|cuda(:\d{1,3})?|mps)"  # the words of speed.device and --device


def _check_device(device: str) -> str:
    if not re.fullmatch(DEVICE, device):
        raise ValueError(f"there is no device {short_repr(device)}; expected auto, cpu, cuda, cuda:1 or mps")
    return device


_DEVICE_HELP = "auto: a CUDA GPU if there is one, else Apple's (mps), else the CPU; "
_DEVICE_HELP += "or cpu, cuda, cuda:1 (one process alone), mps."
Device = Annotated[str, AfterValidator(_check_device), Field(description=_DEVICE_HELP), Option(metavar="DEVICE")]
Precision = Literal["auto", "fp32", "bf16", "fp16", "tf32"]
Sampler = Literal["ddpm", "ddim", "dpm++", "unipc", "euler", "heun"]
# Grids of a sampler: over ddpm's timesteps; over noise levels; over the times of flow.
Spacing = Literal["leading", "trailing", "linspace", "karras", "exponential", "lu", "linear", "shifted"]
MAX_EMA_LENGTH = 0.288  # that of the mean of all steps is 1 / sqrt(12)
SPACINGS: tuple[str, ...] = get_args(Spacing)


@settings
class DataConfig:
    """Labelled images."""

    source: str = "digits"
    """NAME_OR_PATH[:split], split 'train' by default. digits, cifar10, cifar100, any data set name on the Hugging
    Face hub, a folder of class folders, a folder with metadata.csv or metadata.jsonl (or one such table: columns
    file_name and label), a folder of (or one) parquet file, or cifar-10-batches-py (or cifar-10-python.tar.gz).
    What exists here wins over the hub."""
    classes: Annotated[str, MinLen(1)] = "all"
    """The classes to use: names, ids or WordNet ids separated by commas, a .txt file with one per line, or a list of
    ImageNet classes by its name: imagenette, imagewoof, imagenet100 (of Contrastive Multiview Coding),
    imagenet_first100, imagenet_cifar10 (nine of CIFAR-10's ten; ImageNet has no deer)."""
    image_size: Annotated[int | None, Ge(2), Le(2**13)] = None
    """Side in pixels: images are centre-cropped to a square and resized to it (area average when shrinking, bicubic
    when growing). Unset: the source's size, if all images are squares of one size."""
    channels: Literal[1, 3] | None = None
    """1 for gray, 3 for colour. Unset: 1 for digits, else 3."""
    background: Literal["white", "black"] = "white"
    """Colour behind transparent pixels."""
    flip: bool = False
    """Mirror half of the training images left to right. The network is not conditioned on it, so samples are mirrored too."""
    augment: Annotated[float, Ge(0), Le(1)] = 0.0
    """Probability of each non-leaking augmentation of training images (EDM: 0.12): y-flip, scaling, rotation, anisotropic
    scaling, translation; and half of the images are mirrored left to right. The network is conditioned on 9
    parameters, which are 0 when sampling, so samples are not augmented. For small data sets. 0: none."""
    heldout_fraction: Annotated[float, Ge(0), Le(0.5)] = 0.05
    """Fraction of the images held out (seeded) where a source has no test or validation part."""
    heldout_split: Literal["random", "stratified"] = "random"
    """How these are drawn. random: from all images at once. stratified: round(heldout_fraction x its images) from
    each class; a class with fewer than 0.5 / heldout_fraction images (10 at 0.05) holds out none. In both, at
    least one image per class stays in training."""
    balance: bool = False
    """Draw each class equally often in training: a class at random, then its next image. For unbalanced classes. An
    epoch is still as many draws as there are images."""
    skip_broken: bool = False
    """Skip and count images that cannot be decoded, instead of stopping."""
    image_column: str | None = None
    """Column with the images, or their file names. Unset: the first image column; file_name."""
    label_column: str | None = None
    """Column with the labels. Unset: the first class-label column; label or class."""
    store_dir: Annotated[str | None, RESUMABLE] = None
    """Where decoded images are cached. Unset: $DIFFUSION_ADAGN_CACHE or ~/.cache/diffusion_adagn."""


OF_DDPM = (
    "schedule",
    "num_train_timesteps",
    "zero_snr",
    "prediction",
    "timestep_spacing",
    "learned_variance",
)  # it alone


def _noise(value: Any) -> Any:
    return "log_normal" if value == "logit_normal" else value


@settings
class DiffusionConfig:
    """The noising process, the prediction and the loss."""

    process: Literal["ddpm", "edm", "flow"] = "ddpm"
    """ddpm: T timesteps with a schedule, discrete (Ho et al. 2020). edm: noise levels and preconditioning of Karras et al.
    2022. flow: straight lines from image to noise, flow matching."""
    noise: Annotated[Literal["uniform", "log_normal", "cosine"] | None, BeforeValidator(_noise)] = None
    """How noise levels sigma are drawn in training. log_normal: ln sigma is normal; under flow this is logit-normal t,
    and logit_normal is the same. uniform: t is (ddpm, flow). cosine: as under the cosine schedule (edm, flow). Unset:
    uniform under ddpm, else log_normal."""
    noise_mean: Annotated[float | None, Ge(-20), Le(20)] = None
    """Mean of ln sigma under log_normal. Unset: -1.2 + ln(sigma_data / 0.5) (edm); 0 (flow)."""
    noise_std: Annotated[float | None, Gt(0), Le(10)] = None
    """Standard deviation of ln sigma under log_normal. Unset: 1.2 (edm); 1 (flow)."""
    sigma_data: Annotated[float | None, Ge(0.001), Le(10)] = None
    """Standard deviation of the images in [-1, 1], for edm. Unset: measured on the training images."""
    schedule: Literal["linear", "cosine", "sigmoid"] = "linear"
    """Noise schedule of ddpm."""
    num_train_timesteps: Annotated[int, Ge(2), Le(100_000)] = 1000
    """T of ddpm: timesteps are 0..T-1."""
    zero_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (needs prediction x0 or v)."""
    prediction: Literal["eps", "x0", "v"] = "eps"
    """What the network predicts under ddpm; edm and flow determine it."""
    loss_weight: Literal["uniform", "min_snr", "learned"] = "uniform"
    """Weight of the loss by noise level. uniform: the error of the network's own output, which is EDM's weight under edm
    and flow matching's under flow. min_snr: min-SNR-gamma (ddpm). learned: by an uncertainty that is learned beside the
    network (EDM2), so that all noise levels contribute alike; the logged losses are without it."""
    min_snr_gamma: Annotated[float, Ge(1e-6)] = 5.0
    """Gamma of min-SNR-gamma weighting."""
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    """Which timesteps a sampler of ddpm visits. Unset: leading; trailing under zero_snr, which must start at T-1."""
    learned_variance: bool = False
    """Predict the variance too: twice the output channels, the hybrid loss, and the ddpm sampler uses it (Nichol &
    Dhariwal 2021)."""
    vlb_weight: Annotated[float, Ge(0)] = 0.001
    """Weight of the variational bound added to the mean squared error, under learned_variance."""
    clip_x0: bool = True
    """Clip the predicted x0 to [-1, 1] when sampling, after guidance."""

    @model_validator(mode="after")
    def _check_process(self) -> DiffusionConfig:
        """Settings of another process than the one chosen are errors: they would have no effect."""
        process, default = self.process, type(self)
        of_ddpm = [
            f"diffusion.{name} {option_value(getattr(self, name))} (default {option_value(getattr(default, name))})"
            for name in OF_DDPM
            if getattr(self, name) != getattr(default, name)
        ]
        drawn = self.noise or ("uniform" if process == "ddpm" else "log_normal")
        why = {"edm": "EDM's noise levels and preconditioning", "flow": "straight lines from image to noise"}.get(
            process
        )
        faults = {
            f"{', '.join(of_ddpm)} under diffusion.process {process}, which has {why} in place of timesteps with a schedule. Give the default, or set "
            "diffusion.process to ddpm": process != "ddpm" and bool(of_ddpm),
            f"diffusion.loss_weight min_snr under diffusion.process {process} with noise {drawn}: it is defined for ddpm with uniform "
            "timesteps. Set diffusion.loss_weight to uniform": self.loss_weight == "min_snr"
            and (process, drawn) != ("ddpm", "uniform"),
            "diffusion.noise uniform under diffusion.process edm, which has no timesteps. Set it to log_normal or cosine": (
                (process, drawn) == ("edm", "uniform")
            ),
            "diffusion.noise cosine under diffusion.process ddpm: set diffusion.schedule to cosine instead": (
                (process, drawn) == ("ddpm", "cosine")
            ),
            "diffusion.learned_variance with diffusion.noise log_normal: its bound is a sum over uniform timesteps. Set diffusion.noise to "
            "uniform": self.learned_variance and drawn != "uniform",
            "diffusion.noise log_normal under diffusion.process ddpm needs diffusion.noise_mean and diffusion.noise_std, such as -1.2 and "
            "1.2": (process, drawn) == ("ddpm", "log_normal") and None in (self.noise_mean, self.noise_std),
            f"diffusion.noise_mean and diffusion.noise_std belong to diffusion.noise log_normal, not {drawn}": (
                drawn != "log_normal" and (self.noise_mean, self.noise_std) != (None, None)
            ),
            f"diffusion.sigma_data belongs to diffusion.process edm, not {process}": process != "edm"
            and self.sigma_data is not None,
        }
        reject_first(faults, "", ".")
        return self

    @model_validator(mode="after")
    def _check_zero_snr(self) -> DiffusionConfig:
        fault = ""
        if self.prediction == "eps":
            fault = "with diffusion.prediction eps divides by zero at the last timestep, which is pure noise: there eps does not determine the image. Set diffusion.prediction to v or x0"
        elif self.loss_weight == "min_snr":
            fault = "gives the last timestep weight 0 under diffusion.loss_weight min_snr, so sampling would start from an untrained prediction. Set diffusion.loss_weight to uniform, or diffusion.zero_snr to false"
        elif self.timestep_spacing not in (None, "trailing"):
            fault = "needs diffusion.timestep_spacing trailing: sampling must start at T-1"
        if self.zero_snr and fault:
            raise InputError(f"diffusion.zero_snr {fault}.")
        return self


@settings
class TrainingConfig:
    """The training loop. batch_size counts all processes together, so that a run is the same on 1 GPU and on 8."""

    max_steps: Annotated[int | None, Ge(1), RESUMABLE] = None
    """Optimizer steps of the whole run. No default: a run needs it, --dry_run does not."""
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 128
    """Images per optimizer step, over all processes."""
    gradient_accumulation: Annotated[int, Ge(1), RESUMABLE] = 1
    """Split each process's part of a batch into this many passes, to save memory."""
    seed: Annotated[int, Ge(0)] = 0
    """Determines initial weights, order, noise, timesteps, label dropout, flips and augmentation."""
    lr: Annotated[float, Gt(0)] = 1e-4
    """Peak learning rate of AdamW. A resumed run may change it; the change is logged."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps of linear warm-up."""
    warmup_images: Annotated[int, Ge(0)] = 0
    """The same, counted in images; give one of the two."""
    lr_decay: Literal["none", "linear", "cosine", "inverse_sqrt"] = "none"
    """linear, cosine: from warm-up's end to 0 at max_steps. inverse_sqrt: lr / sqrt(max(images / lr_decay_images, 1)),
    which does not depend on max_steps (EDM2)."""
    lr_decay_images: Annotated[int | None, Ge(1)] = None
    """Images after which inverse_sqrt begins to decay; at four times as many the rate is half."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Weight decay of AdamW."""
    adam_beta2: Annotated[float, Ge(0), Le(0.99999)] = 0.999
    """Second-moment rate of AdamW."""
    clip_norm: Annotated[float, Ge(0)] = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    ema_decay: Annotated[float, Ge(0), Le(0.999999)] = 0.9999
    """EMA rate; step s uses min(ema_decay, (1 + s) / (10 + s))."""
    ema_lengths: tuple[Annotated[float, Ge(0.01), Le(0.28)], ...] = (0.05, 0.1)
    """Lengths of the power-function averages that are tracked too, as fractions of the run (sigma_rel of Karras et al.
    2024). Averages of other lengths are made of their snapshots: --ema LENGTH."""
    ema_snapshots: Annotated[int, Ge(0), RESUMABLE] = 64
    """Snapshots of these averages to keep, of 2 bytes per weight and length; 0: no tracking, for good. With 64, lengths
    from 0.005 to 0.28 can be made; with 8, from 0.022 to 0.25."""
    ema_snapshots_gb: Annotated[float, Ge(0), RESUMABLE] = 20.0
    """Most disk space of these snapshots in GB (10^9 bytes): fewer remain if they would take more."""
    label_dropout: Annotated[float, Ge(0), Le(1)] = 0.1
    """Fraction of samples trained with the null label."""
    teacher: str = "auto"
    """Under model.max_guidance_scale: the run, pipeline folder or hub id whose guided prediction the network learns. auto:
    that of init_from, if it is set; none: no teacher, the network learns from the images and its own null prediction."""
    teacher_rule: str = "cfg"
    """Guidance rule of the teacher, such as apg:eta=0,r=0.5 (docs/guidance.md)."""
    gradient_checkpointing: Annotated[bool, RESUMABLE] = False
    """Recompute activations in the backward pass: slower, less memory."""
    log_every: Annotated[int, Ge(1), RESUMABLE] = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Annotated[int, Ge(1), RESUMABLE] = 1000
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Ge(1), RESUMABLE] = 2
    """Number of latest checkpoints to keep."""
    keep_every: Annotated[int, Ge(0), RESUMABLE] = 0
    """Steps between checkpoints that are never deleted, saved in addition to those of checkpoint_every; 0: none."""
    max_nonfinite_steps: Annotated[int, Ge(1), RESUMABLE] = 10
    """Consecutive steps with a non-finite loss or gradient after which the run stops; each such step is skipped."""
    images_on: Annotated[Literal["auto", "device", "host"], RESUMABLE] = "auto"
    """Where the training images are stored on CUDA. auto: on the device if they take a quarter of its free memory or
    less, else on the host."""
    heldout_every: Annotated[int, Ge(0), RESUMABLE] = 0
    """Steps between held-out losses; 0: never."""
    diagnostics_every: Annotated[int, Ge(0), RESUMABLE] = 500
    """Steps between conditioning diagnostics: loss by timestep and class, label usage on held-out images, size of
    gamma and beta, gradients of the conditioning path; 0: never."""
    warn_label_unused_after: Annotated[int, Ge(0), RESUMABLE] = 2000
    """Warn if label usage is not measurable after this many steps; 0: never."""
    preview_every: Annotated[int, Ge(0), RESUMABLE] = 1000
    """Steps between preview grids; 0: never."""
    preview_classes: Annotated[str, RESUMABLE] = "all"
    """Classes of the preview grid (the first 10 are drawn)."""
    preview_count: Annotated[int, Ge(1), Le(1000), RESUMABLE] = 4
    """Images per class in the preview grid."""
    preview_guidance: Annotated[float, RESUMABLE] = 2.0
    """Guidance scale of the previews (1 where there is no null class)."""
    preview_steps: Annotated[int, Ge(1), RESUMABLE] = 20
    """Sampler steps of the previews."""
    tracker: Annotated[Literal["none", "tensorboard", "wandb", "trackio"], RESUMABLE] = "none"
    """Tracker to log to, in addition to metrics.jsonl."""

    @model_validator(mode="after")
    def _check_learning_rate(self) -> TrainingConfig:
        if self.warmup_steps and self.warmup_images:
            raise InputError(
                f"training.warmup_steps {self.warmup_steps} and training.warmup_images {self.warmup_images} are the same "
                "warm-up, counted in steps and in images: set one of them to 0."
            )
        if len(set(self.ema_lengths)) < len(self.ema_lengths):
            raise InputError(
                f"training.ema_lengths {option_value(self.ema_lengths)} has a length twice: leave one out."
            )
        if self.lr_decay == "inverse_sqrt" and self.lr_decay_images is None:
            raise InputError(
                "training.lr_decay inverse_sqrt needs training.lr_decay_images, the number of images after which the rate "
                "begins to decay: set it, such as training.lr_decay_images 200000."
            )
        return self


@settings
class SpeedConfig:
    """How computation runs. auto (and `speed: auto`) selects for this machine; the selection is printed."""

    precision: Precision = "auto"
    """Autocast type; weights stay in fp32. tf32: fp32 with its products and convolutions in TF32 (CUDA). auto: on a
    GPU bf16 (fp16 where it has none); on a CPU fp32, or bf16 where the CPU computes in it and an image takes a
    quarter of a GFLOP or more. A resumed run keeps its precision."""
    memory_format: Annotated[Literal["auto", "channels_last", "contiguous"], RESUMABLE] = "auto"
    """Memory format of feature maps. auto: channels_last, but contiguous in fp32 on a GPU."""
    operator: Annotated[Literal["auto", "fused", "eager"], RESUMABLE] = "auto"
    """Norm, modulation and SiLU in one pass over memory (fused: C++ on a CPU, Triton on a GPU), or in plain PyTorch
    (eager). auto: fused where possible."""
    compile: Annotated[bool, RESUMABLE] = False
    """torch.compile for the repeated blocks; the first steps then take minutes."""
    device: Annotated[Device, RESUMABLE] = "auto"


@settings
class RunConfig:
    """A whole training run."""

    output_dir: Annotated[str | None, MinLen(1), RESUMABLE] = None
    """The run folder."""
    init_from: Annotated[str | None, MinLen(1)] = None
    """Start from the weights of this run, pipeline folder or hub id: matching weights are loaded; new classes get
    new embedding rows."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    labels: Annotated[dict | None, NO_OPTION] = None
    """The classes, recorded by the run; the data must have the same. Do not write it by hand."""

    @model_validator(mode="after")
    def _check_sections(self) -> RunConfig:
        if self.labels is not None:
            LabelSpace.from_dict(self.labels)
        sizes = {"sample_size": self.data.image_size or 1, "in_channels": self.data.channels or 1}
        check_size(dataclasses.asdict(self.model) | sizes)
        dropout, fault = self.training.label_dropout, ""
        if dropout > 0 and not self.model.null_class and self.model.class_conditional:
            fault = "needs a null class to drop to. Set model.null_class to true, or training.label_dropout to 0"
        elif not self.model.class_conditional and dropout not in (0, TrainingConfig.label_dropout):
            fault = "has no meaning with model.class_conditional false. Set it to 0"
        if fault:
            raise InputError(f"training.label_dropout {fault}.")
        self._check_guidance_input()
        return self

    @property
    def teacher(self) -> str | None:
        """The model whose guided prediction a network that reads the guidance scale learns; None: it has no teacher."""
        if self.model.max_guidance_scale is None or self.training.teacher == "none":
            return None
        return self.init_from if self.training.teacher == "auto" else self.training.teacher

    def _check_guidance_input(self) -> None:
        model, training, default = self.model, self.training, TrainingConfig
        uses_class = model.class_conditional and model.null_class and model.conditioning != "none"
        if model.max_guidance_scale is None:
            faults = {
                f"training.teacher {training.teacher} has no effect without model.max_guidance_scale: set that too, such as 4": (
                    training.teacher not in (default.teacher, "none")
                ),
                "training.teacher_rule has no effect without model.max_guidance_scale and a teacher: leave it out": (
                    training.teacher_rule != default.teacher_rule
                ),
            }
        else:
            faults = {
                "model.max_guidance_scale needs a class and a null class to guide between: set model.class_conditional and "
                "model.null_class to true, and model.conditioning to one that uses the class": not uses_class,
                "training.label_dropout 0 never trains the null label, which model.max_guidance_scale without a teacher guides "
                "against: set it to 0.1, or give training.teacher": self.teacher is None and not training.label_dropout,
                "training.teacher_rule is the rule of a teacher, and there is none: give training.teacher, or leave it out": (
                    self.teacher is None and training.teacher_rule != default.teacher_rule
                ),
            }
        reject_first(faults, "", ".")


# ---------------------------------------------------------------------- reading


def read_config(file: str | Path | None = None, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read the settings of a run.

    Args:
        file: a YAML file, or the name of a recipe. None: the defaults.
        overrides: values by dotted key, such as {"training.lr": "1e-4"}; they take precedence over the file.

    Raises:
        InputError: an error in the file; UsageError: an error in the overrides. Both name the key and its place.
    """
    if not isinstance(file, str | os.PathLike | None):
        raise InputError(
            f"a config is a YAML file or the name of a recipe, or settings as a dict, not {short_repr(file)}."
        )
    values, path = {}, file and recipes.find(file)
    if path:
        values = read_document(path, is_yaml=True)
        if values.get("speed") == "auto":  # the defaults
            del values["speed"]
    config = _build(Layer(values, f"in {path}"), Layer(overrides or {}, "on the command line", UsageError))
    return _with_effect(config, overrides or {})


def with_overrides(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """The config with values from the command line, by dotted key. Raises UsageError for an invalid one."""
    return _with_effect(_build(Layer(to_dict(config)), Layer(overrides, "on the command line", UsageError)), overrides)


def _with_effect(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """The config, unless an override sets ddpm's noise or prediction where the file has another process.

    Overrides that name the process may also set these to their defaults, in place of the values in the file.
    """
    given = [key for key in overrides if key in {f"diffusion.{name}" for name in OF_DDPM}]
    if config.diffusion.process != "ddpm" and given and "diffusion.process" not in overrides:
        raise UsageError(
            f"{given[0]} {_short(overrides[given[0]])} has no effect under diffusion.process {config.diffusion.process}, which this "
            "config has. Add --diffusion.process ddpm, or leave it out."
        )
    return config


def as_config(given: RunConfig | Mapping | str | Path) -> RunConfig:
    """The config that a caller from Python means.

    Args:
        given: A config; a YAML file or a recipe's name; or settings, in sections or by dotted key, such as
            {"data": {"source": "digits"}, "training.max_steps": 100}.

    Raises:
        InputError: There is no such file, no such setting, or a setting cannot have this value.
    """
    if isinstance(given, RunConfig):
        return given
    return _build(Layer(given, "in the settings given")) if isinstance(given, Mapping) else read_config(given)


def as_data_config(given: DataConfig | RunConfig | Mapping | str | Path) -> DataConfig:
    """The data settings that a caller from Python means.

    Args:
        given: Data settings or a whole config; a YAML file; the source alone (NAME_OR_PATH[:split], as in data.source);
            or settings, such as {"source": "my_images", "image_size": 32} or {"data": {...}}.

    Raises:
        InputError: There is no such setting, or it cannot have this value.
    """
    if isinstance(given, DataConfig):
        return given
    if not isinstance(given, RunConfig | Mapping) and not str(given).endswith((".yaml", ".yml")):
        given = {"source": given}
    if isinstance(given, Mapping) and not any(str(key).partition(".")[0] == "data" for key in given):
        given = {"data": given}
    return as_config(given).data


def _build(*layers: Layer) -> RunConfig:
    return build(RunConfig, *layers, renamed=CONFIG_KEYS)


# ---------------------------------------------------------------------- writing, comparing


def to_dict(config: RunConfig) -> dict:
    """Nested plain types, as YAML and JSON take them."""

    return TypeAdapter(RunConfig).dump_python(config, mode="json")


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def decisive(config: RunConfig) -> dict[str, Any]:
    """By dotted key, as plain types: the settings that change what a resumed run computes."""
    values = flatten(RunConfig, to_dict(config))
    return {s.key: values[s.key] for s in fields_of(RunConfig) if RESUMABLE not in s.info.metadata}


def differences(old: Mapping[str, Any], new: RunConfig) -> list[str]:
    """ "key: old -> new" for every setting of `decisive` that differs. Settings that the old version lacked are not compared."""
    return [f"{k}: {_short(old[k])} -> {_short(v)}" for k, v in decisive(new).items() if k in old and old[k] != v]


def _short(value: Any) -> str:
    text = ", ".join(value["names"]) if isinstance(value, dict) else option_value(value)
    return text if len(text) <= 60 else text[:57] + "..."
