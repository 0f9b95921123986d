"""`adagn trace` from start to end: the atlas, the probes, the verdict, the report."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..commands import command, with_options
from ..config import DataConfig
from ..data import ImageDataset, open_dataset
from ..data.few_images import ClassImages, read_images
from ..data.find import choose_part, find_source
from ..diffusion.loss import DiffusionLoss, normalize_images
from ..diffusion.process import Process
from ..diffusion.schedule import make_process
from ..errors import InputError
from ..evaluation.label_usage import OPEN, UNUSED, Verdict, label_check
from ..runs.class_file import ClassRecord, read_record
from ..runs.recorded import free_default_folder, recorded_config, recorded_data
from ..runtime.distributed import process_state
from ..runtime.precision import use_tf32
from ..sampling.load import open_pipeline
from ..sampling.pipeline import ClassConditionalPipeline, to_pixels
from ..sampling.pretrained import model_hash
from ..training.export import sample_command
from .analysis import class_geometry, drift
from .atlas import Atlas
from .learned import LearnedTrace, trace_learned
from .levels import evenly_spread
from .probes import Influence, Sensitivity, label_sensitivity, probe
from .report import TraceResults, write_report
from .sentences import band_interval, has_band
from .settings import TraceRequest

MAX_SITES = 60  # with more, the probes go by resolution
NUM_PROBED_TIMESTEPS = 10
MIN_SIGNAL = 0.05  # smallest alpha at which a network with eps-prediction is probed
MIX_COLUMNS = 6  # images in each row of the mixing grid
SAMPLER_STEPS = 20


@use_tf32(False)
def trace(source: str | Path, out: Path, request: TraceRequest) -> list[Path]:
    """Write out/atlas.npz, out/report.html and its images. Returns the files.

    Raises InputError if `source` is not a model, the images have other classes, or `out` contains something else."""
    pipe, description = _open(source, request)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "atlas.npz").is_file())):
        raise InputError(f"{out} exists and is not a trace (no atlas.npz in it): give another --out.")
    heldout = heldout_images(source, pipe, request.data)
    other = _open(request.compare, request)[0] if request.compare else None
    print(f"{description}\n{_images_sentence(heldout, source)}")

    def atlas_of(pipe: ClassConditionalPipeline) -> Atlas:
        return Atlas.of(pipe.unet, pipe.labels, request.timesteps, progress=True, process=pipe.process)

    atlas = atlas_of(pipe)
    atlas.model = {"source": str(source), "weights": description, "hash": model_hash(pipe.unet)}
    moved = drift(atlas_of(other), atlas) if other is not None else None
    objective = objective_of(pipe, source)
    x0, labels = probe_images(pipe, heldout, request.images)
    grid = probed_timesteps(objective.process)
    verdict = label_check(pipe.unet, objective, heldout, progress=True)
    out.mkdir(parents=True, exist_ok=True)
    files = [atlas.save(out / "atlas.npz")]
    sensitivity = label_sensitivity(pipe.unet, objective, x0, labels, grid) if labels is not None else None
    results = TraceResults(
        title=str(source),
        description=description,
        atlas=atlas,
        influence=_influence(pipe, objective, x0, labels, grid, request.by),
        sensitivity=sensitivity,
        label_use=verdict.use,
        process=objective.process,
        mixing=_mixing(pipe, atlas),
        drift=moved,
        learned=_learned(pipe, objective),
        next_commands=_next_commands(source, request, pipe, sensitivity, heldout is not None),
    )
    files += write_report(results, out)
    for one in results.learned:
        print("\n".join([f"\nLearned class {one.name}", *one.sentences]))
    print(f"\n{verdict.sentence}\nLook at  {out / 'report.html'}\nValues   {out / 'atlas.npz'}  (Atlas.load)")
    return files


@use_tf32(False)
def check(source: str | Path, request: TraceRequest) -> int:
    """Print only the verdict. Returns 0: the label is used, 3: it is not measurably used, 4: it cannot be decided."""
    pipe, description = _open(source, request)
    verdict: Verdict = label_check(
        pipe.unet, objective_of(pipe, source), heldout_images(source, pipe, request.data), progress=True
    )
    print(f"{description}\n{verdict.sentence}")
    return {True: 0, False: UNUSED, None: OPEN}[verdict.used]


def probed_timesteps(process: Process, count: int = NUM_PROBED_TIMESTEPS) -> list[float]:
    """The times of the probes, evenly spread from image to noise.

    Under eps-prediction only those with alpha of at least 5%: beyond, the predicted x0, (x_t - sigma eps) / alpha,
    depends on the last digits of eps."""
    last = None
    if process.prediction == "eps":
        alpha = process.level(torch.arange(int(process.times[1]) + 1)).alpha
        last = float((alpha >= MIN_SIGNAL).nonzero().max())
    return evenly_spread(process, count, last)


def objective_of(pipe: ClassConditionalPipeline, source: str | Path) -> DiffusionLoss:
    """The process of a pipeline, with unweighted loss and the training noise of its run, where one is recorded."""
    process, config = pipe.process, recorded_config(source)
    trained = process if config is None else make_process(config.diffusion)
    same = trained.same_levels(process) and trained.prediction == process.prediction
    return DiffusionLoss(trained if same else process).to(pipe.device)


def heldout_images(source: str | Path, pipe: ClassConditionalPipeline, data: DataConfig | None) -> ImageDataset | None:
    """Held-out images of `data`, or of the run's own data; None if neither is known.

    Raises InputError if the classes of the data are not those of the model."""
    recorded = recorded_data(source)
    if data is None and recorded is None:
        return None
    c = pipe.unet.config
    data = dataclasses.replace(data or recorded, image_size=c.sample_size, channels=c.in_channels)
    if recorded is not None and data.source == recorded.source and data.heldout_fraction != recorded.heldout_fraction:
        print("note: data.heldout_fraction differs from training: some of these images were trained on")
    found = find_source(data)
    dataset = open_dataset(data, "heldout", resolved=found)
    of_other_data = recorded is None or data.source != recorded.source
    if of_other_data and choose_part(found[0], found[2], "heldout")[2]:
        print(
            f"note: {len(dataset):,} images of {data.source} are used, a part that is drawn by a fixed seed, since it may be what the "
            "model was trained on; if it is not, --data.heldout_fraction 0.9 is nearly all of it"
        )
    dataset.check_classes(pipe.labels)
    return dataset


def measure_influence(
    pipe: ClassConditionalPipeline, source: str | Path, heldout: ImageDataset | None, count: int
) -> list[Influence]:
    """How far each site moves the predicted image.

    Args:
        pipe: the model.
        source: its path, for the training noise of its run.
        heldout: images of its classes; None: sampled ones.
        count: of images.

    Returns:
        One for each intervention that the model's labels allow.
    """
    objective = objective_of(pipe, source)
    x0, labels = probe_images(pipe, heldout, count)
    return _influence(pipe, objective, x0, labels, probed_timesteps(objective.process), None)


def _open(source: str | Path, request: TraceRequest) -> tuple[ClassConditionalPipeline, str]:
    device = process_state(request.device).device
    pipe, description = open_pipeline(source, request.ema, [request.classes])
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, description


def _images_sentence(heldout: ImageDataset | None, source: str | Path) -> str:
    if heldout is None:
        return f"no labelled images are known for {source} (--against DATA): the probes use sampled ones"
    return f"images: {len(heldout):,} held out of {heldout.name}"


def _learned(pipe: ClassConditionalPipeline, objective: DiffusionLoss) -> list[LearnedTrace]:
    """The traces of the learned classes that were loaded; with images where those that they were learned from are here."""
    found = []
    for label, file in zip(pipe.labels.learned_ids, pipe.labels.files):
        images = recorded_images(read_record(file))
        if images is None:
            found.append(trace_learned(pipe, label, objective))
        else:
            found.append(trace_learned(pipe, label, objective, images.all_x0, images.is_heldout))
    return found


def recorded_images(record: ClassRecord) -> ClassImages | None:
    """The images that a class was learned from, if they are still where they were, and the same."""
    crop = record.settings.get("crop")
    try:
        pixels = read_images(record.images.source, record.image_size, record.channels, crop and tuple(crop))
    except InputError:
        return None
    images = ClassImages(pixels, record.images.heldout, record.images.source)
    return images if images.fingerprint == record.images.fingerprint else None


def probe_images(
    pipe: ClassConditionalPipeline, heldout: ImageDataset | None, count: int
) -> tuple[Tensor, Tensor | None]:
    """x0 [N, C, H, W] in [-1, 1] and labels [N] (None without classes): held-out ones, evenly spaced, or sampled."""
    k = pipe.labels.K
    if heldout is not None:
        pixels, labels = heldout.gather(heldout.evenly_spread(count))
        x0 = normalize_images(torch.from_numpy(pixels)).to(pipe.device)
        return x0, torch.from_numpy(labels).to(pipe.device) if k else None
    classes = [i % k for i in range(count)] if k else "null"
    images = pipe(classes, num_inference_steps=SAMPLER_STEPS, seeds=list(range(count)), output_type="pt").images
    return images * 2 - 1, torch.tensor(classes, device=pipe.device) if k else None


def _influence(
    pipe: ClassConditionalPipeline,
    objective: DiffusionLoss,
    x0: Tensor,
    labels: Tensor | None,
    grid: list[float],
    by: Literal["site", "resolution"] | None,
) -> list[Influence]:
    by = by or ("site" if len(pipe.unet.sites()) <= MAX_SITES else "resolution")
    interventions = ["swap"] if pipe.labels.K > 1 else []
    if pipe.labels.K and pipe.labels.has_null:
        interventions.append("null")
    return [
        probe(pipe.unet, objective, x0, labels, grid, intervention, by, progress=True)
        for intervention in [*interventions, "freeze"]
    ]


def _mixing(pipe: ClassConditionalPipeline, atlas: Atlas) -> tuple[list[str], list[list[np.ndarray]]] | None:
    """The two classes whose modulations differ most: each alone, and coarse layers of one with fine layers of the other.

    Returns row names and rows of uint8 [H, W, C] images; None where no grid can be made."""
    geometry = class_geometry(atlas)
    sites = pipe.unet.sites()
    if (
        geometry is None
        or not geometry.distance.any()
        or len({s.resolution for s in sites}) < 2
        or len(sites) > MAX_SITES
    ):
        return None
    real = [i for i in atlas.class_ids if i != atlas.null_id]
    a, b = (real[i] for i in np.unravel_index(geometry.distance.argmax(), geometry.distance.shape))
    first, second = pipe.labels.name(a), pipe.labels.name(b)
    rows = {
        first: f"id:{a}",
        f"{first} coarse, {second} fine": f"id:{a}@coarse,id:{b}@fine",
        f"{second} coarse, {first} fine": f"id:{b}@coarse,id:{a}@fine",
        second: f"id:{b}",
    }
    scale = 2.0 if pipe.labels.has_null else 1.0
    plans = [plan for text in rows.values() for plan in [pipe.mix(text)] * MIX_COLUMNS]
    seeds = [seed for _ in rows for seed in range(MIX_COLUMNS)]
    images = pipe(
        class_plan=plans, guidance_scale=scale, num_inference_steps=SAMPLER_STEPS, seeds=seeds, output_type="np"
    ).images
    pixels = to_pixels(images)
    return list(rows), [list(pixels[i : i + MIX_COLUMNS]) for i in range(0, len(pixels), MIX_COLUMNS)]


def _next_commands(
    source: str | Path,
    request: TraceRequest,
    pipe: ClassConditionalPipeline,
    sensitivity: Sensitivity | None,
    has_images: bool,
) -> list[str]:
    ema = None if request.ema == "run" else request.ema
    commands = [with_options(sample_command(str(source), pipe.labels, pipe.unet.config.max_guidance_scale), ema=ema)]
    if pipe.labels.K > 1:
        commands.append(command("sample", source, mix="id:0@coarse,id:1@fine", count=8, ema=ema))
    if pipe.labels.K and pipe.labels.has_null and has_images:
        interval = None
        if sensitivity is not None and has_band(sensitivity):
            interval = f"none,{band_interval(sensitivity)}"
        out = free_default_folder("sweeps", source, request.ema)
        scales = f"1:{min(4, pipe.unet.config.max_guidance_scale or 4):g}:0.5"
        commands.append(command("sweep", source, guidance=scales, interval=interval, ema=ema, out=out))
    return [*commands, command("trace", source, label_check=True, ema=ema)]
