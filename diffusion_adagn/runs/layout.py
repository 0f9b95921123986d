"""The files of a run folder, and the network's arguments from its config. This module imports without torch.

config.yaml  metrics.jsonl  previews/  checkpoints/step-00000500/  ema/step-00000500.safetensors  pipeline/
"""

import re
import shlex
from dataclasses import asdict
from difflib import SequenceMatcher
from pathlib import Path

from ..commands import resume_command, with_commands
from ..config import RunConfig
from ..errors import InputError, did_you_mean
from ..labels import LabelSpace
from ..models.config import AUGMENT_DIM, check_size
from .shipped import model_folder, shipped_folder, shipped_models

STATE = "state.json"  # of a checkpoint
POWER_EMA = "power_ema.safetensors"  # of a checkpoint: the tracked averages, "0.05/conv_in.weight"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    paths = (p.parent for p in folder.glob(f"step-*/{STATE}"))
    return sorted(p for p in paths if re.fullmatch(r"step-[0-9]{8,12}", p.name))


class RunFolder:
    """The files and folders of a run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file, self.metrics_file = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.previews, self.checkpoints = self.path / "previews", self.path / "checkpoints"
        self.pipeline = self.path / "pipeline"
        self.ema = self.path / "ema"  # the snapshots of the tracked averages (`ema_snapshots`)

    def newest_checkpoint(self) -> Path | None:
        return next(reversed(checkpoints(self.checkpoints)), None)


def network_config(config: RunConfig) -> dict:
    """AdaGNUNet's arguments for a resolved config (labels, image size and channels are set).

    Raises:
        InputError: The config is not resolved, or the network does not fit this machine's memory.
    """
    model = asdict(config.model)
    conditional = model.pop("class_conditional")
    if config.data.image_size is None or config.data.channels is None:
        raise InputError("the config lacks data.image_size and data.channels; a run's config.yaml has them.")
    images = {"sample_size": config.data.image_size, "in_channels": config.data.channels}
    num_classes = label_space(config).K if conditional else None
    network = model | images | {"num_classes": num_classes, "learned_variance": config.diffusion.learned_variance}
    network["augment_dim"] = AUGMENT_DIM if config.data.augment else 0
    check_size(network)
    return network


def label_space(config: RunConfig) -> LabelSpace:
    """The network's classes: those of the data, without a null label if the config says so; none if unconditional."""
    if not config.model.class_conditional:
        return LabelSpace(())
    if config.labels is None:
        raise InputError("the config lacks the classes (labels); a run's config.yaml has them.")
    return LabelSpace.from_dict(config.labels | {"has_null": config.model.null_class})


def similar_runs(path: str | Path) -> str:
    """ " Runs here: runs/a, runs/b.": runs in the path's folder and in runs/, most similar names first; "" if there are none."""
    path = Path(path)
    runs = {p.parent for folder in (path.parent, Path("runs")) for p in folder.glob("*/config.yaml")}
    runs = sorted(runs, key=lambda p: (-SequenceMatcher(None, p.name, path.name).ratio(), str(p)))[:6]
    return f" Runs here: {', '.join(shlex.quote(str(p)) for p in runs)}." if runs else ""


def check_model_path(path: str | Path) -> None:
    """Raises InputError unless the path exists, has the form of a hub id, owner/name, or is the name of a shipped model."""
    parts = str(path).split("/")
    if not model_folder(path).exists() and (len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "runs")):
        siblings = checkpoints(Path(path).parent)
        hint = f" Checkpoints here: {', '.join(map(str, siblings))}." if siblings else similar_runs(path)
        hint = did_you_mean(parts[0].lower(), shipped_models()) * (len(parts) == 1) + hint
        shipped = " and ".join(shipped_models())
        text = f"there is no folder {path} (a hub id has the form owner/name; {shipped} are shipped with the package)."
        raise InputError(f"{text}{hint}")


def loads_checkpoint(path: str | Path, ema: float | str = "run") -> bool:
    """Whether the model is loaded from a checkpoint: the path is one, or a run whose pipeline folder does not have these weights.

    ema: as `sampling.settings.Ema`."""
    return checkpoint_of(path, ema) is not None


def checkpoint_of(path: str | Path, ema: float | str = "run") -> Path | None:
    """The checkpoint folder whose weights a run or a checkpoint means; None for a run whose pipeline folder holds them.

    ema: as `sampling.settings.Ema`. Raises InputError for a run that has neither.
    """
    run = RunFolder(model_folder(path))
    if (run.path / STATE).is_file():
        return run.path
    if not run.config_file.is_file() or (ema == "run" and run.pipeline.is_dir()):
        return None
    newest = run.newest_checkpoint()
    if newest is None and shipped_folder(path):
        raise InputError(f"the shipped model {path} has the EMA weights of its run only, so no --ema can be chosen.")
    if newest is None:
        text = f"the run {path} has no checkpoint yet. If it trains now, wait for its first one; if it does not, train on with:"
        raise InputError(with_commands(text, resume_command(path)))
    return newest


def pipeline_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder with model_index.json of a path, hub id or shipped model. Raises InputError if there is none."""
    local = model_folder(path)
    for folder in (local, local / "pipeline"):
        if (folder / "model_index.json").is_file():
            return folder
    check_model_path(path)
    if Path(path).exists():
        hidden = f" It hides the shipped model {path}: rename it, or work in another folder." * (
            str(path) in shipped_models()
        )
        raise InputError(f"{path} is neither a run (config.yaml) nor a pipeline folder (model_index.json).{hidden}")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["model_index.json", "unet/*.json", "unet/*.safetensors", "scheduler/*.json"]
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors
        text = f"there is no folder {path}, and the hub download failed: {str(error).splitlines()[0]}"
        raise InputError(text) from error
