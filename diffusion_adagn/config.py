"""What a run is: typed, documented fields, read from YAML files and dotted command-line overrides.

Every field is documented once, here; the same text is the `--help`. Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from . import recipes
from .errors import InputError, UsageError
from .labels import LabelSpace
from .models.config import ModelConfig, check_size
from .schema import apply, fields_of, flatten, read_yaml, setting, short_repr

DEVICE = r"(?i:auto|cpu|cuda(:\d{1,3})?|mps)"  # the words of speed.device and --device


@dataclass
class DataConfig:
    """Labelled images."""

    source: str = setting(
        "digits",
        "NAME_OR_PATH[:split], split 'train' by default. digits, cifar10, cifar100, any data set name on the Hugging "
        "Face hub, a folder of class folders, a folder with metadata.csv or metadata.jsonl (or one such table: columns "
        "file_name and label), a folder of (or one) parquet file, or cifar-10-batches-py (or cifar-10-python.tar.gz). "
        "What exists here wins over the hub.",
    )
    classes: str = setting(
        "all",
        "The classes to use: names, ids or WordNet ids separated by commas, a .txt file with one per line, or a list of "
        "ImageNet classes by its name: imagenette, imagewoof, imagenet100 (of Contrastive Multiview Coding), "
        "imagenet_first100, imagenet_cifar10 (nine of CIFAR-10's ten; ImageNet has no deer).",
    )
    image_size: int | None = setting(
        None,
        "Side in pixels: images are centre-cropped to a square and resized to it (area average when shrinking, "
        "bicubic when growing). Unset: the source's size, if all images are squares of one size.",
        minimum=2,
        maximum=2**13,
    )
    channels: Literal[1, 3] | None = setting(None, "1 for gray, 3 for colour. Unset: 1 for digits, else 3.")
    background: Literal["white", "black"] = setting("white", "Colour behind transparent pixels.")
    flip: bool = setting(False, "Mirror half of the training images left to right.")
    heldout_fraction: float = setting(
        0.05,
        "Fraction of the images held out (seeded) where a source has no test or validation part.",
        minimum=0,
        maximum=0.5,
    )
    heldout_split: Literal["random", "stratified"] = setting(
        "random",
        "How these are drawn. random: from all images at once. stratified: round(heldout_fraction x its images) from each "
        "class; a class with fewer than 0.5 / heldout_fraction images (10 at 0.05) holds out none. In both, at least one "
        "image per class stays in training.",
    )
    balance: bool = setting(
        False,
        "Draw each class equally often in training: a class at random, then its next image. For unbalanced classes. An epoch "
        "is still as many draws as there are images.",
    )
    skip_broken: bool = setting(False, "Skip and count images that cannot be decoded, instead of stopping.")
    image_column: str | None = setting(
        None, "Column with the images, or their file names. Unset: the first image column; file_name."
    )
    label_column: str | None = setting(
        None, "Column with the labels. Unset: the first class-label column; label or class."
    )
    store_dir: str | None = setting(
        None,
        "Where decoded images are cached. Unset: $DIFFUSION_ADAGN_CACHE or ~/.cache/diffusion_adagn.",
        resumable=True,
    )


# Grids of a sampler: over the timesteps; and over the noise levels, for samplers that step between timesteps.
SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential", "lu")


@dataclass
class DiffusionConfig:
    """The noising process, the prediction and the loss."""

    schedule: Literal["linear", "cosine", "sigmoid"] = setting("linear", "Noise schedule.")
    num_train_timesteps: int = setting(1000, "T: timesteps are 0..T-1.", minimum=2, maximum=100_000)
    zero_snr: bool = setting(
        False, "Rescale the schedule so that the last timestep is pure noise (needs prediction x0 or v)."
    )
    prediction: Literal["eps", "x0", "v"] = setting("eps", "What the network predicts.")
    loss_weight: Literal["uniform", "min_snr"] = setting("uniform", "Weight of the loss by timestep.")
    min_snr_gamma: float = setting(5.0, "Gamma of min-SNR-gamma weighting.", minimum=1e-6)
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = setting(
        None, "Which timesteps a sampler visits. Unset: leading; trailing under zero_snr, which must start at T-1."
    )
    learned_variance: bool = setting(
        False,
        "Predict the variance too: twice the output channels, the hybrid loss, and the ddpm sampler uses it "
        "(Nichol & Dhariwal 2021).",
    )
    vlb_weight: float = setting(
        0.001, "Weight of the variational bound added to the mean squared error, under learned_variance.", minimum=0
    )
    clip_x0: bool = setting(True, "Clip the predicted x0 to [-1, 1] when sampling, after guidance.")


@dataclass
class TrainingConfig:
    """The training loop. batch_size counts all processes together, so that a run is the same on 1 GPU and on 8."""

    max_steps: int | None = setting(None, "Optimizer steps of the whole run.", minimum=1, resumable=True)
    batch_size: int = setting(128, "Images per optimizer step, over all processes.", minimum=1, maximum=1_000_000)
    gradient_accumulation: int = setting(
        1, "Split each process's part of a batch into this many passes, to save memory.", minimum=1, resumable=True
    )
    seed: int = setting(0, "Determines initial weights, order, noise, timesteps, label dropout and flips.", minimum=0)
    lr: float = setting(
        1e-4, "Peak learning rate of AdamW. A resumed run may change it; the change is logged.", minimum=0
    )
    warmup_steps: int = setting(0, "Steps of linear warm-up.", minimum=0)
    lr_decay: Literal["none", "linear", "cosine"] = setting("none", "Decay from warm-up's end to 0 at max_steps.")
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", minimum=0)
    adam_beta2: float = setting(0.999, "Second-moment rate of AdamW.", minimum=0, maximum=0.99999)
    clip_norm: float = setting(1.0, "Gradients are scaled down to this norm; 0: never.", minimum=0)
    ema_decay: float = setting(
        0.9999, "EMA rate; step s uses min(ema_decay, (1 + s) / (10 + s)).", minimum=0, maximum=0.999999
    )
    label_dropout: float = setting(0.1, "Fraction of samples trained with the null label.", minimum=0, maximum=1)
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: slower, less memory.", resumable=True
    )
    log_every: int = setting(10, "Steps between lines of metrics.jsonl.", minimum=1, resumable=True)
    checkpoint_every: int = setting(1000, "Steps between checkpoints.", minimum=1, resumable=True)
    keep_checkpoints: int = setting(2, "Number of latest checkpoints to keep.", minimum=1, resumable=True)
    keep_every: int = setting(
        0, "Checkpoints at multiples of this many steps are never deleted; 0: none.", minimum=0, resumable=True
    )
    max_nonfinite_steps: int = setting(
        10,
        "Consecutive steps with a non-finite loss or gradient after which the run stops; each such step is skipped.",
        minimum=1,
        resumable=True,
    )
    images_on: Literal["auto", "device", "host"] = setting(
        "auto",
        "Where the training images are stored on CUDA. auto: on the device if they take a quarter of its free memory or less, else on the host.",
        resumable=True,
    )
    heldout_every: int = setting(0, "Steps between held-out losses; 0: never.", minimum=0, resumable=True)
    diagnostics_every: int = setting(
        500,
        "Steps between conditioning diagnostics: loss by timestep and class, label usage on held-out images, size of gamma "
        "and beta, gradients of the conditioning path; 0: never.",
        minimum=0,
        resumable=True,
    )
    warn_label_unused_after: int = setting(
        2000, "Warn if label usage is not measurable after this many steps; 0: never.", minimum=0, resumable=True
    )
    preview_every: int = setting(1000, "Steps between preview grids; 0: never.", minimum=0, resumable=True)
    preview_classes: str = setting("all", "Classes of the preview grid (the first 10 are drawn).", resumable=True)
    preview_count: int = setting(4, "Images per class in the preview grid.", minimum=1, maximum=1000, resumable=True)
    preview_guidance: float = setting(
        2.0, "Guidance scale of the previews (1 where there is no null class).", resumable=True
    )
    preview_steps: int = setting(20, "Sampler steps of the previews.", minimum=1, resumable=True)
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = setting(
        "none", "Tracker to log to, in addition to metrics.jsonl.", resumable=True
    )


@dataclass
class SpeedConfig:
    """How computation runs. auto (and `speed: auto`) selects for this machine; the selection is printed."""

    precision: Literal["auto", "fp32", "bf16", "fp16", "tf32"] = setting(
        "auto",
        "Autocast type; weights stay in fp32. tf32: fp32 with its products and convolutions in TF32 (CUDA). auto: on a GPU bf16 (fp16 where it has none); on a CPU fp32, or bf16 where "
        "the CPU computes in it and an image takes half a GFLOP or more. A resumed run keeps its precision.",
    )
    memory_format: Literal["auto", "channels_last", "contiguous"] = setting(
        "auto",
        "Memory format of feature maps. auto: channels_last on a CPU, and in half types on a GPU.",
        resumable=True,
    )
    operator: Literal["auto", "fused", "eager"] = setting(
        "auto",
        "Norm, modulation and SiLU in one pass over memory (fused: C++ on a CPU, Triton on a GPU), or in plain PyTorch (eager). "
        "auto: fused where possible.",
        resumable=True,
    )
    compile: bool = setting(
        False, "torch.compile for the repeated blocks; the first steps then take minutes.", resumable=True
    )
    device: str = setting(
        "auto",
        "auto: a CUDA GPU if there is one, else Apple's (mps), else the CPU; or cpu, cuda, cuda:1 (one process alone), mps.",
        resumable=True,
    )


@dataclass
class RunConfig:
    """A whole training run."""

    output_dir: str | None = setting(None, "The run folder.", resumable=True)
    init_from: str | None = setting(
        None,
        "Start from the weights of this run, pipeline folder or hub id: matching weights are loaded; new classes get new embedding rows.",
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    labels: dict | None = setting(
        None, "The classes, recorded by the run; the data must have the same. Do not write it by hand."
    )


# ---------------------------------------------------------------------- reading


def read_config(file: str | Path | None = None, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read the settings of a run.

    Args:
        file: a YAML file, or the name of a recipe. None: the defaults.
        overrides: values by dotted key, such as {"training.lr": "1e-4"}; they take precedence over the file.

    Raises:
        InputError: an error in the file; UsageError: an error in the overrides. Both name the key and its place.
    """
    config = RunConfig()
    if file is not None:
        path = recipes.find(file)
        apply(config, flatten(read_yaml(path)), where=f"in {path}")
    apply(config, overrides or {}, where="on the command line", error=UsageError)
    check(config)
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
    if not isinstance(given, Mapping):
        return read_config(given)
    config = RunConfig()
    apply(config, flatten(given), where="in the settings given")
    check(config)
    return config


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
    if isinstance(given, RunConfig):
        return given.data
    if isinstance(given, Mapping):
        whole = any(str(key).partition(".")[0] == "data" for key in given)
        return as_config(given if whole else {"data": given}).data
    if str(given).endswith((".yaml", ".yml")):
        return read_config(given).data
    return as_config({"data": {"source": given}}).data


def check(config: RunConfig) -> None:
    """Raises InputError, with the remedy, for settings that contradict each other."""
    d, m, t = config.diffusion, config.model, config.training
    if d.zero_snr and d.prediction == "eps":
        raise InputError(
            "diffusion.zero_snr with diffusion.prediction eps divides by zero at the last timestep, which is pure noise: "
            "there eps does not determine the image. Set diffusion.prediction to v or x0."
        )
    if d.zero_snr and d.loss_weight == "min_snr":
        raise InputError(
            "diffusion.loss_weight min_snr gives the last timestep weight 0 under diffusion.zero_snr, so sampling would "
            "start from an untrained prediction. Set diffusion.loss_weight to uniform, or diffusion.zero_snr to false."
        )
    if d.zero_snr and d.timestep_spacing not in (None, "trailing"):
        raise InputError("diffusion.zero_snr needs diffusion.timestep_spacing trailing: sampling must start at T-1.")
    if not re.fullmatch(DEVICE, config.speed.device):
        raise InputError(
            f"--device (speed.device): there is no device {short_repr(config.speed.device)}; expected auto, cpu, cuda, cuda:1 or mps."
        )
    if t.lr == 0:
        raise InputError("training.lr 0 trains nothing: give a rate above 0, such as 1e-4.")
    if not m.channel_mult:
        raise InputError("model.channel_mult is empty; expected one width multiplier per level, such as 1,2,2.")
    if config.labels is not None:
        LabelSpace.from_dict(config.labels)
    known = {"sample_size": config.data.image_size or 1, "in_channels": config.data.channels or 1}
    check_size(dataclasses.asdict(m) | known)
    if t.label_dropout > 0 and not m.null_class and m.class_conditional:
        raise InputError(
            "training.label_dropout needs a null class to drop to. Set model.null_class to true, or training.label_dropout to 0."
        )
    if not m.class_conditional and t.label_dropout not in (0, TrainingConfig.label_dropout):
        raise InputError("training.label_dropout has no meaning with model.class_conditional false. Set it to 0.")


# ---------------------------------------------------------------------- writing, comparing


def to_dict(config: RunConfig) -> dict:
    """Nested plain types, as YAML and JSON take them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """ "key: old -> new" for every setting that would change what a resumed run computes."""
    a, b = flatten(to_dict(old)), flatten(to_dict(new))
    return [
        f"{key}: {_short(a[key])} -> {_short(b[key])}"
        for key, _, f in fields_of(RunConfig)
        if not f.metadata["resumable"] and a[key] != b[key]
    ]


def _short(value: Any) -> str:
    text = ", ".join(value["names"]) if isinstance(value, dict) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
