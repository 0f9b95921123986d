"""PNGs are written by a thread while the next batch is sampled: the same files, and an error is raised."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_adagn.config import SpeedConfig
from diffusion_adagn.sampling import generate

STATE = SimpleNamespace(process_index=0, num_processes=1, is_main_process=False, device=torch.device("cpu"))


class Pipe:
    """Image i is of the value of its seed."""

    def __init__(self, look=lambda: None):
        self.look = look

    def set_progress_bar_config(self, **_):
        pass

    def sample(self, settings, class_plan, guide, seeds, output_type):
        self.look()
        return SimpleNamespace(images=np.stack([np.full((4, 4, 1), s / 255, np.float32) for s in seeds]))


def sample(out, pipe, count=5):
    request = generate.SampleRequest(batch_size=2, speed=SpeedConfig("fp32", "contiguous", "eager"))
    images = [generate.PlannedImage(i, None, i, 1.0, f"{i}.png") for i in range(count)]
    generate._sample(pipe, images, request, None, out, STATE)


def test_writing_overlaps_sampling(tmp_path, monkeypatch):
    save, sampled, calls = generate._save, threading.Event(), []

    def look():
        calls.append(1)
        if len(calls) == 2:
            sampled.set()

    def slow(batch, images, out):
        assert sampled.wait(10)
        save(batch, images, out)

    monkeypatch.setattr(generate, "_save", slow)
    sample(tmp_path, Pipe(look))
    for i in range(5):
        assert np.asarray(Image.open(tmp_path / f"{i}.png")).max() == i


def test_writing_errors_are_raised(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    calls = []
    monkeypatch.setattr(generate, "_save", full)
    with pytest.raises(OSError, match="No space left"):
        sample(tmp_path, Pipe(lambda: calls.append(1)))
    assert len(calls) == 2  # the next batch was under way
    with pytest.raises(OSError, match="No space left"):
        sample(tmp_path, Pipe(), count=1)
