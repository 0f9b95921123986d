"""The .npz files of OpenAI's ADM evaluator: arr_0, images uint8 [N, H, W, 3]; optionally arr_1, labels int64 [N]."""

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..atomic import atomic_write
from ..errors import InputError
from ..models.config import machine_memory

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
MAX_DEFLATE_RATIO = 1032  # the maximum compression ratio of deflate, the method of .zip files


@dataclass(frozen=True)
class NpzImages:
    """Images and labels of an .npz file.

    Args:
        pixels: uint8 [N, H, W, C].
        labels: int64 [N] or None.
        null_id: The label that means no class; None if the file does not contain it.
    """

    pixels: np.ndarray
    labels: np.ndarray | None
    null_id: int | None = None


def write_npz(file: Path, pixels: np.ndarray, labels: np.ndarray | None = None, null_id: int | None = None) -> Path:
    """Write an .npz file for the ADM evaluator.

    Args:
        file: The file to write.
        pixels: uint8 [N, H, W, C]. Gray images are written as RGB, the only form that the evaluator reads.
        labels: int [N] or None.
        null_id: The label that means no class. It is written as an array of that name, which the evaluator ignores.

    Returns:
        The file.
    """
    arrays = {"arr_0": np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels}
    if labels is not None:
        arrays["arr_1"] = np.asarray(labels, dtype=np.int64)
        if null_id is not None and (arrays["arr_1"] == null_id).any():
            arrays["null_id"] = np.array(null_id, dtype=np.int64)
    return atomic_write(file, lambda tmp: np.savez(tmp, **arrays))


def read_npz(file: Path) -> NpzImages:
    """Read an .npz file of images. Raises InputError for other contents, and for a file that would run code."""
    try:
        with zipfile.ZipFile(file) as archive:
            _check_sizes(archive, MAX_DEFLATE_RATIO * file.stat().st_size)
        with np.load(file, allow_pickle=False) as arrays:
            if "arr_0" not in arrays:
                raise ValueError(f"it contains {', '.join(arrays.files[:5]) or 'nothing'}: expected arr_0 and arr_1")
            pixels, labels, null_id = arrays["arr_0"], arrays.get("arr_1"), arrays.get("null_id")
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or not len(pixels):
            raise ValueError(f"arr_0 is {pixels.dtype} {list(pixels.shape)}: expected uint8 [N, H, W, 3]")
        if labels is not None and (labels.shape != pixels.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
            found = f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"arr_1 is {found}: expected one whole number for each of {len(pixels)} images")
    except Exception as error:  # zipfile, zlib and numpy raise errors of many types
        raise InputError(f"{file} is not an .npz file of images: {error}") from None
    if labels is None:
        return NpzImages(pixels, None)
    has_null = null_id is not None and null_id.shape == () and np.issubdtype(null_id.dtype, np.integer)
    return NpzImages(pixels, labels.astype(np.int64), int(null_id) if has_null else None)


def _check_sizes(archive: zipfile.ZipFile, max_bytes: int) -> None:
    """Raises ValueError if a header claims another size than the file contains:

    NumPy allocates that size before reading.
    """
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name not in ("arr_0", "arr_1", "null_id"):
            continue
        with archive.open(info) as member:
            shape, _, dtype = HEADERS[np.lib.format.read_magic(member)](member)
            contained = info.file_size - member.tell()
        claimed = math.prod(shape) * dtype.itemsize
        if not dtype.hasobject and (claimed != contained or contained > max_bytes):  # objects are rejected later
            raise ValueError(f"{name} claims {claimed:,} bytes, which are not in the file")
        if claimed > machine_memory():
            raise ValueError(
                f"{name} takes {claimed / 2**30:,.0f} GiB, and this machine has {machine_memory() / 2**30:,.0f}"
            )
