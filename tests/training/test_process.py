"""Runs under edm and flow: training, exact resume, sampling, guides, learned uncertainty."""

import dataclasses
import json

import pytest
import torch
from tiny_run import assert_same_run, launch, run

from diffusion_adagn import Churn, ClassConditionalPipeline, InputError, read_config
from diffusion_adagn.cli.main import main
from diffusion_adagn.data import open_dataset
from diffusion_adagn.sampling.settings import SamplerSettings

PROCESSES = {
    "edm": {"diffusion__process": "edm", "diffusion__schedule": "linear"},
    "flow": {"diffusion__process": "flow", "diffusion__schedule": "linear"},
    "learned": {"diffusion__process": "edm", "diffusion__schedule": "linear", "diffusion__loss_weight": "learned"},
}


@pytest.mark.parametrize("name", PROCESSES)
def test_resume_is_exact(tmp_path, name):
    settings = PROCESSES[name] | {"training__diagnostics_every": 3, "training__heldout_every": 3}
    assert run(tmp_path / "whole", training__checkpoint_every=3, **settings) == 0
    assert run(tmp_path / "parts", training__checkpoint_every=3, training__max_steps=3, **settings) == 0
    assert main(["train", "--resume", str(tmp_path / "parts"), "--training.max_steps", "6", "--debug"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    state = json.loads((tmp_path / "whole/checkpoints/step-00000006/state.json").read_text())
    other = json.loads((tmp_path / "parts/checkpoints/step-00000006/state.json").read_text())
    assert state.get("uncertainty") == other.get("uncertainty") and ("uncertainty" in state) == (name == "learned")


@pytest.fixture(scope="module", params=["edm", "flow"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert run(folder, **PROCESSES[request.param]) == 0
    return folder


def test_sigma_data_is_measured(trained):
    config = read_config(trained / "config.yaml")
    if config.diffusion.process == "flow":
        assert config.diffusion.sigma_data is None
        return
    pixels, _ = open_dataset(config.data, "train", progress=False).gather(range(1707))
    assert config.diffusion.sigma_data == pytest.approx((pixels / 127.5 - 1).std(), abs=1e-4)


def test_run_checkpoint_and_pipeline_sample_the_same(trained):
    images = [
        ClassConditionalPipeline.from_pretrained(path)([3, 4], seeds=0, num_inference_steps=4, output_type="pt").images
        for path in (trained, trained / "pipeline", trained / "checkpoints/step-00000006")
    ]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
def test_samplers_agree_at_many_steps(trained, sampler):
    pipe = ClassConditionalPipeline.from_pretrained(trained)
    reference = pipe([1, 2], seeds=0, num_inference_steps=60, guidance_scale=2.0, output_type="pt").images
    images = pipe([1, 2], 2.0, 60, seeds=0, sampler=sampler, spacing="exponential", output_type="pt").images
    assert (images - reference).abs().mean() < 0.03


def test_another_process_is_a_guide(trained, tmp_path):
    pipe = ClassConditionalPipeline.from_pretrained(trained)
    other = tmp_path / "other"
    assert run(other, diffusion__prediction="v") == 0
    guide = ClassConditionalPipeline.from_pretrained(other)
    for first, second in ((pipe, guide), (guide, pipe)):
        settings = {"seeds": 0, "num_inference_steps": 10, "output_type": "pt"}
        unguided = first([1], 1.0, **settings).images
        assert not torch.equal(first([1], 2.0, guide=second, **settings).images, unguided)
        assert torch.allclose(first([1], 1.0, guide=second, **settings).images, unguided)


def test_wrong_samplers_are_rejected(trained):
    pipe = ClassConditionalPipeline.from_pretrained(trained)
    with pytest.raises(InputError, match="is sampled with euler, heun"):
        pipe([1], sampler="ddim", num_inference_steps=2)
    with pytest.raises(InputError, match="the spacing under process"):
        pipe([1], spacing="leading", num_inference_steps=2)
    if pipe.process.name == "edm":
        settings = SamplerSettings(steps=4, churn=Churn(1.0))
        images = [pipe.sample(settings, classes=[1], seeds=seed, output_type="pt").images for seed in (0, 0, 1)]
        assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
        assert not torch.equal(
            images[0],
            pipe.sample(dataclasses.replace(settings, churn=None), classes=[1], seeds=0, output_type="pt").images,
        )
    else:
        with pytest.raises(InputError, match="churn needs process edm"):
            pipe([1], churn=Churn(1.0), num_inference_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_two_processes_train_the_same(tmp_path, name):
    import subprocess

    settings = PROCESSES[name] | {"training__max_steps": 3}
    for count in (1, 2):
        subprocess.run(launch(tmp_path / str(count), processes=count, **settings), check=True, timeout=400)
    from tiny_run import losses

    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert one.keys() == two.keys()
    assert all(one[step] == pytest.approx(two[step], rel=1e-4) for step in one)
