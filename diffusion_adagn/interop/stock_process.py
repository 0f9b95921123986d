"""Schedulers of edm and flow as stock diffusers has them, for exported folders, and back.

    edm     EDMDPMSolverMultistepScheduler, EDMEulerScheduler: what they call epsilon is our F
    flow    FlowMatchHeunDiscreteScheduler, FlowMatchEulerDiscreteScheduler; dpm++ and unipc with use_flow_sigmas

Their own grids and start noise differ from ours (see `ode_scheduler`). The code inside an exported folder sets both.
"""

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.ode_scheduler import OdeScheduler, make_ode_scheduler
from ..diffusion.process import FLOW_TIMES, RHO, SIGMA_MAX, SIGMA_MIN
from ..errors import InputError, reject_first
from ..sampling.pretrained import OdeSettings
from ..schema import as_document, read_document
from . import adagn_label_pipeline as exported

FALLBACK = "dpm++"  # second order too, and diffusers' EDM classes have it
SETTINGS = ("spacing", "sigma_data", "sigma_min", "sigma_max", "rho")
ODE_CLASSES = {
    kind.__name__: (process, sampler, kind)
    for process, samplers in exported.ODE_SAMPLERS.items()
    for sampler, kind in samplers.items()
}


# ---------------------------------------------------------------------- export


def stock_process(scheduler: SchedulerMixin) -> dict[str, Any] | None:
    """The process as an exported pipeline takes it; None for ddpm."""
    if not isinstance(scheduler, OdeScheduler):
        return None
    return {"name": scheduler.config.process} | {key: scheduler.config[key] for key in SETTINGS}


def stock_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler that is written: of ddpm the same; of edm and flow diffusers' with this sampler, else with FALLBACK."""
    process = stock_process(scheduler)
    if process is None:
        return scheduler
    return exported.make_ode_scheduler(process, replaced_sampler(scheduler)[1] or scheduler.config.sampler)


def replaced_sampler(scheduler: SchedulerMixin) -> tuple[str | None, str | None]:
    """A sampler that diffusers does not have for the process, and the one written in its place; else None, None."""
    config = scheduler.config
    if not isinstance(scheduler, OdeScheduler) or config.sampler in exported.ODE_SAMPLERS[config.process]:
        return None, None
    return config.sampler, FALLBACK


def process_line(pipe: exported.LabelPipeline) -> str:
    """The process in words."""
    process = pipe.config.process
    if process is None:
        return (
            f"ddpm, prediction {pipe.scheduler.config.prediction_type}, T = {pipe.scheduler.config.num_train_timesteps}"
        )
    if process["name"] == "edm":
        network = f"EDM's preconditioning, sigma_data {process['sigma_data']:g}; the network receives ln(sigma) / 4"
    else:
        network = "flow matching, velocity noise - x0; the network receives 1000 t, t = 1 is noise"
    return network


def sampler_line(scheduler: SchedulerMixin, process: Mapping[str, Any] | None, replaced: str | None) -> str:
    """The sampler of an exported folder in words, and which one it replaces."""
    name = type(scheduler).__name__
    if process is None:
        return f"`{name}`"
    names = {kind: sampler for sampler, kind in exported.ODE_SAMPLERS[process["name"]].items()}
    line = f"{names[type(scheduler)]} (`{name}`) over {process['spacing']} noise levels"
    if replaced:
        line += f", in place of {replaced}, which diffusers does not have for {process['name']}"
    return line


# ---------------------------------------------------------------------- import


def stock_ode_class(name: str | None, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler of this class with this config.json samples edm or flow."""
    return name in ODE_CLASSES and (name not in _SHARED or bool(config.get("use_flow_sigmas")))


_SHARED = {kind.__name__ for kind in exported.SAMPLERS.values()}  # classes that sample ddpm too


def open_stock_ode(file: Path, name: str, process: Mapping[str, Any] | None, replaced: str | None) -> OdeScheduler:
    """Our scheduler for a stock one of edm or flow.

    Args:
        file: Its scheduler_config.json.
        name: Its class.
        process: Of the exported pipeline; None for other folders.
        replaced: The sampler in whose place the export has FALLBACK.

    Raises:
        InputError: For settings that mean another process.
    """
    kind, sampler, cls = ODE_CLASSES[name]
    config = {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items()} | read_document(file)
    prediction = config.get("prediction_type")
    faults = {
        f"prediction_type {prediction!r}; expected 'epsilon' under edm, 'flow_prediction' under flow": (
            prediction not in (None, "epsilon" if kind == "edm" else "flow_prediction")
        ),
        "num_train_timesteps other than 1000, by which the network's time would be multiplied": (
            kind == "flow" and config["num_train_timesteps"] != FLOW_TIMES
        ),
        "an inverted time or a shift by image size (invert_sigmas, use_dynamic_shifting, shift_terminal)": any(
            config.get(key) for key in ("invert_sigmas", "use_dynamic_shifting", "shift_terminal")
        ),
    }
    reject_first(faults, f"the {name} of {file} has ", ".")
    settings = {"process": kind, "sampler": sampler, **_own_settings(kind, config)}
    if process is not None:
        if process.get("name") != kind:
            raise InputError(
                f"{file} is a scheduler of {kind}, and model_index.json says process {process.get('name')!r}."
            )
        wrong = process.get("sigma_data") != settings.get("sigma_data")
        if kind == "edm" and wrong:
            raise InputError(
                f"sigma_data is {settings['sigma_data']} in {file}, and {process.get('sigma_data')} in model_index.json."
            )
        settings |= {key: process[key] for key in SETTINGS if kind == "flow" and key in process}
        settings["sampler"] = replaced if replaced and sampler == FALLBACK else sampler
    return make_ode_scheduler(**asdict(as_document(settings, OdeSettings, file)))


def changed_ode_settings(name: str, theirs: Mapping[str, Any], ours: OdeScheduler) -> list[str]:
    """Settings of a stock scheduler that differ in ours, such as "shift: 5.0 -> 3.0"."""
    process, sampler, _ = ODE_CLASSES[name]
    shift = next((key for key in ("shift", "flow_shift") if theirs.get(key, 1.0) != 1.0), "shift")
    ours_shift = exported.SHIFT if ours.config.spacing == "shifted" else 1.0
    pairs = {key: (theirs[key], ours.config[key]) for key in SETTINGS if process == "edm" and key in theirs}
    pairs |= {"sampler": (sampler, ours.config.sampler), shift: (theirs.get(shift, ours_shift), ours_shift)}
    return [f"{key}: {before} -> {after}" for key, (before, after) in pairs.items() if before != after]


def _own_settings(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The noise levels in a scheduler's config."""
    if kind == "edm":
        return {key: config[key] for key in SETTINGS[1:]} | {"spacing": config["sigma_schedule"]}
    grids = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential"}
    shifted = "shifted" if config.get("shift", config.get("flow_shift", 1.0)) != 1 else "linear"
    spacing = next((name for flag, name in grids.items() if config.get(flag)), shifted)
    return {"spacing": spacing, "sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX, "rho": RHO}
