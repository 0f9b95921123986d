"""Folders that an earlier version wrote: a run is resumed, pipelines are loaded, a sweep is continued, samples are measured."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from diffusion_adagn import ClassConditionalPipeline
from diffusion_adagn.cli.main import main

FAST = ["--extractor", "sklearn", "--judge", "none", "--debug"]
RECORDED = Path(__file__).resolve().parent / "recorded"


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A copy of the recorded folders, as the working directory, with the classifier that was cached then."""
    shutil.copytree(RECORDED, tmp_path / "recorded")
    monkeypatch.chdir(tmp_path / "recorded")
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "recorded" / "cache"))
    return tmp_path / "recorded"


def test_recorded_run_resumes(recorded, capsys):
    assert main(["train", "--resume", "run", "--training.max_steps", "12", "--debug"]) == 0
    assert "this run began without tracked averages" in capsys.readouterr().out
    assert not Path("run/ema").exists()
    assert main(["sample", "run", "--ema", "0.1", "--out", "s"]) == 1
    assert "has no tracked averages" in capsys.readouterr().err
    logged: dict[str, dict] = {}
    for line in Path("run/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        logged.setdefault(str(row["step"]), {}).update(row)
    for step, expected in json.loads(Path("steps-7-to-12.json").read_text()).items():
        assert {k: logged[step][k] for k in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5), step


def test_recorded_pipelines_load(recorded, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(recorded / "modules"))
    expected = np.stack([np.asarray(Image.open(f"samples/{2 * c:05d}-{c}-g2.png")) for c in range(4)])
    for folder in ("run", "run/pipeline", "run/checkpoints/step-00000006"):
        pipe = ClassConditionalPipeline.from_pretrained(folder)
        images = pipe("all", seeds=[0, 2, 4, 6], num_inference_steps=4, guidance_scale=2, output_type="pt").images
        images = (images * 255).round().squeeze(1).numpy()
        assert np.abs(images - expected).max() <= 1, folder
    pipe = DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
    images = pipe("all", seeds=[0, 2, 4, 6], num_inference_steps=4, guidance_scale=2, output_type="np").images[..., 0]
    assert np.abs((images * 255).round() - expected).max() <= 1


def test_recorded_sweep_continues(recorded):
    points = Path("sweep/points")
    before = json.loads((points / "g2_ddim4_leading/row.json").read_text())
    finished = {f: f.read_bytes() for f in (points / "g1_ddim4_leading").iterdir()}
    shutil.rmtree(points / "g2_ddim4_leading")
    assert main(["sweep", "run", "--guidance", "1,2", "--count", "40", "--steps", "4", "--out", "sweep", *FAST]) == 0
    assert {f: f.read_bytes() for f in (points / "g1_ddim4_leading").iterdir()} == finished
    after = json.loads((points / "g2_ddim4_leading/row.json").read_text())
    values = [{n: m["value"] for n, m in row["metrics"].items() if m["value"] is not None} for row in (before, after)]
    assert values[1] == pytest.approx(values[0], rel=1e-3) and "kid" in values[0]
    assert Path("sweep/sweep.md").is_file()


def test_recorded_samples_are_measured(recorded):
    argv = ["--guidance", "2", "--against", "digits:heldout", "--data.classes", "0,1,2,3", "--data.channels", "1"]
    assert main(["evaluate", "samples", *argv, *FAST, "--out", "evaluation"]) == 0
    assert json.loads(Path("evaluation/evaluation.json").read_text())["count"] == 8
