"""The report of `adagn data inspect`: facts of a source, images per class, and a sheet of examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from .. import recipes
from ..commands import command, with_commands
from ..config import DataConfig
from ..errors import InputError, writing
from ..render.grids import labelled_grid
from .find import ResolvedSource, find_source
from .label_files import SUFFIXES
from .sources import ClassFolders
from .store import NothingHeldOut, open_dataset

if TYPE_CHECKING:
    import numpy as np

    from .dataset import ImageDataset

MAX_SHEET_ROWS = 50
RECIPES = {"digits": "digits", "cifar10": "cifar10_small"}  # source -> recipe; for others: own_images
SAME_IMAGES = "these same images"
MAX_COLOUR_CHECKED = 500  # images checked for colour
UNBALANCED_RATIO = 3  # largest to smallest class, from which balancing is suggested
MAX_LISTED_SKIPPED = 20  # broken images


def inspect_dataset(config: DataConfig, out: Path, per_class: int = 8, following: str | None = None) -> str:
    """Describe the training and held-out parts of a source, and save a sheet of examples.

    Args:
        config: The data settings.
        out: The sheet to write, a PNG.
        per_class: Examples in each row of the sheet.
        following: The command to suggest next; None: that of `train_command`.

    Returns:
        The text to print.

    Raises:
        InputError: The source is invalid, or the sheet cannot be written.
    """
    if per_class < 1:
        raise InputError(f"the sheet needs at least 1 example per class, not {per_class}.")
    resolved = find_source(config)
    dataset = open_dataset(config, resolved=resolved, empty_classes=True)
    heldout, reason = _heldout(config, dataset, resolved)
    space, drawn = dataset.label_space, min(dataset.label_space.K, MAX_SHEET_ROWS)
    sheet = _sheet(dataset, drawn, per_class)
    out = Path(out)
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out, format="PNG")

    heldout_text = f"{heldout.name}, {len(heldout):,} images" if heldout is not None else reason
    facts = {
        "source": f"{dataset.name}, {len(dataset):,} images",
        "held out": heldout_text,
        "images": f"{dataset.image_size}x{dataset.image_size}, {'gray' if dataset.channels == 1 else 'colour'} "
        f"({dataset.channels} channel{'s' if dataset.channels > 1 else ''}){_gray(dataset)}",
        "resizing": dataset.resized,
        "classes": f"{space.K}; {_balance(dataset.counts(), config.balance)}",
        "skipped": _skipped(dataset),
        **_unused_tables(resolved),
        "fingerprint": dataset.fingerprint,
        "store": str(dataset.folder),
    }
    lines = [f"{key:<12} {value}" for key, value in facts.items()]
    lines += ["", *_class_table(dataset, heldout), ""]
    only = f" (the first {drawn} of {space.K} classes)" if drawn < space.K else ""
    lines.append(f"Examples: {out}{only}")
    empty = [name for name, count in zip(space.names, dataset.counts()) if not count]
    if empty:
        lines.append(
            f"Training needs images of every class, but these have none: {', '.join(empty[:8])}"
            f"{', ...' if len(empty) > 8 else ''}. Add some, or list the classes to use in data.classes."
        )
    elif reason != SAME_IMAGES:
        lines.append(with_commands("Next, estimate the cost of a run:", following or train_command(config)))
    return "\n".join(lines)


def _heldout(config: DataConfig, dataset: ImageDataset, resolved: ResolvedSource) -> tuple[ImageDataset | None, str]:
    """(the held-out part, ""); (None, reason) if nothing is held out, or if it equals `dataset`."""
    import numpy as np

    try:
        heldout = open_dataset(config, "heldout", resolved=resolved)
    except NothingHeldOut:
        return None, "none, since every class needs its images for training"
    except InputError:
        if config.heldout_fraction:
            raise
        return None, "none (data.heldout_fraction is 0)"
    rows = [np.arange(len(part)) if part.indices is None else part.indices for part in (dataset, heldout)]
    if heldout.folder == dataset.folder and np.array_equal(*rows):
        return None, SAME_IMAGES
    return heldout, ""


def _unused_tables(resolved: ResolvedSource) -> dict[str, str]:
    """A table next to class folders, which may contain other labels."""
    if not isinstance(resolved[0], ClassFolders):
        return {}
    tables = sorted(p for p in resolved[0].root.iterdir() if p.suffix in SUFFIXES and p.is_file())
    return (
        {"not used": f"{tables[0]}; give it as --data.source to use its columns file_name and label"} if tables else {}
    )


def _gray(dataset: ImageDataset) -> str:
    """A hint if the colour images are all gray."""
    import numpy as np

    if dataset.channels == 1 or not len(dataset):
        return ""
    indices = np.unique(np.linspace(0, len(dataset) - 1, MAX_COLOUR_CHECKED).round().astype(int))
    pixels, _ = dataset.gather(indices)
    if (pixels != pixels[..., :1]).any():
        return ""
    gray = "all are gray" if len(indices) == len(dataset) else f"all {len(indices)} checked are gray"
    return f"; {gray}: --data.channels 1 stores and trains them as gray"


def _balance(counts: np.ndarray, balanced: bool) -> str:
    low, high = int(counts.min()), int(counts.max())
    if low == high:
        return f"{low:,} images each"
    ratio = f"the largest is {high / low:.3g} times the smallest" if low else "some are empty"
    if balanced:
        ratio += "; drawn equally often (data.balance)"
    elif low and high >= UNBALANCED_RATIO * low:
        ratio += "; --data.balance true draws each equally often"
    return f"{low:,} to {high:,} images each, {ratio}"


def _skipped(dataset: ImageDataset) -> str:
    if not dataset.skipped:
        return "none"
    hidden = len(dataset.skipped) - MAX_LISTED_SKIPPED
    shown = [f"\n  {line}" for line in dataset.skipped[:MAX_LISTED_SKIPPED]] + (
        [f"\n  and {hidden} more"] if hidden > 0 else []
    )
    return f"{len(dataset.skipped)} broken image{'s' if len(dataset.skipped) > 1 else ''}" + "".join(shown)


def _class_table(dataset: ImageDataset, heldout: ImageDataset | None) -> list[str]:
    """The lines of a table of images per class."""
    space = dataset.label_space
    header, columns = ["id"], [[str(i) for i in range(space.K)]]
    if space.original_ids != tuple(range(space.K)):
        header, columns = [*header, "original id"], [*columns, [str(i) for i in space.original_ids]]
    header, columns = [*header, "images"], [*columns, [f"{n:,}" for n in dataset.counts()]]
    if heldout is not None:
        header, columns = [*header, "held out"], [*columns, [f"{n:,}" for n in heldout.counts()]]
    widths = [max(map(len, [h, *c])) for h, c in zip(header, columns)]
    names = ["name"] + [
        f"{n}  ({w})" if space.wnids and w != n else n for n, w in zip(space.names, space.wnids or space.names)
    ]
    lines = [header, *zip(*columns)]
    return ["  ".join([f"{v:>{w}}" for v, w in zip(line, widths)] + [name]) for line, name in zip(lines, names)]


def _sheet(dataset: ImageDataset, drawn: int, per_class: int):
    import numpy as np

    counts, rows, labels = dataset.counts(), [], []
    for class_id in range(drawn):
        members = np.flatnonzero(dataset.labels == class_id)
        # spread over the class, since neighbours in a file may be similar
        chosen = members[np.linspace(0, len(members) - 1, min(per_class, len(members))).round().astype(int)]
        cells: list = list(dataset.gather(chosen)[0])
        rows.append(cells + [None] * (per_class - len(cells)))
        name = dataset.label_space.names[class_id].split(", ")[0]
        labels.append(name if name == str(class_id) else f"{class_id}: {name}")
    shown = f", classes 0 to {drawn - 1} of {len(counts)}" if drawn < len(counts) else ""
    head, _, split = dataset.name.rpartition(":")
    title = f"{Path(head).name or head}:{split}: {len(dataset):,} images{shown}"
    return labelled_grid(rows, labels, title=title)


def train_command(config: DataConfig, file: str | None = None, given: Mapping[str, str] | None = None) -> str:
    """The command of a training dry run on this data.

    Args:
        config: The data settings.
        file: The config file of these settings; None: a recipe that fits the source.
        given: The settings given in addition to the file, by dotted key; None: those that differ from the defaults.
    """
    if given is None:
        changed = [f.name for f in fields(config) if f.name != "store_dir" and getattr(config, f.name) != f.default]
        given = {f"data.{name}": getattr(config, name) for name in dict.fromkeys(["source", *changed])}
    if file is None:
        recipe = RECIPES.get(config.source.partition(":")[0], "own_images")
        file = recipes.name_in_command(recipe)
        if RECIPES.get(config.source) == recipe:
            given = {key: value for key, value in given.items() if key != "data.source"}
    return command("train", config=file, **{key: str(value) for key, value in given.items()}, dry_run=True)
