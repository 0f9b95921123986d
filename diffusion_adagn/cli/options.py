"""The parser and options that commands share.

Dashes equal underscores; an unknown option is answered with the nearest one.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, NoReturn, get_args

from ..config import SPACINGS, RunConfig, SpeedConfig
from ..errors import UsageError
from ..renamed import CONFIG_KEYS, OPTIONS
from ..schema import fields_of, type_name

SAMPLERS = ("ddpm", "ddim", "dpm++", "unipc", "euler", "heun")
FOREIGN_OPTIONS = {  # option of other software -> candidates here; the first that the command has is suggested
    **dict.fromkeys(("cfg", "cfg_scale", "cfg_weight", "guidance_scale"), ("guidance", "training.preview_guidance")),
    **dict.fromkeys(("num_inference_steps", "num_steps", "sampling_steps"), ("steps", "training.preview_steps")),
    **dict.fromkeys(
        ("num_images", "num_samples", "n_samples", "num_images_per_class", "num_images_per_prompt"), ("count",)
    ),
    **dict.fromkeys(("class", "class_labels", "label", "labels"), ("classes",)),
    **dict.fromkeys(("output", "output_dir", "outdir"), ("out",)),
    "scheduler": ("sampler",),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError instead of exiting, and suggests the nearest option."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args([self._canonical(word) for word in argv])
        for action in self._actions:  # argparse accepts an optional positional argument only before the first option
            has_late_argument = unknown and not unknown[0].startswith("-")
            if (
                has_late_argument
                and not action.option_strings
                and action.nargs == "?"
                and getattr(args, action.dest) is None
            ):
                setattr(args, action.dest, unknown.pop(0))
        if unknown:
            hint = self._hint(unknown[0].partition("=")[0]) or f" `{self.prog} --help` lists the options."
            raise UsageError(f"{self.prog} does not know '{unknown[0]}'.{hint}")
        return args

    def _canonical(self, word: str) -> str:
        """The option with underscores instead of dashes, and with its new name instead of an old one."""
        if not word.startswith("--"):
            return word
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        new = (CONFIG_KEYS | OPTIONS).get(name)
        known = new is not None and f"--{name}" not in self._option_string_actions
        return f"--{new if known and f'--{new}' in self._option_string_actions else name}{equals}{value}"

    def _hint(self, option: str) -> str:
        known = [o for action in self._actions for o in action.option_strings]
        same = [f"--{o}" for o in FOREIGN_OPTIONS.get(option.lstrip("-"), ()) if f"--{o}" in known][:1]
        same = same or [o for o in known if o.rpartition(".")[2] == option.lstrip("-")]  # without its section
        near = same or difflib.get_close_matches(option, known, n=2)
        return f" Did you mean {' or '.join(near)}?" if near else ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """The check of argparse, with the nearest choice in its message."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, unknown_choice(str(value), action.choices))

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}. `{self.prog} --help` lists the options.")


def unknown_choice(word: str, choices: Iterable[str]) -> str:
    """The error message for a word that is not among the choices, with the nearest choice."""
    choices = list(map(str, choices))
    same_start = [c for c in choices if c[:3] == word.lower()[:3]]  # dpm, dpmpp, dpmsolver: dpm++
    near = same_start[:1] or difflib.get_close_matches(word.lower(), choices, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"there is no '{word}'. {hint}Choices: {', '.join(choices)}"


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=118)


def add_config_options(parser: argparse.ArgumentParser, sections: Sequence[str] = ()) -> None:
    """An option for every config field, with the field's help. Values stay strings until config.py parses them."""
    docs = {
        f.name: f.default_factory for f in dataclasses.fields(RunConfig) if f.default_factory is not dataclasses.MISSING
    }
    groups = {}
    for key, hint, f in fields_of(RunConfig):
        section = key.rpartition(".")[0]
        if key == "labels" or (sections and section not in sections):
            continue
        if section not in groups:
            title = f"{section}.*" if section else "run"
            groups[section] = parser.add_argument_group(title, docs[section].__doc__ if section else None)
        flag = {"nargs": "?", "const": "true"} if hint is bool else {}
        groups[section].add_argument(
            f"--{key}",
            dest=key,
            default=argparse.SUPPRESS,
            metavar=type_name(hint),
            help=_help(f),
            **flag,
        )


def add_config_file(parser: argparse.ArgumentParser) -> None:
    """The config file, as an argument or as --config; `config_file` reads it."""
    parser.add_argument(
        "config_argument",
        nargs="?",
        metavar="CONFIG",
        help="a YAML file, or the name of a recipe, such as digits (adagn init lists them)",
    )
    parser.add_argument("--config", metavar="CONFIG", help="the same")


def config_file(args: argparse.Namespace) -> str | None:
    """The config given as argument or as --config. Raises UsageError for two different ones."""
    argument, option = args.config_argument, args.config
    if None not in (argument, option) and argument != option:
        raise UsageError(f"two configs were given, {argument} and --config {option}: give one.")
    return option if argument is None else argument


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """RUN and --weights, for `sampling.load.open_pipeline`."""
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run folder (runs/digits), one of its checkpoints, a pipeline folder, or owner/name on the hub",
    )
    parser.add_argument(
        "--weights", choices=["ema", "raw"], default="ema", help="raw: the unaveraged weights of a checkpoint [ema]"
    )


def config_overrides(args: argparse.Namespace) -> dict[str, str]:
    """The config options that were given, by dotted key."""
    known = {key for key, _, _ in fields_of(RunConfig)}
    return {key: value for key, value in vars(args).items() if key in known}


def _help(f: dataclasses.Field) -> str:
    """The help of a field, and its default."""
    default = f.default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    elif isinstance(default, bool):
        default = str(default).lower()
    return (f.metadata["help"] + ("" if default is None else f" [{default}]")).replace("%", "%%")


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """The options of one sampler. (A sweep accepts lists instead.)"""
    parser.add_argument(
        "--steps", "--num_inference_steps", type=int, default=50, metavar="INT", help="sampler steps [50]"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help="[the model's: ddim]")
    parser.add_argument(
        "--eta", type=float, default=0.0, metavar="NUMBER", help="noise of ddim: 0 none, 1 as much as ddpm [0]"
    )
    parser.add_argument(
        "--spacing",
        choices=SPACINGS,
        help="timestep spacing; karras, exponential and lu (the same) need dpm++, unipc, euler or heun [the model's]",
    )


def add_speed_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options of config section `speed`, without the prefix. Read by `speed_of`."""
    group = parser.add_argument_group(
        "speed", "how the model is computed; auto chooses for this machine, and the choice is printed"
    )
    for key, hint, f in fields_of(SpeedConfig):
        kwargs = {"action": "store_true"} if hint is bool else {"default": f.default}
        kwargs |= {"choices": get_args(hint)} if get_args(hint) else {}
        kwargs |= {"metavar": "DEVICE"} if key == "device" else {}
        group.add_argument(f"--{key}", help=_help(f), **kwargs)
    return group


def add_device_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup, config: bool = False) -> None:
    """--device, with the help of speed.device. config: make it an alias of that config option."""
    (f,) = (f for key, _, f in fields_of(SpeedConfig) if key == "device")
    kwargs = {"dest": "speed.device", "default": argparse.SUPPRESS} if config else {"default": f.default}
    parser.add_argument("--device", metavar="DEVICE", help=_help(f), **kwargs)


def speed_of(args: argparse.Namespace) -> SpeedConfig:
    return SpeedConfig(**{key: getattr(args, key) for key, _, _ in fields_of(SpeedConfig)})


def add_guidance_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The guidance options. `guidance_scales`, `number` and `split_words` read them. several: accept lists (sweep)."""
    many = ", separated by commas" if several else ""
    group = parser.add_argument_group("guidance", "pred = null + scale * (cond - null); the defaults change nothing")
    group.add_argument(
        "--guidance",
        "--guidance_scale",
        metavar="NUMBER,...",
        help="guidance scales: 1,2,4 or from:to:step such as 1:4:0.5; 1 is no guidance [1]",
    )
    group.add_argument(
        "--w", metavar="NUMBER,...", help="w of the classifier-free guidance paper (scale - 1), instead of --guidance"
    )
    group.add_argument(
        "--interval",
        default="none",
        metavar="FROM-TO",
        help="where guidance is on: t:200-800 (timesteps, high is noise), sigma:0.3-5 (noise levels), "
        "steps:4-14 (sampler steps, 0 is the noisiest), 0.2-0.8 (a fraction of the timesteps), "
        f"none: everywhere{many} [none]",
    )
    group.add_argument(
        "--guidance_schedule",
        default="constant",
        metavar="SHAPE",
        help="how the scale changes from noise to image: constant, linear, cosine, cosine:4 (MDT's power-cosine), "
        f"power:2{many} [constant]",
    )
    group.add_argument(
        "--rescale",
        default="0",
        metavar="PHI",
        help=f"rescale towards the standard deviation of the unguided prediction, 0..1{many} [0]",
    )
    group.add_argument(
        "--threshold",
        default="none",
        metavar="FRACTION",
        help=f"dynamic thresholding of x0 instead of clipping, such as 0.995{many} [none]",
    )
    group.add_argument(
        "--guide",
        metavar="RUN",
        help="guide against this network instead of null: an earlier checkpoint of the run, a smaller run, one "
        "without classes",
    )


def add_measure_options(parser: argparse.ArgumentParser) -> None:
    """The options of a measurement: reference images, extractor, metrics."""
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--against",
        metavar="NAME_OR_PATH[:split]",
        help="the reference images [the training part of the run's data]",
    )
    group.add_argument(
        "--extractor",
        default="classifier",
        metavar="SPEC",
        help="network whose features are compared: classifier (trained on your data at first use), "
        "sklearn (images up to 16x16), inception[:WEIGHTS] (the network of FID), dinov2:PATH, efficientnet:PATH, "
        "package.module:attribute, none (no metric) [classifier]",
    )
    group.add_argument(
        "--classifier",
        choices=["auto", "none"],
        default="auto",
        help="auto: if the extractor does not know the classes, a classifier of your data measures accuracy [auto]",
    )
    group.add_argument(
        "--reference_count",
        type=int,
        default=10_000,
        metavar="INT",
        help="maximum number of reference images [10000]",
    )
    group.add_argument(
        "--k",
        type=int,
        default=5,
        metavar="INT",
        help="number of neighbours for precision, recall, density, coverage [5]",
    )
    group.add_argument("--batch_size", type=int, default=64, metavar="INT", help="images per batch [64]")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16", "tf32"],
        default="auto",
        help="autocast type of the network; auto: bf16 on a CUDA GPU that supports it, else fp32; an existing sweep "
        "continues with its first type; tf32: fp32 with matrix products and convolutions in TF32 (CUDA) [auto]",
    )
    add_device_option(group)


def guidance_scales(args: argparse.Namespace) -> list[float]:
    """The scales of --guidance, or of --w (scale - 1). Each once, in the given order."""
    if args.guidance is not None and args.w is not None:
        raise UsageError("--guidance and --w both set the scale (scale = w + 1): give one of them.")
    if args.w is not None:
        return [round(w + 1, 12) for w in numbers(args.w, "--w")]
    return numbers("1" if args.guidance is None else args.guidance, "--guidance")


def numbers(text: str, option: str, number_type: type = float) -> list:
    """The numbers in "1,2,4" or "1:4:0.5" (both ends included) or a mix of these. Each once. Raises UsageError."""
    values = []
    try:
        for word in (w.strip() for w in text.split(",") if w.strip()):
            if ":" not in word:
                values.append(number_type(word))
                continue
            first, last, step = (Decimal(part) for part in word.split(":"))
            count = (last - first) / step
            if not 0 <= count <= 1000:
                raise ValueError
            values += [number_type(first + i * step) for i in range(int(count) + 1)]
    except (ValueError, ArithmeticError):
        raise UsageError(
            f"{option} takes {'whole ' if number_type is int else ''}numbers such as 1,2,4 or from:to:step such as "
            f"1:4:1, not '{text}'."
        ) from None
    if not values:
        raise UsageError(f"{option} needs at least one number, such as 1,2,4.")
    return list(dict.fromkeys(values))


def number(text: str, option: str, none: bool = False) -> float | None:
    """One number. With `none`, the word "none" returns None. Raises UsageError."""
    if none and text.strip().lower() == "none":
        return None
    values = numbers(text, option)
    if len(values) > 1:
        raise UsageError(f"{option} takes one number here, not '{text}'; adagn sweep takes several.")
    return values[0]


def split_words(text: str, option: str) -> list[str]:
    """The words in "a,b", each once. Raises UsageError if there is none."""
    words = list(dict.fromkeys(w.strip() for w in text.split(",") if w.strip()))
    if not words:
        raise UsageError(f"{option} is empty.")
    return words
