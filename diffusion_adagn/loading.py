"""The model that a path means: a run, a checkpoint, a pipeline folder, a hub id."""

import hashlib
import json
import os
from pathlib import Path

import torch

from .commands import resume_command, then
from .config import DataConfig, RunConfig, read_config, read_json, said
from .diffusion.pipeline import ClassConditionalPipeline, check_fits
from .diffusion.schedule import make_scheduler
from .errors import InputError
from .models.unet import AdaGNUNet
from .run import STATE, RunFolder, label_space, network_config
from .training.checkpoint import load_weights


def make_pipeline(config: RunConfig, unet: AdaGNUNet, ema_decay: float | None, step: int) -> ClassConditionalPipeline:
    scheduler = make_scheduler(config.diffusion, learned_variance=unet.config.learned_variance)
    return ClassConditionalPipeline(unet, scheduler, label_space(config), config.diffusion.clip_x0, ema_decay, step)


def open_pipeline(path: str | Path, weights: str = "ema") -> tuple[ClassConditionalPipeline, str]:
    """The model of a run folder, a checkpoint folder, a pipeline folder or a hub id, and a sentence on what it is.

    weights: "ema", or "raw" (checkpoints only: a pipeline keeps the EMA alone).
    """
    run, checkpoint = RunFolder(Path(path)), None
    if (run.path / "state.json").is_file():
        checkpoint = run.path
    elif run.config_file.is_file() and (weights == "raw" or not run.pipeline.is_dir()):
        checkpoint = run.newest_checkpoint()
        if checkpoint is None:
            raise InputError(then(f"the run {path} has no checkpoint yet. Let it train on with:", resume_command(path)))
    if checkpoint is not None:
        return _from_checkpoint(checkpoint, weights), f"{'EMA' if weights == 'ema' else 'raw'} weights of {checkpoint}"
    if weights == "raw":
        raise InputError(f"{path} holds the EMA weights only: name a run or checkpoint folder for --weights raw.")
    pipe = ClassConditionalPipeline.from_pretrained(path)
    newest = run.newest_checkpoint()
    note = ""
    if newest is not None and int(newest.name.split("-")[1]) > (pipe.config.trained_steps or 0):
        note = f" (a newer checkpoint lies beside it: {newest})"
    kind = "EMA weights" if pipe.config.ema_decay is not None else "weights"
    return pipe, f"{kind} of {path} after {pipe.config.trained_steps or 'an unknown number of'} steps{note}"


def _from_checkpoint(checkpoint: Path, weights: str) -> ClassConditionalPipeline:
    config_file = checkpoint.parent.parent / "config.yaml"
    if not config_file.is_file():
        raise InputError(f"{checkpoint} stands alone: its run's config.yaml is looked for at {config_file}.")
    config = read_config(config_file)
    step = read_json(checkpoint / STATE).get("step")
    if type(step) is not int or step < 0:
        raise InputError(f"the checkpoint {checkpoint} is damaged: its step is {said(step)} ({STATE}).")
    file = checkpoint / f"{'ema' if weights == 'ema' else 'model'}.safetensors"
    with torch.device("meta"):
        unet = AdaGNUNet(**network_config(config))
    check_fits(unet, [file], f"{file} does not fit the network of {config_file}")
    load_weights(file, unet.to_empty(device="cpu"))
    return make_pipeline(config, unet.eval(), config.training.ema_decay if weights == "ema" else None, step)


def recorded_data(source: str | Path) -> DataConfig | None:
    """The data settings of the run that a run folder, its checkpoint or its pipeline folder belongs to."""
    try:
        path = Path(source).resolve()
    except (OSError, ValueError, RuntimeError):  # no path at all, such as a name with a NUL in it, or a loop of links
        return None
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent if path.name == "pipeline" else path
    file = RunFolder(run).config_file
    return read_config(file).data if os.path.isfile(file) else None


def model_hash(unet: AdaGNUNet) -> str:
    """16 hex digits that tell two networks apart: SHA-256 over the weights, by name, and the config."""
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
