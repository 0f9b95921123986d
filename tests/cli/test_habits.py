"""Habits of users: option names of other software, typos, both forms of configs, repeated commands."""

import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_unet

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.cli.evaluate import parser as evaluate_parser
from diffusion_adagn.cli.main import main
from diffusion_adagn.cli.sample import parser as sample_parser
from diffusion_adagn.cli.sweep import parser as sweep_parser
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.runs.recorded import check_model, default_folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path):
    """A pipeline of three classes after 7 steps: imported/digits."""
    folder = tmp_path / "imported/digits"
    scheduler = make_scheduler(DiffusionConfig(schedule="cosine"))
    labels = LabelSpace(("cat", "dog", "bird"))
    ClassConditionalPipeline(tiny_unet(num_classes=3), scheduler, labels, trained_steps=7).save_pretrained(folder)
    return "imported/digits"


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ("--guide imported/digits", "--guide has no effect at guidance scale 1"),
        ("--interval 0.2-0.8", "--interval has no effect at guidance scale 1"),
        ("--interval steps:4-14 --guidance 2", "the interval steps:4-14 contains none of the steps"),
        ("--classes null --guidance 2", "--guidance has no effect on null"),
        ("--guidance 1,2 --guide imported/digits --interval 0-1", None),
    ],
)
def test_options_without_effect_are_noted(model, options, note, capsys):
    assert main(["sample", model, "--count", "1", "--steps", "2", "--out", "out", *options.split()]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == (note is not None) and str(note or "") in "".join(notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [("--steps 1001", "steps is a whole number from 1 to 1000"), ("--interpolate cat", "give two different classes")],
)
def test_what_the_model_lacks_is_named(model, options, message, capsys):
    assert main(["sample", model, "--out", "out", *options.split()]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("parser", [sample_parser, evaluate_parser, sweep_parser])
@pytest.mark.parametrize(
    "argv", [["--guidance_scale", "2", "--num-inference-steps", "9"], ["--guidance", "2", "--steps=9"]]
)
def test_diffusers_option_names_work(parser, argv):
    args = parser().parse(["a", *argv])
    assert {"2", "9"} <= set(map(str, vars(args).values()))


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("trian", "Did you mean train?"),
        ("sample x --cfg 2", "Did you mean --guidance?"),
        ("sample x --num_images 2", "Did you mean --count?"),
        ("train digits --guidance_scale 2", "Did you mean --training.preview_guidance?"),
        ("train digits --lr 1", "Did you mean --training.lr?"),
        ("sample x --sampler dpm", "Did you mean dpm++?"),
        ("sweep x --sampler ddim,dpm", "Did you mean dpm++?"),
        ("sample x --sampler ddmi", "Did you mean dd"),
    ],
)
def test_typos_get_suggestions(line, hint, capsys):
    assert main(line.split()) == 2
    assert hint in capsys.readouterr().err


def test_forms_of_version_and_help(capsys):
    for word in ("version", "-V", "--version"):
        assert main([word]) == 0
        assert capsys.readouterr().out.startswith("diffusion-adagn ")
    assert main(["help"]) == 0
    assert "usage: adagn COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["help", "import_diffusers"])
    assert "usage: adagn import-diffusers" in capsys.readouterr().out


def test_inspect_accepts_config_argument_or_option(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("data: {source: digits, classes: '1,7'}\n")
    for config_arguments in (["my.yaml"], ["--config", "my.yaml"]):
        assert main(["data", "inspect", *config_arguments, "--count", "1"]) == 0
        assert "adagn train --config my.yaml" in capsys.readouterr().out


# ---------------------------------------------------------------------- default folders


def test_default_folders_name_run_and_step(tmp_path, model):
    assert str(default_folder("samples", model)) == "samples/imported/digits/step-00000007"
    run = tmp_path / "runs/digits"
    for step in (200, 400):
        checkpoint = run / f"checkpoints/step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(f'{{"step": {step}}}')
    (run / "config.yaml").write_text("data: {source: digits}\n")
    assert str(default_folder("sweeps", "runs/digits")) == "sweeps/digits/step-00000400"
    assert str(default_folder("sweeps", run)) == "sweeps/digits/step-00000400"
    assert str(default_folder("sweeps", "runs/digits/checkpoints/step-00000200")) == "sweeps/digits/step-00000200"
    assert str(default_folder("sweeps", "runs/digits", "raw")) == "sweeps/digits/step-00000400-raw"
    assert str(default_folder("sweeps", "owner/name")) == "sweeps/owner/name"


def test_default_folders_of_models_elsewhere(tmp_path, model, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert str(default_folder("traces", f"../{model}")) == "traces/imported/digits/step-00000007"
    monkeypatch.chdir(tmp_path / model)
    assert str(default_folder("traces", ".")) == "traces/imported/digits/step-00000007"


def test_sampling_again_appends_a_number(tmp_path, model, capsys):
    line = ["sample", model, "--classes", "cat", "--count", "1", "--steps", "2"]
    own = tmp_path / "samples/imported/digits/step-00000007"
    assert main(line) == main(line) == 0
    assert (own / "grid.png").is_file() and (own.with_name(f"{own.name}-2") / "grid.png").is_file()
    assert main([*line, "--overwrite"]) == 0
    assert len(list(own.parent.iterdir())) == 2
    # an explicit folder is used as given, even if it contains default folders of runs
    capsys.readouterr()
    explicit = [*line, "--out", str(own.parent)]
    assert main(explicit) == 0 and main(explicit) == 1
    command = capsys.readouterr().err.splitlines()[-1]
    assert main(shlex.split(command)[1:]) == 0


def test_existing_evaluation_prints_commands(tmp_path, model, capsys):
    out = tmp_path / "evaluations/imported/digits/step-00000007"
    out.mkdir(parents=True)
    (out / "evaluation.json").write_text('{"command": "adagn evaluate imported/digits --count 4"}')
    assert main(["evaluate", model, "--count", "3"]) == 1
    overwrite, elsewhere = capsys.readouterr().err.splitlines()[1:]
    assert overwrite == "  adagn evaluate imported/digits --count 3 --overwrite"
    assert elsewhere.endswith("--out evaluations/imported/digits/step-00000007-2")


def test_unwritable_folders_are_rejected(tmp_path, model, capsys):
    (tmp_path / "file").write_text("")
    assert main(["sample", model, "--count", "1", "--steps", "2", "--out", "file/x"]) == 1
    assert "file/x cannot be written to (Not a directory)" in capsys.readouterr().err


def test_fp16_evaluation_needs_cuda(model, capsys):
    assert main(["evaluate", model, "--count", "3", "--precision", "fp16", "--device", "cpu"]) == 1
    assert "--precision fp16 needs a CUDA GPU" in capsys.readouterr().err


# ---------------------------------------------------------------------- classes, before torch


def test_class_typos_need_no_torch(model):
    code = f"""
import sys
from diffusion_adagn.cli.main import main
for command in ("sample", "sweep", "evaluate"):
    assert main([command, "{model}", "--classes", "cat,brid"]) == 1
assert main(["sample", "{model}", "--mix", "cat@coarse,brid"]) == 1
assert main(["sample", "{model}", "--interpolate", "cat,brid"]) == 1
assert main(["sample", "imported"]) == 1
assert "torch" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("there is no class 'brid'. Nearest: 'bird'.") == 5
    assert "imported is neither a run" in result.stderr


def test_classes_of_runs_are_read_from_configs(tmp_path):
    checkpoint = tmp_path / "runs/a/checkpoints/step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 2}')
    labels = "{names: [cat, dog], original_ids: [0, 1], wnids: [], has_null: true}"
    (tmp_path / "runs/a/config.yaml").write_text(f"data: {{source: digits}}\nlabels: {labels}\n")
    for path in ("runs/a", "runs/a/checkpoints/step-00000002"):
        check_model(path, None, "ema", "cat,null", ["cat@coarse,dog"])
        with pytest.raises(InputError, match="Nearest: 'cat'"):
            check_model(path, None, "ema", "catt")
    check_model("owner/name", None, "ema", "catt")  # on the hub: unknown before the download


def test_label_check_rejects_out(model, capsys):
    assert main(["trace", model, "--label_check", "--out", "there"]) != 0
    assert "--label_check writes no files" in capsys.readouterr().err


def test_sweep_help_shows_its_own_default(capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert "sampler steps [25]" in capsys.readouterr().out
