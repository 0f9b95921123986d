"""Steps whose loss or gradient is not finite; checkpoints that are corrupted, or cannot be written."""

import json
import math
import os
import shutil
import subprocess

import pytest
import torch
from conftest import tiny_unet
from safetensors.torch import load_file

from diffusion_adagn.config import read_config
from diffusion_adagn.errors import InputError
from diffusion_adagn.runs.checkpoint import verify
from diffusion_adagn.runs.layout import checkpoints
from diffusion_adagn.training import train as train_module
from diffusion_adagn.training.loader import BatchLoader
from diffusion_adagn.training.nonfinite import find_nonfinite

TINY = {
    "data.source": "digits",
    "training.max_steps": "8",
    "training.batch_size": "4",
    "speed.precision": "fp32",
    "training.checkpoint_every": "2",
    "training.keep_checkpoints": "9",
    "training.log_every": "1",
    "training.preview_every": "0",
    "training.diagnostics_every": "0",
    "model.model_channels": "16",
    "model.num_head_channels": "16",
    "model.norm_groups": "4",
    "model.channel_mult": "1",
    "model.num_res_blocks": "1",
}


def config(out, **changes):
    given = TINY | {k.replace("__", "."): str(v) for k, v in changes.items()} | {"output_dir": str(out)}
    return read_config(None, given)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


def poison(monkeypatch, steps, batch_size=4):
    """The noise of these steps' first images is NaN."""
    real = BatchLoader.batch

    def poisoned(self, positions):
        batch = real(self, positions)
        bad = torch.tensor([p % batch_size == 0 and p // batch_size in steps for p in positions.tolist()])
        batch.noise[bad] = math.nan
        return batch

    monkeypatch.setattr(BatchLoader, "batch", poisoned)


# ---------------------------------------------------------------------- not finite


def test_nonfinite_step_is_skipped(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3, 5})  # the 4th and the 6th step
    assert train_module.train(config(tmp_path / "run", training__checkpoint_every=1)) == 0
    saved = {int(c.name[5:]): weights(c) for c in checkpoints(tmp_path / "run/checkpoints")}
    assert sorted(saved) == [1, 2, 3, 5, 7, 8]  # none after a faulty step
    output = capsys.readouterr().out
    assert "step 4 skipped: its loss is nan" in output and "the output of conv_in" in output
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found if "left_out" in line] == [4, 6]
    assert all(math.isfinite(line["loss"]) for line in found if "loss" in line)
    # step 5 starts from what step 3 left: as if step 4's update had been nothing
    assert all(torch.isfinite(w).all() for w in saved[8].values())


def test_skipped_step_changes_no_other(tmp_path, monkeypatch):
    """By hand: AdamW over the sound steps alone."""
    saved = []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: saved.append(1) or real(self, *a, **k))
    poison(monkeypatch, {3})
    train_module.train(config(tmp_path / "run"))
    assert len(saved) == 7
    optimizer = load_file(checkpoints(tmp_path / "run/checkpoints")[-1] / "optimizer.safetensors")
    assert {float(v) for k, v in optimizer.items() if k.endswith("/step")} == {7.0}


def test_too_many_nonfinite_steps_stop(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3, 4, 5, 6, 7})
    with pytest.raises(InputError, match=r"3 consecutive steps .* skipped .*--init_from"):
        train_module.train(config(tmp_path / "run", training__max_nonfinite_steps=3))
    assert [c.name for c in checkpoints(tmp_path / "run/checkpoints")] == ["step-00000002"]
    # resumed, it comes to the same end at the same step: the count goes with the checkpoint
    with pytest.raises(InputError, match="step 6"):
        train_module.train(config(tmp_path / "run", training__max_nonfinite_steps=3), resume=True)


def test_the_first_bad_value_is_found():
    unet = tiny_unet()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([0, 2])

    def loss():
        return unet(x, t, y).sample.square().flatten(1).mean(1)

    assert find_nonfinite(unet, [loss]) is None
    x[0, 0, 0, 0] = math.inf
    assert find_nonfinite(unet, [loss]) == "the output of conv_in"
    x[0, 0, 0, 0] = 0
    with torch.no_grad():
        unet.get_parameter("conv_out.weight")[0, 0, 0, 0] = math.nan
    assert find_nonfinite(unet, [loss]) == "the weights of conv_out.weight"
    unet = tiny_unet()
    deep = next(n for n, m in unet.named_modules() if n.startswith("middle") and isinstance(m, torch.nn.Conv2d))
    layer = unet.get_submodule(deep)
    handle = layer.register_forward_hook(lambda m, i, o: o * math.nan)
    assert find_nonfinite(unet, [loss]).startswith(f"the output of {deep}"[:14])
    handle.remove()
    handle = unet.conv_out.register_full_backward_pre_hook(lambda m, g: (g[0] * math.inf,))
    assert find_nonfinite(unet, [loss]).startswith("the gradient of conv_out")
    handle.remove()
    assert all(p.grad is None for p in unet.parameters())


# ---------------------------------------------------------------------- corrupted, and never written


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train_module.train(config(out)) == 0
    return out


def hurt_shorter(checkpoint):
    file = checkpoint / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def hurt_one_bit(checkpoint):
    file = checkpoint / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))


def hurt_missing(checkpoint):
    (checkpoint / "model.safetensors").unlink()


def hurt_state(checkpoint):
    text = (checkpoint / "state.json").read_text()
    (checkpoint / "state.json").write_text(text.replace('"step": 8', '"step": 9'))


def hurt_manifest(checkpoint):
    (checkpoint / "manifest.json").write_text("{")


@pytest.mark.parametrize("hurt", [hurt_shorter, hurt_one_bit, hurt_missing, hurt_state, hurt_manifest])
def test_corrupted_checkpoint_falls_back(whole, tmp_path, hurt, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    hurt(out / "checkpoints/step-00000008")
    assert verify(out / "checkpoints/step-00000008")
    before = weights(whole / "checkpoints/step-00000008")
    assert train_module.train(config(out), resume=True) == 0
    output = capsys.readouterr().out
    assert "step-00000008 is corrupted" in output and "resuming from" in output and "step-00000006" in output
    after = weights(out / "checkpoints/step-00000008")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert verify(out / "checkpoints/step-00000008") is None
    assert [line["step"] for line in lines(out)] == [line["step"] for line in lines(whole)]


def test_all_corrupted_checkpoints_are_an_error(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for checkpoint in checkpoints(out / "checkpoints"):
        hurt_shorter(checkpoint)
    with pytest.raises(InputError, match="every checkpoint"):
        train_module.train(config(out), resume=True)
    assert len(checkpoints(out / "checkpoints")) == 4


def test_sampling_verifies_its_checkpoint(whole, tmp_path):
    from diffusion_adagn.sampling.load import open_pipeline

    out = tmp_path / "run"
    shutil.copytree(whole, out)
    open_pipeline(out / "checkpoints/step-00000006")
    file = out / "checkpoints/step-00000006/ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"step-00000006 is corrupted .*step-00000008"):
        open_pipeline(out / "checkpoints/step-00000006")


def test_pruning_keeps_latest_checkpoints(tmp_path):
    train_module.train(config(tmp_path / "run", training__keep_checkpoints=1, training__keep_every=4))
    assert [c.name for c in checkpoints(tmp_path / "run/checkpoints")] == ["step-00000004", "step-00000008"]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_permanent_checkpoints_have_their_own_interval(tmp_path):
    train_module.train(
        config(tmp_path / "run", training__checkpoint_every=4, training__keep_checkpoints=1, training__keep_every=3)
    )
    assert [c.name[-1] for c in checkpoints(tmp_path / "run/checkpoints")] == ["3", "6", "8"]


def test_leftovers_of_the_killed_are_removed(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.copytree(out / "checkpoints/step-00000008", out / "checkpoints/.step-00000010.new")
    (out / "checkpoints/.step-00000010.new/state.json").unlink()
    train_module.train(config(out, training__max_steps=10), resume=True)
    assert not list((out / "checkpoints").glob(".*"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB, for a run of about 0.9 MB a checkpoint."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk_leaves_last_checkpoint(small_disk):
    out = small_disk / "run"
    with pytest.raises(InputError, match=r"cannot be written .*newest complete checkpoint is .*Free disk space"):
        train_module.train(
            config(out, training__max_steps=40, training__checkpoint_every=1, training__keep_checkpoints=99)
        )
    left = checkpoints(out / "checkpoints")
    assert left and all(verify(c) is None for c in left)
    assert not list((out / "checkpoints").glob(".*"))
    for old in left[:-1]:
        shutil.rmtree(old)
    done = int(left[-1].name[5:])
    assert train_module.train(config(out, training__max_steps=done + 1, training__keep_checkpoints=1), resume=True) == 0


def test_unwritable_run_folder(small_disk, tmp_path):
    out = small_disk / "run"
    train_module.train(config(out, training__max_steps=2))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        with pytest.raises((InputError, OSError)) as error:
            train_module.train(config(out, training__max_steps=4), resume=True)
        assert isinstance(error.value, InputError) or error.value.errno == 30
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert [verify(c) for c in checkpoints(out / "checkpoints")] == [None]
    assert os.path.isfile(out / "config.yaml")
