"""Calls of one pipeline from several threads: each has its own scheduler, sampler and callback."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import ClassConditionalPipeline, Guidance, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler, with_sampler
from diffusion_adagn.errors import InputError

SETTINGS = [  # twelve calls that differ in sampler, steps, spacing, guidance and number of images
    {"sampler": "ddim", "num_inference_steps": 5},
    {"sampler": "ddim", "num_inference_steps": 8, "guidance_scale": 2.0},
    {"sampler": "ddim", "num_inference_steps": 10, "eta": 1.0},
    {"sampler": "ddpm", "num_inference_steps": 6, "guidance_scale": 3.0},
    {"sampler": "ddpm", "num_inference_steps": 9},
    {"sampler": "dpm++", "num_inference_steps": 5, "spacing": "trailing"},
    {"sampler": "dpm++", "num_inference_steps": 7, "guidance_scale": [1.0, 2.0, 4.0]},
    {"sampler": "unipc", "num_inference_steps": 6},
    {"sampler": "unipc", "num_inference_steps": 8, "guidance": Guidance(2.0, interval="0.2-0.8")},
    {"sampler": "euler", "num_inference_steps": 6, "spacing": "linspace"},
    {"sampler": "heun", "num_inference_steps": 5, "guidance_scale": 2.0},
    {"num_inference_steps": 4, "guidance": Guidance(2.0, rescale=0.5)},
]


@pytest.fixture(scope="module")
def pipe():
    unet = tiny_unet()
    unet.conv_out.weight.data *= 0.2
    pipe = ClassConditionalPipeline(unet, make_scheduler(DiffusionConfig()), LabelSpace(("cat", "dog", "tench")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, seeds=0, **settings):
    return pipe("all", seeds=seeds, output_type="np", **settings).images


@pytest.mark.parametrize("repeats", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_concurrent_calls_equal_serial_calls(pipe, repeats):
    serial = [sample(pipe, seeds=i, **settings) for i, settings in enumerate(SETTINGS)]
    assert len({image.tobytes() for image in serial}) == len(SETTINGS)  # every setting matters
    for _ in range(repeats):
        barrier = threading.Barrier(len(SETTINGS))

        def call(numbered, barrier=barrier):
            barrier.wait(60)
            return sample(pipe, seeds=numbered[0], **numbered[1])

        with ThreadPoolExecutor(len(SETTINGS)) as threads:
            for one, other in zip(serial, threads.map(call, enumerate(SETTINGS))):
                assert np.array_equal(one, other)


def test_waiting_callbacks_do_not_deadlock(pipe):
    barrier, reached = threading.Barrier(2), []

    def wait(pipe, index, timestep, tensors):
        barrier.wait(60)  # broken, and so an error, if the other call cannot go on meanwhile
        reached.append(index)

    def call(sampler):
        return sample(pipe, sampler=sampler, num_inference_steps=3, callback_on_step_end=wait)

    with ThreadPoolExecutor(2) as threads:
        images = list(threads.map(call, ["ddim", "euler"]))
    assert sorted(reached) == [0, 0, 1, 1, 2, 2]
    for image, sampler in zip(images, ["ddim", "euler"]):
        assert np.array_equal(image, sample(pipe, sampler=sampler, num_inference_steps=3))


def test_call_leaves_shared_scheduler_unchanged(pipe):
    before = dict(pipe.scheduler.__dict__)
    sample(pipe, sampler="heun", spacing="leading", num_inference_steps=4)
    sample(pipe, num_inference_steps=4)
    assert pipe.scheduler.__dict__.keys() == before.keys()
    assert all(pipe.scheduler.__dict__[name] is value for name, value in before.items())


@pytest.mark.parametrize("sampler, spacing", [("dpm++", None), ("unipc", "trailing"), (None, "trailing")])
def test_call_sampler_equals_use_sampler(pipe, sampler, spacing):
    of_call = sample(pipe, sampler=sampler, spacing=spacing, num_inference_steps=5)
    other = ClassConditionalPipeline(pipe.unet, with_sampler(pipe.scheduler, sampler, spacing), pipe.labels)
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(sample(other, num_inference_steps=5), of_call)
    assert np.array_equal(
        sample(other.use_sampler("ddim", "leading"), num_inference_steps=5), sample(pipe, num_inference_steps=5)
    )


def test_call_rejects_unknown_sampler(pipe):
    with pytest.raises(InputError, match="there is no sampler 'dpm'"):
        sample(pipe, sampler="dpm")
    with pytest.raises(InputError, match="timestep spacing under process ddpm is one of leading, trailing, linspace"):
        sample(pipe, spacing="karass")
    with pytest.raises(InputError, match="and 0 for others, not 0\\.5 for euler"):
        sample(pipe, sampler="euler", eta=0.5)


@pytest.mark.parametrize("sampler, calls", [("ddim", 4), ("heun", 7)])
def test_step_callback_receives_every_step(pipe, sampler, calls):
    seen = []

    def look(of, index, timestep, tensors):
        assert of.unet is pipe.unet and set(tensors) == {"latents"} and tensors["latents"].shape == (3, 1, 8, 8)
        seen.append((index, float(timestep)))
        return tensors

    images = sample(pipe, sampler=sampler, num_inference_steps=4, callback_on_step_end=look)
    assert [index for index, _ in seen] == list(range(calls))
    times = [t for _, t in seen]
    assert times == sorted(times, reverse=True) and times[0] == 750
    assert np.array_equal(images, sample(pipe, sampler=sampler, num_inference_steps=4))


def test_step_callback_may_replace_latents(pipe):
    def erase(of, index, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], 0.5)} if index == 3 else {}

    images = sample(pipe, num_inference_steps=4, callback_on_step_end=erase)
    assert (images == 0.75).all()


def test_callback_tensor_inputs_are_checked(pipe):
    keys = []
    sample(
        pipe,
        num_inference_steps=2,
        callback_on_step_end=lambda of, index, timestep, tensors: keys.append(set(tensors)),
        callback_on_step_end_tensor_inputs=(),
    )
    assert keys == [set(), set()]
    with pytest.raises(InputError, match="may receive 'latents' alone, not prompt_embeds"):
        sample(pipe, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


@pytest.mark.parametrize("result", [{"latents": torch.zeros(7, 1, 8, 8)}, {"latents": 3}, 3])
def test_step_callback_result_is_checked(pipe, result):
    with pytest.raises(InputError, match=r"returns None or a dict with latents \[3, 1, 8, 8\]"):
        sample(pipe, callback_on_step_end=lambda *_: result)


def test_step_callback_must_be_callable(pipe):
    with pytest.raises(InputError, match="5 cannot be called"):
        sample(pipe, callback_on_step_end=5)


def test_pipeline_callback_names_its_tensors(pipe):
    from diffusers.callbacks import PipelineCallback

    class Look(PipelineCallback):
        tensor_inputs = ("prompt_embeds",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return callback_kwargs

    with pytest.raises(InputError, match="may receive 'latents' alone, not prompt_embeds"):
        sample(pipe, callback_on_step_end=Look(cutoff_step_ratio=0.5))


def test_exported_concurrent_calls_equal_serial():
    """The pipeline of exported folders, which shares no code with ours."""
    from diffusers import DPMSolverMultistepScheduler, UNet2DModel

    from diffusion_adagn.interop.adagn_label_pipeline import LabelPipeline

    torch.manual_seed(0)
    unet = UNet2DModel(
        8, 1, 1, block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=4, num_class_embeds=4,
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    pipe = LabelPipeline(unet, scheduler, {"0": "cat", "1": "dog", "2": "tench"}, null_id=3)
    pipe.set_progress_bar_config(disable=True)

    def call(steps):
        return pipe(None, guidance_scale=2.0, num_inference_steps=steps, seeds=0, output_type="np").images

    counts = [4, 5, 6, 7, 8, 9] * 2
    serial = [call(steps) for steps in counts]
    with ThreadPoolExecutor(len(counts)) as threads:
        for one, other in zip(serial, threads.map(call, counts)):
            assert np.array_equal(one, other)
