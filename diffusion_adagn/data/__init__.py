"""Labelled images: any source, decoded once into a memory-mapped store, gathered by batch."""

from .store import ImageDataset, open_dataset

__all__ = ["ImageDataset", "open_dataset"]
