"""The points of a sweep: the weights of a model, the settings of its sampler and the weights of its guide. Torch is not imported."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..runs.recorded import run_name_parts, run_of
from ..runs.weights import Weights, at_steps
from ..sampling.settings import SamplerSettings
from .settings import AXES, SweepRequest

WEIGHT_AXES = ("run", "checkpoint", "ema", "guide", "guide_ema")


@dataclass(frozen=True)
class SweepPoint:
    """One point of a sweep.

    Attributes:
        sampler: its guide is a text, as the user wrote it.
        model: whose images are sampled, with an EMA length.
        guide: what guidance moves away from, with an EMA length; None: null.
        varied: which of WEIGHT_AXES the sweep varies. The others are in neither name nor record, as in older sweeps.
    """

    sampler: SamplerSettings
    model: Weights
    guide: Weights | None = None
    varied: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Short, unique, fit for a folder: g2_ddim20_leading_step400_ema0.05. Sampler and spacing must be set."""
        named_guide = self.guide is not None and "guide" in self.varied
        sampler = replace(self.sampler, guide=None) if named_guide else self.sampler
        words = {
            "run": _slug(self.model),
            "checkpoint": f"step{self.model.step}",
            "ema": f"ema{_ema_text(self.model)}",
            "guide": named_guide
            and f"guide-{_slug(self.guide)}" + f"-step{self.guide.step}" * (self.guide.step is not None),
            "guide_ema": self.guide is not None and f"gema{_ema_text(self.guide)}",
        }
        return "_".join([sampler.name, *(words[axis] for axis in self.varied if words[axis])])

    def record(self) -> dict[str, Any]:
        """The settings, flat, as plain JSON types."""
        guide = self.guide
        values = {
            "run": self.model.run,
            "checkpoint": self.model.step or "newest",
            "ema": self.model.ema,
            "guide": None if guide is None else guide.path if "guide_ema" in self.varied else self.sampler.guide,
            "guide_ema": None if guide is None else guide.ema,
        }
        return self.sampler.to_dict() | {axis: values[axis] for axis in self.varied}


def _slug(weights: Weights) -> str:
    """The run's name, fit for a folder."""
    path = Path(weights.run)
    parts = run_name_parts(run_of(path)) if path.exists() else path.parts
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))


def _ema_text(weights: Weights) -> str:
    return weights.ema if isinstance(weights.ema, str) else f"{weights.ema:.12g}"


@dataclass(frozen=True)
class Grid:
    """What a request asks for, before a model is loaded.

    Attributes:
        models: the weights of every model, in the order of the command line.
        samplers: every combination of the settings of the sampler, with guides as texts.
        varied: which of WEIGHT_AXES vary.
        guide_emas: the EMA lengths of guides that name none; (None,): that of the model.
    """

    models: tuple[Weights, ...]
    samplers: tuple[SamplerSettings, ...]
    varied: tuple[str, ...]
    guide_emas: tuple[float | str | None, ...] = (None,)

    def points_of(self, model: Weights, resolve) -> list[SweepPoint]:
        """The points of one model.

        Args:
            model: one of `models`.
            resolve: gives a SamplerSettings the model's own sampler and spacing.
        """
        points = []
        for guide_ema, settings in itertools.product(self.guide_emas, self.samplers):
            sampler = resolve(settings).canonical()
            guide = None if sampler.guide is None else Weights.parse(sampler.guide).with_ema(guide_ema or model.ema)
            points.append(SweepPoint(sampler, model, guide, self.varied))
        return list(dict.fromkeys(points))

    def guides_of(self, model: Weights) -> list[Weights]:
        """The guides of a model's points, also of those at scale 1, which do not use them."""
        named = dict.fromkeys(settings.guide for settings in self.samplers if settings.guide is not None)
        guides = [Weights.parse(text).with_ema(ema or model.ema) for ema in self.guide_emas for text in named]
        return list(dict.fromkeys(guides))


def grid_of(sources: Sequence[str], request: SweepRequest, earlier: Sequence[str] = ()) -> Grid:
    """Expand the weights that a request names.

    Args:
        sources: The models, as texts of `Weights`.
        request: The axes.
        earlier: Which of WEIGHT_AXES earlier commands of the same sweep varied.

    Raises:
        InputError: There is no such checkpoint.
    """
    named = list(dict.fromkeys(weights for text in sources for weights in Weights.parse_all(text)))
    if request.checkpoint:
        if at := next((w for w in named if w.step is not None), None):
            raise InputError(f"{at} is a checkpoint already: give --checkpoint, or name checkpoints, not both.")
        named = [at for weights in named for at in at_steps(weights, request.checkpoint)]
    models = tuple(dict.fromkeys(weights.with_ema(ema) for weights in named for ema in request.ema))
    texts = request.axes.get("guide", (request.sampler.guide,))
    guides = list(dict.fromkeys(guide for text in texts for guide in _guides(text)))
    if request.guide_ema and guides == [None]:
        raise InputError("--guide_ema is the EMA length of guides, and there is none: give --guide, or leave it out.")
    if request.rank and len(models) < 2 and not {"run", "checkpoint", "ema"} & set(earlier):
        raise InputError("--rank compares several models, and there is one: name several runs, or leave it out.")
    varied = {
        "run": len({weights.run for weights in models}) > 1,
        "checkpoint": bool(request.checkpoint) or _has_all(sources) or len({weights.step for weights in models}) > 1,
        "ema": len(request.ema) > 1 or len({weights.ema for weights in models}) > 1,
        "guide": len(guides) > 1 or _has_all(texts),
        "guide_ema": len(request.guide_ema) > 1,
    }
    axes = {key: request.axes[key] for key in AXES if key in request.axes} | {"guide": tuple(guides)}
    samplers = [request.sampler.with_values(dict(zip(axes, values))) for values in itertools.product(*axes.values())]
    return Grid(
        models,
        tuple(samplers),
        tuple(a for a in WEIGHT_AXES if varied[a] or a in earlier),
        request.guide_ema or (None,),
    )


def _guides(text: str | None) -> list[str | None]:
    return [None] if text in (None, "none") else list(map(str, Weights.parse_all(text)))


def _has_all(texts: Sequence[str | None]) -> bool:
    return any(text is not None and "@*" in text for text in texts)
