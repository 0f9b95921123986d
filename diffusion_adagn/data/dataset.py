"""The decoded images of one part, as torch and the training loop take them. Apart from store.py, which answers without torch."""

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
    """One part of a data set: a map-style torch Dataset, which a DataLoader takes, with any num_workers.

    dataset[i] is (image, label): float32 [C, H, W] in [-1, 1], as the network takes it, and an int. Nothing is mirrored
    (`data.flip` is of training alone) or shuffled. `gather` gives many images at once, as uint8. A pickled data set holds the store's path, not its pixels.

    images: uint8 [M, H, W, C], the memory-mapped store; labels: int64 [N], ids of `label_space`.
    indices: int64 [N], the part's rows of the store; None if it is the whole store.
    fingerprint: sha256 over pixels, labels and class names: what the part holds, not where it lies.
    skipped: "name: reason" of the broken pictures left out of the store.
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
        """Image float32 [C, H, W] in [-1, 1] and label of picture `index`, 0..N-1; negative ones count from the end.

        Raises:
            IndexError: There is no such picture.
            TypeError: The index is no whole number.
        """
        at = operator.index(index)
        if not -len(self) <= at < len(self):
            raise IndexError(f"index {at} is out of range for {len(self)} pictures")
        pixels, labels = self.gather([at % len(self)])
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
        """(uint8 [B, H, W, C], int64 [B]) of these pictures (0..N-1), in the order given; copies.

        out: uint8 [B, H, W, C], C-contiguous; the pixels are written there and nowhere else. Raises IndexError for a picture
        that there is not.
        """
        at = np.asarray(indices, dtype=np.int64)
        labels = self.labels.take(at)  # looks whether they are in range
        rows = at if self.indices is None else self.indices.take(at)
        # "wrap" never comes to it; with "raise" NumPy fills a buffer of its own before `out`
        return self.images.take(rows, axis=0, out=out, mode="wrap"), labels

    def counts(self) -> np.ndarray:
        """int64 [K]: how many pictures each class has."""
        return np.bincount(self.labels, minlength=self.label_space.K)

    def check_classes(self, labels: LabelSpace) -> None:
        """Raises InputError unless these pictures' classes are a model's, in the same order (a model without classes takes any)."""
        found = self.label_space.names
        if labels.K and found != labels.names:
            raise InputError(
                f"the pictures of {self.name} have {len(found)} classes ({', '.join(found[:5])}, ...), the model has {labels.K} "
                f"({', '.join(labels.names[:5])}, ...): give --data.classes, so that they are the same in the same order."
            )

    def part(self, indices: np.ndarray, name: str) -> ImageDataset:
        """Some of these pictures (int64 [B]) as a data set of their own, on the same store."""
        fingerprint = hashlib.sha256(self.fingerprint.encode() + indices.astype("<i8").tobytes()).hexdigest()
        rows = indices if self.indices is None else self.indices[indices]
        return dataclasses.replace(self, name=name, labels=self.labels[indices], indices=rows, fingerprint=fingerprint)
