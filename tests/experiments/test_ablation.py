"""adagn ablate, end to end with small networks."""

import csv
import json
import re
import shutil

import pytest
from conftest import ROOT, one_line
from PIL import Image

from diffusion_adagn.cli.main import main
from diffusion_adagn.config import read_config
from diffusion_adagn.data import open_dataset
from diffusion_adagn.experiments import ablation
from diffusion_adagn.models.conditioning import CONDITIONING
from diffusion_adagn.training import train as train_module

SMALL = ["--model.model_channels=16", "--model.num_head_channels=16", "--model.norm_groups=4", "--training.batch_size=8",
         "--training.max_steps=3", "--training.log_every=1", "--training.preview_steps=2"]  # fmt: skip


def ablate(out, *extra, small=SMALL):
    return main(["ablate", str(ROOT / "configs/digits.yaml"), "--output_dir", str(out), *small, *extra])


@pytest.fixture(autouse=True)
def _few_evaluations(monkeypatch):
    monkeypatch.setattr(ablation, "EVALUATIONS", 32)


@pytest.mark.parametrize(
    "conditionings",
    [("adagn", "adagn_zero", "none"), pytest.param(tuple(CONDITIONING), marks=pytest.mark.slow)],
    ids=len,
)
def test_ablation_changes_only_the_conditioning(tmp_path, capsys, conditionings):
    assert ablate(tmp_path / "a", "--seeds", "0,1", "--kinds", ",".join(conditionings), "--debug") == 0
    rows = list(csv.DictReader((tmp_path / "a/ablation.csv").open()))
    assert {(r["kind"], r["seed"]) for r in rows} == {(k, s) for k in conditionings for s in "01"}
    by_conditioning = {r["kind"]: r for r in rows}
    assert float(by_conditioning["none"]["wrong_gap"]) == 0 != float(by_conditioning["adagn"]["wrong_gap"])
    assert int(by_conditioning["adagn_zero"]["parameters"]) > int(by_conditioning["adagn"]["parameters"])
    configs = [read_config(tmp_path / f"a/{k}-seed1/config.yaml") for k in conditionings]
    assert [c.model.conditioning for c in configs] == list(conditionings)
    for c in configs:  # only the conditioning differs
        c.model.conditioning, c.output_dir = "adagn", None
        assert c == configs[0] and c.training.seed == 1
    text = (tmp_path / "a/ablation.md").read_text()
    assert re.search(r"\| seeds +\| 0, 1 +\|", text) and "![images by conditioning](ablation.png)" in text
    page = (tmp_path / "a/report.html").read_text(encoding="utf-8")
    for kind in conditionings:
        losses = [float(r["heldout_loss"]) for r in rows if r["kind"] == kind]
        mean = f"{sum(losses) / 2:.4f} ({min(losses):.4f} to {max(losses):.4f})"
        assert (
            re.search(rf"\| `{kind}` .*\| {re.escape(mean)} ", text) and f"<code>{kind}</code>" in page and mean in page
        )
    with Image.open(tmp_path / "a/ablation.png") as image:
        assert image.height > len(rows) * 64 and image.width > 10 * 64
    shown = capsys.readouterr().out
    assert str(tmp_path / "a/ablation.md") in shown and "adagn sample" in shown


@pytest.mark.slow
def test_finished_members_are_skipped(tmp_path, monkeypatch, capsys):
    assert ablate(tmp_path / "a", "--kinds=adagn,gain", "--seeds=0") == 0
    trained = []
    real = ablation.train
    monkeypatch.setattr(ablation, "train", lambda c, resume: trained.append(c.output_dir) or real(c, resume))
    result = (tmp_path / "a/adagn-seed0/result.json").read_bytes()
    assert ablate(tmp_path / "a", "--kinds=adagn,gain,none", "--seeds=0") == 0
    assert trained == [str(tmp_path / "a/none-seed0")]
    assert (tmp_path / "a/adagn-seed0/result.json").read_bytes() == result
    (tmp_path / "a/gain-seed0/result.json").unlink()  # stopped after training, before measuring
    assert ablate(tmp_path / "a", "--kinds=adagn,gain", "--seeds=0") == 0
    assert json.loads((tmp_path / "a/gain-seed0/result.json").read_text())["kind"] == "gain"
    # the report keeps members finished earlier, and ignores folders that are not members
    shutil.copytree(tmp_path / "a/gain-seed0", tmp_path / "a/gain-seed0-backup")
    shutil.copytree(tmp_path / "a/gain-seed0", tmp_path / "a/gain-seed7")
    assert ablate(tmp_path / "a", "--kinds=gain", "--seeds=0") == 0
    assert "skipped" in capsys.readouterr().out
    assert {r["kind"] for r in csv.DictReader((tmp_path / "a/ablation.csv").open())} == {"adagn", "gain", "none"}
    (tmp_path / "a/gain-seed0/samples.npy").unlink()
    assert ablate(tmp_path / "a", "--kinds=gain", "--seeds=0") == 0
    for file, text in (("result.json", "{}"), ("result.json", "[]"), ("result.json", "{"), ("samples.npy", "x")):
        valid = (tmp_path / "a/gain-seed0" / file).read_bytes()
        (tmp_path / "a/gain-seed0" / file).write_text(text)
        assert ablate(tmp_path / "a", "--kinds=gain", "--seeds=0") == 1
        assert "is corrupted" in one_line(capsys.readouterr().err)
        (tmp_path / "a/gain-seed0" / file).write_bytes(valid)


def test_stopped_ablation_resumes(tmp_path, monkeypatch, capsys):
    class Stop(train_module.StopSignal):
        def __enter__(self):
            entered = super().__enter__()
            entered.name = "SIGTERM"
            return entered

    with monkeypatch.context() as m:
        m.setattr(train_module, "StopSignal", Stop)
        assert ablate(tmp_path / "a", "--kinds=adagn", "--seeds=0") == 75
    assert "The same command resumes it" in capsys.readouterr().out
    assert not (tmp_path / "a/adagn-seed0/result.json").exists()
    assert ablate(tmp_path / "a", "--kinds=adagn", "--seeds=0") == 0
    assert ablate(tmp_path / "b", "--kinds=adagn", "--seeds=0") == 0
    a, b = (json.loads((tmp_path / f"{x}/adagn-seed0/result.json").read_text()) for x in "ab")
    assert a["heldout_loss"] == b["heldout_loss"] and a["wrong_gap"] == b["wrong_gap"]


@pytest.mark.parametrize(
    ("extra", "message", "status"),
    [
        (["--kinds=adagn,adaglm"], "unknown conditioning 'adaglm'", 1),
        (["--kinds="], "--kinds is empty", 2),
        (["--kinds=adagn,,adain"], "single commas", 2),
        (["--seeds=one"], "--seeds: expected a whole number", 2),
        (["--seeds=-1"], "--seeds: must be at least 0", 2),
        (["--model.conditioning=gain"], "use --kinds", 2),
        (["--training.seed=1"], "use --seeds", 2),
        (["--model.norm_groups=8"], "2 channel\\(s\\) per group", 1),
        (["--model.class_conditional=false", "--training.label_dropout=0"], "class_conditional", 1),
        (["--model.channel_mult=1,1,1,1"], "adain", 1),
        (["--data.heldout_fraction=0"], "held out", 1),
    ],
)
def test_ablation_rejects_bad_arguments_before_training(tmp_path, capsys, extra, message, status):
    import re

    assert ablate(tmp_path / "a", *extra) == status
    assert re.search(message, one_line(capsys.readouterr().err))
    assert not (tmp_path / "a").exists()


def test_ablation_rejects_changed_settings_and_other_folders(tmp_path, capsys, monkeypatch):
    assert ablate(tmp_path / "a", "--kinds=adagn", "--seeds=0") == 0
    assert ablate(tmp_path / "a", "--kinds=adagn", "--seeds=0", "--training.max_steps=4") == 1
    assert "max_steps: 3 -> 4" in one_line(capsys.readouterr().err)
    assert ablate(tmp_path / "a", "--kinds=adagn", "--seeds=0", "--training.lr=1e-5") == 1
    assert "training.lr" in one_line(capsys.readouterr().err)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").write_text("x")
    assert ablate(tmp_path / "b", "--kinds=adagn") == 1
    assert "not an ablation" in one_line(capsys.readouterr().err)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with monkeypatch.context() as m:
        m.setattr("os._exit", lambda status: None)
        assert ablate(tmp_path / "c") == 1
    assert "one process" in one_line(capsys.readouterr().err)


def test_ablation_uses_members_trained_separately(tmp_path, monkeypatch):
    argv = [
        "train",
        "--config",
        str(ROOT / "configs/digits.yaml"),
        "--output_dir",
        str(tmp_path / "a/gain-seed1"),
        *SMALL,
    ]
    assert main([*argv, "--model.conditioning=gain", "--training.seed=1", "--training.heldout_every=0"]) == 0
    weights = (tmp_path / "a/gain-seed1/checkpoints/step-00000003/model.safetensors").read_bytes()
    assert ablate(tmp_path / "a", "--kinds=gain", "--seeds=1", "--debug") == 0
    assert (tmp_path / "a/gain-seed1/checkpoints/step-00000003/model.safetensors").read_bytes() == weights
    assert "`gain`" in (tmp_path / "a/ablation.md").read_text()


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert ablate(tmp_path / "a", "--dry-run") == 0
    assert not (tmp_path / "a").exists()
    assert "to do" in capsys.readouterr().out
    assert len(open_dataset(read_config(ROOT / "configs/digits.yaml").data, "heldout")) == 90
