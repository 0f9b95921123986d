"""What benchmarks.shipped_model writes of a run that a sweep judges."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from benchmarks import shipped_model
from diffusion_adagn import ClassConditionalPipeline, read_config
from diffusion_adagn.diffusion.schedule import sampler_name
from diffusion_adagn.runs import shipped


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (shipped_model, shipped):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "pretrained")
    return Path(shutil.copytree(ROOT / "diffusion_adagn/pretrained/digits", tmp_path / "runs/objects"))


def sweep_of(scales):
    """A stand-in of `adagn sweep` that writes known figures."""

    def sweep(command, check):
        assert check and command[2:5] == ["diffusion_adagn", "sweep", "cifar10"]
        assert command[command.index("--data.source") + 1] == "/data/cifar10"
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        rows = [
            {
                "steps": 12,
                "scale": scale,
                "metrics": {name: {"value": scale / 3} for name in shipped_model.METRICS},
                "diagnostics": {"saturation_ratio": 1.0, "contrast_ratio": 0.9},
            }
            for scale in scales
        ]
        about = {"classifier": {"heldout_accuracy": 0.85}, "count": 2000}
        (out / "sweep.json").write_text(json.dumps({"sweep": about, "rows": rows}))

    return sweep


def test_a_run_becomes_a_shipped_model_with_the_figures_of_its_sweep(run, monkeypatch):
    monkeypatch.setattr(shipped_model.subprocess, "run", sweep_of([1.0, 2.0]))
    trained = "adagn train cifar10_cpu"
    out = shipped_model.make(run, "cifar10", "euler", trained, data="/data/cifar10")
    made = json.loads((out / "made.json").read_text())
    assert [f["guidance"] for f in made["figures"]] == [1, 2] and made["figures"][1]["accuracy"] == 0.6667
    assert made["judge_accuracy"] == 0.85 and made["images_judged"] == 2000
    assert read_config(out / "config.yaml").data.source == "cifar10"
    assert "/data" not in "".join(file.read_text() for file in out.rglob("*.*") if file.suffix in (".json", ".yaml"))
    weights = load_file(out / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    pipe = ClassConditionalPipeline.from_pretrained("cifar10")
    assert sampler_name(pipe.scheduler) == "euler"
    before = ClassConditionalPipeline.from_pretrained(run).unet.state_dict()
    assert all(torch.equal(before[name].half(), w.half()) for name, w in pipe.unet.state_dict().items())


def test_main_reads_the_length_of_the_ema(run, monkeypatch):
    chosen = []
    monkeypatch.setattr(shipped_model, "make", lambda *args: chosen.append(args) or shipped.FOLDER)
    shipped.FOLDER.mkdir()
    (shipped.FOLDER / "made.json").write_text('{"figures": []}')
    for words in ([], ["--ema", "0.05", "--data", "d"]):
        argv = ["shipped_model", str(run), "cifar10", "--sampler", "dpm++", "--trained", "adagn  train x", *words]
        monkeypatch.setattr("sys.argv", argv)
        shipped_model.main()
    assert chosen[0][2:] == ("dpm++", "adagn train x", "run", None) and chosen[1][4:] == (0.05, "d")
