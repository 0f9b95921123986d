"""How a checkpoint gets onto the disk: hashed while the next file is written, on Windows too, pruned later on a stop."""

import errno
import fcntl
import json
import os
import threading
import time

import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn.runs import checkpoint
from diffusion_adagn.runs.checkpoint import checkpoints, remove_old, save_checkpoint, verify
from diffusion_adagn.training.ema import EMA


@pytest.fixture(scope="module")
def parts():
    unet = tiny_unet().train()
    optimizer = torch.optim.AdamW(unet.parameters())
    unet(torch.ones(1, 1, 8, 8), 3, torch.tensor([1])).sample.square().sum().backward()
    optimizer.step()
    return unet, EMA(unet, 0.9).model, optimizer


def test_checkpoints_are_saved_on_windows(tmp_path, parts, monkeypatch):
    """Windows opens no folder, and syncs no file that is open for reading alone."""
    real_open, real_sync, synced = os.open, os.fsync, []

    def opened(path, flags, *rest, **named):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, flags, *rest, **named)

    def sync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(handle)
        real_sync(handle)

    monkeypatch.setattr(checkpoint, "WINDOWS", True)
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", sync)
    path = save_checkpoint(tmp_path, {"step": 1}, *parts)
    assert verify(path) is None and len(synced) == 5


def test_hashing_overlaps_writing(tmp_path, parts, monkeypatch):
    saving, finishing = checkpoint.save_file, checkpoint._sync_and_digest
    begun, threads = threading.Event(), []

    def slow(tensors, file):
        if file.name != "optimizer.safetensors":
            assert begun.wait(10)  # the hashing of the first file does not wait for the second
        saving(tensors, file)

    def finished(file):
        begun.set()
        threads.append(threading.current_thread())
        return finishing(file)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(checkpoint, "_sync_and_digest", finished)
    path = save_checkpoint(tmp_path, {"step": 1}, *parts)
    assert verify(path) is None and threading.main_thread() not in threads
    assert list(json.loads((path / "manifest.json").read_text())) == sorted(
        ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    )


def test_writer_thread_errors_are_raised(tmp_path, parts, monkeypatch):
    def full(handle):
        time.sleep(0.05)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(checkpoint.InputError, match="No space left"):
        save_checkpoint(tmp_path, {"step": 1}, *parts)
    assert not list(tmp_path.iterdir())


def test_a_stop_leaves_pruning_to_later(tmp_path, parts):
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step}, *parts)
    assert len(checkpoints(tmp_path)) == 2
    save_checkpoint(tmp_path, {"step": 3}, *parts)
    remove_old(tmp_path, keep=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003"]
