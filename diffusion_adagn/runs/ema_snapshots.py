"""Snapshots of the tracked averages of a run, RUN/ema/step-00000500.safetensors, and averages of any length made of them.

A snapshot has the averages of all tracked lengths in float16, as "0.05/conv_in.weight". A checkpoint has them in float32, in
power_ema.safetensors. The average of another length at a checkpoint's step is a sum of these, of the snapshots of earlier
steps, and of the plain weights (`power_ema.fit`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic import atomic_write
from ..commands import resume_command, with_commands
from ..config import MAX_EMA_LENGTH, TrainingConfig
from ..errors import InputError, one_line
from .checkpoint import load_weights, read_state, sync, verify
from .layout import POWER_EMA, RunFolder
from .power_ema import MAX_ERROR, Average, fit, possible_lengths

NAME = re.compile(r"step-([0-9]{8,12})\.safetensors")


def snapshot_count(training: TrainingConfig, parameters: int) -> int:
    """How many snapshots a run keeps: `ema_snapshots`, or as many as `ema_snapshots_gb` has room for. 0: no tracking."""
    if not training.ema_lengths or not parameters:
        return 0
    return min(training.ema_snapshots, int(training.ema_snapshots_gb * 1e9 / snapshot_bytes(training, parameters)))


def snapshot_bytes(training: TrainingConfig, parameters: int) -> int:
    """Bytes of a snapshot of a network with that many weights."""
    return 2 * len(training.ema_lengths) * parameters


def write_snapshot(folder: Path, step: int, tracks: Mapping[float, Mapping[str, Tensor]]) -> Path:
    """Write the snapshot of a step; one that is there is replaced.

    Args:
        folder: RUN/ema.
        step: After how many steps.
        tracks: The averages by length and by name of the weight.

    Raises:
        InputError: The file cannot be written. Other snapshots are unchanged.
    """
    tensors = {
        f"{length}/{name}": tensor.half().contiguous().cpu()
        for length, weights in tracks.items()
        for name, tensor in weights.items()
    }

    def write(tmp: Path) -> None:
        save_file(tensors, tmp)
        sync(tmp)

    try:
        return atomic_write(folder / f"step-{step:08d}.safetensors", write)
    except Exception as error:  # safetensors raises its own exceptions
        newest = RunFolder(folder.parent).newest_checkpoint()
        text = f"the EMA snapshot of step {step} cannot be written to {folder} ({one_line(error, 200)}). "
        text += f"The newest complete checkpoint is {newest}. " if newest else ""
        text += (
            "Free disk space or fix the cause, then resume (with a smaller --training.ema_snapshots_gb fewer remain):"
        )
        raise InputError(with_commands(text, resume_command(folder.parent))) from error


def snapshots(folder: Path) -> dict[int, Path]:
    """The snapshots in RUN/ema by step, oldest first."""
    found = {int(match[1]): p for p in folder.glob("step-*") if (match := NAME.fullmatch(p.name))}
    return dict(sorted(found.items()))


def keep_snapshots(folder: Path, steps: Sequence[int]) -> None:
    """Remove the snapshots of other steps, and files of writes that a kill interrupted. The run must be locked."""
    names = {f"step-{step:08d}.safetensors" for step in steps}
    for file in folder.glob("*.safetensors"):  # hidden ones too
        if file.name not in names:
            file.unlink()


# ---------------------------------------------------------------------- averages of any length


@dataclass(frozen=True)
class SavedAverages:
    """What was saved up to a checkpoint, that averages at its step can be made of.

    checkpoint: the folder. step: its step. tracked: the lengths in training. files: a file and the prefix of its tensors for each
    of the averages.
    """

    checkpoint: Path
    step: int
    tracked: tuple[float, ...]
    averages: tuple[Average, ...]
    files: tuple[tuple[Path, str], ...]

    def possible(self) -> str:
        """A sentence on which lengths can be made."""
        shortest, longest = possible_lengths(self.averages, self.step)
        return f"The shortest possible length here is {shortest:g}, the longest {longest:g}."


def saved_averages(checkpoint: Path) -> SavedAverages:
    """The averages that were saved up to a checkpoint. Raises InputError if it has none."""
    file, step = checkpoint / POWER_EMA, read_state(checkpoint)["step"]
    if not file.is_file():
        raise InputError(
            f"{checkpoint} has no tracked averages ({POWER_EMA}): its run began in an earlier version, or with training.ema_snapshots 0. "
            "Here --ema is run (the average of training.ema_decay) or raw; a run that is started now has them."
        )
    if problem := verify(checkpoint, POWER_EMA):
        raise InputError(f"the checkpoint {checkpoint} is corrupted ({problem}): use another one.")
    tracked = tuple(sorted({_length(name, file) for name in _names(file)}))
    averages, files = [Average(step, 0.0)], [(checkpoint / "model.safetensors", "")]
    for length in tracked:
        averages.append(Average(step, length))
        files.append((file, f"{length}/"))
    for at, snapshot in snapshots(RunFolder(checkpoint.parent.parent).ema).items():
        if 0 < at < step:
            averages += [Average(at, length, half=True) for length in tracked]
            files += [(snapshot, f"{length}/") for length in tracked]
    return SavedAverages(checkpoint, step, tracked, tuple(averages), tuple(files))


def load_average(saved: SavedAverages, model: nn.Module, length: float) -> float:
    """Give a network the average of a length at a checkpoint's step.

    Args:
        saved: What the average is made of.
        model: The run's network, on the CPU, with float32 weights of any values.
        length: The length, in 0..0.288.

    Returns:
        The relative L2 error of the weights to expect.

    Raises:
        InputError: The length cannot be made to 1 %, or a file is corrupted.
    """
    coefficients, errors = fit(saved.averages, saved.step, [length])
    if not errors[0] <= MAX_ERROR:
        raise InputError(
            f"an EMA of length {length:g} cannot be made of what {saved.checkpoint} has ({len(saved.averages)} saved averages): the error would be "
            f"{errors[0]:.1%} of the weights, more than {MAX_ERROR:.0%}. {saved.possible()}"
        )
    load_weights(saved.checkpoint / "model.safetensors", model)  # buffers, too
    weights = dict(model.named_parameters())
    sums = {name: torch.zeros_like(w, memory_format=torch.contiguous_format) for name, w in weights.items()}
    by_file: dict[Path, list[tuple[str, float]]] = {}
    for (file, prefix), coefficient in zip(saved.files, coefficients[0]):
        if abs(coefficient) > 1e-9:
            by_file.setdefault(file, []).append((prefix, float(coefficient)))
    for file, terms in by_file.items():
        _add(sums, file, terms)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(sums[name])
    return float(errors[0])


def _add(sums: dict[str, Tensor], file: Path, terms: Sequence[tuple[str, float]]) -> None:
    """Add a file's averages, each times its coefficient, to the sums."""
    try:
        with safe_open(file, "pt") as opened:
            for prefix, coefficient in terms:
                for name, total in sums.items():
                    tensor = opened.get_tensor(prefix + name)
                    if tensor.shape != total.shape:
                        raise ValueError(f"{prefix}{name} has shape {list(tensor.shape)}, expected {list(total.shape)}")
                    total.add_(tensor.float(), alpha=coefficient)
    except Exception as error:  # safetensors raises its own exceptions
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the saved average {file} cannot be read ({reason}): remove the file, and lengths are made of the others."
        ) from None


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except Exception as error:  # safetensors raises its own exceptions
        raise InputError(f"{file} cannot be read as safetensors: {' '.join(str(error).split())[:200]}") from None


def _length(name: str, file: Path) -> float:
    """The length in a tensor's name, such as "0.05/conv_in.weight"."""
    text = name.partition("/")[0]
    if re.fullmatch(r"0\.[0-9]{1,17}", text) and 0 < float(text) <= MAX_EMA_LENGTH:
        return float(text)
    raise InputError(f"{file} is corrupted: expected names such as 0.05/conv_in.weight, got {name[:80]!r}.")
