"""ImageDataset: the decoded images of one part, for torch and the training loop.

Separate from store.py, which reports errors without torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..diffusion.loss import normalize_images
from ..errors import InputError
from ..labels import LabelSpace


@dataclass(frozen=True)
class ImageDataset(Dataset):
    """One part of a data set: a map-style torch Dataset, for a DataLoader with any num_workers.

    dataset[i] is (image, label): float32 [C, H, W] in [-1, 1], the network's input, and an int. Images are not mirrored
    (`data.flip` applies to training only) or shuffled. `gather` reads many images at once, as uint8. A pickled data set
    contains the path of the store instead of the pixels.

    Args:
        name: SOURCE:split, for messages.
        images: uint8 [M, H, W, C], the memory-mapped store.
        labels: int64 [N], ids of `label_space`.
        label_space: The classes.
        fingerprint: sha256 of pixels, labels and class names. It does not depend on the path.
        indices: int64 [N], the part's rows of the store; None for the whole store.
        skipped: "name: reason" of each broken image that was not stored.
        resized: How the images were cropped and resized.
        folder: The folder of the store.
    """

    name: str
    images: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    label_space: LabelSpace = field(repr=False)
    fingerprint: str
    indices: np.ndarray | None = field(default=None, repr=False)
    skipped: tuple[str, ...] = field(default=(), repr=False)
    resized: str = ""
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image and its label.

        Args:
            index: 0..N-1; a negative index counts from the end.

        Returns:
            The image, float32 [C, H, W] in [-1, 1], and its label.

        Raises:
            IndexError: The index is out of range.
            TypeError: The index is not an integer.
        """
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        pixels, labels = self.gather([index % len(self)])
        return normalize_images(torch.from_numpy(pixels))[0], int(labels[0])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "images": None if self.folder is not None else self.images}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["images"] is None:
            state["images"] = np.load(state["folder"] / "images.npy", mmap_mode="r").view(np.ndarray)
        self.__dict__.update(state)

    @property
    def image_size(self) -> int:
        return self.images.shape[1]

    @property
    def channels(self) -> int:
        return self.images.shape[3]

    def gather(self, indices: Iterable[int], out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Copy images and labels, in the given order.

        Args:
            indices: B indices, 0..N-1.
            out: uint8 [B, H, W, C], C-contiguous: where to write the pixels. None allocates an array.

        Returns:
            The pixels, uint8 [B, H, W, C], and the labels, int64 [B].

        Raises:
            IndexError: An index is out of range.
        """
        indices = np.asarray(indices, dtype=np.int64)
        labels = self.labels.take(indices)  # checks the range
        rows = indices if self.indices is None else self.indices.take(indices)
        # nothing wraps here; with mode "raise" NumPy fills a temporary buffer before `out`
        return self.images.take(rows, axis=0, out=out, mode="wrap"), labels

    def evenly_spread(self, count: int) -> np.ndarray:
        """The indices of at most `count` images, evenly spread, int64 [min(count, N)]."""
        n = min(count, len(self))
        return np.arange(n) * len(self) // n

    def counts(self) -> np.ndarray:
        """The number of images per class, int64 [K]."""
        return np.bincount(self.labels, minlength=self.label_space.K)

    def check_classes(self, labels: LabelSpace) -> None:
        """Raises InputError unless the classes equal the model's, in the same order.

        A model without classes accepts any.

        Args:
            labels: The label space of the model.
        """
        names = self.label_space.names
        if labels.K and names != labels.names:
            raise InputError(
                f"{self.name} has {len(names)} classes ({', '.join(names[:5])}, ...), but the model has {labels.K} "
                f"({', '.join(labels.names[:5])}, ...): give --data.classes with the classes of the model in the same "
                "order."
            )

    def part(self, indices: np.ndarray, name: str) -> ImageDataset:
        """A subset (indices int64 [B]) as a data set with another name, on the same store."""
        fingerprint = hashlib.sha256(self.fingerprint.encode() + indices.astype("<i8").tobytes()).hexdigest()
        rows = indices if self.indices is None else self.indices[indices]
        return dataclasses.replace(self, name=name, labels=self.labels[indices], indices=rows, fingerprint=fingerprint)
