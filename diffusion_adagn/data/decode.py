"""Pictures of a split -> images.npy, labels.npy and meta.json in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..config import DataConfig
from ..errors import InputError
from ..labels import LabelSpace
from .classes import class_ids
from .images import BrokenImage, TooLarge
from .sources import Source, Split, printable

if TYPE_CHECKING:
    import numpy as np

MAX_THREADS = 32
MAX_AHEAD = 64  # pictures that are decoded and not yet written
MAX_BROKEN = 1000  # broken pictures, after which no more are counted
STORE_FORMAT = 1  # a change of it decodes everything anew


def decode(
    source: Source,
    split: str,
    name: str,
    config: DataConfig,
    channels: int,
    folder: Path,
    progress: bool,
    empty_classes: bool = True,
) -> None:
    """Write images.npy, labels.npy and meta.json into `folder`; memory holds some dozen pictures at a time.

    empty_classes: whether classes without a picture are allowed.
    """
    import numpy as np

    loaded = source.load(split)
    rows, labels, space = _chosen(loaded, config)
    if not len(rows):
        raise InputError(f"{name} holds no picture of the classes '{config.classes}'.")
    if not empty_classes:
        check_classes(name, np.bincount(labels, minlength=space.K), space)
    first, shape, skipped, kept, sizes, row = "", (), [], [], Counter(), -1
    pictures = _pictures(loaded.read(rows), config, channels, total=len(rows), label=name if progress else None)
    with open(folder / "images.npy", "wb") as file:  # a memory map would die by a signal when the disk is full
        for row, (picture, outcome, size) in enumerate(pictures):
            if isinstance(outcome, BrokenImage):
                skipped.append((picture, outcome))
                if not config.skip_broken and len(skipped) == MAX_BROKEN:
                    break
                continue
            if (
                skipped and not config.skip_broken
            ):  # nothing more is stored; the others are looked at to count the broken
                continue
            if not kept:
                first, shape = picture, outcome.shape
                _check_size(picture, shape, picture, shape)
                _check_room(folder, len(rows) * outcome.size)
                _write_header(file, (len(rows), *shape))
            if outcome.shape != shape:
                _check_size(picture, outcome.shape, first, shape)
            file.write(outcome.tobytes())
            sizes[min(size), size[0] != size[1]] += 1
            kept.append(row)
        if skipped and not config.skip_broken:
            raise InputError(_broken(name, skipped, row + 1, len(rows)))
        if not kept:
            raise InputError(f"every picture of {name} is broken; the first: {skipped[0][0]}: {skipped[0][1]}.")
        _write_header(file, (len(kept), *shape))
    images = np.load(folder / "images.npy", mmap_mode="r")
    labels = labels[kept]
    np.save(folder / "labels.npy", labels)
    left_out = [f"{picture}: {reason}" for picture, reason in skipped]
    _write_meta(folder, source, split, images, labels, space, left_out, sizes)


def _broken(name: str, broken: list[tuple[str, BrokenImage]], seen: int, total: int) -> str:
    """What is wrong with the first of these pictures, and how many more there are."""
    picture, reason = broken[0]
    what = "picture too large:" if isinstance(reason, TooLarge) else "broken picture"
    more = ""
    if len(broken) > 1:
        among = f"{seen:,} looked at" if seen < total else f"{total:,}"
        shown = ", ".join(p for p, _ in broken[1:4]) + (", ..." if len(broken) > 4 else "")
        more = f" {len(broken) - 1:,} more of {among} cannot be read: {shown}."
    remedy = "Make it smaller" if isinstance(reason, TooLarge) else "Replace it"
    return (
        f"{what} {picture} of {name}: {str(reason).rstrip('.')}.{more} {remedy}, or set data.skip_broken to true to leave such "
        "pictures out."
    )


def check_classes(name: str, counts: np.ndarray, space: LabelSpace) -> None:
    """Raises InputError if a class has no picture. counts: int64 [K]."""
    empty = [space.names[i] for i in (counts == 0).nonzero()[0]]
    if empty:
        raise InputError(
            f"{name} has no picture of {len(empty)} of its {space.K} classes: {', '.join(empty[:8])}"
            f"{', ...' if len(empty) > 8 else ''}. Add pictures (.png, .jpg, ...), remove the class folder, or name the classes "
            "to keep in data.classes."
        )


def _chosen(loaded: Split, config: DataConfig) -> tuple[np.ndarray, np.ndarray, LabelSpace]:
    """(rows of the split, their labels renumbered, the label space) of the classes in `config.classes`."""
    import numpy as np

    space = loaded.label_space
    if config.classes == "all":
        return np.arange(len(loaded.labels)), loaded.labels, space
    ids = class_ids(space, config.classes)
    subset = space.subset(ids)
    new = np.full(space.K, -1, dtype=np.int64)
    new[ids] = np.arange(len(ids))
    labels = new[loaded.labels]
    rows = np.flatnonzero(labels >= 0)
    return rows, labels[rows], subset


def _pictures(
    read: Iterable[tuple[str, Any]], config: DataConfig, channels: int, total: int, label: str | None
) -> Iterator[tuple[str, np.ndarray | Exception, tuple[int, int]]]:
    """(name, pixels or why it is broken, size in the source), in order. Pillow decodes outside the GIL."""
    from concurrent.futures import Future, ThreadPoolExecutor

    from tqdm.auto import tqdm

    from .images import open_image, to_array

    def one(item: tuple[str, Any]) -> tuple[str, np.ndarray | Exception, tuple[int, int]]:
        name = printable(item[0])
        try:
            image = open_image(item[1])
            return name, to_array(image, config.image_size, channels, config.background), image.size
        except BrokenImage as error:
            return name, error, (0, 0)

    bar = tqdm(total=total, desc=f"decoding {label}", unit=" pictures", disable=label is None, delay=1.0)
    with bar, ThreadPoolExecutor(max_workers=min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        coming: deque[Future] = deque()
        try:
            for item in read:
                coming.append(pool.submit(one, item))
                if len(coming) == MAX_AHEAD:
                    yield coming.popleft().result()
                    bar.update()
            while coming:
                yield coming.popleft().result()
                bar.update()
        finally:
            for future in coming:
                future.cancel()


def _check_size(picture: str, shape: tuple[int, ...], first: str, expected: tuple[int, ...]) -> None:
    (h, w), (eh, ew) = shape[:2], expected[:2]
    if (h, w) != (eh, ew) or h != w:
        seen = f"{picture} is {w}x{h}" + ("" if picture == first else f", {first} is {ew}x{eh}")
        raise InputError(
            f"pictures must be squares of one size: {seen}. Set data.image_size to the side they should have, such as 64."
        )


def _check_room(folder: Path, needed: int) -> None:
    """Better said before an hour of decoding than after."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"decoded pictures need {needed / 2**20:.0f} MiB in {folder.parent}, where {free / 2**20:.0f} MiB are free. "
            "Make room, set data.store_dir to another disk, or set a smaller data.image_size."
        )


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """The start of images.npy. NumPy leaves room in it for more digits, so that it may be written again."""
    import numpy as np

    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _write_meta(
    folder: Path,
    source: Source,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    space: LabelSpace,
    skipped: list[str],
    sizes: Counter[tuple[int, bool]],
) -> None:
    import numpy as np
    import PIL

    digest = hashlib.sha256(json.dumps([images.shape, space.names]).encode())
    for start in range(0, len(images), 4096):
        digest.update(np.ascontiguousarray(images[start : start + 4096]))
    digest.update(labels.astype("<i8").tobytes())
    meta = {
        "label_space": space.to_dict(),
        "shape": list(images.shape),
        "counts": np.bincount(labels, minlength=space.K).tolist(),
        "source": source.name,
        "split": split,
        "splits": list(source.splits()),
        "resized": _in_words(sizes, images.shape[1]),
        "fingerprint": digest.hexdigest(),
        "skipped": skipped,
        "made_with": {"store_format": STORE_FORMAT, "pillow": PIL.__version__, "numpy": np.__version__},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _in_words(sizes: Counter[tuple[int, bool]], size: int) -> str:
    """What was done to the pictures. sizes: (shorter side, whether not square) -> how many."""
    cropped = sum(n for (_, oblong), n in sizes.items() if oblong)
    words = [f"{cropped} centre-cropped"] if cropped else []
    for what, sides in (
        ("shrunk to {} px by area average (Pillow's BOX)", [s for s in sizes if s[0] > size]),
        ("enlarged to {} px by bicubic interpolation", [s for s in sizes if s[0] < size]),
        ("left at {} px", [s for s in sizes if s[0] == size]),
    ):
        if sides:
            low, high = min(sides)[0], max(sides)[0]
            origin = "" if low == size == high else f" from {low} px" if low == high else f" from {low}..{high} px"
            words.append(f"{sum(sizes[s] for s in sides)} {what.format(size)}{origin}")
    return "; ".join(words)
