"""Batches out of the store: uint8 pictures gathered by index, on one core."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from . import ours
from .timing import Clock, Deadline, interleave, paired, summary

PICTURES, SIDE, BATCH = 50_000, 32, 256  # as CIFAR-10


def measure(clock: Clock, rounds: int, sample_seconds: float = 0.2, pictures: int = PICTURES) -> dict:
    """Pictures a second of ImageDataset.gather, of numpy's and torch's indexing, and of stacking picture by picture.

    The pictures lie in a file, opened by memory map as the store does, and every order is drawn before it is timed.
    """
    draw = np.random.RandomState(0)
    images = draw.randint(0, 256, (pictures, SIDE, SIDE, 3), dtype=np.uint8)
    labels = draw.randint(0, 10, pictures).astype(np.int64)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.npy"
        np.save(file, images)
        store = np.load(file, mmap_mode="r").view(np.ndarray)
        dataset = ours.dataset(store, labels, 10)
        order = draw.permutation(pictures)
        batches = [order[at : at + BATCH] for at in range(0, pictures, BATCH)]
        tensors = torch.from_numpy(images), torch.from_numpy(labels)

        room = np.empty((BATCH, SIDE, SIDE, 3), np.uint8)

        def epoch(take):
            def run() -> None:  # a batch is let go before the next: new pages cost more than the copying
                for batch in batches:
                    take(batch)

            return run

        calls = {
            "ImageDataset.gather": epoch(lambda at: dataset.gather(at, out=room[: len(at)])),  # as training calls it
            "numpy indexing": epoch(lambda at: (store[at], labels[at])),
            "torch index_select": epoch(lambda at: [v.index_select(0, torch.from_numpy(at)) for v in tensors]),
            "picture by picture, stacked": epoch(lambda at: (np.stack([store[i] for i in at]), labels[at])),
        }
        _check(dataset, images, labels, batches[0])
        cpu = Clock("cpu", clock.threads)
        for call in calls.values():
            call()
        samples = interleave(calls, cpu, rounds, sample_seconds, Deadline(), "data")
    rows = []
    for name, taken in samples.items():
        row = {"name": name, "not_measured": None} | summary(taken)
        rows.append(row | {"per_s": pictures / row["median_s"]})
    first, *others = samples
    found = [{"ours": first, "peer": name} | paired(samples[first], samples[name]) for name in others]
    return {"rows": rows, "ratios": found, "not_measured": []}


def _check(dataset, images: np.ndarray, labels: np.ndarray, batch: np.ndarray) -> None:
    pixels, ids = dataset.gather(batch)
    if not (np.array_equal(np.asarray(pixels), images[batch]) and np.array_equal(np.asarray(ids), labels[batch])):
        raise AssertionError("ImageDataset.gather gives other pictures than it was asked for: nothing is measured")
