"""Where labelled pictures come from. A source knows its splits; a split gives labels, then pictures on demand.

Adding a source: a class with `name`, `channels`, `splits()`, `facts(split)` and `load(split)`, and a line in `find_source`.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..config import DataConfig
from ..errors import InputError
from ..labels import LabelSpace

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
        train = root / "train"
        self.parted = train.is_dir() and not _pictures(train, nested=False) and bool(_folders(train))

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
        folders = {f: _pictures(root / f) for f in _folders(root)}
        if not any(folders.values()):
            loose = "it holds pictures, but no class folders" if _pictures(root, nested=False) else "no pictures in it"
            raise InputError(
                f"{root} is not a folder of class folders: {loose}. Expected {self.root}/CLASS/picture.png, "
                f"or {self.root}/train/CLASS/picture.png (and test/CLASS/...), or *.parquet files."
            )
        for folder, pictures in folders.items():
            if not pictures:
                raise InputError(
                    f"class folder {root / folder} holds no picture ({', '.join(sorted(_SUFFIXES))}). "
                    "Put pictures into it, or remove it."
                )
        return {f: [str(p.relative_to(self.root)) for p in pictures] for f, pictures in folders.items()}

    def facts(self, split: str) -> dict:
        stats = ((p, os.stat(self.root / p)) for paths in self._files(split).values() for p in paths)
        return {"files": [(p, s.st_size, s.st_mtime_ns) for p, s in stats], "classes": sorted(self._files("train"))}

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
        labels = np.array([classes.index(f) for f in files for _ in files[f]], dtype=np.int64)
        return Split(named(classes), labels, lambda rows: ((paths[i], self.root / paths[i]) for i in rows))


def _folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _pictures(folder: Path, nested: bool = True) -> list[Path]:
    found = []
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if nested and not f.startswith("."))
        found += [Path(at, f) for f in files if Path(f).suffix.lower() in _SUFFIXES and not f.startswith(".")]
    return sorted(found)


# ---------------------------------------------------------------------- names of classes


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """WordNet id -> names of the 1000 ImageNet classes, in the order of their ids."""
    lines = (Path(__file__).parent / "imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines if not line.startswith("#"))


def named(names: Sequence[str]) -> LabelSpace:
    """The label space of these class names. Names that are all WordNet ids get readable ones where ImageNet has them;
    the 1000 names of ImageNet get their WordNet ids."""
    table = imagenet_classes()
    if names and all(re.fullmatch(r"n\d{8}", n) for n in names):
        return LabelSpace(tuple(table.get(n, n) for n in names), wnids=tuple(names))
    if len(names) == len(table):
        first = [[n.split(",")[0].strip().casefold() for n in both] for both in (names, table.values())]
        if sum(a == b for a, b in zip(*first)) >= 0.95 * len(table):
            return LabelSpace(tuple(_told_apart(names, table)), wnids=tuple(table))
    return LabelSpace(tuple(names))


def _told_apart(names: Sequence[str], table: dict[str, str]) -> list[str]:
    """The hub's ImageNet names, with the table's where a name is given twice (two classes are a "crane")."""
    return [ours if list(names).count(theirs) > 1 else theirs for theirs, ours in zip(names, table.values())]


def class_ids(space: LabelSpace, classes: str) -> list[int]:
    """Ids of `config.classes`: what LabelSpace.parse reads, or a .txt file with one class a line (# for comments)."""
    if not classes.endswith(".txt"):
        return space.parse(classes)
    ids = []
    for number, line in class_lines(classes):
        try:
            found = space.parse([line])
        except InputError as error:
            raise InputError(f"{classes}, line {number}: {error}") from None
        if len(found) != 1:
            raise InputError(f"{classes}, line {number}: expected one class a line, got {line!r}.")
        ids += found
    if not ids:
        raise InputError(f"{classes} names no class; expected one a line (a name, an id or a WordNet id).")
    return ids


def class_lines(path: str) -> list[tuple[int, str]]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.classes names the file {path}, which cannot be read as text: {error}.") from None
    return [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#")]


# ---------------------------------------------------------------------- finding a source


def find_source(config: DataConfig) -> tuple[Source, str, str | None]:
    """(source, NAME_OR_PATH as written, split as written or None) of `config.source`. Nothing is loaded yet."""
    text = config.source.strip()
    head, split = text, None
    if not text or (text not in BUILT_IN and not Path(text).expanduser().exists()):
        before, colon, after = text.rpartition(":")
        if colon and re.fullmatch(r"[\w.-]*", after):
            head, split = before, after
        if not head or split == "":
            raise InputError(f"data.source '{text}' is not NAME_OR_PATH[:split]; for example digits or cifar10:test.")
    return _open(head, config), head, split


def _open(head: str, config: DataConfig) -> Source:
    from .tables import HubTable, ParquetTable, parquet_files

    columns = (config.image_column, config.label_column)
    path = Path(head).expanduser()
    if head == "digits":
        return Digits()
    if head == "cifar10":
        return HubTable("uoft-cs/cifar10", *columns, known=("train", "test"))
    if head == "cifar100":
        return HubTable("uoft-cs/cifar100", *columns, known=("train", "test"))
    if path.is_file() and path.suffix != ".parquet":
        raise InputError(f"data.source {path} is a file; expected a .parquet file, or a folder of class folders.")
    if path.exists():
        return ParquetTable(path, *columns) if parquet_files(path) else ClassFolders(path)
    if path.is_absolute() or head.startswith((".", "~")) or head.count("/") > 1 or re.search(r"\\|\s|\.parquet$", head):
        beside = _folders(path.parent)[:8] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(
            f"there is no such path: {head}.{hint} Expected {', '.join(BUILT_IN)}, a data set's name on the hub, a folder "
            "of class folders, or parquet files."
        )
    near = difflib.get_close_matches(head.lower(), BUILT_IN, n=1, cutoff=0.75)
    if near and "/" not in head:  # not worth asking the hub, whose answer may take half a minute without a network
        raise InputError(
            f"there is no data set '{head}'. Did you mean {near[0]}? Expected {', '.join(BUILT_IN)}, OWNER/NAME on the hub, "
            "or the path of a folder of class folders or of parquet files."
        )
    return HubTable(head, *columns)


def choose_part(source: Source, word: str | None, part: str | None) -> tuple[list[str], str, bool]:
    """(splits, the first of which that has labels is the one; "train" or "heldout"; whether a seeded share of the split
    is (to be) cut off, because the source has no held-out split of its own).

    word: the split as the user wrote it, None for train; part: "train", "heldout" or None for the one written.
    Raises InputError for a split that does not exist, with those that do.
    """
    splits = list(source.splits())
    asked = word or "train"
    alike = VALIDATION if asked in VALIDATION else (asked,)
    found = next((s for s in (asked, *alike) if s in splits), None)
    if found is None and asked not in ("heldout", *TEST, *VALIDATION):
        raise InputError(
            f"{source.name} has no split '{asked}'. It has: {', '.join(splits)}; 'heldout' always works. "
            f"Write one of them after a colon, such as NAME_OR_PATH:{splits[0]}."
        )
    own = [s for s in (*TEST, *VALIDATION) if s in splits and s != found]
    if found is None or part == "heldout":
        if part == "train":
            raise InputError(f"the source names its held-out part ('{asked}'); to train, name another split or none.")
        base = found or ("train" if "train" in splits else splits[0])
        return own or [base], "heldout", not own
    whole = bool(own) or (part is None and found in (*TEST, *VALIDATION))
    return [found], "train", not whole
