"""The table of each process, against the formulas of the papers written out."""

import math

import pytest
import torch
from scipy.stats import norm

from diffusion_adagn import InputError
from diffusion_adagn.config import DiffusionConfig, read_config
from diffusion_adagn.diffusion.loss import DiffusionLoss
from diffusion_adagn.diffusion.process import Level, ddpm, edm, flow
from diffusion_adagn.diffusion.schedule import make_process, make_scheduler
from diffusion_adagn.errors import UsageError

X0, NOISE = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
U = torch.tensor([0.0, 0.1, 0.5, 0.8, 0.999], dtype=torch.float64)
PROCESSES = {
    "edm": edm(0.6),
    "flow": flow(),
    **{p: ddpm(make_scheduler(DiffusionConfig()).alphas_cumprod, p) for p in ("eps", "x0", "v")},
}


@pytest.mark.parametrize("name", PROCESSES)
def test_target_is_what_means_x0(name):
    process = PROCESSES[name]
    level = process.draw(U, 1e-3)[0]
    level = Level(*(v.double() for v in level))
    x = process.add_noise(X0.double(), NOISE.double(), level)
    target = process.target(X0.double(), NOISE.double(), level)
    assert torch.allclose(process.to_x0(target, x, level), X0.double(), atol=1e-6)
    assert torch.allclose(process.from_x0(X0.double(), x, level), target, atol=1e-4)
    if name != "eps":
        wide = [v[:, None, None, None] for v in (level.skip, level.out)]
        assert torch.allclose(target, (X0 - wide[0] * x) / wide[1], atol=1e-4) or name == "x0"


def test_edm_is_v_prediction_of_scaled_images():
    """Up to sign: F = -v for images divided by sigma_data, whose schedule has alpha = sigma_data / sqrt(s^2 + sigma_data^2)."""
    data, s = 0.6, torch.tensor([0.05, 0.5, 2.0, 10.0, 80.0], dtype=torch.float64)
    process, root = edm(data), (s**2 + data**2).sqrt()
    level = process.level(process.time_at(s))
    scaled = Level(level.time, data / root, s / root, data / root, -s / root)
    v = ddpm(torch.tensor([0.9, 0.5]), "v")
    assert torch.allclose(process.target(X0, NOISE, level), -v.target(X0 / data, NOISE, scaled))
    assert torch.allclose(process.add_noise(X0, NOISE, level), v.add_noise(X0 / data, NOISE, scaled))
    F, x = NOISE, X0
    assert torch.allclose(process.to_x0(F, x, level), data * v.to_x0(-F, x, scaled))


def test_edm_weight_is_the_papers():
    """Karras et al. 2022: lambda(s) (D - x0)^2 with lambda = (s^2 + sd^2) / (s sd)^2 is the mean squared error of F."""
    process = edm(0.5)
    level = process.draw(U, 1e-3)[0]
    s = (4 * level.time).exp()
    x, F = process.add_noise(X0, NOISE, level), torch.zeros_like(X0)
    D = process.to_x0(F, x, level)
    weight = (s**2 + 0.25) / (s * 0.5) ** 2
    paper = weight * (D - X0).square().flatten(1).mean(1)
    assert torch.allclose(DiffusionLoss(process).mse(F, X0, NOISE, level).double(), paper, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        ({"process": "edm", "sigma_data": 0.5}, -1.2, 1.2),
        ({"process": "edm", "sigma_data": 1.0}, -1.2 + math.log(2), 1.2),
        ({"process": "edm", "sigma_data": 0.5, "noise_mean": 0.3, "noise_std": 2.0}, 0.3, 2.0),
        ({"process": "flow", "noise": "logit_normal", "noise_mean": 0.7, "noise_std": 0.4}, 0.7, 0.4),
    ],
)
def test_training_noise_is_log_normal(config, mean, std):
    u = (torch.arange(2000, dtype=torch.float64)) / 2000
    level, _ = make_process(DiffusionConfig(**config)).draw(u, 1 / 2000)
    log = (level.sigma / level.alpha).log()
    assert torch.allclose(log, torch.from_numpy(norm(mean, std).ppf(u + 1 / 4000)), atol=1e-9)
    if config["process"] == "flow":
        assert torch.allclose(torch.logit(level.time / 1000), log, atol=1e-9)


def test_uniform_and_cosine_noise():
    u = torch.arange(100, dtype=torch.float64) / 100
    level, _ = make_process(DiffusionConfig(process="flow", noise="uniform")).draw(u, 0.01)
    assert torch.allclose(level.time, 1000 * (u + 0.005))
    cosine, _ = make_process(DiffusionConfig(process="edm", sigma_data=0.5, noise="cosine")).draw(u, 0.01)
    bar = make_scheduler(DiffusionConfig(schedule="cosine")).alphas_cumprod.double()
    theirs = ((1 - bar) / bar).sqrt()[((u + 0.005) * 1000).round().long() - 1]
    assert torch.allclose((4 * cosine.time).exp(), theirs, rtol=1e-3)


def test_ddpm_takes_the_nearest_timestep():
    process = make_process(DiffusionConfig(noise="log_normal", noise_mean=-0.5, noise_std=1.0))
    level, quantile = process.draw(U[1:4], 0.0)
    bar = process.alphas_cumprod.double()
    logs = ((1 - bar) / bar).log() / 2
    wanted = torch.from_numpy(-0.5 + norm.ppf(U[1:4]))
    assert level.time.tolist() == [(logs - w).abs().argmin().item() for w in wanted]
    assert torch.equal(quantile, U[1:4])


@pytest.mark.parametrize("name", PROCESSES)
def test_sigma_determines_the_level(name):
    process = PROCESSES[name]
    for sigma in (0.02, 0.5, 1.0, 7.0):
        level = process.at(sigma)
        assert level.sigma / level.alpha == pytest.approx(sigma, rel=1e-6)
        if name not in ("edm", "flow"):
            assert level.alpha**2 + level.sigma**2 == pytest.approx(1)
    shares = process.share(torch.tensor([process.time_of(s) for s in (0.02, 0.5, 7.0)]))
    assert (shares.diff() > 0).all() and shares.min() >= 0 and shares.max() <= 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"process": "edm", "schedule": "cosine"},
            r"diffusion.schedule cosine \(default linear\) under diffusion.process edm",
        ),
        ({"process": "flow", "prediction": "v"}, "diffusion.prediction v"),
        ({"process": "edm", "zero_snr": True}, "diffusion.zero_snr"),
        ({"process": "flow", "learned_variance": True}, "diffusion.learned_variance"),
        ({"process": "edm", "loss_weight": "min_snr"}, "min_snr under diffusion.process edm"),
        ({"noise": "log_normal"}, "needs diffusion.noise_mean"),
        ({"noise": "log_normal", "noise_mean": 0, "noise_std": 1, "loss_weight": "min_snr"}, "min_snr"),
        ({"noise": "log_normal", "noise_mean": 0, "noise_std": 1, "learned_variance": True}, "learned_variance"),
        ({"process": "edm", "noise": "uniform"}, "noise uniform"),
        ({"noise": "cosine"}, "diffusion.schedule to cosine"),
        ({"process": "flow", "noise": "uniform", "noise_mean": 1}, "belong to diffusion.noise log_normal"),
        ({"process": "flow", "sigma_data": 0.5}, "belongs to diffusion.process edm"),
    ],
)
def test_settings_of_another_process_are_rejected(settings, words):
    with pytest.raises(InputError, match=words):
        DiffusionConfig(**settings)


@pytest.mark.parametrize("key", ["prediction", "schedule", "zero_snr"])
def test_overrides_of_ddpm_alone_need_ddpm(key):
    """Also with the default value, which a config cannot distinguish from an absent one."""
    value = {"prediction": "eps", "schedule": "linear", "zero_snr": "false"}[key]
    with pytest.raises(UsageError, match=f"diffusion.{key} {value} has no effect.* Add --diffusion.process ddpm"):
        read_config("cifar10_small", {f"diffusion.{key}": value})
    assert read_config("cifar10_small", {f"diffusion.{key}": value, "diffusion.process": "ddpm"})
    assert read_config("digits", {f"diffusion.{key}": value})
    assert read_config("digits", {"diffusion.process": "edm", "diffusion.schedule": "linear"})


def test_edm_needs_sigma_data():
    for make in (make_process, make_scheduler):
        with pytest.raises(InputError, match=r"diffusion\.sigma_data is not set"):
            make(DiffusionConfig(process="edm"))
