"""Guidance against its formulas, and what it costs."""

import functools
import math

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.process import ddpm, ddpm_level
from diffusion_adagn.diffusion.schedule import SAMPLERS, make_scheduler, model_evals, process_of, set_timesteps
from diffusion_adagn.errors import InputError
from diffusion_adagn.sampling.guidance import Guidance, Interval

NAMES = LabelSpace(("cat", "dog", "bird"))
SHOWN = {"classes": ["cat", "dog", "bird"], "seeds": [0, 1, 2], "num_inference_steps": 10, "output_type": "np"}


def pipeline(unet=None, labels=NAMES, sampler="ddim", **diffusion):
    pipe = ClassConditionalPipeline(unet or tiny_unet(), make_scheduler(DiffusionConfig(**diffusion)), labels)
    pipe.set_progress_bar_config(disable=True)
    return pipe.use_sampler(sampler)


def sample(pipe, **changes):
    return pipe(**(SHOWN | changes)).images


@functools.cache
def plain(sampler, **changes):
    """Images of a new network without an interval; shared by the tests of one sampler, to be read only."""
    return sample(pipeline(sampler=sampler), **changes)


def counting(pipe):
    """The rows of every network call to come."""
    rows, real = [], pipe.unet.denoise
    pipe.unet.denoise = lambda x, m: rows.append(len(x)) or real(x, m)
    return rows


# ---------------------------------------------------------------------- interval


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("interval", [None, "t:200-700", "sigma:0.5-2", "steps:3-5", "0.2-0.4", "t:2000-3000"])
def test_scale_1_ignores_intervals(sampler, interval):
    pipe = pipeline(sampler=sampler)
    rows = counting(pipe)
    assert np.array_equal(plain(sampler), sample(pipe, guidance=Guidance(1.0, interval)))
    assert set(rows) == {3}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("interval", ["t:0-999", "sigma:0-inf", "steps:0-9", "0-1"])
def test_full_interval_equals_constant_guidance(sampler, interval):
    pipe = pipeline(sampler=sampler)
    assert np.array_equal(plain(sampler, guidance_scale=3.0), sample(pipe, guidance=Guidance(3.0, interval)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_interval_is_one_pass(sampler):
    pipe = pipeline(sampler=sampler)
    rows = counting(pipe)
    guided = sample(pipe, guidance=Guidance(3.0, "steps:2-5"))
    set_timesteps(pipe.scheduler, 10)
    calls = model_evals(pipe.scheduler)
    assert rows == [6 if 2 <= call.step <= 5 else 3 for call in calls]
    assert sum(rows) == 3 * Guidance(3.0, "steps:2-5").evaluations(calls)
    assert np.abs(guided - plain(sampler)).max() > 1e-3
    rows.clear()
    assert np.array_equal(sample(pipe, guidance=Guidance(3.0, "t:5000-6000")), plain(sampler))
    assert set(rows) == {3}


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_evaluations_know_timestep_and_sigma(sampler, spacing):
    scheduler = make_scheduler(DiffusionConfig(schedule="linear", timestep_spacing=spacing), sampler=sampler)
    try:
        set_timesteps(scheduler, 10)
    except InputError:
        pytest.skip("a rejected grid")
    calls = model_evals(scheduler)
    abar = scheduler.alphas_cumprod.double()
    for call, t in zip(calls, scheduler.timesteps.tolist()):
        assert call.t == t and call.share == t / 1000
        whole = int(t)  # between two timesteps the noise lies between theirs
        sigma = ((1 - abar) / abar).sqrt()
        assert sigma[whole] * 0.999 <= call.sigma <= sigma[min(whole + 1, 999)] * 1.001
    assert (calls[0].step, calls[-1].step) == (0, 9)
    assert len(calls) == (19 if sampler == "heun" else 10)


def test_interval_units_agree():
    scheduler = make_scheduler(DiffusionConfig())
    set_timesteps(scheduler, 10)  # t = 900, 800, ..., 0
    calls = model_evals(scheduler)
    sigma = {call.t: call.sigma for call in calls}
    same = ["t:300-600", "0.3-0.6", "steps:3-6", f"sigma:{sigma[300.0] * 0.99}-{sigma[600.0] * 1.01}"]
    for text in same:
        interval = Interval.parse(text)
        assert [c.t for c in calls if interval.contains(c)] == [600, 500, 400, 300], text
    process = process_of(scheduler)
    plans = Guidance(2.0, "t:300-600").describe(calls, process)
    assert "steps 3-6 of 10" in plans and "14 network evaluations per image instead of 20" in plans
    assert "none of the 10 steps" in Guidance(2.0, "t:301-302").describe(calls, process)
    assert "no guidance: 10" in Guidance(1.0, "t:301-302").describe(calls, process)


@pytest.mark.parametrize("process", ["ddpm", "edm", "flow"])
def test_intervals_of_each_process(process):
    pipe = process_pipeline(process)
    set_timesteps(pipe.scheduler, 12)
    calls = model_evals(pipe.scheduler)
    for text, value in (("sigma:0.3-5", lambda c: c.sigma), ("0.2-0.8", lambda c: c.share)):
        interval = Interval.parse(text)
        on = [c.index for c in calls if interval.contains(c)]
        assert on == [c.index for c in calls if interval.low <= value(c) <= interval.high] and 0 < len(on) < len(calls)
        assert np.isfinite(sample(pipe, guidance=Guidance(2.0, text), num_inference_steps=3)).all()
    assert all(0 <= c.share <= 1 for c in calls)
    words = Guidance(2.0, "sigma:0.3-5").describe(calls, pipe.process)
    assert "(sigma:" in words and (", t:" in words) == (process != "edm")
    if process == "edm":
        for reject in (
            lambda: pipe.check_guidance(Guidance(2.0, "t:200-800")),
            lambda: sample(pipe, guidance=Guidance(2.0, "t:1-9")),
        ):
            with pytest.raises(
                InputError, match=r"process edm does not have: .* sigma:0.3-5; sampling goes from 80 to 0.002"
            ):
                reject()
    else:
        assert [c.t for c in calls if Interval.parse("t:400-600").contains(c)] == [
            c.t for c in calls if 400 <= c.t <= 600
        ]


def process_pipeline(process):
    diffusion = DiffusionConfig(process=process, sigma_data=0.5 if process == "edm" else None)
    pipe = ClassConditionalPipeline(tiny_unet(), make_scheduler(diffusion), NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe.use_sampler("euler", None if process == "ddpm" else "karras")


@pytest.mark.parametrize("text", ["t:1-2", "sigma:0.28-5.4", "steps:0-4", "0.2-0.8", "sigma:1e-3-inf"])
def test_interval_text_round_trips(text):
    assert Interval.parse(str(Interval.parse(text))) == Interval.parse(text)


@pytest.mark.parametrize("text", ["2-3", "t:5", "x:1-2", "0.8-0.2", "t:-1-2", "", "t:1-2-3"])
def test_invalid_intervals_are_rejected(text):
    with pytest.raises(InputError, match=r"interval|fraction|smaller"):
        Interval.parse(text)


# ---------------------------------------------------------------------- schedule, rescale, threshold


@pytest.mark.parametrize(
    ("schedule", "f"),
    [
        ("constant", lambda u: 1.0),
        ("linear", lambda u: 1 - u),
        ("cosine", lambda u: 0.5 * (1 + math.cos(math.pi * u))),
        ("cosine:4", lambda u: 0.5 * (1 - math.cos(math.pi * (1 - u) ** 4))),
        ("power:0.5", lambda u: math.sqrt(1 - u)),
    ],
)
def test_a_schedule_is_its_formula(schedule, f):
    scheduler = make_scheduler(DiffusionConfig())
    set_timesteps(scheduler, 20)
    for call in model_evals(scheduler):
        assert Guidance(3.0, schedule=schedule).weight(call) == pytest.approx(f(call.t / 1000), abs=1e-12)
    cond, null = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    got = Guidance(3.0).combine(cond, null, torch.tensor([3.0, 1.0]), weight=0.25)
    assert torch.allclose(got[0], null[0] + 1.5 * (cond[0] - null[0]), atol=1e-6)
    assert torch.equal(got[1], cond[1])


def test_rescale_is_lins_formula():
    cond, null = torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8, 8)
    scales = torch.tensor([4.0, 1.0, 0.0])
    got = Guidance(4.0, rescale=0.7).combine(cond, null, scales)
    for i in range(3):
        cfg = null[i] + scales[i] * (cond[i] - null[i])
        assert torch.allclose(got[i], 0.7 * (cfg * cond[i].std() / cfg.std()) + 0.3 * cfg, atol=1e-5)
    assert torch.equal(got[1], cond[1])  # unguided: not a bit
    assert torch.allclose(
        Guidance(4.0, rescale=1).combine(cond, null, scales).std((1, 2, 3)), cond.std((1, 2, 3)), atol=1e-5
    )


def test_dynamic_thresholding_is_imagens():
    x0 = torch.randn(4, 3, 16, 16) * torch.tensor([0.1, 1.0, 2.0, 5.0])[:, None, None, None]
    got = Guidance(threshold=0.9).threshold_x0(x0).numpy()
    for i in range(4):
        s = max(1.0, np.percentile(x0[i].abs().numpy(), 90, method="inverted_cdf"))
        assert np.allclose(got[i], np.clip(x0[i].numpy(), -s, s) / s, atol=1e-6)
    assert np.array_equal(got[0], x0[0].numpy())
    pipe = pipeline()
    assert np.abs(sample(pipe, guidance=Guidance(6.0, threshold=0.8)) - sample(pipe, guidance_scale=6.0)).max() > 1e-3


def test_papers_w_is_converted():
    assert Guidance.from_w(0.0).is_neutral and Guidance.from_w(1.5, interval="t:1-2").scale == 2.5
    cond, null = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    ours = Guidance.from_w(1.5).combine(cond, null, torch.tensor([2.5]))
    assert torch.allclose(ours, (1 + 1.5) * cond - 1.5 * null, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": -1},
        {"scale": [1.0, math.nan]},
        {"scale": True},
        {"interval": "soon"},
        {"schedule": "quadratic"},
        {"schedule": "power"},
        {"schedule": "cosine:x"},
        {"schedule": "linear:2"},
        {"rescale": 1.5},
        {"threshold": 0.0},
        {"threshold": 1.01},
    ],
)
def test_values_out_of_range_are_rejected(settings):
    with pytest.raises(InputError):
        Guidance(**settings)


def test_neutral_is_neutral():
    pipe = pipeline()
    plain = sample(pipe)
    assert np.array_equal(plain, sample(pipe, guidance=Guidance()))
    assert np.array_equal(plain, sample(pipe, guidance=Guidance(1.0, "t:1-500", "cosine", 0.7)))
    with pytest.raises(InputError, match="give one of them"):
        sample(pipe, guidance_scale=2.0, guidance=Guidance(2.0))
    with pytest.raises(InputError, match="2 guidance scales"):
        sample(pipe, guidance=Guidance([1.0, 2.0]))


# ---------------------------------------------------------------------- another network as the guide


def other_network(seed=1, **changes):
    torch.manual_seed(seed)
    unet = tiny_unet(**changes)
    with torch.no_grad():
        for p in unet.parameters():
            p.mul_(0.9)
    return unet


def walked(pipe, guide, scale, kind="eps", their_kind="eps"):
    """A slow walk by plain forward passes of both networks."""
    scheduler = make_scheduler(DiffusionConfig(prediction=kind))
    scheduler.set_timesteps(10)
    to_x0 = lambda kind, *given: ddpm(scheduler.alphas_cumprod, kind).to_x0(*given)  # noqa: E731
    x = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    y = torch.arange(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            abar = scheduler.alphas_cumprod[t].double()
            alpha, sigma = abar.sqrt().item(), (1 - abar).sqrt().item()
            ours = to_x0(kind, pipe.unet(x, t, y).sample, x, ddpm_level(t, alpha, sigma, kind))
            theirs = guide.unet(x, t, y if guide.labels.K else None).sample
            theirs = to_x0(their_kind, theirs, x, ddpm_level(t, alpha, sigma, their_kind))
            x0 = (theirs + scale * (ours - theirs)).clamp(-1, 1)
            eps = (x - alpha * x0) / sigma
            before = abar.new_ones(()) if t < 100 else scheduler.alphas_cumprod[t - 100].double()
            x = (before.sqrt() * x0 + (1 - before).sqrt() * eps).float()
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("classes", "kinds"),
    [
        (3, ("eps", "eps")),
        (None, ("v", "eps")),
        (3, ("x0", "v")),
        pytest.param(None, ("eps", "eps"), marks=pytest.mark.slow),
        pytest.param(3, ("v", "eps"), marks=pytest.mark.slow),
        pytest.param(None, ("x0", "v"), marks=pytest.mark.slow),
    ],
)
def test_autoguidance_by_a_second_network(kinds, classes):
    pipe = pipeline(prediction=kinds[0])
    labels = NAMES if classes else LabelSpace(())
    guide = pipeline(other_network(model_channels=32, num_classes=classes), labels, prediction=kinds[1])
    got = sample(pipe, guidance=Guidance(2.0), guide=guide)
    assert np.allclose(got, walked(pipe, guide, 2.0, *kinds), atol=2e-4)
    assert np.array_equal(sample(pipe, guidance=Guidance(1.0), guide=guide), sample(pipe))


@pytest.mark.parametrize("deaf", [{"num_classes": None}, {"conditioning": "none"}], ids=str)
def test_unconditional_guide_guides_a_mix(deaf):
    pipe = pipeline()
    guide = pipeline(other_network(**deaf), LabelSpace(()) if "num_classes" in deaf else NAMES)
    everywhere = ",".join(f"{NAMES.name(1)}@{where}" for where in ("coarse", "fine"))
    got = sample(
        pipe, classes=None, class_plan=[pipe.mix(everywhere)] * 3, seeds=[0, 1, 2], guidance=Guidance(2.0), guide=guide
    )
    plain = sample(pipe, classes=[1, 1, 1], seeds=[0, 1, 2], guidance=Guidance(2.0), guide=guide)
    assert np.abs(got - plain).max() < 2e-4


def test_guide_replaces_missing_null():
    unet = tiny_unet(null_class=False)
    pipe = pipeline(unet, LabelSpace(NAMES.names, has_null=False))
    with pytest.raises(InputError, match="--guide RUN"):
        sample(pipe, guidance_scale=2.0)
    assert np.isfinite(sample(pipe, guidance=Guidance(2.0), guide=pipeline(other_network()))).all()


@pytest.mark.parametrize(
    ("guide", "word"),
    [
        (lambda: pipeline(tiny_unet(in_channels=3)), "channels"),
        (lambda: pipeline(tiny_unet(sample_size=16)), "pixels"),
        (lambda: pipeline(labels=LabelSpace(("a", "b", "c"))), "other classes"),
    ],
)
def test_unsuitable_guides_are_rejected(guide, word):
    with pytest.raises(InputError, match=word):
        sample(pipeline(), guidance=Guidance(2.0), guide=guide())


@pytest.mark.parametrize("other", [{"schedule": "cosine"}, {"num_train_timesteps": 2000, "prediction": "v"}], ids=str)
def test_guide_of_another_schedule_is_evaluated_at_the_same_noise_level(other):
    pipe, guide = pipeline(), pipeline(other_network(), **other)
    ours, theirs = (p.scheduler.alphas_cumprod.double() for p in (pipe, guide))
    levels = ((1 - theirs) / theirs).sqrt().log().numpy()
    scheduler = make_scheduler(DiffusionConfig())
    scheduler.set_timesteps(10)
    x = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    y = torch.arange(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            alpha, sigma = ours[t].sqrt().item(), (1 - ours[t]).sqrt().item()
            # a variance-preserving process has the same alpha and sigma at the same ratio: x needs no scaling
            at = float(np.interp(math.log(sigma / alpha), levels, np.arange(len(levels))))
            mine = (x - sigma * pipe.unet(x, t, y).sample) / alpha
            said = guide.unet(x, torch.tensor([at] * 3), y).sample
            weak = alpha * x - sigma * said if "prediction" in other else (x - sigma * said) / alpha
            x0 = (weak + 2 * (mine - weak)).clamp(-1, 1)
            eps = (x - alpha * x0) / sigma
            before = ours.new_ones(()) if t < 100 else ours[t - 100]
            x = (before.sqrt() * x0 + (1 - before).sqrt() * eps).float()
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.allclose(sample(pipe, guidance=Guidance(2.0), guide=guide), expected, atol=2e-3)


def test_guide_of_another_process_is_evaluated_at_the_same_noise_level():
    """Flow matching guided by an EDM network, by the papers' formulas and Euler steps on the grid of Karras et al."""
    pipe = pipeline(sampler="euler", process="flow")
    guide = pipeline(other_network(), sampler="euler", process="edm", sigma_data=0.6)
    steps, rho, y = 8, 7, torch.arange(3)
    grid = [(80 ** (1 / rho) + i / (steps - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(steps)]
    noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    x = noise * 80 / 81
    with torch.no_grad():
        for s, following in zip(grid, [*grid[1:], 0.0]):
            t, later = s / (1 + s), following / (1 + following)
            mine = x - t * pipe.unet(x, torch.tensor([1000 * t] * 3), y).sample
            noisy = x / (1 - t)  # x0 + s eps
            c_in, c_skip = (s**2 + 0.36) ** -0.5, 0.36 / (s**2 + 0.36)
            c_out = 0.6 * s * c_in
            weak = c_skip * noisy + c_out * guide.unet(c_in * noisy, torch.tensor([math.log(s) / 4] * 3), y).sample
            x0 = (weak + 2 * (mine - weak)).clamp(-1, 1)
            x = x + (later - t) * (x - x0) / t
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    images = sample(pipe, guidance=Guidance(2.0), guide=guide, num_inference_steps=steps)
    assert np.allclose(images, expected, atol=1e-4)
    assert np.abs(images - sample(pipe, num_inference_steps=steps)).max() > 0.01


# ---------------------------------------------------------------------- looking on


def test_callback_receives_predictions_and_x0():
    class Eye:
        def __init__(self):
            self.pairs, self.x0 = [], []

        def on_guidance(self, call, cond, against):
            self.pairs.append((call.step, cond, against))

        def on_pred_x0(self, call, x0):
            self.x0.append(x0)

    pipe, eye = pipeline(), Eye()
    seen = sample(pipe, guidance=Guidance(8.0, "steps:2-4"), callback=eye)
    assert np.array_equal(seen, sample(pipe, guidance=Guidance(8.0, "steps:2-4")))
    assert [step for step, _, _ in eye.pairs] == [2, 3, 4] and len(eye.x0) == 10
    assert max(x0.abs().max() for x0 in eye.x0) > 1
    assert all(not torch.equal(cond, against) for _, cond, against in eye.pairs)
