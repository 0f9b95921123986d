"""Non-finite losses and gradients: the step is skipped, the first non-finite value is named, and too many stop the run."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..commands import shell_line
from ..errors import InputError
from .logger import Logger
from .trainer import StepResult, Trainer


class NonFiniteGuard:
    """Reports skipped steps, counts consecutive ones, and stops the run after training.max_nonfinite_steps."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.consecutive = trainer, 0

    def check(self, result: StepResult, logger: Logger) -> None:
        """To be called after each step. Raises InputError after too many skipped ones."""
        trainer, self.consecutive = self.trainer, self.consecutive + 1 if result.skipped else 0
        if not result.skipped:
            return
        numbers = f"its loss is {result.loss:g}, the norm of its gradient {result.grad_norm:g}"
        message = f"step {trainer.step} skipped: {numbers}; {locate_nonfinite(trainer, result.passes)}"
        logger.say(message)
        logger.log(left_out=self.consecutive)
        if self.consecutive >= trainer.config.training.max_nonfinite_steps:
            raise InputError(
                f"{self.consecutive} consecutive steps had a non-finite loss or gradient and were skipped (training.max_nonfinite_steps). "
                f"{message}. The checkpoints in {trainer.run.checkpoints} are valid. Start another run with a lower training.lr or "
                f"speed.precision fp32; {shell_line(['--init_from', str(trainer.run.path)])} keeps the weights so far."
            )

    def state_dict(self) -> dict:
        return {"faults": self.consecutive}

    def load_state_dict(self, state: dict) -> None:
        self.consecutive = state.get("faults", 0)


def locate_nonfinite(trainer: Trainer, passes: Iterable[Tensor]) -> str:
    """Repeat a step's passes. Returns which value was non-finite first, on the first process that has one."""
    losses = [lambda positions=p: trainer.forward_loss(trainer.unet, positions)[0] for p in passes]
    with trainer.accelerator.autocast():
        places = gather_object([find_nonfinite(trainer.unet, losses)])
    return next((f"first non-finite: {p}" for p in places if p is not None), "repeated, all its values are finite")


def find_nonfinite(network: nn.Module, losses: Iterable[Callable[[], Tensor]]) -> str | None:
    """Where the first non-finite value of a step is; None if all are finite in this process.

    Checks the weights, then the outputs of layers in the order of the pass, then gradients, the last layer first, as they
    are computed. Empties the gradients.

    Args:
        network: The network.
        losses: Functions that repeat the passes of the step; each returns the loss of its images [B].
    """
    for name, p in network.named_parameters():
        if not torch.isfinite(p).all():
            return f"the weights of {name}"
    network.zero_grad(set_to_none=True)
    nonfinite: list[str] = []

    def check(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            nonfinite.append(name)

    leaves = [(name, m) for name, m in network.named_modules() if not any(m.children())]
    hooks = [m.register_forward_hook(partial(check, name)) for name, m in leaves]
    try:
        for loss_of in losses:
            loss = loss_of().mean()
            if nonfinite:
                return f"the output of {nonfinite[0]}"
            if not torch.isfinite(loss):
                return "the loss itself; every layer's output is finite"
            loss.backward()
            gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
            names = [name for name, grad in gradients.items() if not torch.isfinite(grad).all()]
            # modules are registered in the order of the image path, conditioning last
            names.sort(key=lambda name: name.startswith(("embedding.", "projection.")), reverse=True)
            if names:
                return f"the gradient of {names[-1]}"
    finally:
        for hook in hooks:
            hook.remove()
        network.zero_grad(set_to_none=True)
    return None
