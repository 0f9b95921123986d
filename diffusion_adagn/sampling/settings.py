"""The settings of sampling: of one sampler, and of `adagn sample`. Nothing heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, replace
from decimal import Decimal
from typing import Annotated, Any

from annotated_types import Ge, MinLen
from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from ..config import Sampler, Spacing, SpeedConfig
from ..diffusion.churn import Churn
from ..errors import InputError, UsageError
from ..labels import names_in_sums
from ..runs.weights import parse_ema
from ..schema import AS_GIVEN, Option, settings, short_repr
from .guidance import Guidance
from .negative import Negative
from .rules import Rule

MAX_RANGE = 1000  # numbers of one from:to:step


EMA_HELP = (
    "weights: those of an EMA of this length, a fraction of the run, such as 0.1 (adagn ema RUN compares lengths; runs and "
    "checkpoints only); raw: unaveraged; run: the EMA of training.ema_decay, which pipeline/ has"
)
Ema = Annotated[float | str, BeforeValidator(parse_ema), Field(description=EMA_HELP), Option(metavar="LENGTH|raw|run")]
GuideEma = Annotated[
    float | str | None, BeforeValidator(lambda value: None if value is None else parse_ema(value)),
    Field(description="the same for --guide"), Option(metavar="LENGTH|raw|run", default="that of --ema"),
]  # fmt: skip


def split_words(text: str, option: str) -> list[str]:
    """The words in "a,b", each once. Raises UsageError if there is none, or an empty one between commas."""
    if not text.strip():
        raise UsageError(f"{option} is empty.")
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f"{option}: expected values with single commas between them, got {short_repr(text)}.")
    return list(dict.fromkeys(words))


def parse_numbers(words: Any) -> Any:
    """The numbers in words such as "1", "2.5" and "1:4:0.5" (both ends included), each once."""
    values: list[float] = []
    for word in words if isinstance(words, tuple) else ():
        try:
            if not (isinstance(word, str) and ":" in word):
                values.append(float(word))
                continue
            first, last, step = map(Decimal, word.split(":"))
            count = (last - first) / step
            if count > MAX_RANGE:
                raise OverflowError
            if count < 0:
                raise ValueError
            values += [float(first + i * step) for i in range(int(count) + 1)]
        except OverflowError:
            raise ValueError(f"{word} has too many values: at most {MAX_RANGE:,} steps") from None
        except (TypeError, ValueError, ArithmeticError):
            raise ValueError(f"expected numbers such as 1,2,4 or from:to:step such as 1:4:1, got {word!r}") from None
    return tuple(dict.fromkeys(values)) if isinstance(words, tuple) else words


Numbers = Annotated[tuple[float, ...], BeforeValidator(parse_numbers), MinLen(1)]


def _churn(value: object) -> Churn | None:
    return value if isinstance(value, Churn | None) else Churn.parse(str(value))


@settings(frozen=True)
class SamplerSettings:
    """How a model is sampled."""

    guidance: Guidance = Guidance()
    guide: Annotated[str | None, Option(metavar="RUN")] = None
    """guide against this network instead of null: an earlier checkpoint of the run, a smaller run, one without classes"""
    sampler: Annotated[Sampler | None, Option(default="the model's: ddim, or dpm++ under edm and flow")] = None
    """the method that steps from noise to image"""
    steps: Annotated[int, Ge(1)] = 50
    """sampler steps"""
    eta: Annotated[float, Ge(0)] = 0.0
    """noise of ddim: 0 none, 1 as much as ddpm"""
    spacing: Annotated[Spacing | None, Option(default="the model's")] = None
    """grid of the steps. ddpm: leading, trailing, linspace, over the timesteps; karras, exponential and lu (the same), over
    noise levels, with dpm++, unipc, euler or heun. edm: karras, exponential. flow: these, linear and shifted"""
    churn: Annotated[Churn | None, BeforeValidator(_churn), PlainSerializer(str), WithJsonSchema({"type": "string"}),
                     Option(metavar="AMOUNT", default="none")] = None  # fmt: skip
    """noise added before steps, for euler and heun under edm (Karras et al. 2022, algorithm 2): S_churn, or
    S_churn:S_tmin:S_tmax:S_noise such as 40:0.05:50:1.003"""

    @property
    def name(self) -> str:
        """Short, unique, fit for a folder: g2_t200-800_ddim20_leading. Sampler and spacing must be set."""
        g = self.guidance
        words = [f"g{g.scale:g}" if float(f"{g.scale:g}") == g.scale else f"g{g.scale!r}"]
        words += [str(g.interval).replace(":", "")] * (g.interval is not None)
        words += [g.schedule.replace(":", "")] * (g.schedule != "constant")
        words += [f"phi{g.rescale:g}"] * (g.rescale != 0)
        words += [f"dt{g.threshold}"] * (g.threshold is not None)
        words += [str(g.rule).translate(str.maketrans(":=,", "---"))] * (g.rule != Rule())
        words += ["neg-" + re.sub(r"[^\w.-]+", "-", str(g.negative))] * (g.negative != Negative())
        words += ["guide"] * (self.guide is not None)
        words += [f"{self.sampler.replace('+', 'p')}{self.steps}"]
        words += [f"eta{self.eta:g}"] * (self.eta != 0)
        words += [f"churn{str(self.churn).replace(':', '-')}"] * (self.churn is not None)
        return "_".join([*words, self.spacing])

    def at_scale(self, scale: float) -> SamplerSettings:
        """The same settings at another guidance scale."""
        return replace(self, guidance=replace(self.guidance, scale=scale))

    def with_values(self, values: Mapping[str, Any]) -> SamplerSettings:
        """The settings with some values by dotted key, such as {"guidance.scale": 2, "steps": 10}."""
        own = {key: value for key, value in values.items() if not key.startswith("guidance.")}
        guidance = {key.removeprefix("guidance."): value for key, value in values.items() if key not in own}
        return replace(self, guidance=replace(self.guidance, **guidance), **own)

    def canonical(self) -> SamplerSettings:
        """The settings without those that have no effect: at scale 1 these are interval, schedule, rescale, rule, negative and guide."""
        if self.guidance.scale != 1:
            return self
        return replace(self, guidance=Guidance(1.0, threshold=self.guidance.threshold), guide=None)

    def to_dict(self) -> dict[str, Any]:
        """Flat, as plain JSON types."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        churn = own.pop("churn")
        own |= {} if churn is None else {"churn": str(churn)}
        return {"scale": own.pop("guidance").scale, **self.guidance.to_dict(), **own}


def scales_of(scales: Sequence[float] | None, w: Sequence[float] | None) -> tuple[float, ...]:
    """Guidance scales, each once, from --guidance or from --w (scale - 1).

    Raises:
        InputError: Both are given.
    """
    if scales is not None and w is not None:
        raise InputError("--guidance and --w both set the scale (scale = w + 1): give one of them.")
    return tuple(dict.fromkeys([round(one + 1, 12) for one in w] if w is not None else scales or (1.0,)))


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


@settings(frozen=True)
class SampleRequest:
    """What to sample: `count` images of each class at each scale; image i (class-major) has seed + i at every scale.

    With mixes, styles or interpolation, image j of each class, mix or style has seed + j, so that they share the noise.
    """

    classes: Annotated[str | None, AS_GIVEN, Option(default="all; none beside --mix and --style")] = None
    """names, ids, 'all', 'null' or files of learned classes, with commas between"""
    mixes: Annotated[tuple[str, ...], Option("mix", "PARTS")] = ()
    """one image of several classes, such as "cat@coarse,dog@fine": rules CLASS@WHERE separated by commas; later ones
    override, and a class without @ is the default. WHERE: coarse or fine (sites of a resolution at most, or above, the
    geometric middle of the network's), a resolution (8, 8x8, <=8, >8), depth<10, down, middle, up, a pattern of site
    names (up.*.stages.0*), a timestep (t>600), or several joined by &. May be given again: each is a row, below those
    of --classes, and every row starts from the same noises"""
    styles: Annotated[tuple[str, ...], Option("style", "SUM")] = ()
    """images of a sum of class vectors, such as "cat - dog + truck" or "0.5*cat + 0.5*dog"; "cat + 1.5*direction:1" moves
    along a principal direction (adagn style); also by sites as in --mix: "cat,0.5*cat + 0.5*dog@fine". May be given
    again, as --mix may"""
    psi: Annotated[str | None, AS_GIVEN, Option(metavar="NUMBER|WHERE:NUMBER", default="1")] = None
    """truncation of --classes and --style: 0 is the mean of all classes; or by site, such as coarse:0.5,fine:1"""
    interpolate: Annotated[str | None, AS_GIVEN, Option(metavar="CLASS,CLASS")] = None
    """from one class to another in place of --classes, a column per step; a row starts from one noise"""
    steps_between: Annotated[int | None, Ge(0), Option(default="7")] = None
    """columns between the two of --interpolate"""
    count: Annotated[int, Ge(1)] = 8
    """images per class and scale"""
    seed: Annotated[int, Ge(0)] = 0
    """image i (class-major) starts from the noise of seed + i; with --mix and --interpolate image j of each class from
    that of seed + j"""
    scales: Annotated[Numbers | None, Option("guidance", "NUMBER,...", "1")] = None
    """guidance scales: 1,2,4 or from:to:step such as 1:4:0.5; 1 is no guidance"""
    w: Annotated[Numbers | None, Option(metavar="NUMBER,...")] = None
    """w of the classifier-free guidance paper (scale - 1), instead of --guidance"""
    sampler: SamplerSettings = SamplerSettings()
    batch_size: Annotated[int | None, Ge(1), BeforeValidator(_auto), Option(metavar="INT|auto")] = 64
    """images per batch; auto: as many as fit in memory"""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    graph: bool = False
    """CUDA only: the network's calls as CUDA graphs; for small batches"""
    ema: Ema = "run"
    guide_ema: GuideEma = None
    npz: bool = False
    """also as samples.npz, which OpenAI's ADM evaluator reads"""
    overwrite: bool = False
    """replace the samples in the folder"""

    @model_validator(mode="after")
    def _check_plan(self) -> SampleRequest:
        between, others = self.interpolate is not None, bool(self.mixes or self.styles) or self.classes is not None
        if between and others:
            raise InputError(
                "--interpolate names its two classes itself: leave out --classes, --mix and --style, or sample twice."
            )
        if self.psi is not None and (between or self.mixes):
            raise InputError(
                "--psi truncates --classes and --style: leave out --mix and --interpolate, or sample twice."
            )
        if self.steps_between is not None and not between:
            example = "--interpolate cat,dog --steps_between 7"
            raise InputError(f"--steps_between belongs to --interpolate, such as {example}.")
        object.__setattr__(self, "scales", scales_of(self.scales, self.w))
        object.__setattr__(self, "w", None)
        return self

    @property
    def class_texts(self) -> tuple[str | None, ...]:
        """Everything in the request that may name a class."""
        names = names_in_sums(self.styles)
        return (self.classes, self.interpolate, *self.mixes, *names, self.sampler.guidance.negative.text)

    @property
    def same_seeds(self) -> bool:
        return bool(self.mixes or self.styles) or self.interpolate is not None
