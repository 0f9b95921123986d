"""The command line: exit statuses, --help, both spellings of options, no heavy imports before arguments are checked."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from diffusion_adagn.cli.main import COMMANDS, main
from diffusion_adagn.config import RunConfig
from diffusion_adagn.schema import fields_of

STATUSES = """
import contextlib, io, json, sys
from diffusion_adagn.cli.main import main
for argv in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = main(argv)
        except SystemExit as left:
            status = left.code
    assert not {"torch", "diffusers", "matplotlib", "jinja2"} & set(sys.modules), argv
    print(json.dumps([status or 0, out.getvalue()]))
"""


def run_without_torch(*commands):
    """[status, output] of each command, in a fresh interpreter that fails if torch was imported."""
    words = [sys.executable, "-c", STATUSES, json.dumps(commands)]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_help_needs_no_torch():
    commands = [["--help"], *([c, "--help"] for c in COMMANDS)]
    for argv, (status, shown) in zip(commands, run_without_torch(*commands), strict=True):
        assert status == 0 and "usage: adagn" in shown, argv


def test_help_documents_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for setting in fields_of(RunConfig):
        key = setting.key
        if key != "labels":
            assert f"--{key}" in shown
            assert " ".join(setting.info.description.split())[:60] in shown.replace("- ", "-"), key


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ([], 2, ""),
        (["trian"], 2, "train, sample"),
        (["train"], 2, "--config FILE"),
        (["train", "--config", "none.yaml"], 1, "no config file none.yaml"),
        (["train", "--training.lrr", "1"], 2, "--training.lr"),
        (["train", "--training.lr", "fast"], 2, "expected a number"),
        (["train", "--resume", "yes"], 1, "no run to resume in yes"),
        (["train", "--confg", "x"], 2, "--config"),
        (["train", "--training.max_steps", "3"], 1, "--output_dir"),
        (["train", "--output_dir", "x"], 1, "max_steps"),
        (["sample"], 2, "RUN"),
        (["sample", "runs/none"], 1, "no folder runs/none"),
        (["sample", "x", "--guidance", "much"], 2, "1,2,4"),
        (["sample", "x", "--count", "0"], 2, "at least 1"),
        (["sample", "x", "--seed", "-1"], 2, "at least 0"),
        (["sample", "x", "--sampler", "dim"], 2, "ddim"),
        (["data", "inspect"], 2, "adagn data inspect digits"),
        (["data", "look"], 2, "inspect"),
        (["data", "inspect", "digits", "--out", "d.txt"], 2, "a name that ends in .png"),
        (["sample", "x", "--guidance", "1:4:0.0000001"], 2, "has too many values: at most 1,000"),
        (["train", "digits", "--model.conditioning", "foo"], 2, "(on the command line)"),
        (["schema", "foo"], 2, "argument run|sample|evaluate|sweep|ema|trace|serve: invalid choice: 'foo'"),
        (["trace", "x", "--timesteps", "5000"], 2, "at most 1000"),
        (["sample", "x", "--seed", "99999999999999999999999"], 2, "--seed: must be at most 9223372036854775807"),
    ],
    ids=str,
)
def test_errors_have_status_and_message(argv, status, message, capsys):
    assert main(argv) == status
    err = capsys.readouterr().err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert "\n\n" not in err


@pytest.mark.parametrize(
    ("name", "words"),
    [("ablate", "The folder of all members [runs/ablation-NAME]"), ("train", "No default: a run needs it")],
)
def test_help_states_defaults(name, words, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert words in " ".join(capsys.readouterr().out.split())


def test_argument_errors_need_no_torch():
    commands = (
        ["train", "--training.lrr", "1"],
        ["train", "--training.lr", "x"],
        ["sample", "x", "--guidance", "y"],
        ["sample", "no/where/at/all"],
    )
    assert all(status in (1, 2) for status, _ in run_without_torch(*commands))


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["trian"], []], ids=str)
def test_overview_needs_no_pydantic(argv):
    code = "import sys; from diffusion_adagn.cli.main import main; main(%r); assert not {'pydantic', 'torch'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code % argv], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("of", ["run", "sample", "evaluate", "sweep", "trace"])
def test_schema_describes_every_setting(of, capsys):
    assert main(["schema", of]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    undescribed = [
        f"{title}.{key}"
        for title, part in [(of, schema), *schema["$defs"].items()]
        for key, value in part.get("properties", {}).items()
        if len(value.get("description", "")) < 8 and "$ref" not in value
    ]
    assert not undescribed


def test_shipped_schema_is_current(capsys):
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs/run.schema.json").read_text(), (
        "adagn schema > configs/run.schema.json"
    )


def test_closed_pipes_are_no_errors():
    command = f"{sys.executable} -m diffusion_adagn schema | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.stdout == "{\n" and not result.stderr


def test_dashes_equal_underscores(step_time, capsys):
    for spelling, key in (("--dry-run", "--training.max-steps"), ("--dry_run", "--training.max_steps")):
        assert main(["train", spelling, "--verbose", f"{key}=7", "--data.source", "digits"]) == 0
        printed = capsys.readouterr().out
        assert "max_steps: 7" in printed
        assert "M parameters" in printed


def test_dry_run_needs_no_max_steps(step_time, capsys):
    assert main(["train", "--dry_run", "--data.source", "digits"]) == 0
    assert "max_steps is not set" in capsys.readouterr().out


def test_sample_has_no_architecture_options():
    """The model's config has them. In guided-diffusion, a wrong flag at sampling gives noise."""
    from diffusion_adagn.cli.sample import parser

    options = {o for action in parser()._actions for o in action.option_strings}
    assert not {o for o in options if o.startswith(("--model", "--diffusion", "--data"))}


def test_debug_shows_the_traceback():
    result = subprocess.run(
        [sys.executable, "train.py", "--config", "none.yaml", "--debug"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_data_inspect(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["data", "inspect", "digits", "--out", str(sheet), "--count", "3"]) == 0
    printed = capsys.readouterr().out
    assert str(sheet) in printed
    assert sheet.stat().st_size > 1000
    for digit in range(10):
        assert str(digit) in printed
