"""Grids over noise levels: karras, exponential, lu."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import (
    MAX_SIGMA,
    make_scheduler,
    model_evals,
    process_of,
    set_timesteps,
    spacing_name,
    with_sampler,
)
from diffusion_adagn.errors import InputError

SAMPLERS = ("dpm++", "unipc", "euler", "heun")
SPACINGS = ("karras", "exponential", "lu")


def scheduler_of(sampler, spacing, schedule="cosine", **settings):
    return with_sampler(make_scheduler(DiffusionConfig(schedule=schedule, **settings)), sampler, spacing)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_noise_grid_equals_diffusers(schedule, flag):
    """diffusers' Euler keeps fractional timesteps and takes a highest level: the independent reference."""
    ours = scheduler_of("euler", {"use_karras_sigmas": "karras"}.get(flag, "exponential"), schedule)
    set_timesteps(ours, 12)
    theirs = EulerDiscreteScheduler.from_config(ours.config, sigma_max=MAX_SIGMA)
    assert theirs.config[flag]
    theirs.set_timesteps(12)
    assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-3)
    assert torch.allclose(ours.timesteps, theirs.timesteps.float(), atol=0.1)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 4, 20, 200])
def test_noise_grids_have_distinct_timesteps(sampler, spacing, steps):
    """diffusers' dpm++ repeats t = 998 nine times of twenty under the cosine schedule."""
    set_timesteps(made := scheduler_of(sampler, spacing), steps)
    calls = model_evals(made)
    assert len(calls) == (2 * steps - 1 if sampler == "heun" else steps)
    first = [c for i, c in enumerate(calls) if sampler != "heun" or i == 0 or i % 2]
    assert all(a.t > b.t and a.sigma > b.sigma for a, b in itertools.pairwise(first))
    assert calls[0].sigma == pytest.approx(MAX_SIGMA, rel=1e-4)
    for call in calls:  # the timestep is the one of its noise level
        alpha_bar = made.alphas_cumprod[[int(call.t), min(int(call.t) + 1, 999)]].double()
        low, high = ((1 - alpha_bar) / alpha_bar).sqrt().tolist()
        assert low * 0.999 <= call.sigma <= high * 1.001


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gaussian_data_is_reached(sampler, spacing):
    """For data N(0, s^2) the ODE from (alpha, sigma) ends at x s / sqrt(alpha^2 s^2 + sigma^2)."""
    s, scheduler = 0.5, scheduler_of(sampler, spacing, prediction="eps")
    timesteps = set_timesteps(scheduler, 200 if sampler == "euler" else 40)  # euler is of first order
    x = torch.tensor([[1.0], [-2.0]]) * scheduler.init_noise_sigma
    start = None
    for t, call in zip(timesteps, model_evals(scheduler), strict=True):
        x_t = scheduler.scale_model_input(x, t)
        alpha, sigma = call.level.alpha, call.level.sigma
        start = (x_t, alpha, sigma) if start is None else start
        x0 = alpha * s**2 / (alpha**2 * s**2 + sigma**2) * x_t
        x = scheduler.step(process_of(scheduler).from_x0(x0, x_t, call.level), t, x, return_dict=False)[0]
    x_t, alpha, sigma = start
    expected = x_t * s / np.sqrt(alpha**2 * s**2 + sigma**2)
    assert torch.allclose(x, expected, rtol=0.02)


def test_swapped_scheduler_uses_same_grid():
    """`DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)`, as diffusers' users write it."""
    ours = scheduler_of("dpm++", "karras")
    swapped = DPMSolverMultistepScheduler.from_config(make_scheduler(DiffusionConfig()).config, use_karras_sigmas=True)
    assert spacing_name(swapped) == "karras"
    for flag in ("use_exponential_sigmas", "use_lu_lambdas"):
        assert (
            spacing_name(DPMSolverMultistepScheduler.from_config(ours.config, use_karras_sigmas=False, **{flag: True}))
            == "exponential"
        )
    linear = scheduler_of("dpm++", "karras", "linear")
    again = DPMSolverMultistepScheduler.from_config(linear.config)
    assert torch.equal(set_timesteps(linear, 10), set_timesteps(again, 10)) and torch.equal(linear.sigmas, again.sigmas)


def test_spacing_survives_sampler_change():
    scheduler = scheduler_of("dpm++", "karras")
    assert spacing_name(with_sampler(scheduler, "heun")) == "karras"
    assert spacing_name(with_sampler(scheduler, "heun", "trailing")) == "trailing"


@pytest.mark.parametrize(
    ("sampler", "settings", "message"),
    [
        ("ddim", {}, "ddim steps over whole timesteps.*use dpm"),
        ("ddpm", {}, "ddpm steps over whole timesteps"),
        ("euler", {"zero_snr": True, "prediction": "v"}, "pure noise at t = T-1.*trailing"),
    ],
)
def test_impossible_noise_grids_are_rejected(sampler, settings, message):
    with pytest.raises(InputError, match=message):
        scheduler_of(sampler, "karras", **settings)


def test_unsupported_grid_names_the_reason():
    beta = DPMSolverMultistepScheduler.from_config(make_scheduler(DiffusionConfig()).config, use_beta_sigmas=True)
    with pytest.raises(InputError, match="use_beta_sigmas is not supported"):
        set_timesteps(beta, 10)
    with pytest.raises(InputError, match=r"Did you mean dpm\+\+\?"):
        with_sampler(beta, "dpm")
