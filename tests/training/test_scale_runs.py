"""Runs of networks that read the guidance scale: teacher, exact resume, processes, and what uses the result."""

import json
import shutil

import pytest
import torch
from processes import ranks
from tiny_run import arguments, assert_same_run, losses, run, weights

from diffusion_adagn import AdaGNUNet, ClassConditionalPipeline, InputError, read_config
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.runs.layout import network_config
from diffusion_adagn.training.transfer import transfer

READS = {"model__max_guidance_scale": 4, "training__diagnostics_every": 3}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run that does not read the scale."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert run(folder, training__diagnostics_every=0) == 0
    return folder


@pytest.fixture(scope="module")
def taught(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught") / "run"
    assert run(folder, init_from=plain, training__checkpoint_every=3, training__heldout_every=6, **READS) == 0
    return folder


def test_teacher_is_the_run_of_init_from(plain, taught, capsys):
    assert read_config(taught / "config.yaml").teacher == str(plain)
    first = json.loads((taught / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < 0.05 < losses(plain)[1]  # it starts as its teacher, unguided
    state = json.loads((taught / "checkpoints/step-00000006/state.json").read_text())
    assert len(state["teacher"]) == 16
    assert weights(taught)["embedding.scale.weight"].any() and weights(taught, "ema")["embedding.scale.weight"].any()
    assert "0.05/embedding.scale.weight" in weights(taught, "power_ema")


@pytest.mark.parametrize(
    "process", ["ddpm", pytest.param("edm", marks=pytest.mark.slow), pytest.param("flow", marks=pytest.mark.slow)]
)
def test_resume_is_exact(tmp_path, plain, taught, process):
    changes = {"training__checkpoint_every": 3, "training__heldout_every": 6, "training__max_steps": 3, **READS}
    if process == "ddpm":
        whole, changes = taught, changes | {"init_from": plain}
    else:
        whole, changes = tmp_path / "whole", changes | {"diffusion__process": process, "diffusion__schedule": "linear"}
        assert run(whole, **changes | {"training__max_steps": 6}) == 0
    assert run(tmp_path / "parts", **changes) == 0
    assert main(["train", "--resume", str(tmp_path / "parts"), "--training.max_steps", "6", "--debug"]) == 0
    assert_same_run(whole, tmp_path / "parts")


@pytest.mark.slow
def test_learned_variance_augmentation_and_accumulation_train(tmp_path):
    changes = READS | {"diffusion__learned_variance": "true", "data__augment": 0.5, "model__dropout": 0.2}
    assert run(tmp_path / "whole", **changes) == 0
    assert run(tmp_path / "taught", init_from=tmp_path / "whole", training__gradient_accumulation=2, **changes) == 0
    assert all(torch.isfinite(p).all() for p in weights(tmp_path / "taught").values())


def test_passes_of_a_batch_are_the_batch(tmp_path, plain):
    changes = READS | {"init_from": plain, "training__max_steps": 2, "training__diagnostics_every": 0}
    for parts in (1, 2):
        assert run(tmp_path / str(parts), training__gradient_accumulation=parts, **changes) == 0
    whole, parts = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert whole == pytest.approx(parts, rel=1e-4)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, plain):
    changes = READS | {"init_from": plain, "training__max_steps": 3}
    assert run(tmp_path / "1", **changes) == 0
    ranks(2, arguments(tmp_path / "2", **changes), tmp_path)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-3)
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert all(torch.allclose(one[name], two[name], atol=2e-3) for name in one)


def test_resume_needs_the_same_teacher(tmp_path, plain):
    teacher = tmp_path / "teacher"
    shutil.copytree(plain / "pipeline", teacher)
    changes = READS | {"init_from": plain, "training__teacher": teacher, "training__max_steps": 1}
    assert run(tmp_path / "run", **changes) == 0
    ClassConditionalPipeline.from_pretrained(plain, ema="raw").save_pretrained(teacher)
    with pytest.raises(InputError, match=r"the teacher .* is not the one that .*its weights have changed"):
        main(["train", "--resume", str(tmp_path / "run"), "--training.max_steps", "2", "--debug"])
    shutil.rmtree(teacher)
    with pytest.raises(InputError, match=r"training.teacher: there is no folder"):
        main(["train", "--resume", str(tmp_path / "run"), "--training.max_steps", "2", "--debug"])


def test_plain_run_starts_from_it_at_scale_1(tmp_path, taught):
    unet = AdaGNUNet(**network_config(read_config(taught / "config.yaml", {"model.max_guidance_scale": "none"})))
    pipe = ClassConditionalPipeline.from_pretrained(taught)
    pipe.unet.embedding.scale.weight.data.normal_()
    pipe.save_pretrained(tmp_path / "pipeline")
    transfer(str(tmp_path / "pipeline"), unet, pipe.labels, DiffusionConfig())
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([10.0, 500.0]), torch.tensor([3, 10])
    torch.testing.assert_close(unet.eval()(x, t, y).sample, pipe.unet(x, t, y).sample, atol=1e-4, rtol=1e-4)


def test_wrong_preview_is_rejected_before_the_first_step(tmp_path):
    with pytest.raises(InputError, match=r"training.preview_guidance: this network reads the guidance scale"):
        run(tmp_path / "run", training__preview_every=1, training__preview_guidance=6, **READS)
    assert not (tmp_path / "run").exists()


def test_dry_run_measures_the_null_pass(tmp_path, plain, capsys):
    assert run(tmp_path / "run", "--dry_run", init_from=plain, **READS) == 0
    printed = capsys.readouterr().out
    assert f"teacher {plain} (cfg)" in " ".join(printed.split()) and not (tmp_path / "run").exists()


WORDS = ["--steps", "3", "--guidance", "1,2,4", "--debug"]


def test_samples_take_one_pass(tmp_path, taught):
    out = tmp_path / "images"
    assert main(["sample", str(taught), "--count", "1", "--classes", "3", "--out", str(out), *WORDS]) == 0
    images = json.loads((out / "samples.json").read_text())["images"]
    assert [image["network_calls"] for image in images] == [3, 3, 3]
    with pytest.raises(InputError, match="the rule tcfg works on two predictions"):
        main(["sample", str(taught), "--rule", "tcfg", "--out", str(tmp_path / "no"), *WORDS])
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_points_of_a_sweep_take_one_pass(tmp_path, taught):
    folder = tmp_path / "sweep"
    assert main(["sweep", str(taught), "--count", "10", "--extractor", "none", "--out", str(folder), *WORDS]) == 0
    rows = json.loads((folder / "sweep.json").read_text())["rows"]
    assert [(row["scale"], row["nfe"]) for row in rows] == [(1, 3), (2, 3), (4, 3)]
    assert all(row["diagnostics"]["difference"] is None for row in rows)  # no second prediction to compare with
    with pytest.raises(InputError, match="the rule tcfg works on two predictions"):
        main(["sweep", str(taught), "--rule", "tcfg", "--count", "10", "--out", str(tmp_path / "no"), *WORDS])
