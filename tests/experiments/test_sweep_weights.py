"""adagn sweep over weights: EMA lengths, checkpoints, guides and several runs; resumed, killed, on two processes."""

import csv
import gc
import json
import os
import shutil
import signal
import weakref
from functools import partial

import pytest
import torch
from processes import Process, ranks
from test_sweep import KILLED_AT

from diffusion_adagn import ClassConditionalPipeline
from diffusion_adagn.cli import sweep as sweep_command
from diffusion_adagn.cli.main import main
from diffusion_adagn.cli.options import request
from diffusion_adagn.errors import InputError
from diffusion_adagn.experiments import models, sweep_sections
from diffusion_adagn.experiments.models import SweepModels
from diffusion_adagn.experiments.points import grid_of
from diffusion_adagn.experiments.settings import SweepRequest
from diffusion_adagn.runs.weights import Weights
from diffusion_adagn.sampling.pretrained import model_hash

TRAIN = [
    "train", "--config", "digits", "--data.classes", "0,1,2", "--model.model_channels", "8", "--model.num_head_channels", "8",
    "--model.norm_groups", "4", "--training.batch_size", "4", "--training.max_steps", "4", "--training.checkpoint_every", "2",
    "--training.warmup_steps", "0", "--training.preview_every", "0", "--training.diagnostics_every", "0",
    "--training.heldout_every", "0",
]  # fmt: skip
SETTINGS = ["--extractor", "sklearn", "--guidance", "1,2", "--steps", "3", "--count", "12", "--batch_size", "4"]


@pytest.fixture(scope="module", autouse=True)
def _no_figures():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sweep_sections, "charts", lambda report: [])
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The working directory, with runs/a and runs/b, each with checkpoints of the steps 2 and 4."""
    folder, before = tmp_path_factory.mktemp("weights"), os.getcwd()
    os.chdir(folder)
    for name in "ab":
        more = ["--output_dir", f"runs/{name}", "--training.seed", str(ord(name))]
        assert main([*TRAIN, *more]) == 0
    yield folder
    os.chdir(before)


def sweep(out, *more):
    return main(["sweep", *more, "--out", str(out), "--debug", *SETTINGS])


def rows(out):
    text = (out / "sweep.csv").read_text(encoding="utf-8")
    return {r["id"]: r for r in csv.DictReader(text.splitlines())}


AXES = ["runs/a", "--ema", "0.1,raw", "--guide", "runs/b@*,none"]


@pytest.fixture(scope="module")
def finished(runs):
    assert sweep(runs / "finished", *AXES) == 0
    return runs / "finished"


def test_weights_are_axes(finished):
    found = rows(finished)
    assert sorted(found) == sorted(
        f"{point}_ema{ema}" if "guide" not in point else f"{point.partition('_guide')[0]}_ema{ema}_guide{point.partition('_guide')[2]}"
        for ema in ("0.1", "raw")
        for point in ("g1_ddim3_leading", "g2_ddim3_leading", "g2_ddim3_leading_guide-b-step2", "g2_ddim3_leading_guide-b-step4")
    )  # fmt: skip
    assert {r["ema"] for r in found.values()} == {"0.1", "raw"}
    assert "guide_ema" not in next(iter(found.values())) and "checkpoint" not in next(iter(found.values()))
    for r in found.values():
        unet = ClassConditionalPipeline.from_pretrained("runs/a", ema=r["ema"]).unet
        assert r["model_hash"] == model_hash(unet)
        if "guide" in r["id"]:  # the guide has the EMA length of the model
            guide = Weights.parse(f"runs/b@{r['id'][-1]}:{r['ema']}")
            assert r["guide_hash"] == model_hash(ClassConditionalPipeline.from_pretrained(str(guide)).unet)
        else:
            assert r["guide_hash"] == ""
    page = (finished / "sweep.md").read_text(encoding="utf-8")
    assert "EMA 0.1" in page and "guide step 2" in page and "| swept: EMA " in page
    weights = json.loads((finished / "sweep.json").read_text())["sweep"]["weights"]
    assert len(weights) == 6 and all(f"`{record['hash']}`" in page for record in weights.values())


@pytest.mark.slow
def test_equal_weights_give_equal_numbers(finished, runs):
    alone = runs / "alone"
    assert sweep(alone, "runs/a@4:raw", "--guide", "runs/b@4") == 0
    assert sorted(rows(alone)) == ["g1_ddim3_leading", "g2_guide_ddim3_leading"]
    one = json.loads(
        (alone / "points/g2_guide_ddim3_leading/row.json").read_text()
    )  # a guide that is raw, as the model
    other = json.loads((finished / "points/g2_ddim3_leading_emaraw_guide-b-step4/row.json").read_text())
    assert one["metrics"] == other["metrics"] and one["guide_hash"] == other["guide_hash"]


@pytest.mark.slow
def test_guide_ema_and_checkpoints_and_runs(runs):
    more = ["runs/a", "runs/b", "--checkpoint", "*", "--guide", "runs/b", "--guide_ema", "raw,run"]
    assert sweep(runs / "all", *more) == 0
    found = rows(runs / "all")
    assert len(found) == 4 * (1 + 2)
    assert "g2_guide_ddim3_leading_a_step2_gemaraw" in found and "g1_ddim3_leading_b_step4" in found
    row = found["g2_guide_ddim3_leading_a_step2_gemaraw"]
    assert (row["run"], row["checkpoint"], row["guide"], row["guide_ema"]) == ("runs/a", "2", "runs/b", "raw")


def test_weights_may_be_added_and_not_changed(finished, runs):
    out = shutil.copytree(finished, runs / "more")
    before = {p: p.stat().st_mtime_ns for p in out.glob("points/*/row.json")}
    assert sweep(out, "runs/a", "--ema", "0.1,0.2") == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before and len(list(out.glob("points/*"))) == len(before) + 2
    weights = json.loads((out / "plan.json").read_text())["weights"]
    assert set(weights) == {"runs/a:0.1", "runs/a:raw", "runs/a:0.2"} | {
        f"runs/b/checkpoints/step-0000000{s}:{e}" for s in (2, 4) for e in ("0.1", "raw")
    }
    shutil.move("runs/a", "runs/elsewhere")
    try:
        shutil.copytree("runs/b", "runs/a")
        with pytest.raises(InputError, match=r"sweep with other settings .*runs/a:0.1"):
            sweep(out, "runs/a", "--ema", "0.1,0.2")
    finally:
        shutil.rmtree("runs/a")
        shutil.move("runs/elsewhere", "runs/a")


@pytest.mark.slow
def test_one_model_and_one_guide_are_in_memory(runs, monkeypatch):
    loaded = []

    def opened(real, path, ema, classes):
        gc.collect()
        assert sum(ref() is not None for ref, _ in loaded) <= 1  # the other role's
        pipe, what = real(path, ema, classes)
        loaded.append((weakref.ref(pipe.unet), f"{path}:{ema}"))
        return pipe, what

    for name in ("open_pipeline", "open_guide"):
        monkeypatch.setattr(models, name, partial(opened, getattr(models, name)))
    assert sweep(runs / "memory", *AXES) == 0
    assert len(loaded) == 2 * 3 + 2 * 3  # checked, then sampled; each model with its two guides
    grid = grid_of(["runs/a"], SweepRequest(ema=("0.1", "raw")))
    one = SweepModels("fp32", torch.device("cpu"), 4)
    assert one.model(grid.models[0]) is one.model(grid.models[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/a@9"], "no checkpoint of step 9"),
        (["runs/a@4", "--checkpoint", "2"], "is a checkpoint already"),
        (["runs/a", "--ema", "0.1,0.4"], "above 0 and at most 0.288"),
        (["runs/a", "--checkpoint", "last"], "expected steps such as"),
        (["runs/a", "--guide", "runs/b@7"], "no checkpoint of step 7"),
        (["runs/a", "digits"], "runs/a and digits have other classes"),
        (["runs/a", "--guide_ema", "0.1"], "there is none: give --guide"),
        (["runs/a", "--rank"], "compares several models, and there is one"),
        (["runs/a", "--negative", "null,random,time:0.5,lion"], "no class 'lion'"),
        (["digits", "--ema", "0.1,0.2"], "has the EMA weights of its run only"),
    ],
)
def test_wrong_weights_are_rejected_before_sampling(runs, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        sweep(tmp_path / "s", *words)
    assert not list((tmp_path / "s").rglob("*.npz"))


def test_single_commands_take_the_same_texts(runs, tmp_path, capsys):
    folder = str(tmp_path / "s")
    assert main(["sample", "runs/a@2:0.1", "--count", "1", "--steps", "2", "--out", folder, "--debug"]) == 0
    model = json.loads((tmp_path / "s/samples.json").read_text())["model"]
    expected = ClassConditionalPipeline.from_pretrained("runs/a/checkpoints/step-00000002", ema=0.1)
    assert model["hash"] == model_hash(expected.unet) and model["ema_length"] == 0.1
    assert main(["sample", "runs/a:0.1", "--ema", "0.2"]) == 2
    assert "name two EMA lengths" in capsys.readouterr().err


@pytest.mark.serial
@pytest.mark.slow
def test_killed_sweep_of_weights_resumes_to_the_same_table(runs, finished):
    out = runs / "killed"
    argv = ["sweep", *AXES, "--out", str(out), *SETTINGS]
    killed = Process(KILLED_AT, ["14", *argv], runs / "log")
    assert killed.wait() == -signal.SIGKILL, killed.printed()[-2000:]
    assert len(list(out.glob("points/*"))) == 4 and not (out / "sweep.csv").exists()
    assert sweep(out, *AXES) == 0
    assert (out / "sweep.csv").read_bytes() == (finished / "sweep.csv").read_bytes()
    for point in finished.glob("points/*/row.json"):
        assert (out / "points" / point.parent.name / "row.json").read_bytes() == point.read_bytes()


@pytest.mark.serial
@pytest.mark.slow
def test_two_processes_give_the_same_weights_table(runs, finished):
    out = runs / "two"
    assert "on 2 process(es)" in ranks(2, ["sweep", *AXES, "--out", out, *SETTINGS], runs)
    one, two = rows(finished), rows(out)
    assert list(one) == list(two)
    for name, row in one.items():
        for key, value in row.items():
            try:
                assert float(two[name][key]) == pytest.approx(float(value), rel=5e-4, abs=1e-9), (name, key)
            except ValueError:
                assert two[name][key] == value, (name, key)


@pytest.mark.slow
def test_later_commands_join_the_sweep(finished, runs):
    out = shutil.copytree(finished, runs / "joined")
    more = ["runs/a", "--ema", "raw", "--rule", "tcfg", "--guidance", "2", "--earlier"]
    assert sweep(out, *more) == 0  # one EMA length, named as where it varied
    found = rows(out)
    assert set(found) == set(rows(finished)) | {"g2_tcfg_ddim3_leading_emaraw"}
    page = (out / "sweep.md").read_text(encoding="utf-8")
    assert "## Each rule at its own best" in page and "not requested this time" not in page


def test_commas_separate_checkpoints_and_settings():
    args = sweep_command.parser().parse(["r", "--checkpoint", "200,400", "--heat_map", "scale,checkpoint"])
    what = request(args, SweepRequest)
    assert what.checkpoint == ("200", "400") and what.heat_map == ("scale", "checkpoint")
    assert request(sweep_command.parser().parse(["r", "--checkpoint", "*"]), SweepRequest).checkpoint == ("*",)
