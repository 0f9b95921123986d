"""Printed commands can be copied: complete, quoted, on their own line, and they run in the same folder."""

import html
import importlib
import re
import shlex

import numpy as np
import pytest
from conftest import tiny_unet
from PIL import Image

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.cli.main import COMMANDS, main
from diffusion_adagn.commands import command, shell_line, unused_path, with_commands, with_options
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.interop.adm import next_command
from diffusion_adagn.labels import LabelSpace as Labels
from diffusion_adagn.runs.recorded import free_default_folder
from diffusion_adagn.training import train as train_module
from diffusion_adagn.training.export import sample_command

TINY = [
    "--training.max_steps=2", "--training.batch_size=8", "--training.preview_every=0", "--training.heldout_every=0",
    "--training.diagnostics_every=0", "--model.model_channels=16", "--model.num_head_channels=16", "--model.norm_groups=4",
    "--speed.precision=fp32",
]  # fmt: skip
AWKWARD = "runs/it's a run"
WITH_OPTION = re.compile(rf"adagn ({'|'.join(COMMANDS)}) .*--")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """An empty working folder, without configs/ next to it."""
    monkeypatch.chdir(tmp_path)


def parse_command(line):
    """The arguments of a printed line, split as by a shell and parsed by its command."""
    assert "\n" not in line
    program, name, *argv = shlex.split(line)
    assert program == "adagn"
    args = importlib.import_module(f"diffusion_adagn.cli.{name.replace('-', '_')}").parser().parse(argv)
    if hasattr(args, "runs"):  # of a command that takes several
        (args.run,) = args.runs
    return args


def commands_in(text):
    """The commands in an output. Fails for a command on a line with other text."""
    commands = [line[2:] for line in text.splitlines() if line.startswith("  adagn ")]
    assert [line for line in text.splitlines() if WITH_OPTION.search(line) and not line.startswith("  adagn ")] == []
    for line in commands:
        parse_command(line)
    return commands


def arguments_of(line):
    return shlex.split(line)[1:]


def make_image_folder(root):
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), "uint8")
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def save_pipeline(folder, labels=("a", "b", "c")):
    space = Labels(labels)
    unet = tiny_unet(num_classes=space.K)
    ClassConditionalPipeline(unet, make_scheduler(DiffusionConfig(schedule="cosine")), space).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------- quoting


@pytest.mark.parametrize(
    "path", ["runs/a", "runs/a b", "it's", '"x"', "$HOME", "~x", "-dash", "a\nb", "é ü", "a;b`c`", "back\\slash\t"]
)
def test_paths_are_quoted_as_one_word(path):
    import subprocess

    line = command("sample", path, out=path)
    assert line.isprintable()
    argv = subprocess.run(
        ["bash", "-c", f"adagn() {{ printf '%s\\0' \"$@\"; }}; {line}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    name, run, *rest = argv
    assert (name, run.removeprefix("./")) == ("sample", path)
    assert rest in (["--out", path], [f"--out={path}"])


def test_flags_and_unset_options():
    assert command("trace", "r", label_check=True, out=None) == "adagn trace r --label_check"
    assert with_options("torchrun -m x", **{"training.seed": 0}) == "torchrun -m x --training.seed 0"


def test_errors_print_commands_on_own_lines(monkeypatch, capsys):
    from diffusion_adagn.cli import init

    line = command("sample", "runs/" + "a very long name " * 12, count=8)

    def fail(argv):
        raise InputError(
            with_commands("this is\nnot  possible. " + "Words and words. " * 20 + "Type:", line, "pip install 'x[y]'")
        )

    monkeypatch.setattr(init, "run", fail)
    assert main(["init"]) == 1
    prose, *commands = capsys.readouterr().err.splitlines()
    assert prose.startswith("adagn: this is not possible. Words") and prose.endswith("Type:")
    assert commands == [f"  {line}", "  pip install 'x[y]'"]


def test_unused_path_appends_a_number(tmp_path):
    assert free_default_folder("sweeps", "runs/x") is None
    (tmp_path / "sweeps/runs/x").mkdir(parents=True)
    (tmp_path / "sweeps/runs/x-2").mkdir()
    assert free_default_folder("sweeps", "runs/x") == "sweeps/runs/x-3" == unused_path("sweeps/runs/x")
    assert "--out" not in sample_command("runs/x", LabelSpace(("a",)))  # a second folder gets a number


# ---------------------------------------------------------------------- printed commands


def test_inspect_prints_a_dry_run(tmp_path, step_time, capsys):
    make_image_folder(tmp_path / "my own")
    main(["init", "own_images"])
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out.replace("my_images", "my own"))
    for argv in (
        ["digits"],
        ["digits", "--data.classes", "1,7", "--data.flip"],
        ["my own", "--data.image_size", "16"],
        ["--config", "my.yaml"],
        ["--config", "own_images", "--data.source", "./my own/", "--data.flip", "false"],
    ):
        assert main(["data", "inspect", *argv, "--count", "1"]) == 0
        [line] = commands_in(capsys.readouterr().out)
        assert arguments_of(line)[-1] == "--dry_run"
        assert main([*arguments_of(line), "--verbose"]) == 0
        shown = capsys.readouterr().out
        assert "M parameters" in shown
        if "1,7" in argv:
            assert "classes: 1,7" in shown and "flip: true" in shown
        if "16" in argv:
            assert "image_size: 16" in shown
        assert ("flip: false" in shown) == ("false" in argv or argv == ["digits"])


def test_stopped_run_prints_resume_command(monkeypatch, capsys):
    class Stopped(train_module.StopSignal):
        def __enter__(self):
            super().__enter__()
            self.name = "SIGTERM"
            return self

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "StopSignal", Stopped)
        patch.setattr(
            train_module.ConditioningDiagnostics, "warning", lambda self, step, seen: "warning: the label is not used"
        )
        patch.setattr(train_module.ConditioningDiagnostics, "due", lambda self, step: True)
        patch.setattr(train_module.ConditioningDiagnostics, "read", lambda self, *_: {})
        assert main(["train", "digits", "--output_dir", AWKWARD, *TINY]) == 75
    trace, resume = commands_in(capsys.readouterr().out)
    assert parse_command(trace).run == AWKWARD and parse_command(trace).label_check
    assert main(arguments_of(resume)) == 0
    [sample] = commands_in(capsys.readouterr().out)
    assert parse_command(sample).run == AWKWARD
    assert main([*arguments_of(sample), "--steps", "2", "--count", "1", "--classes", "3"]) == 0


def test_run_without_checkpoints_prints_resume(tmp_path, capsys):
    (tmp_path / AWKWARD).mkdir(parents=True)
    (tmp_path / AWKWARD / "config.yaml").write_text("data: {source: digits}\n")
    assert main(["sample", AWKWARD]) == 1
    [line] = commands_in(capsys.readouterr().err)
    assert parse_command(line).resume == AWKWARD


@pytest.mark.parametrize("argv", [[], ["train"], ["ablate"], ["data", "inspect"], ["evaluate", "reference"]], ids=str)
def test_usage_errors_print_a_command(argv, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert len(commands_in(captured.out + captured.err)) == 1


@pytest.mark.slow
def test_imports_and_exports_print_commands(tmp_path, capsys):
    save_pipeline(tmp_path / "a model")
    assert main(["export", "a model", "an export"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [shlex.split(line)[:2] for line in lines if line.startswith("  ")] == [["python", "-c"]]
    assert lines[-1].startswith("  python -c ")
    assert main(["import-diffusers", "an export", "--out", "imported/the import"]) == 0
    [line] = commands_in(capsys.readouterr().out)
    assert parse_command(line).run == "imported/the import"


def test_printed_class_is_unambiguous():
    assert (
        parse_command(next_command("models/a b", Labels(("tench, Tinca tinca", "goldfish"), has_null=False))).classes
        == "tench"
    )
    assert parse_command(next_command("m", Labels(("1", "0"), has_null=False))).classes == "id:0"
    assert parse_command(next_command("m", Labels(("-x", "y"), has_null=False))).classes == "-x"
    assert parse_command(next_command("m", Labels((), has_null=False))).classes == "null"


@pytest.mark.slow
def test_measurements_print_next_commands(tmp_path, monkeypatch, capsys):
    from diffusion_adagn.trace import tracing

    for name in ("MIX_COLUMNS", "SAMPLER_STEPS", "NUM_PROBED_TIMESTEPS"):
        monkeypatch.setattr(tracing, name, 2)
    save_pipeline(tmp_path / "it's a model", labels=("0", "1", "2"))
    own = ["--against", "digits", "--data.classes", "0,1,2", "--extractor", "sklearn"]
    assert main(["evaluate", "it's a model", *own, "--count", "20", "--steps", "2", "--neighbours", "0"]) == 0
    [line] = commands_in(capsys.readouterr().out)
    assert parse_command(line).run == "it's a model"
    assert main([*arguments_of(line), "--guidance", "1,2"]) == 0
    again = commands_in(capsys.readouterr().out)
    [line] = again
    assert parse_command(line).confirm
    assert main(arguments_of(line)) == 0
    assert main(["evaluate", "reference", "digits", "--out", "a reference.npz", "--extractor", "sklearn"]) == 0
    assert "\n  --against 'a reference.npz' --extractor sklearn\n" in capsys.readouterr().out
    assert (
        main(
            [
                "trace",
                "it's a model",
                "--against",
                "digits:heldout",
                "--data.classes",
                "0,1,2",
                "--timesteps",
                "3",
                "--images",
                "2",
            ]
        )
        == 0
    )
    [report] = (tmp_path / "traces/it's a model").rglob("report.html")
    report = report.read_text()
    block = html.unescape(re.search(r"<pre>(adagn .*?)</pre>", report, re.DOTALL)[1])
    names = [arguments_of(line)[0] for line in block.splitlines() if parse_command(line).run == "it's a model"]
    assert names == ["sample", "sample", "sweep", "trace"]


def test_ablation_prints_commands_per_member(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (
        main(["ablate", "digits", "--kinds", "adagn,none", "--seeds", "0", "--output_dir", "runs/a b", *TINY[:2]]) == 1
    )
    *members, again = capsys.readouterr().err.splitlines()[1:]
    assert [shlex.split(line)[:5] for line in members] == [
        ["torchrun", "--nproc_per_node", "2", "-m", "diffusion_adagn"]
    ] * 2
    for line, kind in zip(members, ("adagn", "none")):
        args = parse_command(shell_line(["adagn", *shlex.split(line)[5:]]))
        assert vars(args)["model.conditioning"] == kind and args.output_dir == f"runs/a b/{kind}-seed0"
    assert parse_command(again.strip()).kinds == "adagn,none"
