"""The store: each split is decoded once into a folder with uint8 pixels, labels and metadata, opened by memory map."""

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
from ..renamed import renamed_arguments
from .classes import class_lines
from .decode import STORE_FORMAT, check_classes, decode
from .find import ResolvedSource, choose_part, find_source, os_errors_as_input_error
from .label_files import unused_table
from .sources import ClassFolders, Source
from .tables import HubTable, Unlabelled

if TYPE_CHECKING:
    import numpy as np

    from .dataset import ImageDataset


class NothingHeldOut(InputError):
    """A source has no held-out part, since every class needs its images for training."""


@renamed_arguments(found="resolved")
def open_dataset(
    config: DataConfig | RunConfig | Mapping | str | Path,
    part: Literal["train", "heldout"] | None = None,
    progress: bool = True,
    resolved: ResolvedSource | None = None,
    empty_classes: bool = False,
) -> ImageDataset:
    """Open the labelled images of a source. They are decoded at the first use, and cached.

    Args:
        config: Data settings; or a source, such as "digits" or "my_images"; a YAML file; or a dict, such as
            {"source": "my_images", "image_size": 32}.
        part: None: the split in `config.source` (default: train). "train": the same, for training. "heldout": the test
            split of the source, else its validation split, else a fraction of the split (`heldout_fraction`). That
            fraction is drawn with a fixed seed, and excluded from "train" and None.
        progress: Show a progress bar while decoding, and report skipped images on stderr.
        resolved: The result of `find_source` for this config, so that a second part does not list all files again.
        empty_classes: Allow classes without an image.

    Returns:
        A map-style torch Dataset. Each item is (image, label): float32 [C, H, W] in [-1, 1], and an int.

    Raises:
        InputError: The source or its images are invalid.
        NothingHeldOut: An InputError: there is no held-out part, since every class needs its images for training.
    """
    config = as_data_config(config)
    source, head, word = resolved or find_source(config)
    root = _root(config)
    if isinstance(source, HubTable):
        source.known = source.known or _known_splits(root, source.name)
    with os_errors_as_input_error(head):
        splits, role, split_by_seed = choose_part(source, word, part)
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
            f"{whole.name}: {len(whole.skipped)} of {len(whole) + len(whole.skipped)} images are broken and skipped "
            f"(data.skip_broken), such as {whole.skipped[0]}",
            file=sys.stderr,
        )
    if role == "train" and progress and isinstance(source, ClassFolders) and (note := unused_table(source.root)):
        print(f"note: {note}", file=sys.stderr)
    if not split_by_seed:
        return whole
    stratified = config.heldout_split == "stratified"
    train, heldout = split_off(whole.labels, config.heldout_fraction, stratified=stratified)
    if role == "train":
        if progress and not len(heldout) and config.heldout_fraction:
            print(
                f"note: {whole.name}: {_nothing_held_out_reason(whole, config)}, so nothing is held out",
                file=sys.stderr,
            )
        return whole.part(train, whole.name) if len(heldout) else whole
    if not len(heldout):
        raise (NothingHeldOut if config.heldout_fraction else InputError)(
            f"{head} has no test or validation split, and {_nothing_held_out_reason(whole, config)}, so nothing is "
            "held out. Set data.heldout_fraction "
            "to 0.05 or more and add images (at least two in a class), or set training.heldout_every to 0."
        )
    return whole.part(heldout, f"{head}:heldout")


def _nothing_held_out_reason(whole: ImageDataset, config: DataConfig) -> str:
    if not config.heldout_fraction:
        return "data.heldout_fraction is 0"
    largest = whole.counts().max()
    if largest > 1:
        return f"its largest class has {largest} images, too few for {config.heldout_fraction:g} of each class"
    return "it has one image" if len(whole) == 1 else "it has one image per class"


def split_off(
    labels: np.ndarray, fraction: float, seed: int = 0, stratified: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into a training and a held-out part. At least one image of each class remains in training.

    Args:
        labels: int64 [N].
        fraction: The fraction to hold out.
        seed: Of the random order of the images.
        stratified: Hold out the first floor(fraction * n + 1/2) of each class's n images in that order, instead of the
            first round(fraction * N) (at least 1) of all.

    Returns:
        (training, held out): int64, ascending; each index 0..N-1 is in exactly one of them.
    """
    import numpy as np

    n = len(labels)
    order = np.random.RandomState(seed).permutation(n)  # the stream of RandomState never changes
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
    return Path(config.store_dir).expanduser().absolute() if config.store_dir else cache_root()


def _known_splits(root: Path, name: str) -> list[str]:
    """The splits recorded in a store of this source, so that it opens without the network."""
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
    with os_errors_as_input_error(head):
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
    stored = _read_store(folder, name)
    if stored is not None:
        return stored
    try:
        root.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder, f"it decodes {name}" if progress else ""):
            stored = _read_store(folder, name)  # another process may have written it during the wait
            if stored is not None:
                return stored
            _remove_partial(root)
            with _temporary_dir(folder) as temporary:
                decode(source, split, name, config, channels, temporary, progress, empty_classes)
                return _move_into_place(temporary, folder, name)
    except OSError as error:
        raise InputError(f"decoded images cannot be stored in {root}: {error}. Set data.store_dir.") from None


def _read_store(folder: Path, name: str) -> ImageDataset | None:
    """The store in `folder`; None if it is missing or corrupted."""
    import numpy as np

    from .dataset import ImageDataset  # with torch

    meta = _read_meta(folder / "meta.json")
    try:
        images = np.load(folder / "images.npy", mmap_mode="r").view(np.ndarray)  # raises for a file that is too short
        labels = np.load(folder / "labels.npy")
        space = LabelSpace.from_dict(meta["label_space"])
        valid = (
            list(images.shape) == meta["shape"]
            and (images.ndim, images.dtype) == (4, np.uint8)
            and (labels.dtype, labels.shape) == (np.int64, images.shape[:1])
            and 0 <= labels.min() <= labels.max() < space.K
            and np.bincount(labels, minlength=space.K).tolist() == meta["counts"]
        )
        fingerprint, skipped, resized = str(meta["fingerprint"]), tuple(meta["skipped"]), str(meta["resized"])
    except Exception:  # NumPy raises errors of many types for a corrupted file
        return None
    return ImageDataset(name, images, labels, space, fingerprint, None, skipped, resized, folder) if valid else None


def _new_hidden_dir(folder: Path) -> Path:
    """A new hidden folder with default permissions (tempfile would make it private)."""
    path = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    path.mkdir()
    return path


@contextlib.contextmanager
def _temporary_dir(folder: Path) -> Iterator[Path]:
    """A new hidden folder next to `folder`, removed at the end. It is locked to mark it as in use (Unix only)."""
    path = _new_hidden_dir(folder)
    try:
        with locked(path, wait=True):  # `_remove_partial` of another process may hold the lock briefly
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_partial(root: Path) -> None:
    """Remove partial stores of killed processes: hidden folders without a lock, unchanged for ten minutes.

    The age matters since locks of other machines may be invisible.
    """
    for path in root.glob(".*"):
        if not re.fullmatch(r"\..+-[0-9a-f]{16}-[0-9a-f]{8}", path.name):
            continue
        with contextlib.suppress(OSError), locked(path) as acquired:
            changed = max(p.stat().st_mtime for p in (path, *path.iterdir()))
            if acquired and time.time() - changed > 600:
                shutil.rmtree(path, ignore_errors=True)


def _move_into_place(temporary: Path, folder: Path, name: str) -> ImageDataset:
    """Move a finished store into place atomically. If another process was faster, use its store."""
    opened = _read_store(temporary, name)  # before the move: later, another process may remove it as corrupted
    if opened is None:
        raise OSError("the new store cannot be read back")
    if WINDOWS:  # cannot move a folder with an open file
        opened = None
    while True:
        try:
            temporary.rename(folder)
        except OSError as error:
            if not folder.is_dir() and error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            stored = _read_store(folder, name)
            if stored is not None:
                return stored
            corrupted = _new_hidden_dir(folder)
            try:
                folder.rename(corrupted / "store")
            except FileNotFoundError:  # another process has moved it already
                continue
            finally:
                shutil.rmtree(corrupted, ignore_errors=True)
        else:
            if opened is not None:
                return dataclasses.replace(opened, folder=folder)
            if (stored := _read_store(folder, name)) is None:
                raise OSError("the store cannot be read back after the move")
            return stored
