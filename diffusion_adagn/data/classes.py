"""The names of a source's classes: ImageNet's table, and the subset that a config asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..labels import LabelSpace
from .class_lists import NAMES, class_list, imagenet_classes


def to_label_space(names: Sequence[str], said_by: str = "") -> LabelSpace:
    """The label space of these class names. Names that are all WordNet ids get readable ones where ImageNet has them;
    the 1000 names of ImageNet get their WordNet ids. said_by: where they stand, for the error."""
    try:
        return _to_label_space(names)
    except InputError as error:
        if not said_by:
            raise
        raise InputError(
            f"the classes of {said_by} cannot be told apart (a run of spaces counts as one space): {error} Rename them."
        ) from None


def _to_label_space(names: Sequence[str]) -> LabelSpace:
    table = imagenet_classes()
    if names and all(re.fullmatch(r"n\d{8}", n) for n in names):
        return LabelSpace(tuple(table.get(n, n) for n in names), wnids=tuple(names))
    if len(names) == len(table):
        first = [[n.split(",")[0].strip().casefold() for n in both] for both in (names, table.values())]
        if sum(a == b for a, b in zip(*first)) >= 0.95 * len(table):
            return LabelSpace(tuple(_distinct_names(names, table)), wnids=tuple(table))
    return LabelSpace(tuple(names))


def _distinct_names(names: Sequence[str], table: dict[str, str]) -> list[str]:
    """The hub's ImageNet names, with the table's where a name is given twice (two classes are a "crane")."""
    return [ours if list(names).count(theirs) > 1 else theirs for theirs, ours in zip(names, table.values())]


def class_ids(space: LabelSpace, classes: str) -> list[int]:
    """Ids of `config.classes`: what LabelSpace.parse reads, the name of a list in class_lists.py (unless a class is called
    so), or a .txt file with one class a line (# for comments)."""
    if classes in NAMES and classes not in space.names:
        missing = [wnid for wnid in class_list(classes) if wnid not in space.wnids]
        if missing:
            names = imagenet_classes()
            raise InputError(
                f"data.classes {classes} is a list of {len(class_list(classes))} ImageNet classes, and the data lacks {len(missing)} "
                f"of them: {', '.join(f'{wnid} ({names[wnid]})' for wnid in missing[:3])}{', ...' if len(missing) > 3 else ''}. "
                "Its class folders are to be called by WordNet ids."
            )
        return [space.wnids.index(wnid) for wnid in class_list(classes)]
    if not classes.endswith(".txt"):
        return space.parse(classes)
    ids = []
    for number, line in class_lines(classes):
        try:
            found = space.parse([line])
        except InputError as error:
            raise InputError(f"{classes}, line {number}: {error}") from None
        if len(found) != 1:
            raise InputError(f"{classes}, line {number}: expected one class a line, got {line!r}.")
        ids += found
    if not ids:
        raise InputError(f"{classes} names no class; expected one a line (a name, an id or a WordNet id).")
    return ids


def class_lines(path: str | Path, said_by: str = "data.classes") -> list[tuple[int, str]]:
    """(line number, class) of a text file with one class a line, # for comments. said_by: who named it, for the error."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{said_by} names the file {path}, which cannot be read as text: {error}.") from None
    return [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#")]
