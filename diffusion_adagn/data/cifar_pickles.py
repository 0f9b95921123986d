"""CIFAR as its authors distribute it: cifar-10-batches-py and cifar-100-python, as a folder or as the .tar.gz.

Their files are pickles, which may run any code when they are read. Here a pickle may hold bytes, text, numbers, lists, dicts and
uint8 arrays; everything else is rejected, and nothing that a pickle names is imported.
"""

from __future__ import annotations

import io
import pickle
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .classes import to_label_space
from .sources import Split, stamp

if TYPE_CHECKING:
    import numpy as np

ARCHIVES = (".tar.gz", ".tgz", ".tar")
MAX_BYTES = 2**30  # of a file; CIFAR-100's largest has 155 MB
_BATCH = re.compile(r"data_batch_\d+")


class CifarPickles:
    """cifar-10-batches-py (data_batch_1, ..., test_batch, batches.meta) or cifar-100-python (train, test, meta)."""

    channels = 3

    def __init__(self, path: Path):
        self.path, self.name = path, path.resolve().as_posix()
        self.files = _files(path)
        if not self.files:
            raise InputError(
                f"{path} holds no CIFAR; expected the files of cifar-10-batches-py (data_batch_1, ..., test_batch, batches.meta) "
                "or of cifar-100-python (train, test, meta)."
            )
        self.hundred = "meta" in self.files
        batches = sorted(int(name.split("_")[-1]) for name in self.files if _BATCH.fullmatch(name))
        if missing := sorted(set(range(1, max(batches, default=0))) - set(batches)):
            raise InputError(f"{path} lacks {', '.join(f'data_batch_{i}' for i in missing)}: copy or unpack it again.")

    def splits(self) -> Sequence[str]:
        return ("train", "test") if {"test", "test_batch"} & set(self.files) else ("train",)

    def facts(self, split: str) -> dict:
        if self.path.is_file():
            return {"files": [stamp(self.path)]}
        return {"files": [(name, *stamp(self.path / name)) for name in [*self._parts(split), self._meta]]}

    @property
    def _meta(self) -> str:
        return "meta" if self.hundred else "batches.meta"

    def _parts(self, split: str) -> list[str]:
        if self.hundred:
            return [split]
        return sorted(filter(_BATCH.fullmatch, self.files)) if split == "train" else ["test_batch"]

    def load(self, split: str) -> Split:
        import numpy as np

        parts = self._parts(split)
        held = _read(self.path, {name: self.files[name] for name in [*parts, self._meta]})
        names = held[self._meta].get("fine_label_names" if self.hundred else "label_names")
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise InputError(f"{self.path}: {self._meta} does not name the classes. Download CIFAR again.")
        pixels, labels, rows = [], [], []
        for part in parts:
            data, ids = held[part].get("data"), held[part].get("fine_labels" if self.hundred else "labels")
            sound = (
                isinstance(data, np.ndarray)
                and (data.dtype, data.ndim, data.shape[-1]) == (np.uint8, 2, 3 * 32 * 32)
                and isinstance(ids, list)
                and len(ids) == len(data)
                and all(type(i) is int and 0 <= i < len(names) for i in ids)
            )
            if not sound:
                raise InputError(
                    f"{self.path}: {part} is not a batch of CIFAR: expected data, uint8 [N, 3072], and N labels below "
                    f"{len(names)}. Download CIFAR again."
                )
            pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels += ids
            rows += [f"{part}, row {i}" for i in range(len(ids))]
        images = np.concatenate(pixels)

        def read(some: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
            return ((rows[i], images[i]) for i in some)

        return Split(to_label_space(names, str(self.path)), np.array(labels, dtype=np.int64), read)


def is_cifar(path: Path) -> bool:
    """Whether that path is CIFAR's own folder, or an archive."""
    return path.name.endswith(ARCHIVES) if path.is_file() else bool(_files(path))


def _files(path: Path) -> dict[str, str]:
    """Name of a file of CIFAR -> the file or the archive's member; empty if it is no CIFAR."""
    if path.is_file():
        try:
            with tarfile.open(path) as archive:
                found = {Path(m.name).name: m.name for m in archive if m.isfile()}
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(f"{path} cannot be read as a tar archive: {error}. Download it again.") from None
    elif any((path / meta).is_file() for meta in ("batches.meta", "meta")):
        found = {p.name: p.name for p in path.iterdir() if p.is_file()}
    else:
        return {}
    ten = "batches.meta" in found and any(map(_BATCH.fullmatch, found))
    return found if ten or {"meta", "train"} <= set(found) else {}


def _read(path: Path, files: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What each file holds."""
    contents = {}
    try:
        if path.is_file():
            with tarfile.open(path) as archive:
                wanted = {member: name for name, member in files.items()}
                for member in archive:  # in the archive's order: going back would decompress it again
                    if member.name in wanted and member.size <= MAX_BYTES:
                        contents[wanted[member.name]] = archive.extractfile(member).read()
        else:
            contents = {n: (path / f).read_bytes() for n, f in files.items() if (path / f).stat().st_size <= MAX_BYTES}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {error}. Download CIFAR again.") from None
    missing = [name for name in files if name not in contents]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} has more than {MAX_BYTES:,} bytes, which no file of CIFAR has.")
    return {name: load_plain(content, f"{path}: {name}") for name, content in contents.items()}


def load_plain(content: bytes, name: str) -> dict[str, Any]:
    """The dict in a pickle of plain values and uint8 arrays; its keys and texts as str.

    Args:
        content: The pickle.
        name: What it is called, for the error.

    Raises:
        InputError: It is no pickle, holds an object of another kind, or is no dict.
    """
    try:
        values = _Plain(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise InputError(f"{name} cannot be read as a pickle of CIFAR: {error}.") from None
    except Exception as error:  # a corrupted pickle makes the reader raise this and that
        raise InputError(f"{name} is not a pickle of CIFAR: {type(error).__name__}: {error}.") from None
    if not isinstance(values, dict):
        raise InputError(f"{name} holds a {type(values).__name__}; expected a dict, as CIFAR's files do.")
    return {_text(key): _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.array
    return [_text(v) for v in value] if isinstance(value, list) else value


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


class _Plain(pickle.Unpickler):
    """Knows the few functions that arrays are pickled by, under NumPy's old and new names, in versions of its own."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "numpy.ndarray": _ARRAY,
            "numpy.dtype": _dtype,
            "multiarray._reconstruct": _empty,
            "numeric._frombuffer": _from_buffer,
            "_codecs.encode": _encode,
        }
        plain = re.sub(r"^numpy\._?core\.", "", module)
        found = known.get(f"{plain}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, and only plain values and uint8 arrays are read")
        return found

    def persistent_load(self, _: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside it")


_ARRAY = "numpy.ndarray"  # stands for the class, and can do nothing


class _Dtype:
    """uint8; the byte order in its state has no meaning for single bytes."""

    def __setstate__(self, _: Any) -> None:
        pass


def _dtype(kind: Any, *_: Any) -> _Dtype:
    if _text(kind) != "u1":
        raise pickle.UnpicklingError(f"it holds an array of {_text(kind)!r:.20}, and only uint8 is read")
    return _Dtype()


class _Array:
    """Holds a uint8 array, once its state has been set."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        import numpy as np

        _, shape, _, fortran, content = state
        self.array = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


def _empty(*_: Any) -> _Array:
    return _Array()


def _from_buffer(content: Any, kind: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    found = _Array()
    found.__setstate__((1, shape, kind, order == "F", content))
    return found


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")
