"""Checkpoints: a folder a step, safetensors and json, written beside and renamed into place, with a manifest of sizes and hashes."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..atomic import WINDOWS, atomic_dir
from ..commands import resume_command, with_commands
from ..errors import InputError
from ..schema import read_json, short_repr
from .layout import STATE, checkpoints

MANIFEST = "manifest.json"  # {file: {bytes, sha256}} of all the others
PLAIN = re.compile(r"\w[\w.-]{0,99}")  # a file of the folder itself; a stranger's may name any
PARTIAL_PREFIX = ".step-"  # how names of unfinished and of removed checkpoints begin


def save_checkpoint(
    folder: Path,
    state: dict,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    keep_every: int = 0,
    prune: bool = True,
) -> Path:
    """Write folder/step-XXXXXXXX, then prune all but the newest `keep` and multiples of `keep_every` steps. Returns the path.

    state: JSON, with "step". prune False: leave that to the next save, where a launcher may soon end the process. Raises InputError if it cannot be written; the earlier ones are then as they were.
    """
    path = folder / f"step-{state['step']:08d}"

    def write(tmp: Path) -> None:
        tmp.mkdir(parents=True)
        facts = {}
        with ThreadPoolExecutor(1) as thread:  # hashes a file and syncs it while the next one is written
            for name, tensors in (
                ("optimizer.safetensors", lambda: _optimizer_tensors(model, optimizer)),  # the largest
                ("model.safetensors", lambda: _tensors(model)),
                ("ema.safetensors", lambda: _tensors(ema)),
            ):
                save_file(tensors(), tmp / name)
                facts[name] = thread.submit(_finished, tmp / name)
            (tmp / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            facts[STATE] = thread.submit(_finished, tmp / STATE)
            manifest = {name: facts[name].result() for name in sorted(facts)}
        (tmp / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (tmp / MANIFEST, tmp):
            _sync(path)

    try:
        atomic_dir(path, write)
        _sync(folder)
    except Exception as error:  # safetensors raises its own kinds
        left = checkpoints(folder)
        raise InputError(
            with_commands(
                f"the checkpoint of step {state['step']} cannot be written to {folder} ({' '.join(str(error).split())[:200]}). "
                + (f"The newest that is whole is {left[-1]}. " if left else "")
                + "Make room, or put it right, and go on with:",
                resume_command(folder.parent),
            )
        ) from error
    for old in checkpoints(folder)[:-keep] if prune else []:
        if not keep_every or int(old.name.split("-")[1]) % keep_every:
            _remove(old)
    return path


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left unfinished. Call while the run is locked."""
    for tmp in folder.glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(tmp, ignore_errors=True)


def latest_valid(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint, every byte of it looked at; damaged ones are named and passed over. None if there is none.

    Raises InputError if there are some and all are damaged.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        wrong = verify(checkpoint)
        if wrong is None:
            return checkpoint
        say(f"the checkpoint {checkpoint} is damaged ({wrong}): passed over")
    if found:
        raise InputError(
            f"every checkpoint in {folder} is damaged: the run cannot go on. Start another (--init_from keeps what weights can be read)."
        )
    return None


def verify(checkpoint: Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint, or with one file of it; None if it is as it was written."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        for name, facts in manifest.items():
            if only not in (None, name):
                continue
            if not PLAIN.fullmatch(name):
                return f"{MANIFEST} names {short_repr(name)}, which is no file of a checkpoint"
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            size = file.stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size} bytes in place of {short_repr(facts['bytes'])}"
            if _digest(file) != facts:
                return f"{name} is not what was written"
        missing = {STATE, "model.safetensors", "ema.safetensors", "optimizer.safetensors"} - set(manifest)
        return f"{min(missing)} is not in {MANIFEST}" if missing else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST}: {error}"


def _digest(file: Path) -> dict:
    with open(file, "rb") as handle:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _finished(file: Path) -> dict:
    """Put a file that has been written onto the disk; its facts."""
    facts = _digest(file)
    _sync(file)
    return facts


def _sync(path: Path) -> None:
    """Onto the disk, a folder's names too."""
    if WINDOWS and path.is_dir():  # Windows opens no folder
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows syncs what is open for writing
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(checkpoint: Path) -> None:
    """Out of sight first, so that half of one is never seen."""
    tmp = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(tmp, ignore_errors=True)
    checkpoint.rename(tmp)
    shutil.rmtree(tmp, ignore_errors=True)


def read_state(checkpoint: Path) -> dict:
    """Its state.json. Raises InputError if that cannot be read, or says no step."""
    try:
        state = read_json(checkpoint / STATE)
        if type(state.get("step")) is not int or state["step"] < 0:
            raise ValueError(f"its step is {short_repr(state.get('step'))}")
        return state
    except (OSError, ValueError) as error:
        raise InputError(
            f"the checkpoint {checkpoint} is damaged ({error}): remove it to go on from the one before."
        ) from None


def load_checkpoint(checkpoint: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, EMA and optimizer back, bit for bit."""
    load_weights(checkpoint / "model.safetensors", model)
    load_weights(checkpoint / "ema.safetensors", ema)
    saved = _load(checkpoint / "optimizer.safetensors")
    state = {i: {} for i, _ in enumerate(model.named_parameters())}
    index = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    weights = dict(model.named_parameters())
    for key, tensor in saved.items():
        name, _, part = key.rpartition("/")
        like = weights[name]  # files are contiguous, weights may be channels_last
        state[index[name]][part] = torch.empty_like(like, device="cpu").copy_(tensor) if tensor.ndim else tensor
    optimizer.load_state_dict({"state": state if saved else {}, "param_groups": optimizer.state_dict()["param_groups"]})


def load_weights(file: Path, model: nn.Module) -> None:
    """Strict: raises InputError naming missing, surplus or misshapen weights, and a file of a checkpoint that is not as it was written."""
    if (file.parent / MANIFEST).is_file() and (wrong := verify(file.parent, file.name)):
        others = [c for c in checkpoints(file.parent.parent) if c != file.parent]
        remedy = f"name another, such as {others[-1]}" if others else "there is no other beside it"
        raise InputError(f"the checkpoint {file.parent} is damaged ({wrong}): {remedy}.")
    try:
        model.load_state_dict(_load(file))
    except RuntimeError as error:
        raise InputError(
            f"{file} does not fit the network of this config: {' '.join(str(error).split())[:400]}"
        ) from None


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises its own kinds
        raise InputError(
            f"{file} cannot be read ({error}): remove its checkpoint to go on from the one before."
        ) from None


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().contiguous().cpu() for name, p in model.state_dict().items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name: "conv_in.weight/exp_avg"."""
    return {
        f"{name}/{part}": torch.as_tensor(value).detach().contiguous().cpu()
        for name, p in model.named_parameters()
        for part, value in optimizer.state.get(p, {}).items()
    }
