"""Guidance rules: their formulas, what holds for every rule, and the exact solution of the field that each defines."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from scipy.integrate import solve_ivp

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.ode_scheduler import OdeScheduler
from diffusion_adagn.diffusion.oracle import GaussianMixture
from diffusion_adagn.diffusion.process import edm, flow
from diffusion_adagn.diffusion.schedule import make_scheduler, model_evals
from diffusion_adagn.errors import InputError
from diffusion_adagn.experiments.points import grid_of
from diffusion_adagn.experiments.settings import SweepRequest, parse_axes
from diffusion_adagn.sampling.guidance import Guidance, Interval
from diffusion_adagn.sampling.rules import MIN_ALPHA, RULES, Evaluation, Memory, Rule
from diffusion_adagn.sampling.settings import SamplerSettings

NAMES = LabelSpace(("cat", "dog", "bird"))
PROCESSES = {
    "eps": DiffusionConfig(schedule="cosine"),
    "v": DiffusionConfig(prediction="v", zero_snr=True),
    "x0": DiffusionConfig(prediction="x0"),
    "edm": DiffusionConfig(process="edm", sigma_data=0.5),
    "flow": DiffusionConfig(process="flow"),
}
STRONG = ["apg:eta=0.3,r=0.05", "apg:momentum=-0.5", "zero", "zero:steps=2", "mambo:alpha=2", "fdg:low=0.2", "tcfg"]
NEUTRAL = ["apg:eta=1", "mambo:alpha=0", "fdg:low=1"]


def pipeline(process, **network):
    pipe = ClassConditionalPipeline(tiny_unet(**network), make_scheduler(PROCESSES[process]), NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, rule, scale=2.0, **changes):
    guidance = Guidance(scale, rule=rule, **changes)
    shown = {"classes": ["cat", "dog", "bird"], "seeds": [0, 1, 2], "num_inference_steps": 5, "output_type": "np"}
    return pipe(guidance=guidance, **shown).images


def fits(rule, process):
    processes = RULES[Rule.parse(rule).name].processes
    return not processes or process in processes


def by_default(rule, process):
    """One rule of each space with every process; the others with eps and flow."""
    return process in ("eps", "flow") or rule in ("apg:eta=0.3,r=0.05", "tcfg")


CASES = [
    pytest.param(rule, process, marks=[] if by_default(rule, process) else pytest.mark.slow)
    for rule in STRONG for process in PROCESSES if fits(rule, process)
]  # fmt: skip


# ---------------------------------------------------------------------- formulas, image by image in float64


def pyramid_coarse(d):
    """The coarse band of a two-level Laplacian pyramid of one channel [H, W], by sums."""
    weights = np.array([1, 4, 6, 4, 1]) / 16

    def mirrored(i, n):
        return -i if i < 0 else 2 * n - 2 - i if i >= n else i

    def blurred(a):
        h, w = a.shape
        return np.array([[sum(weights[i + 2] * weights[j + 2] * a[mirrored(y + i, h), mirrored(x + j, w)]
                              for i in range(-2, 3) for j in range(-2, 3)) for x in range(w)] for y in range(h)])  # fmt: skip

    def resized(a, h, w):
        def at(position, n):
            p = min(max(position, 0), n - 1)
            low = min(int(p), n - 1)
            return low, min(low + 1, n - 1), p - low

        out = np.empty((h, w))
        for y in range(h):
            for x in range(w):
                y0, y1, fy = at((y + 0.5) * a.shape[0] / h - 0.5, a.shape[0])
                x0, x1, fx = at((x + 0.5) * a.shape[1] / w - 0.5, a.shape[1])
                top = a[y0, x0] * (1 - fx) + a[y0, x1] * fx
                out[y, x] = top * (1 - fy) + (a[y1, x0] * (1 - fx) + a[y1, x1] * fx) * fy
        return out

    h, w = d.shape
    return blurred(resized(resized(blurred(d), h // 2, w // 2), h, w))


def slow_apg(c, u, s, eta=0.0, r=0.0):
    d = c - u
    if r and d.any():
        d = d * min(1, r / math.sqrt((d**2).mean()))
    unit = c / np.linalg.norm(c)
    parallel = (d * unit).sum() * unit
    return c + (s - 1) * (d - parallel + eta * parallel)


def slow_zero(c, u, s):
    star = (c * u).sum() / (u * u).sum()
    return (1 - s) * star * u + s * c


def slow_mambo(c, u, s, alpha=8.0):
    damped = 1 + (s - 1) * math.exp(-alpha * np.linalg.norm(c - u) / np.linalg.norm(u))
    return u + damped * (c - u)


def slow_fdg(c, u, s, low=0.5):
    coarse = np.stack([pyramid_coarse(channel) for channel in c - u])
    return c + (s - 1) * (c - u - coarse + low * coarse)


def slow_tcfg(c, u, s):
    _, _, vectors = np.linalg.svd(np.stack([c.ravel(), u.ravel()]), full_matrices=False)
    u = (vectors[0] @ u.ravel() * vectors[0]).reshape(u.shape)
    return u + s * (c - u)


SLOW = {"apg": slow_apg, "zero": slow_zero, "mambo": slow_mambo, "fdg": slow_fdg, "tcfg": slow_tcfg}


def guided(rule, cond, uncond, scales, process=None, x=None, sigma=1.0):
    """The rule on predictions [B, C, H, W] of flow at a noise level, in float64."""
    process = process or flow()
    call = evaluation(process, sigma)
    x = torch.zeros_like(cond) if x is None else x
    return Rule.parse(rule).combine(
        cond, uncond, torch.tensor(scales, dtype=torch.float64), Evaluation(x, process, call, Memory())
    )


def evaluation(process, sigma):
    level = process.at(sigma)

    class Call:
        pass

    call = Call()
    call.level, call.step, call.sigma = level, 0, sigma
    return call


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "rule", ["apg", "apg:eta=0.4", "apg:eta=0.4,r=0.3", "zero", "mambo", "mambo:alpha=1", "fdg", "fdg:low=-1", "tcfg"]
)
def test_formula(rule):
    cond, uncond = draws(3, 2, 8, 8), draws(3, 2, 8, 8, seed=1) + 0.5 * draws(3, 2, 8, 8)
    scales, parsed = [0.0, 1.7, 5.0], Rule.parse(rule)
    process, sigma = flow(), 0.7
    x = draws(3, 2, 8, 8, seed=2)
    got = guided(rule, cond, uncond, scales, process, x, sigma)
    t = sigma / (1 + sigma)
    for i, scale in enumerate(scales):
        c, u = cond[i].numpy(), uncond[i].numpy()
        if RULES[parsed.name].space == "x0":
            xi = x[i].numpy()
            x0 = SLOW[parsed.name](xi - t * c, xi - t * u, scale, **dict(parsed.parameters))
            expected = (xi - x0) / t
        else:
            expected = SLOW[parsed.name](c, u, scale, **dict(parsed.parameters))
        np.testing.assert_allclose(got[i], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", ["mambo:alpha=3", "tcfg", "fdg:low=0.3"])
def test_velocity_is_the_noise_under_edm(rule):
    process, sigma = edm(0.5), 0.7
    level = process.at(sigma)
    x, eps_c, eps_u = (draws(2, 2, 8, 8, seed=i) for i in range(3))
    outputs = [process.from_x0((x - level.sigma * eps) / level.alpha, x, level) for eps in (eps_c, eps_u)]
    got = process.to_x0(guided(rule, *outputs, [2.5, 2.5], process, x, sigma), x, level)
    parsed = Rule.parse(rule)
    for i in range(2):
        eps = SLOW[parsed.name](eps_c[i].numpy(), eps_u[i].numpy(), 2.5, **dict(parsed.parameters))
        np.testing.assert_allclose(got[i], (x[i] - level.sigma * eps) / level.alpha, rtol=1e-8, atol=1e-8)


def test_momentum_is_updated_once_per_step():
    memory, values = Memory(), [draws(1, 1, 2, 2, seed=i) for i in range(4)]
    first = memory.momentum(values[0], -0.5, step=0)
    assert torch.equal(first, values[0]) and torch.equal(memory.momentum(values[1], -0.5, 0), values[1])
    assert torch.equal(memory.momentum(values[2], -0.5, 1), values[2] - 0.5 * values[0])
    second = memory.momentum(values[2], -0.5, 1)
    assert torch.equal(memory.momentum(values[3], -0.5, 2), values[3] - 0.5 * second)


# ---------------------------------------------------------------------- diffusers' guiders


def test_apg_equals_diffusers():
    from diffusers.guiders import AdaptiveProjectedGuidance

    cond, uncond, side = draws(1, 2, 8, 8), draws(1, 2, 8, 8, seed=1), math.sqrt(2 * 8 * 8)
    for eta, r in ((1.0, 0.0), (0.0, 0.0), (0.3, 0.4)):
        guider = AdaptiveProjectedGuidance(
            guidance_scale=2.0, eta=eta, adaptive_projected_guidance_rescale=r * side,
            adaptive_projected_guidance_momentum=None, use_original_formulation=True,
        )  # fmt: skip
        guider.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(0))
        expected = guider.forward(cond, uncond).pred
        got = RULES["apg"].function(cond, uncond, torch.tensor(3.0), Memory(), 0, eta=eta, r=r)
        assert torch.allclose(got, expected)


def test_tcfg_equals_diffusers():
    from diffusers.guiders import TangentialClassifierFreeGuidance

    cond, uncond = draws(3, 2, 8, 8), draws(3, 2, 8, 8, seed=1)
    theirs = TangentialClassifierFreeGuidance(guidance_scale=3.0)
    theirs.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(0))
    got = RULES["tcfg"].function(cond, uncond, torch.tensor(3.0))
    assert torch.allclose(got.float(), theirs.forward(cond, uncond).pred.float(), atol=1e-5)


def test_mambo_equals_diffusers():
    from diffusers.guiders.magnitude_aware_guidance import mambo_guidance

    cond, uncond = draws(3, 2, 8, 8), draws(3, 2, 8, 8, seed=1)
    expected = mambo_guidance(cond.flatten(1), uncond.flatten(1), 3.0, alpha=2.0)  # of images, its norm fails
    assert torch.allclose(RULES["mambo"].function(cond, uncond, torch.tensor(3.0), alpha=2.0).flatten(1), expected)


def test_zero_equals_diffusers():
    from diffusers.guiders import ClassifierFreeZeroStarGuidance

    cond, uncond = draws(3, 2, 8, 8), draws(3, 2, 8, 8, seed=1)
    theirs = ClassifierFreeZeroStarGuidance(guidance_scale=3.0, zero_init_steps=1)
    for step in (0, 1):
        theirs.set_state(step=step, num_inference_steps=10, timestep=torch.tensor(0))
        got = RULES["zero"].function(cond, uncond, torch.tensor(3.0), step, steps=1)
        assert torch.allclose(got, theirs.forward(cond, uncond).pred)


@pytest.mark.slow  # kornia takes seconds to import
def test_fdg_equals_kornia():
    kornia = pytest.importorskip("kornia", reason="kornia builds the reference pyramid: pip install kornia")
    cond, uncond, s, low = draws(2, 2, 16, 16), draws(2, 2, 16, 16, seed=1), 3.0, 0.4
    fine, coarse = zip(*(kornia.geometry.transform.build_laplacian_pyramid(p, 2) for p in (cond, uncond)))
    levels = [u + one * (c - u) for (c, u), one in zip((fine, coarse), (s, 1 + (s - 1) * low))]
    expected = levels[0] + kornia.geometry.pyrup(levels[1])
    assert torch.allclose(RULES["fdg"].function(cond, uncond, torch.tensor(s), low=low), expected)


# ---------------------------------------------------------------------- every rule


@pytest.mark.parametrize(("rule", "process"), CASES)
def test_scale_1_is_the_conditional_prediction(rule, process):
    pipe = pipeline(process)
    several = sample(pipe, rule, scale=(1.0, 3.0, 1.0))  # guided beside those that are not
    unguided = sample(pipe, "cfg", scale=1.0)
    assert np.array_equal(sample(pipe, rule, scale=1.0), unguided)
    np.testing.assert_allclose(several[[0, 2]], unguided[[0, 2]], atol=2e-5)
    if "steps" not in rule:
        np.testing.assert_allclose(sample(pipe, rule, scale=1.0001), unguided, atol=2e-3)


@pytest.mark.parametrize(("rule", "process"), CASES)
def test_images_do_not_depend_on_the_batch(rule, process):
    pipe = pipeline(process)
    alone = pipe("dog", guidance=Guidance(2.0, rule=rule), seeds=1, num_inference_steps=5, output_type="np").images
    np.testing.assert_allclose(sample(pipe, rule)[1], alone[0], atol=2e-5)


@pytest.mark.parametrize(("rule", "process"), [(r, p) for r in NEUTRAL for p in PROCESSES])
def test_neutral_parameters_are_plain_guidance(rule, process):
    pipe = pipeline(process)
    np.testing.assert_allclose(sample(pipe, rule), sample(pipe, "cfg"), atol=1e-3)


@pytest.mark.parametrize(("rule", "process"), [(r, p) for r in STRONG for p in ("eps", "flow") if fits(r, p)])
def test_rules_have_an_effect_in_the_interval_alone(rule, process):
    pipe = pipeline(process)
    assert not np.allclose(sample(pipe, rule), sample(pipe, "cfg"), atol=1e-4)
    nowhere = sample(pipe, rule, interval=Interval("steps", 90, 99))
    assert np.array_equal(nowhere, sample(pipe, "cfg", scale=1.0))
    assert not np.allclose(sample(pipe, rule, schedule="linear"), sample(pipe, rule), atol=1e-4)


@pytest.mark.parametrize("rule", [r for r in STRONG if fits(r, "ddpm")])
def test_learned_variance_is_the_conditional_one(rule):
    config = DiffusionConfig(learned_variance=True)
    unet = tiny_unet(out_channels=2, learned_variance=True)
    pipe = ClassConditionalPipeline(unet, make_scheduler(config, "ddpm", learned_variance=True), NAMES)
    calls = model_evals_of(pipe, 4)
    predict = pipe._predictor(pipe._plans(["cat"], None), calls, pipe.process, Guidance(3.0, rule=rule))
    plain = pipe._predictor(pipe._plans(["cat"], None), calls, pipe.process, Guidance(1.0))
    x = draws(1, 1, 8, 8).float()
    guided, unguided = predict(x, calls[2]), plain(x, calls[2])
    assert torch.allclose(guided[:, 1:], unguided[:, 1:], atol=1e-6)
    assert not torch.allclose(guided[:, :1], unguided[:, :1], atol=1e-4)


def model_evals_of(pipe, steps):
    pipe.scheduler.set_timesteps(steps)
    return model_evals(pipe.scheduler)


def test_plain_guidance_where_x0_is_unusable():
    pipe = pipeline("eps").use_sampler("ddim", "trailing")
    calls = model_evals_of(pipe, 20)
    small = [call for call in calls if call.level.alpha < MIN_ALPHA]
    assert small and f"cfg in place of apg at the {len(small)} evaluations" in Guidance(2.0, rule="apg").describe(
        calls, pipe.process
    )
    at = Evaluation(draws(1, 1, 8, 8), pipe.process, small[0], Memory())
    cond, uncond, scale = draws(1, 1, 8, 8), draws(1, 1, 8, 8, seed=1), torch.tensor([3.0])
    assert torch.equal(Guidance(3.0, rule="apg").combine(cond, uncond, scale, 1.0, at),
                       Guidance(3.0).combine(cond, uncond, scale))  # fmt: skip
    assert "in place" not in Guidance(2.0, rule="mambo").describe(calls, pipe.process)


# ---------------------------------------------------------------------- an exact denoiser


SIDE = 8
ROWS = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
MEANS = [0.6 * ROWS[:, None] * ROWS, 0.5 * (ROWS[:, None] + ROWS), 0.5 * torch.cos(4 * ROWS[:, None]) * ROWS]
CLASS = GaussianMixture(
    torch.stack([m.flatten() for m in MEANS[:2]]), torch.tensor([0.2, 0.3]), torch.tensor([0.4, 0.6])
)
ALL = GaussianMixture(
    torch.stack([m.flatten() for m in MEANS]), torch.tensor([0.2, 0.3, 0.25]), torch.tensor([0.2, 0.3, 0.5])
)


SLOW_PYRAMID = pytest.param("fdg:low=0.3", marks=pytest.mark.slow)


@pytest.mark.parametrize("rule", ["cfg", "apg:eta=0.5,r=0.2", "zero", "mambo:alpha=2", SLOW_PYRAMID, "tcfg"])
@pytest.mark.parametrize("process", ["edm", "flow"])
def test_samples_solve_the_field_of_the_rule(rule, process):
    """Against SciPy's solution of dx/dtau = (x - x0) / tau, with the guided x0 by the slow formulas."""
    if rule != "cfg" and not fits(rule, process):
        pytest.skip("not defined for the process")
    parsed, scale, images = Rule.parse(rule), 2.0, (-1, 1, SIDE, SIDE)
    ends = (20.0, 0.05)
    tau = [s if process == "edm" else s / (1 + s) for s in ends]
    noise = draws(4, SIDE * SIDE) * math.hypot(1, ends[0])

    def slope(t, y):
        rows = torch.from_numpy(y.reshape(4, -1))
        alpha = 1.0 if process == "edm" else 1 - t
        c, u = (mixture.x0(rows, alpha, t).numpy() for mixture in (CLASS, ALL))
        x0 = np.empty_like(c)
        for i, row in enumerate(rows.numpy()):
            if rule == "cfg":
                x0[i] = u[i] + scale * (c[i] - u[i])
            elif RULES[parsed.name].space == "x0":
                x0[i] = SLOW[parsed.name](c[i], u[i], scale, **dict(parsed.parameters))
            else:
                v = [((row - p) / t).reshape(1, SIDE, SIDE) for p in (c[i], u[i])]
                x0[i] = row - t * SLOW[parsed.name](*v, scale, **dict(parsed.parameters)).ravel()
        return ((rows.numpy() - x0) / t).ravel()

    start = noise if process == "edm" else noise / (1 + ends[0])
    exact = solve_ivp(slope, tau, start.numpy().ravel(), "RK45", rtol=1e-4, atol=1e-5).y[:, -1].reshape(4, -1)
    scheduler = OdeScheduler(process, "heun", "karras", sigma_min=ends[1], sigma_max=ends[0])
    levels = list(scheduler.noise_levels(41))
    scheduler.set_noise_levels(levels[:-1], end=levels[-1])
    table, x, memory = scheduler_process(scheduler), start.clone(), Memory()
    for t, call in zip(scheduler.timesteps, model_evals(scheduler)):
        network_input = scheduler.scale_model_input(x, t)
        level, image = call.level, network_input.reshape(images)
        outputs = [
            table.from_x0(m.x0(network_input, level.alpha, level.sigma).reshape(images), image, level)
            for m in (CLASS, ALL)
        ]
        at = Evaluation(image, table, call, memory)
        output = Guidance(scale, rule=rule).combine(*outputs, torch.full((4,), scale), 1.0, at)
        x = scheduler.step(table.to_x0(output, image, level).reshape(4, -1), t, x, return_dict=False)[0]
    assert np.abs(x.numpy() - exact).max() < 0.01


def scheduler_process(scheduler):
    from diffusion_adagn.diffusion.schedule import process_of

    return process_of(scheduler)


# ---------------------------------------------------------------------- what users write


def test_rule_texts():
    assert str(Rule.parse("apg: r=1, eta=0.50")) == "apg:eta=0.5,r=1" and str(Rule()) == "cfg"
    assert Rule.parse(str(Rule.parse("apg:momentum=-0.5"))) == Rule.parse("apg:momentum=-0.5")
    settings = SamplerSettings(Guidance(2.0, rule="apg:r=1,eta=0"), sampler="ddim", spacing="trailing")
    assert settings.name == "g2_apg-eta0-r1_ddim50_trailing" or "apg" in settings.name
    assert settings.to_dict()["rule"] == "apg:eta=0,r=1" and "rule" not in SamplerSettings().to_dict()
    axes = parse_axes({"guidance.rule": "cfg,apg:eta=0,r=1,tcfg"}, {"guidance.rule": "--rule"})
    assert axes["guidance.rule"] == ("cfg", "apg:eta=0,r=1", "tcfg")
    assert [str(p.guidance.rule) for p in grid_of(["digits"], SweepRequest(axes=axes)).samplers] == [
        "cfg",
        "apg:eta=0,r=1",
        "tcfg",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("apgg", "'apgg' is not a guidance rule. Choose from cfg, apg"),
        ("apg:x=1", "no parameter 'x' (its parameters: eta, r, momentum)"),
        ("tcfg:x=1", "it has no parameters"),
        ("apg:eta", "expected NAME:parameter=number"),
        ("apg:eta=inf", "finite"),
        ("cfg:a=1", "it has no parameters"),
        ("apg:r=-1", "r is a number of at least 0, not -1"),
        ("mambo:alpha=-1", "alpha is a number of at least 0"),
        ("zero:steps=0.5", "steps is a whole number of at least 0, not 0.5"),
        ("fdg:levels=0", "levels is a whole number of at least 1"),
        ("apg:eta=1,eta=2", "has eta twice"),
    ],
)
def test_wrong_rules_are_rejected(text, words):
    with pytest.raises(InputError) as error:
        Rule.parse(text)
    assert words in str(error.value)
    with pytest.raises(InputError):
        parse_axes({"guidance.rule": text}, {"guidance.rule": "--rule"})


def test_rules_of_another_process_are_rejected():
    with pytest.raises(InputError, match="rule zero is defined for process flow; this model's is ddpm"):
        sample(pipeline("eps"), "zero")
