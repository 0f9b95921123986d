"""Snapshots of the tracked averages during training."""

from collections.abc import Callable

from ..config import TrainingConfig
from ..runs.ema_snapshots import keep_snapshots, snapshot_bytes, snapshot_count, write_snapshot
from ..runs.power_ema import snapshot_steps
from .trainer import Trainer


class Snapshots:
    """RUN/ema/step-XXXXXXXX.safetensors, at every multiple of `PowerEMA.spacing`, on the main process.

    At the start it removes what was written after the checkpoint that a resumed run continues from, and says what remains, or
    why nothing is.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.folder, self.power_ema = trainer, trainer.run.ema, trainer.power_ema
        training, main = trainer.config.training, trainer.accelerator.is_main_process
        if self.power_ema is not None:
            self._thin_out()
            print(f"lengths   {describe_snapshots(training, trainer.parameters)}")
        elif main and not snapshot_count(training, trainer.parameters):
            print(f"lengths   {describe_snapshots(training, trainer.parameters)}")
        elif main:
            print(
                "lengths   none: this run began without tracked averages, which cannot begin in the middle. It goes on as before, with the "
                "EMA of training.ema_decay; for --ema LENGTH train another run (--init_from keeps the weights)"
            )

    def due(self, step: int) -> bool:
        return self.power_ema is not None and step % self.power_ema.spacing == 0

    def run(self, step: int, say: Callable[[str], None]) -> dict[str, float]:
        write_snapshot(self.folder, step, self.power_ema.tracks)
        self._thin_out()
        return {}

    def _thin_out(self) -> None:
        keep_snapshots(self.folder, snapshot_steps(self.trainer.step, self.power_ema.spacing, self.power_ema.limit))


def describe_snapshots(training: TrainingConfig, parameters: int) -> str:
    """Which lengths are tracked, and the disk space of their snapshots, for a network with that many weights."""
    count, size = snapshot_count(training, parameters), snapshot_bytes(training, parameters)
    lengths = " and ".join(f"{length:g}" for length in training.ema_lengths)
    if not training.ema_snapshots or not training.ema_lengths:
        return "no EMA lengths are tracked (training.ema_snapshots 0)"
    room = f"training.ema_snapshots_gb {training.ema_snapshots_gb:g}"
    if not count:
        return f"no EMA lengths are tracked: {room} has no room for a snapshot of {size / 1e9:.2f} GB"
    text = f"EMA of {lengths} for --ema LENGTH; at most {count} snapshots, {count * size / 1e9:.2g} GB on disk"
    if count < training.ema_snapshots:
        text += f" ({training.ema_snapshots} would be {training.ema_snapshots * size / 1e9:.2g} GB, more than {room})"
    return text
