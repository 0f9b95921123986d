"""The parts of a pipeline from its files: a pipeline folder, or a run's checkpoint. Only safetensors and JSON are read."""

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from pydantic import BaseModel, BeforeValidator, Strict, StrictBool, StrictInt, StrictStr, create_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ..commands import command, with_commands
from ..config import OF_DDPM, RunConfig, differences, read_config
from ..diffusion.ode_scheduler import OdeScheduler, make_ode_scheduler
from ..diffusion.process import RHO, SIGMA_MAX, SIGMA_MIN
from ..diffusion.schedule import PREDICTIONS, SAMPLERS, make_scheduler
from ..errors import InputError, one_line
from ..labels import LabelSpace
from ..models.config import NetworkConfig, check_size
from ..models.unet import AdaGNUNet
from ..runs.checkpoint import load_weights, read_state
from ..runs.ema_snapshots import load_average, saved_averages
from ..runs.layout import checkpoint_of, label_space, network_config
from ..schema import Layer, as_document, build, document, read_document, short_repr


def _labels(recorded: Any) -> LabelSpace | None:
    return None if recorded is None else LabelSpace.from_dict(recorded)


@document
class ModelIndex:
    """What we read of a pipeline's model_index.json."""

    unet: Any = None
    scheduler: tuple[str, str] = ("", "")
    labels: Annotated[LabelSpace | None, BeforeValidator(_labels)] = None
    clip_x0: StrictBool = True
    ema_decay: Annotated[float | None, Strict()] = None
    ema_length: Annotated[float | None, Strict()] = None
    trained_steps: StrictInt | None = None
    guidance_convention: StrictStr = "pred = null + scale * (cond - null); scale 1 is no guidance"


@document
class OdeSettings:
    """What we read of an OdeScheduler's scheduler_config.json."""

    process: Literal["edm", "flow"]
    sampler: str
    spacing: str
    sigma_data: Annotated[float, Gt(0), Le(10)] = 0.5
    sigma_min: Annotated[float, Gt(0), Le(1)] = SIGMA_MIN
    sigma_max: Annotated[float, Gt(1), Le(1e6)] = SIGMA_MAX
    rho: Annotated[float, Ge(0.1), Le(100)] = RHO


# arguments of AdaGNUNet and their values of before; see `model_hash`
ADDED_LATER = {"patch_size": 1, "augment_dim": 0, "max_guidance_scale": None}
# settings that determine what the network receives and predicts
WHAT_IS_PREDICTED = {f"diffusion.{name}" for name in ("process", "sigma_data", *OF_DDPM)} - {
    "diffusion.timestep_spacing"
}
WEIGHTS = "diffusion_pytorch_model"  # as diffusers names them; large ones are cut into WEIGHTS-00001-of-00002 and so on


def pipeline_parts(folder: Path, torch_dtype: torch.dtype | None) -> dict[str, Any]:
    """The arguments of ClassConditionalPipeline in a folder with model_index.json. Raises InputError for one that is not ours."""
    index = read_document(folder / "model_index.json", ModelIndex)
    scheduler_class = {s.__name__: s for s in (*SAMPLERS.values(), OdeScheduler)}.get(index.scheduler[1])
    if index.labels is None or scheduler_class is None:
        text = f"{folder} was not written by this package (labels or scheduler are missing in model_index.json)."
        if index.unet == ["diffusers", "UNet2DModel"]:
            text = f"{folder} holds a stock UNet2DModel. Import it first:"
            text = with_commands(text, command("import-diffusers", folder))
        raise InputError(text)
    scheduler = load_scheduler(folder / "scheduler", scheduler_class)
    return vars(index) | {"unet": load_unet(folder / "unet", torch_dtype), "scheduler": scheduler}


def check_has(path: str | Path, ema: float | str) -> None:
    """Raises InputError for weights that a pipeline folder or a model on the hub does not have: any but "run"."""
    if ema != "run":
        raise InputError(
            f"{path} holds the EMA weights only: name a run or checkpoint folder for --ema {ema} (for a guide --guide_ema run "
            "takes what it holds)."
        )


def checkpoint_parts(path: str | Path, ema: float | str = "run") -> dict[str, Any]:
    """The arguments of ClassConditionalPipeline in the checkpoint that `checkpoint_of` finds. ema: as `settings.Ema`."""
    checkpoint = checkpoint_of(path, ema)
    config_file = checkpoint.parent.parent / "config.yaml"
    if not config_file.is_file():
        raise InputError(f"{checkpoint} stands alone: its run's config.yaml is looked for at {config_file}.")
    config, state = read_config(config_file), read_state(checkpoint)
    step = state["step"]
    trained = {key: value for key, value in state.get("settings", {}).items() if key in WHAT_IS_PREDICTED}
    if changed := differences(trained, config):
        raise InputError(
            f"{config_file} was edited after {checkpoint.name} was trained ({'; '.join(changed)}), and the network was not trained so: put "
            "the old values back."
        )
    file = checkpoint / f"{'ema' if ema == 'run' else 'model'}.safetensors"
    with torch.device("meta"):
        unet = AdaGNUNet(**network_config(config))
    check_fits(unet, [file], f"{file} does not fit the network of {config_file}")
    unet.to_empty(device="cpu").eval()
    if ema in ("run", "raw"):
        load_weights(file, unet)
        return run_parts(config, unet, config.training.ema_decay if ema == "run" else None, step)
    load_average(saved_averages(checkpoint), unet, ema)
    return run_parts(config, unet, None, step) | {"ema_length": ema}


def run_parts(config: RunConfig, unet: AdaGNUNet, ema_decay: float | None, step: int) -> dict[str, Any]:
    """The arguments of ClassConditionalPipeline for a run's network after `step` steps."""
    scheduler = make_scheduler(config.diffusion, learned_variance=unet.config.learned_variance)
    parts = {"unet": unet, "scheduler": scheduler, "labels": label_space(config), "clip_x0": config.diffusion.clip_x0}
    return parts | {"ema_decay": ema_decay, "trained_steps": step}


def load_unet(folder: Path, torch_dtype: torch.dtype | None = None) -> AdaGNUNet:
    """An AdaGNUNet from its folder, in eval mode. Raises InputError for a config.json that is not its, and weights that do not fit."""
    file = folder / "config.json"
    known = {f.name for f in dataclasses.fields(NetworkConfig)}
    values = {k: v for k, v in read_document(file).items() if k in known}
    network = build(NetworkConfig, Layer(values, f"in {file}"))
    # texts alone are converted, since a model's hash distinguishes 1 and 1.0
    values = {k: getattr(network, k) if isinstance(v, str) else v for k, v in values.items()}
    try:
        check_size(vars(network))
        with torch.device("meta"):
            unet = AdaGNUNet(**values)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    fill(unet, folder)
    return (unet if torch_dtype is None else unet.to(torch_dtype)).eval()


def fill(model: nn.Module, folder: Path) -> None:
    """Give a model on the meta device the weights of its folder. Raises InputError, before memory is taken, if they do not fit."""
    whole = folder / f"{WEIGHTS}.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{WEIGHTS}-*-of-*.safetensors"))
    if not files:
        text = f"{folder} cannot be loaded (safetensors only): it holds no {whole.name}; pickled weights are not read."
        raise InputError(text)
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
            raise InputError(f"{file} cannot be read as safetensors: {one_line(error)}") from None
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    faults = {
        "size mismatch": [f"{n} {found[n]} for {s}" for n, s in wanted.items() if n in found and found[n] != s],
        "missing keys": [name for name in wanted if name not in found],
        "unexpected keys": [short_repr(name) for name in found if name not in wanted],
    }
    texts = [f"{what}: {', '.join(names[:4])}{', ...' * (len(names) > 4)}" for what, names in faults.items() if names]
    if texts:
        raise InputError(f"{wrong} ({'; '.join(texts)}).")


def _scheduler_schema(cls: type[SchedulerMixin]) -> type[BaseModel]:
    """The arguments of a scheduler of diffusers, which checks none of them."""
    number = Annotated[StrictInt, Ge(-(10**6)), Le(10**6)]
    types = {bool: StrictBool, int: number, float: Annotated[float, Strict()], str: StrictStr}
    known = {
        "num_train_timesteps": Annotated[StrictInt, Ge(2), Le(100_000)],
        "prediction_type": Literal[tuple(PREDICTIONS.values())],
        "timestep_spacing": Literal["leading", "trailing", "linspace"],
        "beta_schedule": Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"],
    }
    defaults = {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items()}
    fields = {name: (types[type(value)] | None, value) for name, value in defaults.items() if type(value) in types}
    return create_model(cls.__name__, **fields | {name: (hint, defaults[name]) for name, hint in known.items()})


def load_scheduler(folder: Path, kind: type[SchedulerMixin]) -> SchedulerMixin:
    """A scheduler of this class from its folder. Raises InputError for settings that are invalid, or describe no process."""
    file = folder / "scheduler_config.json"
    config = read_document(file)
    if kind is OdeScheduler:
        settings = dataclasses.asdict(as_document(config, OdeSettings, file))
        try:
            return make_ode_scheduler(**settings)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
    as_document(config, _scheduler_schema(kind), file)
    scheduler = kind.from_config(config)  # diffusers checks nothing; callers turn its errors into InputError
    betas, alphas = scheduler.betas, scheduler.alphas_cumprod
    sound = ((betas >= 0) & (betas <= 1)).all() and alphas.isfinite().all()
    if not sound or alphas.shape != (scheduler.config.num_train_timesteps,):
        text = f"the betas in {file} are no noise schedule: expected one between 0 and 1 for each of the timesteps."
        raise InputError(text)
    return scheduler


def model_hash(unet: AdaGNUNet, learned: bool = True) -> str:
    """16 hex digits that tell two networks apart: SHA-256 over the weights, by name, and the config.

    Arguments of the network that were added later are left out at the value that means the earlier network, which so
    keeps its hash. learned: with its learned classes, if it has any.
    """
    config = {k: v for k, v in unet.config.items() if not k.startswith("_") and ADDED_LATER.get(k, ...) != v}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    for one in unet.learned if learned else ():
        digest.update(f"{one.name} {one.sha256()}".encode())
    return digest.hexdigest()[:16]
