"""Power-function EMA of runs: any length afterwards, at any checkpoint; resumed, extended, limited runs; `adagn ema`."""

import json
import shutil
import subprocess
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import one_line
from tiny_run import launch, run, snapshots, weights

from diffusion_adagn import ClassConditionalPipeline, InputError
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import TrainingConfig
from diffusion_adagn.runs.ema_snapshots import saved_averages, snapshot_count
from diffusion_adagn.runs.power_ema import MAX_ERROR, exponent, fit
from diffusion_adagn.runs.recorded import default_folder
from diffusion_adagn.training.ema import PowerEMA
from diffusion_adagn.training.snapshots import describe_snapshots

LENGTHS = (0.03, 0.04, 0.07, 0.13, 0.18, 0.25)
QUICK = {"training__batch_size": 4, "training__diagnostics_every": 0}


class BruteForce:
    """Averages at each of `ends`, of the weights of every step, with the exact shares of their profiles; in float64."""

    def __init__(self, ends):
        self.sums = {(end, length): 0 for end in ends for length in LENGTHS}

    def add(self, model, step):
        weights = vector(model)
        for end, length in self.sums:
            if step <= end:
                g = exponent(length) + 1
                self.sums[end, length] += ((step / end) ** g - ((step - 1) / end) ** g) * weights

    def error(self, end, length, unet):
        exact = self.sums[end, length]
        return float((vector(unet) - exact).norm() / exact.norm())


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


@contextmanager
def brute_force(ends):
    """What the runs of this process add the weights of each step to."""
    brute, update = BruteForce(ends), PowerEMA.update

    def observed(self, model, step):
        update(self, model, step)
        brute.add(model, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PowerEMA, "update", observed)
        yield brute


def measured(out, end, brute, lengths=LENGTHS):
    """The relative L2 error of each length at a checkpoint, and the predicted one."""
    checkpoint = out / f"checkpoints/step-{end:08d}"
    saved = saved_averages(checkpoint)
    predicted = fit(saved.averages, end, lengths)[1]
    errors = [
        brute.error(end, length, ClassConditionalPipeline.from_pretrained(checkpoint, ema=length).unet)
        for length in lengths
    ]
    return np.array(errors), predicted


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of 24 steps with 12 snapshots, and its exact averages. A test that changes it copies it."""
    folder = tmp_path_factory.mktemp("power_ema")
    changes = {"training__checkpoint_every": 16, "training__ema_snapshots": 12}
    with brute_force((16, 24)) as brute:
        assert run(folder / "runs/tiny", training__max_steps=24, **changes, **QUICK) == 0
    return folder / "runs/tiny", brute


def test_any_length_at_every_checkpoint(tiny):
    out, brute = tiny
    assert len(snapshots(out)) == 12
    for end, lengths in ((16, LENGTHS[::5]), (24, LENGTHS)):
        errors, predicted = measured(out, end, brute, lengths)
        assert (errors < 0.001).all() and (predicted < 0.001).all()
    tracked = ClassConditionalPipeline.from_pretrained(out, ema=0.05)  # pipeline/ has other weights
    stored = weights(out, "power_ema")
    assert all(torch.allclose(p, stored[f"0.05/{n}"], atol=1e-6) for n, p in tracked.unet.named_parameters())
    assert tracked.config.ema_length == 0.05


def test_what_cannot_be_made_is_rejected(tiny, tmp_path, capsys):
    out = shutil.copytree(tiny[0], tmp_path / "run")
    with pytest.raises(InputError, match=r"ema: expected a length above 0 .* got 0.4"):
        ClassConditionalPipeline.from_pretrained(out, ema=0.4)
    with pytest.raises(InputError, match="holds the EMA weights only"):
        ClassConditionalPipeline.from_pretrained(out / "pipeline", ema=0.1)
    for words in (["--ema", "0.4"], ["--ema", "often"], ["--weights", "mean"]):
        assert main(["sample", str(out), *words]) == 2
        assert "--ema: expected a length above 0 and at most 0.288" in one_line(capsys.readouterr().err)
    (out / "ema/step-00000018.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match=r"step-00000018.safetensors cannot be read .* remove the file"):
        ClassConditionalPipeline.from_pretrained(out, ema=0.07)
    (out / "ema/step-00000018.safetensors").unlink()
    ClassConditionalPipeline.from_pretrained(out, ema=0.07)
    shutil.rmtree(out / "ema")
    ClassConditionalPipeline.from_pretrained(out, ema=0.05)
    with pytest.raises(
        InputError, match=r"the error would be .* The shortest possible length here is 0.0.*, the longest 0.1"
    ):
        ClassConditionalPipeline.from_pretrained(out, ema=0.2)


def test_a_resumed_run_continues_the_averages(tmp_path):
    """What was written after the checkpoint goes, and an extended run keeps its spacing."""
    changes = QUICK | {"training__checkpoint_every": 3, "training__ema_snapshots": 3, "model__channel_mult": 1}
    changes |= {"model__attention_resolutions": 8}
    assert run(tmp_path / "whole", training__max_steps=6, **changes) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step-00000006")
    (tmp_path / "parts/ema/.1234abcd.step-00000009.safetensors").touch()  # of a write that was killed
    (tmp_path / "parts/ema/step-00000006.safetensors").write_bytes(b"stale")
    for folder in ("whole", "parts"):
        assert main(["train", "--resume", str(tmp_path / folder), "--training.max_steps", "9"]) == 0
    one, other = snapshots(tmp_path / "whole"), snapshots(tmp_path / "parts")
    assert one == other and sorted(one) == [f"step-{s:08d}.safetensors" for s in (4, 6, 8)]
    a, b = weights(tmp_path / "whole", "power_ema"), weights(tmp_path / "parts", "power_ema")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_disk_use_is_printed_and_limited(tmp_path, capsys):
    assert run(tmp_path / "few", training__max_steps=2, training__ema_snapshots_gb=0.01, **QUICK) == 0
    assert "EMA of 0.05 and 0.1 for --ema LENGTH; at most 13 snapshots, 0.00" in capsys.readouterr().out
    assert run(tmp_path / "none", training__max_steps=2, training__ema_snapshots=0, **QUICK) == 0
    assert "no EMA lengths are tracked (training.ema_snapshots 0)" in capsys.readouterr().out
    assert not (tmp_path / "none/ema").exists()
    assert not (tmp_path / "none/checkpoints/step-00000002/power_ema.safetensors").exists()
    for which in ("model", "ema"):  # tracking changes nothing else
        a, b = weights(tmp_path / "few", which), weights(tmp_path / "none", which)
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("parameters", "count", "text"),
    [
        (100_000, 64, "EMA of 0.05 and 0.1 for --ema LENGTH; at most 64 snapshots, 0.026 GB on disk"),
        (1_000_000, 25, "at most 25 snapshots, 0.1 GB on disk (64 would be 0.26 GB, more than training.ema_snapshots_gb 0.1)"),
        (100_000_000, 0, "no EMA lengths are tracked: training.ema_snapshots_gb 0.1 has no room for a snapshot of 0.40 GB"),
    ],
)  # fmt: skip
def test_disk_use_by_size(parameters, count, text):
    training = TrainingConfig(ema_snapshots_gb=0.1)
    assert snapshot_count(training, parameters) == count
    assert text in describe_snapshots(training, parameters)


def test_the_command_compares_lengths(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/tiny").symlink_to(tiny[0])
    assert main(["ema", "runs/tiny", "--lengths", "0.1,0.2", "--out", "e", "--debug"]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "e/ema.json").read_text())
    losses = {m["ema"]: m["loss"] for m in record["measured"]}
    assert list(losses) == [0.1, 0.2, "run", "raw"]
    assert losses[record["best"]] == min(losses[length] for length in (0.1, 0.2))
    lowest = min(losses, key=losses.get)
    assert f"adagn sample runs/tiny --ema {lowest}\n" in printed
    assert ("No length has a lower loss than the weights" in printed) == (lowest in ("run", "raw"))
    assert (tmp_path / "e/ema.png").stat().st_size > 3000
    # sampling records the length, and has the weights that were measured
    assert (
        main(["sample", "runs/tiny", "--ema", "0.1", "--classes", "1", "--count", "1", "--steps", "2", "--out", "s"])
        == 0
    )
    model = json.loads((tmp_path / "s/samples.json").read_text())["model"]
    assert model["ema_length"] == 0.1
    assert model["hash"] == record["measured"][0]["hash"] != record["measured"][2]["hash"]
    assert main(["ema", "runs/tiny/pipeline"]) == 1
    assert "is not a run or a checkpoint" in capsys.readouterr().err
    assert main(["ema", "runs/tiny", "--lengths", "0.1,0.4"]) == 2


def test_default_folders_name_the_weights(tiny, monkeypatch):
    monkeypatch.chdir(tiny[0].parent.parent)
    names = {ema: default_folder("samples", "runs/tiny", ema).name for ema in ("run", "raw", 0.13)}
    assert names == {"run": "step-00000024", "raw": "step-00000024-raw", 0.13: "step-00000024-ema-0.13"}


@pytest.mark.slow
def test_digits_of_400_steps(tmp_path):
    """The recipe with batches of 8, which are noisier: at 200, 300 and 400 steps, and extended to 500."""
    ends = (200, 300, 400, 500)
    out = str(tmp_path / "run")
    quiet = [f"--training.{key}={value}" for key, value in
             {"batch_size": 8, "preview_every": 0, "diagnostics_every": 0, "heldout_every": 0, "checkpoint_every": 100, "keep_checkpoints": 9}.items()]  # fmt: skip
    with brute_force(ends) as brute:
        assert main(["train", "digits", "--output_dir", out, *quiet]) == 0
        for end in ends[:3]:
            errors, predicted = measured(tmp_path / "run", end, brute)
            print(end, errors, predicted)
            assert (errors < 0.01).all() and (predicted < MAX_ERROR).all()
            assert (errors < 2 * predicted + 1e-5).all()
        assert main(["train", "--resume", out, "--training.max_steps", "500"]) == 0
        errors, predicted = measured(tmp_path / "run", 500, brute)
        print(500, errors, predicted)
        assert (errors < 0.01).all() and len(snapshots(tmp_path / "run")) == 64


@pytest.mark.slow
def test_two_processes_write_the_same_snapshots(tmp_path):
    """The main process writes; gradients are summed in another order, so that the last digits differ."""
    for count in (1, 2):
        words = launch(tmp_path / str(count), processes=count, training__max_steps=8, training__ema_snapshots=4)
        subprocess.run(words, check=True, timeout=300, capture_output=True)
    assert len(snapshots(tmp_path / "1")) == 4
    assert sorted(snapshots(tmp_path / "1")) == sorted(snapshots(tmp_path / "2"))
    one, two = (ClassConditionalPipeline.from_pretrained(tmp_path / n, ema=0.07).unet for n in ("1", "2"))
    assert float((vector(one) - vector(two)).norm() / vector(one).norm()) < 1e-3
