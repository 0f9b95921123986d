"""A run is a folder. Where its things lie, and how a model is found again in it.

config.yaml  metrics.jsonl  previews/  checkpoints/step-00000500/  pipeline/
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .config import RunConfig, read_config
from .errors import InputError
from .labels import LabelSpace

if TYPE_CHECKING:
    from .diffusion.pipeline import ClassConditionalPipeline
    from .models.unet import AdaGNUNet


@dataclass(frozen=True)
class RunFolder:
    """The layout of a run."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def previews(self) -> Path:
        return self.path / "previews"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def pipeline(self) -> Path:
        return self.path / "pipeline"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a process trains here. Raises InputError if another does (on one machine; Unix only)."""
        try:
            import fcntl
        except ImportError:
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another process is training in {self.path}: wait for it, stop it, or give another --output_dir."
                ) from None
            yield
        finally:
            os.close(folder)

    def newest_checkpoint(self) -> Path | None:
        from .training.checkpoint import checkpoints

        found = checkpoints(self.checkpoints)
        return found[-1] if found else None


def network_config(config: RunConfig) -> dict:
    """AdaGNUNet's arguments for a resolved config (labels, image size and channels known)."""
    model = asdict(config.model)
    conditional = model.pop("class_conditional")
    return model | {
        "sample_size": config.data.image_size,
        "in_channels": config.data.channels,
        "num_classes": len(config.labels["names"]) if conditional else None,
    }


def label_space(config: RunConfig) -> LabelSpace:
    """The classes the network knows: the data's, without a null row if the config says so; none if unconditional."""
    if not config.model.class_conditional:
        return LabelSpace(())
    return LabelSpace.from_dict(config.labels | {"has_null": config.model.null_class})


def make_pipeline(config: RunConfig, unet: AdaGNUNet, ema_decay: float | None, step: int) -> ClassConditionalPipeline:
    from .diffusion.pipeline import ClassConditionalPipeline
    from .diffusion.schedule import make_scheduler

    scheduler = make_scheduler(config.diffusion, learned_variance=unet.config.learned_variance)
    return ClassConditionalPipeline(unet, scheduler, label_space(config), config.diffusion.clip_x0, ema_decay, step)


def open_pipeline(path: str | Path, weights: str = "ema") -> tuple[ClassConditionalPipeline, str]:
    """The model of a run folder, a checkpoint folder, a pipeline folder or a hub id, and a sentence on what it is.

    weights: "ema", or "raw" (checkpoints only: a pipeline keeps the EMA alone).
    """
    from .diffusion.pipeline import ClassConditionalPipeline

    run, checkpoint = RunFolder(Path(path)), None
    if (run.path / "state.json").is_file():
        checkpoint = run.path
    elif run.config_file.is_file() and (weights == "raw" or not run.pipeline.is_dir()):
        checkpoint = run.newest_checkpoint()
        if checkpoint is None:
            raise InputError(
                f"the run {path} has no checkpoint yet: let it train on with adagn train --resume auto --output_dir {path}."
            )
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


def check_model_path(path: str | Path) -> None:
    """Raises InputError unless the path exists or looks like a hub id, owner/name."""
    parts = str(path).split("/")
    if not Path(path).exists() and (len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "runs")):
        runs = ", ".join(str(p.parent) for p in sorted(Path("runs").glob("*/config.yaml"))[:6])
        raise InputError(
            f"there is no folder {path} (and a hub id looks like owner/name)."
            + (f" Runs here: {runs}." if runs else "")
        )


def pipeline_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder with model_index.json that a path or hub id means. Raises InputError if there is none."""
    for folder in (Path(path), Path(path) / "pipeline"):
        if (folder / "model_index.json").is_file():
            return folder
    check_model_path(path)
    if Path(path).exists():
        raise InputError(f"{path} is neither a run (config.yaml) nor a pipeline folder (model_index.json).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["model_index.json", "unet/*.json", "unet/*.safetensors", "scheduler/*.json"]
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"there is no folder {path}, and the hub did not give it: {str(error).splitlines()[0]}"
        ) from error


def _from_checkpoint(checkpoint: Path, weights: str) -> ClassConditionalPipeline:
    from .models.unet import AdaGNUNet
    from .training.checkpoint import load_weights, read_state

    config_file = checkpoint.parent.parent / "config.yaml"
    if not config_file.is_file():
        raise InputError(f"{checkpoint} stands alone: its run's config.yaml is looked for at {config_file}.")
    config = read_config(config_file)
    unet = AdaGNUNet(**network_config(config)).eval()
    load_weights(checkpoint / f"{'ema' if weights == 'ema' else 'model'}.safetensors", unet)
    return make_pipeline(
        config, unet, config.training.ema_decay if weights == "ema" else None, read_state(checkpoint)["step"]
    )


def model_hash(unet: AdaGNUNet) -> str:
    """16 hex digits that tell two networks apart: SHA-256 over the weights, by name, and the config."""
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
