"""Runs under edm and flow: training, exact resume, sampling, guides, learned uncertainty."""

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import types

import numpy as np
import pytest
import torch
from tiny_run import assert_same_run, launch, losses, run

from diffusion_adagn import Churn, ClassConditionalPipeline, InputError, read_config
from diffusion_adagn.cli.main import main
from diffusion_adagn.data import open_dataset
from diffusion_adagn.diffusion.process import edm
from diffusion_adagn.models.conditioning import CONDITIONING
from diffusion_adagn.sampling.settings import SamplerSettings
from diffusion_adagn.training.noise_report import loss_by_level, suggest_noise
from diffusion_adagn.training.setup import measure_sigma_data

PROCESSES = {
    "edm": {"diffusion__process": "edm", "diffusion__schedule": "linear"},
    "flow": {"diffusion__process": "flow", "diffusion__schedule": "linear"},
    "edm, learned": {"diffusion__process": "edm", "diffusion__schedule": "linear", "diffusion__loss_weight": "learned"},
    "flow, learned": {
        "diffusion__process": "flow",
        "diffusion__schedule": "linear",
        "diffusion__loss_weight": "learned",
    },
    "ddpm, learned": {"diffusion__loss_weight": "learned"},
}


@pytest.mark.parametrize(
    "name", [name if name == "edm, learned" else pytest.param(name, marks=pytest.mark.slow) for name in PROCESSES]
)
def test_resume_is_exact(tmp_path, name):
    settings = PROCESSES[name] | {"training__diagnostics_every": 3}
    assert run(tmp_path / "whole", training__checkpoint_every=3, **settings) == 0
    assert run(tmp_path / "parts", training__checkpoint_every=3, training__max_steps=3, **settings) == 0
    assert main(["train", "--resume", str(tmp_path / "parts"), "--training.max_steps", "6", "--debug"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    state = json.loads((tmp_path / "whole/checkpoints/step-00000006/state.json").read_text())
    other = json.loads((tmp_path / "parts/checkpoints/step-00000006/state.json").read_text())
    assert state.get("uncertainty") == other.get("uncertainty") and ("uncertainty" in state) == ("learned" in name)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run under ddpm."""
    folder = tmp_path_factory.mktemp("ddpm") / "run"
    assert run(folder, diffusion__prediction="v", training__max_steps=3) == 0
    return folder


@pytest.fixture(scope="module", params=["edm", "flow"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert run(folder, training__heldout_every=6, **PROCESSES[request.param]) == 0
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


def test_samplers_agree_at_many_steps(trained):
    pipe = ClassConditionalPipeline.from_pretrained(trained)
    images = [
        pipe([1, 2], 2.0, 20, seeds=0, sampler=sampler, spacing=spacing, output_type="pt").images
        for sampler, spacing in (
            ("heun", "karras"),
            ("euler", "exponential"),
            ("dpm++", "exponential"),
            ("unipc", "karras"),
        )
    ]
    assert all((other - images[0]).abs().mean() < 0.05 for other in images[1:])
    assert images[0].std() > 0.1


def test_noise_is_suggested(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "suggested_noise_mean" in line]
    assert [line["step"] for line in found] == [6]
    assert -8 < found[0]["suggested_noise_mean"] < 5 and 0 < found[0]["suggested_noise_std"] < 5


def test_suggestion_weighs_what_can_be_learned():
    log = np.linspace(-6, 4, 101)
    assert suggest_noise(1 - np.exp(-((log + 1) ** 2) / 2), log) == pytest.approx((-1, 1), abs=1e-3)
    assert all(np.isnan(suggest_noise(np.ones(101), log)))


def test_loss_by_level_of_no_network():
    """Without a network F is 0, and the loss is the variance of EDM's target: that of the noise at the image, and of the
    images divided by sigma_data at the noise."""

    class Zero(types.SimpleNamespace):
        def __call__(self, x, t, y):
            return types.SimpleNamespace(sample=torch.zeros_like(x))

    images = open_dataset(read_config("digits").data, "heldout", progress=False)
    data = measure_sigma_data(images)
    net = Zero(device=torch.device("cpu"), config=types.SimpleNamespace(num_classes=None))
    loss, log_sigma = loss_by_level(net, images, edm(data), data, contextlib.nullcontext, 32)
    assert loss[0] == pytest.approx(1, abs=0.05)
    pixels = images.gather(np.arange(64) * len(images) // 64)[0] / 127.5 - 1
    assert loss[-1] == pytest.approx((pixels**2).mean() / data**2, rel=0.02) and len(loss) == len(log_sigma)


def test_another_process_is_a_guide(trained, other):
    pipe = ClassConditionalPipeline.from_pretrained(trained)
    guide = ClassConditionalPipeline.from_pretrained(other)
    for first, second in ((pipe, guide), (guide, pipe)):
        settings = {"seeds": 0, "num_inference_steps": 4, "output_type": "pt"}
        unguided = first([1], 1.0, **settings).images
        assert not torch.equal(first([1], 2.0, guide=second, **settings).images, unguided)
        assert torch.allclose(first([1], 1.0, guide=second, **settings).images, unguided)


def test_resume_names_the_setting_that_changed(trained):
    with pytest.raises(InputError, match=r"(?s)was started with other settings.*diffusion\.noise_std: none -> 2\.0"):
        main(["train", "--resume", str(trained), "--diffusion.noise_std", "2", "--debug"])


def test_sampling_rejects_an_edited_process(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run/config.yaml"
    here, other = ("edm", "flow") if read_config(file).diffusion.process == "edm" else ("flow", "edm")
    text = re.sub(r"sigma_data: .*", "sigma_data: " + ("null" if here == "edm" else "0.5"), file.read_text())
    file.write_text(text.replace(f"process: {here}", f"process: {other}"))
    with pytest.raises(InputError, match=f"was edited after step-00000006.*diffusion.process: {here} -> {other}"):
        ClassConditionalPipeline.from_pretrained(tmp_path / "run", ema="raw")


def test_wrong_samplers_are_rejected(trained):
    pipe = ClassConditionalPipeline.from_pretrained(trained)
    with pytest.raises(InputError, match="is sampled with euler, heun"):
        pipe([1], sampler="ddim", num_inference_steps=2)
    with pytest.raises(InputError, match="the spacing under process"):
        pipe([1], spacing="leading", num_inference_steps=2)
    if pipe.process.name == "edm":
        settings = SamplerSettings(sampler="heun", steps=4, churn=Churn(1.0))
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
@pytest.mark.parametrize("kind", CONDITIONING)
@pytest.mark.parametrize("name", ["edm", "flow"])
def test_every_conditioning_under_every_process(tmp_path, name, kind):
    """Training in one process and in two, exact resume, samples, trace and label check."""
    settings = PROCESSES[name] | {"model__conditioning": kind, "training__checkpoint_every": 2}
    assert run(tmp_path / "whole", training__max_steps=4, **settings) == 0
    assert run(tmp_path / "parts", training__max_steps=2, **settings) == 0
    assert main(["train", "--resume", str(tmp_path / "parts"), "--training.max_steps", "4", "--debug"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    subprocess.run(launch(tmp_path / "2", processes=2, training__max_steps=4, **settings), check=True, timeout=400)
    assert list(losses(tmp_path / "2").values()) == pytest.approx(list(losses(tmp_path / "whole").values()), rel=1e-4)
    whole = str(tmp_path / "whole")
    scale = "1" if kind == "none" else "2"
    assert (
        main(
            ["sample", whole, "--steps", "3", "--classes", "3", "--guidance", scale, "--out", str(tmp_path / "images")]
        )
        == 0
    )
    few = ["--timesteps", "4", "--images", "4", "--out", str(tmp_path / "trace")]
    assert main(["trace", whole, *few]) == 0
    assert (tmp_path / "trace/report.html").is_file()
    # whether four steps suffice to learn the label depends on the kind; without conditioning nothing can
    assert main(["trace", whole, "--label_check"]) in ([3] if kind == "none" else [0, 3])


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_two_processes_train_the_same(tmp_path, name):
    settings = PROCESSES[name] | {"training__max_steps": 3}
    for count in (1, 2):
        subprocess.run(launch(tmp_path / str(count), processes=count, **settings), check=True, timeout=400)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert one.keys() == two.keys()
    assert all(one[step] == pytest.approx(two[step], rel=1e-4) for step in one)
