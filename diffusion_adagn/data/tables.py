"""Sources that are tables with a picture column and a label column: parquet files, and data sets of the hub."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .classes import named
from .sources import BUILT_IN, TEST, VALIDATION, Split

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from .images import Raw


MOST_CLASSES = 100_000


class Unlabelled(InputError):
    """A split whose labels are all missing, as in the test part of a contest."""


class Table:
    """What parquet and hub sources share. Subclasses give `features`, `column` and `batches`."""

    name: str
    channels = 3

    def __init__(self, image_column: str | None, label_column: str | None):
        self.image_column, self.label_column = image_column, label_column

    def features(self, split: str) -> dict[str, Any]:
        """Column -> its `datasets` feature."""
        raise NotImplementedError

    def column(self, split: str, name: str) -> pa.ChunkedArray:
        raise NotImplementedError

    def batches(self, split: str, name: str) -> Iterator[tuple[str, pa.Array]]:
        """(where, rows) of one column, in order; `where` is what row numbers count from the start of."""
        raise NotImplementedError

    def load(self, split: str) -> Split:
        features = self.features(split)
        image = self._pick(features, self.image_column, "data.image_column", "picture", _image_columns(features))
        label = self._pick(features, self.label_column, "data.label_column", "label", _label_columns(features))
        if not _holds_pictures(features[image]):
            raise InputError(
                f"column '{image}' of {self.name} holds no pictures. Columns: {', '.join(features)}. Set data.image_column."
            )
        names = self._names(split, label, features)
        labels = self._labels(split, label, names)

        def read(rows: np.ndarray) -> Iterator[tuple[str, Raw]]:
            wanted, row, file, first = set(rows.tolist()), 0, None, 0
            for where, values in self.batches(split, image):
                if where != file:  # rows are named by their place in their own file
                    file, first = where, row
                for value in values:
                    if row in wanted:
                        yield f"{where}, row {row - first}", _raw(value)
                    row += 1

        return Split(named(names), labels, read)

    def _pick(self, features: dict, asked: str | None, key: str, what: str, found: list[str]) -> str:
        if asked is not None and asked not in features:
            raise InputError(f"{self.name} has no column '{asked}' ({key}). Its columns: {', '.join(features)}.")
        if asked is None and not found:
            raise InputError(
                f"{self.name} has no {what} column that is known as one. Its columns: {', '.join(features)}. Set {key}."
            )
        return asked or found[0]

    def _names(self, split: str, label: str, features: dict) -> list[str]:
        """Class names, as the data writes them: the column's own, else made of its values."""
        import pyarrow.compute

        if getattr(features[label], "names", None):
            return features[label].names
        base = "train" if "train" in self.splits() else split  # a test part must not number its classes anew
        kind = self.features(base)[label].dtype if hasattr(features[label], "dtype") else "several values in each row"
        if kind not in ("string", "large_string", "bool") and not re.fullmatch(r"u?int\d+", kind):
            raise InputError(
                f"column '{label}' of {self.name} holds {kind}; labels are whole numbers or names. "
                f"Columns: {', '.join(features)}. Set data.label_column."
            )
        values = [v for v in pyarrow.compute.unique(self.column(base, label)).to_pylist() if v is not None]
        if "string" in kind:
            return sorted(values)
        if values and max(values) > MOST_CLASSES:
            raise InputError(
                f"column '{label}' of {self.name} reaches {max(values)}: not class ids, which count from 0. "
                f"Columns: {', '.join(features)}. Set data.label_column."
            )
        return [str(i) for i in range(max(values, default=-1) + 1)]

    def _labels(self, split: str, label: str, names: list[str]) -> np.ndarray:
        """int64 [N], checked. Raises InputError naming the first row whose label is none of the classes."""
        import numpy as np

        values = self.column(split, label).to_pylist()
        if values and all(v in (None, -1) for v in values):
            raise Unlabelled(
                f"the split '{split}' of {self.name} has no labels (column '{label}'). Name another split."
            )
        ids = {v: i for i, v in enumerate(names)} | {i: i for i in range(len(names))}
        for row, value in enumerate(values):
            if value not in ids:
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise InputError(
                    f"{self.name}:{split}, row {row}: label {value!r} in column '{label}' is none of the {len(names)} "
                    f"classes ({shown}). Correct or remove the row."
                )
        return np.array([ids[v] for v in values], dtype=np.int64)


def _image_columns(features: dict) -> list[str]:
    typed = [n for n, f in features.items() if type(f).__name__ == "Image"]
    return typed or [n for n, f in features.items() if _holds_pictures(f)]


def _holds_pictures(feature: Any) -> bool:
    bare = getattr(feature, "dtype", "") in ("binary", "large_binary")
    return type(feature).__name__ == "Image" or bare or (isinstance(feature, dict) and "bytes" in feature)


def _label_columns(features: dict) -> list[str]:
    typed = [n for n, f in features.items() if type(f).__name__ == "ClassLabel"]
    if "fine_label" in typed:  # CIFAR-100's other one is the coarse label
        return ["fine_label"]
    return typed or [n for n in ("label", "labels", "fine_label", "class") if n in features]


def _raw(value: pa.Scalar) -> Raw:
    value = value.as_py()
    if isinstance(value, dict):
        value = value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
    return value if isinstance(value, bytes | Path) else None


class ParquetTable(Table):
    """One parquet file, or a folder of them; the first word of a file's name says its split."""

    def __init__(self, path: Path, *columns: str | None):
        super().__init__(*columns)
        self.files, self.root = parquet_files(path), path if path.is_dir() else path.parent
        self.name = path.resolve().as_posix()
        self._opened: dict[Path, Any] = {}

    def splits(self) -> Sequence[str]:
        return list(self.files)

    def facts(self, split: str) -> dict:
        used = self.files[split] if split == "train" else self.files.get("train", []) + self.files[split]
        stats = [(p, p.stat()) for p in used]
        return {"files": [(p.relative_to(self.root).as_posix(), s.st_size, s.st_mtime_ns) for p, s in stats]}

    def _open(self, path: Path):
        import pyarrow.parquet as pq

        if path not in self._opened:
            with _reading(path):
                self._opened[path] = pq.ParquetFile(path, pre_buffer=False)
        return self._opened[path]

    def features(self, split: str) -> dict[str, Any]:
        import datasets

        schemas = [self._open(p).schema_arrow for p in self.files[split]]
        for path, schema in zip(self.files[split], schemas):
            if schema.names != schemas[0].names:
                raise InputError(
                    f"{path} has the columns {schema.names}, but {self.files[split][0].name} {schemas[0].names}."
                )
        return dict(datasets.Features.from_arrow_schema(schemas[0]))

    def column(self, split: str, name: str) -> pa.ChunkedArray:
        import pyarrow as pa

        chunks = []
        for path in self.files[split]:
            with _reading(path):
                chunks += self._open(path).read([name], use_threads=False).column(0).chunks
        with _reading(path):  # files may disagree on the type
            return pa.chunked_array(chunks, type=chunks[0].type if chunks else pa.null())

    def batches(self, split: str, name: str) -> Iterator[tuple[str, pa.Array]]:
        for path in self.files[split]:
            batches = self._open(path).iter_batches(batch_size=64, columns=[name], use_threads=False)
            while True:
                with _reading(path):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield path.relative_to(self.root).as_posix(), batch.column(0)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}.") from None


def parquet_files(path: Path) -> dict[str, list[Path]]:
    """Split -> files. A single file is "train", as are files whose name begins with no split's name."""
    if path.is_file():
        return {"train": [path]}
    found = sorted(
        p for folder in (path, path / "data") for p in folder.glob("*.parquet") if not p.name.startswith(".")
    )
    order = ("train", *TEST, *VALIDATION)
    split_of = {
        p: next((s for s in order if p.stem == s or p.name.startswith((f"{s}-", f"{s}_", f"{s}."))), "train")
        for p in found
    }
    return {s: files for s in order if (files := [p for p in found if split_of[p] == s])}


class HubTable(Table):
    """A data set of the Hugging Face hub. What was decoded of it is kept by name: delete the store to fetch it anew."""

    def __init__(self, name: str, *columns: str | None, known: Sequence[str] = ()):
        super().__init__(*columns)
        self.name, self.known = name, known

    def splits(self) -> Sequence[str]:
        return self.known or list(self._loaded)

    def facts(self, split: str) -> dict:
        return {}

    @functools.cached_property
    def _loaded(self):
        try:
            import datasets

            return datasets.load_dataset(self.name)
        except Exception as error:  # of huggingface_hub, httpx, pyarrow, datasets: whatever stands in the way
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(
                f"the data set '{self.name}' cannot be had from the Hugging Face hub: {reason.rstrip('.')}. Built in: "
                f"{', '.join(BUILT_IN)} (digits needs no download). A local folder of class folders or of parquet files "
                "works too: give its path."
            ) from None

    def _split(self, split: str):
        if split not in self._loaded:
            raise InputError(f"{self.name} has no split '{split}'. It has: {', '.join(self._loaded)}.")
        return self._loaded[split]

    def features(self, split: str) -> dict[str, Any]:
        return dict(self._split(split).features)

    def column(self, split: str, name: str) -> pa.ChunkedArray:
        return self._split(split).data.column(name)

    def batches(self, split: str, name: str) -> Iterator[tuple[str, pa.Array]]:
        for batch in self._split(split).data.select([name]).to_batches(max_chunksize=64):
            yield f"{self.name}:{split}", batch.column(0)
