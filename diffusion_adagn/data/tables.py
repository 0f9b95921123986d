"""Sources that are tables with an image column and a label column: parquet files, and data sets of the hub."""

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
    """A split whose labels are all missing, as in the test split of a contest."""


class Table:
    """The common part of parquet and hub sources. Subclasses define `features`, `column`, `folders` and `batches`."""

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
        """The folders that may contain the image files named by rows."""
        raise NotImplementedError

    def batches(self, split: str, name: str) -> Iterator[tuple[str, pa.Array]]:
        """Yields (file, rows) of one column, in order. Row numbers in messages count from the start of the file."""
        raise NotImplementedError

    def load(self, split: str) -> Split:
        features = self.features(split)
        image = self._pick(features, self.image_column, "data.image_column", "image", _image_columns(features))
        label = self._pick(features, self.label_column, "data.label_column", "label", _label_columns(features))
        if not _holds_images(features[image]):
            raise InputError(
                f"column '{image}' of {self.name} contains no images. Columns: {', '.join(features)}. Set "
                "data.image_column."
            )
        names = self._names(split, label)
        labels = self._labels(split, label, names)
        folders = [f.resolve() for f in self.folders()]

        def read(rows: np.ndarray) -> Iterator[tuple[str, Raw]]:
            wanted, row, previous, first = set(rows.tolist()), 0, None, 0
            for file, values in self.batches(split, image):
                if file != previous:  # row numbers count from the start of each file
                    previous, first = file, row
                for value in values:
                    if row in wanted:
                        yield f"{file}, row {row - first}", _raw(value, folders)
                    row += 1
            if row != len(labels):  # later images would get wrong labels
                raise InputError(
                    f"{self.name}:{split} has {len(labels)} rows in column '{label}', but {row} in column '{image}': a "
                    "file is corrupted. Write it again."
                )

        return Split(to_label_space(names, f"{self.name} (column '{label}')"), labels, read)

    def _pick(self, features: dict, requested: str | None, key: str, role: str, candidates: list[str]) -> str:
        if requested not in features and (requested is not None or not candidates):
            near = difflib.get_close_matches(requested or "", features, n=3)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            fault = f"has no known {role} column" if requested is None else f"has no column '{requested}' ({key})"
            raise InputError(f"{self.name} {fault}.{hint} Its columns: {', '.join(features)}. Set {key}.")
        return requested or candidates[0]

    def _names(self, split: str, label: str) -> list[str]:
        """Class names as written in the data: those of the column's feature, else from its values."""
        base = "train" if "train" in self.splits() else split  # a test split must use the class ids of train
        labels, base_labels = self._label_type(split, label), self._label_type(base, label)
        if labels != base_labels:
            raise InputError(
                f"column '{label}' of {self.name} contains {_describe_labels(labels)} in '{split}', but "
                f"{_describe_labels(base_labels)} in "
                f"'{base}'; expected the same classes in the same order. Write one of them again."
            )
        if isinstance(labels, list):
            return labels
        values = self._values(base, label, unique=True)
        largest = max(values, default=-1) if labels == "numbers" else len(values)
        if largest > MAX_TABLE_CLASSES:
            fact = f"reaches {largest}" if labels == "numbers" else f"contains {largest} names"
            raise InputError(
                f"column '{label}' of {self.name} {fact}: neither class ids, which count from 0, nor class names. "
                f"Columns: {', '.join(self.features(base))}. Set data.label_column."
            )
        return sorted(values) if labels == "names" else [str(i) for i in range(largest + 1)]

    def _label_type(self, split: str, label: str) -> str | list[str]:
        """The type of a split's label column: "numbers", "names", or the list of names of its numbers."""
        features = self.features(split)
        feature = features.get(label)
        if getattr(feature, "names", None):
            return [str(name) for name in feature.names]
        dtype = getattr(feature, "dtype", "several values in each row")
        if dtype in ("string", "large_string"):
            return "names"
        if dtype != "bool" and not re.fullmatch(r"u?int\d+", dtype):
            fault = f"column '{label}' of {self.name} contains {dtype}; labels are whole numbers or names"
            missing = f"{self.name}:{split} has no column '{label}'"
            raise InputError(
                f"{fault if label in features else missing}. Columns: {', '.join(features)}. Set data.label_column."
            )
        return "numbers"

    def _values(self, split: str, label: str, unique: bool = False) -> list:
        """The labels of the rows, None for a missing one. unique: each label once, without None."""
        import pyarrow.compute

        column = self.column(split, label)
        with _reading(f"column '{label}' of {self.name}:{split}"):
            return pyarrow.compute.unique(column).drop_null().to_pylist() if unique else column.to_pylist()

    def _labels(self, split: str, label: str, names: list[str]) -> np.ndarray:
        """The class ids, int64 [N]. Raises InputError for the first row whose label is not a class."""
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
                    f"{self.name}:{split}, row {row}: label {value!r} in column '{label}' is not among the "
                    f"{len(names)} classes ({shown}). Correct or remove the row."
                )
        return np.array([ids[v] for v in values], dtype=np.int64)


def _image_columns(features: dict) -> list[str]:
    typed = [n for n, f in features.items() if type(f).__name__ == "Image"]
    return typed or [n for n, f in features.items() if _holds_images(f)]


def _holds_images(feature: Any) -> bool:
    is_binary = getattr(feature, "dtype", "") in ("binary", "large_binary")
    return type(feature).__name__ == "Image" or is_binary or (isinstance(feature, dict) and "bytes" in feature)


def _label_columns(features: dict) -> list[str]:
    typed = [n for n, f in features.items() if type(f).__name__ == "ClassLabel"]
    if "fine_label" in typed:  # the other column of CIFAR-100 is the coarse label
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
        return resolve_inside(value, folders)
    return value if isinstance(value, bytes) else None


def resolve_inside(path: str, folders: list[Path]) -> Path | BrokenImage:
    """The file named by a row, if it is inside one of these folders: an untrusted table may name any file."""
    try:
        file = next((p for f in folders if (p := (f / path).resolve()).is_relative_to(f)), None)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a loop of links
        return BrokenImage(f"its path {path!r} is invalid: {error}")
    if file is None:
        return BrokenImage(f"its path {path!r} is outside {folders[0]}; only files inside that folder are opened")
    return file


def _describe_labels(labels: str | list[str]) -> str:
    if isinstance(labels, str):
        return labels
    return f"the classes {', '.join(labels[:8])}" + (", ..." if len(labels) > 8 else "")


class ParquetTable(Table):
    """One parquet file, or a folder of them. The first word of a file name is its split."""

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
            with _reading(path):
                if not path.is_file():  # reading a pipe could wait forever
                    raise OSError("it is not a file")
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
                self._features[path] = dict(datasets.Features.from_arrow_schema(schema))
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
                raise _unlike(path, f"{feature} in column '{name}'", self.files[split][0], "images")
            batches = self._open(path).iter_batches(batch_size=64, columns=[name], use_threads=False)
            while True:
                with _reading(path):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield path.relative_to(self.root).as_posix(), batch.column(0)


def _unlike(path: Path, has: str, first: Path, expected: Any) -> InputError:
    return InputError(
        f"{path} has {has}, but {first.name} {expected}. Files of one split must have the same columns: remove one, or "
        "write it again."
    )


@contextlib.contextmanager
def _reading(what: object) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # errors of json, pyarrow or datasets
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise InputError(f"{what} cannot be read as parquet: {reason}.") from None


def parquet_files(path: Path) -> dict[str, list[Path]]:
    """Split -> files. A single file is "train", and so are files whose names start with no split's name."""
    if path.is_file():
        return {"train": [path]}
    files = sorted(
        p for folder in (path, path / "data") for p in folder.glob("*.parquet") if not p.name.startswith(".")
    )
    order = ("train", *TEST, *VALIDATION)
    split_of = {
        p: next((s for s in order if p.stem == s or p.name.startswith((f"{s}-", f"{s}_", f"{s}."))), "train")
        for p in files
    }
    return {s: matches for s in order if (matches := [p for p in files if split_of[p] == s])}


class HubTable(Table):
    """A data set of the Hugging Face hub. Decoded images are cached by its name: delete the store to fetch it again.

    Args:
        name: OWNER/NAME on the hub.
        *columns: data.image_column and data.label_column.
        known: Its splits, if known without the network.
        local: What to do if it cannot be fetched, for the error.
    """

    def __init__(self, name: str, *columns: str | None, known: Sequence[str] = (), local: str = ""):
        super().__init__(*columns)
        self.name, self.known, self.local = name, known, local
        self._splits: dict[str, Any] = {}
        self._hub_checked = False

    def splits(self) -> Sequence[str]:
        if not self.known:
            with self._fetching() as datasets:
                self.known = datasets.get_dataset_split_names(self.name)
        return self.known

    def facts(self, split: str) -> dict:
        return {}

    @contextlib.contextmanager
    def _fetching(self) -> Iterator[Any]:
        """Yields the module `datasets`, if the hub has this data set. Errors in the block become InputError."""
        try:
            if not self._hub_checked:
                _check_hub(self.name)  # before the import, which takes a second
                self._hub_checked = True
            import datasets

            yield datasets
        except InputError:
            raise
        except Exception as error:  # errors of huggingface_hub, httpx, pyarrow or datasets
            reason = (" ".join(str(error).split())[:300] or type(error).__name__).rstrip(".")
            missing = (
                f"there is no folder {self.name}, and no data set of that name can be fetched from the Hugging Face hub: {reason}."
                f"{folders_near(Path(self.name))} Expected the path of a folder of class folders or of parquet files, OWNER/NAME on "
                f"the hub, or {', '.join(BUILT_IN)}."
            )
            known = f"{self.name} cannot be fetched from the Hugging Face hub: {reason}. {self.local}"
            raise InputError(known if self.local else missing) from None

    def folders(self) -> list[Path]:
        """The caches of fetched files: paths in a hub data set may not lead to other files of this machine."""
        import datasets.config
        import huggingface_hub.constants

        config = datasets.config
        caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH)
        return [Path(huggingface_hub.constants.HF_HUB_CACHE), *map(Path, caches)]

    def _split(self, split: str):
        if split not in self.splits():
            raise InputError(f"{self.name} has no split '{split}'. It has: {', '.join(self.splits())}.")
        if split not in self._splits:
            with self._fetching() as datasets:
                self._splits[split] = datasets.load_dataset(self.name, split=split, **self._files_of(split))
        return self._splits[split]

    @functools.cached_property
    def _builder(self) -> Any:
        """The description of the data set; fetches nothing else."""
        with self._fetching() as datasets:
            return datasets.load_dataset_builder(self.name)

    def _files_of(self, split: str) -> dict[str, Any]:
        """Arguments that make `load_dataset` fetch only the files of this split instead of all splits."""
        builder = self._builder
        files = builder.config.data_files or {}
        if set(files) <= {split} or split not in files or Path(builder.cache_dir).is_dir():
            return {}
        # otherwise the check misses the counts of other splits, and the column types of the data set's card are ignored
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


HUB_SECONDS = 10.0  # to wait for the hub's first answer
BARE_SECONDS = 2.0  # for a name without an owner, probably a mistyped folder


def _check_hub(name: str) -> None:
    """Raises an error quickly if the hub does not answer or lacks the data set:

    `datasets` would retry for half a minute.

    A data set in the cache needs no answer.
    """
    import threading

    import huggingface_hub.constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return  # `datasets` uses its cache only
    outcome: list[Exception | None] = []
    limit = HUB_SECONDS if "/" in name else BARE_SECONDS

    def ask() -> None:
        try:
            huggingface_hub.HfApi().dataset_info(name, timeout=limit)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # the DNS look-up has no time limit
    thread.start()
    thread.join(limit)
    error = outcome[0] if outcome else TimeoutError(f"no answer in {limit:g} s")
    if error is None or _is_cached(name):
        return
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        raise LookupError(f"it has no {name}, or you have no access")
    if not isinstance(error, HfHubHTTPError):  # for those, `datasets` reports the reason at once
        raise ConnectionError(f"it cannot be reached ({' '.join(str(error).split())[:100] or type(error).__name__})")


def _is_cached(name: str) -> bool:
    from huggingface_hub.constants import HF_HOME

    cache = os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets")  # as in `datasets`
    return Path(cache, name.replace("/", "___")).is_dir()


def folders_near(path: Path) -> str:
    """ " Did you mean ...?" with similarly named folders in the same parent folder."""
    siblings = subfolders(path.parent) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(str(path.parent / n) for n in near)}?" if near else ""
