"""adagn sweep on real digits and an untrained network: what is made, what is never made twice, and the same table however it came about."""

import csv
import json
import random
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
from diffusion_adagn.experiments import sweep as sweeping
from diffusion_adagn.experiments import sweep_plots

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
    """They are most of a small sweep's time, and tests/experiments/test_sweep_report.py has them."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sweep_plots, "available", lambda: False)
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
def once(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "once"
    assert sweep(model, out) == 0
    return out


def test_every_combination_is_a_point_and_scale_1_is_one(once):
    found = rows(once)
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
    assert "sample more" in (once / "sweep.md").read_text()
    assert {"sweep.md", "sweep.csv", "sweep.json", "grid.png", "plan.json", "points"} <= {
        p.name for p in once.iterdir()
    }
    assert not (once / "batches").exists()


def test_a_points_numbers_are_those_of_its_pictures_made_by_hand(model, once):
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
    row = rows(once)["g2_0.2-0.8_ddim3_leading"]
    assert float(row["accuracy"]) == pytest.approx(np.mean(features.probabilities.argmax(1) == labels), abs=1e-9)
    assert float(row["kid"]) == pytest.approx(kid(features.pooled, real.pooled).value, rel=1e-3)


def test_a_finished_point_is_never_made_again_and_points_may_be_added(model, once, tmp_path, monkeypatch):
    import shutil

    out = tmp_path / "more"
    shutil.copytree(once, out)
    before = {p: p.stat().st_mtime_ns for p in out.glob("points/*/row.json")}
    made, real = [], sweeping.sample_point
    monkeypatch.setattr(
        sweeping, "sample_point", lambda pipe, point, *a, **k: made.append(point.name) or real(pipe, point, *a, **k)
    )
    assert sweep(model, out) == 0
    assert made == [] and table(out) == table(once)
    assert sweep(model, out, "--guidance", "1,2,3", "--interval", "none", "--keep") == 0
    assert made == ["g3_ddim3_leading"]
    kept = read_npz(out / "points/g3_ddim3_leading/samples.npz")
    shown = np.load(out / "points/g3_ddim3_leading/shown.npy")
    assert kept.pixels.shape == (40, 8, 8, 3) and kept.labels.tolist() == [i % 3 for i in range(40)]
    assert np.array_equal(kept.pixels[[0, 3], ..., :1], shown[0, :2])
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_what_would_not_compare_is_refused(model, once):
    for change in (
        ["--count", "41"],
        ["--seed", "1"],
        ["--batch_size", "9"],
        ["--reference_count", "50"],
        ["--k", "4"],
    ):
        with pytest.raises(InputError, match=r"sweep of something else|would not compare"):
            sweep(model, once, *change)
    assert len(rows(once)) == 3


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from diffusion_adagn import folders
from diffusion_adagn.evaluation import points
left = [int(sys.argv[1])]
def dying(file, write):
    left[0] -= 1
    if not left[0]:  # half of it is written, beside its place
        beside = file.with_name(".1." + file.name)
        write(beside)
        beside.write_bytes(beside.read_bytes()[:300])
        os.kill(os.getpid(), signal.SIGKILL)
    return folders.file_into_place(file, write)
points.file_into_place = dying
from diffusion_adagn.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.serial
def test_killed_in_the_middle_of_a_batch_and_started_again_it_ends_with_the_same_table(model, once, tmp_path):
    out = tmp_path / "killed"
    argv = ["sweep", str(model), "--out", str(out), *SETTINGS]
    killed = Process(KILLED_AT, ["8", *argv], tmp_path / "log")
    assert killed.wait() == -signal.SIGKILL, killed.printed()[-2000:]
    assert len(list(out.glob("points/*"))) == 1 and not (out / "sweep.csv").exists()
    assert len(list(out.glob("batches/*/batch-*.npz"))) == 2
    assert sweep(model, out) == 0
    assert table(out) == table(once)
    assert not list(out.rglob(".*"))


@pytest.mark.serial
def test_on_two_processes_it_gives_the_same_table(model, once, tmp_path):
    out = tmp_path / "two"
    assert "on 2 process(es)" in ranks(2, ["sweep", model, "--out", out, *SETTINGS], tmp_path)
    one, two = rows(once), rows(out)
    assert list(one) == list(two)
    for name, row in one.items():
        for key, value in row.items():
            try:
                assert float(two[name][key]) == pytest.approx(float(value), rel=5e-4, abs=1e-9), (name, key)
            except ValueError:
                assert two[name][key] == value, (name, key)


def test_confirmed_with_fresh_seeds(model, once, tmp_path, capsys):
    import shutil

    out = tmp_path / "confirmed"
    shutil.copytree(once, out)
    assert sweep(model, out, "--confirm") == 0
    again = {p.parent.name: json.loads(p.read_text()) for p in out.glob("confirmed/*/row.json")}
    assert again and "again with seeds 40" in capsys.readouterr().out
    first = {p.parent.name: json.loads(p.read_text()) for p in out.glob("points/*/row.json")}
    for name, row in again.items():
        assert row["metrics"]["kid"]["value"] != first[name]["metrics"]["kid"]["value"]
    assert table(out) == table(once)


def test_without_an_extractor_the_diagnostics_stand(model, tmp_path):
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
        (["--sampler", "dpm"], "there is no 'dpm'"),
        (["--sampler", "ddim", "--spacing", "trailing", "--steps", "30"], "g1_ddim30_trailing cannot be sampled"),
        (["--interval", "2-3"], "share from 0 to 1"),
        (["--guidance", "1:x:2"], "from:to:step"),
        (["--guidance", "2", "--w", "1"], "give one of them"),
        (["--steps", "2.5"], "whole"),
        (["--classes", "7"], "7"),
        (["--data.classes", "1,2,3"], "the model has 3"),
        (["--extractor", "jugde"], "Did you mean judge"),
        (["--guide", "runs/nowhere"], "there is no folder"),
    ],
)
def test_bad_input_is_told_before_anything_is_sampled(model, tmp_path, change, word):
    with pytest.raises(InputError, match=word):
        sweep(model, tmp_path / "s", *change)
    assert not list((tmp_path / "s").rglob("*.npz"))


def test_nothing_to_measure_against(model, tmp_path):
    with pytest.raises(InputError, match=r"--against|--extractor none"):
        main(["sweep", str(model), "--out", str(tmp_path / "s"), "--debug"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not a sweep"):
        sweep(model, tmp_path / "full")


@pytest.mark.serial
@pytest.mark.slow
def test_killed_at_random_moments_again_and_again(model, once, tmp_path):
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
    assert table(out) == table(once)
