"""Decode the images of a split into images.npy, labels.npy and meta.json."""

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
from ..errors import InputError, named
from ..labels import LabelSpace
from .classes import class_ids
from .images import BrokenImage, TooLarge
from .sources import Source, Split, printable

if TYPE_CHECKING:
    import numpy as np

MAX_THREADS = 32
MAX_PENDING = 64  # images being decoded or waiting to be written
MAX_BROKEN = 1000  # stop counting broken images here
STORE_FORMAT = 1  # stores of another format are decoded again


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
    """Write images.npy, labels.npy and meta.json into `folder`. Up to MAX_PENDING decoded images are in memory at once.

    Args:
        source: The source.
        split: One of its splits.
        name: SOURCE:split, for messages.
        config: The data settings.
        channels: 1 or 3.
        folder: An existing folder.
        progress: Show a progress bar.
        empty_classes: Allow classes without an image.

    Raises:
        InputError: The split has no image of the classes, an image is broken (unless `skip_broken`), the sizes differ,
            or the disk has too little space.
    """
    import numpy as np

    loaded = source.load(split)
    rows, labels, space = _select_classes(loaded, config)
    if not len(rows):
        raise InputError(f"{name} has no image of the classes '{config.classes}'.")
    if not empty_classes:
        check_classes(name, np.bincount(labels, minlength=space.K), space)
    first, shape, skipped, stored, sizes, row = "", (), [], [], Counter(), -1
    decoded = _decode_images(loaded.read(rows), config, channels, total=len(rows), label=name if progress else None)
    with open(folder / "images.npy", "wb") as file:  # with a memory map, a full disk would kill the process by a signal
        for row, (image, outcome, size) in enumerate(decoded):
            if isinstance(outcome, BrokenImage):
                skipped.append((image, outcome))
                if not config.skip_broken and len(skipped) == MAX_BROKEN:
                    break
                continue
            if skipped and not config.skip_broken:  # store nothing more, only count the broken images
                continue
            if not stored:
                first, shape = image, outcome.shape
                _check_size(image, shape, image, shape)
                _check_disk_space(folder, len(rows) * outcome.size)
                _write_header(file, (len(rows), *shape))
            if outcome.shape != shape:
                _check_size(image, outcome.shape, first, shape)
            file.write(outcome.tobytes())
            sizes[min(size), size[0] != size[1]] += 1
            stored.append(row)
        if skipped and not (config.skip_broken and stored):
            every = f"every image of {name} is broken; the first: {skipped[0][0]}: {skipped[0][1]}."
            raise InputError(every if config.skip_broken else _broken_message(name, skipped, row + 1, len(rows)))
        _write_header(file, (len(stored), *shape))
    images = np.load(folder / "images.npy", mmap_mode="r")
    labels = labels[stored]
    np.save(folder / "labels.npy", labels)
    reasons = [f"{image}: {reason}" for image, reason in skipped]
    _write_meta(folder, source, split, images, labels, space, reasons, sizes)


def _broken_message(name: str, broken: list[tuple[str, BrokenImage]], seen: int, total: int) -> str:
    """The error message: what is wrong with the first broken image, and the number of others."""
    image, reason = broken[0]
    fault = "image too large:" if isinstance(reason, TooLarge) else "broken image"
    more = ""
    if len(broken) > 1:
        checked = f"{seen:,} checked" if seen < total else f"{total:,}"
        names = ", ".join(other for other, _ in broken[1:4]) + (", ..." if len(broken) > 4 else "")
        more = f" {len(broken) - 1:,} more of {checked} cannot be read: {names}."
    remedy = "Make it smaller" if isinstance(reason, TooLarge) else "Replace it"
    return (
        f"{fault} {image} of {name}: {str(reason).rstrip('.')}.{more} {remedy}, or set data.skip_broken to true to "
        "skip such images."
    )


def check_classes(name: str, counts: np.ndarray, space: LabelSpace) -> None:
    """Raises InputError if a class has no image. counts: int64 [K]."""
    empty = [space.names[i] for i in (counts == 0).nonzero()[0]]
    if empty:
        raise InputError(
            f"{name} has no image of {len(empty)} of its {space.K} classes: {', '.join(empty[:8])}"
            f"{', ...' if len(empty) > 8 else ''}. Add images (.png, .jpg, ...), remove the class folder, or list the "
            "classes to use in data.classes."
        )


def _select_classes(loaded: Split, config: DataConfig) -> tuple[np.ndarray, np.ndarray, LabelSpace]:
    """The rows of the classes in `config.classes`, int64 [M]; their renumbered labels, int64 [M]; the label space."""
    import numpy as np

    space = loaded.label_space
    if config.classes == "all":
        return np.arange(len(loaded.labels)), loaded.labels, space
    with named("data.classes"):
        ids = class_ids(space, config.classes)
        subset = space.subset(ids)
    new_ids = np.full(space.K, -1, dtype=np.int64)
    new_ids[ids] = np.arange(len(ids))
    labels = new_ids[loaded.labels]
    rows = np.flatnonzero(labels >= 0)
    return rows, labels[rows], subset


def _decode_images(
    read: Iterable[tuple[str, Any]], config: DataConfig, channels: int, total: int, label: str | None
) -> Iterator[tuple[str, np.ndarray | Exception, tuple[int, int]]]:
    """Yields (name, pixels or error, size in the source) in order. Pillow decodes without the GIL, so threads help."""
    from concurrent.futures import Future, ThreadPoolExecutor

    from tqdm.auto import tqdm

    from .images import open_image, to_array

    def decode_one(item: tuple[str, Any]) -> tuple[str, np.ndarray | Exception, tuple[int, int]]:
        name = printable(item[0])
        try:
            image = open_image(item[1])
            return name, to_array(image, config.image_size, channels, config.background), image.size
        except BrokenImage as error:
            return name, error, (0, 0)

    bar = tqdm(total=total, desc=f"decoding {label}", unit=" images", disable=label is None, delay=1.0)
    with bar, ThreadPoolExecutor(max_workers=min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        pending: deque[Future] = deque()
        try:
            for item in read:
                pending.append(pool.submit(decode_one, item))
                if len(pending) == MAX_PENDING:
                    yield pending.popleft().result()
                    bar.update()
            while pending:
                yield pending.popleft().result()
                bar.update()
        finally:
            for future in pending:
                future.cancel()


def _check_size(image: str, shape: tuple[int, ...], first: str, expected: tuple[int, ...]) -> None:
    """Raises InputError unless an image is square and of the size of the first. Both are given by name and shape."""
    (h, w), (eh, ew) = shape[:2], expected[:2]
    if (h, w) != (eh, ew) or h != w:
        sizes = f"{image} is {w}x{h}" + ("" if image == first else f", {first} is {ew}x{eh}")
        raise InputError(
            f"images must be squares of one size: {sizes}. Set data.image_size to the side in pixels, such as 64."
        )


def _check_disk_space(folder: Path, needed: int) -> None:
    """Raises InputError before decoding if the disk has too little free space. needed: bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"decoded images need {needed / 2**20:.0f} MiB in {folder.parent}, where {free / 2**20:.0f} MiB are free. "
            "Free some space, set data.store_dir to another disk, or set a smaller data.image_size."
        )


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write the header of images.npy. NumPy pads it, so that it can be overwritten with another number of rows."""
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
        "resized": _describe_resizing(sizes, images.shape[1]),
        "fingerprint": digest.hexdigest(),
        "skipped": skipped,
        "made_with": {"store_format": STORE_FORMAT, "pillow": PIL.__version__, "numpy": np.__version__},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _describe_resizing(sizes: Counter[tuple[int, bool]], size: int) -> str:
    """How the images were cropped and resized. sizes: (shorter side, whether not square) -> number of images."""
    cropped = sum(n for (_, oblong), n in sizes.items() if oblong)
    steps = [f"{cropped} centre-cropped"] if cropped else []
    for step, sides in (
        ("shrunk to {} px by area average (Pillow's BOX)", [s for s in sizes if s[0] > size]),
        ("enlarged to {} px by bicubic interpolation", [s for s in sizes if s[0] < size]),
        ("left at {} px", [s for s in sizes if s[0] == size]),
    ):
        if sides:
            low, high = min(sides)[0], max(sides)[0]
            origin = "" if low == size == high else f" from {low} px" if low == high else f" from {low}..{high} px"
            steps.append(f"{sum(sizes[s] for s in sides)} {step.format(size)}{origin}")
    return "; ".join(steps)
