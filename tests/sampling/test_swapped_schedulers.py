"""Schedulers that users swap in by diffusers' `from_config`, which carries over settings that a class does not know."""

import pytest
import torch
from conftest import tiny_unet
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError

CALL = {"num_inference_steps": 10, "output_type": "pt", "seeds": 0}


def make_pipe(**network):
    unet = tiny_unet(**network)
    unet.conv_out.weight.data *= 0.2
    scheduler = make_scheduler(DiffusionConfig(), learned_variance=unet.config.learned_variance)
    pipe = ClassConditionalPipeline(unet, scheduler, LabelSpace(("cat", "dog", "tench")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_karras_flag_ignored_by_ddim(kind):
    pipe = make_pipe()
    plain = kind.from_config(pipe.scheduler.config)
    pipe.scheduler = plain
    expected = pipe("cat", **CALL).images
    karras = DPMSolverMultistepScheduler.from_config(plain.config, use_karras_sigmas=True)
    pipe.scheduler = kind.from_config(karras.config)
    assert torch.equal(pipe("cat", **CALL).images, expected)


def test_only_ddpm_uses_learned_variance():
    pipe = make_pipe(learned_variance=True)
    expected = pipe("cat", sampler="euler", **CALL).images
    pipe.use_sampler("ddpm")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(pipe("cat", **CALL).images, expected)


def test_stochastic_solvers_follow_the_seeds():
    pipe = make_pipe()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    assert torch.equal(pipe("cat", **CALL).images, pipe("cat", **CALL).images)


def test_zero_snr_of_eps_is_rejected():
    pipe = make_pipe()
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    with pytest.raises(InputError, match="divides by zero"):
        pipe("cat", **CALL)


def test_irreproducible_seeds_are_not_listed():
    pipe, generator = make_pipe(), torch.Generator().manual_seed(4)
    call = {k: v for k, v in CALL.items() if k != "seeds"}
    assert pipe(["cat"] * 2, generator=[generator] * 2, **call).seeds == [4, None]
    assert pipe("cat", latents=torch.randn(1, 1, 8, 8), **call).seeds == [None]
