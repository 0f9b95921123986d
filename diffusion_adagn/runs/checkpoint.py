"""Checkpoints: one folder per step, of safetensors and JSON files, with a manifest of sizes and hashes. Writes are atomic."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from pydantic import Strict, StrictInt
from safetensors.torch import load_file, save_file
from torch import nn

from ..atomic import WINDOWS, atomic_dir
from ..commands import resume_command, with_commands
from ..errors import InputError, one_line
from ..schema import as_document, document, read_document, short_repr
from .layout import POWER_EMA, STATE, checkpoints

MANIFEST = "manifest.json"  # {file name: {bytes, sha256}} of all other files
FILE_NAME = re.compile(r"\w[\w.-]{0,99}")  # without a folder; a downloaded manifest may name any path
PARTIAL_PREFIX = ".step-"  # of the names of unfinished and of removed checkpoints


@document
class CheckpointState:
    """What is checked of state.json."""

    step: Annotated[StrictInt, Ge(0)]
    position: Annotated[StrictInt | None, Ge(0)] = None
    lr: Annotated[float | None, Strict()] = None
    signals: list[tuple[float, float]] = field(default_factory=list)
    scaler: dict[str, Any] | None = None
    faults: Annotated[StrictInt, Ge(0)] = 0
    ema_spacing: Annotated[StrictInt | None, Ge(1)] = None
    settings: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    state: dict,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    power_ema: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write folder/step-XXXXXXXX.

    Args:
        folder: The run's checkpoints folder.
        state: What JSON can hold, with "step".
        model: The network.
        ema: The network of the EMA weights.
        optimizer: The optimizer of `model`.
        power_ema: The tracked averages by name, such as "0.05/conv_in.weight"; None where none are tracked.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: The checkpoint cannot be written. Earlier checkpoints are unchanged.
    """
    path = folder / f"step-{state['step']:08d}"

    def write(tmp: Path) -> None:
        tmp.mkdir(parents=True)
        digests = {}
        with ThreadPoolExecutor(1) as thread:  # hashes and syncs a file while the next one is written
            files = {
                "optimizer.safetensors": lambda: _optimizer_tensors(model, optimizer),  # the largest
                "model.safetensors": lambda: _tensors(model.state_dict()),
                "ema.safetensors": lambda: _tensors(ema.state_dict()),
            }
            if power_ema is not None:
                files[POWER_EMA] = lambda: _tensors(power_ema)
            for name, tensors in files.items():
                save_file(tensors(), tmp / name)
                digests[name] = thread.submit(_sync_and_digest, tmp / name)
            (tmp / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            digests[STATE] = thread.submit(_sync_and_digest, tmp / STATE)
            manifest = {name: digests[name].result() for name in sorted(digests)}
        (tmp / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (tmp / MANIFEST, tmp):
            sync(path)

    try:
        atomic_dir(path, write)
        sync(folder)
    except Exception as error:  # safetensors raises its own exceptions
        valid = checkpoints(folder)
        newest = f"The newest complete checkpoint is {valid[-1]}. " if valid else ""
        text = f"the checkpoint of step {state['step']} cannot be written to {folder} ({one_line(error, 200)})"
        text += f". {newest}Free disk space or fix the cause, then resume:"
        raise InputError(with_commands(text, resume_command(folder.parent))) from error
    return path


def remove_old(folder: Path, keep: int, keep_every: int = 0) -> None:
    """Remove all checkpoints but the newest `keep`, and those at multiples of the step `keep_every` (0: none)."""
    for old in checkpoints(folder)[:-keep]:
        if not keep_every or int(old.name.split("-")[1]) % keep_every:
            # renamed first, so that a partly removed one is never visible
            tmp = old.with_name(f".{old.name}.removed")
            shutil.rmtree(tmp, ignore_errors=True)
            old.rename(tmp)
            shutil.rmtree(tmp, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove unfinished checkpoints of killed processes. The run must be locked."""
    for tmp in folder.glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(tmp, ignore_errors=True)


def latest_valid(folder: Path) -> Path | None:
    """The newest valid checkpoint, after a check of every byte; None if there are no checkpoints.

    Corrupted ones are reported and skipped. Raises InputError if all are.
    """
    paths = checkpoints(folder)
    for checkpoint in reversed(paths):
        problem = verify(checkpoint)
        if problem is None:
            return checkpoint
        print(f"the checkpoint {checkpoint} is corrupted ({problem}): skipped")
    if paths:
        remedy = "Start another run (--init_from loads the weights that can be read)."
        raise InputError(f"every checkpoint in {folder} is corrupted: the run cannot be resumed. {remedy}")
    return None


def verify(checkpoint: Path, file_name: str | None = None) -> str | None:
    """What is wrong with a checkpoint, or with its file `file_name` alone; None if it is valid."""
    try:
        manifest = read_document(checkpoint / MANIFEST)
        for name, expected in manifest.items():
            if file_name not in (None, name):
                continue
            if not FILE_NAME.fullmatch(name):
                return f"{MANIFEST} names {short_repr(name)}, which is not a file of a checkpoint"
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            size = file.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {short_repr(expected['bytes'])}"
            if _digest(file) != expected:
                return f"{name} differs from its recorded SHA-256"
        missing = {STATE, "model.safetensors", "ema.safetensors", "optimizer.safetensors"} - set(manifest)
        return f"{min(missing)} is not in {MANIFEST}" if missing else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST}: {error}"


def _digest(file: Path) -> dict:
    with open(file, "rb") as handle:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _sync_and_digest(file: Path) -> dict:
    """Flush a written file to the disk; its size and hash."""
    digest = _digest(file)
    sync(file)
    return digest


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if WINDOWS and path.is_dir():  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows syncs only files that are open for writing
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_state(checkpoint: Path) -> dict:
    """The checkpoint's state.json. Raises InputError if it cannot be read or has no valid step."""
    try:
        state = read_document(checkpoint / STATE)
        as_document(state, CheckpointState, checkpoint / STATE)
        return state
    except InputError as error:
        text = f"the checkpoint {checkpoint} is corrupted ({str(error).rstrip('.')}): remove it, and the one before is used."
        raise InputError(text) from None


def load_checkpoint(
    checkpoint: Path,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    power_ema: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Restore weights, EMA, optimizer and tracked averages (in place; None where none are tracked), bit for bit."""
    load_weights(checkpoint / "model.safetensors", model)
    load_weights(checkpoint / "ema.safetensors", ema)
    saved = _load(checkpoint / "optimizer.safetensors")
    weights = dict(model.named_parameters())
    state: dict[str, dict] = {name: {} for name in weights}
    for key, tensor in saved.items():
        name, _, part = key.rpartition("/")  # files are contiguous, weights may be channels_last
        state[name][part] = torch.empty_like(weights[name], device="cpu").copy_(tensor) if tensor.ndim else tensor
    for name, tensor in _load(checkpoint / POWER_EMA).items() if power_ema is not None else ():
        power_ema[name].copy_(tensor)
    by_index = dict(enumerate(state.values())) if saved else {}
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})


def load_weights(file: Path, model: nn.Module) -> None:
    """Load `file` into `model`, strictly.

    Raises:
        InputError: Weights are missing, unexpected or of another shape, or the file of a checkpoint is corrupted.
    """
    if (file.parent / MANIFEST).is_file() and (problem := verify(file.parent, file.name)):
        others = [c for c in checkpoints(file.parent.parent) if c != file.parent]
        remedy = f"use another one, such as {others[-1]}" if others else "there is no other checkpoint in its folder"
        raise InputError(f"the checkpoint {file.parent} is corrupted ({problem}): {remedy}.")
    try:
        model.load_state_dict(_load(file))
    except RuntimeError as error:
        raise InputError(f"{file} does not match the network of this config: {one_line(error, 400)}") from None


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises its own exceptions
        text = f"{file} cannot be read ({error}): remove its checkpoint to resume from the one before."
        raise InputError(text) from None


def _tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name, such as "conv_in.weight/exp_avg"."""
    return {
        f"{name}/{part}": torch.as_tensor(value).detach().contiguous().cpu()
        for name, p in model.named_parameters()
        for part, value in optimizer.state.get(p, {}).items()
    }
