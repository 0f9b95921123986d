"""Sample images into a folder: PNGs, one labelled grid, samples.json; split over processes, one batch in memory at a time."""

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import find_executable_batch_size, gather_object
from PIL import Image
from pydantic import AfterValidator, StrictStr
from tqdm.auto import tqdm

from ..atomic import atomic_json, exclusive_lock
from ..commands import overwrite_hint, unused_path
from ..data.npz import write_npz
from ..diffusion.schedule import ModelEval
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
from ..schema import document, read_document, short_repr
from .class_mix import ClassMix, ClassPlan, modulation_table
from .guidance import Guidance
from .load import ema_record, open_guide, open_pipeline
from .pipeline import MAX_SEED, ClassConditionalPipeline, to_pil
from .plan import PlannedImage, image_record, planned_images, plans_of
from .pretrained import model_hash
from .rules import Rule
from .settings import SampleRequest, SamplerSettings

NPZ, INDEX = "samples.npz", "samples.json"
MIN_ACTIVATION_RATIO = 16  # activations of training / memory of sampling, at least
GRID_ROWS, GRID_COLUMNS = 40, 24  # maximum in the grid; every image is saved as a file


def _name(file: str) -> str:
    if not file.endswith(".png") or Path(file).name != file:
        raise ValueError(f"{short_repr(file)} is not an image of this folder")
    return file


@document
class SampleFile:
    """The name of an image in samples.json."""

    file: Annotated[StrictStr, AfterValidator(_name)]


@document
class SampleFiles:
    """The names in samples.json, of the files that --overwrite removes."""

    images: list[SampleFile]


def sample_to_folder(
    source: str,
    request: SampleRequest,
    out: Path | None = None,
    command: str = "",
) -> Path:
    """Sample, write PNGs, grid.png and samples.json into a folder; under torchrun each process samples its batches.

    Args:
        source: The model, as `open_pipeline` takes it.
        request: What to sample.
        out: The folder; None: the default one, or the same name with a number if it exists and is not to be overwritten.
        command: The command line, for messages.

    Returns:
        The folder.

    Raises:
        InputError: Before anything is written.
    """
    state = process_state(request.speed.device)
    main = state.is_main_process
    pipe, what = open_pipeline(source, request.ema, request.class_texts)
    if out is None:
        out = default_folder("samples", source, request.ema)
        out = out if request.overwrite else Path(gather_object([unused_path(str(out))])[0])  # the main process chooses
    pipe.use_sampler(request.sampler.sampler, request.sampler.spacing)
    request = replace(request, sampler=pipe.resolved(request.sampler))
    sampler, labels = request.sampler, pipe.labels
    plans = plans_of(request, pipe)
    guide, guide_what = (
        (None, "")
        if sampler.guide is None
        else open_guide(sampler.guide, request.guide_ema or request.ema, request.class_texts)
    )
    guidances = {scale: sampler.at_scale(scale).guidance for scale in request.scales}
    for guidance in guidances.values():
        pipe.check_guidance(guidance, guide)
    asked, asked_batch = request.speed, request.batch_size
    request = replace(request, speed=resolve_speed_together(asked, state.device, estimate_cost(pipe.unet.config).flops))
    if request.graph and state.device.type != "cuda":
        raise InputError(f"CUDA graphs need a CUDA GPU, and this is {state.device.type}: remove --graph.")
    if main and labels.K and CONDITIONING[pipe.unet.config.conditioning].class_input is None:
        print("note: this network ignores the class (conditioning none): classes and guidance have no effect")
    calls, guided = pipe.prepare(sampler, guide), [g for g in guidances.values() if not g.is_neutral]
    evaluations = {scale: g.evaluations(calls, pipe.one_pass) for scale, g in guidances.items()}
    for one in plans:
        if one.class_id is None:
            one.modulation(pipe.unet, 0)  # raises before anything is written
    if guide is not None:
        modulation_table(guide.unet, pipe.plans_for(guide, plans), torch.zeros(1))(0)
    if request.seed + (1 if request.same_seeds else len(plans)) * request.count > MAX_SEED:
        raise InputError(f"the seeds exceed {MAX_SEED}: give a smaller --seed.")
    with writing(out), ExitStack() as stack:
        if main:
            _open_folder(out, request.overwrite, stack, command)
            rows = (
                "columns from class to class"
                if request.interpolate
                else "classes, mixes and styles"
                if request.mixes or request.styles
                else "classes"
            )
            print(
                f"{what}\n{len(plans)} {rows} x {request.count} images x {len(request.scales)} scales, {sampler.sampler}, "
                f"{sampler.steps} steps, on {state.num_processes} process(es), {state.device}, {describe_speed(request.speed, asked, state.device)}"
            )
            if guide is not None:
                print(f"guide: {guide_what}")
            for note, applies in _without_effect(sampler, guided, plans, labels.null_id, calls).items():
                if applies:
                    print(f"note: {note}")
            if guided and (sampler.guidance.interval is not None or sampler.guidance.rule != Rule()):
                print(guidances[max(request.scales)].describe(calls, pipe.process, pipe.one_pass))
            for one in plans:
                if isinstance(one, ClassMix) and one.class_id is None:
                    print(f"{one.name}\n{one.describe(pipe.unet.sites())}")
        state.wait_for_everyone()

        pipe.to(state.device)
        for unet in [pipe.unet] if guide is None else [pipe.unet, guide.unet]:
            apply_speed(unet.to(state.device), request.speed)
        planned = list(planned_images(request, plans))
        if main:
            model = {
                "source": str(source),
                "weights": what,
                "hash": model_hash(pipe.unet),
                "trained_steps": pipe.config.trained_steps,
                **ema_record(pipe),
            }
            record = _record(planned, model, request, labels, plans, evaluations)
            atomic_json(out / INDEX, {"unfinished": True} | record)  # marks the folder if sampling is interrupted
        networks = [(pipe.unet, 2 if guided and guide is None and not pipe.one_pass else 1)] + (
            [(guide.unet, 1)] if guide else []
        )
        request = _batch_then_wrap(networks, request, request.count * len(plans))
        if main and asked_batch is None:
            print(f"batch size {request.batch_size} (fits in memory)")
        _sample(pipe, planned, request, guide, out, state)
        state.wait_for_everyone()
        if main:
            if request.npz:
                _write_npz(out, planned, request.scales, labels.null_id)
            shown = _draw_grid(out, planned, request, plans, labels)
            atomic_json(out / INDEX, record)
            print(f"\n{len(planned)} images in {out}, listed in {out / INDEX}\nLook at  {out / 'grid.png'}{shown}")
    return out


def _without_effect(
    sampler: SamplerSettings, guided: list[Guidance], plans: list[ClassPlan], null_id: int, calls: Sequence[ModelEval]
) -> dict[str, bool]:
    """Notes on options without effect, and whether each applies. guided: those of another scale than 1."""
    interval, only_null = sampler.guidance.interval, all(one.class_id == null_id for one in plans)
    never = interval is not None and not any(g.evaluations(calls) > len(calls) for g in guided)
    return {
        "--guide has no effect at guidance scale 1": sampler.guide is not None and not guided,
        "--interval has no effect at guidance scale 1": interval is not None and not guided,
        f"the interval {interval} contains none of the steps: nothing is guided": bool(guided) and never,
        "--guidance has no effect on null, which it moves away from": bool(guided) and only_null and not sampler.guide,
    }


def _batch_then_wrap(networks: list[tuple[AdaGNUNet, int]], request: SampleRequest, max_batch: int) -> SampleRequest:
    """The request with a batch size. Networks are compiled and captured afterwards, since the search would repeat both.

    networks: as in `batch_that_fits`.
    """
    if request.batch_size is None:
        fits = batch_that_fits(networks, max_batch, request.speed.precision)
        if request.graph:  # the graphs of other shapes hold memory while one is warmed up
            fits = max(1, fits // 2)
        request = replace(request, batch_size=min(gather_object([fits])))  # the same for all processes
    for unet, _ in networks:
        if request.speed.compile:
            compile_blocks(unet)
        if request.graph:
            unet.denoise = CUDAGraphDenoiser(unet)
    return request


def batch_that_fits(networks: list[tuple[AdaGNUNet, int]], max_batch: int, precision: str = "fp32") -> int:
    """The largest batch size that fits in memory.

    On CUDA it is measured, from an estimate down by halves and with a margin of a tenth; the memory is freed afterwards.
    Elsewhere it is estimated as a quarter of the machine's memory, and at most 64, since more are not faster.

    Args:
        networks: those called one after the other, and the rows that each computes per image: 2 with null.
        max_batch: largest batch size to return.
        precision: as `computed_in` takes it.
    """
    device = networks[0][0].device
    one = max(rows * estimate_cost(unet.config).activation_bytes for unet, rows in networks)  # sampling needs a part
    if device.type != "cuda":
        return max(1, min(max_batch, 64, machine_memory() // 4 // one))
    start = max(1, min(max_batch, 4096, MIN_ACTIVATION_RATIO * torch.cuda.mem_get_info(device)[0] // one))
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

    size = tried()
    torch.cuda.empty_cache()
    return size


def _sample(
    pipe: ClassConditionalPipeline,
    planned: list[PlannedImage],
    request: SampleRequest,
    guide: ClassConditionalPipeline | None,
    out: Path,
    state: PartialState,
) -> None:
    # batches are fixed by index, then distributed, so that the number of processes does not change a batch;
    # one scale per batch, so that scale 1 needs no second pass
    size, compiled = request.batch_size, set()
    by_scale = ([p for p in planned if p.scale == scale] for scale in dict.fromkeys(request.scales))
    batches = [items[i : i + size] for items in by_scale for i in range(0, len(items), size)]
    mine = batches[state.process_index :: state.num_processes]
    main = state.is_main_process
    pipe.set_progress_bar_config(disable=not main, leave=False, position=1, desc="steps")
    writing = None  # the files of a batch are written while the next one is sampled; an error ends sampling
    with (
        tqdm(total=sum(map(len, mine)), unit="image", disable=not main, desc=out.name) as bar,
        ThreadPoolExecutor(1) as thread,
    ):
        for batch in mine:
            began = time.perf_counter()
            with use_precision(request.speed.precision, state.device):
                images = pipe.sample(
                    request.sampler.at_scale(batch[0].scale),
                    class_plan=[p.plan for p in batch],
                    guide=guide,
                    seeds=[p.seed for p in batch],
                    output_type="np",
                ).images
            shape = f"{len(batch)} images at {'' if batch[0].scale == 1 else 'other than '}scale 1"
            if request.speed.compile and shape not in compiled:
                compiled.add(shape)
                bar.write(f"compiled for {shape}: the first batch took {time.perf_counter() - began:.0f} s")
            if writing is not None:
                writing.result()
            writing = thread.submit(_save, batch, images, out)
            bar.update(len(batch))
        if writing is not None:
            writing.result()


def _save(batch: list[PlannedImage], images: np.ndarray, out: Path) -> None:
    for item, image in zip(batch, to_pil(images)):
        image.save(out / item.file)


def _record(
    planned: list[PlannedImage],
    model: dict,
    request: SampleRequest,
    labels: LabelSpace,
    plans: list[ClassPlan],
    evaluations: dict[float, int],
) -> dict:
    """The content of samples.json."""
    images = [
        {"file": p.file, **image_record(p, request.sampler, request.speed, evaluations[p.scale], model["hash"])}
        for p in planned
    ]
    content = {"model": model, "labels": labels.to_dict(), "images": images}
    if mixed := {one.name: one.to_dict() for one in plans if one.class_id is None}:
        content["plans"] = mixed
    return content


def _write_npz(out: Path, planned: list[PlannedImage], scales: Sequence[float], null_id: int | None) -> None:
    """samples.npz, or one per scale."""
    for scale in scales:
        items = [p for p in planned if p.scale == scale]
        classes = [p.plan.class_id for p in items]
        name = NPZ if len(scales) == 1 else f"{Path(NPZ).stem}-g{repr(scale).removesuffix('.0')}.npz"
        labels = None if None in classes else classes
        write_npz(out / name, np.stack([_pixels(out / p.file) for p in items]), labels, null_id)


def _pixels(file: Path) -> np.ndarray:
    """uint8 [H, W, C]"""
    with Image.open(file) as image:
        array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def _draw_grid(
    out: Path, planned: list[PlannedImage], request: SampleRequest, plans: list[ClassPlan], label_space: LabelSpace
) -> str:
    """grid.png: one row per class or mix; for each sample its scales side by side, from the same noise. Transposed for interpolation.

    Returns a note on what the grid does not show.
    """
    file = {(p.index, p.scale): p.file for p in planned}
    between = request.interpolate is not None
    max_plans, max_cells = (GRID_COLUMNS, GRID_ROWS) if between else (GRID_ROWS, GRID_COLUMNS)
    samples = min(request.count, max(1, max_cells // len(request.scales)))
    places = list(range(min(len(plans), max_plans)))
    if between:  # both ends included
        places = np.linspace(0, len(plans) - 1, len(places)).round().astype(int).tolist()

    rows = [
        [_pixels(out / file[c * request.count + j, s]) for j in range(samples) for s in request.scales] for c in places
    ]
    single = len(request.scales) == 1
    looks = [f"#{j}" if single else f"#{j} g{s:g}" for j in range(samples) for s in request.scales]
    guidance = f"guidance {request.scales[0]:g}"
    if between:
        rows = list(zip(*rows))
        first, last = plans[0].name, plans[-1].name
        names = [one.name if one.class_id is not None else f"{one.share:.3g}" for one in (plans[c] for c in places)]
        scales = f"{first} to {last}, each row from one noise; {guidance if single else 'g is the guidance scale'}"
        labels, columns = looks, names
    else:
        labels, columns = [label_space.with_names(plans[c].name) for c in places], looks
        scales = guidance if single else "columns with the same number share the noise; g is the guidance scale"
        if single and request.same_seeds:
            scales = f"each column from one noise; {guidance}"
    title = f"{scales}; {request.sampler.sampler}, {request.sampler.steps} steps, seed {request.seed}"
    labelled_grid(rows, labels, columns, title).save(out / "grid.png")
    if len(places) == len(plans) and samples == request.count:
        return ""
    shown = f"{len(places)} of {len(plans)} columns" if between else f"the first {len(places)} classes"
    return f"  ({shown}, {samples} images each)"


def _open_folder(out: Path, overwrite: bool, stack: ExitStack, command: str) -> None:
    """Create `out`, or remove earlier samples if asked; locked for this process."""
    out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(exclusive_lock(out))
    _clear(out, overwrite, command)


def _clear(out: Path, overwrite: bool, command: str = "") -> None:
    """Remove earlier samples if asked; files that are not samples are never touched."""
    for partial in out.iterdir():  # an interrupted write, see atomic_write
        if partial.is_file() and re.fullmatch(rf"\.[0-9a-f]{{8}}\.{Path(NPZ).stem}.*\.(json|npz)", partial.name):
            partial.unlink()
    if all(p.is_dir() and re.fullmatch(r"step-\d{8}.*", p.name) for p in out.iterdir()):  # the default folders of a run
        return
    index = out / INDEX
    if not index.is_file() or not overwrite:
        foreign = f"{out} holds files that are not samples of this program: give another --out."
        raise InputError(overwrite_hint(f"{out} already holds samples", command, out) if index.is_file() else foreign)
    old = [image.file for image in read_document(index, SampleFiles, MAX_INDEX).images]
    # only files that exist: names from the index are never opened
    names = {*old, "grid.png", index.name}
    files = [f for f in out.iterdir() if f.name in names or f.match(f"{Path(NPZ).stem}*.npz")]
    if folder := next((f for f in files if f.is_dir()), None):
        raise InputError(f"{folder} is a folder where a file of samples was expected: give another --out.")
    for file in sorted(files, key=lambda f: f == index):  # the index last: until then it marks the folder as samples
        file.unlink()
