"""Find the source and the split of a data argument NAME_OR_PATH[:split]."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from .. import recipes
from ..config import DataConfig
from ..errors import InputError
from .cifar_pickles import ARCHIVES, CifarPickles, is_cifar
from .label_files import SUFFIXES, LabelFile, find_tables, has_labels
from .sources import BUILT_IN, TEST, VALIDATION, ClassFolders, Digits, Source, is_text, printable
from .tables import HubTable, ParquetTable, folders_near, parquet_files

_LOCAL = "Name local files in its place, as in --data.source PATH_TO_PARQUET (one file, or a folder of them) or --data.source {}"
_FILES = (".parquet", *SUFFIXES, *ARCHIVES)


@contextlib.contextmanager
def os_errors_as_input_error(source: str) -> Iterator[None]:
    """Turns an OSError in the block into an InputError about the source."""
    try:
        yield
    except OSError as error:
        raise InputError(f"data.source {printable(source)} cannot be read: {error}.") from None


ResolvedSource = tuple[Source, str, str | None]


def find_source(config: DataConfig) -> ResolvedSource:
    """(source, NAME_OR_PATH as written, split as written or None) of `config.source`. Loads no images."""
    with os_errors_as_input_error(config.source):
        return _find_source(config)


def _find_source(config: DataConfig) -> tuple[Source, str, str | None]:
    text = config.source.strip()
    if not is_text(text) or "\0" in text:
        raise InputError(f"data.source {printable(text)} is not UTF-8 text. Rename the folder, or use a link to it.")
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
        # with data.label_column set, a table is read, whose error lists the columns
        return LabelFile(path, *columns) if config.label_column and find_tables(path) else ClassFolders(path)
    near = difflib.get_close_matches(head.lower(), BUILT_IN, n=1, cutoff=0.75) if "/" not in head else []
    is_path = path.is_absolute() or head.startswith((".", "~")) or head.count("/") > 1
    if is_path or near or re.search(r"\\|\s|\.parquet$", head):
        missing, hint = (
            (f"folder or data set {head}", f" Did you mean {near[0]}?")
            if near
            else (f"such path: {head}", folders_near(path))
        )
        raise InputError(
            f"there is no {missing}.{hint} Expected {', '.join(BUILT_IN)}, OWNER/NAME on the hub, or the path of a folder of class "
            "folders or of parquet files."
        )
    return HubTable(head, *columns)


def choose_part(source: Source, word: str | None, part: str | None) -> tuple[list[str], str, bool]:
    """Choose the splits to try for a part of a source.

    Args:
        source: The source.
        word: The split as the user wrote it; None for train.
        part: "train", "heldout", or None for the written split.

    Returns:
        The splits, of which the first with labels is used; "train" or "heldout"; and whether a seeded fraction of the
        split is held out, since the source has no held-out split.

    Raises:
        InputError: The split does not exist. The message lists the splits.
    """
    splits = list(source.splits())
    wanted = word or "train"
    aliases = VALIDATION if wanted in VALIDATION else (wanted,)
    split = next((s for s in (wanted, *aliases) if s in splits), None)
    if split is None and wanted not in ("heldout", *TEST, *VALIDATION):
        raise InputError(
            f"{source.name} has no split '{wanted}'. It has: {', '.join(splits)}; 'heldout' always works. "
            f"Write one of them after a colon, such as NAME_OR_PATH:{splits[0]}."
        )
    heldout_splits = [s for s in (*TEST, *VALIDATION) if s in splits and s != split]
    if split is None or part == "heldout":
        if part == "train":
            raise InputError(f"'{wanted}' is the held-out part; to train, give another split or none.")
        base = split or ("train" if "train" in splits else splits[0])
        return heldout_splits or [base], "heldout", not heldout_splits
    whole = bool(heldout_splits) or (part is None and split in (*TEST, *VALIDATION))
    return [split], "train", not whole


def is_config(source: str) -> bool:
    """Whether the argument of `adagn data inspect` is a config: a YAML file, or a recipe without a data set of its name."""
    recipe = source in recipes.names() and source not in BUILT_IN and not Path(source).exists()
    return source.endswith((".yaml", ".yml")) or recipe
