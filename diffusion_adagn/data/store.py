"""Decode once: a source's split becomes a folder with uint8 pixels, labels and what they are, opened by memory map."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..atomic import WINDOWS, cache_root, locked, one_at_a_time
from ..config import DataConfig, RunConfig, as_data_config
from ..errors import InputError
from ..labels import LabelSpace
from .classes import class_lines
from .decode import STORE_FORMAT, check_classes, decode
from .find import ResolvedSource, choose_part, errors_as_input_error, find_source
from .label_files import unused_table
from .sources import ClassFolders, Source
from .tables import HubTable, Unlabelled

if TYPE_CHECKING:
    import numpy as np

    from .dataset import ImageDataset


class NothingHeldOut(InputError):
    """A source without a held-out part, in which every class needs its images for training."""


def open_dataset(
    config: DataConfig | RunConfig | Mapping | str | Path,
    part: Literal["train", "heldout"] | None = None,
    progress: bool = True,
    found: ResolvedSource | None = None,
    empty_classes: bool = False,
) -> ImageDataset:
    """The pictures that `config` names, decoded now if they have not been before.

    Args:
        config: Data settings; or what `config.as_data_config` makes them of: a source, such as "digits" or "my_images"; a
            YAML file; or a dict, such as {"source": "my_images", "image_size": 32}.
        part: None: the split written in `config.source` (train unless said). "train": the same, for training. "heldout":
            the source's own test split, else its validation split, else a share of the split (`heldout_fraction`), drawn
            with a fixed seed and left out of "train" and None alike.
        progress: Show a bar while decoding, and say on stderr what was left out.
        found: What `find_source` found for this config, so that a second part does not look at all files again.
        empty_classes: Allow classes without a picture.

    Raises:
        InputError: Something is wrong with the source or its pictures. NothingHeldOut: there is no held-out part, since
            every class needs its images for training.
    """
    config = as_data_config(config)
    source, head, word = found or find_source(config)
    root = _root(config)
    if isinstance(source, HubTable):
        source.known = source.known or _known_splits(root, source.name)
    with errors_as_input_error(head):
        splits, role, shared = choose_part(source, word, part)
    empty_classes = empty_classes or role == "heldout"
    for split in splits:
        try:
            whole = _open_store(source, split, head, config, root, progress, empty_classes)
            break
        except Unlabelled:
            if split == splits[-1]:
                raise
    if not empty_classes:
        check_classes(whole.name, whole.counts(), whole.label_space)
    if role == "train" and progress and whole.skipped:
        print(
            f"{whole.name}: {len(whole.skipped)} of {len(whole) + len(whole.skipped)} pictures are broken and left out "
            f"(data.skip_broken), such as {whole.skipped[0]}",
            file=sys.stderr,
        )
    if role == "train" and progress and isinstance(source, ClassFolders) and (note := unused_table(source.root)):
        print(f"note: {note}", file=sys.stderr)
    if not shared:
        return whole
    stratified = config.heldout_split == "stratified"
    kept, heldout = split_off(whole.labels, config.heldout_fraction, stratified=stratified)
    if role == "train":
        if progress and not len(heldout) and config.heldout_fraction:
            print(f"note: {whole.name}: {_why_none(whole, config)}, so nothing is held out", file=sys.stderr)
        return whole.part(kept, whole.name) if len(heldout) else whole
    if not len(heldout):
        raise (NothingHeldOut if config.heldout_fraction else InputError)(
            f"{head} has no test or validation part, and {_why_none(whole, config)}, so nothing is held out. Set data.heldout_fraction "
            "to 0.05 or more and have two pictures or more of a class, or set training.heldout_every to 0."
        )
    return whole.part(heldout, f"{head}:heldout")


def _why_none(whole: ImageDataset, config: DataConfig) -> str:
    if not config.heldout_fraction:
        return "data.heldout_fraction is 0"
    most = whole.counts().max()
    if most > 1:
        return f"its largest class has {most} pictures, too few for {config.heldout_fraction:g} of each class"
    return "it has one picture" if len(whole) == 1 else "it has one picture of each class"


def split_off(
    labels: np.ndarray, fraction: float, seed: int = 0, stratified: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(training, held out): ascending indices, disjoint, together all. At least one image of each class stays in training.

    Args:
        labels: int64 [N].
        fraction: The share to hold out.
        seed: Of the order in which images are looked at.
        stratified: Hold out the first floor(fraction * n + 1/2) of each class's n images in that order, instead of the first
            round(fraction * N) (at least 1) of all.
    """
    import numpy as np

    n = len(labels)
    order = np.random.RandomState(seed).permutation(n)  # RandomState: its stream is frozen for good
    _, first, inverse, sizes = np.unique(labels[order], return_index=True, return_inverse=True, return_counts=True)
    if stratified:
        grouped = np.argsort(inverse, kind="stable")
        rank = np.empty(n, dtype=np.int64)  # of an image in its class
        rank[grouped] = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        counts = np.minimum(np.floor(fraction * sizes + 0.5), sizes - 1)
        heldout = order[rank < counts[inverse]]
    else:
        count = max(1, round(fraction * n)) if fraction > 0 else 0
        heldout = np.delete(order, first)[:count]
    return np.setdiff1d(np.arange(n), heldout), np.sort(heldout)


# ---------------------------------------------------------------------- the folder


def _root(config: DataConfig) -> Path:
    root = Path(config.store_dir).expanduser().absolute() if config.store_dir else cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"decoded pictures cannot be kept in {root}: {error.strerror}. Set data.store_dir.") from None
    return root


def _known_splits(root: Path, name: str) -> list[str]:
    """The splits that a store of this source wrote down, so that it opens without the network."""
    for path in sorted(root.glob(f"{_readable(name)}-*/meta.json")):
        meta = _read_meta(path)
        splits = meta.get("splits")
        if meta.get("source") == name and isinstance(splits, list) and all(isinstance(s, str) for s in splits):
            return splits
    return []


def _read_meta(path: Path) -> dict:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _readable(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", Path(name).name, flags=re.ASCII).strip("._")[:60] or "data"


def _open_store(
    source: Source, split: str, head: str, config: DataConfig, root: Path, progress: bool, empty_classes: bool
) -> ImageDataset:
    channels = config.channels or source.channels
    with errors_as_input_error(head):
        files = source.facts(split)
    facts = {
        "format": STORE_FORMAT,
        "source": source.name,
        "split": split,
        "size": config.image_size,
        "channels": channels,
        "background": config.background,
        "classes": class_lines(config.classes) if config.classes.endswith(".txt") else config.classes,
        "skip_broken": config.skip_broken,
        "columns": [config.image_column, config.label_column],
        "files": files,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = root / f"{_readable(source.name)}-{_readable(split)}-{key}"
    name = f"{head}:{split}"
    found = _read_store(folder, name)
    if found is not None:
        return found
    try:
        with one_at_a_time(folder, f"it decodes {name}" if progress else ""):
            found = _read_store(folder, name)  # by the process that was waited for
            if found is not None:
                return found
            _clear_leftovers(root)
            with _workplace(folder) as temporary:
                decode(source, split, name, config, channels, temporary, progress, empty_classes)
                return _place(temporary, folder, name)
    except OSError as error:
        raise InputError(f"decoded pictures cannot be kept in {root}: {error}. Set data.store_dir.") from None


def _read_store(folder: Path, name: str) -> ImageDataset | None:
    """The store in `folder`; None if there is none, or one that is damaged."""
    import numpy as np

    from .dataset import ImageDataset  # with torch

    meta = _read_meta(folder / "meta.json")
    try:
        images = np.load(folder / "images.npy", mmap_mode="r").view(np.ndarray)  # refuses a file that is too short
        labels = np.load(folder / "labels.npy")
        space = LabelSpace.from_dict(meta["label_space"])
        sound = (
            list(images.shape) == meta["shape"]
            and (images.ndim, images.dtype) == (4, np.uint8)
            and (labels.dtype, labels.shape) == (np.int64, images.shape[:1])
            and 0 <= labels.min() <= labels.max() < space.K
            and np.bincount(labels, minlength=space.K).tolist() == meta["counts"]
        )
        fingerprint, skipped, resized = str(meta["fingerprint"]), tuple(meta["skipped"]), str(meta["resized"])
    except Exception:  # a damaged file makes NumPy raise this and that
        return None
    return ImageDataset(name, images, labels, space, fingerprint, None, skipped, resized, folder) if sound else None


def _beside(folder: Path) -> Path:
    """A new hidden folder, readable by whoever may read the others (tempfile's would be the user's alone)."""
    path = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    path.mkdir()
    return path


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A new hidden folder beside `folder`, removed at the end; locked, so that it is known as being used (Unix only)."""
    path = _beside(folder)
    try:
        with locked(path, wait=True):  # who clears leftovers may hold it for a moment
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _clear_leftovers(root: Path) -> None:
    """Remove what killed processes left half-made: hidden folders that none has locked, untouched for ten minutes (a
    lock may not be seen from another machine)."""
    for path in root.glob(".*"):
        if not re.fullmatch(r"\..+-[0-9a-f]{16}-[0-9a-f]{8}", path.name):
            continue
        with contextlib.suppress(OSError), locked(path) as free:
            touched = max(p.stat().st_mtime for p in (path, *path.iterdir()))
            if free and time.time() - touched > 600:
                shutil.rmtree(path, ignore_errors=True)


def _place(temporary: Path, folder: Path, name: str) -> ImageDataset:
    """Move a finished store into place whole. If another process got there first, use its store."""
    made = _read_store(temporary, name)  # before the move: after it, another process may take it away as damaged
    if made is None:
        raise OSError("what has just been written cannot be read back")
    if WINDOWS:  # which moves no folder with an open file
        made = None
    while True:
        try:
            temporary.rename(folder)
        except OSError as error:
            if not folder.is_dir() and error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            found = _read_store(folder, name)
            if found is not None:
                return found
            damaged = _beside(folder)
            try:
                folder.rename(damaged / "store")
            except FileNotFoundError:  # another process has just done the same
                continue
            finally:
                shutil.rmtree(damaged, ignore_errors=True)
        else:
            if made is not None:
                return dataclasses.replace(made, folder=folder)
            if (found := _read_store(folder, name)) is None:
                raise OSError("what has just been moved into place cannot be read back")
            return found
