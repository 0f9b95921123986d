"""`adagn style`: sheets of images along principal directions, under truncation, and of sums of class vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..atomic import atomic_json, atomic_write
from ..commands import command, unused_path, with_commands
from ..errors import InputError, writing
from ..evaluation.points import choose_precision, set_up
from ..render.grids import labelled_grid
from ..runs.recorded import default_folder
from ..runtime.distributed import process_state
from ..runtime.precision import use_precision
from ..sampling.load import open_pipeline
from ..sampling.pipeline import ClassConditionalPipeline
from ..sampling.pretrained import model_hash
from ..sampling.style import Directions, Style, example, find_directions
from .settings import StyleRequest

MAX_ROWS, BATCH = 10, 64
SHOWN_DIRECTIONS = 3


@dataclass(frozen=True)
class _Sheet:
    """A sheet of images: its file, title, rows of styles; cells of a column have the seed of that column, or one seed."""

    file: str
    title: str
    rows: list[list[Style]]
    row_labels: list[str]
    column_labels: list[str]
    seeds: list[int]


def show_styles(source: str | Path, request: StyleRequest, out: Path | None = None) -> Path:
    """Sample the sheets; write them and style.json, and print what each direction separates.

    Args:
        source: A model.
        request: What to show.
        out: The output folder; None: styles/RUN/step-STEP, with a number if it exists.

    Returns:
        The folder.

    Raises:
        InputError: The model has no class vectors, a direction does not exist, or a class or place is unknown.
    """
    state = process_state(request.device)
    precision = choose_precision(request.precision, state)
    pipe, description = open_pipeline(source, request.ema, request.class_texts)
    pipe.use_sampler(request.sampler.sampler, request.sampler.spacing)
    sampler = request.sampler if request.scale is None else request.sampler.at_scale(request.scale)
    request = replace(request, sampler=pipe.resolved(sampler))
    pipe.check_guidance(request.sampler.guidance)
    asked = bool(request.directions) or not (request.psi or request.styles)
    some = (pipe.unet.config.num_classes or 0) > 1 and pipe.unet.embedding.classes is not None
    found = find_directions(pipe.unet, pipe.process, request.of) if asked or some else None
    sheets = _sheets(pipe, request, found)
    set_up([pipe], precision, state.device)
    out = out or Path(unused_path(str(default_folder("styles", source, request.ema))))
    print(f"{description}: {', '.join(sheet.file for sheet in sheets)}")
    record = _record(request, found, pipe) | {
        "model": description,
        "hash": model_hash(pipe.unet),
        "precision": precision,
    }
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        total = sum(len(row) for sheet in sheets for row in sheet.rows)
        with tqdm(total=total, unit="image", desc="styles", leave=False) as bar, use_precision(precision, state.device):
            for sheet in sheets:
                image = _draw(pipe, request, sheet, bar)
                atomic_write(out / sheet.file, lambda tmp, image=image: image.save(tmp, format="png"))
        atomic_json(out / "style.json", record)
    if asked:
        print("\n".join(_table(found, pipe, request)))
    for sheet in sheets:
        print(f"Look at  {out / sheet.file}")
    options = {"ema": request.ema} if request.ema != "run" else {}
    if request.styles:
        following = command("sample", source, style=request.styles[0], **options)
        print(with_commands("Next, more images of a sum:", following))
    else:
        following = command("style", source, style=example(pipe.labels), **options)
        print(with_commands("Next, sums of classes:", following))
    return out


def _sheets(pipe: ClassConditionalPipeline, request: StyleRequest, found: Directions | None) -> list[_Sheet]:
    """The sheets that are asked for; all errors are raised here."""
    labels, sites = pipe.labels, pipe.unet.sites()
    alone = not request.psi and not request.styles
    directions = request.directions or (tuple(range(1, SHOWN_DIRECTIONS + 1))[: len(found.share)] if alone else ())
    if wrong := [number for number in directions if number > len(found.share)]:
        raise InputError(
            f"--direction {wrong[0]} does not exist: {labels.K} classes have {len(found.share)} directions."
        )
    ids = labels.parse(request.classes or "all") if request.classes or not request.styles else []
    if request.classes is None and len(ids) > MAX_ROWS:
        ids = [ids[i] for i in np.linspace(0, len(ids) - 1, MAX_ROWS).round().astype(int)]
    plain = [Style.of_class(i, labels) for i in ids] + [pipe.style(text) for text in request.styles]
    names = [labels.with_names(style.name) for style in plain]
    amounts = np.linspace(-request.reach, request.reach, request.columns).tolist()
    sheets = []
    for number in directions:
        vector = found.vectors[number - 1]
        rows = [[style.moved(vector, a, f"direction {number} {a:+.2g}") for a in amounts] for style in plain]
        title = f"direction {number} of the {_named(request.of)} ({found.share[number - 1]:.0%} of the variance), in standard deviations"
        columns = [f"{a:+.2g}" if a else "0" for a in amounts]
        sheets.append(_Sheet(f"direction-{number}.png", title, rows, names, columns, [request.seed] * len(amounts)))
    if request.psi:
        rows = [[style.truncated(psi, sites) for psi in request.psi] for style in plain]
        columns = [f"psi {psi}" for psi in request.psi]
        title = "truncation: psi 1 is the class, 0 the mean of all classes"
        sheets.append(_Sheet("truncation.png", title, rows, names, columns, [request.seed] * len(columns)))
    if request.styles and not directions and not request.psi:
        seeds = [request.seed + j for j in range(request.count)]
        rows = [[style] * request.count for style in plain]
        sheets.append(_Sheet("styles.png", "sums of class vectors", rows, names, [f"seed {s}" for s in seeds], seeds))
    return sheets


def _draw(pipe: ClassConditionalPipeline, request: StyleRequest, sheet: _Sheet, bar: tqdm):
    cells = [(style, seed) for row in sheet.rows for style, seed in zip(row, sheet.seeds)]
    pixels = []
    for start in range(0, len(cells), BATCH):
        styles, seeds = zip(*cells[start : start + BATCH])
        images = pipe.sample(request.sampler, class_plan=list(styles), seeds=list(seeds), output_type="np").images
        pixels += [(image * 255).round().astype(np.uint8) for image in images]
        bar.update(len(styles))
    width = len(sheet.seeds)
    rows = [pixels[i : i + width] for i in range(0, len(pixels), width)]
    sampler, noise = request.sampler, f"seed {request.seed}" if len(set(sheet.seeds)) == 1 else "a seed per column"
    title = f"{sheet.title}; guidance {sampler.guidance.scale:g}, {sampler.sampler}, {sampler.steps} steps, {noise}"
    return labelled_grid(rows, sheet.row_labels, sheet.column_labels, title)


def _named(of: str) -> str:
    return "class vectors" if of == "class" else "modulation"


def _record(request: StyleRequest, found: Directions | None, pipe: ClassConditionalPipeline) -> dict:
    """The directions as JSON values."""
    labels = pipe.labels
    directions = [
        {
            "share": share,
            "low": found.ends(i, labels)[0],
            "high": found.ends(i, labels)[1],
            "scores": dict(zip(labels.names, found.scores[:, i].tolist())),
            "vector": found.vectors[i].tolist(),
        }
        for i, share in enumerate([] if found is None else found.share.tolist())
    ]
    return {"of": request.of, "seed": request.seed, "settings": request.sampler.to_dict(), "directions": directions}


def _table(found: Directions, pipe: ClassConditionalPipeline, request: StyleRequest) -> Sequence[str]:
    """What the first directions separate."""
    lines = [f"Principal directions of the {_named(request.of)}:"]
    for i, share in enumerate(found.share.tolist()[:5]):
        low, high = found.ends(i, pipe.labels)
        lines.append(f"  {i + 1}  {share:4.0%} of the variance   from {', '.join(low)} to {', '.join(high)}")
    return lines
