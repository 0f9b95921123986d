"""adagn doctor: one screen, status 1 where something is wrong, with what to do."""

import shutil
from collections import namedtuple

import pytest
import torch

from diffusion_adagn import ops
from diffusion_adagn.cli.main import main
from diffusion_adagn.runtime import distributed, doctor

Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def sound(tmp_path, monkeypatch):
    """A machine without a GPU where all is well, whatever the one of the tests is."""
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    monkeypatch.setattr(distributed, "no_gpu_note", lambda: "")
    monkeypatch.setattr(ops, "unsupported_reason", lambda *_, **__: "")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(2**40, 0, 2**40))
    return tmp_path / "cache"


def run(capsys, *argv):
    status = main(["doctor", *argv])
    return status, capsys.readouterr().out


def test_a_sound_machine_fits_one_screen(sound, capsys):
    (sound / "judges" / "one").mkdir(parents=True)
    (sound / "judges" / "one" / "weights").write_bytes(bytes(3 * 2**20))
    (sound / "digits-train-0123456789abcdef").mkdir()
    (sound / "digits-train-0123456789abcdef" / "images.npy").write_bytes(bytes(2**21))
    status, out = run(capsys)
    assert status == 0 and out.endswith("no problems found\n") and len(out.splitlines()) <= 24
    for word in (
        f"torch {torch.__version__}",
        "self-check passed",
        "3.0 MiB  classifiers",
        "2.0 MiB  decoded data",
        "1024.0 GiB free",
    ):
        assert word in out
    assert not list(sound.glob(".doctor*"))


def test_a_driver_that_nothing_uses(sound, capsys, monkeypatch):
    monkeypatch.undo()  # the real note
    monkeypatch.setattr(ops, "unsupported_reason", lambda *_, **__: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "_has_nvidia_driver", lambda: True)
    status, out = run(capsys)
    assert status == 1 and "problem   No GPU found" in out
    assert run(capsys, "--device", "cpu")[1].count("No GPU found") == 0


def test_an_operator_that_cannot_be_used(sound, capsys, monkeypatch):
    monkeypatch.setattr(ops, "unsupported_reason", lambda *_, **__: "there is no C++ compiler.")
    status, out = run(capsys)
    assert status == 1 and "there is no C++ compiler" in out and "no problems found" not in out


def test_a_version_that_is_too_old(sound, capsys, monkeypatch):
    have = doctor._version
    monkeypatch.setattr(
        doctor, "requires", lambda _: ["torch>=2.11", "diffusers>=0.38", "einops>=0.8", "pytest; extra == 'test'"]
    )
    monkeypatch.setattr(doctor, "_version", lambda name: {"torch": "2.9.0+cpu", "einops": None}.get(name, have(name)))
    status, out = run(capsys)
    assert status == 1 and "2.9.0+cpu is installed, >=2.11 is expected: pip install 'torch>=2.11'" in out
    assert (
        "einops is not installed: pip install 'einops>=0.8'" in out and "pytest 8" not in out and "pytest (" not in out
    )


def test_a_disk_that_is_full(sound, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(2**40, 0, 2**20))
    status, out = run(capsys)
    assert status == 1 and "1.0 MiB free, 2.0 GiB is expected" in out


def test_a_cache_that_cannot_be_written(sound, capsys):
    sound.write_text("a file")
    status, out = run(capsys)
    assert status == 1 and "set DIFFUSION_ADAGN_CACHE to another folder" in out


def test_a_check_that_fails_leaves_the_others(sound, capsys, monkeypatch):
    def broken(_):
        raise RuntimeError("no such card")

    monkeypatch.setattr(doctor, "_memory", broken)
    status, out = run(capsys)
    assert status == 1 and "memory: RuntimeError: no such card" in out and "MiB  classifiers" in out


def test_a_device_that_is_missing(sound, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out = run(capsys, "--device", "cuda")
    assert status == 1 and out.count("there is no CUDA GPU") == 1
