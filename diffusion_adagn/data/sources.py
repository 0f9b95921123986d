"""Where labelled pictures come from. A source knows its splits; a split gives labels, then pictures on demand.

Adding a source: a class with `name`, `channels`, `splits()`, `facts(split)` and `load(split)`, and a line in `find.py`.
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
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass
class Split:
    """labels: int64 [N]; read(rows) yields (name, raw picture) of those rows (ascending), in that order."""

    label_space: LabelSpace
    labels: np.ndarray
    read: Callable[[np.ndarray], Iterator[tuple[str, Raw]]]


class Source(Protocol):
    """name: how it is told from others; channels: its pictures' own.

    splits(): the parts that it has. facts(split): what tells one state of its files from another, cheap and JSON.
    load(split): the labels and a way to the pictures; may be slow, and is called only when nothing is stored yet.
    """

    name: str
    channels: int

    def splits(self) -> Sequence[str]: ...
    def facts(self, split: str) -> dict: ...
    def load(self, split: str) -> Split: ...


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
    """DIR/class/picture.png, or DIR/train/class/picture.png with test/ or validation/ beside it."""

    channels = 3

    def __init__(self, root: Path):
        self.root, self.name = root, root.resolve().as_posix()
        self._found: dict[str, dict[str, list[str]]] = {}
        self._facts: dict[str, dict] = {}
        train = root / "train"
        self.parted = train.is_dir() and not _pictures(train, nested=False) and bool(subfolders(train))

    def splits(self) -> Sequence[str]:
        known = ("train", *TEST, *VALIDATION)
        return [s for s in known if (self.root / s).is_dir()] if self.parted else ("train",)

    def _files(self, split: str) -> dict[str, list[str]]:
        """Class folder -> its pictures' paths below the root, sorted. Looked up once a split."""
        if split not in self._found:
            self._found[split] = self._find(split)
        return self._found[split]

    def _find(self, split: str) -> dict[str, list[str]]:
        root = self.root / split if self.parted else self.root
        for folder in subfolders(root):
            _check_folder(root, folder)
        folders = {f: _pictures(root / f) for f in subfolders(root)}
        if not any(folders.values()):
            loose = "it holds pictures, but no class folders" if _pictures(root, nested=False) else "no pictures in it"
            raise InputError(
                f"{root} is not a folder of class folders: {loose}. Expected {self.root}/CLASS/picture.png, "
                f"or {self.root}/train/CLASS/picture.png (and test/CLASS/...), or {self.root}/metadata.csv with the columns "
                "file_name and label, or *.parquet files."
            )
        below = f"{split}{os.sep}" if self.parted else ""
        return {f: [f"{below}{f}{os.sep}{p}" for p in pictures] for f, pictures in folders.items()}

    def facts(self, split: str) -> dict:
        if split not in self._facts:  # a million files are looked at once, however many parts are opened
            root, paths = str(self.root), [p for some in self._files(split).values() for p in some]
            files = [(p, *stamp(os.path.join(root, p))) for p in paths]
            self._facts[split] = {"files": files, "classes": sorted(self._files("train"))}
        return self._facts[split]

    def load(self, split: str) -> Split:
        import numpy as np

        classes, files = list(self._files("train")), self._files(split)
        unknown = [f for f in files if f not in classes]
        if unknown:
            raise InputError(
                f"{self.root / split} has class folders that train/ lacks: {', '.join(unknown[:5])}. Expected some of: "
                f"{', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''}. Rename or remove them."
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
    """Raises InputError for a class folder whose name is no text, or that is a link to where it lies itself."""
    if not is_text(folder):
        raise InputError(f"class folder {root}/{printable(folder)} has a name that is not UTF-8 text. Rename it.")
    path = root / folder
    if path.is_symlink() and root.resolve().is_relative_to(path.resolve()):
        raise InputError(f"class folder {path} is a link to a folder that it lies in, {path.resolve()}. Remove it.")


def subfolders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _pictures(folder: Path, nested: bool = True) -> list[str]:
    """The paths of the pictures below a folder, sorted name by name."""
    found = []
    for at, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(f for f in folders if nested and not f.startswith("."))
        below = "" if at == os.fspath(folder) else os.path.relpath(at, folder) + os.sep
        found += [below + f for f in files if os.path.splitext(f)[1].lower() in _SUFFIXES and not f.startswith(".")]
    return sorted(found, key=lambda path: os.path.normcase(path).split(os.sep))


def _raise(error: OSError) -> None:
    """A folder that cannot be listed must not pass for an empty one."""
    raise error


def stamp(path: Path | str) -> tuple[int, int]:
    """(bytes, time of the last change); zeros for what cannot be looked at, such as a link that leads nowhere: that is
    told as a broken picture when it is read."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def is_text(name: str) -> bool:
    """False for a file's name whose bytes are no UTF-8; Python has it with surrogates in their place."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def printable(name: str) -> str:
    """A file's name as messages show it: line breaks, and bytes that are no UTF-8, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
