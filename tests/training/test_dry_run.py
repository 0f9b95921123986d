"""What a dry run says: one screen, a verdict on each number, nothing written."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import TINY, words

from diffusion_adagn import LabelSpace
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import RunConfig
from diffusion_adagn.training import dry_run
from diffusion_adagn.training.setup import format_number


@pytest.fixture
def said(monkeypatch, tmp_path, capsys):
    """said("--option=value", ...): what a dry run in an empty folder prints on a terminal, by line name."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        with monkeypatch.context() as terminal:
            terminal.setattr("sys.stdout.isatty", lambda: True, raising=False)
            assert main(["train", "digits", "--dry-run", *words(TINY), *argv]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 24 and max(map(len, lines)) <= 100
        assert not list(tmp_path.iterdir())
        found, name = {}, ""
        for line in lines:
            name = line[:10].strip() or name
            found[name] = f"{found.get(name, '')} {line[10:].strip()}".strip()
        return found

    return run


def test_two_real_steps_are_measured(said):
    lines = said("--training.gradient_accumulation=2", "--training.gradient_checkpointing", "--training.max_steps=2000")
    assert float(lines["step"].split()[0]) > 0 and "images/s; measured in two steps" in lines["step"]
    assert "2,000 steps take about" in lines["time"] and lines["time"].endswith("fine")
    assert lines["memory"].endswith("fits")
    assert lines["epochs"].startswith("19:") and lines["epochs"].endswith("fine")
    assert lines["classes"] == "163 to 177 images per class: fine"


def test_slow_step_is_measured_in_part(said, monkeypatch):
    monkeypatch.setattr(dry_run, "BUDGET", 1e-6)
    assert "from 1 of the 16 images of a pass" in said()["step"]


def test_long_run_gets_shorter_length(said, step_time):
    step_time(10)
    lines = said("--training.max_steps=50000")
    assert "6 days" in lines["time"] and "TOO LONG" in lines["time"]
    assert "training.max_steps 8,640 takes a day" in lines["time"]
    assert "FEW" in said("--training.max_steps=4")["epochs"]
    many = said("--training.max_steps=500000")["epochs"]
    assert "4,687" in many and "MANY" in many and "training.max_steps 53,343 are 500 epochs" in many
    assert "360 steps take an hour" in said("--training.max_steps=none")["time"]


def test_run_beyond_memory_is_not_measured(said, monkeypatch):
    monkeypatch.setattr(dry_run, "seconds_per_step", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(dry_run, "machine_memory", lambda: 2**23)
    lines = said("--training.batch_size=64")
    assert "WILL NOT FIT -> training.gradient_accumulation " in lines["memory"] and "step" not in lines
    parts = int(lines["memory"].partition("accumulation ")[2].split(",")[0])
    assert 64 % parts == 0
    assert "not measured" in lines["time"]
    monkeypatch.setattr(dry_run, "seconds_per_step", lambda *_: (1.0, 1))
    assert said("--training.batch_size=64", f"--training.gradient_accumulation={parts}")["memory"].endswith("fits")


@pytest.mark.parametrize(("counts", "verdict"), [((3, 200), "FEW"), ((30, 200), "UNBALANCED"), ((30, 31), "fine")])
def test_classes_get_a_verdict(counts, verdict):
    labels = np.repeat([0, 1], counts)
    line = dry_run._classes(SimpleNamespace(labels=labels, label_space=LabelSpace(("cat", "dog"))), RunConfig())
    assert verdict in line and (verdict == "fine" or "cat" in line)


def test_small_and_large_numbers_keep_digits():
    assert [format_number(x) for x in (0.0192, 3.44, 17.7, 263157894.7)] == ["0.019", "3.4", "18", "263,157,895"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--training.preview_classes=foo", "training.preview_classes: there is no class 'foo'"),
        ("--data.classes=3,foo", "data.classes: there is no class 'foo'"),
        ("--data.classes=3,3", "data.classes: class 3 is named more than once (2 times): name it once"),
        ("--model.attention_resolutions=[]", "the middle block always has it"),
        ("--init_from=nope", "there is no folder nope"),
        ("--output_dir=file", "exists and is not a run"),
        ("--output_dir=file/run", "cannot be made"),
        ("--output_dir=/proc/x", "cannot be made"),
    ],
)
def test_dry_run_rejects_what_the_run_rejects(option, message, step_time, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    settings = TINY | {"training.preview_every": 5}
    settings |= {"model.num_head_channels": 64} if "attention" in option else {}
    assert main(["train", "digits", "--dry-run", *words(settings), option]) == 1
    assert message in capsys.readouterr().err
