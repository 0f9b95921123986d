"""Sampling of a network that reads the guidance scale: one pass per step."""

import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import ClassConditionalPipeline, Guidance, InputError, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler, model_evals, set_timesteps
from diffusion_adagn.sampling.card import model_card
from diffusion_adagn.sampling.class_mix import ClassInterpolation, ClassMix, modulation_table
from diffusion_adagn.sampling.guidance import example_scales

LABELS = LabelSpace(("cat", "dog", "owl"))
CONFIGS = {
    "ddpm": DiffusionConfig(schedule="cosine"),
    "edm": DiffusionConfig(process="edm", sigma_data=0.5),
    "flow": DiffusionConfig(process="flow"),
}
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def pipeline(name="ddpm", **changes):
    unet = tiny_unet(**{"max_guidance_scale": 4.0} | changes)
    pipe = ClassConditionalPipeline(unet, make_scheduler(CONFIGS[name]), LABELS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calls_of(pipe, steps=5):
    scheduler = pipe._scheduler(None, None)
    set_timesteps(scheduler, steps)
    return model_evals(scheduler)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("conditioning", ["adagn", "cross_attention"])
def test_network_receives_the_scale_of_interval_and_schedule(name, conditioning):
    pipe = pipeline(name, conditioning=conditioning)
    calls = calls_of(pipe)
    guidance = Guidance((1.0, 2.0, 4.0), interval="steps:1-3", schedule="linear")
    predict = pipe._predictor(pipe._plans(["cat", "dog", "dog"], None), calls, pipe.process, guidance)
    seen = set()
    for call in calls:
        scales = [1 + (s - 1) * guidance.weight(call) for s in guidance.scale]
        seen |= {round(s, 3) for s in scales}
        labels = torch.tensor([0, 1, 1])
        wanted = pipe.unet(X, call.t, labels, guidance_scale=torch.tensor(scales)).sample
        torch.testing.assert_close(predict(X, call), wanted, atol=2e-4, rtol=1e-4)  # of 1000 / s in fp32
    assert 1.0 in seen and len(seen) >= 6


def test_image_depends_on_its_own_scale_alone():
    pipe = pipeline()
    rows = []
    pipe.unet.register_forward_pre_hook(lambda *_: rows.append("forward"))
    together = pipe(["cat", "cat", "dog"], [1.0, 3.0, 3.0], 5, seeds=[0, 0, 1], output_type="pt").images
    for i, (name, scale, seed) in enumerate((("cat", 1.0, 0), ("cat", 3.0, 0), ("dog", 3.0, 1))):
        alone = pipe(name, scale, 5, seeds=[seed], output_type="pt").images
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3
    default, one = (pipe("cat", scale, 5, seeds=0, output_type="pt").images for scale in (None, 1.0))
    assert torch.equal(default, one)
    never = pipe(
        "cat", guidance=Guidance(3.0, interval="t:10000-10001"), num_inference_steps=5, seeds=0, output_type="pt"
    )
    assert torch.equal(never.images, one)


def test_every_step_is_one_pass():
    pipe, counts = pipeline(), []
    denoise = pipe.unet.denoise
    pipe.unet.denoise = lambda x, m: counts.append(len(x)) or denoise(x, m)
    pipe(["cat", "dog"], 2.0, 5, seeds=0)
    assert counts == [2] * 5
    calls, guidance = calls_of(pipe), Guidance(2.0, interval="steps:1-3")
    assert pipe.one_pass and guidance.evaluations(calls, one_pass=True) == 5 and guidance.evaluations(calls) == 8
    text = guidance.describe(calls, pipe.process, one_pass=True)
    assert text.endswith("5 network evaluations per image") and "steps 1-3 of 5" in text


def test_mixes_and_interpolations_receive_the_scale():
    pipe, t = pipeline(), 500.0
    mix, between = pipe.mix("cat@coarse,dog@fine"), ClassInterpolation.parse("cat,dog", LABELS, 0.5)
    plans = [mix, mix, between, ClassMix.single(2, LABELS)]
    scales = torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    m = modulation_table(pipe.unet, plans, torch.tensor([t]), scales=scales)(0)
    for i, (plan, scale) in enumerate(zip(plans, scales[0].tolist())):
        wanted = plan.modulation(pipe.unet, t, scale)
        for site, values in m.items():
            for got, expected in zip(values, wanted[site]):
                torch.testing.assert_close(got[i : i + 1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (
            {"scale": 2.0, "rule": "tcfg"},
            "the rule tcfg works on two predictions, and this network reads the guidance scale",
        ),
        ({"scale": 2.0, "negative": "random"}, "the negative random works on two"),
        ({"scale": 2.0, "rescale": 0.7}, "rescale 0.7 works on two"),
        ({"scale": 5.0}, "trained for 1 to 4, not 5"),
        ({"scale": 0.5}, "trained for 1 to 4, not 0.5"),
        ({"scale": (1.0, 6.0)}, "trained for 1 to 4, not 6"),
    ],
)
def test_what_needs_two_predictions_is_rejected(guidance, message):
    pipe = pipeline()
    with pytest.raises(InputError, match=message):
        pipe(["cat", "dog"], guidance=Guidance(**guidance), num_inference_steps=2)


def test_guide_is_rejected_and_the_network_can_be_one():
    pipe, plain = pipeline(), pipeline(max_guidance_scale=None)
    with pytest.raises(InputError, match="a guide works on two predictions"):
        pipe("cat", 2.0, 2, guide=plain)
    assert len(plain("cat", 2.0, 2, guide=pipe, seeds=0).images) == 1  # at scale 1


def test_commands_that_show_a_model_stay_within_its_scales():
    wanted = {None: "1,2,4", 4.0: "1,2,4", 3.0: "1,2,3", 1.5: "1,1.5"}
    assert {largest: example_scales(LABELS, largest) for largest in wanted} == wanted
    assert example_scales(LabelSpace(("a",), has_null=False)) is None
    assert "guidance_scale=1.5" in (card := model_card(pipeline(max_guidance_scale=1.5), "x"))
    assert "--guidance 1,1.5" in card and "the network reads it, from 1 to 1.5, in one pass" in card
