"""Samplers on an exact denoiser: order of convergence, and the distribution that they sample."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.churn import Churn
from diffusion_adagn.diffusion.ode_scheduler import OdeScheduler
from diffusion_adagn.diffusion.oracle import integrate, order, two_classes
from diffusion_adagn.diffusion.schedule import make_scheduler, set_timesteps, with_sampler

MIXTURE = two_classes()[0]
NOISE = torch.randn(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ORDERS = {"euler": 1, "heun": 2, "dpm++": 2, "unipc": 2}
END = 0.05  # noise level at which the integration ends, so that it does not move with the number of steps


@functools.cache
def exact(scale: float, start: float, end: float, process: str = "edm") -> torch.Tensor:
    """From `scale` times NOISE, the solution of dx/dtau = (x - x0) / tau by SciPy, with tolerance 1e-9."""

    def slope(tau, y):
        rows = torch.from_numpy(y.reshape(-1, 2))
        alpha = 1.0 if process == "edm" else 1 - tau
        return ((rows - MIXTURE.x0(rows, alpha, tau)) / tau).numpy().ravel()

    solution = solve_ivp(slope, (start, end), (scale * NOISE).numpy().ravel(), "DOP853", rtol=1e-9, atol=1e-10)
    return torch.from_numpy(solution.y[:, -1].reshape(-1, 2))


def assert_order(errors: list[float], steps: list[int], sampler: str) -> None:
    above = 1.2 if sampler == "unipc" else 0.4  # its corrector is of order 3 where the predictor is of order 2
    assert ORDERS[sampler] - 0.4 < order(errors, steps) < ORDERS[sampler] + above, errors


def rms(difference: torch.Tensor) -> float:
    return difference.square().mean().sqrt().item()


def test_denoiser_is_the_posterior_mean():
    draws = torch.Generator().manual_seed(1)
    component = torch.multinomial(MIXTURE.weights, 400_000, replacement=True, generator=draws)
    x0 = MIXTURE.means[component] + MIXTURE.deviations[component, None] * torch.randn(
        400_000, 2, generator=draws, dtype=torch.float64
    )
    x = 0.8 * x0 + 0.6 * torch.randn(400_000, 2, generator=draws, dtype=torch.float64)
    near = (x - torch.tensor([-0.3, 0.2])).square().sum(1) < 0.03**2
    assert (MIXTURE.x0(x[near], 0.8, 0.6).mean(0) - x0[near].mean(0)).abs().max() < 0.05
    mean, covariance = MIXTURE.moments()
    assert torch.allclose(x0.mean(0), mean, atol=5e-3) and torch.allclose(x0.T.cov(), covariance, atol=5e-3)


@pytest.mark.parametrize("sampler", ORDERS)
@pytest.mark.parametrize(
    ("process", "spacing", "start"),
    [
        ("edm", "karras", 80.0),
        ("flow", "linear", math.inf),
        pytest.param("edm", "exponential", 80.0, marks=pytest.mark.slow),
        pytest.param("flow", "karras", 80.0, marks=pytest.mark.slow),
    ],
)
def test_order_of_convergence(process, spacing, start, sampler):
    steps, errors = [40, 80, 160], []
    scheduler = OdeScheduler(process, sampler, spacing, sigma_min=END)
    tau_start, tau_end = ((s if process == "edm" else 1 / (1 + 1 / s)) for s in (start, END))
    solution = exact(tau_start, tau_start, tau_end, process)
    for count in steps:
        if spacing == "linear":
            t = np.linspace(1, tau_end, count + 1)
            levels = [math.inf, *(t[1:] / (1 - t[1:]))]
        else:
            levels = list(scheduler.noise_levels(count + 1))
        scheduler.set_noise_levels(levels[:-1], end=levels[-1])
        x = integrate(scheduler, NOISE * scheduler.init_noise_sigma, MIXTURE.x0).double()
        if process == "edm" and sampler in ("dpm++", "unipc"):  # their variable is (x0 + s eps) / sqrt(1 + s^2)
            x = x * math.hypot(1, END)
        errors.append(rms(x - solution))
    assert errors[-1] < 1e-2
    assert_order(errors, steps, sampler)


@pytest.mark.parametrize("sampler", ORDERS)
@pytest.mark.parametrize("spacing", ["karras", "linspace"])
def test_order_of_convergence_under_ddpm(spacing, sampler):
    schedule = {"karras": "cosine", "linspace": "linear"}[spacing]
    scheduler = with_sampler(make_scheduler(DiffusionConfig(schedule=schedule)), sampler, spacing)
    if spacing == "karras":  # to the lowest noise level; the last step, to 0, is left out
        steps, last = [20, 40, 80], 0
        sizes = [count + 1 for count in steps]
    else:  # every 27th, 9th and 3rd timestep, from 999 to 108. diffusers' own samplers end before timestep 0
        steps, last = [33, 99, 297], 108
        sizes = [999 * count // 891 + (sampler in ("euler", "heun")) for count in steps]
    bar, errors = scheduler.alphas_cumprod[last].double(), []
    end = ((1 - bar) / bar).sqrt().item()
    for count, size in zip(steps, sizes):
        set_timesteps(scheduler, size)
        start, x = scheduler.sigmas[0].item(), NOISE * scheduler.init_noise_sigma
        unit = math.hypot(1, start), math.hypot(1, end)
        if sampler in ("euler", "heun"):
            unit = 1.0, 1.0
        solution = exact(scheduler.init_noise_sigma * unit[0], start, end)
        calls = 2 * count if sampler == "heun" else count
        errors.append(rms(integrate(scheduler, x, MIXTURE.x0, calls).double() * unit[1] - solution))
    assert_order(errors, steps, sampler)


def sampled(scheduler, count, **step) -> torch.Tensor:
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(2))
    return integrate(scheduler, noise * scheduler.init_noise_sigma, MIXTURE.x0, **step).double()


def assert_is_the_mixture(x: torch.Tensor) -> None:
    mean, covariance = MIXTURE.moments()
    assert torch.allclose(x.mean(0), mean, atol=0.02), (x.mean(0), mean)
    assert torch.allclose(x.T.cov(), covariance, atol=0.02), (x.T.cov(), covariance)


@pytest.mark.parametrize(
    ("sampler", "spacing", "steps", "eta"),
    [
        (
            "ddpm",
            "trailing",
            500,
            None,
        ),  # ancestral sampling is of order 1: at 100 steps the variance is 10 % too small
        ("ddim", "trailing", 500, 1.0),
        ("ddim", "leading", 250, 0.0),
        ("ddim", "trailing", 250, 0.0),
        ("dpm++", "linspace", 50, None),
    ],
)
def test_ddpm_samples_the_distribution(sampler, spacing, steps, eta):
    scheduler = with_sampler(make_scheduler(DiffusionConfig()), sampler, spacing)
    set_timesteps(scheduler, steps)
    step = {} if sampler == "dpm++" else {"generator": torch.Generator().manual_seed(3)}
    step |= {} if eta is None else {"eta": eta}
    assert_is_the_mixture(sampled(scheduler, 3000, **step))


@pytest.mark.parametrize("sampler", [pytest.param("euler", marks=pytest.mark.slow), "heun"])
@pytest.mark.parametrize("churn", [None, pytest.param(Churn(20), marks=pytest.mark.slow), Churn(40, 0.05, 50, 1.0)])
def test_churn_samples_the_distribution(sampler, churn):
    scheduler = OdeScheduler("edm", sampler)
    set_timesteps(scheduler, 50 if sampler == "heun" else 250, churn=churn)  # euler is of order 1
    assert_is_the_mixture(sampled(scheduler, 3000, generator=torch.Generator().manual_seed(4)))


def test_churn_raises_the_level_before_the_call():
    """Karras et al. 2022, algorithm 2: the network is called at the raised level, with the noise already added."""
    scheduler = OdeScheduler("edm", "euler")
    set_timesteps(scheduler, 4, churn=Churn(2, 0.5, 50))
    grid = scheduler.noise_levels(4)
    raised = [s * (1 + min(2 / 4, 2**0.5 - 1)) if 0.5 <= s <= 50 else s for s in grid]
    assert scheduler.sigmas.tolist() == pytest.approx([*raised, 0.0])
    x = torch.zeros(20_000, 1) + scheduler.init_noise_sigma
    x = scheduler.step(torch.zeros_like(x), 0, x, generator=torch.Generator().manual_seed(5))[0]
    assert x.mean().item() == pytest.approx(grid[1], abs=0.5)
    assert x.std().item() == pytest.approx((raised[1] ** 2 - grid[1] ** 2) ** 0.5, rel=0.02)
