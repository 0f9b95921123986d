"""What a run is: typed, documented fields, read from YAML files and dotted command-line overrides.

Every field is documented once, here; the same text is the `--help`. Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from . import recipes
from .errors import InputError, UsageError
from .labels import MOST_CLASSES, LabelSpace

MOST_YAML = 4 * 2**20  # bytes; the labels of 20,000 classes are 1 MB, and 60,000 values
MOST_VALUES = 250_000  # of a YAML file; PyYAML takes 30 us for each
MOST_JSON = 16 * 2**20
MOST_DEEP = 40  # lists and sections in one another
MOST_WHOLE = 2**63 - 1
DEVICE = r"(?i:auto|cpu|cuda(:\d{1,3})?|mps)"  # the words of speed.device and --device
RENAMED = {"training.precision": "speed.precision"}  # in files of earlier days


def option(default: Any, help: str, *, minimum: float | None = None, maximum: float | None = None, free: bool = False):
    """A config field. free: a resumed run may change it, since it does not change what is computed (training.lr alone may change too)."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum, "free": free})


@dataclass
class DataConfig:
    """Labelled images."""

    source: str = option(
        "digits",
        "NAME_OR_PATH[:split], split 'train' unless said. digits, cifar10, cifar100, any data set name on the Hugging "
        "Face hub, a folder of class folders, a folder with metadata.csv or metadata.jsonl (or one such table: columns "
        "file_name and label), a folder of (or one) parquet file, or cifar-10-batches-py (or cifar-10-python.tar.gz). "
        "What exists here wins over the hub.",
    )
    classes: str = option(
        "all",
        "The classes to keep: names, ids or WordNet ids with commas between, or a .txt file with one a line, or a list of "
        "ImageNet classes by its name: imagenette, imagewoof, imagenet100 (of Contrastive Multiview Coding), "
        "imagenet_first100, imagenet_cifar10 (nine of CIFAR-10's ten; ImageNet has no deer).",
    )
    image_size: int | None = option(
        None,
        "Side in pixels: pictures are centre-cropped to a square and resized to it (area average when shrinking, "
        "bicubic when growing). Unset: the source's own size, if all its pictures are squares of one size.",
        minimum=2,
        maximum=2**13,
    )
    channels: Literal[1, 3] | None = option(None, "1 for gray, 3 for colour. Unset: 1 for digits, else 3.")
    background: Literal["white", "black"] = option("white", "What transparent pixels are laid over.")
    flip: bool = option(False, "Mirror half of the training pictures left to right.")
    heldout_fraction: float = option(
        0.05,
        "Share of the pictures held out (seeded) where a source has no test or validation part.",
        minimum=0,
        maximum=0.5,
    )
    heldout_split: Literal["random", "stratified"] = option(
        "random",
        "How that share is drawn. random: from all images at once. stratified: from each class alike, round(heldout_fraction "
        "x its images); a class of fewer than 0.5 / heldout_fraction images (10 at 0.05) holds out none. Either way each "
        "class keeps an image for training.",
    )
    balance: bool = option(
        False,
        "Draw each class equally often in training: a class at random, then its next image. For unbalanced classes. An epoch "
        "is still as many draws as there are images.",
    )
    skip_broken: bool = option(False, "Leave out pictures that cannot be decoded, counting them, instead of stopping.")
    image_column: str | None = option(
        None, "Column that holds the pictures, or their file names. Unset: the first image column; file_name."
    )
    label_column: str | None = option(
        None, "Column that holds the labels. Unset: the first class-label column; label or class."
    )
    store_dir: str | None = option(
        None, "Where decoded pictures are kept. Unset: $DIFFUSION_ADAGN_CACHE or ~/.cache/diffusion_adagn.", free=True
    )


@dataclass
class ModelConfig:
    """The network, in the terms of OpenAI's ADM. These are AdaGNUNet's defaults too."""

    model_channels: int = option(128, "Base width: level i has model_channels * channel_mult[i] channels.", minimum=1)
    channel_mult: tuple[int | float, ...] = option(
        (1, 2, 2, 2), "Width multiplier of each resolution level; each width must be whole.", minimum=0.125
    )
    num_res_blocks: int = option(2, "Residual blocks per level (one more on the way up).", minimum=1, maximum=64)
    attention_resolutions: tuple[int, ...] = option(
        (16, 8), "Sides, in pixels, at which blocks are followed by self-attention."
    )
    num_heads: int = option(4, "Attention heads, where num_head_channels is unset.", minimum=1)
    num_heads_upsample: int | None = option(
        None, "Heads on the way up, where num_head_channels is unset. Unset: num_heads.", minimum=1
    )
    num_head_channels: int | None = option(64, "Channels per attention head; unset: num_heads decides.", minimum=1)
    resblock_updown: bool = option(
        False, "Resample inside residual blocks (ADM's large nets) instead of plain convolutions."
    )
    dropout: float = option(0.0, "Dropout before the last convolution of each residual block.", minimum=0, maximum=0.99)
    norm_groups: int = option(32, "Groups of every GroupNorm; must divide every width.", minimum=1)
    norm_eps: float = option(1e-5, "Epsilon of every GroupNorm.", minimum=0)
    conditioning: str = option(
        "adagn",
        "How a site is told about time and class: adagn, adagn_zero, adain, additive, gain, film, cross_attention, or none "
        "(time only). See docs/conditioning.md.",
    )
    join: Literal["sum", "concat"] = option(
        "sum", "How the vectors of time and class are joined before the sites are told (ADM: sum)."
    )
    class_tokens: int = option(
        4,
        "Tokens that a class becomes under cross_attention; 2 or more, since with one there is nothing to attend to.",
        minimum=2,
    )
    modulate_both_norms: bool = option(
        False, "Modulate the first norm of each residual block too (ADM: the second only)."
    )
    zero_init_modulation: bool = option(
        False, "Start with gamma = beta = 0, so that a new net ignores time and class (ADM: no)."
    )
    class_conditional: bool = option(True, "False: train without labels.")
    null_class: bool = option(True, "Keep a null row in the class table; guidance needs it.")


# Grids of a sampler: over the timesteps; and over the noise levels, for samplers that step between timesteps.
SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential", "lu")


@dataclass
class DiffusionConfig:
    """The noising process, the prediction and the loss."""

    schedule: Literal["linear", "cosine", "sigmoid"] = option("linear", "Noise schedule.")
    num_train_timesteps: int = option(1000, "T: timesteps are 0..T-1.", minimum=2, maximum=100_000)
    zero_snr: bool = option(
        False, "Rescale the schedule so that the last timestep is pure noise (needs prediction x0 or v)."
    )
    prediction: Literal["eps", "x0", "v"] = option("eps", "What the network predicts.")
    loss_weight: Literal["uniform", "min_snr"] = option("uniform", "Weight of a sample's loss over t.")
    min_snr_gamma: float = option(5.0, "Gamma of min-SNR-gamma weighting.", minimum=1e-6)
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = option(
        None, "Which timesteps a sampler visits. Unset: leading; trailing under zero_snr, which must start at T-1."
    )
    learned_variance: bool = option(
        False,
        "Predict the variance too: twice the output channels, the hybrid loss, and the ddpm sampler uses it "
        "(Nichol & Dhariwal 2021).",
    )
    vlb_weight: float = option(
        0.001, "Weight of the variational bound beside the simple loss, under learned_variance.", minimum=0
    )
    clip_x0: bool = option(True, "Clip the predicted x0 to [-1, 1] when sampling, after guidance.")


@dataclass
class TrainingConfig:
    """The loop. batch_size is for all processes together, so that a run means the same on 1 GPU and on 8."""

    max_steps: int | None = option(None, "Optimizer steps of the whole run.", minimum=1, free=True)
    batch_size: int = option(128, "Pictures per optimizer step, over all processes.", minimum=1, maximum=1_000_000)
    gradient_accumulation: int = option(
        1, "Split each process's share of a batch into this many passes, to save memory.", minimum=1, free=True
    )
    seed: int = option(0, "Decides weights, order, noise, timesteps, label drops and flips.", minimum=0)
    lr: float = option(
        1e-4, "Peak learning rate of AdamW. A resumed run may change it; the change is logged.", minimum=0
    )
    warmup_steps: int = option(0, "Steps of linear warm-up.", minimum=0)
    lr_decay: Literal["none", "linear", "cosine"] = option("none", "Decay from warm-up's end to 0 at max_steps.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.", minimum=0)
    adam_beta2: float = option(0.999, "Second-moment rate of AdamW.", minimum=0, maximum=0.99999)
    clip_norm: float = option(1.0, "Gradients are scaled down to this norm; 0: never.", minimum=0)
    ema_decay: float = option(
        0.9999, "EMA rate; step s uses min(ema_decay, (1 + s) / (10 + s)).", minimum=0, maximum=0.999999
    )
    label_dropout: float = option(0.1, "Share of samples trained with the null label.", minimum=0, maximum=1)
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: slower, less memory.", free=True
    )
    log_every: int = option(10, "Steps between lines of metrics.jsonl.", minimum=1, free=True)
    checkpoint_every: int = option(1000, "Steps between checkpoints.", minimum=1, free=True)
    keep_checkpoints: int = option(2, "Newest checkpoints that are kept.", minimum=1, free=True)
    keep_every: int = option(
        0, "Checkpoints at multiples of this many steps are kept for good; 0: none.", minimum=0, free=True
    )
    most_faults: int = option(
        10,
        "Steps in a row with a loss or gradient that is not finite, after which the run stops; each is left out.",
        minimum=1,
        free=True,
    )
    images_on: Literal["auto", "device", "host"] = option(
        "auto",
        "Where the training images lie on CUDA. auto: on the device if they take a quarter of its free memory or less, else on the host.",
        free=True,
    )
    heldout_every: int = option(0, "Steps between held-out losses; 0: never.", minimum=0, free=True)
    signals_every: int = option(
        500,
        "Steps between training signals: loss by timestep and class, use of the label on held-out pictures, size of gamma and "
        "beta, gradients of the condition's path; 0: never.",
        minimum=0,
        free=True,
    )
    warn_unused_after: int = option(
        2000, "Warn if after so many steps the label is not seen to be used; 0: never.", minimum=0, free=True
    )
    preview_every: int = option(1000, "Steps between preview grids; 0: never.", minimum=0, free=True)
    preview_classes: str = option("all", "Classes of the preview grid (its first 10 are drawn).", free=True)
    preview_count: int = option(4, "Pictures per class in the preview grid.", minimum=1, maximum=1000, free=True)
    preview_guidance: float = option(2.0, "Guidance scale of the previews (1 where there is no null class).", free=True)
    preview_steps: int = option(20, "Sampler steps of the previews.", minimum=1, free=True)
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = option(
        "none", "Where else to log, besides metrics.jsonl.", free=True
    )


@dataclass
class SpeedConfig:
    """How it is computed. auto (and `speed: auto`) picks for the machine at hand, and the run says what it picked."""

    precision: Literal["auto", "fp32", "bf16", "fp16", "tf32"] = option(
        "auto",
        "Autocast type; weights stay in fp32. tf32: fp32 with its products and convolutions in TF32 (CUDA). auto: on a GPU bf16 (fp16 where it has none); on a CPU fp32, or bf16 where "
        "it computes in that and a picture takes half a GFLOP or more. A resumed run keeps what was picked.",
    )
    layout: Literal["auto", "channels_last", "contiguous"] = option(
        "auto",
        "How feature maps lie in memory. auto: channels_last on a CPU, and in half types on a GPU.",
        free=True,
    )
    operator: Literal["auto", "fused", "eager"] = option(
        "auto",
        "Norm, modulation and SiLU in one pass over memory (fused: C++ on a CPU, Triton on a GPU), or in plain PyTorch (eager). "
        "auto: fused where it can be.",
        free=True,
    )
    compile: bool = option(
        False, "torch.compile for the repeated blocks; the first steps take minutes instead.", free=True
    )
    device: str = option(
        "auto",
        "auto: a CUDA GPU if there is one, else Apple's (mps), else the CPU; or cpu, cuda, cuda:1 (one process alone), mps.",
        free=True,
    )


@dataclass
class RunConfig:
    """A whole training run."""

    output_dir: str | None = option(None, "The run folder.", free=True)
    init_from: str | None = option(
        None,
        "Start from the weights of this run, pipeline folder or hub id: all that fits is kept, the class table is made anew.",
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    labels: dict | None = option(
        None, "The classes, as the run recorded them; the data must agree. Never written by hand."
    )


@dataclass
class NetworkConfig(ModelConfig):
    """AdaGNUNet's arguments, as they stand in the config.json of a network."""

    sample_size: int = option(32, "Side of the pictures in pixels.", minimum=1, maximum=2**13)
    in_channels: int = option(3, "Channels of the pictures.", minimum=1, maximum=4096)
    out_channels: int | None = option(None, "Unset: in_channels.", minimum=1, maximum=4096)
    num_classes: int | None = option(None, "K; unset or 0: no labels.", minimum=0, maximum=MOST_CLASSES)
    learned_variance: bool = option(False, "Twice the output channels, the second half for the variance.")


# ---------------------------------------------------------------------- reading


def fields_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted key, type, field) of every plain field, sections opened."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from fields_of(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", hints[f.name], f


def read_config(file: str | Path | None = None, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """The config of a YAML file or a recipe's name (or the defaults), with dotted overrides, which always win.

    Raises InputError for the file's faults and UsageError for the overrides'; both name the key and where it stood.
    """
    config = RunConfig()
    if file is not None:
        path = recipes.find(file)
        apply(config, flatten(_read_yaml(path)), where=f"in {path}")
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


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which lets the last of two equal keys win in silence, made to refuse them.

    Aliases are refused too, since a few lines of them are gigabytes once they are written out, and numbers of more than 100
    characters, whose value takes minutes.
    """

    def construct_mapping(self, node, deep=False):
        keys = Counter(k for k in (self.construct_object(key, deep=True) for key, _ in node.value) if _hashable(k))
        twice = next((k for k, count in keys.items() if count > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key '{twice}' stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"*{event.anchor} is an alias, write its value out{event.start_mark}")
        self.values = getattr(self, "values", 0) + 1
        if self.values > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES:,} values, too many to be settings")
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor):
        node = super().compose_scalar_node(anchor)
        if len(node.value) > 100 and not node.tag.endswith((":str", ":binary")):
            raise yaml.YAMLError(f"a number of {len(node.value)} characters{node.start_mark}")
        return node


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:  # PyYAML says so itself
        return False
    return True


def _read_yaml(path: Path) -> dict:
    values = _read(path, "YAML", MOST_YAML, lambda text: yaml.load(text, Loader=_Loader))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(
            f"{path} should hold sections (data:, model:, diffusion:, training:, speed:), not {type(values).__name__}."
        )
    return values


def read_json(file: Path, most: int = MOST_JSON) -> dict:
    """The object in a JSON file of at most that many bytes. Raises InputError for anything else."""
    if not file.is_file():
        raise InputError(f"{file} is missing.")
    values = _read(file, "JSON", most, json.loads)
    if not isinstance(values, dict):
        raise InputError(f"{file} is damaged: expected an object, not {type(values).__name__}.")
    return values


def _read(file: Path, kind: str, most: int, parse: Callable[[str], Any]) -> Any:
    try:
        with open(file, "rb") as handle:
            content = handle.read(most + 1)
        if len(content) > most:
            raise InputError(f"{file} has more than {most:,} bytes of {kind}, too many to be what is expected here.")
        values = parse(content.decode("utf-8"))
        if _is_deep(values):
            raise RecursionError
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{file} is no {kind} of ours: it nests more than {MOST_DEEP} levels deep.") from None
    except Exception as error:  # PyYAML lets KeyError, IndexError and others out for odd tags
        raise InputError(f"{file} is not {kind}: {' '.join(str(error).split())[:300]}") from None
    return values


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_DEEP):
        parts = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list | tuple)]
        level = [child for part in parts for child in part]
        if not level:
            return False
    return True


def flatten(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted keys; `labels` stays whole."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" != "labels":
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is None and not prefix and key in {"data", "model", "diffusion", "training"}:
            continue  # a section with nothing in it
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def apply(
    config: RunConfig | NetworkConfig | DiffusionConfig,
    flat: Mapping[str, Any],
    where: str,
    error: type[InputError] = InputError,
) -> None:
    """Write dotted keys into the config, each turned into its field's type."""
    known = {key: (hint, f) for key, hint, f in fields_of(type(config))}
    for key, value in flat.items():
        key = RENAMED.get(key, key)
        if key == "speed" and value == "auto" and "speed.layout" in known:
            config.speed = SpeedConfig()
            continue
        if key in {k.partition(".")[0] for k in known if "." in k}:
            auto = ", or auto" if key == "speed" else ""
            raise error(
                f"'{key}' is a section, such as '{key}:' with its settings below{auto}, not {said(value)} ({where})."
            )
        if key not in known:
            raise error(f"there is no setting {said(key)} ({where}).{nearest(key[:80], known)}")
        hint, f = known[key]
        try:
            value = _convert(value, hint)
            _check_range(value, f)
        except ValueError as wrong:
            raise error(f"{key}: {wrong} ({where}).") from None
        section, _, name = key.rpartition(".")
        setattr(getattr(config, section) if section else config, name, value)


def nearest(key: str, known: Mapping[str, Any]) -> str:
    """ " Did you mean ...?" with the keys of that name in other sections, then those that look most like this one."""
    near = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near += [k for k in difflib.get_close_matches(key, known, n=3, cutoff=0.6) if k not in near]
    return f" Did you mean {' or '.join(near[:3])}?" if near else " `adagn train --help` lists them all."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def said(value: Any) -> str:
    """A value as an error shows it: shortened before it is written out, since it may be anything."""
    return _REPR.repr(value)


def _convert(value: Any, hint: Any) -> Any:
    """A value from YAML, or a word of the command line, as the field's type. Raises ValueError saying what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint == int | float:
        number = _convert(value, float)
        return int(number) if number == int(number) else number
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return _convert(value, next(a for a in args if a is not type(None)))
    if hint is dict:
        if not isinstance(value, dict):
            raise ValueError("written by the run itself, not by hand")
        return value
    if origin is Literal:
        for choice in args:
            if str(value) == str(choice):
                return choice
        raise ValueError(f"expected {', '.join(map(str, args))}, got {said(value)}")
    if origin is tuple:
        if isinstance(value, str):
            value = [v for v in value.strip("[]() ").replace(" ", ",").split(",") if v]
        return tuple(_convert(v, args[0]) for v in (value if isinstance(value, list | tuple) else [value]))
    if hint is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise ValueError(f"expected true or false, got {said(value)}")
    if hint is str:
        if isinstance(value, bool):
            raise ValueError(
                f"expected a word, got {value!r}: YAML reads a bare yes/no/on/off as true/false, so quote it"
            )
        if isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str | int | float):
            raise ValueError(f"expected a word, got {said(value)}")
        if b"\0" in os.fsencode(str(value)):
            raise ValueError(f"expected a word, got {said(value)}")
        return str(value)
    # numbers: PyYAML reads 1e-4 as a string, so strings are converted too
    expected = "a whole number" if hint is int else "a number"
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        number = int(value) if hint is int and isinstance(value, int | str) and _is_int(value) else float(value)
        fits = math.isfinite(number) and (hint is float or (number == int(number) and abs(number) <= MOST_WHOLE))
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(f"expected {expected}, got {said(value)}")
    return hint(number)


def _is_int(value: int | str) -> bool:
    try:
        int(value)
    except ValueError:
        return False
    return True


def _check_range(value: Any, f: dataclasses.Field) -> None:
    low, high = f.metadata.get("minimum"), f.metadata.get("maximum")
    for v in value if isinstance(value, tuple) else (value,):
        if isinstance(v, int | float) and not isinstance(v, bool):
            if low is not None and v < low:
                raise ValueError(f"must be at least {low:g}, got {v:g}")
            if high is not None and v > high:
                raise ValueError(f"must be at most {high:g}, got {v:g}")


def check(config: RunConfig) -> None:
    """Combinations that are wrong whatever the data is. Raises InputError with the remedy."""
    from .models.cost import check_size

    d, m, t = config.diffusion, config.model, config.training
    if d.zero_snr and d.prediction == "eps":
        raise InputError(
            "diffusion.zero_snr with diffusion.prediction eps divides by zero at the last timestep, which is pure noise: "
            "eps says nothing of the image there. Set diffusion.prediction to v or x0."
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
            f"--device (speed.device): there is no device {said(config.speed.device)}; expected auto, cpu, cuda, cuda:1 or mps."
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
        if not f.metadata["free"] and a[key] != b[key]
    ]


def _short(value: Any) -> str:
    text = ", ".join(value["names"]) if isinstance(value, dict) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def type_name(hint: Any) -> str:
    """A field's type in a word, for --help."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint == int | float:
        return type_name(float)
    if origin in (typing.Union, types.UnionType):
        return type_name(next(a for a in args if a is not type(None)))
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is tuple:
        return f"{type_name(args[0])},..."
    return {int: "INT", float: "NUMBER", str: "TEXT", bool: "true|false"}[hint]
