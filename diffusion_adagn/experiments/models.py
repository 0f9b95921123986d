"""The networks of a sweep: one model and one guide in memory at a time, and what is recorded of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from ..errors import InputError
from ..evaluation.points import set_up
from ..labels import LabelSpace
from ..runs.weights import Weights
from ..sampling.load import open_guide, open_pipeline
from ..sampling.pipeline import ClassConditionalPipeline
from ..sampling.pretrained import model_hash
from ..sampling.settings import SamplerSettings
from .cost import PointCost, seconds_per_image


@dataclass(frozen=True)
class About:
    """What is recorded of a set of weights. what: a sentence on what they are."""

    what: str
    hash: str
    trained_steps: int | None
    ema_decay: float | None
    ema_length: float | None

    def to_dict(self) -> dict:
        return asdict(self)


class SweepModels:
    """Loads the weights that a point needs, and frees those of the point before.

    Args:
        precision: as `evaluation.points.set_up` takes it.
        device: where the networks are computed.
        batch_size: of the batches that are timed.
        classes: selections, whose learned classes are loaded, as `open_pipeline` takes them.

    Attributes:
        about: what is recorded of the weights that were loaded.
        labels: the classes of the models.
    """

    def __init__(self, precision: str, device: torch.device, batch_size: int, classes: Sequence[str | None] = ()):
        self.labels: LabelSpace | None = None
        self._classes = classes
        self.about: dict[Weights, About] = {}
        self._precision, self._device, self._batch_size = precision, device, batch_size
        self._seconds: dict[str, float] = {}  # by the config of a network
        self._loaded: dict[str, tuple[Weights, ClassConditionalPipeline]] = {}  # "model" and "guide"

    def model(self, weights: Weights) -> ClassConditionalPipeline:
        """The pipeline of a model. Raises InputError if it cannot be loaded."""
        return self._load("model", weights)

    def guide(self, weights: Weights | None) -> ClassConditionalPipeline | None:
        """The pipeline of a guide; None for null."""
        return None if weights is None else self._load("guide", weights)

    def cost(self, settings: SamplerSettings, model: Weights, guide: Weights | None) -> PointCost:
        """What an image of a point costs. Raises InputError if it cannot be sampled."""
        pipe, second = self.model(model), self.guide(guide)
        calls = pipe.prepare(settings, second)
        guided = settings.guidance.evaluations(calls) - len(calls)
        seconds = len(calls) * self._timed(pipe) + (0 if pipe.one_pass else guided * self._timed(second or pipe))
        return PointCost(len(calls), guided, seconds, pipe.one_pass)

    def _timed(self, pipe: ClassConditionalPipeline) -> float:
        """Seconds per image and evaluation; networks of one architecture are timed once."""
        key = json.dumps(dict(pipe.unet.config), default=str, sort_keys=True)
        if key not in self._seconds:
            self._seconds[key] = seconds_per_image(pipe, self._batch_size, self._precision)
        return self._seconds[key]

    def _load(self, role: str, weights: Weights) -> ClassConditionalPipeline:
        if role in self._loaded and self._loaded[role][0] == weights:
            return self._loaded[role][1]
        self._loaded.pop(role, None)  # freed before the next is loaded
        opened = open_guide if role == "guide" else open_pipeline
        pipe, what = opened(weights.path, weights.ema, self._classes)
        if weights not in self.about:
            config = pipe.config
            self.about[weights] = About(
                what, model_hash(pipe.unet), config.trained_steps, config.ema_decay, config.ema_length
            )
        set_up([pipe], self._precision, self._device)
        self.labels = pipe.labels if role == "model" else self.labels
        self._loaded[role] = weights, pipe
        return pipe


def kind_of_images(pipe: ClassConditionalPipeline) -> dict[str, object]:
    """What two models must share for their images to be compared."""
    config = pipe.unet.config
    return {
        "classes": pipe.labels.names,
        "image sizes": config.sample_size,
        "numbers of channels": config.in_channels,
    }


def check_alike(kinds: Mapping[Weights, Mapping], one: Weights, other: Weights) -> None:
    """Raises InputError unless two models have the same `kind_of_images`."""
    if wrong := [what for what, value in kinds[one].items() if value != kinds[other][what]]:
        raise InputError(
            f"{one.path} and {other.path} have other {' and '.join(wrong)}: sweep models of the same data."
        )
