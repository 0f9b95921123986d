"""CIFAR as its authors distribute it: cifar-10-batches-py and cifar-100-python, as a folder or as the .tar.gz.

The files are pickles, which can run any code when loaded. This reader accepts bytes, text, numbers, lists, dicts and
uint8 arrays. It rejects everything else, and imports nothing that a pickle names.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .classes import to_label_space
from .sources import Split, size_and_mtime

if TYPE_CHECKING:
    import numpy as np

ARCHIVES = (".tar.gz", ".tgz", ".tar")
MAX_BYTES = 2**30  # per file; the largest of CIFAR-100 has 155 MB
_BATCH = re.compile(r"data_batch_\d+")


class CifarPickles:
    """cifar-10-batches-py (data_batch_1, ..., test_batch, batches.meta) or cifar-100-python (train, test, meta)."""

    channels = 3

    def __init__(self, path: Path):
        self.path, self.name = path, path.resolve().as_posix()
        self.files = _files(path)
        if not self.files:
            raise InputError(
                f"{path} does not contain CIFAR; expected the files of cifar-10-batches-py (data_batch_1, ..., "
                "test_batch, batches.meta) or of cifar-100-python (train, test, meta)."
            )
        self.is_cifar100 = "meta" in self.files
        batches = sorted(int(name.split("_")[-1]) for name in self.files if _BATCH.fullmatch(name))
        if missing := sorted(set(range(1, max(batches, default=0))) - set(batches)):
            raise InputError(
                f"{path}: {', '.join(f'data_batch_{i}' for i in missing)} missing; copy or unpack it again."
            )

    def splits(self) -> Sequence[str]:
        return ("train", "test") if {"test", "test_batch"} & set(self.files) else ("train",)

    def facts(self, split: str) -> dict:
        if self.path.is_file():
            return {"files": [size_and_mtime(self.path)]}
        return {"files": [(name, *size_and_mtime(self.path / name)) for name in [*self._parts(split), self._meta]]}

    @property
    def _meta(self) -> str:
        return "meta" if self.is_cifar100 else "batches.meta"

    def _parts(self, split: str) -> list[str]:
        if self.is_cifar100:
            return [split]
        return sorted(filter(_BATCH.fullmatch, self.files)) if split == "train" else ["test_batch"]

    def load(self, split: str) -> Split:
        import numpy as np

        parts = self._parts(split)
        contents = _read(self.path, {name: self.files[name] for name in [*parts, self._meta]})
        names = contents[self._meta].get("fine_label_names" if self.is_cifar100 else "label_names")
        known = len(names) if isinstance(names, list) and all(isinstance(n, str) for n in names) else 0
        pixels, labels, rows = [], [], []
        for part in parts:
            data, ids = contents[part].get("data"), contents[part].get("fine_labels" if self.is_cifar100 else "labels")
            valid = (
                isinstance(data, np.ndarray)
                and (data.dtype, data.ndim, data.shape[-1]) == (np.uint8, 2, 3 * 32 * 32)
                and isinstance(ids, list)
                and len(ids) == len(data)
                and all(type(i) is int and 0 <= i < known for i in ids)
            )
            if not valid:
                raise InputError(
                    f"{self.path}: {part} is not a batch of CIFAR: expected data, uint8 [N, 3072], and N labels below "
                    f"{known}, the number of class names in {self._meta}. Download CIFAR again."
                )
            pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels += ids
            rows += [f"{part}, row {i}" for i in range(len(ids))]
        images = np.concatenate(pixels)

        def read(indices: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
            return ((rows[i], images[i]) for i in indices)

        return Split(to_label_space(names, str(self.path)), np.array(labels, dtype=np.int64), read)


def is_cifar(path: Path) -> bool:
    """Whether the path is a folder of CIFAR's files, or an archive."""
    return path.name.endswith(ARCHIVES) if path.is_file() else bool(_files(path))


def _files(path: Path) -> dict[str, str]:
    """Name of each CIFAR file -> the file or the archive's member; empty if this is not CIFAR."""
    if path.is_file():
        with _reading(path), tarfile.open(path) as archive:
            files = {Path(m.name).name: m.name for m in archive if m.isfile()}
    elif any((path / meta).is_file() for meta in ("batches.meta", "meta")):
        files = {p.name: p.name for p in path.iterdir() if p.is_file()}
    else:
        return {}
    is_cifar10 = "batches.meta" in files and any(map(_BATCH.fullmatch, files))
    return files if is_cifar10 or {"meta", "train"} <= set(files) else {}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, EOFError) as error:
        kind = " as a tar archive" if path.is_file() else ""
        raise InputError(f"{path} cannot be read{kind}: {error}. Download CIFAR again.") from None


def _read(path: Path, files: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The contents of each file."""
    contents = {}
    with _reading(path):
        if path.is_file():
            with tarfile.open(path) as archive:
                wanted = {member: name for name, member in files.items()}
                for member in archive:  # in the order of the archive: seeking back would decompress it again
                    if member.name in wanted and member.size <= MAX_BYTES:
                        contents[wanted[member.name]] = archive.extractfile(member).read()
        else:
            contents = {n: (path / f).read_bytes() for n, f in files.items() if (path / f).stat().st_size <= MAX_BYTES}
        if too_large := [name for name in files if name not in contents]:
            raise OSError(f"{', '.join(too_large)} has more than {MAX_BYTES:,} bytes, unlike any file of CIFAR")
    return {name: load_plain(content, f"{path}: {name}") for name, content in contents.items()}


def load_plain(content: bytes, name: str) -> dict[str, Any]:
    """The dict in a pickle of plain values and uint8 arrays. Keys and texts become str.

    Args:
        content: The pickle.
        name: Its name in errors.

    Raises:
        InputError: It is not a pickle, contains an object of another type, or is not a dict.
    """
    try:
        values = _Plain(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(values, dict):
            raise TypeError(f"it contains a {type(values).__name__}; expected a dict")
    except Exception as error:  # a corrupted pickle raises errors of many types
        raise InputError(f"{name} cannot be read as a pickle of CIFAR: {type(error).__name__}: {error}.") from None
    return {_text(key): _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.array
    return [_text(v) for v in value] if isinstance(value, list) else value


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


class _Plain(pickle.Unpickler):
    """An unpickler with safe replacements of the functions that arrays are pickled by (old and new NumPy names)."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "numpy.ndarray": _ARRAY,
            "numpy.dtype": _dtype,
            "multiarray._reconstruct": _empty,
            "numeric._frombuffer": _from_buffer,
            "_codecs.encode": _encode,
        }
        plain = re.sub(r"^numpy\._?core\.", "", module)
        replacement = known.get(f"{plain}.{name}")
        if replacement is None:
            raise pickle.UnpicklingError(
                f"it contains a {module}.{name}, but only plain values and uint8 arrays are allowed"
            )
        return replacement

    def persistent_load(self, _: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")


_ARRAY = "numpy.ndarray"  # a placeholder for the class, which cannot be called


class _Dtype:
    """uint8. The byte order in its state has no meaning for single bytes."""

    def __setstate__(self, _: Any) -> None:
        pass


def _dtype(code: Any, *_: Any) -> _Dtype:
    if _text(code) != "u1":
        raise pickle.UnpicklingError(f"it contains an array of {_text(code)!r:.20}, but only uint8 is allowed")
    return _Dtype()


class _Array:
    """Contains a uint8 array after `__setstate__`."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        import numpy as np

        _, shape, _, fortran, content = state
        self.array = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


def _empty(*_: Any) -> _Array:
    return _Array()


def _from_buffer(content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")
