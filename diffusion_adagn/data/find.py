"""Which source, and which part of it, a data argument NAME_OR_PATH[:split] means."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from ..config import DataConfig
from ..errors import InputError
from .cifar_pickles import ARCHIVES, CifarPickles, is_cifar
from .label_files import SUFFIXES, LabelFile, has_labels, tables
from .sources import BUILT_IN, TEST, VALIDATION, ClassFolders, Digits, Source, is_text, printable
from .tables import HubTable, ParquetTable, folders_near, parquet_files

_LOCAL = "Give files that are here: --data.source PATH_TO_PARQUET (one file, or a folder of them), or --data.source {}"
_FILES = (".parquet", *SUFFIXES, *ARCHIVES)


@contextlib.contextmanager
def errors_as_input_error(source: str) -> Iterator[None]:
    """An OSError of the source's files or folders as InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"data.source {printable(source)} cannot be read: {error}.") from None


ResolvedSource = tuple[Source, str, str | None]


def find_source(config: DataConfig) -> ResolvedSource:
    """(source, NAME_OR_PATH as written, split as written or None) of `config.source`. Nothing is loaded yet."""
    with errors_as_input_error(config.source):
        return _find_source(config)


def _find_source(config: DataConfig) -> tuple[Source, str, str | None]:
    text = config.source.strip()
    if not is_text(text) or "\0" in text:
        raise InputError(f"data.source {printable(text)} is not UTF-8 text. Rename the folder, or give a link to it.")
    head, split = text, None
    if not text or (text not in BUILT_IN and not Path(text).expanduser().exists()):
        before, colon, after = text.rpartition(":")
        if colon and re.fullmatch(r"[\w.-]*", after):
            head, split = before, after
        if not head or split == "":
            raise InputError(f"data.source '{text}' is not NAME_OR_PATH[:split]; for example digits or cifar10:test.")
    return _open(head, config), head, split


def _open(head: str, config: DataConfig) -> Source:
    columns = (config.image_column, config.label_column)
    path = Path(head).expanduser()
    if head == "digits":
        return Digits()
    if head == "cifar10":
        return HubTable(
            "uoft-cs/cifar10", *columns, known=("train", "test"), local=_LOCAL.format("cifar-10-batches-py")
        )
    if head == "cifar100":
        return HubTable("uoft-cs/cifar100", *columns, known=("train", "test"), local=_LOCAL.format("cifar-100-python"))
    if path.exists() and not path.is_dir() and not (path.is_file() and path.name.endswith(_FILES)):
        raise InputError(
            f"data.source {path} is a file; expected a folder of class folders, or a file {', '.join(_FILES[:-1])}."
        )
    if path.exists():
        if path.suffix in SUFFIXES or (path.is_dir() and has_labels(path, *columns)):
            return LabelFile(path, *columns)
        if is_cifar(path):
            return CifarPickles(path)
        if parquet_files(path):
            return ParquetTable(path, *columns)
        # a column was named: the table says which columns it has
        return LabelFile(path, *columns) if config.label_column and tables(path) else ClassFolders(path)
    if path.is_absolute() or head.startswith((".", "~")) or head.count("/") > 1 or re.search(r"\\|\s|\.parquet$", head):
        raise InputError(
            f"there is no such path: {head}.{folders_near(path)} Expected {', '.join(BUILT_IN)}, a data set's name on the hub, a folder "
            "of class folders, or parquet files."
        )
    near = difflib.get_close_matches(head.lower(), BUILT_IN, n=1, cutoff=0.75)
    if near and "/" not in head:
        raise InputError(
            f"there is no folder {head} here, nor a data set of that name. Did you mean {near[0]}? Expected "
            f"{', '.join(BUILT_IN)}, OWNER/NAME on the hub, or the path of a folder of class folders or of parquet files."
        )
    return HubTable(head, *columns)


def choose_part(source: Source, word: str | None, part: str | None) -> tuple[list[str], str, bool]:
    """(splits, the first of which that has labels is the one; "train" or "heldout"; whether a seeded share of the split
    is (to be) cut off, because the source has no held-out split of its own).

    word: the split as the user wrote it, None for train; part: "train", "heldout" or None for the one written.
    Raises InputError for a split that does not exist, with those that do.
    """
    splits = list(source.splits())
    asked = word or "train"
    alike = VALIDATION if asked in VALIDATION else (asked,)
    found = next((s for s in (asked, *alike) if s in splits), None)
    if found is None and asked not in ("heldout", *TEST, *VALIDATION):
        raise InputError(
            f"{source.name} has no split '{asked}'. It has: {', '.join(splits)}; 'heldout' always works. "
            f"Write one of them after a colon, such as NAME_OR_PATH:{splits[0]}."
        )
    own = [s for s in (*TEST, *VALIDATION) if s in splits and s != found]
    if found is None or part == "heldout":
        if part == "train":
            raise InputError(f"the source names its held-out part ('{asked}'); to train, name another split or none.")
        base = found or ("train" if "train" in splits else splits[0])
        return own or [base], "heldout", not own
    whole = bool(own) or (part is None and found in (*TEST, *VALIDATION))
    return [found], "train", not whole
