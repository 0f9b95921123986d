"""A model folder's metadata, without its weights: classes, step, data settings; and the commands' default output folders.

This module imports without torch, so that a wrong class name is reported at once.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import BeforeValidator, StrictInt, StrictStr

from ..commands import resume_command, unused_path, with_commands
from ..config import DataConfig, RunConfig, read_config, with_overrides
from ..errors import InputError, UsageError, named
from ..labels import LabelSpace
from ..schema import document, read_document
from .class_file import SUFFIX, with_files
from .layout import STATE, RunFolder, check_model_path, checkpoint_of, label_space, pipeline_folder, similar_runs
from .shipped import model_folder, shipped_folder
from .weights import Weights

MODEL_INDEX = "model_index.json"
MAX_INDEX = 2**27  # bytes of a samples.json; about 300,000 images


@document
class SampledImage:
    """What is read of an image in samples.json. guidance: the scale."""

    file: StrictStr
    class_id: Annotated[StrictInt, Ge(0)] | None
    guidance: float
    seed: StrictInt = 0


@document
class SamplesIndex:
    """What is read of a samples.json, which `adagn sample` writes beside its images."""

    images: list[SampledImage]
    labels: Annotated[LabelSpace, BeforeValidator(LabelSpace.from_dict)]
    model: dict[str, Any] | None = None
    unfinished: bool = False


def default_folder(parent: str, source: str | Path, ema: float | str = "run") -> Path:
    """Where a command writes without --out: PARENT/RUN/step-00000400, from the run and the step of the weights.

    A shipped model's is PARENT/pretrained/NAME. RUN is the path relative to the working directory, without the parts up to and including runs/. So runs/digits and
    imported/digits get different folders. An unknown step is omitted. ema: as `sampling.settings.Ema`; other weights than "run"
    are named too (step-00000400-raw, step-00000400-ema-0.13).
    """
    path = Path(source)
    if shipped_folder(source):
        return Path(parent, "pretrained", str(source))
    if not path.exists():
        return Path(parent, *str(source).split("/"))
    step = _step(weights_folder(path.resolve(), ema))
    which = "" if ema == "run" else "-raw" if ema == "raw" else f"-ema-{ema:g}"
    return Path(parent, *run_name_parts(run_of(path)), *([] if step is None else [f"step-{step:08d}{which}"]))


def run_of(path: Path) -> Path:
    """The absolute path of the run of a run, a checkpoint or a pipeline folder."""
    path = path.resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent if path.name == "pipeline" else path


def run_name_parts(path: Path) -> tuple[str, ...]:
    """The parts of an absolute path that name a run: relative to the working directory and after runs/; elsewhere the last two."""
    cwd = Path.cwd()
    inside = path != cwd and path.is_relative_to(cwd)
    parts = path.relative_to(cwd).parts if inside else path.parts[1:]
    if "runs" in parts[:-1]:
        return parts[len(parts) - parts[::-1].index("runs", 1) :]
    return parts if inside else parts[-2:]


def free_default_folder(parent: str, source: str | Path, ema: float | str = "run") -> str | None:
    """A free folder for --out if the default folder exists; None if it does not."""
    default = default_folder(parent, source, ema)
    return unused_path(str(default)) if default.exists() else None


def weights_folder(source: str | Path, ema: float | str = "run") -> Path | None:
    """The checkpoint or pipeline folder that `sampling.load.open_pipeline` loads; None if it is on the hub.

    Raises:
        InputError: The folder is not a run, a checkpoint or a pipeline, or a run without a checkpoint.
    """
    return checkpoint_of(source, ema) or (pipeline_folder(source) if model_folder(source).exists() else None)


def check_model(
    source: str | Path,
    guide: str | None,
    ema: float | str,
    classes: str | None,
    mixes: Sequence[str] = (),
    negatives: Sequence[str] = (),
) -> None:
    """Raises InputError if the model or the guide does not exist (and is not on the hub), or the model lacks a class.

    The classes of a model on the hub are not checked.
    """
    for path in (source, guide):
        if path is not None:
            check_model_path(Weights.parse(path).path)
    labels = _labels(weights_folder(source, ema))
    labels = None if labels is None else with_files(labels, classes, *mixes, *negatives)
    if labels is not None and classes is not None:
        try:
            labels.parse(classes)
        except InputError as error:
            raise InputError(f"{error}{_learned_class_hint(classes)}") from None
    for negative in dict.fromkeys(negatives if labels is not None else ()):
        with named("--negative"):
            labels.parse(negative)
    for mix in mixes if labels is not None else ():
        try:
            list(labels.parts_of_mix(mix))
        except InputError as error:
            raise InputError(f"the mix '{mix}': {error}") from None


def _learned_class_hint(classes: str) -> str:
    """A sentence, if the default folder of `adagn learn-class` has a class of one of the names."""
    files = [
        Path("classes", f"{word.strip()}{SUFFIX}") for word in classes.split(",") if set(word) & set("/\\") == set()
    ]
    return next((f" A learned class is named by its file: {file}." for file in files if file.is_file()), "")


def _labels(folder: Path | None) -> LabelSpace | None:
    if folder is None:
        return None
    if (folder / STATE).is_file():
        config = folder.parent.parent / "config.yaml"
        return label_space(read_config(config)) if config.is_file() else None
    labels = read_document(folder / MODEL_INDEX).get("labels")
    return None if labels is None else LabelSpace.from_dict(labels)


def _step(folder: Path | None) -> int | None:
    if folder is None:
        return None
    file, key = (STATE, "step") if (folder / STATE).is_file() else (MODEL_INDEX, "trained_steps")
    step = read_document(folder / file).get(key)
    return step if type(step) is int and step >= 0 else None


def resumed_config(resume: str, file: str | None, overrides: dict[str, str]) -> RunConfig:
    """The settings of the run that --resume means: those of the config file if one is given, else the recorded ones; and the overrides.

    Raises InputError if there is no run, and no config file to start one.
    """
    if resume != "auto" and Path(overrides.setdefault("output_dir", resume)) != Path(resume):
        raise UsageError(f"--resume {resume} and --output_dir {overrides['output_dir']} name two runs: give one.")
    config = None if file is None else read_config(file, overrides)
    place = overrides.get("output_dir") if config is None else config.output_dir
    if place is None:
        raise UsageError(f"which run? Give --resume RUN, such as --resume runs/digits.{similar_runs('runs/digits')}")
    run = RunFolder(place)
    if not run.config_file.is_file():
        if config is not None:
            return config  # the run starts
        whole = next((p for p in list(run.path.parents)[:2] if RunFolder(p).config_file.is_file()), None)
        part = f"{run.path} is a part of the run {whole}, and a run is resumed from its newest checkpoint:"
        missing = f"there is no run to resume in {run.path} (no config.yaml in it).{similar_runs(run.path)} To start a run, give --config."
        raise InputError(missing if whole is None else with_commands(part, resume_command(whole)))
    recorded = read_config(run.config_file, overrides if config is None else None)
    if recorded.labels is None and run.newest_checkpoint():
        text = f"{run.config_file} is incomplete or was edited: it lacks what the run recorded (labels). Put its content back"
        raise InputError(f"{text}, or start another run with --init_from {run.pipeline}.")
    if config is None:
        return recorded
    lr = recorded.training.lr
    if "training.lr" not in overrides and config.training.lr != lr:
        # it may have been changed while the run was resumed: the same command must go on with the run, not change it back
        print(f"training.lr is {lr:g}, as recorded in {run.config_file} (not {config.training.lr:g} of {file})")
        return with_overrides(config, {"training.lr": lr})
    return config


def recorded_data(source: str | Path) -> DataConfig | None:
    """The data settings of the run of a run folder, checkpoint or pipeline folder; None if there is no run."""
    config = recorded_config(source)
    return None if config is None else config.data


def recorded_config(source: str | Path) -> RunConfig | None:
    """The settings of the run of a run folder, checkpoint or pipeline folder; None if there is no run."""
    try:
        file = RunFolder(run_of(model_folder(source))).config_file
    except (OSError, ValueError, RuntimeError):  # not a path: a name with a NUL in it, or a loop of links
        return None
    return read_config(file) if os.path.isfile(file) else None
