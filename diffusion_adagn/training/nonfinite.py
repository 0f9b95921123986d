"""Non-finite losses and gradients: the step is skipped, the first layer with a bad value is named, and too many stop the run."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class NonFiniteGuard:
    """Counts consecutive non-finite steps.

    Args:
        most: how many stop the run.
        consecutive: the count at the checkpoint from which the run resumes.
    """

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

    losses: repeats the passes of the step; each returns the loss of its images. Weights are looked at first, then the outputs of
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
    """Modules are registered in the order of the image path, conditioning last: in reverse, the last layer of the image path is first."""
    image = [n for n in names if n.split(".")[0] not in ("embedding", "projection")]
    return (image or names)[-1]
