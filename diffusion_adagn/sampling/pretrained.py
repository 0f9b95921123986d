"""The parts of a pipeline from its files: a pipeline folder, or a run's checkpoint. Only safetensors and JSON are read."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ..commands import command, resume_command, with_commands
from ..config import DiffusionConfig, RunConfig, read_config
from ..diffusion.schedule import PREDICTIONS, SAMPLERS, make_scheduler
from ..errors import InputError
from ..labels import LabelSpace
from ..models.config import NetworkConfig, check_size
from ..models.unet import AdaGNUNet
from ..runs.checkpoint import load_weights
from ..runs.layout import STATE, RunFolder, label_space, network_config
from ..schema import apply, read_json, short_repr

OPTIONS = {  # of model_index.json, and their types
    "clip_x0": (bool,),
    "ema_decay": (float, int, type(None)),
    "trained_steps": (int, type(None)),
    "guidance_convention": (str,),
}
WEIGHTS = "diffusion_pytorch_model"  # as diffusers names them; large ones are cut into WEIGHTS-00001-of-00002 and so on


def pipeline_parts(folder: Path, torch_dtype: torch.dtype | None) -> dict[str, Any]:
    """The arguments of ClassConditionalPipeline in a folder with model_index.json. Raises InputError for one that is not ours."""
    index = read_json(folder / "model_index.json")
    known = {s.__name__: s for s in SAMPLERS.values()}
    scheduler_class = known.get((index.get("scheduler") or ["", ""])[1])
    if index.get("unet") == ["diffusers", "UNet2DModel"]:
        raise InputError(
            with_commands(f"{folder} holds a stock UNet2DModel. Import it first:", command("import-diffusers", folder))
        )
    if "labels" not in index or scheduler_class is None:
        raise InputError(
            f"{folder} was not written by this package (labels or scheduler are missing in model_index.json)."
        )
    try:
        labels = LabelSpace.from_dict(index["labels"])
    except InputError as error:
        raise InputError(f"{folder / 'model_index.json'}: {error}") from None
    options = {k: index[k] for k in OPTIONS if k in index}
    wrong = [k for k, value in options.items() if type(value) not in OPTIONS[k]]
    if wrong:
        raise InputError(f"{folder / 'model_index.json'}: {wrong[0]} cannot be {short_repr(options[wrong[0]])}.")
    return dict(
        unet=load_unet(folder / "unet", torch_dtype),
        scheduler=load_scheduler(folder / "scheduler", scheduler_class),
        labels=labels,
        **options,
    )


def checkpoint_of(path: str | Path, weights: str = "ema") -> Path | None:
    """The checkpoint folder whose weights a run or a checkpoint means; None for a run whose pipeline folder holds them.

    Raises InputError for a run that has neither.
    """
    run = RunFolder(Path(path))
    if (run.path / STATE).is_file():
        return run.path
    if not run.config_file.is_file() or (weights == "ema" and run.pipeline.is_dir()):
        return None
    newest = run.newest_checkpoint()
    if newest is None:
        raise InputError(
            with_commands(f"the run {path} has no checkpoint yet. Let it train on with:", resume_command(path))
        )
    return newest


def checkpoint_parts(checkpoint: Path, weights: str = "ema") -> dict[str, Any]:
    """The arguments of ClassConditionalPipeline in a checkpoint folder. weights: "ema" or "raw"."""
    config_file = checkpoint.parent.parent / "config.yaml"
    if not config_file.is_file():
        raise InputError(f"{checkpoint} stands alone: its run's config.yaml is looked for at {config_file}.")
    config = read_config(config_file)
    step = read_json(checkpoint / STATE).get("step")
    if type(step) is not int or step < 0:
        raise InputError(f"the checkpoint {checkpoint} is corrupted: its step is {short_repr(step)} ({STATE}).")
    file = checkpoint / f"{'ema' if weights == 'ema' else 'model'}.safetensors"
    with torch.device("meta"):
        unet = AdaGNUNet(**network_config(config))
    check_fits(unet, [file], f"{file} does not fit the network of {config_file}")
    load_weights(file, unet.to_empty(device="cpu"))
    return run_parts(config, unet.eval(), config.training.ema_decay if weights == "ema" else None, step)


def run_parts(config: RunConfig, unet: AdaGNUNet, ema_decay: float | None, step: int) -> dict[str, Any]:
    """The arguments of ClassConditionalPipeline for a run's network after `step` steps."""
    scheduler = make_scheduler(config.diffusion, learned_variance=unet.config.learned_variance)
    return {
        "unet": unet,
        "scheduler": scheduler,
        "labels": label_space(config),
        "clip_x0": config.diffusion.clip_x0,
        "ema_decay": ema_decay,
        "trained_steps": step,
    }


def load_unet(folder: Path, torch_dtype: torch.dtype | None = None) -> AdaGNUNet:
    """An AdaGNUNet from its folder, in eval mode. Raises InputError for a config.json that is not its, and weights that do not fit."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no network (no config.json).")
    values = {k: v for k, v in read_json(folder / "config.json").items() if not k.startswith("_")}
    network = NetworkConfig()
    apply(network, values, where=f"in {folder / 'config.json'}")
    try:
        check_size(vars(network))
        with torch.device("meta"):
            unet = AdaGNUNet(**values)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None
    fill(unet, folder)
    return (unet if torch_dtype is None else unet.to(torch_dtype)).eval()


def fill(model: nn.Module, folder: Path) -> None:
    """Give a model on the meta device the weights of its folder. Raises InputError, before memory is taken, if they do not fit."""
    whole = folder / f"{WEIGHTS}.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{WEIGHTS}-*-of-*.safetensors"))
    if not files:
        raise InputError(
            f"{folder} cannot be loaded (safetensors only): it holds no {whole.name}; pickled weights are not read."
        )
    check_fits(model, files, f"{folder} cannot be loaded: the weights do not fit its config.json")
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    model.to_empty(device="cpu").load_state_dict(state)


def check_fits(model: nn.Module, files: Sequence[Path], wrong: str) -> None:
    """Raises InputError, which begins with `wrong`, unless the files hold the model's weights; only their headers are read."""
    found: dict[str, list[int]] = {}
    for file in files:
        try:
            if not file.is_file():
                raise FileNotFoundError("it is missing")
            with safe_open(file, "pt") as weights:
                found |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 - no dict
        except Exception as error:  # safetensors raises its own kinds
            raise InputError(f"{file} cannot be read as safetensors: {' '.join(str(error).split())[:300]}") from None
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    faults = {
        "size mismatch": [f"{n} {found[n]} for {s}" for n, s in wanted.items() if n in found and found[n] != s],
        "missing keys": [name for name in wanted if name not in found],
        "unexpected keys": [short_repr(name) for name in found if name not in wanted],
    }
    found_faults = [
        f"{what}: {', '.join(names[:4])}{', ...' * (len(names) > 4)}" for what, names in faults.items() if names
    ]
    if found_faults:
        raise InputError(f"{wrong} ({'; '.join(found_faults)}).")


def load_scheduler(folder: Path, kind: type[SchedulerMixin]) -> SchedulerMixin:
    """A scheduler of this class from its folder. Raises InputError for settings that cannot be, or that make no process."""
    file = folder / "scheduler_config.json"
    config = read_json(file)
    apply(DiffusionConfig(), {k: v for k, v in config.items() if k == "num_train_timesteps"}, where=f"in {file}")
    defaults = {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}
    for name, value in config.items():
        default = defaults.get(name)
        kinds = (int, float) if type(default) is float else (type(default),)
        vast = type(value) is int and abs(value) > 10**6
        if default is not None and value is not None and (vast or type(value) not in kinds):
            raise InputError(f"{name}: {short_repr(value)} cannot be, where {default!r} is usual (in {file}).")
    for name, expected in (
        ("prediction_type", PREDICTIONS.values()),
        ("timestep_spacing", ("leading", "trailing", "linspace")),
    ):
        if config.get(name, defaults[name]) not in expected:
            raise InputError(f"{name} {short_repr(config[name])} is not one of {', '.join(expected)} (in {file}).")
    try:
        scheduler = kind.from_config(config)
        betas, alphas = scheduler.betas, scheduler.alphas_cumprod
        sound = alphas.shape == (scheduler.config.num_train_timesteps,) and bool(
            ((betas >= 0) & (betas <= 1)).all() and alphas.isfinite().all()
        )
    except Exception as error:  # diffusers does not look at what it is given
        raise InputError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if not sound:
        raise InputError(
            f"the betas in {file} are no noise schedule: expected one between 0 and 1 for each of the timesteps."
        )
    return scheduler


def model_hash(unet: AdaGNUNet) -> str:
    """16 hex digits that tell two networks apart: SHA-256 over the weights, by name, and the config."""
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
