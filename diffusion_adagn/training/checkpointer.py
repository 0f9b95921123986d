"""When checkpoints are saved, and what they contain."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ..errors import InputError
from ..runs.checkpoint import load_checkpoint, read_state, remove_old, save_checkpoint
from .diagnostics import ConditioningDiagnostics
from .nonfinite import NonFiniteGuard
from .trainer import StepResult, Trainer


class Checkpointer:
    """Saves and loads the trainer's weights, EMAs and optimizer; and state.json, the `state_dict()` of `parts` together."""

    def __init__(self, trainer: Trainer, parts: Sequence[Trainer | ConditioningDiagnostics | NonFiniteGuard]):
        self.trainer, self.parts = trainer, parts

    def load(self, checkpoint: Path | None) -> dict:
        """Restore a checkpoint. Returns its state; {} for None, where the run starts.

        Raises:
            InputError: The run was trained on other data or with another teacher, or the checkpoint does not match the network.
        """
        if checkpoint is None:
            return {}
        state, trainer = read_state(checkpoint), self.trainer
        if state.get("data_fingerprint") != trainer.dataset.fingerprint:
            text = f"the data {trainer.dataset.name} is not what {trainer.run.path} was trained on (its images, labels or names have changed)"
            raise InputError(f"{text}: put it back, or start another run with --init_from.")
        if state.get("teacher") != trainer.teacher_hash:
            text = f"the teacher {trainer.config.teacher} is not the one that {trainer.run.path} was trained with (its weights have changed)"
            raise InputError(f"{text}: put it back, or start another run with --init_from.")
        for part in self.parts:
            part.load_state_dict(state)
        load_checkpoint(checkpoint, trainer.unet, trainer.ema.model, trainer.optimizer.optimizer, self._power_ema())
        trainer.accelerator.print(f"resuming from {checkpoint}")
        return state

    def due(self, result: StepResult) -> bool:
        """Never after a skipped step: the step before it may have broken the weights, and no valid checkpoint is pruned for them."""
        step, training = self.trainer.step, self.trainer.config.training
        at_interval = any(every and step % every == 0 for every in (training.checkpoint_every, training.keep_every))
        return not result.skipped and (result.stopping or at_interval or step == self.trainer.max_steps)

    def save(self, say: Callable[[str], None], prune: bool = True) -> None:
        """Write a checkpoint, on the main process; the others wait.

        prune: Remove old ones. False when a launcher may soon end the process: the next save removes them.
        """
        trainer, training = self.trainer, self.trainer.config.training
        state = {key: value for part in self.parts for key, value in part.state_dict().items()}
        if trainer.accelerator.is_main_process:
            folder, modules = trainer.run.checkpoints, (trainer.unet, trainer.ema.model, trainer.optimizer.optimizer)
            path = save_checkpoint(folder, state, *modules, self._power_ema())
            if prune:
                remove_old(folder, training.keep_checkpoints, training.keep_every)
            say(f"saved {path}")
        trainer.accelerator.wait_for_everyone()

    def _power_ema(self) -> dict[str, Tensor] | None:
        return None if self.trainer.power_ema is None else self.trainer.power_ema.tensors()
