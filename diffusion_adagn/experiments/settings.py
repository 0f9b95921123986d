"""The settings of `adagn sweep`, `adagn ema`, `adagn classify`, `adagn style` and `adagn ablate`. Nothing heavy is imported."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BeforeValidator, Field

from ..config import MAX_EMA_LENGTH, DataConfig, Device, Precision
from ..errors import InputError, UsageError
from ..evaluation.settings import EvalConfig
from ..labels import names_in_sums
from ..runs.weights import parse_ema
from ..sampling.settings import EMA_HELP, Ema, Numbers, SamplerSettings, parse_numbers, scales_of, split_words
from ..schema import AS_GIVEN, NO_OPTION, Layer, Option, build, settings

AUTO = "auto"  # among intervals: those that `experiments.intervals` finds, and none
# The settings that may vary, as keys of SamplerSettings; the last one varies fastest.
AXES = (
    "guide",
    "churn",
    "spacing",
    "sampler",
    "steps",
    "eta",
    "guidance.threshold",
    "guidance.schedule",
    "guidance.rescale",
    "guidance.rule",
    "guidance.negative",
    "guidance.interval",
    "guidance.scale",
)
NUMBER_AXES = ("steps", "eta", "guidance.threshold", "guidance.rescale", "guidance.scale")  # the others are texts


def parse_axes(texts: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, tuple[Any, ...]]:
    """The values of axes in texts such as {"guidance.scale": "1:4:0.5", "sampler": "own,heun"}; "own" is None.

    Args:
        texts: By key of SamplerSettings.
        labels: What messages call the keys.

    Raises:
        UsageError: A value is invalid.
    """
    axes: dict[str, tuple[Any, ...]] = {}
    for key, text in texts.items():
        words: list[Any] = split_words(text, labels[key])
        if key == "guidance.rule":
            words = rule_words(words)
        if key in NUMBER_AXES:
            try:
                words = [number for word in words for number in ([word] if word == "none" else parse_numbers((word,)))]
            except ValueError as error:
                raise UsageError(f"{labels[key]}: {error}.") from None
        axes[key] = tuple(None if word == "own" else word for word in words)
        for value in axes[key]:
            if (key, value) == ("guidance.interval", AUTO):
                continue
            build(SamplerSettings, Layer({key: value}, error=UsageError, labels=labels))
    return axes


def rule_words(words: list[str]) -> list[str]:
    """The rules in ["cfg", "apg:eta=0", "r=1"]: a word such as r=1 is a parameter of the rule before it."""
    rules: list[str] = []
    for word in words:
        if rules and "=" in word and ":" not in word:
            rules[-1] += f",{word}"
        else:
            rules.append(word)
    return rules


def _emas(words: Any) -> Any:
    """EMA lengths in words such as "0.1", "0.02:0.2:0.03" and "raw", each once."""
    if not isinstance(words, tuple):
        return words
    words = [one for word in words for one in (parse_numbers((word,)) if ":" in str(word) else (word,))]
    return tuple(dict.fromkeys(map(parse_ema, words)))


def parse_time(text: str) -> float:
    """Seconds in "90s", "30m" or "1.5h". Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([smh])\s*", text)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"expected a time such as 90s, 30m or 2h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _steps(words: Any) -> Any:
    for word in words if isinstance(words, tuple) else ():
        if word != "*" and not str(word).isdecimal():
            raise ValueError(f"expected steps such as 200,400, or *, which is all checkpoints, got {word!r}")
    return words


def _budget(value: Any) -> Any:
    return parse_time(value) if isinstance(value, str) else value


Emas = Annotated[tuple[float | str, ...], BeforeValidator(_emas)]


@settings(frozen=True)
class SweepRequest(EvalConfig):
    """What to sweep: every combination of the values of the axes."""

    axes: Annotated[dict[str, tuple[Any, ...]], NO_OPTION] = field(default_factory=dict)
    """values of settings of the sampler, by key of SamplerSettings, such as {"guidance.scale": (1, 2), "steps": (10, 25)}"""
    w: Annotated[Numbers | None, Option(metavar="NUMBER,...")] = None
    """w of the classifier-free guidance paper (scale - 1), instead of --guidance"""
    sampler: Annotated[SamplerSettings, NO_OPTION] = SamplerSettings(steps=25)
    """the settings that do not vary"""
    ema: Annotated[
        Emas, MinLen(1), Field(description=f"{EMA_HELP}; several: 0.05,0.1,raw or from:to:step such as 0.02:0.2:0.03"),
        Option(metavar="LENGTH|raw|run,...", default="run"),
    ] = ("run",)  # fmt: skip
    guide_ema: Annotated[Emas, Option(metavar="LENGTH|raw|run,...", default="that of --ema")] = ()
    """the same for guides that --guide names without an EMA length"""
    checkpoint: Annotated[
        tuple[str, ...], BeforeValidator(_steps), Option(metavar="STEP,...|*", default="the newest weights")
    ] = ()
    """checkpoints of the runs by their steps, or *, which is all; RUN@400 and RUN@* are the same for one run"""
    shown: Annotated[int, Ge(1), NO_OPTION] = 4
    """images per class in the grid"""
    save_images: Annotated[bool, Option("keep")] = False
    """save each new point's images in its folder, as samples.npz in the ADM evaluator's format"""
    rank: bool = False
    """rank several runs, unguided and each at its best guidance: adds scale 1 and a table to the report"""
    heat_map: Annotated[
        tuple[str, ...], Option(metavar="SETTING,SETTING", default="scale and the next one that varies")
    ] = ()
    """two settings that vary, for the heat map of the report: such as scale,ema; scale,rule; checkpoint,guide"""
    save_features: Annotated[bool, Option("features")] = False
    """save the features of every image in its point's folder, and those of the reference"""
    earlier: bool = False
    """report the finished points of earlier commands in the folder too"""
    budget: Annotated[float | None, BeforeValidator(_budget), Option(metavar="TIME")] = None
    """sample within this time, such as 90s, 30m or 2h: by successive halving, the poorer half of the points is dropped in each
    round and the others get more images, at most --count"""
    confirm: bool = False
    """measure the best settings again with fresh seeds"""

    def __post_init__(self) -> None:
        if unknown := set(self.axes) - set(AXES):
            raise InputError(f"there is no axis {min(unknown)!r}. Axes: {', '.join(AXES)}.")
        if self.w is not None:
            scales = scales_of(self.axes.get("guidance.scale"), self.w)
            object.__setattr__(self, "axes", self.axes | {"guidance.scale": scales})
            object.__setattr__(self, "w", None)
        if self.rank:
            scales = self.axes.get("guidance.scale", (self.sampler.guidance.scale,))
            object.__setattr__(self, "axes", self.axes | {"guidance.scale": tuple(dict.fromkeys([1.0, *scales]))})
        if len(self.heat_map) not in (0, 2):
            raise InputError(f"--heat_map takes two settings, such as scale,ema, and not {len(self.heat_map)}.")

    @property
    def finds_intervals(self) -> bool:
        """Whether intervals are to be found."""
        return AUTO in self.axes.get("guidance.interval", ())

    def with_intervals(self, found: Sequence[str]) -> "SweepRequest":
        """The request with these intervals, and none, in place of the word auto."""
        given = self.axes.get("guidance.interval", ())
        intervals = dict.fromkeys(i for word in given for i in (("none", *found) if word == AUTO else (word,)))
        return replace(self, axes=self.axes | {"guidance.interval": tuple(intervals)}) if intervals else self


@settings(frozen=True)
class EmaRequest:
    """What `adagn ema` compares."""

    lengths: Annotated[Numbers | None, Option(metavar="NUMBER,...", default="about a dozen of those possible")] = None
    """EMA lengths, as fractions of the run: 0.05,0.1 or from:to:step such as 0.02:0.2:0.02"""
    precision: Precision = "auto"
    """autocast type of the network; auto: bf16 on a CUDA GPU that supports it, else fp32"""
    device: Device = "auto"

    def __post_init__(self) -> None:
        for length in self.lengths or ():
            if not 0 < length <= MAX_EMA_LENGTH:
                raise InputError(f"--lengths: expected lengths above 0 and at most {MAX_EMA_LENGTH:g}, got {length:g}.")


@settings(frozen=True)
class ClassifyRequest:
    """What `adagn classify` classifies."""

    ema: Ema = "run"
    images: Annotated[str | None, Option(metavar="PATH", default="held-out images of the run's own data")] = None
    """an image, or a folder of images, of unknown class"""
    data: Annotated[DataConfig | None, NO_OPTION] = None
    """source of labelled images; None: the run's own data"""
    count: Annotated[int, Ge(1)] = 500
    """labelled images at most, evenly spread"""
    draws: Annotated[int, Ge(4), Le(4096)] = 64
    """noisy versions of each image at most"""
    precision: Precision = "auto"
    """autocast type of the network; auto: bf16 on a CUDA GPU that supports it, else fp32"""
    device: Device = "auto"


@settings(frozen=True)
class StyleRequest:
    """What `adagn style` shows. Every row of a sheet starts from one noise."""

    directions: Annotated[
        tuple[Annotated[int, Ge(1)], ...], Option("direction", "NUMBER,...", "1,2,3; none beside --style and --psi")
    ] = ()
    """principal directions of the classes, from 1 (the largest difference); a sheet for each, of classes by amounts"""
    of: Literal["class", "modulation"] = "class"
    """what the directions are of: class vectors, or the parameters of all sites"""
    columns: Annotated[int, Ge(2), Le(32)] = 7
    """amounts of a direction, evenly spread from -reach to reach"""
    reach: Annotated[float, Gt(0), Le(10)] = 2.0
    """largest amount, in standard deviations of the classes"""
    psi: Annotated[tuple[str, ...], Option(metavar="NUMBER|WHERE:NUMBER")] = ()
    """truncation: 1 is the class, 0 the mean of all classes; may be given again, each is a column. WHERE:NUMBER with commas
    between for some sites, such as coarse:0.5,fine:1"""
    styles: Annotated[tuple[str, ...], Option("style", "SUM")] = ()
    """a sum of class vectors, such as "cat - dog + truck" or "0.5*cat + 0.5*dog@fine,cat"; may be given again, each is a
    row"""
    classes: Annotated[str | None, AS_GIVEN, Option(default="all, at most 10; none beside --style")] = None
    """the rows: names, ids, 'all' or files of learned classes"""
    count: Annotated[int, Ge(1)] = 4
    """images per class or sum, where no direction is shown: each is a column"""
    seed: Annotated[int, Ge(0)] = 0
    """seed of the noise"""
    scale: Annotated[Annotated[float, Ge(0)] | None, Option("guidance", "NUMBER", "1")] = None
    """guidance scale; 1 is no guidance. In Python, None is that of `sampler`"""
    sampler: SamplerSettings = SamplerSettings(steps=25)
    ema: Ema = "run"
    precision: Precision = "auto"
    """autocast type of the network; auto: bf16 on a CUDA GPU that supports it, else fp32"""
    device: Device = "auto"

    @property
    def class_texts(self) -> tuple[str | None, ...]:
        """Everything in the request that may name a class."""
        return (self.classes, *names_in_sums(self.styles), self.sampler.guidance.negative.text)


@settings(frozen=True)
class AblateRequest:
    """What `adagn ablate` trains: a run for every kind of conditioning and every seed."""

    kinds: Annotated[str, Option(metavar="KIND,...|all")] = "all"
    """kinds of conditioning, separated by commas, or all"""
    seeds: Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)] = (0, 1)
    """seeds, separated by commas"""
    dry_run: bool = False
    """print the runs and their costs, and exit"""
