"""Guidance: how far to move from a second prediction, and when.

    pred = uncond + scale * (cond - uncond)

`uncond` is the prediction of the same network for the null label (classifier-free guidance, Ho & Salimans 2022), or of a
weaker network for the same class (autoguidance, Karras et al. 2024). Scale 1 is no guidance. The paper's w is scale - 1.
All defaults of `Guidance` are neutral.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from ..errors import InputError, reject_first
from ..schema import Option, settings
from .negative import Negative
from .rules import MIN_ALPHA, PLAIN, RULES, Rule

if TYPE_CHECKING:
    from torch import Tensor

    from ..diffusion.process import Process
    from ..diffusion.schedule import ModelEval
    from ..labels import LabelSpace
    from .rules import Evaluation

ROUNDING = 1e-6  # of a noise level: sampling from sigma 80 starts at 80.00000000000001
UNITS = ("sigma", "t", "steps", "share")
NUMBER = r"\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+|inf"
INTERVAL = re.compile(rf"(?:(t|sigma|steps):)?\s*({NUMBER})\s*-\s*({NUMBER})", re.IGNORECASE)


@dataclass(frozen=True)
class Interval:
    """The part of sampling in which guidance is applied, both ends included (Kynkaanniemi et al. 2024).

    Args:
        unit: "sigma", the noise level sigma_t / alpha_t; "t", the timestep, 0 (clean) to T - 1 under ddpm, to 1000 under
            flow (edm has none); "steps", the sampler's step, 0 the noisiest; "share", from 0 (clean) to 1: t / T, under
            flow t / 1000, under edm the place of sigma^(1/7).
        low: smallest value in the interval.
        high: largest value in the interval.

    Raises:
        InputError: there is no such unit, or the ends are in the wrong order.
    """

    unit: str
    low: float
    high: float

    def __post_init__(self) -> None:
        span = f"{self.low:g}-{self.high:g}"
        faults = {
            f"the unit of an interval is one of {', '.join(UNITS)}, not {self.unit!r}": self.unit not in UNITS,
            f"the interval {span} ends before it begins: write the smaller number first": not self.low <= self.high,
            f"'{span}' without a unit is a fraction of the way from image to noise, 0 to 1: write sigma:{span}, t:{span} or steps:{span}": (
                self.unit == "share" and self.high > 1
            ),
        }
        reject_first(faults, "", ".")

    @classmethod
    def parse(cls, text: str) -> Interval | None:
        """ "sigma:0.3-5", "t:200-800", "steps:4-14", "0.2-0.8" (a fraction from image to noise); "none" is None: all steps."""
        if text.strip().lower() == "none":
            return None
        match = INTERVAL.fullmatch(text.strip())
        if text.strip().lower() == "auto":
            raise InputError(
                "the interval auto is found by sweeping: adagn sweep RUN --guidance 1:3:0.5 --interval auto."
            )
        if match is None:
            raise InputError(
                f"'{text}' is not an interval. Expected sigma:0.3-5 (noise levels), t:200-800 (timesteps), steps:4-14 (the sampler's steps, "
                "0 the noisiest), 0.2-0.8 (a fraction of the way from image to noise), or none."
            )
        unit, low, high = (match[1] or "share").lower(), float(match[2]), float(match[3])
        return cls(unit, low, high)

    def __str__(self) -> str:
        return f"{'' if self.unit == 'share' else self.unit + ':'}{self.low:g}-{self.high:g}"

    def contains(self, call: ModelEval) -> bool:
        """Whether a network evaluation is in the interval."""
        value = {"t": call.t, "sigma": call.sigma, "steps": call.step, "share": call.share}[self.unit]
        slack = ROUNDING * value if self.unit == "sigma" and value < math.inf else 0
        return self.low <= value + slack and value - slack <= self.high


def _scales(scale: float | Sequence[float]) -> float | tuple[float, ...]:
    if hasattr(scale, "reshape"):  # arrays and tensors
        scale = scale.reshape(-1).tolist()
        scale = scale[0] if len(scale) == 1 else scale
    try:
        if isinstance(scale, str | bool):
            raise ValueError
        scales = tuple(float(s) for s in scale) if isinstance(scale, Iterable) else (float(scale),)
        valid = all(0 <= s < math.inf for s in scales)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise InputError(
            f"a guidance scale is a number of at least 0 (1 means no guidance), or a list with one per image, not {scale!r}."
        )
    return scales if isinstance(scale, Iterable) else scales[0]


def _interval(interval: object) -> Interval | None:
    return interval if isinstance(interval, Interval | None) else Interval.parse(str(interval))


def _rule(rule: object) -> Rule:
    return rule if isinstance(rule, Rule) else Rule.parse(str(rule))


def _negative(negative: object) -> Negative:
    return negative if isinstance(negative, Negative) else Negative(str(negative).strip())


RULE_HELP = (
    f"how the two predictions are combined: cfg (plain guidance), {', '.join(RULES)}, with parameters such as "
    "apg:eta=0,r=0.5 (docs/guidance.md)"
)


def _checked_schedule(schedule: str) -> str:
    _shape(schedule)
    return schedule


@settings(frozen=True)
class Guidance:
    """pred = null + scale * (cond - null); the defaults change nothing.

    Raises:
        InputError: a value is out of range.
    """

    scale: Annotated[float | tuple[float, ...], BeforeValidator(_scales), Option("guidance", "NUMBER")] = 1.0
    """guidance scale of at least 0, 1 is no guidance; several: 1,2,4 or from:to:step such as 1:4:0.5. In Python one number,
    or one per image; see `from_w`"""
    interval: Annotated[
        Interval | None, BeforeValidator(_interval), PlainSerializer(str), WithJsonSchema({"type": "string"}),
        Option(metavar="FROM-TO", default="none"),
    ] = None  # fmt: skip
    """where guidance is on: sigma:0.3-5 (noise levels sigma_t / alpha_t), t:200-800 (timesteps, high is noise; not under
    process edm), steps:4-14 (sampler steps, 0 is the noisiest), 0.2-0.8 (a fraction of the way from image to noise),
    none: everywhere"""
    schedule: Annotated[str, AfterValidator(_checked_schedule), Option("guidance_schedule", "SHAPE")] = "constant"
    """how the scale increases from noise to image: constant, linear, cosine, cosine:P (MDT's power-cosine), power:P, exp:L. It is
    1 + (scale - 1) f with u from 0 (image) to 1 (noise), t / T under ddpm: f = 1; 1 - u; (1 + cos(pi u)) / 2; (1 - cos(pi (1 - u)^P)) / 2;
    (1 - u)^P (Wang et al. 2024); exp(-L u) (C2FG)"""
    rescale: Annotated[float, Ge(0), Le(1), Option(metavar="PHI")] = 0.0
    """rescale towards the standard deviation of the conditional prediction, 0..1 (Lin et al. 2023, section 3.4)"""
    threshold: Annotated[float | None, Gt(0), Le(1), Option(metavar="FRACTION", default="none")] = None
    """dynamic thresholding of x0 instead of clipping: a fraction, such as 0.995 (Imagen, section 2.3)"""
    rule: Annotated[
        Rule, BeforeValidator(_rule), PlainSerializer(str), WithJsonSchema({"type": "string"}),
        Field(description=RULE_HELP, json_schema_extra={"default": "cfg"}), Option(metavar="RULE", default="cfg"),
    ] = Rule()  # fmt: skip
    negative: Annotated[
        Negative, BeforeValidator(_negative), PlainSerializer(str), WithJsonSchema({"type": "string"}),
        Field(json_schema_extra={"default": "null"}),
        Option(metavar="CLASS", default="null"),
    ] = Negative()  # fmt: skip
    """what guidance moves away from, without --guide: null; a class; random, a class drawn for each image and step (ICG, Sadat et
    al. 2024); time:0.5, the same class at a wrong noise level, ln sigma + 0.5 (after TSG, ibid.)"""
    guide: InitVar[SkipJsonSchema[object]] = None  # deprecated: pass `guide` to the pipeline call

    def __post_init__(self, guide: object) -> None:
        if guide is not None:
            warnings.warn(
                "Guidance(guide=) is deprecated: pass guide to the pipeline call.", DeprecationWarning, stacklevel=3
            )
            object.__setattr__(self, "_guide", guide)

    @classmethod
    def from_w(cls, w: float | Sequence[float], **settings) -> Guidance:
        """Guidance from the paper's w, pred = (1 + w) cond - w null, which is scale = 1 + w.

        Args:
            w: one number, or one per image.
            settings: the other arguments of Guidance.
        """
        return cls(scale=[1 + one for one in w] if isinstance(w, Iterable) else 1 + w, **settings)

    def scales(self, count: int) -> Tensor:
        """One scale per image, float32 [count].

        Args:
            count: number of images.

        Raises:
            InputError: several scales were given, and not `count`.
        """
        scales = self.scales_given
        if len(scales) not in (1, count):
            raise InputError(
                f"{len(scales)} guidance scales were given for {count} images: give one, or one per image."
            )
        import torch

        return torch.tensor(scales * (count if len(scales) == 1 else 1))

    @property
    def scales_given(self) -> tuple[float, ...]:
        """The scale, or those of the images."""
        return self.scale if isinstance(self.scale, tuple) else (self.scale,)

    @property
    def is_neutral(self) -> bool:
        """Whether no image is guided at any step; then there is no second pass."""
        return self.scale == 1 or (isinstance(self.scale, tuple) and all(s == 1 for s in self.scale))

    def weight(self, call: ModelEval) -> float:
        """f of `schedule` at a network evaluation; 0 where guidance is not applied."""
        if self.is_neutral or (self.interval is not None and not self.interval.contains(call)):
            return 0.0
        return _shape(self.schedule)(call.share)

    def scales_at(self, call: ModelEval, scales: Tensor) -> Tensor:
        """The guidance scales of images at a network evaluation, under interval and schedule.

        Args:
            call: the network evaluation.
            scales: one per image.
        """
        return _scaled(scales, self.weight(call))

    def evaluations(self, calls: Sequence[ModelEval], one_pass: bool = False) -> int:
        """Network evaluations per image: one for each of `calls`, and a second where guidance is applied.

        Args:
            calls: the network evaluations of the sampler.
            one_pass: whether the network reads the scale; then there is no second evaluation.
        """
        return len(calls) + (0 if one_pass else sum(self.weight(call) > 0 for call in calls))

    def combine(
        self, cond: Tensor, uncond: Tensor, scales: Tensor, weight: float = 1.0, at: Evaluation | None = None
    ) -> Tensor:
        """The guided prediction [B, C, H, W].

        Args:
            cond: conditional prediction [B, C, H, W].
            uncond: the prediction to move away from, [B, C, H, W].
            scales: [B].
            weight: f of the schedule.
            at: where the predictions were made, for rules other than cfg.
        """
        scales = _scaled(scales, weight)
        if at is not None and self.rule.applies(at.process, at.call.level):
            guided = self.rule.combine(cond, uncond, scales, at)
        else:
            guided = apply_cfg(cond, uncond, scales)
        if not self.rescale:
            return guided
        axes = tuple(range(1, cond.ndim))
        ratio = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-12)
        return guided.lerp(guided * ratio, self.rescale)

    def threshold_x0(self, x0: Tensor) -> Tensor:
        """Dynamic thresholding: x0 [B, C, H, W] into [-1, 1]; each image is divided by the quantile `threshold` of its values."""
        values = x0.abs().flatten(1)
        bound = values.kthvalue(max(1, math.ceil(self.threshold * values.shape[1])), dim=1).values.clamp(min=1)
        bound = bound[:, None, None, None]
        return x0.clamp(-bound, bound) / bound

    def to_dict(self) -> dict:
        """The settings without the scale, as plain JSON types; without rule and negative where they are neutral, as in older files."""
        given = {"rule": self.rule, "negative": self.negative}
        given = {name: str(value) for name, value in given.items() if value != type(value)()}
        return {
            "interval": "none" if self.interval is None else str(self.interval),
            "schedule": self.schedule,
            "rescale": self.rescale,
            "threshold": self.threshold,
            **given,
        }

    def describe(self, calls: Sequence[ModelEval], process: Process, one_pass: bool = False) -> str:
        """Where guidance is applied, in every unit, and the number of network evaluations per image.

        Args:
            calls: the network evaluations of the sampler.
            process: of the network.
            one_pass: see `evaluations`.
        """
        on = [call for call in calls if self.weight(call) > 0]
        plain = [call for call in on if self.rule.name != PLAIN and not self.rule.applies(process, call.level)]
        note = f"; cfg in place of {self.rule.name} at the {len(plain)} evaluations where alpha < {MIN_ALPHA}"
        return self._where(calls, on, process.name != "edm", one_pass) + (note if plain else "")

    def _where(self, calls: Sequence[ModelEval], on: Sequence[ModelEval], has_t: bool, one_pass: bool) -> str:
        """The sentence of `describe`. on: the evaluations that are guided; has_t: whether their times are timesteps."""
        total, count = calls[-1].step + 1, self.evaluations(calls, one_pass)
        if self.is_neutral or (on and len(on) == len(calls)):
            return (
                f"{'no guidance' if self.is_neutral else 'guided at every step'}: {count} network evaluations per image"
            )
        if not on:
            return f"the interval {self.interval} contains none of the {total} steps: no step is guided"
        first, last = on[0], on[-1]
        t = f", t:{last.t:g}-{first.t:g}" if has_t else ""
        return (
            f"guided at steps {first.step}-{last.step} of {total} (sigma:{last.sigma:.3g}-{first.sigma:.3g}{t}): "
            f"{count} network evaluations per image{'' if one_pass else f' instead of {2 * len(calls)}'}"
        )


def apply_cfg(cond: Tensor, uncond: Tensor, scales: Tensor) -> Tensor:
    """uncond + scale * (cond - uncond) in all channels. cond, uncond [B, C, H, W]; scales [B], one per image.

    lerp gives exactly cond at scale 1.  Source: Ho & Salimans 2022, equation 6.
    """
    return uncond.lerp(cond, scales.to(cond)[:, None, None, None])


def example_scales(labels: LabelSpace, largest: float | None = None) -> str | None:
    """Guidance scales for a command that shows a model, such as "1,2,4"; None if it cannot be guided.

    Args:
        labels: of the model.
        largest: `max_guidance_scale` of its network.
    """
    if not (labels.K and labels.has_null):
        return None
    return ",".join(f"{scale:g}" for scale in sorted({min(scale, largest or scale) for scale in (1, 2, 4)}))


def _scaled(scales: Tensor, weight: float) -> Tensor:
    """The scales at f = `weight` of the schedule; at 1 they are unchanged, without rounding."""
    return scales if weight == 1 else 1 + (scales - 1) * weight


def _shape(schedule: str) -> Callable[[float], float]:
    """u from 0 (image) to 1 (noise) -> f."""
    word, _, power = schedule.partition(":")
    try:
        p = float(power) if power else 1.0
    except ValueError:
        p = math.nan
    if word == "constant" and not power:
        return lambda u: 1.0
    if word == "linear" and not power:
        return lambda u: 1 - u
    if word == "cosine" and p > 0:
        return lambda u: (1 - math.cos(math.pi * (1 - u) ** p)) / 2
    if word == "power" and power and p > 0:
        return lambda u: (1 - u) ** p
    if word == "exp" and power and p > 0:
        return lambda u: math.exp(-p * u)
    raise InputError(
        f"'{schedule}' is not a guidance schedule. Expected constant, linear, cosine, cosine:4, power:2 or exp:2."
    )
