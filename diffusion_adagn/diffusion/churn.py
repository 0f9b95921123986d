"""Churn: noise that is added before the steps of a sampler. Nothing heavy is imported."""

import math
from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Churn:
    """Noise that is added before a step (Karras et al. 2022, algorithm 2).

    Args:
        amount: S_churn; a step raises its noise level by the factor 1 + min(amount / steps, sqrt(2) - 1).
        low: S_tmin, the lowest noise level at which noise is added.
        high: S_tmax, the highest.
        noise: S_noise, the standard deviation of the noise.

    Raises:
        InputError: A number is out of range.
    """

    amount: float
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.amount < math.inf and 0 <= self.low < self.high and 0 < self.noise < math.inf):
            raise InputError(f"churn is S_churn > 0, S_tmin >= 0, a larger S_tmax, and S_noise > 0, not {self}.")

    @classmethod
    def parse(cls, text: str) -> "Churn | None":
        """ "40" or "40:0.05:50:1.003"; "none" and "0" are None."""
        if text.strip().lower() in ("none", "0"):
            return None
        try:
            return cls(*map(float, text.split(":")))
        except (TypeError, ValueError):
            raise InputError(
                f"'{text}' is no churn. Expected S_churn such as 40, S_churn:S_tmin:S_tmax:S_noise such as 40:0.05:50:1.003, or none."
            ) from None

    def __str__(self) -> str:
        return f"{self.amount:g}:{self.low:g}:{self.high:g}:{self.noise:g}"

    def raised(self, sigma: float, steps: int) -> float:
        """The noise level from which a step starts.

        Args:
            sigma: the noise level where the step before ended.
            steps: of the sampler.
        """
        inside = self.low <= sigma <= self.high
        return sigma * (1 + min(self.amount / steps, math.sqrt(2) - 1)) if inside else sigma
