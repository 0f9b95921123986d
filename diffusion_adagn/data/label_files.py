"""Labels in a table next to the images: metadata.csv or metadata.jsonl, as in the Hugging Face `imagefolder`."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .classes import to_label_space
from .sources import TEST, VALIDATION, Split, size_and_mtime
from .tables import resolve_inside

METADATA = ("metadata.csv", "metadata.jsonl")
SUFFIXES = (".csv", ".jsonl")
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image")
LABEL_COLUMNS = ("label", "labels", "class", "class_name")


class LabelFile:
    """A table with one row per image: its file name, relative to the table's folder, and its class.

    Classes are sorted by name, or by number if all are whole numbers.

    Args:
        path: A .csv file (its first line names the columns) or .jsonl file (one object per line); a folder with
            metadata.csv or metadata.jsonl; or a folder with train/metadata.csv and optionally test/ or validation/.
        image_column: data.image_column; None: the only column named in FILE_COLUMNS.
        label_column: data.label_column; None: the only column named in LABEL_COLUMNS.
    """

    channels = 3

    def __init__(self, path: Path, image_column: str | None, label_column: str | None):
        self.tables, self.name = find_tables(path), path.resolve().as_posix()
        self.image_column, self.label_column = image_column, label_column
        self._read: dict[str, list[tuple[str, str]]] = {}

    def splits(self) -> Sequence[str]:
        return list(self.tables)

    def facts(self, split: str) -> dict:
        used = {"train", split} & set(self.tables)  # train defines the classes
        digests = {s: hashlib.sha256(self.tables[s].read_bytes()).hexdigest() for s in sorted(used)}
        folder = self.tables[split].parent
        return {"tables": digests, "files": [(file, *size_and_mtime(folder / file)) for file, _ in self._rows(split)]}

    def load(self, split: str) -> Split:
        import numpy as np

        rows, folder = self._rows(split), self.tables[split].parent.resolve()
        classes = self._classes("train" if "train" in self.tables else split)
        ids = {name: i for i, name in enumerate(classes)}
        for number, (_, name) in enumerate(rows, 1):
            if name not in ids:
                raise InputError(
                    f"{self.tables[split]}, image {number}: the class {name!r} is not in train, which has "
                    f"{', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''}. Correct or remove the row."
                )
        labels = np.array([ids[name] for _, name in rows], dtype=np.int64)
        return Split(
            to_label_space(classes, str(self.tables[split])),
            labels,
            lambda indices: ((rows[i][0], resolve_inside(rows[i][0], [folder])) for i in indices),
        )

    def _classes(self, split: str) -> list[str]:
        names = {name for _, name in self._rows(split)}
        numbers = all(name.isascii() and name.isdigit() for name in names)
        return sorted(names, key=(lambda name: (int(name), name)) if numbers else None)

    def _rows(self, split: str) -> list[tuple[str, str]]:
        """(file name, class) of each row. A split is read once."""
        if split not in self._read:
            self._read[split] = self._read_rows(self.tables[split])
        return self._read[split]

    def _read_rows(self, table: Path) -> list[tuple[str, str]]:
        columns, rows = read_table(table)
        file = _pick_column(table, columns, self.image_column, FILE_COLUMNS, "file name", "data.image_column")
        label = _pick_column(table, columns, self.label_column, LABEL_COLUMNS, "label", "data.label_column")
        classes: dict[str, str] = {}
        for number, row in rows:
            name, value = row.get(file), row.get(label)
            fault = ""
            if not isinstance(name, str) or not name or isinstance(value, bool) or not isinstance(value, str | int):
                fault = (
                    f"expected a file name in column '{file}' and a class in column '{label}', got {name!r:.60} and {value!r:.60}. "
                    "Correct or remove the line"
                )
            elif not str(value).strip():
                fault = f"{name} has no class (column '{label}'). Give it one"
            elif name in classes:
                fault = f"{name} is listed twice. Remove one of the lines"
            if fault:
                raise InputError(f"{table}, line {number}: {fault}.")
            classes[name] = str(value).strip()
        if not classes:
            raise InputError(f"{table} lists no image; expected lines with a file name and a class.")
        return list(classes.items())


def find_tables(path: Path) -> dict[str, Path]:
    """Split -> its table; empty if the path has no table."""
    if path.is_file():
        return {"train": path} if path.suffix in SUFFIXES else {}
    for folders in ({"train": path}, {s: path / s for s in ("train", *TEST, *VALIDATION)}):
        tables = {s: [folder / name for name in METADATA if (folder / name).is_file()] for s, folder in folders.items()}
        for s, files in tables.items():
            if len(files) > 1:
                raise InputError(f"{folders[s]} has both {' and '.join(METADATA)}. Remove one of them.")
        if tables["train"]:
            return {s: files[0] for s, files in tables.items() if files}
    return {}


def has_labels(path: Path, image_column: str | None, label_column: str | None) -> bool:
    """Whether the path has a table with class labels. (A metadata.csv may contain other descriptions.)

    Raises InputError for a misspelt column: otherwise the folder names would silently become the classes.
    """
    table = find_tables(path).get("train")
    if table is None:
        return False
    wanted = [
        ([label_column] if label_column else LABEL_COLUMNS, "data.label_column"),
        ([image_column] if image_column else FILE_COLUMNS, "data.image_column"),
    ]
    for max_rows in (1, None):  # the first object of a .jsonl may lack a column that others have
        columns, _ = read_table(table, max_rows)
        missing = [(known, key) for known, key in wanted if not set(known) & set(columns)]
        if not missing or table.suffix == ".csv":
            break
    for known, key in missing:
        for column in columns:
            if near := difflib.get_close_matches(column.strip().lower(), known, n=1, cutoff=0.75):
                raise InputError(
                    f"{table} has a column '{column}'. Did you mean '{near[0]}'? Rename the column, or set {key} to "
                    f"'{column}'. (A table without classes may have any other name.)"
                )
    return not missing


def unused_table(folder: Path) -> str:
    """A note about a table in `folder` without classes; empty if there is none."""
    table = find_tables(folder).get("train")
    if table is None:
        return ""
    columns = ", ".join(read_table(table, max_rows=1)[0])[:200]
    return (
        f"{table} has no class column (its columns: {columns}), so the folder names are the classes. To read them from "
        "the table, set data.label_column."
    )


def _pick_column(
    table: Path, columns: Sequence[str], requested: str | None, known: Sequence[str], role: str, key: str
) -> str:
    """The requested column, else the only column whose name is in `known`."""
    matches = [c for c in columns if c == requested] if requested is not None else [c for c in columns if c in known]
    if len(matches) == 1:
        return matches[0]
    fault = f"several columns that may be the {role}" if matches else f"no {role} column"
    wanted = f"'{requested}'" if requested is not None else f"one of {', '.join(known)}"
    raise InputError(f"{table} has {fault} (expected {wanted}). Its columns: {', '.join(columns)[:200]}. Set {key}.")


def read_table(table: Path, max_rows: int | None = None) -> tuple[list[str], list[tuple[int, dict]]]:
    """The columns, and (line number, row) of the first `max_rows` rows. Raises InputError for another file format."""
    rows: list[tuple[int, dict]] = []
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                columns = list(reader.fieldnames or ())
                for row in reader:
                    if None in row or None in row.values():
                        raise ValueError(
                            f"line {reader.line_num}: expected {len(columns)} values ({', '.join(columns)[:200]})"
                        )
                    rows.append((reader.line_num, row))
                    if len(rows) == max_rows:
                        break
            else:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise ValueError(
                                f'line {number}: expected an object, such as {{"file_name": "1.png", "label": "cat"}}'
                            )
                        rows.append((number, row))
                    if len(rows) == max_rows:
                        break
                columns = list(dict.fromkeys(key for _, row in rows for key in row))
    except (csv.Error, UnicodeDecodeError, ValueError, RecursionError) as error:
        file_format = "CSV" if table.suffix == ".csv" else "JSON lines"
        raise InputError(
            f"{table} cannot be read as {file_format} in UTF-8: {' '.join(str(error).split())[:200]}."
        ) from None
    return columns, rows
