"""The settings of `adagn sweep`, `adagn ema`, `adagn classify`, `adagn style` and `adagn ablate`. Nothing heavy is imported."""

import itertools
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen

from ..config import MAX_EMA_LENGTH, DataConfig, Device, Precision
from ..errors import InputError, UsageError
from ..evaluation.settings import EvalSettings
from ..sampling.settings import Ema, Numbers, SamplerSettings, parse_numbers, scales_of, split_words
from ..schema import AS_GIVEN, NO_OPTION, Layer, Option, build, settings

# The settings that may vary, as keys of SamplerSettings; the last one varies fastest.
AXES = (
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
TEXT_AXES = (
    "guidance.interval",
    "guidance.schedule",
    "guidance.rule",
    "guidance.negative",
    "sampler",
    "spacing",
)  # the others are numbers


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
        if key not in TEXT_AXES:
            try:
                words = [number for word in words for number in ([word] if word == "none" else parse_numbers((word,)))]
            except ValueError as error:
                raise UsageError(f"{labels[key]}: {error}.") from None
        axes[key] = tuple(None if word == "own" else word for word in words)
        for value in axes[key]:
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


@settings(frozen=True)
class SweepRequest(EvalSettings):
    """What to sweep: every combination of the values of the axes."""

    axes: Annotated[dict[str, tuple[Any, ...]], NO_OPTION] = field(default_factory=dict)
    """values of settings of the sampler, by key of SamplerSettings, such as {"guidance.scale": (1, 2), "steps": (10, 25)}"""
    w: Annotated[Numbers | None, Option(metavar="NUMBER,...")] = None
    """w of the classifier-free guidance paper (scale - 1), instead of --guidance"""
    sampler: Annotated[SamplerSettings, NO_OPTION] = SamplerSettings(steps=25)
    """the settings that do not vary"""
    shown: Annotated[int, Ge(1), NO_OPTION] = 4
    """images per class in the grid"""
    save_images: Annotated[bool, Option("keep")] = False
    """save each new point's images in its folder, as samples.npz in the ADM evaluator's format"""
    confirm: bool = False
    """measure the best settings again with fresh seeds"""

    def __post_init__(self) -> None:
        if unknown := set(self.axes) - set(AXES):
            raise InputError(f"there is no axis {min(unknown)!r}. Axes: {', '.join(AXES)}.")
        if self.w is not None:
            scales = scales_of(self.axes.get("guidance.scale"), self.w)
            object.__setattr__(self, "axes", self.axes | {"guidance.scale": scales})
            object.__setattr__(self, "w", None)

    def points(self) -> list[SamplerSettings]:
        """Every combination of the values."""
        keys = [key for key in AXES if key in self.axes]
        return [
            self.sampler.with_values(dict(zip(keys, values)))
            for values in itertools.product(*(self.axes[k] for k in keys))
        ]


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
    reach: Annotated[float, Gt(0)] = 2.0
    """largest amount, in standard deviations of the classes"""
    psi: Annotated[tuple[str, ...], Option(metavar="NUMBER|WHERE:NUMBER")] = ()
    """truncation: 1 is the class, 0 the mean of all classes; may be given again, each is a column. WHERE:NUMBER with commas
    between for some sites, such as coarse:0.5,fine:1"""
    styles: Annotated[tuple[str, ...], Option("style", "SUM")] = ()
    """a sum of class vectors, such as "cat - dog + truck" or "0.5*cat + 0.5*dog@fine,cat"; may be given again, each is a
    row"""
    classes: Annotated[str | None, AS_GIVEN, Option(default="all, at most 10; none beside --style")] = None
    """the rows: names, ids, 'all'"""
    count: Annotated[int, Ge(1)] = 4
    """images per class or sum, where no direction is shown: each is a column"""
    seed: Annotated[int, Ge(0)] = 0
    """seed of the noise"""
    sampler: SamplerSettings = SamplerSettings(steps=25)
    ema: Ema = "run"
    precision: Precision = "auto"
    """autocast type of the network; auto: bf16 on a CUDA GPU that supports it, else fp32"""
    device: Device = "auto"


@settings(frozen=True)
class AblateRequest:
    """What `adagn ablate` trains: a run for every kind of conditioning and every seed."""

    kinds: Annotated[str, Option(metavar="KIND,...|all")] = "all"
    """kinds of conditioning, separated by commas, or all"""
    seeds: Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)] = (0, 1)
    """seeds, separated by commas"""
    dry_run: bool = False
    """print the runs and their costs, and exit"""
