"""--resume: which run it means, what it rejects, and a learning rate that changes on the way."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion_adagn.cli.main import main
from diffusion_adagn.config import read_config, to_yaml
from diffusion_adagn.errors import InputError, UsageError

TINY = {
    "model.model_channels": 16, "model.channel_mult": "1,2", "model.num_res_blocks": 1, "model.attention_resolutions": 4,
    "model.num_head_channels": 16, "model.norm_groups": 4, "training.batch_size": 16, "training.lr": 1e-3,
    "training.log_every": 1, "training.preview_every": 0, "training.diagnostics_every": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file of a tiny run of 4 steps."""
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(to_yaml(read_config(None, {k: str(v) for k, v in TINY.items()} | {"training.max_steps": "4"})))
    return str(file)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(*words):
    return main(["train", "--debug", *map(str, words)])


def lines(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return {line["step"]: line["loss"] for line in lines(run) if "loss" in line}


def assert_same_run(a, b):
    assert lines(a) and [losses(a), *map(str, losses(a))] == [losses(b), *map(str, losses(b))]
    newest = [sorted(Path(run, "checkpoints").glob("step-*"))[-1] for run in (a, b)]
    assert newest[0].name == newest[1].name
    for name in ("model", "ema", "optimizer"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in newest)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("words", [["--resume", "auto", "--output_dir", "runs/tpyo"], ["--resume", "runs/tpyo"]])
def test_resume_rejects_folder_without_run(config, words):
    for name in ("runs/typo", "runs/other"):
        Path(name).mkdir(parents=True)
        Path(name, "config.yaml").write_text(Path(config).read_text())
    with pytest.raises(
        InputError, match=r"no run to resume in runs/tpyo.*Runs here: runs/typo, runs/other\. .*give --config"
    ):
        train(*words, "--training.max_steps", 1)
    assert not Path("runs/tpyo").exists()


def test_run_in_the_way_is_named(config):
    train("--config", config, "--output_dir", "a")
    with pytest.raises(InputError, match=r"(?s)already holds a run.*  adagn train --resume a$"):
        train("--output_dir", "a")


def test_dry_run_rejects_folder_without_run():
    with pytest.raises(InputError, match="no run to resume in runs/mine"):
        train("--resume", "auto", "--output_dir", "runs/mine", "--dry_run")


def test_resume_needs_run_name():
    with pytest.raises(UsageError, match=r"which run\? Give --resume RUN"):
        train("--resume", "auto", "--training.max_steps", 1)


def test_resume_takes_run_folder(config):
    assert train("--config", config, "--output_dir", "a") == 0
    assert train("--resume", "a", "--training.max_steps", 5) == 0
    assert train("--resume", "--output_dir", "a", "--training.max_steps", 6) == 0
    assert train("--config", config, "--resume", "auto", "--output_dir", "b", "--training.max_steps", 6) == 0
    assert_same_run("a", "b")
    for part in ("checkpoints/step-00000006", "checkpoints/step-00000001", "pipeline", "config.yaml"):
        with pytest.raises(InputError, match=r"(?s)is a part of the run a, .*  adagn train --resume a$"):
            train("--resume", f"a/{part}")
    with pytest.raises(InputError, match=r"(?s)no step remains for training.lr 0.0005.*max_steps"):
        train("--resume", "a", "--training.lr", 5e-4)
    assert read_config("a/config.yaml").training.lr == 1e-3
    with pytest.raises(UsageError, match="--resume a and --output_dir b name two runs"):
        train("--resume", "a", "--output_dir", "b")
    with pytest.raises(InputError, match=r"training.batch_size: 16 -> 8.*Only training.lr may be changed"):
        train("--resume", "a", "--training.batch_size", 8)


def test_lr_change_resumes_exactly(config, capsys):
    for run, stops in (("whole", [8]), ("parts", [6, 7, 8])):
        train("--config", config, "--output_dir", run)
        train("--resume", run, "--training.lr", 5e-4, "--training.max_steps", stops[0])
        for stop in stops[1:]:
            train("--resume", run, "--training.max_steps", stop)
        assert read_config(f"{run}/config.yaml").training.lr == 5e-4
        change = [line for line in lines(run) if "lr_changed_from" in line]
        assert change == [{"step": 4, "lr_changed_from": 1e-3, "lr_changed_to": 5e-4}]
        assert [line["lr"] for line in lines(run) if "loss" in line] == [1e-3] * 4 + [5e-4] * 4
    assert_same_run("whole", "parts")
    assert "training.lr is 0.0005 from step 4 on; it was 0.001" in capsys.readouterr().out


def test_lr_change_survives_lost_checkpoint(config):
    """The run dies before the first checkpoint with the new learning rate, and resumes from the one before the change."""
    train("--config", config, "--output_dir", "a")
    train("--resume", "a", "--training.lr", 5e-4, "--training.max_steps", 6)
    step_6 = losses("a")[6]
    for file in Path("a/checkpoints/step-00000006").iterdir():
        file.unlink()
    Path("a/checkpoints/step-00000006").rmdir()
    train("--resume", "a", "--training.max_steps", 6)
    assert losses("a")[6] == step_6
    assert [line for line in lines("a") if "lr_changed_from" in line] == [
        {"step": 4, "lr_changed_from": 1e-3, "lr_changed_to": 5e-4}
    ]


def test_config_keeps_changed_lr(config, capsys):
    """The command that started the run, given again by a job scheduler, goes on with the changed learning rate."""
    train("--config", config, "--output_dir", "a")
    train("--resume", "a", "--training.lr", 5e-4, "--training.max_steps", 5)
    train("--config", config, "--resume", "auto", "--output_dir", "a", "--training.max_steps", 6)
    assert [line["lr"] for line in lines("a") if "loss" in line] == [1e-3] * 4 + [5e-4] * 2
    assert "training.lr is 0.0005, as recorded" in capsys.readouterr().out


def test_edited_config_does_not_resume(config):
    train("--config", config, "--output_dir", "a")
    file = Path("a/config.yaml")
    whole = file.read_text()
    file.write_text(whole.replace("seed: 0", "seed: 1").replace("norm_groups: 4", "norm_groups: 8"))
    command = "  adagn train --resume a --model.norm_groups 4 --training.seed 0 --training.max_steps 5$"
    with pytest.raises(InputError, match=rf"(?s)norm_groups: 4 -> 8; training.seed: 0 -> 1.*was edited.*{command}"):
        train("--resume", "a", "--training.max_steps", 5)
    assert train("--resume", "a", "--training.max_steps", 5, "--model.norm_groups", 4, "--training.seed", 0) == 0
    assert "seed: 0" in file.read_text()
    file.write_text("training: {max_steps: 9}")
    with pytest.raises(InputError, match=r"config\.yaml is incomplete or was edited"):
        train("--resume", "a")
