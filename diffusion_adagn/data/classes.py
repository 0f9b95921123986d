"""Class names of a source (with the names of ImageNet), and the subset selected in a config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..labels import LabelSpace
from .class_lists import NAMES, class_list, imagenet_classes


def to_label_space(names: Sequence[str], origin: str = "") -> LabelSpace:
    """The label space of these class names.

    If all names are WordNet ids, those of ImageNet get readable names. The 1000 names of ImageNet get their WordNet
    ids.

    Args:
        names: One per class.
        origin: Where the names come from, for the error.
    """
    try:
        return _to_label_space(names)
    except InputError as error:
        if not origin:
            raise
        raise InputError(
            f"the class names of {origin} are not valid (spaces in a row count as one): {error} Rename them."
        ) from None


def _to_label_space(names: Sequence[str]) -> LabelSpace:
    table = imagenet_classes()
    if names and all(re.fullmatch(r"n\d{8}", n) for n in names):
        return LabelSpace(tuple(table.get(n, n) for n in names), wnids=tuple(names))
    if len(names) == len(table):
        first = [[n.split(",")[0].strip().casefold() for n in ns] for ns in (names, table.values())]
        if sum(a == b for a, b in zip(*first)) >= 0.95 * len(table):
            return LabelSpace(tuple(_distinct_names(names, table)), wnids=tuple(table))
    return LabelSpace(tuple(names))


def _distinct_names(names: Sequence[str], table: dict[str, str]) -> list[str]:
    """The given ImageNet names, with our table's name where a name is repeated (two classes are called "crane")."""
    return [table_name if list(names).count(name) > 1 else name for name, table_name in zip(names, table.values())]


def class_ids(space: LabelSpace, classes: str) -> list[int]:
    """Ids of the classes in `config.classes`.

    That is a selection for LabelSpace.parse, the name of a list in class_lists.py (unless a class has that name), or a
    .txt file with one class per line (# for comments).
    """
    if classes in NAMES and classes not in space.names:
        missing = [wnid for wnid in class_list(classes) if wnid not in space.wnids]
        if missing:
            names = imagenet_classes()
            raise InputError(
                f"data.classes {classes} is a list of {len(class_list(classes))} ImageNet classes, and the data lacks "
                f"{len(missing)} of them: "
                f"{', '.join(f'{wnid} ({names[wnid]})' for wnid in missing[:3])}{', ...' if len(missing) > 3 else ''}. "
                "Name its class folders by WordNet ids."
            )
        return [space.wnids.index(wnid) for wnid in class_list(classes)]
    if not classes.endswith(".txt"):
        return space.parse(classes)
    ids = []
    for number, line in class_lines(classes):
        try:
            line_ids = space.parse([line])
            if len(line_ids) != 1:
                raise ValueError(f"expected one class per line, got {line!r}.")
        except ValueError as error:
            raise InputError(f"{classes}, line {number}: {error}") from None
        ids += line_ids
    if not ids:
        raise InputError(f"{classes} lists no class; expected one per line (a name, an id or a WordNet id).")
    return ids


def class_lines(path: str | Path, option: str = "data.classes") -> list[tuple[int, str]]:
    """(line number, class) of a text file with one class per line, # for comments. option: where the path was given."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option}: the file {path} cannot be read as text: {error}.") from None
    return [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#")]
