"""`adagn classify`: the class of images, by the loss of denoising them under each class."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..atomic import atomic_json
from ..commands import command, unused_path, with_commands
from ..errors import InputError, writing
from ..evaluation.image_set import ImageSet, read_images
from ..evaluation.points import choose_precision, set_up
from ..evaluation.zero_shot import ZeroShot, classify
from ..labels import LabelSpace
from ..render.figures import COLOURS, FAINT, category_axis, chart, new_figure, save, without_frame
from ..runs.recorded import default_folder
from ..runtime.distributed import process_state
from ..runtime.precision import use_precision
from ..sampling.load import open_pipeline
from ..trace.tracing import heldout_images, objective_of
from .settings import ClassifyRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..sampling.pipeline import ClassConditionalPipeline

SHOWN = 20  # images that are printed
MAX_TICKS = 30  # class names along an axis


def classify_images(source: str | Path, request: ClassifyRequest, out: Path | None = None) -> Path:
    """Classify images; print the result, write classify.json and, of labelled images, classify.png.

    Args:
        source: A model.
        request: Which images, and how many evaluations.
        out: The output folder; None: classify/RUN/step-STEP, with a number if it exists.

    Returns:
        The folder.

    Raises:
        InputError: The model has fewer than two classes, or the images cannot be used.
    """
    state = process_state(request.device)
    precision = choose_precision(request.precision, state)
    pipe, description = open_pipeline(source, request.ema)
    if pipe.labels.K < 2:
        raise InputError(
            f"{source} has {pipe.labels.K or 'no'} class{'es' * (pipe.labels.K != 1)}: there is nothing to choose from. Give a model with two or more."
        )
    images = _read(source, request, pipe)
    set_up([pipe], precision, state.device)
    print(f"{description}: finding the class of {len(images.pixels):,} images {images.about['source']}")
    started, process = time.perf_counter(), objective_of(pipe, source).process
    autocast = partial(use_precision, precision, state.device)
    result = classify(
        pipe.unet, process, torch.from_numpy(images.pixels), request.draws, autocast=autocast, progress=True
    )
    record = _record(result, images, pipe.labels) | {
        "model": description,
        "precision": precision,
        "device": str(state.device),
        "seconds": round(time.perf_counter() - started, 1),
    }
    out = out or Path(unused_path(str(default_folder("classify", source, request.ema))))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        atomic_json(out / "classify.json", record)
        if images.labels is not None:
            figure = _figure(result, torch.from_numpy(images.labels), pipe.labels)
            save(figure, out / "classify.png")
    print(_report(record, images))
    if images.labels is None:
        best = max(record["images"], key=lambda one: one["margin"] or 0)["class"]
        print(f"\nAll images: {out / 'classify.json'}")
        print(
            with_commands(
                "Next, sample the class that was found most clearly:", command("sample", source, classes=best, count=8)
            )
        )
    else:
        print(f"\nLook at  {out / 'classify.png'}")
        print(
            with_commands(
                "Next, see where in the network the class enters:",
                command("trace", source, against=request.data and request.data.source),
            )
        )
    return out


def _read(source: str | Path, request: ClassifyRequest, pipe: ClassConditionalPipeline) -> ImageSet:
    """The images to classify; `about` has what each is called, in names."""
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    if request.images is not None:
        files, pixels = read_images(Path(request.images), size, channels)
        return ImageSet(pixels, None, (), {"source": f"from {request.images}", "names": list(map(str, files))})
    heldout = heldout_images(source, pipe, request.data)
    if heldout is None:
        raise InputError(
            f"no labelled images are known for {source}: give --images PATH, or labelled ones by --against NAME_OR_PATH."
        )
    index = heldout.evenly_spread(request.count)
    pixels, labels = heldout.gather(index)
    about = {"source": f"of {heldout.name}", "names": list(map(str, index))}
    return ImageSet(pixels, labels, pipe.labels.names, about)


def _record(result: ZeroShot, images: ImageSet, labels: LabelSpace) -> dict:
    """The result as JSON values."""
    predicted, second = result.predicted.tolist(), result.second.tolist()
    spent = result.stages[-1].evaluations.tolist()
    rows = [
        {"image": name, "class": labels.name(p), "second": labels.name(s), "margin": _finite(m), "evaluations": e}
        for name, p, s, m, e in zip(images.about["names"], predicted, second, result.margin.tolist(), spent)
    ]
    levels = zip(result.levels.sigma.tolist(), result.levels.influence.tolist())
    record = {
        "classes": list(labels.names),
        "evaluations_per_image": result.evaluations(result.stages[-1]),
        "influence": [{"sigma": sigma, "influence": influence} for sigma, influence in levels],
        "images": rows,
    }
    if images.labels is None:
        return record
    true = torch.from_numpy(images.labels)
    for row, label in zip(rows, images.labels.tolist()):
        row["label"] = labels.name(label)
    hits = result.predicted == true
    accuracy = hits.double().mean().item()
    by_class = {labels.name(i): hits[true == i].double().mean().item() for i in true.unique().tolist()}
    curve = [{"evaluations": e, "accuracy": a} for e, a in result.curve(true)]
    error = math.sqrt(accuracy * (1 - accuracy) / len(true))
    return record | {"accuracy": accuracy, "standard_error": error, "by_class": by_class, "curve": curve}


def _finite(value: float) -> float | None:
    return round(value, 2) if math.isfinite(value) else None


def _report(record: dict, images: ImageSet) -> str:
    """What is printed."""
    rows = record["images"]
    cost = f"{record['evaluations_per_image']:,.0f} network evaluations per image, {record['seconds']:,.0f} s"
    if images.labels is None:
        width = max(len(row["image"]) for row in rows[:SHOWN])
        lines = [
            f"  {row['image']:{width}}  {row['class']}"
            + ("" if row["margin"] is None else f"  ({row['margin']:.1f} standard errors better than {row['second']})")
            for row in rows[:SHOWN]
        ]
        more = [f"  ... and {len(rows) - SHOWN:,} more"] if len(rows) > SHOWN else []
        return "\n".join([*lines, *more, cost])
    right = sum(row["class"] == row["label"] for row in rows)
    chance = 1 / len(record["classes"])
    text = (
        f"The right class is found for {right:,} of {len(rows):,} images: {record['accuracy']:.1%} "
        f"(standard error {record['standard_error']:.1%}; by chance {chance:.1%}). {cost}"
    )
    pairs: dict[str, int] = {}
    for row in rows:
        if row["class"] != row["label"]:
            pair = f"{row['label']} -> {row['class']}"
            pairs[pair] = pairs.get(pair, 0) + 1
    most = sorted(pairs.items(), key=lambda item: -item[1])[:5]
    return text + ("\nMost frequent mistakes: " + ", ".join(f"{pair} {n}" for pair, n in most) if most else "")


@chart
def _figure(result: ZeroShot, true: torch.Tensor, labels: LabelSpace) -> Figure:
    """Accuracy over evaluations, the influence of the label over noise levels, and the confusion matrix."""
    figure = new_figure(4.2)
    left, middle, right = figure.subplots(1, 3)
    curve = result.curve(true)
    errors = [math.sqrt(a * (1 - a) / len(true)) for _, a in curve]
    left.errorbar(*zip(*curve), yerr=errors, marker="o", color=COLOURS[0])
    left.axhline(1 / labels.K, color=FAINT, linestyle=":", label="chance")
    left.set(title=f"accuracy on {len(true):,} images", xlabel="network evaluations per image", ylim=(0, 1.02))
    left.set_xlim(left=0)
    left.legend(loc="lower right")
    middle.plot(result.levels.sigma, result.levels.influence, marker="o", color=COLOURS[1])
    middle.set(title="influence of the label", xlabel="noise level sigma", ylabel="variance over classes / loss")
    middle.set(xscale="log", ylim=(0, None))
    middle.xaxis.set_major_formatter("{x:g}")
    middle.minorticks_off()
    counts = np.zeros((labels.K, labels.K))
    np.add.at(counts, (true.numpy(), result.predicted.numpy()), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shown = right.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    without_frame(right)
    right.set(title="found class by true class", xlabel="found", ylabel="true", xticks=[], yticks=[])
    if labels.K <= MAX_TICKS:
        names = [labels.name(i) for i in range(labels.K)]
        category_axis(right.xaxis, names, rotation=90 if max(map(len, names)) > 2 else 0)
        category_axis(right.yaxis, names)
    figure.colorbar(shown, ax=right, label="share of the true class's images")
    return figure
