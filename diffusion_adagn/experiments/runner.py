"""Samples and measures the points of a sweep; a finished point is a folder.

OUT/points/NAME contains a finished point, which is not sampled again. OUT/batches contains the batches of an unfinished
point, which no result includes.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from tqdm.auto import tqdm

from ..atomic import atomic_dir
from ..data.npz import write_npz
from ..errors import InputError
from ..evaluation.points import PointSampler, Sampled, SamplePlan, remove_batches
from ..evaluation.results import Results, results
from ..evaluation.setup import EvalSetup
from ..schema import as_document, document, read_document
from .cost import PointCost
from .models import SweepModels
from .point_results import PointResult
from .points import SweepPoint

FEATURES = "features.npz"  # of a point's folder; REFERENCE: of the sweep's
REFERENCE = "reference.npz"


@document
class SweepRow:
    """What is read of a finished point's row.json."""

    id: str
    per_class: dict[str, list]


@dataclass(frozen=True)
class SweepRunner:
    """Samples and measures points.

    costs: of each point. save_images, save_features: write those of each point to its folder.
    """

    models: SweepModels
    eval_setup: EvalSetup
    k: int
    state: PartialState
    costs: dict[SweepPoint, PointCost]
    save_images: bool
    save_features: bool

    def run(
        self, points: Sequence[SweepPoint], plan: SamplePlan, finished: Path, batches: Path, title: str,
        count: int | None = None,
    ) -> None:  # fmt: skip
        """Sample and measure the points that are not in `finished` yet. The progress bar counts network evaluations.

        Args:
            points: The points.
            plan: The images.
            finished: The folder of finished points.
            batches: The folder of the batches of unfinished points.
            title: Of the progress bar.
            count: Only so many of the first images. The batches then remain, for a later round with more.
        """
        state, main = self.state, self.state.is_main_process
        unfinished = [p for p in points if not (finished / p.name).is_dir()]
        state.wait_for_everyone()  # every process lists the folder before one adds to it
        batches_of_all = [batch for batch in plan.batches if count is None or batch.start < count]
        mine = sum(map(len, batches_of_all[state.process_index :: state.num_processes]))
        total = sum(mine * self.costs[p].evaluations for p in unfinished)
        with tqdm(total=total, desc=title, unit="eval", unit_scale=True, disable=not main or not unfinished) as bar:
            for point in unfinished:
                bar.set_postfix_str(point.name)
                self._run_point(point, plan, finished / point.name, batches / point.name, bar, count)
        state.wait_for_everyone()
        if main and count is None:
            remove_batches(batches)

    def _run_point(
        self, point: SweepPoint, plan: SamplePlan, out: Path, batches: Path, bar: tqdm, count: int | None
    ) -> None:
        nfe = self.costs[point].evaluations
        pipe, guide = self.models.model(point.model), self.models.guide(point.guide)
        sampler = PointSampler(pipe, point.sampler, plan, self.eval_setup.extractors, guide, self.save_images)
        sampled = sampler.sample(batches, self.state, lambda images: bar.update(images * nfe), count)
        if sampled is not None:
            measured = results(sampled, self.eval_setup, sampler.calls, self.k)
            about = self.models.about
            hashes = {"model_hash": about[point.model].hash}
            hashes |= {} if point.guide is None else {"guide_hash": about[point.guide].hash}
            settings = {"id": point.name, **point.record(), "nfe": nfe, "count": len(sampled.labels), **hashes}
            row = settings | measured.row | {"notes": measured.notes}
            save_point(out, row, measured, sampled, pipe.labels.null_id, self.save_features)
            if count is None:
                remove_batches(batches)


def save_point(
    folder: Path, row: dict, measured: Results, sampled: Sampled, null_id: int | None, features: bool = False
) -> None:
    """Write a finished point's folder atomically. features: those of every image too."""
    values = measured.overall | {f"{m}.{c}": v for m, of in measured.per_class.items() for c, v in enumerate(of)}
    arrays = {name: value.influence for name, value in values.items() if value.influence is not None}

    def write(tmp: Path) -> None:
        tmp.mkdir()
        np.savez(tmp / "influence.npz", **arrays)
        np.save(tmp / "shown.npy", sampled.shown)
        if sampled.pixels is not None:
            write_npz(tmp / "samples.npz", sampled.pixels, sampled.labels, null_id)
        if features:
            np.savez(tmp / FEATURES, labels=sampled.labels, **_feature_arrays(sampled))
        (tmp / "row.json").write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    atomic_dir(folder, write)


def _feature_arrays(sampled: Sampled) -> dict[str, np.ndarray]:
    """By extractor: pooled.NAME [N, D] and, of a classifier, probabilities.NAME [N, K]."""
    arrays = {f"pooled.{name}": one.pooled for name, one in sampled.features.items()}
    given = {name: one.probabilities for name, one in sampled.features.items() if one.probabilities is not None}
    return arrays | {f"probabilities.{name}": values for name, values in given.items()}


def load_point(folder: Path) -> PointResult:
    """The finished point of a folder. Raises InputError for a corrupted folder."""
    try:
        row = read_document(folder / "row.json")
        read = as_document(row, SweepRow, folder / "row.json")
        if read.id != folder.name:
            raise ValueError(f"it is {read.id}")
        with np.load(folder / "influence.npz", allow_pickle=False) as arrays:
            influence = {name: arrays[name] for name in arrays.files}
        classes = {
            metric: [influence.get(f"{metric}.{c}") for c in range(len(values))]
            for metric, values in read.per_class.items()
        }
        overall = {name: values for name, values in influence.items() if "." not in name}
        return PointResult(row, overall, classes, np.load(folder / "shown.npy", allow_pickle=False))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{folder} is corrupted ({error}): remove it, and the same command samples it again."
        ) from None
