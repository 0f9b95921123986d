"""A loss or gradient that is not finite: the step is left out, the first layer with a bad value is named, and too many in a row stop the run."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class NonFiniteGuard:
    """Counts faulty steps in a row. most: how many stop the run; in_a_row: at the checkpoint that a run goes on from."""

    def __init__(self, most: int, consecutive: int = 0):
        self.most, self.consecutive = most, consecutive

    def update(self, fault: bool) -> None:
        self.consecutive = self.consecutive + 1 if fault else 0

    @property
    def exceeded(self) -> bool:
        return self.consecutive >= self.most


def gradient_fault(norm: float, scaler: "torch.amp.GradScaler | None") -> bool:
    """Whether a gradient's norm is a fault. fp16's scaler leaves out a step that is not finite, and halves its factor, which is
    no fault until the factor is below 1: then the gradients themselves are too large."""
    return not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1)


def find_nonfinite(network: nn.Module, losses: Iterable[Callable[[], Tensor]]) -> str | None:
    """Where the first value that is not finite stands, in words; None if all are finite here.

    losses: the step's passes once more, each giving the loss of its pictures. Weights are looked at first, then the outputs of
    layers in the order of the pass, then gradients, the last layer first, as they come about. The gradients are left empty.
    """
    for name, p in network.named_parameters():
        if not torch.isfinite(p).all():
            return f"the weights of {name}"
    network.zero_grad(set_to_none=True)
    bad: list[str] = []

    def look(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                bad.append(name)

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in network.named_modules() if not any(m.children())]
    try:
        for loss_of in losses:
            loss = loss_of().mean()
            if bad:
                return f"the output of {bad[0]}"
            if not torch.isfinite(loss):
                return "the loss itself, every layer's output being finite"
            loss.backward()
            of_grads = [
                n for n, p in network.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()
            ]
            if of_grads:
                return f"the gradient of {_last_of_the_image_path(of_grads)}"
    finally:
        for hook in hooks:
            hook.remove()
        network.zero_grad(set_to_none=True)
    return None


def _last_of_the_image_path(names: list[str]) -> str:
    """Parts are registered as the picture meets them, the condition's last: backwards the image path's last comes first."""
    image = [n for n in names if n.split(".")[0] not in ("embedding", "projection")]
    return (image or names)[-1]
