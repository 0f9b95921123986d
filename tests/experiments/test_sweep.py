"""adagn sweep on digits with an untrained network: its points, resuming, several processes, and rejected arguments."""

import csv
import json
import random
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, tiny_unet
from processes import Process, ranks

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.data.npz import read_npz
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.experiments import runner, sweep_sections

SETTINGS = [
    "--against",
    "digits",
    "--data.classes",
    "0,1,2",
    "--extractor",
    "sklearn",
    "--guidance",
    "1,2",
    "--interval",
    "none,0.2-0.8",
    "--steps",
    "3",
    "--count",
    "40",
    "--batch_size",
    "8",
]


@pytest.fixture(scope="module", autouse=True)
def _no_figures():
    """Figures take most of a small sweep's time; test_sweep_report.py tests them."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sweep_sections, "charts", lambda report: [])
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "pipe"
    labels = LabelSpace(("0", "1", "2"))
    ClassConditionalPipeline(tiny_unet(), make_scheduler(DiffusionConfig()), labels).save_pretrained(folder)
    return folder


def sweep(model, out, *more):
    return main(["sweep", str(model), "--out", str(out), "--debug", *SETTINGS, *more])


def table(out):
    return (out / "sweep.csv").read_text(encoding="utf-8")


def rows(out):
    return {r["id"]: r for r in csv.DictReader(table(out).splitlines())}


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "finished"
    assert sweep(model, out) == 0
    return out


def test_every_combination_is_one_point(finished):
    found = rows(finished)
    assert {(r["scale"], r["interval"]) for r in found.values()} == {
        ("1.0", "none"),
        ("2.0", "none"),
        ("2.0", "0.2-0.8"),
    }
    assert {r["id"]: int(r["nfe"]) for r in found.values()} == {
        "g1_ddim3_leading": 3,
        "g2_ddim3_leading": 6,
        "g2_0.2-0.8_ddim3_leading": 5,  # t = 666 and 333 of 666, 333, 0
    }
    for r in found.values():
        assert int(r["count"]) == 40 and float(r["kid"]) == float(r["kid"]) and 0 <= float(r["accuracy"]) <= 1
        assert r["frechet"] == "" and r["extractor"] == "sklearn" and len(r["model_hash"]) == 16
    assert "sample more" in (finished / "sweep.md").read_text()
    assert {"sweep.md", "sweep.csv", "sweep.json", "grid.png", "plan.json", "points"} <= {
        p.name for p in finished.iterdir()
    }
    assert not (finished / "batches").exists()


def test_point_matches_manual_sampling(model, finished):
    from diffusion_adagn.config import DataConfig
    from diffusion_adagn.data import open_dataset
    from diffusion_adagn.evaluation.extractors import open_extractor
    from diffusion_adagn.evaluation.metrics import kid
    from diffusion_adagn.sampling.guidance import Guidance
    from diffusion_adagn.sampling.pipeline import to_pixels

    pipe = ClassConditionalPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    dataset = open_dataset(DataConfig(source="digits", classes="0,1,2", image_size=8, channels=1))
    extractor = open_extractor("sklearn", dataset, progress=False)
    labels = [i % 3 for i in range(40)]
    images = pipe(labels, seeds=0, num_inference_steps=3, guidance=Guidance(2.0, "0.2-0.8"), output_type="np").images
    features = extractor(to_pixels(images))
    real = extractor(dataset.gather(range(len(dataset)))[0])
    row = rows(finished)["g2_0.2-0.8_ddim3_leading"]
    assert float(row["accuracy"]) == pytest.approx(np.mean(features.probabilities.argmax(1) == labels), abs=1e-9)
    assert float(row["kid"]) == pytest.approx(kid(features.pooled, real.pooled).value, rel=1e-3)


def test_finished_points_are_not_sampled_again(model, finished, tmp_path, monkeypatch):
    import shutil

    out = tmp_path / "more"
    shutil.copytree(finished, out)
    before = {p: p.stat().st_mtime_ns for p in out.glob("points/*/row.json")}
    sampled, real = [], runner.PointSampler
    monkeypatch.setattr(
        runner, "PointSampler", lambda pipe, point, *a, **k: sampled.append(point.name) or real(pipe, point, *a, **k)
    )
    assert sweep(model, out) == 0
    assert sampled == [] and table(out) == table(finished)
    assert sweep(model, out, "--guidance", "1,2,3", "--interval", "none", "--keep") == 0
    assert sampled == ["g3_ddim3_leading"]
    saved = read_npz(out / "points/g3_ddim3_leading/samples.npz")
    shown = np.load(out / "points/g3_ddim3_leading/shown.npy")
    assert saved.pixels.shape == (40, 8, 8, 3) and saved.labels.tolist() == [i % 3 for i in range(40)]
    assert np.array_equal(saved.pixels[[0, 3], ..., :1], shown[0, :2])
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_sweep_rejects_changed_settings(model, finished):
    for change in (
        ["--count", "41"],
        ["--seed", "1"],
        ["--batch_size", "9"],
        ["--reference_count", "50"],
        ["--k", "4"],
    ):
        with pytest.raises(InputError, match="sweep with other settings"):
            sweep(model, finished, *change)
    assert len(rows(finished)) == 3


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from diffusion_adagn import atomic
from diffusion_adagn.evaluation import points
left = [int(sys.argv[1])]
def killed(file, write):
    left[0] -= 1
    if not left[0]:  # half of the temporary file is written
        tmp = file.with_name(".1." + file.name)
        write(tmp)
        tmp.write_bytes(tmp.read_bytes()[:300])
        os.kill(os.getpid(), signal.SIGKILL)
    return atomic.atomic_write(file, write)
points.atomic_write = killed
from diffusion_adagn.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.serial
def test_killed_sweep_resumes_to_the_same_table(model, finished, tmp_path):
    out = tmp_path / "killed"
    argv = ["sweep", str(model), "--out", str(out), *SETTINGS]
    killed = Process(KILLED_AT, ["8", *argv], tmp_path / "log")
    assert killed.wait() == -signal.SIGKILL, killed.printed()[-2000:]
    assert len(list(out.glob("points/*"))) == 1 and not (out / "sweep.csv").exists()
    assert len(list(out.glob("batches/*/batch-*.npz"))) == 2
    assert sweep(model, out) == 0
    assert table(out) == table(finished)
    assert not list(out.rglob(".*"))


@pytest.mark.serial
def test_two_processes_give_the_same_table(model, finished, tmp_path):
    out = tmp_path / "two"
    assert "on 2 process(es)" in ranks(2, ["sweep", model, "--out", out, *SETTINGS], tmp_path)
    one, two = rows(finished), rows(out)
    assert list(one) == list(two)
    for name, row in one.items():
        for key, value in row.items():
            try:
                assert float(two[name][key]) == pytest.approx(float(value), rel=5e-4, abs=1e-9), (name, key)
            except ValueError:
                assert two[name][key] == value, (name, key)


def test_confirm_uses_fresh_seeds(model, finished, tmp_path, capsys):
    import shutil

    out = tmp_path / "confirmed"
    shutil.copytree(finished, out)
    assert sweep(model, out, "--confirm") == 0
    again = {p.parent.name: json.loads(p.read_text()) for p in out.glob("confirmed/*/row.json")}
    assert again and "again with seeds 40" in capsys.readouterr().out
    first = {p.parent.name: json.loads(p.read_text()) for p in out.glob("points/*/row.json")}
    for name, row in again.items():
        assert row["metrics"]["kid"]["value"] != first[name]["metrics"]["kid"]["value"]
    assert table(out) == table(finished)


def test_rules_and_negatives_are_axes(model, tmp_path):
    axes = [
        "--rule",
        "cfg,apg:eta=0,r=0.3,tcfg",
        "--negative",
        "null,random",
        "--guidance",
        "1,2",
        "--interval",
        "none",
    ]
    assert sweep(model, tmp_path / "s", *axes, "--count", "9") == 0
    assert sorted(rows(tmp_path / "s")) == [
        "g1_ddim3_leading", "g2_apg-eta-0-r-0.3_ddim3_leading", "g2_apg-eta-0-r-0.3_neg-random_ddim3_leading",
        "g2_ddim3_leading", "g2_neg-random_ddim3_leading", "g2_tcfg_ddim3_leading", "g2_tcfg_neg-random_ddim3_leading",
    ]  # fmt: skip
    report = (tmp_path / "s/sweep.md").read_text(encoding="utf-8")
    assert re.search(r"\| swept: rule +\| cfg, apg:eta=0,r=0.3, tcfg +\|", report)
    assert re.search(r"\| swept: negative +\| null, random +\|", report)
    assert "rule cfg" in report and "no rule" not in report


def test_sweep_without_extractor_has_diagnostics(model, tmp_path):
    settings = [w for w in SETTINGS if w not in ("sklearn",)]
    settings.insert(settings.index("--extractor") + 1, "none")
    assert main(["sweep", str(model), "--out", str(tmp_path / "s"), *settings, "--debug"]) == 0
    found = rows(tmp_path / "s")
    assert all(r["kid"] == "" and float(r["contrast_ratio"]) > 0 and float(r["clipped"]) >= 0 for r in found.values())
    assert found["g1_ddim3_leading"]["difference"] == "" and float(found["g2_ddim3_leading"]["difference"]) > 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (["--count", "2"], "total over 3 classes"),
        (["--sampler", "dpm"], "got 'dpm'. Did you mean dpm++"),
        (["--sampler", "ddim", "--spacing", "trailing", "--steps", "30"], "g1_ddim30_trailing cannot be sampled"),
        (["--interval", "2-3"], "fraction of the way from image to noise"),
        (["--guidance", "1:x:2"], "from:to:step"),
        (["--guidance", "2", "--w", "1"], "give one of them"),
        (["--steps", "2.5"], "whole"),
        (["--classes", "7"], "7"),
        (["--data.classes", "1,2,3"], "the model has 3"),
        (["--extractor", "clasifier"], "Did you mean classifier"),
        (["--guide", "runs/nowhere"], "there is no folder"),
    ],
)
def test_sweep_rejects_bad_arguments_before_sampling(model, tmp_path, change, word):
    with pytest.raises(InputError, match=word):
        sweep(model, tmp_path / "s", *change)
    assert not list((tmp_path / "s").rglob("*.npz"))


def test_sweep_requires_reference_and_own_folder(model, tmp_path):
    with pytest.raises(InputError, match=r"--against|--extractor none"):
        main(["sweep", str(model), "--out", str(tmp_path / "s"), "--debug"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not a sweep"):
        sweep(model, tmp_path / "full")


@pytest.mark.serial
@pytest.mark.slow
def test_sweep_survives_random_kills(model, finished, tmp_path):
    out = tmp_path / "killed"
    argv = [sys.executable, "-m", "diffusion_adagn", "sweep", str(model), "--out", str(out), *SETTINGS]
    chance, kills = random.Random(0), 0
    for _ in range(20):
        running = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert running.wait(timeout=chance.uniform(3, 12)) == 0
            break
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            kills += 1
    assert kills and subprocess.run(argv, cwd=ROOT, capture_output=True).returncode == 0
    assert table(out) == table(finished)
