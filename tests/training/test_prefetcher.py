"""Batches made ahead, images on the device or fetched by a thread: the same batches, the same runs, no thread left behind."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny_run import assert_same_run, environment, launch, losses, run

from diffusion_adagn.config import DataConfig, DiffusionConfig
from diffusion_adagn.data import ImageDataset, open_dataset
from diffusion_adagn.diffusion.schedule import make_process
from diffusion_adagn.training import loader, trainer, validation
from diffusion_adagn.training import prefetcher as prefetcher_module
from diffusion_adagn.training.image_fetcher import (
    DeviceImageCache,
    ImageFetcher,
    ThreadedImageFetcher,
    choose_image_fetcher,
    fits,
)
from diffusion_adagn.training.loader import BatchLoader
from diffusion_adagn.training.prefetcher import Prefetcher

CPU = torch.device("cpu")
PROCESS = make_process(DiffusionConfig())
KINDS = (ImageFetcher, DeviceImageCache, ThreadedImageFetcher)


@pytest.fixture(scope="module")
def digits():
    return open_dataset(DataConfig(), "train", progress=False)  # a part of its store


@pytest.fixture
def forced(monkeypatch):
    """Runs as on CUDA: pixels of this kind, batches made ahead."""

    def force(kind):
        monkeypatch.setattr(loader, "choose_image_fetcher", lambda dataset, device, where: kind(dataset, device))
        monkeypatch.setattr(trainer, "Prefetcher", partial(Prefetcher, early=True))

    return force


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("pixels")]


def assert_same_batch(one, other):
    for name in ("x0", "noise", "quantile", "labels", "indices"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert all(map(torch.equal, one.level, other.level))


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_prefetching_changes_no_batch(digits, kind, early):
    made = partial(BatchLoader, digits, 3, PROCESS, CPU, label_dropout=0.3, flip=True)
    plain, at = made(), [torch.arange(i, i + 24) for i in range(0, 12_000, 24)]
    with Prefetcher(made(pixels=kind(digits, CPU)), early) as feed:
        for i in (0, 1, 2, 3, 3, 2, 4, 5, 70, 71, 72, 0, 499):  # in order, again, back, a jump; an epoch has 71 of them
            assert_same_batch(feed.batch(at[i]), plain.batch(at[i]))
            feed.prefetch(*at[i + 1 : i + 3])
            if i % 2:
                time.sleep(0.002)  # long enough for the thread
        assert_same_batch(feed.batch(at[0][:5]), plain.batch(at[0][:5]))
    assert not threads()


def test_prefetched_batches_survive_other_requests(digits):
    asked = []
    batches = BatchLoader(digits, 0, PROCESS, CPU)
    real, batches.batch = batches.batch, lambda positions: asked.append(positions[0].item()) or real(positions)
    feed = Prefetcher(batches, early=True)
    feed.prefetch(torch.arange(4, 8), torch.arange(8, 12))
    for first in (0, 4):
        assert_same_batch(feed.batch(torch.arange(first, first + 4)), real(torch.arange(first, first + 4)))
    assert asked == [4, 0]


@pytest.mark.serial
@pytest.mark.parametrize("kind", [pytest.param(DeviceImageCache, marks=pytest.mark.slow), ThreadedImageFetcher])
def test_prefetching_run_resumes_exactly(tmp_path, monkeypatch, forced, kind):
    changes = {"training__gradient_accumulation": 2, "data__flip": "true"}
    run(tmp_path / "plain", **changes)
    forced(kind)
    assert run(tmp_path / "whole", **changes) == 0
    assert_same_run(tmp_path / "plain", tmp_path / "whole")

    real, calls = Prefetcher.batch, []

    def poisoned(self, positions):
        calls.append(positions)
        if len(calls) in (3, 8):  # a signal in the second step, and in the third after it
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, positions)

    monkeypatch.setattr(Prefetcher, "batch", poisoned)
    assert run(tmp_path / "parts", **changes) == 75 and not threads()
    assert run(tmp_path / "parts", "--resume", "auto", **changes) == 75
    assert run(tmp_path / "parts", "--resume", "auto", **changes) == 0 and not threads()
    assert_same_run(tmp_path / "plain", tmp_path / "parts")
    assert len(losses(tmp_path / "parts")) == 6


@pytest.mark.parametrize("kind", [pytest.param(DeviceImageCache, marks=pytest.mark.slow), ThreadedImageFetcher])
def test_nonfinite_step_with_prefetching(tmp_path, monkeypatch, capsys, forced, kind):
    real = BatchLoader.batch

    def poisoned(self, positions):
        batch = real(self, positions)
        batch.noise[(positions == 40) | (positions == 65)] = math.nan
        return batch

    monkeypatch.setattr(BatchLoader, "batch", poisoned)
    for out in ("plain", "forced"):
        assert run(tmp_path / out, training__gradient_accumulation=2) == 0
        output = capsys.readouterr().out
        assert "step 3 skipped" in output and "step 5 skipped" in output and "the output of conv_in" in output
        forced(kind)
    assert_same_run(tmp_path / "plain", tmp_path / "forced")


def test_thread_errors_reach_their_batch(digits, monkeypatch):
    batches = BatchLoader(digits, 0, PROCESS, CPU, pixels=ThreadedImageFetcher(digits, CPU))
    bad = batches.order(torch.arange(8, 12))
    real = ImageDataset.gather

    def gather(self, indices, out=None):
        if np.array_equal(indices, bad):
            raise OSError("the disk is gone")
        return real(self, indices, out)

    monkeypatch.setattr(ImageDataset, "gather", gather)
    with Prefetcher(batches, early=True) as feed:
        for first in (0, 4):
            feed.batch(torch.arange(first, first + 4))
            feed.prefetch(torch.arange(first + 4, first + 8), torch.arange(first + 8, first + 12))
            time.sleep(0.01)
        with pytest.raises(OSError, match="the disk is gone") as output:
            feed.batch(torch.arange(8, 12))
        assert {"gather", "_gathered"} <= {frame.name for frame in traceback.extract_tb(output.tb)}
    assert not threads()


def test_unreadable_images_stop_the_run(tmp_path, monkeypatch, forced):
    forced(ThreadedImageFetcher)
    monkeypatch.setattr(validation, "heldout_loss", None)
    real, calls = ImageDataset.gather, []

    def gather(self, indices, out=None):
        calls.append(len(calls))
        if len(calls) == 5:
            raise OSError("the disk is gone")
        return real(self, indices, out)

    monkeypatch.setattr(ImageDataset, "gather", gather)
    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path / "run", training__diagnostics_every=0)
    assert not threads()
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]  # the steps before it are done


def test_what_fits_goes_to_the_device(digits):
    size = len(digits) * 64
    assert fits(digits, 4 * size) and not fits(digits, 4 * size - 1)
    assert type(choose_image_fetcher(digits, CPU)) is ImageFetcher
    store = DeviceImageCache(digits, CPU).store
    assert store.dtype == torch.uint8 and np.array_equal(store.numpy(), digits.gather(range(len(digits)))[0])


def test_waiting_time_is_measured(digits, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(prefetcher_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow(positions):
        clock[0] += 5
        return positions

    batches = SimpleNamespace(batch=slow, device=CPU, order=lambda p: p, pixels=ImageFetcher(digits, CPU))
    feed = Prefetcher(batches, early=True)
    feed.batch(torch.arange(2))
    assert feed.wait_seconds == 5
    feed.prefetch(torch.arange(2, 4))
    assert clock == [10] and feed.batch(torch.arange(2, 4)).tolist() == [2, 3]
    assert feed.wait_seconds == 5


def test_run_reports_waiting_time(tmp_path, capsys):
    run(tmp_path / "run")
    assert "data      " in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    waits = [line["data_wait"] for line in lines if "loss" in line]
    assert len(waits) == 6 and all(0 < wait < 1 for wait in waits)


FORCED = """
from functools import partial
from diffusion_adagn.training import image_fetcher, loader, prefetcher, trainer
loader.choose_image_fetcher = lambda dataset, device, where: image_fetcher.ThreadedImageFetcher(dataset, device)
trainer.Prefetcher = partial(prefetcher.Prefetcher, early=True)
from diffusion_adagn.cli.main import script
script("train")
"""


@pytest.mark.serial
@pytest.mark.slow
def test_prefetching_processes_equal_one(tmp_path):
    run(tmp_path / "1", training__gradient_accumulation=4)
    program = tmp_path / "forced.py"
    program.write_text(FORCED)
    command = launch(tmp_path / "2", processes=2, training__gradient_accumulation=2)
    command = [str(program) if w.endswith("train.py") else w for w in command]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-4) and len(two) == 6


LEFT = """
import torch
from diffusion_adagn.config import DataConfig
from diffusion_adagn.data import open_dataset
from diffusion_adagn.training.image_fetcher import ThreadedImageFetcher
dataset = open_dataset(DataConfig(), "train", progress=False)
pixels = ThreadedImageFetcher(dataset, torch.device("cpu"))
pixels.prefetch(torch.arange(16))
raise SystemExit(3)
"""


@pytest.mark.slow
def test_unfinished_thread_does_not_block_exit(tmp_path):
    assert subprocess.run([sys.executable, "-c", LEFT], cwd=ROOT, timeout=60, check=False).returncode == 3
