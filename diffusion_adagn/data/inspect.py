"""What `adagn data inspect` prints and draws: what a source holds, class by class, and a sheet of real examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from .. import recipes
from ..commands import command, with_commands
from ..config import DataConfig
from ..errors import InputError
from ..render.grids import labelled_grid
from .find import ResolvedSource, find_source
from .label_files import SUFFIXES
from .sources import ClassFolders
from .store import NothingHeldOut, open_dataset

if TYPE_CHECKING:
    import numpy as np

    from .dataset import ImageDataset

MAX_SHEET_ROWS = 50  # of the sheet
RECIPES = {"digits": "digits", "cifar10": "cifar10_small"}  # of each source; for others: own_images
ITSELF = "these pictures themselves"
MAX_LOOKED_AT = 500  # for colour
UNBALANCED = 3  # times the smallest class, from which balancing is suggested
MAX_SKIPPED = 20  # broken pictures listed


def inspect_dataset(config: DataConfig, out: Path, per_class: int = 8, following: str | None = None) -> str:
    """What to print about the source's training and held-out parts; writes the sheet of examples to `out` (a PNG).

    per_class: examples in a row of the sheet. following: the command to type next; None: `train_command`'s. Raises InputError for what is wrong with the source, or a sheet that cannot
    be written.
    """
    if per_class < 1:
        raise InputError(f"a row of the sheet needs at least 1 example a class, not {per_class}.")
    found = find_source(config)
    dataset = open_dataset(config, found=found, empty_classes=True)
    heldout, why_none = _heldout(config, dataset, found)
    space, drawn = dataset.label_space, min(dataset.label_space.K, MAX_SHEET_ROWS)
    sheet = _sheet(dataset, drawn, per_class)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out, format="PNG")
    except OSError as error:
        raise InputError(
            f"the sheet cannot be written to {out}: {error.strerror or error}. Name another file."
        ) from None

    other = f"{heldout.name}, {len(heldout):,} pictures" if heldout is not None else why_none
    facts = {
        "source": f"{dataset.name}, {len(dataset):,} pictures",
        "held out": other,
        "pictures": f"{dataset.image_size}x{dataset.image_size}, {'gray' if dataset.channels == 1 else 'colour'} "
        f"({dataset.channels} channel{'s' if dataset.channels > 1 else ''}){_gray(dataset)}",
        "resizing": dataset.resized,
        "classes": f"{space.K}; {_balance(dataset.counts(), config.balance)}",
        "skipped": _skipped(dataset),
        **_tables(found),
        "fingerprint": dataset.fingerprint,
        "kept in": str(dataset.folder),
    }
    lines = [f"{key:<12} {value}" for key, value in facts.items()]
    lines += ["", *_table(dataset, heldout), ""]
    only = f" (the first {drawn} of {space.K} classes)" if drawn < space.K else ""
    lines.append(f"Examples: {out}{only}")
    empty = [name for name, count in zip(space.names, dataset.counts()) if not count]
    if empty:
        lines.append(
            f"A training needs pictures of every class, and there are none of: {', '.join(empty[:8])}"
            f"{', ...' if len(empty) > 8 else ''}. Add some, or name the classes to keep in data.classes."
        )
    elif why_none != ITSELF:
        lines.append(with_commands("Next, see what a run would cost:", following or train_command(config)))
    return "\n".join(lines)


def _heldout(config: DataConfig, dataset: ImageDataset, found: ResolvedSource) -> tuple[ImageDataset | None, str]:
    """(the held-out part, ""); (None, why) if nothing is held out, or if it is what is being looked at."""
    import numpy as np

    try:
        heldout = open_dataset(config, "heldout", found=found)
    except NothingHeldOut:
        return None, "none, since every class needs its pictures for training"
    except InputError:
        if config.heldout_fraction:
            raise
        return None, "none (data.heldout_fraction is 0)"
    rows = [np.arange(len(part)) if part.indices is None else part.indices for part in (dataset, heldout)]
    if heldout.folder == dataset.folder and np.array_equal(*rows):
        return None, ITSELF
    return heldout, ""


def _tables(found: ResolvedSource) -> dict[str, str]:
    """Tables beside class folders, which may hold other labels."""
    if not isinstance(found[0], ClassFolders):
        return {}
    beside = sorted(p for p in found[0].root.iterdir() if p.suffix in SUFFIXES and p.is_file())
    return {"not used": f"{beside[0]}; as --data.source its columns file_name and label count"} if beside else {}


def _gray(dataset: ImageDataset) -> str:
    """A hint where colour pictures have no colour."""
    import numpy as np

    if dataset.channels == 1 or not len(dataset):
        return ""
    some = np.unique(np.linspace(0, len(dataset) - 1, MAX_LOOKED_AT).round().astype(int))
    pixels, _ = dataset.gather(some)
    if (pixels != pixels[..., :1]).any():
        return ""
    seen = "all are gray" if len(some) == len(dataset) else f"all of {len(some)} looked at are gray"
    return f"; {seen}: --data.channels 1 stores and trains them as such"


def _balance(counts: np.ndarray, balanced: bool) -> str:
    low, high = int(counts.min()), int(counts.max())
    if low == high:
        return f"{low:,} pictures each"
    ratio = f"the largest is {high / low:.3g} times the smallest" if low else "some are empty"
    if balanced:
        ratio += "; drawn equally often (data.balance)"
    elif low and high >= UNBALANCED * low:
        ratio += "; --data.balance true draws each equally often"
    return f"{low:,} to {high:,} pictures each, {ratio}"


def _skipped(dataset: ImageDataset) -> str:
    if not dataset.skipped:
        return "none"
    more = len(dataset.skipped) - MAX_SKIPPED
    shown = [f"\n  {line}" for line in dataset.skipped[:MAX_SKIPPED]] + ([f"\n  and {more} more"] if more > 0 else [])
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
    head, _, split = dataset.name.rpartition(":")
    title = f"{Path(head).name or head}:{split}: {len(dataset):,} pictures{shown}"
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
        file = recipes.name_in_command(recipe)
        if RECIPES.get(config.source) == recipe:
            given = {key: value for key, value in given.items() if key != "data.source"}
    return command("train", config=file, **{key: str(value) for key, value in given.items()}, dry_run=True)
