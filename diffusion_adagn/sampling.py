"""Pictures into a folder: PNGs, one labelled grid, samples.json; split over processes, a batch at a time in memory."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from .diffusion.guidance import guidance_scales
from .diffusion.pipeline import MOST_SEED, ClassConditionalPipeline, to_pil
from .diffusion.schedule import sampler_name, set_steps
from .errors import InputError
from .grids import labelled_grid
from .labels import LabelSpace
from .loading import model_hash, open_pipeline
from .models.conditioning import KINDS

GRID_ROWS, GRID_COLUMNS = 40, 24  # at most, in the grid; every picture is kept as a file


@dataclass(frozen=True)
class SampleRequest:
    """What to sample: `count` pictures of each class at each scale; picture i (class-major) has seed + i at every scale."""

    classes: str | None  # None: all, or null where there are none
    scales: list[float]
    count: int = 8
    seed: int = 0
    steps: int = 50
    sampler: str | None = None
    eta: float = 0.0
    spacing: str | None = None
    batch_size: int = 64
    precision: str = "fp32"


@dataclass(frozen=True)
class Picture:
    """One picture to be made."""

    index: int
    class_id: int
    seed: int
    scale: float
    file: str


def sample_to_folder(
    source: str, request: SampleRequest, out: Path, weights: str = "ema", overwrite: bool = False
) -> Path:
    """Sample, write PNGs, grid.png and samples.json into `out`; under torchrun each process makes its batches.

    Returns `out`. Raises InputError before anything is written.
    """
    state = PartialState(cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()))
    main = state.is_main_process
    pipe, what = open_pipeline(source, weights)
    pipe.use_sampler(request.sampler, request.spacing)
    request = replace(request, sampler=sampler_name(pipe.scheduler), spacing=pipe.scheduler.config.timestep_spacing)
    labels = pipe.labels
    class_ids = labels.parse(request.classes or ("all" if labels.K else "null"))
    request = replace(request, scales=list(dict.fromkeys(request.scales)))  # one said twice is one
    guidance_scales(request.scales, len(request.scales))
    if any(s != 1 for s in request.scales):
        pipe.check_guidance()
    if main and labels.K and KINDS[pipe.unet.config.conditioning].label_in is None:
        print("note: this network hears the timestep alone (conditioning none): classes and guidance change nothing")
    calls = len(set_steps(pipe.scheduler, request.steps))
    pipe.check_eta(request.eta)
    if request.seed + len(class_ids) * request.count > MOST_SEED:
        raise InputError(f"the seeds go beyond {MOST_SEED}: give a smaller --seed.")
    if main:
        _clear(out, overwrite)
        print(
            f"{what}\n{len(class_ids)} classes x {request.count} pictures x {len(request.scales)} scales, {request.sampler}, "
            f"{request.steps} steps, on {state.num_processes} process(es), {state.device}"
        )
    state.wait_for_everyone()

    pipe.to(state.device)
    pictures = list(plan(request, class_ids, labels))
    _sample(pipe, pictures, request, out, state)
    state.wait_for_everyone()
    if main:
        record = {
            "source": str(source),
            "weights": what,
            "hash": model_hash(pipe.unet),
            "trained_steps": pipe.config.trained_steps,
        }
        _write_json(out, pictures, record, request, labels, calls)
        shown = _draw_grid(out, pictures, request, class_ids, labels)
        print(
            f"\n{len(pictures)} pictures in {out}, listed in {out / 'samples.json'}\nLook at  {out / 'grid.png'}{shown}"
        )
    return out


def plan(request: SampleRequest, class_ids: list[int], labels: LabelSpace) -> Iterator[Picture]:
    """Every picture, scale by scale, class-major within a scale."""
    for scale in request.scales:
        for place, class_id in enumerate(class_ids):
            slug = re.sub(r"[^\w-]+", "-", labels.name(class_id).split(",")[0]).strip("-")[:40] or "class"
            for j in range(request.count):
                i = place * request.count + j
                yield Picture(
                    i, class_id, request.seed + i, scale, f"{i:05d}-{slug}-g{repr(scale).removesuffix('.0')}.png"
                )


def _sample(
    pipe: ClassConditionalPipeline, pictures: list[Picture], request: SampleRequest, out: Path, state: PartialState
) -> None:
    # batches are fixed by index, then dealt out: how many processes there are changes no picture's neighbours
    # one scale a batch, so that scale 1 needs no second pass
    size = request.batch_size
    by_scale = ([p for p in pictures if p.scale == scale] for scale in dict.fromkeys(request.scales))
    batches = [some[i : i + size] for some in by_scale for i in range(0, len(some), size)]
    mine = batches[state.process_index :: state.num_processes]
    main = state.is_main_process
    pipe.set_progress_bar_config(disable=not main, leave=False, position=1, desc="steps")
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[request.precision]
    with tqdm(total=sum(map(len, mine)), unit="picture", disable=not main, desc=out.name) as bar:
        for batch in mine:
            with torch.autocast(state.device.type, dtype, enabled=dtype is not None):
                images = pipe(
                    [p.class_id for p in batch],
                    guidance_scale=[p.scale for p in batch],
                    num_inference_steps=request.steps,
                    seeds=[p.seed for p in batch],
                    eta=request.eta,
                    output_type="np",
                ).images
            for picture, image in zip(batch, to_pil(images)):
                image.save(out / picture.file)
            bar.update(len(batch))


def _write_json(
    out: Path, pictures: list[Picture], model: dict, request: SampleRequest, labels: LabelSpace, calls: int
) -> None:
    images = [
        {
            "file": p.file,
            "class_id": p.class_id,
            "class_name": labels.name(p.class_id),
            "seed": p.seed,
            "guidance": p.scale,
            "sampler": request.sampler,
            "steps": request.steps,
            "spacing": request.spacing,
            "eta": request.eta,
            "network_calls": calls * (1 if p.scale == 1 else 2),
            "precision": request.precision,
            "model_hash": model["hash"],
        }
        for p in pictures
    ]
    text = json.dumps({"model": model, "labels": labels.to_dict(), "images": images}, indent=1, ensure_ascii=False)
    beside = out / "samples.json.tmp"
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(out / "samples.json")


def _draw_grid(
    out: Path, pictures: list[Picture], request: SampleRequest, class_ids: list[int], labels: LabelSpace
) -> str:
    """A row a class; for each sample its scales side by side, from the same noise. Returns what was left out, in words."""
    file = {(p.index, p.scale): p.file for p in pictures}
    samples = min(request.count, max(1, GRID_COLUMNS // len(request.scales)))
    places = range(min(len(class_ids), GRID_ROWS))

    def pixels(name: str) -> np.ndarray:
        with Image.open(out / name) as image:
            array = np.asarray(image)
        return array if array.ndim == 3 else array[..., None]

    rows = [[pixels(file[c * request.count + j, s]) for j in range(samples) for s in request.scales] for c in places]
    single = len(request.scales) == 1
    columns = [f"#{j}" if single else f"#{j} g{s:g}" for j in range(samples) for s in request.scales]
    scales = (
        f"guidance {request.scales[0]:g}"
        if single
        else "columns of one number share their noise; g is the guidance scale"
    )
    title = f"{scales}; {request.sampler}, {request.steps} steps, seed {request.seed}"
    labelled_grid(rows, [labels.name(class_ids[c]) for c in places], columns, title).save(out / "grid.png")
    left_out = len(class_ids) - len(places), request.count - samples
    return f"  (the first {len(places)} classes, {samples} pictures each)" if any(left_out) else ""


def _clear(out: Path, overwrite: bool) -> None:
    """Make `out`, or empty it of earlier samples if asked; files that are not samples are never touched."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give another --out.")
    if out.is_dir() and any(out.iterdir()):
        index = out / "samples.json"
        if not index.is_file():
            raise InputError(f"{out} holds files that are not samples of this program: give another --out.")
        if not overwrite:
            raise InputError(f"{out} already holds samples: give another --out, or --overwrite to replace them.")
        try:
            old = [Path(i["file"]).name for i in json.loads(index.read_text(encoding="utf-8"))["images"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{index} is damaged ({error!r}): give another --out.") from None
        for name in [*old, "grid.png", "samples.json"]:
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
