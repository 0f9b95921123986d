"""Averages of the weights: one of a fixed rate, and power-function averages of several lengths."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from ..runs.power_ema import decay, exponent


class EMA:
    """An fp32 copy of the network: ema <- d ema + (1 - d) weights after each step, d = min(decay, (1 + step) / (10 + step)).

    Without this warm-up, early images are noise. `model` is the copy, in eval mode: sample from it.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = deepcopy(model).float().eval().requires_grad_(False)

    def rate(self, step: int) -> float:
        """d after `step` steps (1, 2, ...)."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        averages, weights = list(self.model.parameters()), [p.float() for p in model.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - self.rate(step))


class PowerEMA:
    """Power-function averages in fp32 (`runs.power_ema`), of which those of other lengths are made afterwards.

    Attributes:
        tracks: The averages by length and by name of the weight.
        spacing: Steps between snapshots, chosen when the run starts; a resumed run keeps it.
        limit: Most snapshots at a time.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[float], spacing: int, limit: int):
        self.spacing, self.limit = spacing, limit
        self.exponents = {length: exponent(length) for length in lengths}
        self.tracks = {
            length: {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
            for length in lengths
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights after step 1, 2, ..., which a skipped step has left as they were."""
        weights = [p.float() for p in model.parameters()]
        for length, averages in self.tracks.items():
            torch._foreach_lerp_(list(averages.values()), weights, 1 - decay(step, self.exponents[length]))

    def tensors(self) -> dict[str, Tensor]:
        """The averages by name in a checkpoint, such as "0.05/conv_in.weight"."""
        return {
            f"{length}/{name}": average
            for length, averages in self.tracks.items()
            for name, average in averages.items()
        }
