"""What `adagn data inspect` prints and draws: what a source holds, class by class, and a sheet of real examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from .. import recipes
from ..commands import command, then
from ..config import DataConfig
from ..errors import InputError
from ..grids import labelled_grid
from .store import ImageDataset, open_dataset

if TYPE_CHECKING:
    import numpy as np

MOST_ROWS = 50  # of the sheet
RECIPES = {"digits": "digits", "cifar10": "cifar10_small"}  # of each source; for others: own_images
MOST_SKIPPED = 20  # broken pictures listed


def inspect_dataset(config: DataConfig, out: Path, per_class: int = 8, following: str | None = None) -> str:
    """What to print about the source's training and held-out parts; writes the sheet of examples to `out` (a PNG).

    per_class: examples in a row of the sheet. following: the command to type next; None: `train_command`'s. Raises InputError for what is wrong with the source, or a sheet that cannot
    be written.
    """
    if per_class < 1:
        raise InputError(f"a row of the sheet needs at least 1 example a class, not {per_class}.")
    dataset = open_dataset(config)
    heldout = _heldout(config, dataset)
    space, drawn = dataset.label_space, min(dataset.label_space.K, MOST_ROWS)
    sheet = _sheet(dataset, drawn, per_class)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out, format="PNG")
    except OSError as error:
        raise InputError(
            f"the sheet cannot be written to {out}: {error.strerror or error}. Name another file."
        ) from None

    other = f"{heldout.name}, {len(heldout):,} pictures" if heldout is not None else "none"
    facts = {
        "source": f"{dataset.name}, {len(dataset):,} pictures",
        "held out": other,
        "pictures": f"{dataset.image_size}x{dataset.image_size}, {'gray' if dataset.channels == 1 else 'colour'} "
        f"({dataset.channels} channel{'s' if dataset.channels > 1 else ''})",
        "resizing": dataset.resized,
        "classes": f"{space.K}; {_balance(dataset.counts())}",
        "skipped": _skipped(dataset),
        "fingerprint": dataset.fingerprint,
        "kept in": str(dataset.folder),
    }
    lines = [f"{key:<12} {value}" for key, value in facts.items()]
    lines += ["", *_table(dataset, heldout), ""]
    only = f" (the first {drawn} of {space.K} classes)" if drawn < space.K else ""
    lines.append(f"Examples: {out}{only}")
    if heldout is not None or config.heldout_fraction == 0:
        lines.append(then("Next, see what a run would cost:", following or train_command(config)))
    return "\n".join(lines)


def _heldout(config: DataConfig, dataset: ImageDataset) -> ImageDataset | None:
    """The held-out part; None if nothing is held out, or if it is what is being looked at."""
    if config.heldout_fraction == 0 or len(dataset) == 1:
        try:
            found = open_dataset(config, "heldout")
        except InputError:
            return None
    else:
        found = open_dataset(config, "heldout")
    return None if found.fingerprint == dataset.fingerprint else found


def _balance(counts: np.ndarray) -> str:
    low, high = int(counts.min()), int(counts.max())
    if low == high:
        return f"{low:,} pictures each"
    ratio = f"the largest is {high / low:.3g} times the smallest" if low else "some are empty"
    return f"{low:,} to {high:,} pictures each, {ratio}"


def _skipped(dataset: ImageDataset) -> str:
    if not dataset.skipped:
        return "none"
    more = len(dataset.skipped) - MOST_SKIPPED
    shown = [f"\n  {line}" for line in dataset.skipped[:MOST_SKIPPED]] + ([f"\n  and {more} more"] if more > 0 else [])
    return f"{len(dataset.skipped)} broken picture{'s' if len(dataset.skipped) > 1 else ''}" + "".join(shown)


def _table(dataset: ImageDataset, heldout: ImageDataset | None) -> list[str]:
    """Counts per class, one line each."""
    space = dataset.label_space
    header, columns = ["id"], [[str(i) for i in range(space.K)]]
    if space.original_ids != tuple(range(space.K)):
        header, columns = [*header, "original id"], [*columns, [str(i) for i in space.original_ids]]
    header, columns = [*header, "pictures"], [*columns, [f"{n:,}" for n in dataset.counts()]]
    if heldout is not None:
        header, columns = [*header, "held out"], [*columns, [f"{n:,}" for n in heldout.counts()]]
    widths = [max(map(len, [h, *c])) for h, c in zip(header, columns)]
    tails = ["name"] + [
        f"{n}  ({w})" if space.wnids and w != n else n for n, w in zip(space.names, space.wnids or space.names)
    ]
    lines = [header, *zip(*columns)]
    return ["  ".join([f"{v:>{w}}" for v, w in zip(line, widths)] + [tail]) for line, tail in zip(lines, tails)]


def _sheet(dataset: ImageDataset, drawn: int, per_class: int):
    import numpy as np

    counts, rows, labels = dataset.counts(), [], []
    for class_id in range(drawn):
        found = np.flatnonzero(dataset.labels == class_id)
        # spread over the class, since neighbours in a file may be alike
        chosen = found[np.linspace(0, len(found) - 1, min(per_class, len(found))).round().astype(int)]
        cells: list = list(dataset.gather(chosen)[0])
        rows.append(cells + [None] * (per_class - len(cells)))
        name = dataset.label_space.names[class_id].split(", ")[0]
        labels.append(name if name == str(class_id) else f"{class_id}: {name}")
    shown = f", classes 0 to {drawn - 1} of {len(counts)}" if drawn < len(counts) else ""
    title = f"{dataset.name.rsplit('/', 1)[-1]}: {len(dataset):,} pictures{shown}"
    return labelled_grid(rows, labels, title=title)


def train_command(config: DataConfig, file: str | None = None, given: Mapping[str, str] | None = None) -> str:
    """The dry run of a training on this data.

    Args:
        config: The data settings.
        file: The config that they were read from; None: a recipe that fits the source.
        given: The settings that were given beside the file, by dotted key; None: those that differ from the defaults.
    """
    if given is None:
        changed = [f.name for f in fields(config) if f.name != "store_dir" and getattr(config, f.name) != f.default]
        given = {f"data.{name}": getattr(config, name) for name in dict.fromkeys(["source", *changed])}
    if file is None:
        recipe = RECIPES.get(config.source.partition(":")[0], "own_images")
        file = recipes.shown(recipe)
        if RECIPES.get(config.source) == recipe:
            given = {key: value for key, value in given.items() if key != "data.source"}
    return command("train", config=file, **{key: str(value) for key, value in given.items()}, dry_run=True)
