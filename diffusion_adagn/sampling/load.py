"""The model that a path means: a run, a checkpoint, a pipeline folder, a hub id."""

from collections.abc import Sequence
from pathlib import Path

from ..config import RunConfig
from ..errors import named
from ..models.unet import AdaGNUNet
from ..runs.class_file import files_in, run_id
from ..runs.layout import RunFolder, checkpoint_of
from ..runs.recorded import recorded_config
from ..runs.weights import Weights
from .pipeline import ClassConditionalPipeline
from .pretrained import check_has, checkpoint_parts, run_parts


def make_pipeline(config: RunConfig, unet: AdaGNUNet, ema_decay: float | None, step: int) -> ClassConditionalPipeline:
    """A run's pipeline after `step` steps."""
    return ClassConditionalPipeline(**run_parts(config, unet, ema_decay, step))


def open_pipeline(
    path: str | Path, ema: float | str = "run", classes: Sequence[str | None] = ()
) -> tuple[ClassConditionalPipeline, str]:
    """The model of a run folder, a checkpoint folder, a pipeline folder or a hub id, and a sentence on what it is.

    Args:
        path: The model, as `Weights` writes it: RUN@STEP:EMA.
        ema: Which weights, as `ClassConditionalPipeline.from_pretrained` takes it, unless `path` names an EMA length.
        classes: Selections and mixes. Learned classes whose files they name are loaded.

    Raises:
        InputError: There is no such model, it does not have these weights, or a learned class does not fit it.
    """
    pipe, what = _open(path, ema)
    for file in files_in(*classes):
        pipe.load_class(file)
    return pipe, what


def open_guide(
    path: str | Path, ema: float | str = "run", classes: Sequence[str | None] = ()
) -> tuple[ClassConditionalPipeline, str]:
    """As `open_pipeline`, of a model that guidance moves away from; one without class vectors takes no learned class.

    Args:
        path: As `open_pipeline` takes it.
        ema: As `open_pipeline` takes it.
        classes: As `open_pipeline` takes them.

    Raises:
        InputError: As `open_pipeline`; the message begins with the guide.
    """
    pipe, what = _open(path, ema)
    if pipe.unet.embedding.classes is not None:
        with named(f"the guide {path}"):
            for file in files_in(*classes):
                pipe.load_class(file)
    return pipe, what


def _open(path: str | Path, ema: float | str) -> tuple[ClassConditionalPipeline, str]:
    weights = Weights.of(path, ema)
    path, ema = weights.path, weights.ema
    run, checkpoint = RunFolder(path), checkpoint_of(path, ema)
    if checkpoint is not None:
        pipe = ClassConditionalPipeline(**checkpoint_parts(checkpoint, ema))
        pipe.run_id = run_id(recorded_config(path))
        what = {"run": "EMA weights", "raw": "raw weights"}.get(ema) or f"weights (EMA of length {ema:g})"
        return pipe, f"{what} of {checkpoint}"
    check_has(path, ema)
    pipe = ClassConditionalPipeline.from_pretrained(path)
    newest = run.newest_checkpoint()
    note = ""
    if newest is not None and int(newest.name.split("-")[1]) > (pipe.config.trained_steps or 0):
        note = f" (a newer checkpoint lies beside it: {newest})"
    length = pipe.config.ema_length
    kind = "EMA weights" if pipe.config.ema_decay is not None else "weights"
    kind = kind if length is None else f"weights (EMA of length {length:g})"
    return pipe, f"{kind} of {path} after {pipe.config.trained_steps or 'an unknown number of'} steps{note}"


def ema_record(pipe: ClassConditionalPipeline) -> dict[str, float]:
    """What files record of the weights beside their hash: {"ema_length": 0.13}, or nothing if they are no such EMA."""
    return {} if pipe.config.ema_length is None else {"ema_length": pipe.config.ema_length}
