"""The models that are part of the package: found by name, measured, unchanged."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT

from benchmarks.digits_judge import DigitsJudge
from diffusion_adagn import ClassConditionalPipeline
from diffusion_adagn.cli.main import main
from diffusion_adagn.data import open_dataset
from diffusion_adagn.errors import InputError
from diffusion_adagn.runs import shipped
from diffusion_adagn.runs.recorded import default_folder
from diffusion_adagn.sampling.pretrained import WEIGHTS, model_hash

LIMITS = {"digits": 2_000_000, "cifar10": 10_000_000}  # bytes of the weights
FOLDER = ROOT / "diffusion_adagn/pretrained"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pipe():
    pipe = ClassConditionalPipeline.from_pretrained(FOLDER / "digits")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_two_models_are_shipped():
    assert shipped.shipped_models() == ["cifar10", "digits"]


@pytest.mark.parametrize("name", shipped.shipped_models())
def test_files_are_those_that_were_made(name):
    folder = FOLDER / name
    made = json.loads((folder / "made.json").read_text())
    weights = folder / f"pipeline/unet/{WEIGHTS}.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == made["sha256"]
    assert weights.stat().st_size == made["bytes"] < LIMITS[name]
    unet = ClassConditionalPipeline.from_pretrained(name).unet
    assert model_hash(unet) == made["model_hash"]
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert not any(text in (folder / "config.yaml").read_text() for text in ("/tmp", "/home", "/work"))


@pytest.mark.parametrize(("steps", "scale"), [(12, 1.0), (12, 2.0)])
def test_digits_have_class_contrast_and_spread(pipe, steps, scale):
    ids = [c for c in range(10) for _ in range(8)]
    images = pipe(ids, guidance_scale=scale, num_inference_steps=steps, seeds=5000, output_type="np").images
    right, contrast, spread = DigitsJudge()(images, ids)
    assert right >= 0.95
    assert contrast == pytest.approx(1, abs=0.1)
    assert spread >= 0.6


def test_cifar10_has_the_colours_of_each_class(shared):
    """Mean images of the classes, 4x4 pixels without the mean of all classes, correlate with those of real images."""
    data = open_dataset({"source": str(shared / "cifar10_tiny")}, progress=False)
    real, labels = data.gather(range(len(data)))
    ids = [k for k in range(10) for _ in range(4)]
    pipe = ClassConditionalPipeline.from_pretrained("cifar10")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(ids, guidance_scale=2.0, num_inference_steps=6, seeds=5000, output_type="np").images

    def class_means(x, y):
        means = np.stack([x[np.asarray(y) == k].reshape(-1, 4, 8, 4, 8, 3).mean((0, 2, 4)) for k in range(10)])
        return (means - means.mean(0)).ravel()

    real = real / 255
    assert images.std() == pytest.approx(real.std(), rel=0.2)
    assert np.ptp(images, -1).mean() == pytest.approx(np.ptp(real, -1).mean(), rel=0.2)  # saturation
    assert np.corrcoef(class_means(images, ids), class_means(real, labels))[0, 1] > 0.5


def test_existing_path_takes_precedence(tmp_path, pipe):
    assert shipped.model_folder("digits") == FOLDER / "digits"
    assert shipped.model_folder("./digits").name == "digits" and shipped.shipped_folder("./digits") is None
    run = tmp_path / "digits"
    run.mkdir()
    with pytest.raises(InputError, match=r"neither a run.* hides the shipped model digits"):
        ClassConditionalPipeline.from_pretrained("digits")
    run.rmdir()
    shutil.copytree(FOLDER / "digits", run)
    index = json.loads((run / "pipeline/model_index.json").read_text()) | {"trained_steps": 7}
    (run / "pipeline/model_index.json").write_text(json.dumps(index))
    assert ClassConditionalPipeline.from_pretrained("digits").config.trained_steps == 7


def test_default_folders_differ_from_those_of_a_run():
    assert str(default_folder("samples", "digits")) == "samples/pretrained/digits"


def test_other_names_say_what_is_shipped(capsys):
    assert main(["sample", "digit"]) == 1
    text = capsys.readouterr().err
    assert "cifar10 and digits are shipped with the package" in text and "Did you mean digits?" in text
    assert main(["sample", "CIFAR-10"]) == 1
    assert "Did you mean cifar10?" in capsys.readouterr().err
    assert main(["sample", "runs/digit"]) == 1
    assert "Did you mean" not in capsys.readouterr().err
    with pytest.raises(InputError, match="EMA weights of its run only"):
        ClassConditionalPipeline.from_pretrained("digits", ema="raw")


def test_commands_take_the_name(tmp_path):
    assert main(["ema", "digits"]) == 1
    assert main(["sample", "digits", "--classes", "3", "--count", "2", "--steps", "2"]) == 0
    assert (tmp_path / "samples/pretrained/digits/grid.png").is_file()


@pytest.mark.slow
def test_more_commands_take_the_name(tmp_path):
    few = ["--steps", "2", "--count", "20", "--extractor", "sklearn"]
    assert main(["evaluate", "digits", *few]) == 0
    assert main(["sweep", "digits", "--guidance", "1,2", *few]) == 0
    assert main(["trace", "digits", "--timesteps", "3", "--images", "4"]) == 0
    assert main(["trace", "digits", "--label_check"]) == 0
    assert main(["export", "digits", "exported"]) == 0
    assert (tmp_path / "evaluations/pretrained/digits").is_dir() and (tmp_path / "sweeps/pretrained/digits").is_dir()
