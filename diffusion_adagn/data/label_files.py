"""Labels in a table beside the pictures: metadata.csv or metadata.jsonl, as the Hugging Face `imagefolder` has them."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .classes import to_label_space
from .sources import TEST, VALIDATION, Split, stamp
from .tables import inside

METADATA = ("metadata.csv", "metadata.jsonl")
SUFFIXES = (".csv", ".jsonl")
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image")
LABEL_COLUMNS = ("label", "labels", "class", "class_name")


class LabelFile:
    """A table with a row per picture: its file name, relative to the table's folder, and its class.

    A .csv (its first line names the columns) or .jsonl (an object a line) file; or DIR/metadata.csv, DIR/metadata.jsonl; or
    DIR/train/metadata.csv with test/ or validation/ beside it. The columns are data.image_column and data.label_column; unset:
    the one that is called like one of FILE_COLUMNS, and of LABEL_COLUMNS. Classes are sorted by name, or by number if all
    are whole numbers.
    """

    channels = 3

    def __init__(self, path: Path, image_column: str | None, label_column: str | None):
        self.tables, self.name = tables(path), path.resolve().as_posix()
        self.image_column, self.label_column = image_column, label_column
        self._read: dict[str, list[tuple[str, str]]] = {}

    def splits(self) -> Sequence[str]:
        return list(self.tables)

    def facts(self, split: str) -> dict:
        used = {"train", split} & set(self.tables)  # train has the classes
        digests = {s: hashlib.sha256(self.tables[s].read_bytes()).hexdigest() for s in sorted(used)}
        folder = self.tables[split].parent
        return {"tables": digests, "files": [(file, *stamp(folder / file)) for file, _ in self._rows(split)]}

    def load(self, split: str) -> Split:
        import numpy as np

        rows, folder = self._rows(split), self.tables[split].parent.resolve()
        classes = self._classes("train" if "train" in self.tables else split)
        ids = {name: i for i, name in enumerate(classes)}
        for number, (_, name) in enumerate(rows, 1):
            if name not in ids:
                raise InputError(
                    f"{self.tables[split]}, picture {number}: the class {name!r} is none of train's: "
                    f"{', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''}. Correct or remove the row."
                )
        labels = np.array([ids[name] for _, name in rows], dtype=np.int64)
        return Split(
            to_label_space(classes, str(self.tables[split])),
            labels,
            lambda some: ((rows[i][0], inside(rows[i][0], [folder])) for i in some),
        )

    def _classes(self, split: str) -> list[str]:
        names = {name for _, name in self._rows(split)}
        numbers = all(name.isascii() and name.isdigit() for name in names)
        return sorted(names, key=(lambda name: (int(name), name)) if numbers else None)

    def _rows(self, split: str) -> list[tuple[str, str]]:
        """(file name, class) of each row. Read once a split."""
        if split not in self._read:
            self._read[split] = self._read_rows(self.tables[split])
        return self._read[split]

    def _read_rows(self, table: Path) -> list[tuple[str, str]]:
        columns, rows = read_table(table)
        file = pick(table, columns, self.image_column, FILE_COLUMNS, "file name", "data.image_column")
        label = pick(table, columns, self.label_column, LABEL_COLUMNS, "label", "data.label_column")
        found: dict[str, str] = {}
        for number, row in rows:
            name, value = row.get(file), row.get(label)
            if not isinstance(name, str) or not name or isinstance(value, bool) or not isinstance(value, str | int):
                raise InputError(
                    f"{table}, line {number}: expected a file name in column '{file}' and a class in column '{label}', got "
                    f"{name!r:.60} and {value!r:.60}. Correct or remove the line."
                )
            if not str(value).strip():
                raise InputError(f"{table}, line {number}: {name} has no class (column '{label}'). Give it one.")
            if name in found:
                raise InputError(f"{table}, line {number}: {name} is listed a second time. Remove one of the lines.")
            found[name] = str(value).strip()
        if not found:
            raise InputError(f"{table} lists no picture; expected lines with a file name and a class.")
        return list(found.items())


def tables(path: Path) -> dict[str, Path]:
    """Split -> its table; empty if there is none at that path."""
    if path.is_file():
        return {"train": path} if path.suffix in SUFFIXES else {}
    for folders in ({"train": path}, {s: path / s for s in ("train", *TEST, *VALIDATION)}):
        found = {s: [folder / name for name in METADATA if (folder / name).is_file()] for s, folder in folders.items()}
        for s, files in found.items():
            if len(files) > 1:
                raise InputError(f"{folders[s]} has both {' and '.join(METADATA)}. Remove one of them.")
        if found["train"]:
            return {s: files[0] for s, files in found.items() if files}
    return {}


def has_labels(path: Path, image_column: str | None, label_column: str | None) -> bool:
    """Whether there is a table with class labels at that path: metadata.csv may describe pictures in other ways.

    Raises InputError for a table with a misspelt column: its classes would be taken from the folders, unnoticed.
    """
    table = tables(path).get("train")
    if table is None:
        return False
    wanted = [
        ([label_column] if label_column else LABEL_COLUMNS, "data.label_column"),
        ([image_column] if image_column else FILE_COLUMNS, "data.image_column"),
    ]
    for most in (1, None):  # an object of a .jsonl may lack what the others have
        columns, _ = read_table(table, most)
        missing = [(known, key) for known, key in wanted if not set(known) & set(columns)]
        if not missing or table.suffix == ".csv":
            break
    for known, key in missing:
        for column in columns:
            if near := difflib.get_close_matches(column.strip().lower(), known, n=1, cutoff=0.75):
                raise InputError(
                    f"{table} has a column '{column}'. Did you mean '{near[0]}'? Rename the column, or set {key} to '{column}'. "
                    "(A table that does not list classes may have any other name.)"
                )
    return not missing


def unused_table(folder: Path) -> str:
    """A note on the table in `folder` that lists no classes; empty if there is none."""
    table = tables(folder).get("train")
    if table is None:
        return ""
    columns = ", ".join(read_table(table, most=1)[0])[:200]
    return (
        f"{table} has no class column (its columns: {columns}), so the folders' names are the classes. To take them from "
        "the table, set data.label_column."
    )


def pick(table: Path, columns: Sequence[str], asked: str | None, known: Sequence[str], what: str, key: str) -> str:
    """The column that was asked for, else the only one that is called like one of `known`."""
    found = [c for c in columns if c == asked] if asked is not None else [c for c in columns if c in known]
    if len(found) == 1:
        return found[0]
    several = f"several columns that may be the {what}" if found else f"no {what} column"
    wanted = f"'{asked}'" if asked is not None else f"one of {', '.join(known)}"
    raise InputError(f"{table} has {several} (expected {wanted}). Its columns: {', '.join(columns)[:200]}. Set {key}.")


def read_table(table: Path, most: int | None = None) -> tuple[list[str], list[tuple[int, dict]]]:
    """(columns, (line number, row) of the first `most` rows). Raises InputError for what is no such table."""
    rows: list[tuple[int, dict]] = []
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                columns = list(reader.fieldnames or ())
                for row in reader:
                    if None in row or None in row.values():
                        raise InputError(
                            f"{table}, line {reader.line_num}: expected {len(columns)} values ({', '.join(columns)[:200]})."
                        )
                    rows.append((reader.line_num, row))
                    if len(rows) == most:
                        break
            else:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise InputError(f"{table}, line {number}: expected an object, such as "
                                             '{"file_name": "1.png", "label": "cat"}.')  # fmt: skip
                        rows.append((number, row))
                    if len(rows) == most:
                        break
                columns = list(dict.fromkeys(key for _, row in rows for key in row))
    except (csv.Error, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        kind = "CSV" if table.suffix == ".csv" else "JSON lines"
        raise InputError(f"{table} cannot be read as {kind} in UTF-8: {' '.join(str(error).split())[:200]}.") from None
    return columns, rows
