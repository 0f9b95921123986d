"""adagn trace, top to bottom: the atlas, the probes, the verdict, the report."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..commands import command
from ..config import DataConfig
from ..data import ImageDataset, open_dataset
from ..diffusion.loss import DiffusionLoss, normalize_images
from ..errors import InputError
from ..runs.recorded import free_default_folder, recorded_data
from ..runtime.distributed import process_state
from ..runtime.precision import use_tf32
from ..sampling.load import open_pipeline
from ..sampling.pipeline import PREDICTION_TYPES, ClassConditionalPipeline, to_pixels
from ..sampling.pretrained import model_hash
from ..training.export import sample_command
from .analysis import class_geometry, drift
from .atlas import Atlas
from .label_check import OPEN, UNUSED, Verdict, label_check
from .probes import Influence, Sensitivity, label_sensitivity, probe
from .report import Findings, write_report
from .sentences import BAND, has_band

MAX_SITES = 60  # with more, the probes go by resolution
PROBED = 10  # timesteps of the probes
MIN_SIGNAL = 0.05  # of x_t, for the probes of an eps-network
MIXED = 6  # pictures of each row of the mixing grid
STEPS = 20  # of the sampler, for it


@dataclass(frozen=True)
class TraceRequest:
    """timesteps: of the atlas, evenly spread. pictures: that the probes look at. data: where held-out pictures are; None: the
    run's own. weights: "ema" or "raw". compare: another run or checkpoint, for the drift. by: what is probed at a time; None: each
    site, where there are at most 60. device: as `choose_device` takes it."""

    timesteps: int = 50
    pictures: int = 32
    data: DataConfig | None = None
    weights: str = "ema"
    compare: str | None = None
    by: Literal["site", "resolution"] | None = None
    device: str = "auto"


@use_tf32(False)
def trace(source: str | Path, out: Path, request: TraceRequest) -> list[Path]:
    """Write out/atlas.npz, out/report.html and its pictures. Returns the files.

    Raises InputError for what is no model, pictures of other classes, and a folder that holds something else."""
    pipe, what = _open(source, request)
    total = pipe.scheduler.config.num_train_timesteps
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "atlas.npz").is_file())):
        raise InputError(f"{out} exists and is not a trace (no atlas.npz in it): give another --out.")
    heldout = heldout_images(source, pipe, request.data)
    other = _open(request.compare, request)[0] if request.compare else None
    print(f"{what}\n{_images_sentence(heldout, source)}")

    def atlas_of(pipe: ClassConditionalPipeline) -> Atlas:
        return Atlas.of(pipe.unet, pipe.labels, request.timesteps, total, progress=True)

    atlas = atlas_of(pipe)
    atlas.model = {"source": str(source), "weights": what, "hash": model_hash(pipe.unet)}
    moved = drift(atlas_of(other), atlas) if other is not None else None
    objective = objective_of(pipe)
    x0, labels = _some_images(pipe, heldout, request.pictures)
    grid = probed_timesteps(objective)
    verdict = label_check(pipe.unet, objective, heldout, progress=True)
    out.mkdir(parents=True, exist_ok=True)
    files = [atlas.save(out / "atlas.npz")]
    sensitivity = label_sensitivity(pipe.unet, objective, x0, labels, grid) if labels is not None else None
    findings = Findings(
        title=str(source),
        what=what,
        atlas=atlas,
        influence=_influence(pipe, objective, x0, labels, grid, request.by),
        sensitivity=sensitivity,
        label_use=verdict.use,
        mixing=_mixing(pipe, atlas),
        drift=moved,
        next_commands=_next_commands(source, pipe, sensitivity, heldout is not None),
    )
    files += write_report(findings, out)
    print(f"\n{verdict.sentence}\nLook at  {out / 'report.html'}\nValues   {out / 'atlas.npz'}  (Atlas.load)")
    return files


@use_tf32(False)
def check(source: str | Path, request: TraceRequest) -> int:
    """Print the verdict alone. Returns 0 if the label is used, 3 if it is not seen to be, 4 if it cannot be said."""
    pipe, what = _open(source, request)
    verdict: Verdict = label_check(
        pipe.unet, objective_of(pipe), heldout_images(source, pipe, request.data), progress=True
    )
    print(f"{what}\n{verdict.sentence}")
    return {True: 0, False: UNUSED, None: OPEN}[verdict.used]


def probed_timesteps(objective: DiffusionLoss) -> list[int]:
    """Where the probes look: evenly spread over 0..T-1; under eps-prediction only while x_t holds 5% of signal, since the x0 that is
    meant, (x_t - sigma eps) / alpha, is beyond that whatever the last digits of eps are."""
    last = objective.num_timesteps - 1
    if objective.prediction == "eps":
        last = int((objective.alpha >= MIN_SIGNAL).nonzero().max())
    return np.unique(np.linspace(0, last, PROBED).round().astype(int)).tolist()


def objective_of(pipe: ClassConditionalPipeline) -> DiffusionLoss:
    """The process that a pipeline was trained on; the loss unweighted."""
    scheduler = pipe.scheduler
    return DiffusionLoss(scheduler.alphas_cumprod, PREDICTION_TYPES[scheduler.config.prediction_type]).to(pipe.device)


def heldout_images(source: str | Path, pipe: ClassConditionalPipeline, data: DataConfig | None) -> ImageDataset | None:
    """Held-out pictures of the run's own data, or of `data`; None if neither is known.

    Raises InputError for data whose classes are not the model's."""
    recorded = recorded_data(source)
    if data is None and recorded is None:
        return None
    c = pipe.unet.config
    data = dataclasses.replace(data or recorded, image_size=c.sample_size, channels=c.in_channels)
    if recorded is not None and data.source == recorded.source and data.heldout_fraction != recorded.heldout_fraction:
        print(
            "note: held out otherwise than in training (data.heldout_fraction): some of these pictures were trained on"
        )
    dataset = open_dataset(data, "heldout")
    dataset.check_classes(pipe.labels)
    return dataset


def _open(source: str | Path, request: TraceRequest) -> tuple[ClassConditionalPipeline, str]:
    device = process_state(request.device).device
    pipe, what = open_pipeline(source, request.weights)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, what


def _images_sentence(heldout: ImageDataset | None, source: str | Path) -> str:
    if heldout is None:
        return f"no labelled pictures are known for {source} (--against DATA): the probes look at sampled ones"
    return f"pictures: {len(heldout):,} held out of {heldout.name}"


def _some_images(
    pipe: ClassConditionalPipeline, heldout: ImageDataset | None, count: int
) -> tuple[Tensor, Tensor | None]:
    """x0 [N, C, H, W] in [-1, 1] and labels [N] (None without classes): held-out ones, evenly spread, or sampled."""
    k = pipe.labels.K
    if heldout is not None:
        n = min(count, len(heldout))
        pixels, labels = heldout.gather(np.arange(n) * len(heldout) // n)
        x0, labels = (
            some.to(pipe.device) for some in (normalize_images(torch.from_numpy(pixels)), torch.from_numpy(labels))
        )
        return x0, labels if k else None
    classes = [i % k for i in range(count)] if k else "null"
    images = pipe(classes, num_inference_steps=STEPS, seeds=list(range(count)), output_type="pt").images
    return images * 2 - 1, torch.tensor(classes, device=pipe.device) if k else None


def _influence(
    pipe: ClassConditionalPipeline,
    objective: DiffusionLoss,
    x0: Tensor,
    labels: Tensor | None,
    grid: list[int],
    by: Literal["site", "resolution"] | None,
) -> list[Influence]:
    by = by or ("site" if len(pipe.unet.sites()) <= MAX_SITES else "resolution")
    kinds = (["swap"] if pipe.labels.K > 1 else []) + (["null"] if pipe.labels.K and pipe.labels.has_null else [])
    return [probe(pipe.unet, objective, x0, labels, grid, kind, by, progress=True) for kind in [*kinds, "freeze"]]


def _mixing(pipe: ClassConditionalPipeline, atlas: Atlas) -> tuple[list[str], list[list[np.ndarray]]] | None:
    """The two classes that are told most differently: each, and either's coarse layers with the other's fine ones."""
    geometry = class_geometry(atlas)
    sites = pipe.unet.sites()
    if (
        geometry is None
        or not geometry.distance.any()
        or len({s.resolution for s in sites}) < 2
        or len(sites) > MAX_SITES
    ):
        return None
    real = [i for i in atlas.kept_ids if i != atlas.null_id]
    a, b = (real[i] for i in np.unravel_index(geometry.distance.argmax(), geometry.distance.shape))
    first, second = pipe.labels.name(a), pipe.labels.name(b)
    rows = {
        first: f"id:{a}",
        f"{first} coarse, {second} fine": f"id:{a}@coarse,id:{b}@fine",
        f"{second} coarse, {first} fine": f"id:{b}@coarse,id:{a}@fine",
        second: f"id:{b}",
    }
    scale = 2.0 if pipe.labels.has_null else 1.0
    plans = [plan for text in rows.values() for plan in [pipe.mix(text)] * MIXED]
    seeds = [seed for _ in rows for seed in range(MIXED)]
    images = pipe(told=plans, guidance_scale=scale, num_inference_steps=STEPS, seeds=seeds, output_type="np").images
    pixels = to_pixels(images)
    return list(rows), [list(pixels[i : i + MIXED]) for i in range(0, len(pixels), MIXED)]


def _next_commands(
    source: str | Path, pipe: ClassConditionalPipeline, sensitivity: Sensitivity | None, pictures: bool
) -> list[str]:
    commands = [sample_command(str(source), pipe.labels)]
    if pipe.labels.K > 1:
        commands.append(command("sample", source, mix="id:0@coarse,id:1@fine", count=8))
    if pipe.labels.K and pipe.labels.has_null and pictures:
        interval = None
        if sensitivity is not None and has_band(sensitivity):
            interval = "none,t:{}-{}".format(*sensitivity.band(BAND))
        commands.append(
            command("sweep", source, guidance="1:4:0.5", interval=interval, out=free_default_folder("sweeps", source))
        )
    return [*commands, command("trace", source, label_check=True)]
