"""The model that a path means: a run, a checkpoint, a pipeline folder, a hub id."""

from pathlib import Path

from ..config import RunConfig
from ..errors import InputError
from ..models.unet import AdaGNUNet
from ..runs.layout import RunFolder, checkpoint_of
from .pipeline import ClassConditionalPipeline
from .pretrained import checkpoint_parts, run_parts


def make_pipeline(config: RunConfig, unet: AdaGNUNet, ema_decay: float | None, step: int) -> ClassConditionalPipeline:
    """A run's pipeline after `step` steps."""
    return ClassConditionalPipeline(**run_parts(config, unet, ema_decay, step))


def open_pipeline(path: str | Path, weights: str = "ema") -> tuple[ClassConditionalPipeline, str]:
    """The model of a run folder, a checkpoint folder, a pipeline folder or a hub id, and a sentence on what it is.

    weights: "ema", or "raw" (checkpoints only: a pipeline keeps the EMA alone).
    """
    run, checkpoint = RunFolder(path), checkpoint_of(path, weights)
    if checkpoint is not None:
        pipe = ClassConditionalPipeline(**checkpoint_parts(checkpoint, weights))
        return pipe, f"{'EMA' if weights == 'ema' else 'raw'} weights of {checkpoint}"
    if weights == "raw":
        raise InputError(f"{path} holds the EMA weights only: name a run or checkpoint folder for --weights raw.")
    pipe = ClassConditionalPipeline.from_pretrained(path)
    newest = run.newest_checkpoint()
    note = ""
    if newest is not None and int(newest.name.split("-")[1]) > (pipe.config.trained_steps or 0):
        note = f" (a newer checkpoint lies beside it: {newest})"
    kind = "EMA weights" if pipe.config.ema_decay is not None else "weights"
    return pipe, f"{kind} of {path} after {pipe.config.trained_steps or 'an unknown number of'} steps{note}"
