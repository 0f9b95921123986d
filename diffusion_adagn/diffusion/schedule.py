"""Noise schedules and samplers: a DiffusionConfig -> a process and its scheduler, and the checks before sampling.

The schedulers' own clipping is always off: x0 is clipped after guidance, in the pipeline (see there).
"""

import inspect
import math
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..config import SPACINGS, DiffusionConfig
from ..errors import InputError, reject_first
from .churn import Churn
from .ode_scheduler import MAX_STEPS, OdeScheduler, make_ode_scheduler
from .process import EDM_NOISE, FLOW_NOISE, Level, Process, ddpm, ddpm_level, edm, flow, noise_levels

SAMPLERS: dict[str, type[SchedulerMixin]] = {
    "ddpm": DDPMScheduler,  # Ho et al. 2020: ancestral, stochastic
    "ddim": DDIMScheduler,  # Song et al. 2021: deterministic at eta 0
    "dpm++": DPMSolverMultistepScheduler,  # Lu et al. 2022: second order, multistep
    "unipc": UniPCMultistepScheduler,  # Zhao et al. 2023: predictor-corrector
    "euler": EulerDiscreteScheduler,  # Karras et al. 2022, order 1
    "heun": HeunDiscreteScheduler,  # Karras et al. 2022, order 2: 2 N - 1 network calls
}
# Of diffusers' configs, and the spacing that each means. Lu et al. 2022's grid is uniform in log sigma: the exponential one.
NOISE_GRIDS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_lu_lambdas": "exponential"}
MAX_SIGMA = 80.0  # Karras et al. 2022, table 1; where the cosine schedule ends, noise is 20,000 times the signal
ZERO_SNR_EPS = "a zero-SNR schedule with eps-prediction divides by zero at its first step: use prediction v or x0."
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # ours -> diffusers'
PREDICTION_TYPES = {theirs: ours for ours, theirs in PREDICTIONS.items()}


def _betas(schedule: str, timesteps: int) -> dict:
    """Scheduler arguments for a schedule.

    linear: beta from 1e-4 to 0.02 (Ho et al. 2020). cosine: Nichol & Dhariwal 2021, equation 17.
    sigmoid: beta = 1e-4 + (0.02 - 1e-4) sigmoid(-6 .. 6), GeoDiff's; passed as numbers, since only diffusers' DDPM scheduler
    accepts the name.
    """
    if schedule == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, timesteps)) * (0.02 - 1e-4) + 1e-4
        return {"trained_betas": betas.tolist()}
    return {
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        "beta_start": 1e-4,
        "beta_end": 0.02,
    }


def make_process(config: DiffusionConfig) -> Process:
    """The process of a diffusion config. Raises InputError under edm without sigma_data."""
    noise, mean, std = config.noise or "log_normal", config.noise_mean, config.noise_std
    if config.process == "ddpm":
        normal = (mean, std) if config.noise == "log_normal" else None
        return ddpm(make_scheduler(config).alphas_cumprod, config.prediction, normal)
    defaults = EDM_NOISE if config.process == "edm" else FLOW_NOISE
    shift = math.log(_sigma_data(config) / 0.5) if config.process == "edm" else 0.0
    sigmas = noise_levels(noise, defaults[0] + shift if mean is None else mean, defaults[1] if std is None else std)
    return edm(config.sigma_data, sigmas) if config.process == "edm" else flow(sigmas)


def _sigma_data(config: DiffusionConfig) -> float:
    if config.sigma_data is None:
        raise InputError(
            "diffusion.sigma_data is not set: under process edm it is the standard deviation of the images in [-1, 1]. Give "
            "it, such as 0.5; `adagn train` measures it on the training images."
        )
    return config.sigma_data


def process_of(scheduler: SchedulerMixin) -> Process:
    """The process that a scheduler samples."""
    if isinstance(scheduler, OdeScheduler):
        return scheduler.process
    return ddpm(scheduler.alphas_cumprod, PREDICTION_TYPES[scheduler.config.prediction_type])


def make_scheduler(
    config: DiffusionConfig, sampler: str | None = None, learned_variance: bool = False
) -> SchedulerMixin:
    """A scheduler for a diffusion config; every argument that affects the result is passed explicitly.

    Raises InputError for combinations that are wrong, and under edm without sigma_data. sampler: None: ddim under ddpm, else dpm++.
    """
    if config.process != "ddpm":
        numbers = {"sigma_data": _sigma_data(config)} if config.process == "edm" else {}
        return make_ode_scheduler(config.process, sampler, **numbers)
    spacing = config.timestep_spacing or ("trailing" if config.zero_snr else "leading")
    common = _betas(config.schedule, config.num_train_timesteps) | {
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": PREDICTIONS[config.prediction],
        "timestep_spacing": spacing,
        "steps_offset": 0,
    }
    return _build(sampler or "ddim", common, zero_snr=config.zero_snr, learned_variance=learned_variance)


def with_sampler(
    scheduler: SchedulerMixin, sampler: str | None = None, spacing: str | None = None, learned_variance: bool = False
) -> SchedulerMixin:
    """The same process (schedule, prediction, T) with another sampler or grid."""
    config = scheduler.config
    if isinstance(scheduler, OdeScheduler):
        numbers = {name: config[name] for name in ("sigma_data", "sigma_min", "sigma_max", "rho")}
        return make_ode_scheduler(config.process, sampler or config.sampler, spacing or config.spacing, **numbers)
    betas = (
        ("trained_betas",) if config.get("trained_betas") is not None else ("beta_schedule", "beta_start", "beta_end")
    )
    common = {k: config[k] for k in ("num_train_timesteps", "prediction_type", "timestep_spacing", *betas)}
    common |= {"steps_offset": 0}
    sampler, spacing = sampler or sampler_name(scheduler), spacing or spacing_name(scheduler)
    if spacing in ("karras", "exponential", "lu"):
        common["use_karras_sigmas" if spacing == "karras" else "use_exponential_sigmas"] = True
    else:
        common["timestep_spacing"] = spacing
    return _build(sampler, common, bool(config.get("rescale_betas_zero_snr")), learned_variance)


def spacing_name(scheduler: SchedulerMixin) -> str:
    """The grid that a scheduler steps over, as `with_sampler` takes it."""
    if isinstance(scheduler, OdeScheduler):
        return scheduler.config.spacing
    takes = inspect.signature(
        type(scheduler).__init__
    ).parameters  # `from_config` carries over what a class does not know
    grids = (name for flag, name in NOISE_GRIDS.items() if flag in takes and scheduler.config.get(flag))
    return next(grids, str(scheduler.config.timestep_spacing))


def sampler_name(scheduler: SchedulerMixin) -> str:
    """The name of a scheduler's class in SAMPLERS. Raises InputError for any other class."""
    if isinstance(scheduler, OdeScheduler):
        return scheduler.config.sampler
    for name, cls in SAMPLERS.items():
        if type(scheduler) is cls:
            return name
    raise InputError(f"{type(scheduler).__name__} is not one of the samplers here: {', '.join(SAMPLERS)}.")


def _build(sampler: str, common: dict, zero_snr: bool, learned_variance: bool) -> SchedulerMixin:
    if sampler not in SAMPLERS:
        near = next((f" Did you mean {n}?" for n in SAMPLERS if str(sampler).lower().rstrip("+") == n.rstrip("+")), "")
        raise InputError(f"there is no sampler {sampler!r}.{near} Samplers: {', '.join(SAMPLERS)}.")
    spacing = common["timestep_spacing"]
    noise_grid = next((name for flag, name in NOISE_GRIDS.items() if common.get(flag)), None)
    whole = noise_grid and sampler in ("ddpm", "ddim")
    faults = {
        f"timestep spacing under process ddpm is one of {', '.join(SPACINGS[:6])}, not {spacing!r}.": spacing
        not in SPACINGS[:3],
        f"{sampler} steps over whole timesteps, and spacing {noise_grid} needs fractional ones: use dpm++, unipc, euler or heun.": whole,
        ZERO_SNR_EPS: zero_snr and common["prediction_type"] == "epsilon",
        f"a zero-SNR schedule must be sampled from pure noise at t = T-1, where spacing {noise_grid or spacing} does not start: use "
        "timestep spacing trailing.": zero_snr and (noise_grid or spacing != "trailing"),
        "heun does not support zero-SNR schedules. Use ddim, ddpm, dpm++, unipc or euler.": zero_snr
        and sampler == "heun",
    }
    reject_first(faults)
    if sampler != "heun":
        common = common | {"rescale_betas_zero_snr": zero_snr}
    specific = {
        "ddpm": {"clip_sample": False, "variance_type": "learned_range" if learned_variance else "fixed_small"},
        "ddim": {"clip_sample": False, "set_alpha_to_one": True},
        "dpm++": {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"},
        "unipc": {"solver_order": 2, "final_sigmas_type": "zero"},
        "euler": {"final_sigmas_type": "zero"},
        "heun": {"clip_sample": False},
    }[sampler]
    return SAMPLERS[sampler](**common, **specific)


def set_timesteps(
    scheduler: SchedulerMixin, steps: int, device: torch.device | str = "cpu", churn: Churn | None = None
) -> Tensor:
    """Set the grid: the timesteps of every network evaluation, from noisy to clean ([steps]; heun [2 steps - 1]).

    Raises InputError where diffusers would not follow the scheduled grid.
    """
    ode = isinstance(scheduler, OdeScheduler)
    total = MAX_STEPS if ode else scheduler.config.num_train_timesteps
    name, spacing = sampler_name(scheduler), spacing_name(scheduler)
    if isinstance(steps, bool) or not isinstance(steps, Integral) or not 1 <= steps <= total:
        raise InputError(f"steps is a whole number from 1 to {total}, not {steps!r}.")
    steps = int(steps)
    if churn is not None and not (ode and scheduler.config.process == "edm" and name in ("euler", "heun")):
        process = scheduler.config.process if ode else "ddpm"
        raise InputError(f"churn needs process edm and sampler euler or heun, not {process} and {name}: leave it out.")
    if ode:
        scheduler.set_timesteps(steps, device, churn)
        return scheduler.timesteps
    if scheduler.config.get("rescale_betas_zero_snr") and scheduler.config.prediction_type == "epsilon":
        raise InputError(ZERO_SNR_EPS)
    scheduler.set_timesteps(steps, device=device)
    if spacing in NOISE_GRIDS.values():
        _use_noise_grid(scheduler, spacing, steps)
    elif scheduler.config.get("use_beta_sigmas"):
        raise InputError("use_beta_sigmas is not supported: use spacing karras or exponential.")
    grid = scheduler.timesteps.cpu().double()
    grid = grid if name != "heun" else torch.cat([grid[:1], grid[1::2]])
    fault = ""
    if len(grid) != steps or (grid.diff() >= 0).any() or grid.min() < 0 or grid.max() > total - 1:
        fault = "would repeat or leave them: use fewer steps"
    elif steps == 1 and grid[0] < 0.75 * total:
        fault = f"would start at t = {int(grid[0])}, where there is no noise to remove: use spacing trailing, or 2 steps or more"
    elif spacing == "leading" and steps > 1 and 2 * grid[0] - grid[1] < 0.75 * total:
        # whole strides from 0 do not reach the noisy end; measured on digits at 501 steps: class accuracy 94 % instead of 100 %
        good = " or ".join(map(str, _divisors(total, steps)[:2]))
        fault = f"would start at t = {int(grid[0])}, far from noise: use {good} steps"
    elif name == "heun" and scheduler.sigmas[0] > 1000:
        # measured on digits, cosine with trailing or linspace: class accuracy 0
        fault = (
            f"would start at noise {scheduler.sigmas[0]:.0f} times the signal, which overshoots: use spacing leading"
        )
    elif name == "ddim":
        # it steps to t - T // N, not to the next scheduled timestep
        stride = total // steps
        wrong = int((grid[:-1] - grid[1:] != stride).sum()) + int(grid[-1] - stride >= 0)
        spacings = [] if scheduler.config.rescale_betas_zero_snr else ["spacing leading"]
        near = (
            []
            if spacings and spacing == "linspace"
            else [f"{', '.join(map(str, sorted(_divisors(total, steps)[:3])))} steps"]
        )
        if wrong:
            fault = f"would step to a timestep other than the next scheduled one {wrong} times: use {', or '.join(spacings + near)}"
    if fault:
        raise InputError(
            f"{name} with {steps} {spacing} step{'s' * (steps > 1)} over {total} timesteps {fault}, or another sampler."
        )
    return scheduler.timesteps


def _divisors(total: int, steps: int) -> list[int]:
    """The numbers of steps from 2 that divide the timesteps, the nearest to `steps` first."""
    return sorted((n for n in range(2, total + 1) if total % n == 0 and n != steps), key=lambda n: abs(n - steps))


def _use_noise_grid(scheduler: SchedulerMixin, spacing: str, steps: int) -> None:
    """Replace the grid by one over noise levels sigma = sigma_t / alpha_t, from at most MAX_SIGMA to the schedule's lowest.

    karras: sigma^(1/7) in equal steps (Karras et al. 2022, equation 5). exponential: log sigma in equal steps. The network is
    called at the fractional timestep of each level, interpolated in log sigma. diffusers rounds these timesteps in dpm++ and
    unipc, so that under a cosine schedule most of them are the same one; and begins at the schedule's last level.
    """
    alpha_bar = scheduler.alphas_cumprod.cpu().double().numpy()
    levels = np.sqrt((1 - alpha_bar) / alpha_bar)
    ends = np.array([min(levels[-1], MAX_SIGMA), levels[0]])
    if spacing == "karras":
        sigmas = np.linspace(*ends ** (1 / 7), steps) ** 7
    else:
        sigmas = np.exp(np.linspace(*np.log(ends), steps))
    times = np.interp(np.log(sigmas), np.log(levels), np.arange(len(levels)))
    sigmas, times = (torch.from_numpy(a).float() for a in (np.append(sigmas, 0.0), times))
    if sampler_name(scheduler) == "heun":  # two calls a step: at its start, and at its end, where the next one starts
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        times = torch.cat([times[:1], times[1:].repeat_interleave(2)])
    scheduler.sigmas, scheduler.timesteps = sigmas, times.to(scheduler.timesteps.device)


@dataclass(frozen=True)
class ModelEval:
    """One network evaluation of a sampler.

    Attributes:
        index: 0, 1, ... from noisy to clean.
        step: of the sampler; heun evaluates twice per step.
        t: time that the network receives: under ddpm the timestep, whole or fractional.
        share: 0 (image) to 1 (noise); t / T under ddpm.
        sigma: noise level sigma_t / alpha_t.
        level: the numbers of the process.
    """

    index: int
    step: int
    t: float
    share: float
    sigma: float
    level: Level


def model_evals(scheduler: SchedulerMixin) -> list[ModelEval]:
    """All network evaluations of the grid, from noisy to clean. Call after `set_timesteps`."""
    process, ratios = process_of(scheduler), getattr(scheduler, "sigmas", None)
    twice = sampler_name(scheduler) == "heun"
    calls = []
    for i, t in enumerate(scheduler.timesteps.tolist()):
        if process.name == "ddpm":
            level = _ddpm_level(scheduler, t, None if ratios is None else ratios[i], process.prediction)
            sigma = ratios[i].item() if ratios is not None else level.sigma / level.alpha if level.alpha else math.inf
        else:
            sigma = ratios[i].item()
            level = process.at(sigma)
        share = process.share(torch.tensor(level.time)).item()
        calls.append(ModelEval(i, i // 2 if twice else i, t, share, sigma, level))
    return calls


def _ddpm_level(scheduler: SchedulerMixin, t: float, ratio: Tensor | None, prediction: str) -> Level:
    """The level of an evaluation. Solvers with a list of noise-to-signal ratios have them at fractional timesteps too."""
    if ratio is not None:
        alpha = (1 + ratio.double() ** 2).rsqrt()
        return ddpm_level(t, alpha.item(), (ratio.double() * alpha).item(), prediction)
    alpha_bar = scheduler.alphas_cumprod[int(t)].double()
    return ddpm_level(t, alpha_bar.sqrt().item(), (1 - alpha_bar).sqrt().item(), prediction)
