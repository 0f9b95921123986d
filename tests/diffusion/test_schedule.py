"""Samplers against the closed-form update between the scheduled timesteps, in float64."""

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler

from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import (
    SAMPLERS,
    make_scheduler,
    model_evals,
    set_timesteps,
    with_sampler,
)
from diffusion_adagn.errors import InputError

SCHEDULES = ("linear", "cosine", "sigmoid")


def abar(config) -> torch.Tensor:
    """alphas_cumprod in float64 from the papers' formulas."""
    steps = config.num_train_timesteps
    if config.schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    elif config.schedule == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (0.02 - 1e-4) + 1e-4
    else:

        def f(t):
            return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = torch.tensor([min(1 - f(t + 1) / f(t), 0.999) for t in range(steps)], dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    if config.zero_snr:  # Lin et al. 2023, algorithm 1
        root = bar.sqrt()
        bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return bar


@pytest.mark.parametrize(("schedule", "zero"), list(itertools.product(SCHEDULES, (False, True))))
def test_noise_schedules_equal_papers(schedule, zero):
    config = DiffusionConfig(schedule=schedule, zero_snr=zero, prediction="v")
    mine = make_scheduler(config).alphas_cumprod
    assert torch.allclose(mine.double(), abar(config), rtol=2e-4, atol=1e-7)
    name = {"linear": "linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}[schedule]
    theirs = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero).alphas_cumprod
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-9)
    assert (mine[-1] == 0) == zero


@pytest.mark.parametrize(("schedule", "sampler"), list(itertools.product(SCHEDULES, SAMPLERS)))
def test_samplers_agree_on_the_process(schedule, sampler):
    config = DiffusionConfig(schedule=schedule)
    scheduler = make_scheduler(config, sampler)
    assert torch.allclose(scheduler.alphas_cumprod.double(), abar(config), rtol=2e-4)
    assert not scheduler.config.get("clip_sample", False)
    assert not scheduler.config.get("thresholding", False)
    other = with_sampler(make_scheduler(config, "ddim"), sampler)
    assert public(other) == public(scheduler)


def public(scheduler) -> dict:
    return {k: v for k, v in scheduler.config.items() if not k.startswith("_")}


def denoiser(x0):
    """Predictions of a perfect model of one image disturbed by a smooth error, so that a wrong grid shows."""
    return lambda x_t, alpha, sigma: (x_t - alpha * (0.6 * x0 + 0.2 * torch.sin(3 * x_t))) / sigma


def walk(scheduler, steps, predict, x):
    """What the scheduler makes of x, with the (alpha, sigma) it was at."""
    met = []
    for t, call in zip(set_timesteps(scheduler, steps), model_evals(scheduler), strict=True):
        x_t = scheduler.scale_model_input(x, t)
        alpha, sigma = call.level.alpha, call.level.sigma
        met.append((float(t), alpha, sigma))
        x = scheduler.step(predict(x_t, alpha, sigma), t, x, return_dict=False)[0]
    return x, met


def grid(scheduler, bar, steps):
    """(alpha, sigma) at every scheduled timestep, then (1, 0)."""
    ts = set_timesteps(scheduler, steps).tolist()
    ts = ts if not isinstance(scheduler, SAMPLERS["heun"]) else ts[:1] + ts[1::2]
    return [(bar[int(t)].sqrt().item(), (1 - bar[int(t)]).sqrt().item()) for t in ts] + [(1.0, 0.0)]


def ddim_reference(points, predict, x):
    for (a, s), (a1, s1) in itertools.pairwise(points):
        eps = predict(x, a, s)
        x = a1 * (x - s * eps) / a + s1 * eps
    return x


def heun_reference(points, predict, x):
    for (a, s), (a1, s1) in itertools.pairwise(points):
        # the probability-flow ODE in x/alpha over r = sigma/alpha has derivative eps (Karras et al. 2022)
        r, r1, y = s / a, s1 / a1, x / a
        d = predict(x, a, s)
        step = y + (r1 - r) * d
        if s1 > 0:
            d = (d + predict(a1 * step, a1, s1)) / 2
            step = y + (r1 - r) * d
        x = a1 * step
    return x


def dpmpp_2m_reference(points, predict, x):
    """Lu et al. 2022b, algorithm 2; the last step, to sigma 0, is of first order."""
    lam = [math.log(a / s) if s > 0 else math.inf for a, s in points]
    before = None
    for i, ((a, s), (a1, s1)) in enumerate(itertools.pairwise(points)):
        x0 = (x - s * predict(x, a, s)) / a
        h = lam[i + 1] - lam[i]
        d = x0
        final = i == len(points) - 2
        if before is not None and not final:
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - before / (2 * r)
        x = (s1 / s) * x - a1 * math.expm1(-h) * d
        before = x0
    return x


def unipc_reference(points, predict, x):
    """Zhao et al. 2023, algorithms 1 and 2 (UniPC-2, data prediction, B(h) = e^h - 1)."""
    lam = [math.log(a / s) if s > 0 else math.inf for a, s in points]
    before, data, start = None, None, x  # data predictions one and two points back; the corrected sample they step from
    order = 0
    for i, (a, s) in enumerate(points[:-1]):
        now = (x - s * predict(x, a, s)) / a
        if i > 0:  # correct x with what the network says at it
            s0 = points[i - 1][1]
            hh = lam[i - 1] - lam[i]
            base = s / s0 * start - a * math.expm1(hh) * data
            if order == 1:
                x = base - a * math.expm1(hh) * 0.5 * (now - data)
            else:
                r = (lam[i - 2] - lam[i - 1]) / -hh
                phi = math.expm1(hh) / hh - 1
                b = torch.tensor([phi, (phi / hh - 0.5) * 2], dtype=torch.float64) / math.expm1(hh)
                rho = torch.linalg.solve(torch.tensor([[1.0, 1.0], [r, 1.0]], dtype=torch.float64), b)
                x = base - a * math.expm1(hh) * (rho[0] * (before - data) / r + rho[1] * (now - data))
        before, data, start = data, now, x
        a1, s1 = points[i + 1]
        hh = lam[i] - lam[i + 1]
        order = min(2, len(points) - 1 - i, i + 1)
        x = s1 / s * start - a1 * math.expm1(hh) * data
        if order == 2:
            r = (lam[i - 1] - lam[i]) / -hh
            x = x - a1 * math.expm1(hh) * 0.5 * (before - data) / r
    return x


DETERMINISTIC = ("ddim", "euler", "heun", "dpm++", "unipc")


@pytest.mark.parametrize(("schedule", "sampler", "steps"), list(itertools.product(SCHEDULES, DETERMINISTIC, (10, 30))))
def test_deterministic_steps_equal_closed_form(schedule, sampler, steps):
    config = DiffusionConfig(schedule=schedule)
    scheduler = make_scheduler(config, sampler)
    bar = scheduler.alphas_cumprod.double()
    points = grid(scheduler, bar, steps)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (
        torch.randn(1, 1, 4, 4, generator=generator).double(),
        torch.randn(1, 1, 4, 4, generator=generator).double(),
    )
    predict = denoiser(x0)
    scale = (
        1.0 if sampler in ("ddim", "dpm++", "unipc") else (1 + (points[0][1] / points[0][0]) ** 2) ** 0.5
    )  # x / alpha
    reached, met = walk(scheduler, steps, predict, noise * scale)
    for (_, a, s), (ra, rs) in zip(met if sampler != "heun" else met[:1] + met[1::2], points):
        assert (a, s) == pytest.approx((ra, rs), rel=1e-4, abs=1e-6)
    references = {"heun": heun_reference, "dpm++": dpmpp_2m_reference, "unipc": unipc_reference}
    expected = references.get(sampler, ddim_reference)(points, predict, noise)  # euler is ddim in other units
    assert torch.allclose(reached, expected, rtol=2e-3, atol=2e-4), (reached - expected).abs().max()


def test_ddpm_step_equals_posterior_mean():
    """Ho et al. 2020, equation 7, for a respaced chain."""
    config = DiffusionConfig(schedule="linear")
    scheduler = make_scheduler(config, "ddpm")
    bar = scheduler.alphas_cumprod.double()
    ts = set_timesteps(scheduler, 30).tolist()
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    eps = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    for t, following in [*itertools.pairwise(ts), (ts[-1], None)]:
        a, a1 = bar[t], bar[following] if following is not None else torch.tensor(1.0).double()
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        beta = 1 - a / a1
        mean = a1.sqrt() * beta / (1 - a) * x0 + (a / a1).sqrt() * (1 - a1) / (1 - a) * x
        deviation = ((1 - a1) / (1 - a) * beta).sqrt() if t > 0 else 0.0
        noise = torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        mine = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(5), return_dict=False)[0]
        assert torch.allclose(mine, mean + deviation * noise, rtol=1e-3, atol=1e-4)


def test_ddim_eta_1_has_ddpm_variance():
    config = DiffusionConfig()
    scheduler = make_scheduler(config, "ddim")
    t, following = set_timesteps(scheduler, 50).tolist()[10:12]
    x, eps = torch.zeros(4, 1, 64, 64), torch.zeros(4, 1, 64, 64)
    out = scheduler.step(eps, t, x, eta=1.0, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    a, a1 = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[following]
    expected = ((1 - a1) / (1 - a) * (1 - a / a1)).sqrt()
    assert out.std().item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize(
    ("sampler", "spacing", "steps", "remedy"),
    [
        ("ddim", "linspace", 50, "leading"),
        ("ddim", "trailing", 30, r"leading, or 20, 25, 40 steps"),
        ("ddim", "leading", 0, "1 to 1000"),
        ("ddim", "leading", 1001, "1 to 1000"),
        ("dpm++", "leading", 1000, "fewer steps"),
        ("ddim", "leading", 501, "500 or 250 steps"),
        ("ddim", "leading", 1, "trailing, or 2 steps"),  # it would start at t = 0 and return noise
        ("euler", "linspace", 1, "trailing, or 2 steps"),
        ("ddpm", "leading", 700, "500 or 1000 steps"),
        ("ddim", "foo", 10, "leading, trailing, linspace"),
        ("unipc", "leading", 1000, "fewer steps"),
    ],
)
def test_unfollowable_grids_are_rejected(sampler, spacing, steps, remedy):
    with pytest.raises(InputError, match=remedy):
        set_timesteps(make_scheduler(DiffusionConfig(timestep_spacing=spacing), sampler), steps)


def test_heun_rejects_extreme_noise():
    for spacing in ("trailing", "linspace"):
        with pytest.raises(InputError, match="leading"):
            set_timesteps(make_scheduler(DiffusionConfig(schedule="cosine", timestep_spacing=spacing), "heun"), 20)
        assert len(set_timesteps(make_scheduler(DiffusionConfig(timestep_spacing=spacing), "heun"), 20)) == 39


@pytest.mark.parametrize(
    ("spacing", "steps"), [("leading", 30), ("leading", 7), ("trailing", 50), ("leading", 1000), ("trailing", 1)]
)
def test_exact_ddim_grids_are_accepted(spacing, steps):
    scheduler = make_scheduler(DiffusionConfig(timestep_spacing=spacing), "ddim")
    ts = set_timesteps(scheduler, steps).tolist()
    stride = 1000 // steps
    assert all(a - b == stride for a, b in itertools.pairwise(ts))


def test_zero_snr_traps():
    v = DiffusionConfig(zero_snr=True, prediction="v")
    assert make_scheduler(v).config.timestep_spacing == "trailing"
    assert set_timesteps(make_scheduler(v), 50)[0] == 999
    for sampler in ("ddpm", "ddim", "dpm++", "unipc", "euler"):
        assert int(set_timesteps(make_scheduler(v, sampler), 10)[0]) == 999
    with pytest.raises(InputError, match="heun"):
        make_scheduler(v, "heun")
    with pytest.raises(InputError, match="divides by zero"):
        make_scheduler(DiffusionConfig(zero_snr=True, prediction="eps"))
    with pytest.raises(InputError, match="trailing"):
        with_sampler(make_scheduler(v), "dpm++", spacing="leading")
    with pytest.raises(InputError, match=r"use .* steps"):
        set_timesteps(make_scheduler(v), 30)


def test_an_unknown_sampler_is_named():
    with pytest.raises(InputError, match="ddim"):
        make_scheduler(DiffusionConfig(), "dim")
