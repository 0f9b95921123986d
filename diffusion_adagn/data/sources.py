"""Sources of labelled images. A source has splits; a split has labels, and reads images on demand.

To add a source: write a class with the protocol `Source`, and add a line to `find.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import InputError
from ..labels import LabelSpace
from .classes import to_label_space

if TYPE_CHECKING:
    import numpy as np

    from .images import Raw

TEST, VALIDATION = ("test",), ("validation", "valid", "val")
BUILT_IN = ("digits", "cifar10", "cifar100")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass
class Split:
    """The images of one split.

    Args:
        label_space: The classes.
        labels: int64 [N].
        read: Takes ascending rows, int64 [M]; yields (name, raw image) of each, in that order.
    """

    label_space: LabelSpace
    labels: np.ndarray
    read: Callable[[np.ndarray], Iterator[tuple[str, Raw]]]


class Source(Protocol):
    """Protocol of a source of labelled images.

    Attributes:
        name: Identifies the source; part of the store's key.
        channels: Of its images, 1 or 3, if data.channels is unset.
    """

    name: str
    channels: int

    def splits(self) -> Sequence[str]:
        """The names of its splits."""
        ...

    def facts(self, split: str) -> dict:
        """JSON values that change when the files of a split change, such as sizes and times. Must be fast."""
        ...

    def load(self, split: str) -> Split:
        """The labels of a split, and a reader of its images.

        May be slow: called only if the split is not stored yet.
        """
        ...


class Digits:
    """scikit-learn's 1797 real handwritten digits, 8x8, values 0..16."""

    name, channels = "digits", 1

    def splits(self) -> Sequence[str]:
        return ("train",)

    def facts(self, split: str) -> dict:
        return {}

    def load(self, split: str) -> Split:
        import numpy as np
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        space = LabelSpace(tuple(str(n) for n in digits.target_names))
        return Split(space, digits.target.astype(np.int64), lambda rows: ((f"digit {i}", pixels[i]) for i in rows))


class ClassFolders:
    """Class folders: DIR/class/image.png, or DIR/train/class/image.png and optionally DIR/test or DIR/validation."""

    channels = 3

    def __init__(self, root: Path):
        self.root, self.name = root, root.resolve().as_posix()
        self._files_of_split: dict[str, dict[str, list[str]]] = {}
        self._facts: dict[str, dict] = {}
        train = root / "train"
        self.has_splits = train.is_dir() and not image_files(train, nested=False) and bool(subfolders(train))

    def splits(self) -> Sequence[str]:
        known = ("train", *TEST, *VALIDATION)
        return [s for s in known if (self.root / s).is_dir()] if self.has_splits else ("train",)

    def _files(self, split: str) -> dict[str, list[str]]:
        """Class folder -> paths of its images relative to the root, sorted. A split is listed once."""
        if split not in self._files_of_split:
            self._files_of_split[split] = self._list_files(split)
        return self._files_of_split[split]

    def _list_files(self, split: str) -> dict[str, list[str]]:
        root = self.root / split if self.has_splits else self.root
        for folder in subfolders(root):
            _check_folder(root, folder)
        folders = {f: image_files(root / f) for f in subfolders(root)}
        if not any(folders.values()):
            loose = (
                "it contains images, but no class folders"
                if image_files(root, nested=False)
                else "it contains no images"
            )
            raise InputError(
                f"{root} is not a folder of class folders: {loose}. Expected {self.root}/CLASS/image.png, "
                f"or {self.root}/train/CLASS/image.png (and test/CLASS/...), or {self.root}/metadata.csv with the "
                "columns file_name and label, or *.parquet files."
            )
        prefix = f"{split}{os.sep}" if self.has_splits else ""
        return {f: [f"{prefix}{f}{os.sep}{p}" for p in images] for f, images in folders.items()}

    def facts(self, split: str) -> dict:
        if split not in self._facts:  # a million files are checked once, even if several parts are opened
            root, paths = str(self.root), [p for images in self._files(split).values() for p in images]
            files = [(p, *size_and_mtime(os.path.join(root, p))) for p in paths]
            self._facts[split] = {"files": files, "classes": sorted(self._files("train"))}
        return self._facts[split]

    def load(self, split: str) -> Split:
        import numpy as np

        classes, files = list(self._files("train")), self._files(split)
        unknown = [f for f in files if f not in classes]
        if unknown:
            raise InputError(
                f"{self.root / split} has class folders that are missing in train/: {', '.join(unknown[:5])}. Expected "
                f"only: {', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''}. Rename or remove them."
            )
        paths = [p for f in files for p in files[f]]
        ids = {f: i for i, f in enumerate(classes)}
        labels = np.array([ids[f] for f in files for _ in files[f]], dtype=np.int64)
        return Split(
            to_label_space(classes, str(self.root)),
            labels,
            lambda rows: ((paths[i], self.root / paths[i]) for i in rows),
        )


def _check_folder(root: Path, folder: str) -> None:
    """Raises InputError for a class folder whose name is not text, or that links to a parent of itself."""
    path = root / folder
    loop = is_text(folder) and path.is_symlink() and root.resolve().is_relative_to(path.resolve())
    if loop or not is_text(folder):
        fault = (
            f"is a link to a folder that contains it, {path.resolve()}. Remove it"
            if loop
            else "has a name that is not UTF-8 text. Rename it"
        )
        raise InputError(f"class folder {root}/{printable(folder)} {fault}.")


def subfolders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(folder: Path, nested: bool = True) -> list[str]:
    """The relative paths of the images in a folder, sorted component by component. nested: also in its subfolders."""
    paths = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(f for f in folders if nested and not f.startswith("."))
        prefix = "" if parent == os.fspath(folder) else os.path.relpath(parent, folder) + os.sep
        paths += [
            prefix + f for f in files if os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES and not f.startswith(".")
        ]
    return sorted(paths, key=lambda path: os.path.normcase(path).split(os.sep))


def _raise(error: OSError) -> None:
    """Raises the error of a folder that cannot be listed: it must not count as empty."""
    raise error


def size_and_mtime(path: Path | str) -> tuple[int, int]:
    """(bytes, time of the last change in ns).

    Zeros if unreadable, such as a dangling link; reading it then reports it.
    """
    try:
        info = os.stat(path)
    except OSError:
        return 0, 0
    return info.st_size, info.st_mtime_ns


def is_text(name: str) -> bool:
    """Whether a file name is UTF-8. Python represents other bytes by surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def printable(name: str) -> str:
    """A file name for messages: line breaks, and bytes that are not UTF-8, become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
