"""Sample a model at one setting and extract features, with the same classes and noise at every setting.

The work is split into batches that do not depend on the number of processes. Each finished batch is a file. So no
batch is sampled twice, and the processes exchange their results in the folder.
"""

import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..atomic import atomic_write
from ..config import SpeedConfig
from ..diffusion.schedule import ModelEval
from ..errors import InputError
from ..runtime.precision import check_precision, use_precision
from ..runtime.speed import apply_speed, has_bf16, resolve_speed
from ..sampling.pipeline import MAX_SEED, ClassConditionalPipeline, to_pixels
from ..sampling.settings import SamplerSettings
from .diagnostics import GuidanceMeter, image_values
from .extractors import Extractor
from .features import FeatureSet

MAX_GRID_CLASSES = 40  # classes in a grid


def metrics_device(state: PartialState) -> str:
    """The device that computes metrics. They need float64, which not every accelerator has."""
    return str(state.device) if state.device.type == "cuda" else "cpu"


def choose_precision(requested: str, state: PartialState, recorded: str | None = None) -> str:
    """The precision in which images are sampled for metrics. The main process chooses for all.

    Args:
        requested: "auto", or one of `runtime.precision.AUTOCAST`. auto: bf16 on a CUDA GPU that supports it, else
            fp32.
        state: The processes.
        recorded: On the main process: the precision of earlier images of the same comparison, which "auto" selects
            again.

    Returns:
        One of `runtime.precision.AUTOCAST`.

    Raises:
        InputError: The device does not support the precision.
    """
    if requested == "auto":
        best = "bf16" if state.device.type == "cuda" and has_bf16(state.device) else "fp32"
        (requested,) = broadcast_object_list([recorded or best])
    check_precision(requested, state.device, "--precision")
    return requested


def set_up(pipes: Sequence[ClassConditionalPipeline | None], precision: str, device: torch.device) -> None:
    """Move pipelines to the device, and set memory format and operator as `adagn sample` does. None is skipped."""
    for pipe in pipes:
        if pipe is None:
            continue
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        apply_speed(pipe.unet, resolve_speed(SpeedConfig(precision), device, flops=0))


def inactive_interval_note(settings: SamplerSettings, guided: int) -> str:
    """A note if the interval contains no step, so that nothing is guided; "" otherwise. guided: calls that are."""
    guidance = settings.guidance
    if guidance.scale == 1 or guided:
        return ""
    return f"note: the interval {guidance.interval} contains none of {settings.steps} steps: nothing is guided"


def classes_of(pipe: ClassConditionalPipeline, classes: str | None) -> tuple[int, ...]:
    """The class ids of a selection; None: all classes, or null without classes.

    Raises InputError for an unknown class.
    """
    return tuple(pipe.labels.parse(classes or ("all" if pipe.labels.K else "null")))


@dataclass(frozen=True)
class SamplePlan:
    """The images to sample, the same at every point: image i has class classes[i % len(classes)] and noise of seed + i.

    Args:
        classes: Class ids, which may include the null id. Duplicates are removed.
        count: The number of images.
        seed: The seed of image 0.
        batch_size: Images per batch.
        precision: One of `runtime.precision.AUTOCAST`.
        shown: Images per class to save for grids.
    """

    classes: tuple[int, ...]
    count: int
    seed: int = 0
    batch_size: int = 50
    precision: str = "fp32"
    shown: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(dict.fromkeys(self.classes)))
        if not self.classes or min(self.count, self.batch_size) < 1 or not 0 <= self.seed <= MAX_SEED - self.count:
            raise InputError(
                f"expected at least one class, image and image per batch, and seeds from 0 to {MAX_SEED}, not {len(self.classes)} classes, "
                f"{self.count} images, {self.batch_size} per batch and seeds {self.seed} + {self.count}."
            )

    @property
    def labels(self) -> np.ndarray:
        """int64 [count]"""
        return np.resize(np.array(self.classes, dtype=np.int64), self.count)

    @property
    def batches(self) -> list[range]:
        """The indices of the images of each batch."""
        return [range(i, min(i + self.batch_size, self.count)) for i in range(0, self.count, self.batch_size)]

    @property
    def grid(self) -> np.ndarray:
        """The indices of the images to save for grids, int64 [classes, shown]."""
        rows = np.arange(min(len(self.classes), self.count, MAX_GRID_CLASSES))
        columns = np.arange(max(1, min(self.shown, self.count // len(self.classes))))
        return rows[:, None] + columns * len(self.classes)

    def to_dict(self) -> dict:
        return asdict(self) | {"classes": list(self.classes)}


@dataclass(frozen=True)
class Sampled:
    """The result of sampling a point with N = count images.

    Args:
        features: Name of the extractor -> features of the N images.
        labels: int64 [N].
        values: float64 [N, 4] (`image_values`).
        difference: float64 [calls], mean over the images (`GuidanceMeter`).
        clipped: float64 [calls], mean over the images (`GuidanceMeter`).
        shown: uint8 [classes, n, H, W, C], the images of `SamplePlan.grid`.
        pixels: uint8 [N, H, W, C]; None if not saved.
    """

    features: dict[str, FeatureSet] = field(repr=False)
    labels: np.ndarray = field(repr=False)
    values: np.ndarray = field(repr=False)
    difference: np.ndarray = field(repr=False)
    clipped: np.ndarray = field(repr=False)
    shown: np.ndarray = field(repr=False)
    pixels: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True)
class PointSampler:
    """A model at one setting, whose images are sampled in batches: one file per batch, and a share for each process.

    Args:
        pipe: The model.
        point: The sampler settings.
        plan: The images to sample.
        extractors: Their features are extracted from each batch.
        guide: The model that guidance moves away from; None: the null label.
        keep_pixels: Save the pixels too.
    """

    pipe: ClassConditionalPipeline
    point: SamplerSettings
    plan: SamplePlan
    extractors: Sequence[Extractor]
    guide: ClassConditionalPipeline | None = None
    keep_pixels: bool = False

    @cached_property
    def calls(self) -> list[ModelEval]:
        """The network calls of an image."""
        return self.pipe.prepare(self.point, self.guide)

    def sample(
        self,
        folder: Path,
        state: PartialState,
        on_batch: Callable[[int], None] = lambda count: None,
        count: int | None = None,
    ) -> Sampled | None:
        """Sample the missing batches into `folder`.

        The files remain until `remove_batches`: with a larger count, the same images are not sampled again.

        Args:
            folder: The folder of the batch files.
            state: The processes.
            on_batch: Called after each batch with its number of images.
            count: Only so many of the first images: a multiple of the batch size. None: all.

        Returns:
            These images on the main process; None on the others.
        """
        batches = [batch for batch in self.plan.batches if count is None or batch.start < count]
        files = [folder / f"batch-{i:06d}.npz" for i in range(len(batches))]
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(state.process_index, len(files), state.num_processes):
            if not _is_valid(files[i], self.keep_pixels):
                arrays = self._batch(batches[i])
                atomic_write(files[i], lambda tmp, arrays=arrays: np.savez(tmp, **arrays))
            on_batch(len(batches[i]))
        state.wait_for_everyone()
        return self._gather(files, batches[-1].stop) if state.is_main_process else None

    def _batch(self, batch: range) -> dict[str, np.ndarray]:
        plan, meter = self.plan, GuidanceMeter(len(self.calls))
        with use_precision(plan.precision, self.pipe.device):
            images = self.pipe.sample(
                self.point,
                classes=plan.labels[batch.start : batch.stop].tolist(),
                seeds=[plan.seed + i for i in batch],
                output_type="np",
                guide=None if self.point.guide is None else self.guide,
                callback=meter,
            ).images
        pixels = to_pixels(images)
        arrays = {"values": image_values(pixels), "difference": meter.difference, "clipped": meter.clipped}
        arrays["shown"] = pixels[np.isin(np.array(batch), plan.grid)]
        if self.keep_pixels:
            arrays["pixels"] = pixels
        for extractor in self.extractors:
            features = extractor(pixels)
            arrays[f"pooled.{extractor.name}"] = features.pooled
            if features.probabilities is not None:
                arrays[f"probabilities.{extractor.name}"] = features.probabilities
        return arrays

    def _gather(self, files: Sequence[Path], count: int) -> Sampled:
        """The images of the files, which are the first `count` of the plan."""
        parts: dict[str, list[np.ndarray]] = {}
        for file in files:
            with np.load(file, allow_pickle=False) as arrays:
                for name in arrays.files:
                    if name != "pixels" or self.keep_pixels:
                        parts.setdefault(name, []).append(arrays[name])
        means = {name: np.sum(parts.pop(name), axis=0) / count for name in ("difference", "clipped")}
        joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        labels = self.plan.labels[:count]
        features = {
            e.name: FeatureSet(joined[f"pooled.{e.name}"], joined.get(f"probabilities.{e.name}"), labels)
            for e in self.extractors
        }
        grid = self.plan.grid
        present = np.sort(grid[grid < count])  # the images in `shown`, by index
        grid = grid[:, (grid < count).all(axis=0)]
        shown = joined["shown"][np.searchsorted(present, grid)]
        return Sampled(features, labels, joined["values"], **means, shown=shown, pixels=joined.get("pixels"))


def remove_batches(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _is_valid(file: Path, with_pixels: bool) -> bool:
    """Whether a batch exists and is valid; a corrupted one is sampled again."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            complete = "values" in arrays and ("pixels" in arrays or not with_pixels)
            return complete and zipfile.ZipFile(file).testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError):
        return False
