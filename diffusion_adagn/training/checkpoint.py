"""Checkpoints: a folder a step, safetensors and json, written beside and renamed into place."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import InputError
from ..run import STATE, checkpoints
from .ema import EMA


def save_checkpoint(
    folder: Path, state: dict, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write folder/step-XXXXXXXX, then prune all but the newest `keep`. state: JSON, with "step". Returns the path."""
    path = folder / f"step-{state['step']:08d}"
    beside = folder / f".{path.name}.{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file(_tensors(model), beside / "model.safetensors")
    save_file(_tensors(ema.model), beside / "ema.safetensors")
    save_file(_optimizer_tensors(model, optimizer), beside / "optimizer.safetensors")
    (beside / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for file in beside.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    if path.exists():  # the same step saved again, by a resumed run
        shutil.rmtree(path)
    beside.rename(path)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def read_state(checkpoint: Path) -> dict:
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"the checkpoint {checkpoint} is damaged ({error}): remove it to go on from the one before."
        ) from None


def load_checkpoint(checkpoint: Path, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, EMA and optimizer back, bit for bit."""
    load_weights(checkpoint / "model.safetensors", model)
    load_weights(checkpoint / "ema.safetensors", ema.model)
    saved = _load(checkpoint / "optimizer.safetensors")
    state = {i: {} for i, _ in enumerate(model.named_parameters())}
    index = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    for key, tensor in saved.items():
        name, _, part = key.rpartition("/")
        state[index[name]][part] = tensor
    optimizer.load_state_dict({"state": state if saved else {}, "param_groups": optimizer.state_dict()["param_groups"]})


def load_weights(file: Path, model: nn.Module) -> None:
    """Strict: raises InputError naming missing, surplus or misshapen weights."""
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
