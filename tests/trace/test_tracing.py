"""`adagn trace` on the command line: runs, checkpoints, pipelines and imported networks."""

import functools
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line, tiny_unet

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_process, make_scheduler
from diffusion_adagn.evaluation.label_usage import label_check
from diffusion_adagn.interop.unet2d import from_unet2d, to_unet2d
from diffusion_adagn.models.conditioning import CONDITIONING
from diffusion_adagn.trace import tracing
from diffusion_adagn.trace.analysis import variance_fractions
from diffusion_adagn.trace.atlas import Atlas
from diffusion_adagn.trace.tracing import probed_timesteps

DIGITS = LabelSpace(tuple("0123456789"))


def saved(folder, labels=DIGITS, diffusion=DiffusionConfig(schedule="cosine"), **changes):  # noqa: B008
    """A pipeline folder of a tiny network without zero weights."""
    unet = tiny_unet(num_classes=labels.K or None, null_class=labels.has_null and bool(labels.K), **changes)
    ClassConditionalPipeline(unet, make_scheduler(diffusion), labels).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    argv = ["train", "--config", str(ROOT / "configs/digits.yaml"), "--output_dir", str(out), "--training.max_steps", "6",
            "--training.batch_size", "16", "--training.preview_every", "0", "--training.checkpoint_every", "3", "--model.model_channels", "16",
            "--model.num_head_channels", "16", "--model.norm_groups", "4"]  # fmt: skip
    assert main(argv) == 0
    return out


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(tracing, "MIX_COLUMNS", 1)
    monkeypatch.setattr(tracing, "SAMPLER_STEPS", 3)
    monkeypatch.setattr(tracing, "NUM_PROBED_TIMESTEPS", 2)
    monkeypatch.setattr(tracing, "label_check", functools.partial(label_check, evaluations=180))


def text_of(report):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", report.read_text(encoding="utf-8")))


def test_trace_of_a_run(run, tmp_path, capsys):
    out = tmp_path / "trace"
    argv = ["trace", str(run), "--out", str(out), "--timesteps", "8", "--images", "4"]
    assert main([*argv, "--compare", str(run / "checkpoints/step-00000003"), "--debug"]) == 0
    printed = capsys.readouterr().out
    assert str(out / "report.html") in printed and "held out of digits" in printed and "NOT" in printed
    atlas = Atlas.load(out / "atlas.npz")
    assert len(atlas.timesteps) == 8 and atlas.classes == [*DIGITS.names, "null"]
    assert atlas.model["source"] == str(run)
    report = text_of(out / "report.html")
    assert "--label_check" in report
    for image in ("map", "shares", "influence", "label_use"):
        assert (out / f"{image}.png").is_file()
    assert main([*argv, "--by", "resolution", "--ema", "raw"]) == 0  # again, into the same folder
    commands = re.findall(r"adagn \w+ (?:(?!adagn).)*", text_of(out / "report.html"))
    assert len(commands) >= 4 and all("--ema raw" in command for command in commands)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/x.tex").write_text("x")
    assert main([*argv[:2], "--out", str(tmp_path / "thesis")]) == 1
    assert "not a trace" in one_line(capsys.readouterr().err)


def test_label_check_exit_status(run, tmp_path, capsys):
    assert main(["trace", str(run), "--label_check"]) == 3  # six steps are too few to learn the label
    assert "NOT" in capsys.readouterr().out
    pipeline = saved(tmp_path / "pipeline")
    assert main(["trace", str(pipeline), "--label_check"]) == 4
    assert "--against" in capsys.readouterr().out
    assert main(["trace", str(pipeline), "--label_check", "--against", "digits"]) == 3
    assert main(["trace", str(run / "pipeline"), "--label_check"]) == 3  # images of its run
    assert main(["trace", str(run), "--label_check", "--data.heldout_fraction", "0.5"]) == 3
    assert "some of these images were trained on" in capsys.readouterr().out
    other = saved(tmp_path / "other", LabelSpace(("cat", "dog")))
    assert main(["trace", str(other), "--label_check", "--against", "digits"]) == 1
    assert "the model has 2 (cat, dog" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "conditioning",  # test_probes.py and test_report.py test the parts with every conditioning
    [k if k == "adagn" else pytest.param(k, marks=pytest.mark.slow) for k in CONDITIONING],
)
def test_each_conditioning_without_images(tmp_path, conditioning, capsys):
    folder = saved(tmp_path / "net", conditioning=conditioning)
    assert (
        main(["trace", str(folder), "--out", str(tmp_path / "t"), "--timesteps", "3", "--images", "2", "--debug"]) == 0
    )
    assert "sampled ones" in capsys.readouterr().out
    assert (tmp_path / "t/report.html").is_file()


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(LabelSpace(("only",)), marks=pytest.mark.slow),
        LabelSpace(("a", "b"), has_null=False),
        LabelSpace(()),
    ],
    ids=["K1", "no null", "K0"],
)
def test_trace_without_null_or_classes(tmp_path, labels):
    folder = saved(tmp_path / "net", labels)
    assert (
        main(["trace", str(folder), "--out", str(tmp_path / "t"), "--timesteps", "3", "--images", "2", "--debug"]) == 0
    )


@pytest.mark.parametrize(
    "process", [pytest.param("edm", marks=pytest.mark.slow), pytest.param("flow", marks=pytest.mark.slow)]
)
def test_trace_of_each_process(tmp_path, process, capsys, monkeypatch):
    monkeypatch.setattr(tracing, "label_check", functools.partial(label_check, evaluations=90))
    diffusion = DiffusionConfig(process=process, sigma_data=0.6 if process == "edm" else None)
    folder, out = saved(tmp_path / "net", diffusion=diffusion), tmp_path / "t"
    argv = ["trace", str(folder), "--timesteps", "3", "--images", "2", "--against", "digits"]
    assert main([*argv, "--out", str(out), "--debug"]) == 0
    report, chart = text_of(out / "report.html"), (out / "influence.svg").read_text(encoding="utf-8")
    # untrained, the label is not used; the charts are over noise levels
    assert "sigma = " in report and "noise level sigma" in chart and ("timestep t" in chart) == (process != "edm")
    assert ("t = " in report.split("What each number means")[0]) == (process == "flow")
    assert Atlas.load(out / "atlas.npz").sigma[0] == pytest.approx(0.002)
    assert main([*argv, "--label_check"]) == 3
    assert "90 held-out images" in capsys.readouterr().out


def test_label_check_uses_the_training_noise_of_the_run(run):
    pipe = ClassConditionalPipeline.from_pretrained(str(run))
    assert tracing.objective_of(pipe, run).process.same_levels(pipe.process)
    other = make_scheduler(DiffusionConfig(process="edm", sigma_data=0.5))
    edm = ClassConditionalPipeline(pipe.unet, other, pipe.labels)
    assert tracing.objective_of(edm, run).process is edm.process  # of another process than the run's


def test_imported_network_has_same_atlas():
    unet = tiny_unet(num_classes=10)
    back = from_unet2d(to_unet2d(unet), null_class=True)
    a, b = Atlas.of(unet, DIGITS, timesteps=4), Atlas.of(back, DIGITS, timesteps=4)
    for name in a.sites:
        assert np.array_equal(a.sites[name].fields["gamma"].values, b.sites[name].fields["gamma"].values)
        assert (
            variance_fractions(a.sites[name].fields["beta"])._asdict()
            == variance_fractions(b.sites[name].fields["beta"])._asdict()
        )


def test_eps_probes_need_signal():
    for prediction, last in (("eps", None), ("v", 999), ("x0", 999)):
        process = make_process(DiffusionConfig(schedule="cosine", prediction=prediction))
        grid = probed_timesteps(process, 3)
        assert len(grid) == 3 and grid[0] == 0
        if last is None:
            alpha = process.level(torch.arange(1000)).alpha
            assert alpha[grid[-1]] >= 0.05 > alpha[grid[-1] + 1]
        else:
            assert grid[-1] == last


def test_invalid_requests_are_rejected(run, capsys):
    assert main(["trace", str(run), "--timesteps", "0"]) == 2
    assert main(["trace", "runs/nothing"]) == 1
    assert main(["trace", str(run), "--compare", "runs/nothing", "--out", "x"]) == 1
