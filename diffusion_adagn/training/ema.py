"""Exponential moving average of the weights."""

from copy import deepcopy

import torch
from torch import nn


class EMA:
    """A shadow of the network in fp32: shadow <- d shadow + (1 - d) weights after each step,
    d = min(decay, (1 + step) / (10 + step)): without this warm-up, early images are noise.

    `model` is the shadow itself, in eval mode: sample from it.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = deepcopy(model).float().eval().requires_grad_(False)

    def rate(self, step: int) -> float:
        """d after `step` steps (1, 2, ...)."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        shadow, weights = list(self.model.parameters()), [p.float() for p in model.parameters()]
        torch._foreach_lerp_(shadow, weights, 1 - self.rate(step))
