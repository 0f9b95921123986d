"""The exported pipeline has the arguments of ours, and samples the same images with them."""

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.interop.adagn_label_pipeline import LabelPipeline
from diffusion_adagn.interop.unet2d import to_unet2d

SAME = {"num_inference_steps": 4, "output_type": "np"}


@pytest.fixture(scope="module")
def both():
    """(ours, the exported pipeline) of one network."""
    unet = tiny_unet()
    unet.conv_out.weight.data *= 0.2  # small outputs, as of trained networks: sampling does not amplify rounding
    scheduler = make_scheduler(DiffusionConfig(prediction="v"))
    ours = ClassConditionalPipeline(unet, scheduler, LabelSpace(("cat", "dog", "tench")))
    theirs = LabelPipeline(to_unet2d(unet), scheduler, dict(enumerate(ours.labels.names)), null_id=3)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return ours, theirs


def seeded(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras", "exponential", "lu", None])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc", "euler", "heun"])
def test_samplers_and_spacings_equal_ours(both, sampler, spacing):
    if sampler in ("ddpm", "ddim") and spacing not in ("leading", "trailing", None):
        with pytest.raises(ValueError, match="steps over whole timesteps"):
            both[1]("cat", sampler=sampler, spacing=spacing, **SAME)
        return
    if (sampler, spacing) == ("heun", "trailing"):
        return  # ours rejects its first step at pure noise
    ours, theirs = (
        p(["cat", "dog"], seeds=0, guidance_scale=2.0, sampler=sampler, spacing=spacing, **SAME) for p in both
    )
    assert np.abs(ours.images - theirs.images).max() < 1e-3
    assert theirs.seeds == [0, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: {"generator": seeded(4, 9)},
        lambda: {"generator": seeded(4, 9), "sampler": "ddpm"},
        lambda: {"generator": seeded(4)[0]},
        lambda: {"latents": torch.randn(2, 1, 8, 8, generator=seeded(0)[0]), "seeds": 0},
        lambda: {"seeds": 0, "num_images_per_class": 2},
        lambda: {"seeds": 0, "num_images_per_prompt": 2, "output_type": "numpy"},
    ],
)
def test_call_arguments_equal_ours(both, call):
    ours, theirs = (pipe(class_labels=["cat", "dog"], **(SAME | call())) for pipe in both)
    assert ours.images.shape == theirs.images.shape and ours.seeds == theirs.seeds
    assert np.abs(ours.images - theirs.images).max() < 1e-3


def test_callback_interrupts_the_call(both):
    seen = []

    def stop(view, index, timestep, tensors):
        seen.append((index, view.num_timesteps, tensors["latents"].shape))
        view._interrupt = index == 1

    both[1]("cat", seeds=0, callback_on_step_end=stop, **SAME)
    assert seen == [(0, 4, (1, 1, 8, 8)), (1, 4, (1, 1, 8, 8))]
    assert not both[1].interrupt


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"seeds": 0, "generator": seeded(0)}, "seeds and generator"),
        ({"generator": seeded(0)}, "list of one for each of 2 images"),
        ({"latents": torch.zeros(2, 1, 4, 4)}, r"tensor \[N, 1, 8, 8\]"),
        ({"latents": torch.zeros(3, 1, 8, 8)}, "3 latents for 2 images"),
        ({"num_images_per_class": True}, "whole number of at least 1"),
        ({"class_labels": [0]}, "same argument"),
        ({"num_images_per_class": 2, "num_images_per_prompt": 2}, "same argument"),
        ({"generator": 5}, "generator"),
        ({"generator": [5, 5]}, "generator"),
        ({"callback_on_step_end": 5}, "callback_on_step_end"),
        ({"sampler": "dpm"}, "sampler must be one of ddpm"),
        ({"spacing": "cosine"}, "spacing must be one of leading"),
    ],
)
def test_contradicting_calls_are_rejected(both, call, message):
    with pytest.raises(ValueError, match=message):
        both[1](["cat", "dog"], **call, **SAME)
