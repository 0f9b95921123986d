"""Exponential moving average of the weights."""

from copy import deepcopy

import torch
from torch import nn


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
