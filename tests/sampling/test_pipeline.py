import itertools
import json

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from safetensors.torch import load_file, save_file

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import SAMPLERS, make_scheduler, model_evals
from diffusion_adagn.errors import InputError
from diffusion_adagn.sampling.guidance import Guidance, apply_cfg

LABELS = LabelSpace(("cat", "dog", "tench, Tinca tinca"))


def pipeline(unet=None, labels=LABELS, clip_x0=True, **diffusion):
    if unet is None:
        unet = tiny_unet()
        # random weights amplify rounding from step to step as trained ones do not; calmer, they keep trained nets' 1e-5
        unet.conv_out.weight.data *= 0.2
    scheduler = make_scheduler(DiffusionConfig(**diffusion), learned_variance=unet.config.learned_variance)
    pipe = ClassConditionalPipeline(unet, scheduler, labels, clip_x0=clip_x0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, classes="all", **kw):
    return pipe(classes, **({"num_inference_steps": 5, "seeds": 0, "output_type": "np"} | kw)).images


def test_output_types_and_shapes():
    pipe = pipeline()
    array = sample(pipe)
    assert array.shape == (3, 8, 8, 1)
    assert array.min() >= 0
    assert array.max() <= 1
    tensor = sample(pipe, output_type="pt")
    assert tensor.shape == (3, 1, 8, 8)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    image = sample(pipe, output_type="pil")[0]
    assert (image.size, image.mode) == ((8, 8), "L")
    assert np.array_equal(np.asarray(image), (array[0, ..., 0] * 255).round().astype("uint8"))
    assert isinstance(pipe("cat", num_inference_steps=2, return_dict=False), tuple)
    with pytest.raises(InputError, match="pil, pt or np"):
        sample(pipe, output_type="jpg")


def test_scale_1_equals_conditional_pass():
    pipe = pipeline()
    calls = []
    real = pipe.unet.denoise
    pipe.unet.denoise = lambda x, m: calls.append(len(x)) or real(x, m)
    out = sample(pipe, guidance_scale=1.0)
    assert calls == [3] * 5

    # a slow reference: modulation from one matrix product for all steps and classes, and the plain forward pass
    scheduler, unet, y = make_scheduler(DiffusionConfig()), pipe.unet, torch.arange(3)
    scheduler.set_timesteps(5)
    x = plain = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    with torch.no_grad():
        said = unet.project_condition(scheduler.timesteps.repeat_interleave(3), y.repeat(5))[0].split(3)
        for t, call, rows in zip(scheduler.timesteps, model_evals(scheduler), said):
            given = pipe._clip(real(x, unet.split_modulation(rows)), x, call, scheduler, pipe.process)
            x = scheduler.step(given, t, x).prev_sample
            given = pipe._clip(unet(plain, t, y).sample, plain, call, scheduler, pipe.process)
            plain = scheduler.step(given, t, plain).prev_sample
    torch.testing.assert_close(x, plain, atol=1e-4, rtol=1e-4)
    assert np.array_equal((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), out)
    calls.clear()
    sample(pipe, guidance_scale=[1.0, 2.0, 1.0])
    assert calls == [6] * 5  # one 2N batch a step


def test_guidance_equals_its_formula():
    cond, null = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    scales = torch.tensor([0.0, 1.0, 2.0, 7.5])
    out = apply_cfg(cond, null, scales)
    assert torch.equal(out[0], null[0])
    assert torch.equal(out[1], cond[1])
    assert torch.allclose(out, null + scales[:, None, None, None] * (cond - null), atol=1e-5)


def test_scale_0_equals_null_class():
    pipe = pipeline()
    assert np.allclose(sample(pipe, "cat", guidance_scale=0.0), sample(pipe, "null"), atol=1e-5)


def test_image_is_independent_of_batch():
    pipe = pipeline()
    together = sample(pipe, ["cat", "dog", "null", 2], seeds=[5, 6, 7, 8], guidance_scale=[1.0, 3.0, 2.0, 4.0])
    for i, (c, s, g) in enumerate([("cat", 5, 1.0), ("dog", 6, 3.0), ("null", 7, 2.0), (2, 8, 4.0)]):
        assert np.allclose(sample(pipe, c, seeds=[s], guidance_scale=g)[0], together[i], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.05


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stochastic_samplers_are_seeded_per_image(sampler):
    pipe = pipeline().use_sampler(sampler)
    both = sample(pipe, ["cat", "dog"], seeds=[5, 6])
    assert np.allclose(sample(pipe, "dog", seeds=[6])[0], both[1], atol=1e-5)


def test_seeds():
    pipe = pipeline()
    assert np.array_equal(sample(pipe, "cat", seeds=[3, 4]), sample(pipe, ["cat", "cat"], seeds=3))
    assert np.array_equal(sample(pipe, "cat", seeds=np.arange(3, 5)), sample(pipe, ["cat", "cat"], seeds=np.int64(3)))
    scales = np.array([1.0, 2.0, 3.0])
    assert np.array_equal(sample(pipe, guidance_scale=scales), sample(pipe, guidance_scale=scales.tolist()))
    out = pipe("cat", num_inference_steps=2, output_type="np")
    assert np.array_equal(sample(pipe, "cat", seeds=out.seeds, num_inference_steps=2), out.images)
    for bad in ([1, 2], [-1, 0, 1]):
        with pytest.raises(InputError, match="seed"):
            sample(pipe, "all", seeds=bad)


@pytest.mark.parametrize(
    ("sampler", "scale", "prediction"), list(itertools.product(SAMPLERS, (1.0, 2.0, 4.0), ("eps", "v", "x0")))
)
def test_samplers_step_with_clipped_x0(sampler, scale, prediction, monkeypatch):
    """Each step receives a prediction whose x0 is within [-1, 1] and consistent with x_t: eps is recomputed."""
    pipe = pipeline(tiny_unet(), prediction=prediction).use_sampler(sampler)
    handed = []
    step = type(pipe.scheduler).step

    def spy(scheduler, output, t, x, **kw):
        # the x0 that the scheduler itself will derive from what it is handed
        x_t = scheduler.scale_model_input(x, t)
        bar = scheduler.alphas_cumprod[int(t)].double() if t == int(t) else None
        a, s = bar.sqrt(), (1 - bar).sqrt()
        x0 = {"eps": (x_t - s * output) / a, "v": a * x_t - s * output, "x0": output}[prediction]
        handed.append(x0.abs().max().item())
        return step(scheduler, output, t, x, **kw)

    monkeypatch.setattr(type(pipe.scheduler), "step", spy)  # each call copies the scheduler
    out = sample(pipe, guidance_scale=scale)
    assert np.isfinite(out).all()
    assert max(handed) <= 1 + 2e-3
    unclipped = pipeline(tiny_unet(), prediction=prediction, clip_x0=False).use_sampler(sampler)
    assert np.abs(sample(unclipped, guidance_scale=scale) - out).max() > 1e-4 or scale == 1.0


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc", "euler"])
def test_zero_snr_samples_are_finite(sampler):
    pipe = pipeline(zero_snr=True, prediction="v").use_sampler(sampler)
    assert np.isfinite(sample(pipe, guidance_scale=2.0, num_inference_steps=10)).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_leaves_learned_variance(sampler):
    unet = tiny_unet(in_channels=4, learned_variance=True)
    pipe = pipeline(unet).use_sampler(sampler)
    cond, null = torch.randn(1, 8, 8, 8), torch.randn(1, 8, 8, 8)
    unet.denoise = lambda x, m: torch.cat([cond, null])[: len(x)]
    pipe.scheduler.set_timesteps(5)
    calls = model_evals(pipe.scheduler)
    predict = pipe._predictor(pipe._plans("cat", None), calls, pipe.process, Guidance(3.0))
    got = predict(torch.zeros(1, 4, 8, 8), calls[0])
    assert torch.allclose(got[:, :4], null[:, :4] + 3 * (cond[:, :4] - null[:, :4]), atol=1e-5)
    assert torch.equal(got[:, 4:], cond[:, 4:])
    pipe.scheduler.scale_model_input(torch.zeros(1, 4, 8, 8), pipe.scheduler.timesteps[0])
    given = pipe._clip(got, torch.zeros(1, 4, 8, 8), calls[0], pipe.scheduler, pipe.process)
    assert given.shape[1] == (8 if sampler == "ddpm" else 4)


def test_one_class_and_class_0_work():
    pipe = pipeline(tiny_unet(num_classes=1), LabelSpace(("only",)))
    assert sample(pipe, 0, guidance_scale=2.0).shape == (1, 8, 8, 1)
    assert np.abs(sample(pipe, 0) - sample(pipe, "null")).max() > 1e-3


def test_an_unconditional_network():
    pipe = pipeline(tiny_unet(num_classes=None), LabelSpace(()))
    assert sample(pipe, "null", seeds=[0, 1]).shape == (2, 8, 8, 1)
    for bad in ("cat", 1, "all"):
        with pytest.raises(InputError, match="unconditional"):
            sample(pipe, bad)
    with pytest.raises(InputError, match="needs a null class"):
        sample(pipe, "null", guidance_scale=2.0)


def test_guidance_needs_a_null_row():
    labels = LabelSpace(("a", "b", "c"), has_null=False)
    pipe = pipeline(tiny_unet(null_class=False), labels)
    assert sample(pipe, guidance_scale=1.0).shape == (3, 8, 8, 1)
    with pytest.raises(InputError, match="init_from"):
        sample(pipe, guidance_scale=2.0)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"classes": "catt"}, "'cat'"),
        ({"guidance_scale": [1.0, 2.0]}, "2 guidance scales"),
        ({"guidance_scale": float("nan")}, "nan"),
        ({"guidance_scale": -1.0}, "at least 0"),
        ({"num_inference_steps": 0}, "1 to 1000"),
        ({"eta": float("nan")}, "eta"),
        ({"eta": -1.0}, "eta"),
        ({"seeds": "123"}, "whole numbers"),
        ({"seeds": [0.5, 1.5, 2.5]}, "whole numbers"),
        ({"seeds": 2**63 - 1}, "whole numbers from 0 to"),
    ],
)
def test_bad_input_is_rejected(kw, message):
    with pytest.raises(InputError, match=message):
        sample(pipeline(), **kw)
    with pytest.raises(InputError, match="eta"):
        sample(pipeline().use_sampler("dpm++"), eta=1.0)


def test_labels_and_network_must_agree():
    with pytest.raises(InputError, match="3 classes, the label space 2"):
        pipeline(labels=LabelSpace(("a", "b")))
    with pytest.raises(InputError, match="has_null"):
        pipeline(labels=LabelSpace(("a", "b", "c"), has_null=False))


def test_save_and_load(tmp_path):
    pipe = pipeline(schedule="sigmoid", prediction="v", zero_snr=True)
    pipe.save_pretrained(tmp_path)
    again = ClassConditionalPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.labels == LABELS
    assert again.scheduler.config.trained_betas == pipe.scheduler.config.trained_betas
    assert torch.equal(again.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    kw = {"guidance_scale": 2.0}
    assert np.array_equal(sample(again, "tench", **kw), sample(pipe, "tench", **kw))
    files = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {".json", ".safetensors"}


def test_wrong_weights_are_rejected(tmp_path):
    pipeline().save_pretrained(tmp_path)
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for change in ({"conv_in.bias": None}, {"stray": torch.zeros(1)}, {"conv_in.bias": torch.zeros(3)}):
        changed = {k: v for k, v in (weights | change).items() if v is not None}
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=next(iter(change)).split(".")[0]):
            ClassConditionalPipeline.from_pretrained(tmp_path)
    file.write_bytes(b"rubbish")
    with pytest.raises(InputError, match="unet"):
        ClassConditionalPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"labels": {"names": ["a"]}, "scheduler": null}', '{"labels": 3, "scheduler": ["", "DDIMScheduler"]}'],
)
def test_corrupted_json_is_named(tmp_path, text):
    pipeline().save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(InputError, match=str(tmp_path)):
        ClassConditionalPipeline.from_pretrained(tmp_path)


def test_corrupted_component_configs_are_named(tmp_path):
    for file in ("scheduler/scheduler_config.json", "unet/config.json"):
        pipeline().save_pretrained(tmp_path)
        (tmp_path / file).write_text("{")
        with pytest.raises(InputError, match=str(tmp_path)):
            ClassConditionalPipeline.from_pretrained(tmp_path)


def test_folders_that_are_no_pipeline(tmp_path):
    with pytest.raises(InputError, match="neither a run"):
        ClassConditionalPipeline.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        ClassConditionalPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="hub"):
        ClassConditionalPipeline.from_pretrained("somebody/no-such-model")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    with pytest.raises(InputError, match="not written by this package"):
        ClassConditionalPipeline.from_pretrained(tmp_path)
