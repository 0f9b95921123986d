"""Sources that are tables with a picture column and a label column: parquet files, and data sets of the hub."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .classes import to_label_space
from .images import BrokenImage
from .sources import BUILT_IN, TEST, VALIDATION, Split, subfolders

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from .images import Raw


MAX_TABLE_CLASSES = 100_000


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

    def folders(self) -> list[Path]:
        """Where the files may lie that a row names instead of holding its picture."""
        raise NotImplementedError

    def batches(self, split: str, name: str) -> Iterator[tuple[str, pa.Array]]:
        """(where, rows) of one column, in order; `where` is what row numbers count from the start of."""
        raise NotImplementedError

    def load(self, split: str) -> Split:
        features = self.features(split)
        image = self._pick(features, self.image_column, "data.image_column", "picture", _image_columns(features))
        label = self._pick(features, self.label_column, "data.label_column", "label", _label_columns(features))
        if not _holds_images(features[image]):
            raise InputError(
                f"column '{image}' of {self.name} holds no pictures. Columns: {', '.join(features)}. Set data.image_column."
            )
        names = self._names(split, label)
        labels = self._labels(split, label, names)
        folders = [f.resolve() for f in self.folders()]

        def read(rows: np.ndarray) -> Iterator[tuple[str, Raw]]:
            wanted, row, file, first = set(rows.tolist()), 0, None, 0
            for where, values in self.batches(split, image):
                if where != file:  # rows are named by their place in their own file
                    file, first = where, row
                for value in values:
                    if row in wanted:
                        yield f"{where}, row {row - first}", _raw(value, folders)
                    row += 1
            if row != len(labels):  # later rows would have got the labels of others
                raise InputError(
                    f"{self.name}:{split} has {len(labels)} rows in column '{label}', but {row} in column '{image}': a file "
                    "is damaged. Write it anew."
                )

        return Split(to_label_space(names, f"{self.name} (column '{label}')"), labels, read)

    def _pick(self, features: dict, asked: str | None, key: str, what: str, found: list[str]) -> str:
        if asked is not None and asked not in features:
            near = difflib.get_close_matches(asked, features, n=3)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise InputError(f"{self.name} has no column '{asked}' ({key}).{hint} Its columns: {', '.join(features)}.")
        if asked is None and not found:
            raise InputError(
                f"{self.name} has no {what} column that is known as one. Its columns: {', '.join(features)}. Set {key}."
            )
        return asked or found[0]

    def _names(self, split: str, label: str) -> list[str]:
        """Class names, as the data writes them: the column's own, else made of its values."""
        base = "train" if "train" in self.splits() else split  # a test part must not number its classes anew
        own, theirs = self._label_kind(split, label), self._label_kind(base, label)
        if own != theirs:
            raise InputError(
                f"column '{label}' of {self.name} holds {_in_words(own)} in '{split}', but {_in_words(theirs)} in "
                f"'{base}'; expected the same classes in the same order. Write one of them anew."
            )
        if isinstance(own, list):
            return own
        values = self._values(base, label, unique=True)
        most = max(values, default=-1) if own == "numbers" else len(values)
        if most > MAX_TABLE_CLASSES:
            told = f"reaches {most}" if own == "numbers" else f"holds {most} names"
            raise InputError(
                f"column '{label}' of {self.name} {told}: not class ids, which count from 0, nor names of classes. "
                f"Columns: {', '.join(self.features(base))}. Set data.label_column."
            )
        return sorted(values) if own == "names" else [str(i) for i in range(most + 1)]

    def _label_kind(self, split: str, label: str) -> str | list[str]:
        """What a split's label column holds: "numbers" or "names", or the names that it gives its numbers."""
        features = self.features(split)
        if label not in features:
            raise InputError(f"{self.name}:{split} has no column '{label}'. Its columns: {', '.join(features)}.")
        feature = features[label]
        if getattr(feature, "names", None):
            return [str(name) for name in feature.names]
        kind = getattr(feature, "dtype", "several values in each row")
        if kind in ("string", "large_string"):
            return "names"
        if kind != "bool" and not re.fullmatch(r"u?int\d+", kind):
            raise InputError(
                f"column '{label}' of {self.name} holds {kind}; labels are whole numbers or names. "
                f"Columns: {', '.join(features)}. Set data.label_column."
            )
        return "numbers"

    def _values(self, split: str, label: str, unique: bool = False) -> list:
        """The labels of the rows (None for a missing one); unique: each once, without None."""
        import pyarrow.compute

        column = self.column(split, label)
        try:
            return pyarrow.compute.unique(column).drop_null().to_pylist() if unique else column.to_pylist()
        except UnicodeDecodeError as error:
            raise InputError(
                f"column '{label}' of {self.name}:{split} holds a name that is not UTF-8 text: {error}."
            ) from None

    def _labels(self, split: str, label: str, names: list[str]) -> np.ndarray:
        """int64 [N], checked. Raises InputError naming the first row whose label is none of the classes."""
        import numpy as np

        values = self._values(split, label)
        if not values:
            raise InputError(f"the split '{split}' of {self.name} is empty: it has no rows. Name another split.")
        if all(v in (None, -1) for v in values):
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
    return typed or [n for n, f in features.items() if _holds_images(f)]


def _holds_images(feature: Any) -> bool:
    bare = getattr(feature, "dtype", "") in ("binary", "large_binary")
    return type(feature).__name__ == "Image" or bare or (isinstance(feature, dict) and "bytes" in feature)


def _label_columns(features: dict) -> list[str]:
    typed = [n for n, f in features.items() if type(f).__name__ == "ClassLabel"]
    if "fine_label" in typed:  # CIFAR-100's other one is the coarse label
        return ["fine_label"]
    return typed or [n for n in ("label", "labels", "fine_label", "class") if n in features]


def _raw(value: pa.Scalar, folders: list[Path]) -> Raw:
    try:
        value = value.as_py()
    except UnicodeDecodeError:
        return BrokenImage("its path is not UTF-8 text")
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return inside(value, folders)
    return value if isinstance(value, bytes) else None


def inside(path: str, folders: list[Path]) -> Path | BrokenImage:
    """The file that a row names, if it lies below one of these folders: a table may be anyone's, and name any file."""
    try:
        found = next((p for f in folders if (p := (f / path).resolve()).is_relative_to(f)), None)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a loop of links
        return BrokenImage(f"it is at {path!r}, which is no path: {error}")
    if found is None:
        return BrokenImage(f"it is at {path!r}, outside {folders[0]}; only files below that are opened")
    return found


def _in_words(kind: str | list[str]) -> str:
    return kind if isinstance(kind, str) else f"the classes {', '.join(kind[:8])}" + (", ..." if len(kind) > 8 else "")


class ParquetTable(Table):
    """One parquet file, or a folder of them; the first word of a file's name says its split."""

    def __init__(self, path: Path, *columns: str | None):
        super().__init__(*columns)
        self.files, self.root = parquet_files(path), path if path.is_dir() else path.parent
        self.name = path.resolve().as_posix()
        self._opened: dict[Path, Any] = {}
        self._features: dict[Path, dict[str, Any]] = {}

    def splits(self) -> Sequence[str]:
        return list(self.files)

    def facts(self, split: str) -> dict:
        used = self.files[split] if split == "train" else self.files.get("train", []) + self.files[split]
        stats = [(p, p.stat()) for p in used]
        return {"files": [(p.relative_to(self.root).as_posix(), s.st_size, s.st_mtime_ns) for p, s in stats]}

    def _open(self, path: Path):
        import pyarrow.parquet as pq

        if path not in self._opened:
            if not path.is_file():  # a pipe would be waited for, for ever
                raise InputError(f"{path} is not a file; expected parquet. Remove it.")
            with _reading(path):
                self._opened[path] = pq.ParquetFile(path, pre_buffer=False)
        return self._opened[path]

    def features(self, split: str) -> dict[str, Any]:
        first, *others = self.files[split]
        features = self._features_of(first)
        for path in others:
            if list(self._features_of(path)) != list(features):
                raise _unlike(path, f"the columns {', '.join(self._features_of(path))}", first, ", ".join(features))
        return features

    def folders(self) -> list[Path]:
        return [self.root]

    def _features_of(self, path: Path) -> dict[str, Any]:
        import datasets

        if path not in self._features:
            with _reading(path):
                schema = self._open(path).schema_arrow
            try:
                self._features[path] = dict(datasets.Features.from_arrow_schema(schema))
            except Exception as error:  # of json, pyarrow, datasets: whatever its description of itself breaks
                reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
                raise InputError(f"{path} describes its columns in a way that cannot be read: {reason}.") from None
        return self._features[path]

    def column(self, split: str, name: str) -> pa.ChunkedArray:
        import pyarrow as pa

        chunks, first = [], self.files[split][0]
        for path in self.files[split]:
            feature, expected = self._features_of(path)[name], self._features_of(first)[name]
            if feature != expected:
                raise _unlike(path, f"{feature} in column '{name}'", first, expected)
            with _reading(path):
                chunks += self._open(path).read([name], use_threads=False).column(0).chunks
        with _reading(path):
            return pa.chunked_array(chunks, type=chunks[0].type if chunks else pa.null())

    def batches(self, split: str, name: str) -> Iterator[tuple[str, pa.Array]]:
        for path in self.files[split]:
            feature = self._features_of(path)[name]
            if not _holds_images(feature):
                raise _unlike(path, f"{feature} in column '{name}'", self.files[split][0], "pictures")
            batches = self._open(path).iter_batches(batch_size=64, columns=[name], use_threads=False)
            while True:
                with _reading(path):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield path.relative_to(self.root).as_posix(), batch.column(0)


def _unlike(path: Path, has: str, first: Path, expected: Any) -> InputError:
    return InputError(
        f"{path} has {has}, but {first.name} {expected}. Files of one split must be alike: remove one, or write it anew."
    )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
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
    """A data set of the Hugging Face hub. What was decoded of it is cached by name: delete the store to fetch it again.

    local: what to do where it cannot be fetched, for the error.
    """

    def __init__(self, name: str, *columns: str | None, known: Sequence[str] = (), local: str = ""):
        super().__init__(*columns)
        self.name, self.known, self.local = name, known, local
        self._splits: dict[str, Any] = {}
        self._asked = False

    def splits(self) -> Sequence[str]:
        if not self.known:
            with self._fetching() as datasets:
                self.known = datasets.get_dataset_split_names(self.name)
        return self.known

    def facts(self, split: str) -> dict:
        return {}

    @contextlib.contextmanager
    def _fetching(self) -> Iterator[Any]:
        """The module `datasets`, if the hub has this data set; its errors as InputError."""
        try:
            if not self._asked:
                _check_hub(self.name)  # before the import, which takes a second
                self._asked = True
            import datasets

            yield datasets
        except InputError:
            raise
        except Exception as error:  # of huggingface_hub, httpx, pyarrow, datasets: whatever stands in the way
            reason = (" ".join(str(error).split())[:300] or type(error).__name__).rstrip(".")
            if self.local:
                raise InputError(
                    f"{self.name} cannot be fetched from the Hugging Face hub: {reason}. {self.local}"
                ) from None
            raise InputError(
                f"there is no folder {self.name} here, and no data set of that name can be fetched from the Hugging Face hub: "
                f"{reason}.{folders_near(Path(self.name))} Expected the path of a folder of class folders or of parquet files, "
                f"OWNER/NAME on the hub, or {', '.join(BUILT_IN)}."
            ) from None

    def folders(self) -> list[Path]:
        """What was fetched; a path in a data set of the hub leads to nothing else of this machine."""
        import datasets.config
        import huggingface_hub.constants

        config = datasets.config
        kept = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH)
        return [Path(huggingface_hub.constants.HF_HUB_CACHE), *map(Path, kept)]

    def _split(self, split: str):
        if split not in self.splits():
            raise InputError(f"{self.name} has no split '{split}'. It has: {', '.join(self.splits())}.")
        if split not in self._splits:
            with self._fetching() as datasets:
                self._splits[split] = datasets.load_dataset(self.name, split=split, **self._files_of(split))
        return self._splits[split]

    @functools.cached_property
    def _builder(self) -> Any:
        """What the data set says of itself; nothing is fetched but that."""
        with self._fetching() as datasets:
            return datasets.load_dataset_builder(self.name)

    def _files_of(self, split: str) -> dict[str, Any]:
        """Arguments that make `load_dataset` fetch the files of this split alone; it fetches all splits' otherwise."""
        builder = self._builder
        files = builder.config.data_files or {}
        if set(files) <= {split} or split not in files or Path(builder.cache_dir).is_dir():
            return {}
        # the numbers of the other splits are missed, and what the data set's card says of columns is not looked up, else
        return {
            "data_files": {split: list(files[split])},
            "features": builder.info.features,
            "verification_mode": "no_checks",
        }

    def features(self, split: str) -> dict[str, Any]:
        if split not in self._splits and split in self.splits() and self._builder.info.features:
            return dict(self._builder.info.features)
        return dict(self._split(split).features)

    def column(self, split: str, name: str) -> pa.ChunkedArray:
        return self._split(split).data.column(name)

    def batches(self, split: str, name: str) -> Iterator[tuple[str, pa.Array]]:
        for batch in self._split(split).data.select([name]).to_batches(max_chunksize=64):
            yield f"{self.name}:{split}", batch.column(0)


HUB_SECONDS = 10.0  # for the hub's first answer
BARE_SECONDS = 2.0  # for a name without its owner, which is most likely a mistyped folder


def _check_hub(name: str) -> None:
    """Raises an error at once where the hub cannot answer or has no such data set: `datasets` tries for half a minute.

    A data set that an earlier run fetched is opened without an answer.
    """
    import threading

    import huggingface_hub.constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return  # `datasets` looks at what is cached, and nowhere else
    outcome: list[Exception | None] = []
    limit = HUB_SECONDS if "/" in name else BARE_SECONDS

    def ask() -> None:
        try:
            huggingface_hub.HfApi().dataset_info(name, timeout=limit)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # looking up the hub's address has no time limit
    thread.start()
    thread.join(limit)
    error = outcome[0] if outcome else TimeoutError(f"no answer in {limit:g} s")
    if error is None or _is_cached(name):
        return
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        raise LookupError(f"it has no {name}, or none that you may see")
    if not isinstance(error, HfHubHTTPError):  # with those, `datasets` says what is wrong at once
        raise ConnectionError(f"it cannot be reached ({' '.join(str(error).split())[:100] or type(error).__name__})")


def _is_cached(name: str) -> bool:
    from huggingface_hub.constants import HF_HOME

    cache = os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets")  # as `datasets` has it
    return Path(cache, name.replace("/", "___")).is_dir()


def folders_near(path: Path) -> str:
    """ " Did you mean ...?" with the folders beside a path that are called like it."""
    tmp = subfolders(path.parent) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, tmp, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(str(path.parent / n) for n in near)}?" if near else ""
