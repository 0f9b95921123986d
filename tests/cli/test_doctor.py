"""adagn doctor: one screen of output; status 1 and a remedy for each problem."""

import shutil
from collections import namedtuple

import pytest
import torch

from diffusion_adagn import ops
from diffusion_adagn.cli.main import main
from diffusion_adagn.runtime import distributed, doctor

Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def healthy_machine(tmp_path, monkeypatch):
    """A simulated machine without a GPU and without problems. Returns its cache folder."""
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    monkeypatch.setattr(distributed, "no_gpu_note", lambda: "")
    monkeypatch.setattr(ops, "unsupported_reason", lambda *_, **__: "")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(2**40, 0, 2**40))
    return tmp_path / "cache"


def run(capsys, *argv):
    status = main(["doctor", *argv])
    return status, capsys.readouterr().out


def test_healthy_machine_fits_one_screen(healthy_machine, capsys):
    (healthy_machine / "judges" / "one").mkdir(parents=True)
    (healthy_machine / "judges" / "one" / "weights").write_bytes(bytes(3 * 2**20))
    (healthy_machine / "digits-train-0123456789abcdef").mkdir()
    (healthy_machine / "digits-train-0123456789abcdef" / "images.npy").write_bytes(bytes(2**21))
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
    assert not list(healthy_machine.glob(".doctor*"))


def test_unused_driver(healthy_machine, capsys, monkeypatch):
    monkeypatch.undo()  # the real note
    monkeypatch.setattr(ops, "unsupported_reason", lambda *_, **__: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "_has_nvidia_driver", lambda: True)
    status, out = run(capsys)
    assert status == 1 and "problem   No GPU found" in out
    assert run(capsys, "--device", "cpu")[1].count("No GPU found") == 0


def test_unusable_operator(healthy_machine, capsys, monkeypatch):
    monkeypatch.setattr(ops, "unsupported_reason", lambda *_, **__: "there is no C++ compiler.")
    status, out = run(capsys)
    assert status == 1 and "there is no C++ compiler" in out and "no problems found" not in out


def test_outdated_package(healthy_machine, capsys, monkeypatch):
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


def test_full_disk(healthy_machine, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(2**40, 0, 2**20))
    status, out = run(capsys)
    assert status == 1 and "1.0 MiB free, 2.0 GiB is expected" in out


def test_unwritable_cache(healthy_machine, capsys):
    healthy_machine.write_text("a file")
    status, out = run(capsys)
    assert status == 1 and "set DIFFUSION_ADAGN_CACHE to another folder" in out


def test_failing_check_does_not_stop_others(healthy_machine, capsys, monkeypatch):
    def broken(_):
        raise RuntimeError("no such card")

    monkeypatch.setattr(doctor, "_memory", broken)
    status, out = run(capsys)
    assert status == 1 and "memory: RuntimeError: no such card" in out and "MiB  classifiers" in out


def test_missing_device(healthy_machine, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out = run(capsys, "--device", "cuda")
    assert status == 1 and out.count("there is no CUDA GPU") == 1
