import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.loss import DiffusionLoss, _log_pixel_probability
from diffusion_adagn.diffusion.process import ddpm, ddpm_level
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError

G = torch.Generator().manual_seed(0)
X0, NOISE = torch.randn(4, 1, 4, 4, generator=G), torch.randn(4, 1, 4, 4, generator=G)
T = torch.tensor([0, 10, 500, 999])
THEIRS = DDPMScheduler(beta_schedule="linear")


def objective(prediction, **kw):
    return DiffusionLoss(ddpm(make_scheduler(DiffusionConfig()).alphas_cumprod, prediction), **kw)


def test_noise_and_targets_equal_diffusers():
    for prediction, target in (("eps", NOISE), ("x0", X0), ("v", THEIRS.get_velocity(X0, NOISE, T))):
        mine = objective(prediction).process
        assert torch.allclose(mine.add_noise(X0, NOISE, mine.level(T)), THEIRS.add_noise(X0, NOISE, T), atol=1e-5)
        assert torch.allclose(mine.target(X0, NOISE, mine.level(T)), target, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_predictions_convert_to_x0_and_back(prediction):
    mine = objective(prediction).process
    levels = mine.level(T)
    x_t, target = mine.add_noise(X0, NOISE, levels), mine.target(X0, NOISE, levels)
    assert torch.allclose(mine.to_x0(target, x_t, levels), X0, atol=2e-3)
    assert torch.allclose(mine.from_x0(X0, x_t, levels), target, atol=2e-3)
    for i, t in enumerate(T.tolist()):
        level = ddpm_level(t, levels.alpha[i].item(), levels.sigma[i].item(), prediction)
        assert torch.allclose(mine.to_x0(target[i], x_t[i], level), X0[i], atol=2e-3)
        assert torch.allclose(mine.from_x0(X0[i], x_t[i], level), target[i], atol=2e-3)


def test_conversion_equals_diffusers():
    for prediction, theirs in (("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")):
        scheduler = DDPMScheduler(beta_schedule="linear", prediction_type=theirs, clip_sample=False)
        mine = objective(prediction).process
        for t in (0, 500, 999):
            expected = scheduler.step(NOISE, t, X0).pred_original_sample
            got = mine.to_x0(NOISE, X0, mine.level(torch.tensor([t])))
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_weights_equal_paper(prediction):
    """Hang et al. 2023: w = min(snr, 5) on the x0 loss; eps loss is snr times it, v loss snr + 1 times."""
    snr = compute_snr(THEIRS, T)
    expected = snr.clamp(max=5) / {"eps": snr, "v": snr + 1, "x0": 1}[prediction]
    mine = objective(prediction, loss_weight="min_snr", min_snr_gamma=5.0)
    plain = objective(prediction)
    answer = torch.full_like(X0, 0.3)
    level = mine.process.level(T)
    ratio = mine.loss(answer, X0, NOISE, level) / plain.loss(answer, X0, NOISE, level)
    assert torch.allclose(ratio, expected, rtol=1e-3)


def test_loss_is_per_sample():
    mine = objective("eps")
    loss = mine.loss(X0, X0, NOISE, mine.process.level(T))
    assert loss.shape == (4,)
    assert loss[2].item() == pytest.approx(((X0[2] - NOISE[2]) ** 2).mean().item(), rel=1e-6)


def test_zero_snr_rejects_eps_and_min_snr():
    bar = make_scheduler(DiffusionConfig(zero_snr=True, prediction="v")).alphas_cumprod
    with pytest.raises(InputError, match="eps"):
        DiffusionLoss(ddpm(bar, "eps"))
    with pytest.raises(InputError, match="uniform"):
        DiffusionLoss(ddpm(bar, "v"), loss_weight="min_snr")
    mine = DiffusionLoss(ddpm(bar, "v")).process
    assert torch.allclose(mine.target(X0, NOISE, mine.level(torch.tensor([999] * 4))), -X0)


# ---------------------------------------------------------------------- learned variance

PIXELS = torch.randint(0, 256, (4, 1, 4, 4), generator=G).float() / 127.5 - 1
ANSWER = torch.randn(4, 2, 4, 4, generator=G)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_bound_equals_float64_distributions(prediction, schedule):
    """Mean and variance of p by diffusers' DDPM scheduler, q by DDPM's equations 6 and 7, both handed to torch.distributions."""
    config = DiffusionConfig(schedule=schedule, prediction=prediction, learned_variance=True)
    scheduler = make_scheduler(config, "ddpm", learned_variance=True)
    process = ddpm(scheduler.alphas_cumprod, prediction)
    t = torch.tensor([0, 1, 500, 999])
    level = process.level(t)
    x_t = process.add_noise(PIXELS, NOISE, level)
    answer = torch.cat([process.target(PIXELS, NOISE, level) + 0.005 * ANSWER[:, :1], ANSWER[:, 1:]], dim=1)
    bits = DiffusionLoss(process, vlb_weight=0.001).vlb(answer, PIXELS, NOISE, level)
    scheduler.set_timesteps(1000)
    abar = scheduler.alphas_cumprod.double()
    beta = 1 - abar / torch.cat([torch.ones(1).double(), abar[:-1]])  # as the sampler takes it, of float32's abar
    for i, at in enumerate(t.tolist()):
        before = abar[at - 1] if at else torch.tensor(1.0).double()
        mean_out, var_out = answer[i : i + 1].double().chunk(2, dim=1)
        low = (beta * (1 - torch.cat([torch.ones(1).double(), abar[:-1]])) / (1 - abar))[max(at, 1)].log()
        log_variance = (var_out + 1) / 2 * beta[at].log() + (1 - var_out) / 2 * low
        if at:
            theirs = scheduler._get_variance(torch.tensor(at), predicted_variance=var_out)
            assert torch.allclose(log_variance, theirs.double(), rtol=1e-3, atol=1e-3)
        a, s = abar[at].sqrt(), (1 - abar[at]).sqrt()
        x = x_t[i : i + 1].double()
        x0 = {"eps": (x - s * mean_out) / a, "x0": mean_out, "v": a * x - s * mean_out}[prediction]
        c0, c1 = before.sqrt() * beta[at] / (1 - abar[at]), (1 - beta[at]).sqrt() * (1 - before) / (1 - abar[at])
        pixels = PIXELS[i : i + 1].double()
        p = torch.distributions.Normal(c0 * x0 + c1 * x, (0.5 * log_variance).exp())
        if at:
            q = torch.distributions.Normal(c0 * pixels + c1 * x, low.mul(0.5).exp())
            expected = torch.distributions.kl_divergence(q, p)
        else:
            above = torch.where(pixels > 0.999, 1.0, p.cdf(pixels + 1 / 255))
            below = torch.where(pixels < -0.999, 0.0, p.cdf(pixels - 1 / 255))
            assert (above - below).min() > 1e-9  # below, float64's own differences of tails end
            expected = -(above - below).log()
        expected = expected.mean() / torch.tensor(2.0).log()
        assert bits[i].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)


def test_pixel_likelihoods_sum_to_one():
    values = torch.arange(256).float() / 127.5 - 1
    for mean, log_variance in ((0.1, -4.0), (-0.99, -9.0), (3.0, -2.0), (0.5, 1.0)):
        logs = _log_pixel_probability(values, torch.full_like(values, mean), torch.full_like(values, log_variance))
        assert logs.exp().sum().item() == pytest.approx(1, abs=1e-4)
        assert torch.isfinite(logs).all()
    far = torch.full((3,), -9.0, requires_grad=True)
    logs = _log_pixel_probability(torch.tensor([-1.0, 1.0, 0.5]), torch.tensor([0.2, -0.2, 0.52]), far)
    logs.sum().backward()
    assert torch.isfinite(far.grad).all()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_hybrid_loss_trains_variance_only(prediction):
    mine = objective(prediction, vlb_weight=0.001)
    answer = ANSWER.clone().requires_grad_()
    level = mine.process.level(T)
    loss, mse, bound = (f(answer, PIXELS, NOISE, level) for f in (mine.loss, mine.mse, mine.vlb))
    assert torch.allclose(loss, mse + 0.001 * 1000 * bound)
    assert torch.allclose(mse, objective(prediction).loss(ANSWER[:, :1], PIXELS, NOISE, level))
    of_loss = torch.autograd.grad(loss.sum(), answer, retain_graph=True)[0]
    of_simple = torch.autograd.grad(mse.sum(), answer, retain_graph=True)[0]
    of_bound = torch.autograd.grad(bound.sum(), answer)[0]
    assert torch.equal(of_loss[:, :1], of_simple[:, :1])
    assert of_bound[:, :1].abs().max() == 0 < of_bound[:, 1:].abs().max()
    assert of_simple[:, 1:].abs().max() == 0


def test_true_variance_minimizes_the_bound():
    """With a perfect mean the bound is least where the variance is the posterior's: output -1."""
    mine = objective("x0", vlb_weight=0.001)
    level = mine.process.level(torch.tensor([500] * 4))
    bits = [
        mine.vlb(torch.cat([PIXELS, torch.full_like(PIXELS, v)], dim=1), PIXELS, NOISE, level).mean().item()
        for v in (-1.0, 0.0, 1.0)
    ]
    assert bits[0] == pytest.approx(0, abs=1e-6) and bits[0] <= bits[1] <= bits[2]


def test_bound_is_finite_under_zero_snr():
    bar = make_scheduler(DiffusionConfig(zero_snr=True, prediction="v")).alphas_cumprod
    mine = DiffusionLoss(ddpm(bar, "v"), vlb_weight=0.001)
    level = mine.process.level(torch.tensor([0, 1, 998, 999]))
    assert torch.isfinite(mine.loss(ANSWER, PIXELS, NOISE, level)).all()
