"""Labelled images: a source is decoded once into a memory-mapped store, and read in batches."""

from typing import TYPE_CHECKING

from .store import open_dataset

if TYPE_CHECKING:
    from .dataset import ImageDataset

__all__ = ["ImageDataset", "open_dataset"]


def __getattr__(name: str):
    if name == "ImageDataset":  # imports torch, which errors of a source should not wait for
        from .dataset import ImageDataset

        return ImageDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
