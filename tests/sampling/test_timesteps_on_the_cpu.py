"""The sampling loop reads timesteps on the CPU: on an accelerator each reading would wait for all that is queued."""

import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler, set_timesteps
from diffusion_adagn.sampling import pipeline


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++", "unipc", "euler", "heun"])
def test_timesteps_stay_on_the_cpu(sampler, monkeypatch):
    seen = []

    def watched(scheduler, steps, device="cpu", churn=None):
        seen.append(torch.device(device).type)
        return set_timesteps(scheduler, steps)

    pipe = ClassConditionalPipeline(tiny_unet(), make_scheduler(DiffusionConfig()), LabelSpace(("a", "b", "c")))
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipeline, "set_timesteps", watched)
    monkeypatch.setattr(type(pipe), "_execution_device", property(lambda self: torch.device("meta")))
    with pytest.raises((NotImplementedError, RuntimeError)):  # meta tensors have no values to sample
        pipe(["a"], num_inference_steps=2, seeds=0, sampler=sampler)
    assert seen == ["cpu"]
