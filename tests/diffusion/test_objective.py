import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.objective import Objective, from_x0, to_x0
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError

G = torch.Generator().manual_seed(0)
X0, NOISE = torch.randn(4, 1, 4, 4, generator=G), torch.randn(4, 1, 4, 4, generator=G)
T = torch.tensor([0, 10, 500, 999])
THEIRS = DDPMScheduler(beta_schedule="linear")


def objective(prediction, **kw):
    return Objective(make_scheduler(DiffusionConfig()).alphas_cumprod, prediction, **kw)


def test_noisy_pictures_and_targets_are_diffusers():
    for prediction, target in (("eps", NOISE), ("x0", X0), ("v", THEIRS.get_velocity(X0, NOISE, T))):
        mine = objective(prediction)
        assert torch.allclose(mine.noisy(X0, NOISE, T), THEIRS.add_noise(X0, NOISE, T), atol=1e-5)
        assert torch.allclose(mine.target(X0, NOISE, T), target, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_perfect_prediction_means_its_x0_and_back(prediction):
    mine = objective(prediction)
    x_t, target = mine.noisy(X0, NOISE, T), mine.target(X0, NOISE, T)
    for i, t in enumerate(T):
        alpha, sigma = mine.alpha[t].item(), mine.sigma[t].item()
        assert torch.allclose(to_x0(target[i], x_t[i], alpha, sigma, prediction), X0[i], atol=2e-3)
        assert torch.allclose(from_x0(X0[i], x_t[i], alpha, sigma, prediction), target[i], atol=2e-3)


def test_the_conversion_is_what_diffusers_scheduler_does():
    for prediction, theirs in (("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")):
        scheduler = DDPMScheduler(beta_schedule="linear", prediction_type=theirs, clip_sample=False)
        mine = objective(prediction)
        for t in (0, 500, 999):
            expected = scheduler.step(NOISE, t, X0).pred_original_sample
            got = to_x0(NOISE, X0, mine.alpha[t], mine.sigma[t], prediction)
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_weights_are_the_papers(prediction):
    """Hang et al. 2023: w = min(snr, 5) on the x0 loss; eps loss is snr times it, v loss snr + 1 times."""
    snr = compute_snr(THEIRS, T)
    expected = snr.clamp(max=5) / {"eps": snr, "v": snr + 1, "x0": 1}[prediction]
    mine = objective(prediction, loss_weight="min_snr", min_snr_gamma=5.0)
    plain = objective(prediction)
    ratio = mine.loss(NOISE, X0, T) / plain.loss(NOISE, X0, T)
    assert torch.allclose(ratio, expected, rtol=1e-3)


def test_the_loss_is_one_number_a_sample():
    loss = objective("eps").loss(X0, NOISE, T)
    assert loss.shape == (4,)
    assert loss[2].item() == pytest.approx(((X0[2] - NOISE[2]) ** 2).mean().item(), rel=1e-6)


def test_zero_snr_is_refused_where_it_would_divide_by_zero_or_weigh_nothing():
    bar = make_scheduler(DiffusionConfig(zero_snr=True, prediction="v")).alphas_cumprod
    with pytest.raises(InputError, match="eps"):
        Objective(bar, "eps")
    with pytest.raises(InputError, match="uniform"):
        Objective(bar, "v", loss_weight="min_snr")
    assert torch.allclose(Objective(bar, "v").target(X0, NOISE, torch.tensor([999] * 4)), -X0)
