"""OdeScheduler: the probability-flow ODE of edm and flow, dx/dtau = (x - x0) / tau, over any grid of noise levels.

Under edm x = x0 + s eps and tau = s (Karras et al. 2022, equation 4 with sigma(t) = t); under flow x = (1 - t) x0 + t eps
and tau = t. Euler and Heun are here, since diffusers has no Heun for EDM, calls the network before churn's noise is added,
and cannot take a grid for flow's Heun. DPM-Solver++ and UniPC are diffusers', which step over our grid.

The model output is the predicted x0: clipping and guidance come before, in the pipeline.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..errors import reject_first
from .churn import Churn
from .process import RHO, SIGMA_MAX, SIGMA_MIN, Process, edm, flow

ODE_SAMPLERS = ("euler", "heun", "dpm++", "unipc")
DEFAULT_SAMPLER = "dpm++"  # the least Frechet distance at 9 to 10 network calls on the digits (docs/processes.md)
ODE_SPACINGS = {"edm": ("karras", "exponential"), "flow": ("linear", "shifted", "karras", "exponential")}
SHIFT = 3.0  # of the grid "shifted" (Esser et al. 2024, section 5.3.2)
MAX_STEPS = 10_000


class OdeOutput(NamedTuple):
    """What a step returns.

    Attributes:
        prev_sample: [B, C, H, W], less noisy.
    """

    prev_sample: Tensor


class OdeScheduler(SchedulerMixin, ConfigMixin):
    """Samples edm and flow.

    Args:
        process: "edm" or "flow".
        sampler: "euler", "heun", "dpm++" or "unipc".
        spacing: "karras" (s^(1/rho) in equal steps), "exponential" (ln s in equal steps); under flow also "linear" (t in
            equal steps from 1) and "shifted" (t' = 3 t / (1 + 2 t) of these).
        sigma_data: of edm.
        sigma_min: lowest noise level of karras and exponential; the last step goes from there to 0.
        sigma_max: the noise level where they start.
        rho: of karras.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        process: str = "edm",
        sampler: str = DEFAULT_SAMPLER,
        spacing: str = "karras",
        sigma_data: float = 0.5,
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
        rho: float = RHO,
    ):
        self.process: Process = edm(sigma_data) if process == "edm" else flow()
        self.set_timesteps(2)

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str = "cpu", churn: Churn | None = None
    ) -> None:
        """Set the grid by the number of steps; heun calls the network 2 N - 1 times.

        Args:
            num_inference_steps: N.
            device: of `timesteps`.
            churn: noise added before steps, for euler and heun under edm.
        """
        self.set_noise_levels(self.noise_levels(num_inference_steps), device, churn)

    def noise_levels(self, steps: int) -> np.ndarray:
        """The noise levels s from which the steps start, float64 [steps], decreasing. infinity: t = 1 of flow."""
        c = self.config
        if c.spacing in ("linear", "shifted"):
            t = 1 - np.arange(steps) / steps
            t = SHIFT * t / (1 + (SHIFT - 1) * t) if c.spacing == "shifted" else t
            with np.errstate(divide="ignore"):
                return t / (1 - t)
        if c.spacing == "karras":
            return np.linspace(c.sigma_max ** (1 / c.rho), c.sigma_min ** (1 / c.rho), steps) ** c.rho
        return np.exp(np.linspace(np.log(c.sigma_max), np.log(c.sigma_min), steps))

    def set_noise_levels(
        self, levels: Sequence[float], device: torch.device | str = "cpu", churn: Churn | None = None, end: float = 0.0
    ) -> None:
        """Set any grid.

        Args:
            levels: noise levels s from which the steps start, decreasing.
            device: of `timesteps`.
            churn: see `set_timesteps`.
            end: the noise level where the last step ends.
        """
        steps = len(levels)
        starts = [float(s) if churn is None else churn.raised(float(s), steps) for s in levels]
        ends = [*map(float, levels[1:]), end]
        calls = [starts[0]]
        for start, previous_end in zip([*starts[1:], None], ends):
            if self.config.sampler == "heun" and previous_end > 0:
                calls.append(previous_end)
            if start is not None:
                calls.append(start)
        self.num_inference_steps, self._churn, self._index, self._half = steps, churn, 0, None
        self._starts, self._ends = [self._tau(s) for s in starts], [self._tau(s) for s in ends]
        self.sigmas = torch.tensor([*calls, end], dtype=torch.float64)  # noise levels of the network calls
        self.timesteps = self.process.time_at(self.sigmas[:-1]).to(device=device, dtype=torch.float32)
        self._solver = self._stock_solver([*levels, end])

    def _stock_solver(self, levels: Sequence[float]) -> SchedulerMixin | None:
        """diffusers' multistep solver on these levels, the last being the end, in flow's own variables or those of a variance-preserving process."""
        kind = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}.get(self.config.sampler)
        if kind is None:
            return None
        flow_variables = self.config.process == "flow"
        solver = kind(prediction_type="sample", final_sigmas_type="zero", use_flow_sigmas=flow_variables)
        steps = len(levels) - 1
        solver.set_timesteps(steps)
        solver.sigmas = torch.tensor([self._tau(float(s)) for s in levels], dtype=torch.float32)
        solver.timesteps = torch.arange(steps, 0, -1)
        solver.set_begin_index(0)
        return solver

    def _tau(self, s: float) -> float:
        """The variable of the ODE at a noise level."""
        return s if self.config.process == "edm" else 1 / (1 + 1 / s) if s else 0.0

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the first sample."""
        tau = self._starts[0]
        return tau / (1 + tau**2) ** 0.5 if self._solver is not None and self.config.process == "edm" else tau

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The network's input at the next call, [B, C, H, W].

        Args:
            sample: [B, C, H, W].
            timestep: not used: calls are counted.
        """
        if self.config.process == "flow":
            return sample
        s, data = self.sigmas[self._index].item(), self.config.sigma_data
        unit = 1.0 if self._solver is None else (1 + s**2) ** 0.5  # the solver's sample is (x0 + s eps) / sqrt(1 + s^2)
        return sample * (unit * (s**2 + data**2) ** -0.5)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> OdeOutput | tuple[Tensor]:
        """The sample after a network call.

        Args:
            model_output: predicted x0, [B, C, H, W].
            timestep: not used: calls are counted.
            sample: [B, C, H, W], as the step before returned it.
            generator: of churn's noise; several: one per image.
            return_dict: return OdeOutput.
        """
        call, self._index = self._index, self._index + 1
        if self._solver is not None:
            x = self._solver.step(model_output, self._solver.timesteps[call], sample, return_dict=False)[0]
            return OdeOutput(x) if return_dict else (x,)
        heun = self.config.sampler == "heun"
        number = call // 2 if heun else call
        start, end = self._starts[number], self._ends[number]
        if self._half is None:
            slope = (sample - model_output) / start
            x = sample + (end - start) * slope
            done = not heun or end == 0
            self._half = None if done else (sample, slope)
        else:
            first, slope = self._half
            x = first + (end - start) / 2 * (slope + (sample - model_output) / end)
            done, self._half = True, None
        if done and number + 1 < len(self._starts) and self._starts[number + 1] > end:
            raised = (self._starts[number + 1] ** 2 - end**2) ** 0.5 * self._churn.noise
            x = x + raised * _noise_like(x, generator)
        return OdeOutput(x) if return_dict else (x,)


def _noise_like(x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    if isinstance(generator, Sequence):
        return torch.cat([_noise_like(row[None], g) for row, g in zip(x, generator)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device).to(x)


def make_ode_scheduler(
    process: str, sampler: str | None = None, spacing: str | None = None, **settings: float
) -> OdeScheduler:
    """The scheduler of a process. Raises InputError for a sampler or spacing that it does not have.

    Args:
        process: "edm" or "flow".
        sampler: None: dpm++.
        spacing: None: karras.
        settings: the other arguments of OdeScheduler.
    """
    sampler, spacing = sampler or DEFAULT_SAMPLER, "exponential" if spacing == "lu" else spacing or "karras"
    faults = {
        f"process {process} is sampled with {', '.join(ODE_SAMPLERS)}, not {sampler!r}"
        f"{'; without noise, ddim is euler' * (sampler == 'ddim')}": sampler not in ODE_SAMPLERS,
        f"the spacing under process {process} is {', '.join(ODE_SPACINGS[process])}, not {spacing!r}": (
            spacing not in ODE_SPACINGS[process]
        ),
    }
    reject_first(faults, "", ".")
    return OdeScheduler(process, sampler, spacing, **settings)
