"""What users of diffusers type: generator, latents, num_images_per_prompt, callbacks that interrupt, compiled networks."""

import copy
import threading

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from conftest import tiny_unet
from PIL import Image
from torch._dynamo.utils import counters

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError

STEPS = {"num_inference_steps": 4, "output_type": "pt"}
SHAPE = (1, 8, 8)


def make_pipe(unet=None):
    if unet is None:
        unet = tiny_unet()
        unet.conv_out.weight.data *= 0.2
    pipe = ClassConditionalPipeline(unet, make_scheduler(DiffusionConfig()), LabelSpace(("cat", "dog", "tench")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(*seeds):
    return torch.stack([torch.randn(SHAPE, generator=seeded(s)) for s in seeds])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_generators_equal_their_seeds(pipe, sampler):
    by_seed = pipe(["cat", "dog"], seeds=[7, 3], sampler=sampler, **STEPS)
    by_generator = pipe(["cat", "dog"], generator=[seeded(7), seeded(3)], sampler=sampler, **STEPS)
    assert torch.equal(by_seed.images, by_generator.images)
    assert by_generator.seeds == [7, 3]


def test_one_generator_seeds_every_image(pipe):
    generator = seeded(0)
    first, second = (pipe("all", generator=generator, **STEPS) for _ in range(2))
    assert len(set(first.seeds + second.seeds)) == 6
    assert first.seeds == pipe("all", generator=seeded(0), **STEPS).seeds
    assert torch.equal(first.images, pipe("all", seeds=first.seeds, **STEPS).images)


def test_used_generator_has_no_seed(pipe):
    generator = seeded(5)
    torch.randn(1, generator=generator)
    assert pipe("cat", generator=[generator], **STEPS).seeds == [None]


def test_latents_are_the_initial_noise(pipe):
    expected = pipe(["cat", "dog"], seeds=[7, 3], **STEPS).images
    assert torch.equal(expected, pipe(["cat", "dog"], latents=noise(7, 3), **STEPS).images)
    assert torch.equal(expected[:1], pipe("cat", latents=noise(7, 3), **STEPS).images[:1])  # one class, two latents
    one, other = (pipe("cat", latents=noise(7), seeds=s, sampler="ddpm", **STEPS).images for s in (0, 1))
    assert not torch.equal(one, other)  # the seed decides what ddpm adds


def test_images_per_class_are_consecutive(pipe):
    expected = pipe(["cat", "cat", "dog", "dog"], seeds=0, **STEPS)
    for name in ("num_images_per_class", "num_images_per_prompt"):
        made = pipe(["cat", "dog"], seeds=0, **{name: 2}, **STEPS)
        assert torch.equal(made.images, expected.images)
        assert made.class_names == ["cat", "cat", "dog", "dog"]


def test_class_labels_is_an_alias(pipe):
    expected = pipe([0, 2], seeds=0, num_inference_steps=4, output_type="np").images
    made = pipe(class_labels=torch.tensor([0, 2]), seeds=0, num_inference_steps=4, output_type="numpy").images
    assert np.array_equal(made, expected)


def test_callback_interrupts_its_own_call(pipe):
    steps = []

    def stop_at_1(view, index, timestep, tensors):
        steps.append((index, view.num_timesteps, view.interrupt))
        view._interrupt = index == 1
        return tensors

    stopped = pipe("cat", seeds=0, callback_on_step_end=stop_at_1, **STEPS).images
    assert steps == [(0, 4, False), (1, 4, False)]
    assert not pipe.interrupt
    whole = pipe("cat", seeds=0, **STEPS).images
    assert not torch.equal(stopped, whole)

    both = threading.Barrier(2)  # the other call runs on while this one ends
    other = {}

    def wait(view, index, timestep, tensors):
        if index == 0:
            both.wait(60)
        view._interrupt = stopper is threading.current_thread() and index == 1
        return {}

    def call(name):
        other[name] = pipe("cat", seeds=0, callback_on_step_end=wait, **STEPS).images

    stopper, runner = (threading.Thread(target=call, args=(name,)) for name in ("stopped", "whole"))
    for thread in (stopper, runner):
        thread.start()
    for thread in (stopper, runner):
        thread.join(60)
    assert torch.equal(other["whole"], whole) and torch.equal(other["stopped"], stopped)


def test_pipeline_interrupt_ends_the_call(pipe):
    def stop(view, index, timestep, tensors):
        pipe._interrupt = True  # a closure over the pipeline, as a stop button has
        seen.append(index)

    seen = []
    pipe("cat", seeds=0, callback_on_step_end=stop, **STEPS)
    assert seen == [0]
    whole = pipe("cat", seeds=0, **STEPS).images  # the next call starts afresh
    assert torch.equal(whole, pipe("cat", seeds=0, **STEPS).images)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"generator": seeded(0), "seeds": 0}, "seeds and generator were given"),
        ({"generator": [seeded(0)]}, "1 generators for 2 images"),
        ({"generator": 5}, "generator is a torch.Generator"),
        ({"latents": noise(0)}, "1 latents for 2 images"),
        ({"latents": noise(0, 1)[..., :4]}, r"float tensor \[N, 1, 8, 8\], not \[2, 1, 8, 4\]"),
        ({"latents": noise(0, 1) * float("nan")}, "with NaN or infinity"),
        ({"latents": torch.zeros(2, *SHAPE, dtype=torch.long)}, r"float tensor .*torch.int64"),
        ({"num_images_per_class": 0}, "whole number of at least 1, not 0"),
        ({"class_labels": [0, 1]}, "classes and class_labels are the same"),
        ({"num_images_per_class": 2, "num_images_per_prompt": 2}, "give one of them"),
    ],
)
def test_calls_that_contradict_are_rejected(pipe, call, message):
    with pytest.raises(InputError, match=message):
        pipe(["cat", "dog"], **call, **STEPS)


def test_outputs_show_themselves(pipe):
    for output_type in ("pil", "pt", "np"):
        made = pipe("all", seeds=3, num_inference_steps=2, output_type=output_type, num_images_per_class=4)
        assert made._repr_png_().startswith(b"\x89PNG")
        sheet = made.grid(columns=4)
        assert isinstance(sheet, Image.Image) and sheet.height > 3 * 96 > sheet.width // 2
    assert np.asarray(made.grid(4)).std() > np.asarray(pipe("cat", seeds=0, num_inference_steps=2).grid()).std() * 0.5


@pytest.mark.parametrize("how", [pytest.param("torch.compile", marks=pytest.mark.slow), "unet.compile"])
def test_compiled_network_compiles_the_call(how):
    torch._dynamo.reset()
    counters.clear()
    plain = make_pipe(unet := tiny_unet(channel_mult=(1,), attention_resolutions=()))
    expected = plain(["cat", "dog"], seeds=0, **STEPS).images
    pipe = make_pipe(copy.deepcopy(unet))
    if how == "torch.compile":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
    for _ in range(2):
        assert torch.equal(pipe(["cat", "dog"], seeds=0, **STEPS).images, expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    # a copy, as the EMA makes one, computes with its own weights
    other = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        other.conv_out.bias += 1.0
    assert not torch.equal(make_pipe(other)(["cat", "dog"], seeds=0, **STEPS).images, expected)


def test_compiled_pipelines_save(tmp_path):
    pipe = make_pipe()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    pipe.save_pretrained(tmp_path / "saved")
    again = ClassConditionalPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert again.unet.dtype == torch.float64


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_dtype_must_be_a_dtype(name, tmp_path):
    make_pipe().save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match=r"floating type such as torch.bfloat16, not .*float16"):
        ClassConditionalPipeline.from_pretrained(tmp_path / "saved", **{name: "float16"})


@pytest.mark.parametrize("kwargs", [{"variant": "fp16"}, {"safe_serialization": False}])
def test_unloadable_variants_are_not_saved(kwargs, tmp_path):
    with pytest.raises(InputError, match="leave variant and safe_serialization out"):
        make_pipe().save_pretrained(tmp_path / "saved", **kwargs)
    assert not (tmp_path / "saved").exists()


def test_offloaded_network_moves_for_calls(monkeypatch):
    """accelerate's hook moves the network before `forward`, which a call does not run; "moves" are counted here."""
    pipe = make_pipe()
    expected = pipe("cat", seeds=0, **STEPS).images
    _, hook = cpu_offload_with_hook(pipe.unet, execution_device="cpu")
    moves = []
    monkeypatch.setattr(hook.hook, "pre_forward", lambda module, *a, **k: moves.append(module) or (a, k))
    pipe._all_hooks = [hook]
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: moves.append("freed"))
    assert torch.equal(pipe("cat", seeds=0, **STEPS).images, expected)
    assert moves == [pipe.unet, "freed"]
    assert pipe.model_cpu_offload_seq == "unet"


def test_sequential_offload_suggests_model_offload(pipe):
    with pytest.raises(InputError, match="use enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()


def test_labels_are_made_once(pipe):
    assert pipe.labels is pipe.labels
    other = copy.copy(pipe)
    other.register_to_config(labels=LabelSpace(("a", "b", "c")).to_dict())
    assert other.labels.names == ("a", "b", "c") and pipe.labels.names == ("cat", "dog", "tench")


def test_dtype_change_warns_of_nothing(caplog):
    import logging

    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        make_pipe().to(torch.bfloat16)
        tiny_unet().to(torch.float64)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.records
