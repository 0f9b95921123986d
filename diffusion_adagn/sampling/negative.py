"""What guidance moves away from, without a second network: null, another class, a random class, a wrong noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..diffusion.process import Process
    from ..diffusion.schedule import ModelEval
    from ..labels import LabelSpace

MAX_SHIFT = 5.0  # of ln sigma


@dataclass(frozen=True)
class Negative:
    """The second prediction of guidance.

        null        the null label: classifier-free guidance (Ho & Salimans 2022)
        dog         another class, as `LabelSpace.parse` takes it
        random      a class drawn for each image and step: independent condition guidance (Sadat et al. 2024, arXiv 2407.02687)
        time:0.5    the same class, while the network receives the time of a noise level exp(0.5) times as high; after
                    time-step guidance of the same paper, which perturbs the time at random

    All but null work with a network that has no null class.

    Attributes:
        text: as written by the user.
    """

    text: str = "null"

    def __post_init__(self) -> None:
        if not self.text:
            raise InputError("the negative of guidance is null, a class, random or time:0.5, not an empty text.")
        word, separator, value = self.text.partition(":")
        if word == "time" and separator:
            try:
                shift = float(value)
            except ValueError:
                shift = math.nan
            if not 0 < abs(shift) <= MAX_SHIFT:
                raise InputError(
                    f"'{self.text}': expected time:SHIFT with a shift of ln sigma other than 0, at most {MAX_SHIFT:g}, such as time:0.5."
                )

    def __str__(self) -> str:
        return self.text

    @property
    def shift(self) -> float | None:
        """Of ln sigma; None if the negative is a class."""
        word, separator, value = self.text.partition(":")
        return float(value) if word == "time" and separator else None

    @property
    def needs_null(self) -> bool:
        return self.text == "null"

    def class_ids(self, labels: LabelSpace, calls: Sequence[ModelEval], seeds: Sequence[int]) -> list[list[int]]:
        """The class of every image at every network evaluation, [images][evaluations].

        Args:
            labels: of the network.
            calls: the evaluations of the sampler; the two of one step of heun have the same class.
            seeds: one per image. A random class depends on the image's seed and the step alone.

        Raises:
            InputError: there is no such class, or not exactly one.
        """
        if self.text == "random":
            return [[_draw(labels.K, seed, call.step) for call in calls] for seed in seeds]
        ids = labels.parse(self.text)
        if len(ids) != 1:
            raise InputError(f"the negative of guidance is one class, and '{self.text}' is {len(ids)}.")
        return [ids * len(calls) for _ in seeds]

    @property
    def is_class(self) -> bool:
        return self.text not in ("null", "random") and self.shift is None

    def times(self, process: Process, calls: Sequence[ModelEval]) -> list[float]:
        """The time that the network receives at every evaluation, for time:SHIFT; within the times of the process."""
        low, high = process.times
        factor = math.exp(self.shift)
        shifted = (process.time_of(call.sigma * factor) if call.sigma < math.inf else call.t for call in calls)
        return [min(max(time, low), high) for time in shifted]


def _draw(count: int, seed: int, step: int) -> int:
    import numpy as np

    return int(np.random.default_rng((seed, step)).integers(count))
