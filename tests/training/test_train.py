"""Whole runs, small: resume, stop, several processes, fine-tuning, refusals."""

import json
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import one_line
from processes import MAIN, Process, ranks
from tiny_run import TINY, arguments, assert_same_run, environment, launch, losses, run, signals, weights, words

from diffusion_adagn import ClassConditionalPipeline
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import read_config
from diffusion_adagn.errors import InputError
from diffusion_adagn.models.conditioning import CONDITIONING
from diffusion_adagn.runtime import speed
from diffusion_adagn.sampling.load import open_pipeline

VARIANTS = {
    "fp32": {},
    "bf16, two passes, dropout, flips, decay": {
        "speed__precision": "bf16", "training__gradient_accumulation": 2, "model__dropout": 0.2, "data__flip": "true",
        "training__warmup_steps": 2,
    },
    "gated kind, concatenation, learned variance": {
        "model__conditioning": "adagn_zero", "model__join": "concat", "diffusion__learned_variance": "true",
    },
    "cross-attention, both norms": {"model__conditioning": "cross_attention", "model__modulate_both_norms": "true"},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of 6 steps. A test that changes it copies it."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert run(folder) == 0
    return folder


@pytest.mark.slow
def test_resume_keeps_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "COMPILER", "eager")
    one_level = {"model__channel_mult": 1, "model__attention_resolutions": 8}  # few blocks to compile
    run(tmp_path / "run", training__max_steps=2, speed__compile="true", **one_level)
    assert read_config(tmp_path / "run/config.yaml").speed.precision == "fp32"  # what auto meant
    monkeypatch.setattr(speed, "has_bf16", lambda device: True)  # another machine, where auto means bf16
    monkeypatch.setattr(speed, "MIN_FLOPS_FOR_BF16", 0)
    more = one_level | {"speed__operator": "eager", "speed__memory_format": "contiguous", "training__max_steps": 4}
    assert run(tmp_path / "run", "--resume", "auto", **more) == 0
    assert read_config(tmp_path / "run/config.yaml").speed.precision == "fp32"
    with pytest.raises(InputError, match=r"speed.precision: fp32 -> bf16"):
        run(tmp_path / "run", "--resume", "auto", training__max_steps=5, speed__precision="bf16", **one_level)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_equals_uninterrupted_run(tmp_path, variant):
    changes = VARIANTS[variant]
    run(tmp_path / "whole", **changes)
    run(tmp_path / "parts", **changes, training__max_steps=4, training__checkpoint_every=3)
    # as a kill after step 4's checkpoint was lost: go back to step 3
    newest = tmp_path / "parts/checkpoints/step-00000004"
    (newest / "state.json").unlink()
    assert (
        run(tmp_path / "parts", "--resume", "auto", **changes, training__log_every=1, training__checkpoint_every=100)
        == 0
    )
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert len(losses(tmp_path / "parts")) == 6


def test_training_writes_a_complete_run(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(out, training__max_steps=40, training__batch_size=32, training__lr=3e-3, training__preview_every=40,
               training__heldout_every=20, training__preview_classes="3,null,7", training__preview_steps=3) == 0  # fmt: skip
    values = losses(out)
    assert sum(values[s] for s in range(36, 41)) < 0.8 * sum(values[s] for s in range(1, 6))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "lr", "grad_norm", "epoch", "images_per_s"} <= set(lines[0])
    assert [line["step"] for line in lines if "heldout_loss" in line] == [20, 40]
    assert {p.name for p in out.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "previews",
        "checkpoints",
        "ema",
        "pipeline",
    }
    assert (out / "previews/step-00000040.png").stat().st_size > 500
    printed = capsys.readouterr().out
    assert f"adagn sample {out}" in printed
    pipe = ClassConditionalPipeline.from_pretrained(out)
    assert pipe.labels.names == tuple("0123456789")
    assert pipe.config.trained_steps == 40
    assert (out / "pipeline/README.md").read_text().count("digits") >= 1
    ema = weights(out, "ema")
    assert all(torch.equal(v, ema[k]) for k, v in pipe.unet.state_dict().items())
    # EMA by default, the raw weights when asked, and both are distinguished
    raw, what = open_pipeline(out, "raw")
    assert "raw weights" in what
    assert all(torch.equal(v, weights(out)[k]) for k, v in raw.unet.state_dict().items())
    assert not torch.equal(raw.unet.conv_in.weight, pipe.unet.conv_in.weight)


def test_resume_rejects_changed_settings(plain, tmp_path, capsys):
    out = shutil.copytree(plain, tmp_path / "run")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for changes, name in (
        ({"training__warmup_steps": 3}, "training.warmup_steps: 0 -> 3"),
        ({"model__model_channels": 32}, "model.model_channels: 16 -> 32"),
        ({"data__classes": "1,2"}, "records 10 classes"),
        ({"training__seed": 1}, "training.seed"),
    ):
        settings = {k.replace("__", "."): v for k, v in changes.items()}
        status = main(
            ["train", "--output_dir", str(out), "--resume", "auto", *words(TINY | {"training.max_steps": 9} | settings)]
        )
        assert status == 1
        assert name in one_line(capsys.readouterr().err)
    status = main(["train", "--output_dir", str(out), *words(TINY | {"training.max_steps": 9})])
    assert status == 1
    assert f"adagn train --resume {out}" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert run(out, "--resume", "auto", training__max_steps=7, training__log_every=2, training__keep_checkpoints=1) == 0
    # a run's own config is enough to go on with it
    assert main(["train", "--resume", "auto", "--output_dir", str(out), "--training.max_steps", "8"]) == 0
    assert sorted(losses(out)) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_crash_keeps_last_checkpoint(plain, tmp_path, capsys):
    good = weights(plain)
    settings = {
        "training.max_steps": 30,
        "training.checkpoint_every": 1,
        "training.lr": 1e25,
        "training.clip_norm": 0,
        "training.log_every": 20,
    }
    broken = tmp_path / "broken"
    status = main(["train", "--output_dir", str(broken), "--init_from", str(plain), *words(TINY | settings)])
    assert status == 1
    assert "--init_from" in one_line(capsys.readouterr().err)
    newest = sorted((broken / "checkpoints").glob("step-*"))
    assert len(newest) <= 1  # the steps after the one that broke it were not saved
    assert all(torch.isfinite(v).all() for v in good.values())


def test_smaller_max_steps_is_rejected(plain, capsys):
    assert main(["train", "--resume", "auto", "--output_dir", str(plain), "--training.max_steps", "3"]) == 1
    assert "beyond" in one_line(capsys.readouterr().err)


def test_other_folders_are_not_changed(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        assert main(["train", "--output_dir", str(out), *words(TINY | {"training.max_steps": 1})]) == 1
        assert "not a run" in one_line(capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_changed_data_is_rejected(tmp_path, capsys):
    import numpy as np
    from PIL import Image

    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), 60 * i, "uint8")).save(tmp_path / "data" / name / f"{i}.png")
    data = {"data__source": tmp_path / "data", "data__channels": 1}
    # 8 images, batches of 16: smaller than a batch, every batch spans epochs
    assert run(tmp_path / "run", **data) == 0
    Image.fromarray(np.full((8, 8), 255, "uint8")).save(tmp_path / "data" / "a" / "0.png")
    settings = {k.replace("__", "."): v for k, v in data.items()}
    status = main(
        [
            "train",
            "--resume",
            "auto",
            "--output_dir",
            str(tmp_path / "run"),
            *words(TINY | {"training.max_steps": 9} | settings),
        ]
    )
    assert status == 1
    assert "have changed" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.batch_size": 15, "training.gradient_accumulation": 2}, "multiple of 2"),
        ({"speed.precision": "fp16"}, "CUDA"),
        ({"training.preview_classes": "cat", "training.preview_every": 1}, "no class 'cat'"),
        ({"training.preview_guidance": -1, "training.preview_every": 1}, "guidance scale"),
        ({"training.preview_steps": 1500, "training.preview_every": 1}, "1 to 1000"),
        ({"training.preview_steps": 1, "training.preview_every": 1}, "Give training.preview_steps 2."),
        ({"data.heldout_fraction": 0, "training.heldout_every": 1}, "nothing is held out"),
        ({"data.source": "no/such/folder"}, "no/such/folder"),
        ({"model.norm_groups": 7}, "norm_groups"),
        ({"model.channel_mult": "1,2,2,2,2"}, "halved"),
        ({"init_from": "nowhere"}, "no folder nowhere"),
    ],
)
def test_bad_settings_leave_nothing_behind(tmp_path, capsys, changes, message):
    if changes.get("speed.precision") == "fp16" and torch.cuda.is_available():
        pytest.skip("fp16 is fine on this machine")
    status = main(["train", "--output_dir", str(tmp_path / "run"), *words(TINY | {"training.max_steps": 2} | changes)])
    assert status == 1
    assert message in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run/config.yaml").exists()


def test_fine_tuning_copies_matching_weights(tmp_path, capsys):
    run(tmp_path / "a", model__null_class="false", training__label_dropout=0)
    source = ClassConditionalPipeline.from_pretrained(tmp_path / "a")
    run(
        tmp_path / "b",
        "--init_from",
        str(tmp_path / "a"),
        data__classes="7,3",
        training__max_steps=1,
        training__lr=1e-30,
    )
    assert "2 of 3 rows" in capsys.readouterr().out
    tuned = weights(tmp_path / "b")
    old = source.unet.state_dict()
    for key, value in tuned.items():
        if key != "embedding.classes.weight":
            assert torch.equal(value, old[key]), key
    table = tuned["embedding.classes.weight"]
    assert table.shape[0] == 3  # 7, 3 and a null row
    assert torch.equal(table[:2], old["embedding.classes.weight"][[7, 3]])
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path / "b")
    assert pipe.labels.names == ("7", "3")
    assert pipe.labels.original_ids == (7, 3)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe("7,null", guidance_scale=2.0, num_inference_steps=2).images) == 2


def test_an_unconditional_run(tmp_path):
    assert (
        run(
            tmp_path / "u",
            model__class_conditional="false",
            training__max_steps=2,
            training__preview_every=2,
            training__preview_steps=2,
        )
        == 0
    )
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path / "u")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels.K == 0
    assert len(pipe("null", seeds=[1, 2], num_inference_steps=2).images) == 2


@pytest.mark.serial
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_save_and_leave_with_75(tmp_path, number, capsys):
    out = tmp_path / "run"
    process = Process(MAIN, arguments(out, training__max_steps=100000), tmp_path / "log")
    while not ((out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) > 3):
        assert process.running(), process.printed()
        time.sleep(0.05)
    # meanwhile nobody else may train there
    assert main(["train", "--resume", "auto", "--output_dir", str(out)]) == 1
    assert "another process is using" in one_line(capsys.readouterr().err)
    process.signal(number)
    status, printed = process.wait(), process.printed()
    assert status == 75, printed
    stopped = sorted((out / "checkpoints").glob("step-*"))[-1]
    assert f"adagn train --resume {out}\n" in printed
    assert "Traceback" not in printed
    # an unfinished run can be sampled from its checkpoint
    assert "EMA weights" in open_pipeline(out)[1]
    step = int(stopped.name.split("-")[1])
    assert max(losses(out)) == step


@pytest.mark.serial
def test_two_processes_see_what_one_sees(tmp_path):
    """Losses are the global mean: equal first steps mean equal images, labels, timesteps and noise. They log the same signals."""
    changes = {"data__flip": "true", "training__label_dropout": 0.3, "training__diagnostics_every": 3}
    run(tmp_path / "1", training__gradient_accumulation=2, **changes)
    ranks(2, arguments(tmp_path / "2", **changes), tmp_path)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert one.keys() == two.keys()
    assert one[1] == pytest.approx(two[1], abs=1e-6)
    assert list(one.values()) == pytest.approx(list(two.values()), abs=1e-4)
    one, two = signals(tmp_path / "1"), signals(tmp_path / "2")
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    # and a run begun on two goes on on one
    assert run(tmp_path / "2", "--resume", "auto", training__max_steps=8, **changes) == 0
    assert max(losses(tmp_path / "2")) == 8


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_sharded_training_is_rejected(tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InputError, match="shard"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.serial
@pytest.mark.slow
def test_process_count_may_change_on_resume(tmp_path):
    """The same samples, labels, drops, timesteps and noise at every step; what rounds otherwise, Adam amplifies slowly."""
    changes = {"data__flip": "true", "training__label_dropout": 0.3, "training__gradient_accumulation": 2}
    run(tmp_path / "1", **changes, training__max_steps=100)
    run(tmp_path / "2", **changes, training__max_steps=33)
    two = launch(tmp_path / "2", "--resume", "auto", processes=2, **changes, training__max_steps=67)
    two = [w.replace("gradient_accumulation=2", "gradient_accumulation=1") for w in two]
    result = subprocess.run(two, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    run(tmp_path / "2", "--resume", "auto", **changes, training__max_steps=100)
    one, mixed = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert one.keys() == mixed.keys() and len(one) == 100
    assert one[34] == pytest.approx(mixed[34], abs=1e-6)
    assert list(one.values()) == pytest.approx(list(mixed.values()), abs=1e-4)


POISONED = """
import math, sys
import torch
from diffusion_adagn.training.loader import BatchLoader
real = BatchLoader.batch
def poisoned(self, positions):
    batch = real(self, positions)
    batch.noise[(positions == 40) | (positions == 41)] = math.nan  # of step 3, and of the second process alone
    return batch
BatchLoader.batch = poisoned
from diffusion_adagn.cli.main import script
script("train")
"""


@pytest.mark.serial
@pytest.mark.slow
def test_processes_skip_the_same_step(tmp_path):
    program = tmp_path / "poisoned.py"
    program.write_text(POISONED)
    command = [str(program) if w.endswith("train.py") else w for w in launch(tmp_path / "2", processes=2)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    output = result.stdout + result.stderr
    assert "step 3 skipped" in output and "the output of conv_in" in output
    assert sorted(losses(tmp_path / "2")) == [1, 2, 4, 5, 6]
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "2").values())


@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.parametrize("kind", CONDITIONING)
def test_two_processes_train_every_conditioning(tmp_path, kind):
    """A parameter that a kind leaves without a gradient would stop data-parallel training."""
    changes = {"model__conditioning": kind, "diffusion__learned_variance": "true"}
    run(tmp_path / "1", training__gradient_accumulation=2, **changes)
    command = launch(tmp_path / "2", processes=2, **changes)
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (tmp_path / "2" / "pipeline").is_dir(), result.stderr[-3000:]
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-4)


def test_learned_variance_run_works(plain, tmp_path, capsys):
    out = tmp_path / "run"
    preview = {"training__preview_every": 6, "training__preview_steps": 4}
    assert run(out, diffusion__learned_variance="true", training__heldout_every=6, **preview) == 0
    both, simple = losses(out), losses(plain)
    assert 0 < both[1] - simple[1] < 20  # the bound's weighed term, on the same images and noise
    pipe = ClassConditionalPipeline.from_pretrained(out)
    assert pipe.unet.conv_out.out_channels == 2
    pipe.set_progress_bar_config(disable=True)
    for sampler in ("ddim", "ddpm", "dpm++"):
        pipe.use_sampler(sampler)
        assert pipe("3", guidance_scale=2.0, seeds=0, num_inference_steps=4, output_type="pt").images.shape == (
            1,
            1,
            8,
            8,
        )
    assert pipe.use_sampler("ddpm").scheduler.config.variance_type == "learned_range"
    more = {"diffusion__learned_variance": "true", "training__max_steps": 1}
    assert run(tmp_path / "more", "--init_from", str(out), **more) == 0
    assert "new:" not in capsys.readouterr().out


def test_unconditional_network_is_noted(tmp_path, capsys):
    assert run(tmp_path / "run", model__conditioning="none", training__max_steps=1) == 0
    argv = [
        "sample",
        str(tmp_path / "run"),
        "--count",
        "1",
        "--steps",
        "2",
        "--guidance",
        "1,2",
        "--out",
        str(tmp_path / "s"),
    ]
    assert main(argv) == 0
    assert "have no effect" in capsys.readouterr().out
