"""Guidance rules: how the guided prediction is made of the conditional and the unconditional one.

A rule is one function with `@rule(SPACE)`, of (cond, uncond, scale) and its own parameters:

    cond, uncond    predictions [B, C, H, W], in the rule's space
    scale           [B, 1, 1, 1]; at 1 the result is cond

Spaces: `x0`, the predicted image; `velocity`, (x / alpha - x0) / (sigma / alpha), which is eps under ddpm and edm, and
eps - x0 under flow. The published strengths are for text models: defaults here are neutral or the papers', not tuned.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from ..errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ..diffusion.process import Level, Process
    from ..diffusion.schedule import ModelEval

MIN_ALPHA = 0.05  # below, x0 of a network that predicts eps is noise: rules of space x0 use plain guidance
PLAIN = "cfg"

Space = Literal["x0", "velocity"]


class Memory:
    """What a rule remembers of earlier steps of the same call: one tensor [B, C, H, W]."""

    def __init__(self) -> None:
        self.step, self.current, self.previous = -1, None, None

    def momentum(self, value: Tensor, factor: float, step: int) -> Tensor:
        """value + factor * the result of the step before. The second evaluation of a step does not change what is stored."""
        if step != self.step:
            self.step, self.previous = step, self.current
            self.current = value if self.previous is None else value + factor * self.previous
            return self.current
        return value if self.previous is None else value + factor * self.previous


@dataclass(frozen=True)
class Evaluation:
    """Where two predictions were made: network input x [B, C, H, W], process, network evaluation, and the call's memory."""

    x: Tensor
    process: Process
    call: ModelEval
    memory: Memory


@dataclass(frozen=True)
class _Rule:
    """A registered rule.

    context: the arguments "memory" and "step", if the function has them. defaults: of its parameters. least: the lowest
    value of those that have one. whole: those that are whole numbers. processes: those that it is defined for; none: all.
    """

    function: Callable
    space: Space
    processes: tuple[str, ...]
    context: tuple[str, ...]
    defaults: dict[str, float]
    least: dict[str, float]
    whole: frozenset[str]


RULES: dict[str, _Rule] = {}


def rule(
    space: Space, *processes: str, least: Mapping[str, float] = MappingProxyType({}), whole: Sequence[str] = ()
) -> Callable[[Callable], Callable]:
    """Register a rule under the name of its function; see `_Rule`."""

    def register(function: Callable) -> Callable:
        parameters = list(inspect.signature(function).parameters.values())[3:]
        context = tuple(p.name for p in parameters if p.default is p.empty)
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        RULES[function.__name__] = _Rule(function, space, processes, context, defaults, dict(least), frozenset(whole))
        return function

    return register


@rule("x0", least={"r": 0})
def apg(
    cond: Tensor, uncond: Tensor, scale: Tensor, memory: Memory, step: int,
    eta: float = 0.0, r: float = 0.0, momentum: float = 0.0,
) -> Tensor:  # fmt: skip
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, algorithm 1).

        d = cond - uncond + momentum * (d of the step before);  d = d min(1, r / RMS(d))
        cond + (scale - 1) (d_orthogonal + eta d_parallel)

    d_parallel is the projection of d on cond. Plain guidance: eta=1, r=0 (no cap), momentum=0.

    Args:
        cond: see the module.
        uncond: see the module.
        scale: see the module.
        memory: of the call.
        step: of the sampler.
        eta: strength of the parallel part, which increases saturation; the paper has 0.
        r: cap of the root mean square of d, in values of the images; the paper's r is this times sqrt(C H W). 0: none.
        momentum: of d over the steps, -0.75 to -0.25 in the paper.
    """
    d = memory.momentum(cond - uncond, momentum, step) if momentum else cond - uncond
    if r:
        d = d * (r / _rms(d).clamp(min=1e-12)).clamp(max=1)
    parallel = _dot(d, cond) / _dot(cond, cond).clamp(min=1e-12) * cond
    return cond + (scale - 1) * (d - parallel + eta * parallel)


@rule("velocity", "flow", least={"steps": 0}, whole=["steps"])
def zero(cond: Tensor, uncond: Tensor, scale: Tensor, step: int, steps: float = 0.0) -> Tensor:
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886, equations 12 and 13): the unconditional velocity, scaled to fit cond.

        s = <cond, uncond> / <uncond, uncond>;  s uncond + scale (cond - s uncond)

    Plain guidance where s is 1. steps: so many first steps have velocity 0 (the paper: 4 % of them), 0 is none.
    """
    if step < steps:
        return cond * 0
    fitted = _dot(cond, uncond) / _dot(uncond, uncond).clamp(min=1e-12) * uncond
    return fitted.lerp(cond, scale)


@rule("velocity", least={"alpha": 0})
def mambo(cond: Tensor, uncond: Tensor, scale: Tensor, alpha: float = 8.0) -> Tensor:
    """MAMBO-G (arXiv 2508.03442): less guidance for images whose difference is large.

        d = cond - uncond;  uncond + s d with s = 1 + (scale - 1) exp(-alpha |d| / |uncond|)

    Plain guidance: alpha=0.
    """
    ratio = _rms(cond - uncond) / _rms(uncond).clamp(min=1e-12)
    return uncond.lerp(cond, 1 + (scale - 1) * (-alpha * ratio).exp())


@rule("velocity", least={"levels": 1}, whole=["levels"])
def fdg(cond: Tensor, uncond: Tensor, scale: Tensor, low: float = 0.5, levels: float = 2.0) -> Tensor:
    """Frequency-decoupled guidance (Sadat et al. 2025, arXiv 2506.19713): less guidance of coarse structure.

        cond + (scale - 1) (high(d) + low * coarse(d)), d = cond - uncond

    high and coarse are the bands of a Laplacian pyramid: `levels` - 1 fine ones have the whole scale. The paper has scales 10 and 5
    for text models. Plain guidance: low=1.
    """
    d, sizes = cond - uncond, []
    coarse = d
    for _ in range(round(levels) - 1):
        if min(coarse.shape[-2:]) < 4:
            break
        sizes.append(coarse.shape[-2:])
        coarse = _resized(_blurred(coarse), [side // 2 for side in sizes[-1]])
    for size in reversed(sizes):
        coarse = _blurred(_resized(coarse, size))
    return cond + (scale - 1) * (d - (1 - low) * coarse)


@rule("velocity")
def tcfg(cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
    """Tangential damping (Kwon et al. 2025, arXiv 2503.18137): uncond without its second principal direction.

        u = projection of uncond on the first right singular vector of the matrix with rows cond, uncond;  u + scale (cond - u)

    The vector comes from the 2 x 2 Gram matrix. Plain guidance where cond and uncond are parallel.
    """
    a, b, c = _dot(cond, cond), _dot(cond, uncond), _dot(uncond, uncond)
    angle = (2 * b).atan2(a - c) / 2  # of the first eigenvector of [[a, b], [b, c]]
    direction = angle.cos() * cond + angle.sin() * uncond
    projected = _dot(uncond, direction) / _dot(direction, direction).clamp(min=1e-12) * direction
    return projected.lerp(cond, scale)


# ---------------------------------------------------------------------- what users write


@dataclass(frozen=True)
class Rule:
    """A rule with its parameters, such as apg:eta=0,r=0.5; "cfg" is plain guidance.

    Raises:
        InputError: there is no such rule or parameter, or a value is not a finite number.
    """

    name: str = PLAIN
    parameters: tuple[tuple[str, float], ...] = field(default=())

    def __post_init__(self) -> None:
        if self.name != PLAIN and self.name not in RULES:
            raise InputError(f"'{self.name}' is not a guidance rule. Choose from {', '.join((PLAIN, *RULES))}.")
        known = RULES[self.name].defaults if self.name in RULES else {}
        for name, value in self.parameters:
            if name not in known:
                choices = f"its parameters: {', '.join(known)}" if known else "it has no parameters"
                raise InputError(f"guidance rule {self.name} has no parameter '{name}' ({choices}).")
            if not math.isfinite(value):
                raise InputError(f"guidance rule {self.name}: {name} is a finite number, not {value}.")
            least = RULES[self.name].least.get(name, -math.inf)
            is_whole = name in RULES[self.name].whole
            if value < least or (is_whole and value != round(value)):
                kind = f"a {'whole ' * is_whole}number of at least {least:g}"
                raise InputError(f"guidance rule {self.name}: {name} is {kind}, not {value:g}.")

    @classmethod
    def parse(cls, text: str) -> Rule:
        """A rule from "cfg", "tcfg" or "apg:eta=0,r=0.5"."""
        name, separator, rest = text.strip().partition(":")
        parameters = []
        for part in rest.split(",") if separator else ():
            key, equals, value = part.partition("=")
            try:
                if not equals:
                    raise ValueError
                parameters.append((key.strip(), float(value)))
            except ValueError:
                raise InputError(
                    f"'{text}' is not a guidance rule: expected NAME:parameter=number,..., such as apg:eta=0,r=0.5."
                ) from None
        names = [name for name, _ in parameters]
        if twice := next((one for one in names if names.count(one) > 1), None):
            raise InputError(f"'{text}' has {twice} twice: give it once.")
        return cls(name.strip().lower(), tuple(sorted(dict(parameters).items())))

    def __str__(self) -> str:
        settings = ",".join(f"{name}={value:g}" for name, value in self.parameters)
        return f"{self.name}:{settings}" if settings else self.name

    def check(self, process: Process) -> None:
        """Raises InputError if the rule is not defined for the process."""
        processes = () if self.name == PLAIN else RULES[self.name].processes
        if processes and process.name not in processes:
            raise InputError(
                f"guidance rule {self.name} is defined for process {' and '.join(processes)}; this model's is {process.name}."
            )

    def applies(self, process: Process, level: Level) -> bool | Tensor:
        """Whether the rule is used at this level, bool [B] for levels [B]; plain guidance is used elsewhere (see MIN_ALPHA)."""
        if self.name == PLAIN:
            return False
        inexact = ("eps",) if RULES[self.name].space == "x0" else ("x0", "v")
        return process.prediction not in inexact or level.alpha >= MIN_ALPHA

    def combine(self, cond: Tensor, uncond: Tensor, scales: Tensor, at: Evaluation) -> Tensor:
        """The guided prediction [B, C, H, W], of the network's own kind.

        Args:
            cond: conditional prediction [B, C, H, W].
            uncond: the prediction to move away from, [B, C, H, W].
            scales: [B].
            at: where the predictions were made.
        """
        one = RULES[self.name]
        convert, back = _conversions(one.space, at)
        known = {"memory": at.memory, "step": at.call.step}
        own = {name: known[name] for name in one.context} | dict(self.parameters)
        scale = scales.to(cond)[:, None, None, None]
        guided = back(one.function(convert(cond), convert(uncond), scale, **own))
        return cond.where(scale == 1, guided)  # without the rounding of the conversions


def _conversions(space: Space, at: Evaluation) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Functions from the network's prediction to the space, and back."""
    x, process, level = at.x, at.process, at.call.level
    velocity = "velocity" if process.name == "flow" else "eps"
    if process.prediction == (velocity if space == "velocity" else "x0"):
        return (lambda value: value), (lambda value: value)
    if space == "x0":
        return (lambda output: process.to_x0(output, x, level)), (lambda x0: process.from_x0(x0, x, level))
    from ..diffusion.process import wide

    alpha, sigma = wide(level.alpha), wide(level.sigma)  # x = alpha x0 + sigma eps
    return (
        lambda output: (x - alpha * process.to_x0(output, x, level)) / sigma,
        lambda eps: process.from_x0((x - sigma * eps) / alpha, x, level),
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each image, [B, 1, 1, 1], in float64."""
    return (a.double() * b.double()).sum((1, 2, 3), keepdim=True).to(a)


def _rms(a: Tensor) -> Tensor:
    """The root mean square of each image, [B, 1, 1, 1]."""
    return a.square().mean((1, 2, 3), keepdim=True).sqrt()


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    from torch.nn.functional import interpolate

    return interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _blurred(x: Tensor) -> Tensor:
    """Each channel, blurred by the binomial kernel 1 4 6 4 1; the border is mirrored."""
    from torch.nn.functional import conv2d, pad

    row = x.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = row.outer(row).expand(x.shape[1], 1, 5, 5)
    return conv2d(pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])
