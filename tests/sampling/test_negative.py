"""What guidance moves away from without a second network."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler, model_evals, set_timesteps
from diffusion_adagn.errors import InputError
from diffusion_adagn.sampling.guidance import Guidance
from diffusion_adagn.sampling.negative import Negative
from diffusion_adagn.sampling.settings import SamplerSettings

NAMES = LabelSpace(("cat", "dog", "bird"))
SCALE = 2.5


def pipeline(labels=NAMES, sampler="ddim", network=None, **diffusion):
    unet = tiny_unet(**(network or {}))
    pipe = ClassConditionalPipeline(unet, make_scheduler(DiffusionConfig(**diffusion)), labels).use_sampler(sampler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, negative="null", classes=("cat", "dog", "bird"), seeds=(0, 1, 2), **changes):
    guidance = Guidance(SCALE, negative=negative, **changes)
    return pipe(list(classes), guidance=guidance, seeds=list(seeds), num_inference_steps=8, output_type="np").images


def predictions(pipe, negative, x, index=3):
    """The guided prediction for "cat" at an evaluation, and the evaluation."""
    set_timesteps(pipe.scheduler, 8)
    calls = model_evals(pipe.scheduler)
    predict = pipe._predictor(
        pipe._plans("cat", None), calls, pipe.process, Guidance(SCALE, negative=negative), seeds=[7]
    )
    return predict(x, calls[index]), calls[index]


NOISE = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("negative", "class_id"), [("null", 3), ("dog", 1), ("id:2", 2)])
def test_class_is_moved_away_from(negative, class_id):
    pipe = pipeline()
    got, call = predictions(pipe, negative, NOISE)
    cond, uncond = (pipe.unet(NOISE, torch.tensor([call.t]), torch.tensor([c])).sample for c in (0, class_id))
    assert torch.allclose(got, uncond + SCALE * (cond - uncond), atol=1e-4)


@pytest.mark.parametrize("process", ["ddpm", "edm", "flow"])
def test_time_shift_is_a_shift_of_ln_sigma(process):
    settings = {"process": process} | ({"sigma_data": 0.5} if process == "edm" else {})
    pipe = pipeline(sampler="ddim" if process == "ddpm" else "euler", **settings)
    got, call = predictions(pipe, "time:0.5", NOISE)
    time = pipe.process.time_of(call.sigma * math.exp(0.5))
    assert time > call.t
    cond, uncond = (pipe.unet(NOISE, torch.tensor([t]), torch.tensor([0])).sample for t in (call.t, time))
    assert torch.allclose(got, uncond + SCALE * (cond - uncond), atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_random_class_depends_on_seed_and_step(sampler):
    pipe = pipeline(sampler=sampler)
    images = sample(pipe, "random")
    assert not np.allclose(images, sample(pipe, "null"), atol=1e-3)
    np.testing.assert_allclose(sample(pipe, "random", ["dog"], [1])[0], images[1], atol=1e-5)
    set_timesteps(pipe.scheduler, 8)
    calls = model_evals(pipe.scheduler)
    drawn = Negative("random").class_ids(NAMES, calls, range(50))
    assert {c for row in drawn for c in row} == {0, 1, 2} and len({tuple(row) for row in drawn}) > 40
    for row in drawn:
        by_step = {call.step: c for call, c in zip(calls, row)}
        assert row == [by_step[call.step] for call in calls]


def test_random_classes_in_the_prediction():
    pipe = pipeline()
    got, call = predictions(pipe, "random", NOISE)
    expected = Negative("random").class_ids(NAMES, [call], [7])[0][0]
    cond, uncond = (pipe.unet(NOISE, torch.tensor([call.t]), torch.tensor([c])).sample for c in (0, expected))
    assert torch.allclose(got, uncond + SCALE * (cond - uncond), atol=1e-4)


def test_mixes_move_away_from_random_classes():
    pipe = pipeline()
    guidance = Guidance(SCALE, negative="random")
    mixed = pipe(class_plan="cat@coarse,cat@fine", guidance=guidance, seeds=1, num_inference_steps=8, output_type="np")
    np.testing.assert_allclose(mixed.images[0], sample(pipe, "random", ["cat"], [1])[0], atol=1e-5)


def test_networks_without_null_class_can_be_guided():
    labels = LabelSpace(("cat", "dog", "bird"), has_null=False)
    pipe = pipeline(labels, network={"null_class": False})
    with pytest.raises(InputError, match="--negative random"):
        sample(pipe)
    for negative in ("random", "dog", "time:0.3"):
        assert np.isfinite(sample(pipe, negative)).all()


@pytest.mark.parametrize(
    ("negative", "words"),
    [
        ("lion", "lion"),
        ("cat,dog", "is one class, and 'cat,dog' is 2"),
        ("time:0", "other than 0"),
        ("time:9", "at most 5"),
        ("time:x", "expected time:SHIFT"),
        ("", "not an empty text"),
    ],
)
def test_wrong_negatives_are_rejected(negative, words):
    with pytest.raises(InputError) as error:
        sample(pipeline(), negative)
    assert words in str(error.value)


def test_guide_and_negative_are_exclusive():
    pipe = pipeline()
    with pytest.raises(InputError, match="one of both"):
        pipe("cat", guidance=Guidance(2.0, negative="dog"), guide=pipe)


def test_names_and_records():
    settings = SamplerSettings(Guidance(2.0, negative="name:a b/c"), sampler="ddim", spacing="trailing")
    assert settings.name == "g2_neg-name-a-b-c_ddim50_trailing"
    assert settings.to_dict()["negative"] == "name:a b/c" and "negative" not in SamplerSettings().to_dict()
