"""Guidance: away from a second prediction, by how much, and when.

    pred = against + scale * (cond - against)

against is the same network's answer to null (classifier-free guidance, Ho & Salimans 2022) or a weaker network's answer to the
same class (autoguidance, Karras et al. 2024). Scale 1 is no guidance; w of the classifier-free guidance paper is scale - 1.
Everything in a `Guidance` is neutral unless said.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..diffusion.schedule import ModelEval

UNITS = ("t", "sigma", "steps", "share")
NUMBER = r"\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+|inf"
INTERVAL = re.compile(rf"(?:(t|sigma|steps):)?\s*({NUMBER})\s*-\s*({NUMBER})", re.IGNORECASE)


@dataclass(frozen=True)
class Interval:
    """Where on the way from noise to picture guidance is on; both ends belong to it (Kynkaanniemi et al. 2024).

    unit: "t" the timestep, 0 (clean) to T - 1; "sigma" the noise level sigma_t / alpha_t, as papers in sigma count it;
    "steps" the sampler's step, 0 the noisiest; "share" t / T, from 0 to 1.
    """

    unit: str
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise InputError(f"an interval is counted in {', '.join(UNITS)}, not in {self.unit!r}.")
        if not self.low <= self.high:
            raise InputError(
                f"the interval {self.low:g}-{self.high:g} ends before it begins: write the smaller number first."
            )
        if self.unit == "share" and self.high > 1:
            span = f"{self.low:g}-{self.high:g}"
            raise InputError(
                f"'{span}' without a unit is a share from 0 to 1: say t:{span}, sigma:{span} or steps:{span}."
            )

    @classmethod
    def parse(cls, text: str) -> "Interval | None":
        """ "t:200-800", "sigma:0.3-5", "steps:4-14", "0.2-0.8" (a share of the timesteps); "none" is None: everywhere."""
        if text.strip().lower() == "none":
            return None
        match = INTERVAL.fullmatch(text.strip())
        if match is None:
            raise InputError(
                f"'{text}' is no interval. Expected t:200-800 (timesteps), sigma:0.3-5 (noise levels), steps:4-14 (the sampler's steps, "
                "0 the noisiest), 0.2-0.8 (a share of the timesteps), or none."
            )
        unit, low, high = (match[1] or "share").lower(), float(match[2]), float(match[3])
        return cls(unit, low, high)

    def __str__(self) -> str:
        return f"{'' if self.unit == 'share' else self.unit + ':'}{self.low:g}-{self.high:g}"

    def holds(self, call: "ModelEval") -> bool:
        value = {"t": call.t, "sigma": call.sigma, "steps": call.step, "share": call.share}[self.unit]
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Guidance:
    """How a picture is guided; what is not said is neutral.

    scale: a number >= 0, or one a picture; 1 is none. See `from_w`.
    interval: where it is on (an Interval or its text); elsewhere the second pass is not made.
    schedule: scale at t is 1 + (scale - 1) f, with u = t / T from 1 (noise) to 0: "constant" f = 1; "linear" f = 1 - u;
      "cosine" f = (1 + cos(pi u)) / 2; "cosine:P" f = (1 - cos(pi (1 - u)^P)) / 2 (MDT's power-cosine); "power:P" f = (1 - u)^P.
      All grow from noise to picture (Wang et al. 2024).
    rescale: phi in 0..1: so much of the way to the standard deviation of the unguided prediction (Lin et al. 2023, section 3.4).
    threshold: dynamic thresholding of x0 in place of clipping: a share in (0, 1], such as 0.995 (Imagen, section 2.3).
    guide: a pipeline whose network is guided against in place of null: an earlier checkpoint of the same run, a smaller one,
      or one without classes. It must know the same classes (or none) and the same noise schedule.
    Raises InputError for whatever is out of range.
    """

    scale: float | Sequence[float] = 1.0
    interval: Interval | str | None = None
    schedule: str = "constant"
    rescale: float = 0.0
    threshold: float | None = None
    guide: "DiffusionPipeline | None" = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.interval, str):
            object.__setattr__(self, "interval", Interval.parse(self.interval))
        if not isinstance(self.interval, Interval | None):
            raise InputError(f'an interval is an Interval or its text, such as "0.2-0.8", not {self.interval!r}.')
        if self.guide is not None and not hasattr(self.guide, "unet"):
            raise InputError(
                f"a guide is an open pipeline, ClassConditionalPipeline.from_pretrained(...), not {self.guide!r}."
            )
        object.__setattr__(self, "scale", _scales(self.scale))
        _shape(self.schedule)
        if not isinstance(self.rescale, Real) or not 0 <= self.rescale <= 1:
            raise InputError(f"rescale is a number from 0 (none) to 1, not {self.rescale!r}.")
        if self.threshold is not None and (not isinstance(self.threshold, Real) or not 0 < self.threshold <= 1):
            raise InputError(f"a threshold is a share above 0 and up to 1, such as 0.995, not {self.threshold!r}.")

    @classmethod
    def from_w(cls, w: float | Sequence[float], **settings) -> "Guidance":
        """From the paper's w, pred = (1 + w) cond - w null: scale = 1 + w. One, or one a picture."""
        return cls(scale=[1 + one for one in w] if isinstance(w, Iterable) else 1 + w, **settings)

    def scales(self, count: int) -> Tensor:
        """One scale a picture, float32 [count]. Raises InputError unless there is one, or one for each."""
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if len(scales) not in (1, count):
            raise InputError(
                f"{len(scales)} guidance scales were given for {count} pictures: give one, or one for each."
            )
        return torch.tensor(scales * (count if len(scales) == 1 else 1))

    @property
    def off(self) -> bool:
        """Whether no picture is guided anywhere: then there is no second pass."""
        return self.scale == 1 or (isinstance(self.scale, tuple) and all(s == 1 for s in self.scale))

    def strength(self, call: "ModelEval") -> float:
        """f of `schedule` at a network call; 0 where guidance is off."""
        if self.off or (self.interval is not None and not self.interval.holds(call)):
            return 0.0
        return _shape(self.schedule)(call.share)

    def evaluations(self, calls: Sequence["ModelEval"]) -> int:
        """Network evaluations a picture over these calls: one each, and a second where guidance is on."""
        return len(calls) + sum(self.strength(call) > 0 for call in calls)

    def combine(self, cond: Tensor, against: Tensor, scales: Tensor, strength: float = 1.0) -> Tensor:
        """The guided prediction. cond, against [B, C, H, W]; scales [B]; strength: f(t)."""
        # 1 + (s - 1) f says s itself at f = 1
        scales = scales if strength == 1 else 1 + (scales - 1) * strength
        guided = guide(cond, against, scales)
        if not self.rescale:
            return guided
        axes = tuple(range(1, cond.ndim))
        ratio = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-12)
        return torch.lerp(guided, guided * ratio, self.rescale)

    def limit(self, x0: Tensor) -> Tensor:
        """Dynamic thresholding: x0 [B, C, H, W] into [-1, 1], each picture divided by what `threshold` of its values keep within."""
        values = x0.abs().flatten(1)
        most = values.kthvalue(max(1, math.ceil(self.threshold * values.shape[1])), dim=1).values.clamp(min=1)
        most = most[:, None, None, None]
        return x0.clamp(-most, most) / most

    def to_dict(self) -> dict:
        """The settings as plain JSON types, the scale left out."""
        return {
            "interval": "none" if self.interval is None else str(self.interval),
            "schedule": self.schedule,
            "rescale": self.rescale,
            "threshold": self.threshold,
        }

    def describe(self, calls: Sequence["ModelEval"]) -> str:
        """Where guidance is on, in every unit, and how many network evaluations that makes."""
        on = [call for call in calls if self.strength(call) > 0]
        total = calls[-1].step + 1
        if self.off or (on and len(on) == len(calls)):
            return f"{'no guidance' if self.off else 'guided at every step'}: {self.evaluations(calls)} network evaluations a picture"
        if not on:
            return f"the interval {self.interval} holds none of the {total} steps: nothing is guided"
        first, last = on[0], on[-1]
        return (
            f"guided at steps {first.step}-{last.step} of {total} (t:{last.t:g}-{first.t:g}, sigma:{last.sigma:.3g}-{first.sigma:.3g}): "
            f"{self.evaluations(calls)} network evaluations a picture for {2 * len(calls)}"
        )


def guide(cond: Tensor, against: Tensor, scales: Tensor) -> Tensor:
    """against + scale * (cond - against), each picture at its own scale; all channels. cond, against [B, C, H, W], scales [B].

    torch.lerp gives exactly cond at scale 1.  Source: Ho & Salimans 2022, equation 6.
    """
    return torch.lerp(against, cond, scales.to(cond)[:, None, None, None])


def _scales(scale: float | Sequence[float]) -> float | tuple[float, ...]:
    if hasattr(scale, "reshape"):  # arrays and tensors
        scale = scale.reshape(-1).tolist()
        scale = scale[0] if len(scale) == 1 else scale
    try:
        if isinstance(scale, str):
            raise ValueError
        scales = tuple(float(s) for s in scale) if isinstance(scale, Iterable) else (float(scale),)
    except (TypeError, ValueError):
        raise InputError(f"a guidance scale is a number, or a list with one a picture, not {scale!r}.") from None
    for s in scales:
        if not math.isfinite(s) or s < 0:
            raise InputError(f"a guidance scale is a number of at least 0 (1 means no guidance), not {s}.")
    return scales if isinstance(scale, Iterable) else scales[0]


def _shape(schedule: str):
    """u = t / T in 0..1 -> f."""
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
    raise InputError(f"'{schedule}' is no guidance schedule. Expected constant, linear, cosine, cosine:4 or power:2.")
