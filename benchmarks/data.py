"""Batches from the store: uint8 images gathered by index, on one core."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from . import ours
from .timing import Clock, Deadline, interleave, paired, summary

IMAGES, SIDE, BATCH = 50_000, 32, 256  # as in CIFAR-10


def measure(clock: Clock, rounds: int, sample_seconds: float = 0.2, count: int = IMAGES) -> dict:
    """Images per second of ImageDataset.gather, of numpy's and torch's indexing, and of stacking single images.

    The images are in a file that is opened by memory map, as in the store. The orders are drawn before timing.
    """
    draw = np.random.RandomState(0)
    images = draw.randint(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    labels = draw.randint(0, 10, count).astype(np.int64)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.npy"
        np.save(file, images)
        store = np.load(file, mmap_mode="r").view(np.ndarray)
        dataset = ours.dataset(store, labels, 10)
        order = draw.permutation(count)
        batches = [order[start : start + BATCH] for start in range(0, count, BATCH)]
        tensors = torch.from_numpy(images), torch.from_numpy(labels)

        buffer = np.empty((BATCH, SIDE, SIDE, 3), np.uint8)

        def epoch(take):
            def run() -> None:  # a batch is freed before the next: new pages cost more than copying
                for batch in batches:
                    take(batch)

            return run

        calls = {
            "ImageDataset.gather": epoch(
                lambda rows: dataset.gather(rows, out=buffer[: len(rows)])
            ),  # as training calls it
            "numpy indexing": epoch(lambda rows: (store[rows], labels[rows])),
            "torch index_select": epoch(lambda rows: [v.index_select(0, torch.from_numpy(rows)) for v in tensors]),
            "single images, stacked": epoch(lambda rows: (np.stack([store[i] for i in rows]), labels[rows])),
        }
        _check(dataset, images, labels, batches[0])
        cpu = Clock("cpu", clock.threads)
        for call in calls.values():
            call()
        samples = interleave(calls, cpu, rounds, sample_seconds, Deadline(), "data")
    rows = []
    for name, taken in samples.items():
        row = {"name": name, "not_measured": None} | summary(taken)
        rows.append(row | {"per_s": count / row["median_s"]})
    first, *others = samples
    ratios = [{"ours": first, "peer": name} | paired(samples[first], samples[name]) for name in others]
    return {"rows": rows, "ratios": ratios, "not_measured": []}


def _check(dataset, images: np.ndarray, labels: np.ndarray, batch: np.ndarray) -> None:
    pixels, ids = dataset.gather(batch)
    if not (np.array_equal(np.asarray(pixels), images[batch]) and np.array_equal(np.asarray(ids), labels[batch])):
        raise AssertionError("ImageDataset.gather returns wrong images: nothing is measured")
