"""Pictures into a folder: PNGs, one labelled grid, samples.json; split over processes, a batch at a time in memory."""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import find_executable_batch_size, gather_object
from PIL import Image
from tqdm.auto import tqdm

from ..atomic import atomic_write, exclusive_lock
from ..commands import free, instead
from ..config import SpeedConfig
from ..data.npz import write_npz
from ..diffusion.schedule import model_evals, sampler_name, set_timesteps, spacing_name
from ..errors import InputError, writing
from ..labels import LabelSpace
from ..models.conditioning import CONDITIONING
from ..models.config import machine_memory
from ..models.cost import estimate_cost
from ..models.unet import AdaGNUNet
from ..render.grids import labelled_grid
from ..runs.recorded import MAX_INDEX, default_folder
from ..runtime.distributed import process_state
from ..runtime.precision import use_precision
from ..runtime.speed import CUDAGraphDenoiser, apply_speed, compile_blocks, describe_speed, resolve_speed_together
from ..schema import read_json, short_repr
from .class_mix import ClassInterpolation, ClassMix, ClassPlan, modulation_table
from .guidance import Guidance
from .load import open_pipeline
from .pipeline import MAX_SEED, ClassConditionalPipeline, to_pil
from .pretrained import model_hash

NPZ = "samples.npz"
UNGUIDED = Guidance()
MIN_SHARE = 16  # sampling takes this part of the memory that training's activations take, or more
GRID_ROWS, GRID_COLUMNS = 40, 24  # at most, in the grid; every picture is kept as a file


@dataclass(frozen=True)
class SampleRequest:
    """What to sample: `count` pictures of each class at each scale; picture i (class-major) has seed + i at every scale.

    Where classes are to be compared with mixes, or interpolated, picture j of each of them has seed + j: the same noise.
    """

    classes: str | None  # None: all, or null where there are none; no plain class beside mixes
    scales: list[float]
    count: int = 8
    seed: int = 0
    steps: int = 50
    sampler: str | None = None
    eta: float = 0.0
    spacing: str | None = None
    batch_size: int | None = 64  # None: as many as fit the memory
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    mixes: tuple[str, ...] = ()  # as diffusion.mixing.Mix reads them
    interpolate: str | None = None  # two classes; in place of classes and mixes
    steps_between: int = 7
    guidance: Guidance = UNGUIDED  # all but the scale
    guide: str | None = None  # the model guided against in place of null
    graph: bool = False  # CUDA only: the network's calls as CUDA graphs
    npz: bool = False  # also as the ADM evaluator's file

    @property
    def same_seeds(self) -> bool:
        return bool(self.mixes) or self.interpolate is not None


@dataclass(frozen=True)
class Picture:
    """One picture to be made."""

    index: int
    told: ClassPlan
    seed: int
    scale: float
    file: str


def sample_to_folder(
    source: str,
    request: SampleRequest,
    out: Path | None = None,
    weights: str = "ema",
    overwrite: bool = False,
    command: str = "",
) -> Path:
    """Sample, write PNGs, grid.png and samples.json into a folder; under torchrun each process makes its batches.

    Args:
        source: The model, as `open_pipeline` takes it.
        request: What to sample.
        out: The folder; None: the default one, or one beside it with a number if it exists and `overwrite` is False.
        weights: "ema" or "raw".
        overwrite: Whether samples that are in the folder are replaced.
        command: What was typed, for messages.

    Returns:
        The folder.

    Raises:
        InputError: Before anything is written.
    """
    state = process_state(request.speed.device)
    main = state.is_main_process
    pipe, what = open_pipeline(source, weights)
    if out is None:
        out = default_folder("samples", source, weights)
        out = out if overwrite else Path(gather_object([free(str(out))])[0])  # the main process chooses
    pipe.use_sampler(request.sampler, request.spacing)
    request = replace(request, sampler=sampler_name(pipe.scheduler), spacing=spacing_name(pipe.scheduler))
    labels = pipe.labels
    told = _params(request, pipe)
    request = replace(request, scales=list(dict.fromkeys(request.scales)))  # one said twice is one
    if request.guide is not None:
        guide, guide_what = open_pipeline(request.guide, weights)
        request = replace(request, guidance=replace(request.guidance, guide=guide))
    guidances = {scale: replace(request.guidance, scale=scale) for scale in request.scales}
    for guidance in guidances.values():
        pipe.check_guidance(guidance)
    asked, asked_batch = request.speed, request.batch_size
    request = replace(request, speed=resolve_speed_together(asked, state.device, estimate_cost(pipe.unet.config).flops))
    if request.graph and state.device.type != "cuda":
        raise InputError(f"CUDA graphs need a CUDA GPU, and this is {state.device.type}: leave out --graph.")
    if main and labels.K and CONDITIONING[pipe.unet.config.conditioning].class_input is None:
        print("note: this network hears the timestep alone (conditioning none): classes and guidance change nothing")
    set_timesteps(pipe.scheduler, request.steps)
    calls = model_evals(pipe.scheduler)
    evaluations = {scale: g.evaluations(calls) for scale, g in guidances.items()}
    pipe.check_eta(request.eta)
    for one in told:
        if one.class_id is None:
            one.modulation(pipe.unet, 0)  # what cannot be told is refused before anything is written
    if request.guide is not None:
        modulation_table(guide.unet, pipe.plans_for(guide, told), torch.zeros(1))(0)
    if request.seed + (1 if request.same_seeds else len(told)) * request.count > MAX_SEED:
        raise InputError(f"the seeds go beyond {MAX_SEED}: give a smaller --seed.")
    with writing(out), ExitStack() as held:
        if main:
            _open_run_dir(out, overwrite, held, command)
            rows = (
                "columns from class to class"
                if request.interpolate
                else "classes and mixes"
                if request.mixes
                else "classes"
            )
            print(
                f"{what}\n{len(told)} {rows} x {request.count} pictures x {len(request.scales)} scales, {request.sampler}, "
                f"{request.steps} steps, on {state.num_processes} process(es), {state.device}, {describe_speed(request.speed, asked, state.device)}"
            )
            if request.guide is not None:
                print(f"guided against {guide_what}")
            if request.guidance.interval is not None:
                print(guidances[max(request.scales)].describe(calls))
            for one in told:
                if isinstance(one, ClassMix) and one.class_id is None:
                    print(f"{one.name}\n{one.describe(pipe.unet.sites())}")
        state.wait_for_everyone()

        pipe.to(state.device)
        for unet in [pipe.unet] if request.guide is None else [pipe.unet, request.guidance.guide.unet]:
            apply_speed(unet.to(state.device), request.speed)
        pictures = list(_pictures(request, told))
        if main:
            model = {
                "source": str(source),
                "weights": what,
                "hash": model_hash(pipe.unet),
                "trained_steps": pipe.config.trained_steps,
            }
            record = _record(pictures, model, request, labels, told, evaluations)
            _write_json(out, {"unfinished": True} | record)  # a folder of samples, should it be broken off
        guided, guide = not all(g.off for g in guidances.values()), request.guidance.guide
        networks = [(pipe.unet, 2 if guided and guide is None else 1)] + ([(guide.unet, 1)] if guide else [])
        request = _batch_then_wrap(networks, request, request.count * len(told))
        if main and asked_batch is None:
            print(f"batches of {request.batch_size} fit the memory")
        _sample(pipe, pictures, request, out, state)
        state.wait_for_everyone()
        if main:
            if request.npz:
                _write_npz(out, pictures, request.scales, labels.null_id)
            shown = _draw_grid(out, pictures, request, told)
            _write_json(out, record)
            print(
                f"\n{len(pictures)} pictures in {out}, listed in {out / 'samples.json'}\nLook at  {out / 'grid.png'}{shown}"
            )
    return out


def _batch_then_wrap(networks: list[tuple[AdaGNUNet, int]], request: SampleRequest, most: int) -> SampleRequest:
    """The request with a batch size; then the networks are compiled and captured, if asked: in the search for the batch each
    try would be. networks: as in `batch_that_fits`."""
    if request.batch_size is None:
        fits = batch_that_fits(networks, most, request.speed.precision)
        if request.graph:  # while one shape is warmed up, the graphs of the others hold memory of their own
            fits = max(1, fits // 2)
        request = replace(request, batch_size=min(gather_object([fits])))  # one for all processes
    for unet, _ in networks:
        if request.speed.compile:
            compile_blocks(unet)
        if request.graph:
            unet.denoise = CUDAGraphDenoiser(unet)
    return request


def batch_that_fits(networks: list[tuple[AdaGNUNet, int]], most: int, precision: str = "fp32") -> int:
    """Pictures, at most `most`, that the device's memory holds at once. On CUDA it is tried out, from an estimate down by halves
    and with a tenth of room, before the networks are compiled or captured, and what that allocated is freed; elsewhere reckoned to take a quarter of the machine's memory, and at most 64, since more are no faster there.

    networks: those called one after the other, and the rows that each computes of a picture: 2 with its null.
    """
    device = networks[0][0].device
    one = max(rows * estimate_cost(unet.config).activation_bytes for unet, rows in networks)  # sampling keeps a part
    if device.type != "cuda":
        return max(1, min(most, 64, machine_memory() // 4 // one))
    start = max(1, min(most, 4096, MIN_SHARE * torch.cuda.mem_get_info(device)[0] // one))
    sizes = iter([start >> i for i in range(1, start.bit_length() + 1)])

    @find_executable_batch_size(starting_batch_size=start, reduce_batch_size_fn=lambda: next(sizes))
    def tried(batch_size: int) -> int:
        for unet, rows in networks:
            config, count = unet.config, rows * (batch_size + batch_size // 10)
            x = torch.zeros(count, config.in_channels, *[config.sample_size] * 2, device=device)
            labels = torch.zeros(count, dtype=torch.long, device=device) if config.num_classes else None
            with torch.no_grad(), use_precision(precision, device):
                unet.denoise(x.to(unet.dtype), unet.modulation(torch.zeros(count, device=device), labels))
        return batch_size

    found = tried()
    torch.cuda.empty_cache()
    return found


def _params(request: SampleRequest, pipe: ClassConditionalPipeline) -> list[ClassPlan]:
    """The classes, then the mixes; or the steps from one class to another."""
    labels = pipe.labels
    if request.interpolate is not None:
        last = request.steps_between + 1
        return [ClassInterpolation.parse(request.interpolate, labels, i / last) for i in range(last + 1)]
    classes = request.classes or (None if request.mixes else "all" if labels.K else "null")
    plain = [ClassMix.everywhere(c, labels) for c in labels.parse(classes)] if classes else []
    return plain + [pipe.mix(text) for text in request.mixes]


def _pictures(request: SampleRequest, told: list[ClassPlan]) -> Iterator[Picture]:
    """Every picture, scale by scale, class-major within a scale."""
    for scale in request.scales:
        for place, one in enumerate(told):
            name = one.name if one.class_id is None else one.name.split(",")[0]
            slug = re.sub(r"[^\w-]+", "-", name).strip("-")[:40] or "class"
            for j in range(request.count):
                i = place * request.count + j
                seed = request.seed + (j if request.same_seeds else i)
                yield Picture(i, one, seed, scale, f"{i:05d}-{slug}-g{repr(scale).removesuffix('.0')}.png")


def _sample(
    pipe: ClassConditionalPipeline, pictures: list[Picture], request: SampleRequest, out: Path, state: PartialState
) -> None:
    # batches are fixed by index, then dealt out: how many processes there are changes no picture's neighbours
    # one scale a batch, so that scale 1 needs no second pass
    size, compiled = request.batch_size, set()
    by_scale = ([p for p in pictures if p.scale == scale] for scale in dict.fromkeys(request.scales))
    batches = [some[i : i + size] for some in by_scale for i in range(0, len(some), size)]
    mine = batches[state.process_index :: state.num_processes]
    main = state.is_main_process
    pipe.set_progress_bar_config(disable=not main, leave=False, position=1, desc="steps")
    writing = None  # a batch's files, while the next one is sampled; one that fails ends the sampling
    with (
        tqdm(total=sum(map(len, mine)), unit="picture", disable=not main, desc=out.name) as bar,
        ThreadPoolExecutor(1) as thread,
    ):
        for batch in mine:
            began = time.perf_counter()
            with use_precision(request.speed.precision, state.device):
                images = pipe(
                    told=[p.told for p in batch],
                    guidance=replace(request.guidance, scale=batch[0].scale),
                    num_inference_steps=request.steps,
                    seeds=[p.seed for p in batch],
                    eta=request.eta,
                    output_type="np",
                ).images
            shape = f"{len(batch)} pictures at {'' if batch[0].scale == 1 else 'other than '}scale 1"
            if request.speed.compile and shape not in compiled:
                compiled.add(shape)
                bar.write(f"compiled for {shape}: the first batch took {time.perf_counter() - began:.0f} s")
            if writing is not None:
                writing.result()
            writing = thread.submit(_save, batch, images, out)
            bar.update(len(batch))
        if writing is not None:
            writing.result()


def _save(batch: list[Picture], images: np.ndarray, out: Path) -> None:
    for picture, image in zip(batch, to_pil(images)):
        image.save(out / picture.file)


def _record(
    pictures: list[Picture],
    model: dict,
    request: SampleRequest,
    labels: LabelSpace,
    told: list[ClassPlan],
    evaluations: dict[float, int],
) -> dict:
    """What samples.json holds."""
    images = [
        {
            "file": p.file,
            "class_id": p.told.class_id,
            "class_name": p.told.name,
            "seed": p.seed,
            "guidance": p.scale,
            **request.guidance.to_dict(),
            "guide": request.guide,
            "sampler": request.sampler,
            "steps": request.steps,
            "spacing": request.spacing,
            "eta": request.eta,
            "network_calls": evaluations[p.scale],
            "precision": request.speed.precision,
            "layout": request.speed.memory_format,
            "operator": request.speed.operator,
            "model_hash": model["hash"],
        }
        for p in pictures
    ]
    content = {"model": model, "labels": labels.to_dict(), "images": images}
    if mixed := {one.name: one.to_dict() for one in told if one.class_id is None}:
        content["told"] = mixed
    return content


def _write_json(out: Path, record: dict) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    atomic_write(out / "samples.json", lambda tmp: tmp.write_text(text, encoding="utf-8"))


def _write_npz(out: Path, pictures: list[Picture], scales: list[float], null_id: int | None) -> None:
    """samples.npz, or one a scale."""
    for scale in scales:
        some = [p for p in pictures if p.scale == scale]
        classes = [p.told.class_id for p in some]
        name = NPZ if len(scales) == 1 else f"{Path(NPZ).stem}-g{repr(scale).removesuffix('.0')}.npz"
        labels = None if None in classes else classes
        write_npz(out / name, np.stack([_pixels(out / p.file) for p in some]), labels, null_id)


def _pixels(file: Path) -> np.ndarray:
    """uint8 [H, W, C]"""
    with Image.open(file) as image:
        array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def _draw_grid(out: Path, pictures: list[Picture], request: SampleRequest, told: list[ClassPlan]) -> str:
    """A row a class or mix, and for each sample its scales side by side, from the same noise; turned over where classes are
    interpolated. Returns what was left out, in words."""
    file = {(p.index, p.scale): p.file for p in pictures}
    between = request.interpolate is not None
    max_plans, most_looks = (GRID_COLUMNS, GRID_ROWS) if between else (GRID_ROWS, GRID_COLUMNS)
    samples = min(request.count, max(1, most_looks // len(request.scales)))
    places = list(range(min(len(told), max_plans)))
    if between:  # both ends, whatever is left out
        places = np.linspace(0, len(told) - 1, len(places)).round().astype(int).tolist()

    rows = [
        [_pixels(out / file[c * request.count + j, s]) for j in range(samples) for s in request.scales] for c in places
    ]
    single = len(request.scales) == 1
    looks = [f"#{j}" if single else f"#{j} g{s:g}" for j in range(samples) for s in request.scales]
    guidance = f"guidance {request.scales[0]:g}"
    if between:
        rows = list(zip(*rows))
        first, last = told[0].name, told[-1].name
        names = [one.name if one.class_id is not None else f"{one.share:.3g}" for one in (told[c] for c in places)]
        scales = f"{first} to {last}, a row from one noise; {guidance if single else 'g is the guidance scale'}"
        labels, columns = looks, names
    else:
        labels, columns = [told[c].name for c in places], looks
        scales = guidance if single else "columns of one number share their noise; g is the guidance scale"
        if single and request.same_seeds:
            scales = f"a column starts from one noise; {guidance}"
    title = f"{scales}; {request.sampler}, {request.steps} steps, seed {request.seed}"
    labelled_grid(rows, labels, columns, title).save(out / "grid.png")
    if len(places) == len(told) and samples == request.count:
        return ""
    shown = f"{len(places)} of {len(told)} columns" if between else f"the first {len(places)} classes"
    return f"  ({shown}, {samples} pictures each)"


def _open_run_dir(out: Path, overwrite: bool, held: ExitStack, command: str) -> None:
    """Make `out`, or empty it of earlier samples if asked; for this process alone."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    held.enter_context(exclusive_lock(out))
    _clear(out, overwrite, command)


def _clear(out: Path, overwrite: bool, command: str = "") -> None:
    """Remove earlier samples if asked; files that are not samples are never touched."""
    for begun in out.iterdir():  # a write that was broken off, see file_into_place
        if begun.is_file() and re.fullmatch(rf"\.[0-9a-f]{{8}}\.{Path(NPZ).stem}.*\.(json|npz)", begun.name):
            begun.unlink()
    if all(p.is_dir() and re.fullmatch(r"step-\d{8}.*", p.name) for p in out.iterdir()):  # the default folders of a run
        return
    index = out / "samples.json"
    if not index.is_file():
        raise InputError(f"{out} holds files that are not samples of this program: give another --out.")
    if not overwrite:
        raise InputError(instead(f"{out} already holds samples", command, out))
    try:
        old = [i["file"] for i in read_json(index, MAX_INDEX)["images"]]
        for name in old:
            if not (isinstance(name, str) and name.endswith(".png") and Path(name).name == name):
                raise ValueError(f"{short_repr(name)} is no picture of this folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} is damaged ({error}): give another --out.") from None
    # of what lies there: a name that is not among it is never looked for
    names = {*old, "grid.png", index.name}
    files = [f for f in out.iterdir() if f.name in names or f.match(f"{Path(NPZ).stem}*.npz")]
    if folder := next((f for f in files if f.is_dir()), None):
        raise InputError(f"{folder} is a folder where a file of samples was expected: give another --out.")
    for file in sorted(files, key=lambda f: f == index):  # last, so that the folder is known for samples till then
        file.unlink()
