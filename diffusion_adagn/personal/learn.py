"""`adagn learn-class`: a new class of a model from a few images, as one file."""

import datetime
import math
import time
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from ..atomic import atomic_write
from ..commands import command, overwrite_hint, with_commands
from ..data.few_images import ClassImages, read_images
from ..diffusion.loss import DiffusionLoss
from ..errors import InputError, named, writing
from ..models.learned import LearnedClass
from ..render.grids import labelled_grid
from ..render.text import counted
from ..runs.class_file import SUFFIX, ClassRecord, LearnedFrom, LearnedWith, write_class
from ..runs.recorded import recorded_config, run_of
from ..runs.shipped import model_folder
from ..runtime.distributed import process_state
from ..sampling.load import open_pipeline
from ..sampling.pipeline import ClassConditionalPipeline, to_pixels
from ..sampling.pretrained import model_hash
from ..trace.learned import LearnedTrace, trace_learned
from ..training.trainer import make_loss
from ..version import __version__
from .learner import Learner, class_losses, start_vector
from .settings import MEAN, NEAREST, LearnRequest

PREVIEW_IMAGES, PREVIEW_STEPS, PREVIEW_SCALE = 8, 20, 2.0


def learn_class(source: str | Path, request: LearnRequest, out: Path, typed: str = "") -> ClassRecord:
    """Learn a class and write its file, with previews beside it. It takes minutes, and is not resumed if it is stopped.

    Args:
        source: The model: a run folder, a checkpoint, a pipeline folder or a hub id.
        request: What to learn.
        out: The file.
        typed: The command line, for messages.

    Returns:
        What the file says.

    Raises:
        InputError: The images, the name, the file or the model cannot be used. This is checked before learning.
    """
    if out.suffix != SUFFIX:
        raise InputError(f"--out {out}: a class is a file {SUFFIX}: type --out {out}{SUFFIX}.")
    if set(",@") & set(str(out)):
        raise InputError(f"--out {out}: --classes could not name this file, since commas and @ have a meaning there.")
    if out.exists() and not request.overwrite:
        raise InputError(overwrite_hint(f"{out} is there already", typed, out))
    pipe, what = open_pipeline(source, request.ema)
    pipe.to(process_state(request.device).device)
    pipe.set_progress_bar_config(disable=True)
    check_learnable(pipe, request.name)
    images = images_of(request, pipe)
    loss = loss_of(pipe, source).to(pipe.device)
    run = LearnedWith(Path(run_of(model_folder(source))).name, model_hash(pipe.unet), pipe.run_id)
    start = choose_start(pipe, loss, images, request)
    began = time.perf_counter()
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        count, heldout = len(images.pixels), images.heldout
        fewer = f"; {heldout} held out" if heldout else ""
        for file in previews_of(out).glob("step-*.png"):  # of an earlier class in this file
            file.unlink()
        begin = "the mean of all classes" if start is None else pipe.labels.name(start)
        print(
            f"{what}\n{counted(count, 'image')} of {request.images}{fewer}; {request.depth}, from {begin}, on {pipe.device}"
        )
        learner = _learn(pipe, loss, images, request, start, out)
        learned = learner.finish()
        figures = _figures(learner, learned, time.perf_counter() - began)
        found = trace_learned(pipe, learner.label, loss, images.all_x0, images.is_heldout)
        config = pipe.unet.config
        record = write_class(
            out, learned, depth=request.depth, run=run, image_size=config.sample_size, channels=config.in_channels,
            images=LearnedFrom(request.images, count, heldout, images.fingerprint),
            settings={key: value for key, value in asdict(request).items() if key not in ("overwrite", "device")},
            figures=figures | found.figures(), date=datetime.date.today().isoformat(), version=__version__,
        )  # fmt: skip
        sheet = atomic_write(previews_of(out) / "nearest.png", found.neighbours.sheet().save)
    print(_summary(figures, found, images))
    print(f"\nWrote    {out} ({out.stat().st_size:,} bytes)\nLook at  {sheet}")
    options = {"guidance": "1,2"} if pipe.labels.has_null else {}
    options |= {"ema": request.ema} if request.ema != "run" else {}
    next_command = command("sample", source, classes=f"{out},{pipe.labels.names[0].split(',')[0]}", **options)
    print(with_commands("Next, sample it:", next_command))
    return record


def check_learnable(pipe: ClassConditionalPipeline, name: str) -> None:
    """Raises InputError for a model without class vectors, and for the name of another class."""
    unet = pipe.unet
    if unet.embedding.classes is None:
        why = (
            "it is unconditional" if not pipe.labels.K else f"conditioning {unet.config.conditioning} ignores the class"
        )
        raise InputError(f"no class can be learned with this model, since it has no class vectors: {why}.")
    with named("--name"):
        pipe.labels.with_learned(name)


def images_of(request: LearnRequest, pipe: ClassConditionalPipeline) -> ClassImages:
    """The images of a request, for a model."""
    config = pipe.unet.config
    pixels = read_images(request.images, config.sample_size, config.in_channels, request.crop)
    return ClassImages(pixels, request.heldout_of(len(pixels)), request.images)


def loss_of(pipe: ClassConditionalPipeline, source: str | Path) -> DiffusionLoss:
    """The loss that the model was trained with; of a model without a run, the unweighted one of its process."""
    config = recorded_config(source)
    return DiffusionLoss(pipe.process) if config is None else make_loss(config.diffusion)


def choose_start(
    pipe: ClassConditionalPipeline, loss: DiffusionLoss, images: ClassImages, request: LearnRequest
) -> int | None:
    """The class to start from; None: the mean of all classes.

    Raises InputError if --from is not one class.
    """
    names = pipe.labels.names
    if request.start == MEAN and MEAN not in names:
        return None
    if request.start == NEAREST and NEAREST not in names:
        x0 = images.x0(heldout=False).to(pipe.device)
        with tqdm(total=len(names), desc="nearest class", unit="class", leave=False) as bar:
            return int(class_losses(pipe.unet, loss, x0, len(names), request.seed, bar.update).argmin())
    with named("--from"):
        ids = pipe.labels.parse(request.start)
        if len(ids) != 1 or ids[0] >= len(names):
            raise InputError(f"expected one class, nearest or mean, not {request.start!r}.")
    return ids[0]


def previews_of(out: Path) -> Path:
    """The folder of the previews of a class's file."""
    return out.with_name(f"{out.stem}-previews")


def _learn(
    pipe: ClassConditionalPipeline,
    loss: DiffusionLoss,
    images: ClassImages,
    request: LearnRequest,
    start: int | None,
    out: Path,
) -> Learner:
    """All steps, with a progress bar and previews."""
    x0, heldout = (images.x0(held).to(pipe.device) for held in (False, True))
    learner = Learner(pipe.unet, loss, x0, heldout, request, start_vector(pipe.unet, start))
    every, shown = request.preview_every, "held-out loss" if learner.has_heldout else "loss"
    with tqdm(total=request.steps, desc=request.name, unit="step") as bar:
        while not learner.ended:
            if not math.isfinite(learner.train_step()):
                raise InputError(
                    f"the loss is not finite at step {learner.step}: give a lower --lr or --layers_lr (now {request.lr:g} and "
                    f"{request.layers_lr:g})."
                )
            bar.set_postfix_str(
                f"{shown} {list(learner.losses.values())[-1]:.4f}, best at step {learner.best_step}", False
            )
            bar.update()
            if every and learner.step % every == 0:
                file = previews_of(out) / f"step-{learner.step:08d}.png"
                with learner.using(learner.average):
                    atomic_write(file, preview(pipe, learner.label, images, learner.step).save)
                bar.write(f"preview  {file}")
    return learner


def preview(pipe: ClassConditionalPipeline, label: int, images: ClassImages, step: int):
    """The first images, and sampled ones, always from the same noises."""
    rows = {"images": list(images.pixels[:PREVIEW_IMAGES])}
    for scale in (1.0, PREVIEW_SCALE) if pipe.labels.has_null else (1.0,):
        sampled = pipe(
            [label] * PREVIEW_IMAGES, guidance_scale=scale, seeds=0, num_inference_steps=PREVIEW_STEPS, output_type="np"
        )
        rows[f"scale {scale:g}"] = list(to_pixels(sampled.images))
    return labelled_grid(list(rows.values()), list(rows), title=f"step {step}, {PREVIEW_STEPS} sampler steps")


def _figures(learner: Learner, learned: LearnedClass, seconds: float) -> dict:
    return {
        "steps": learner.step,
        "best_step": learner.best_step,
        "loss_before": learner.losses[0],
        "loss": learner.losses[learner.best_step],
        "loss_on": "held-out images" if learner.has_heldout else "images that it was learned from",
        "parameters": sum(tensor.numel() for tensor in learned.tensors().values()),
        "seconds": round(seconds, 1),
    }


def _summary(figures: dict, found: LearnedTrace, images: ClassImages) -> str:
    before, after = figures["loss_before"], figures["loss"]
    if figures["best_step"]:
        result = f"fell from {before:.4f} to {after:.4f} ({after / before - 1:+.1%}) at step {figures['best_step']} of {figures['steps']}"
    else:
        result = f"was lowest before the first of {figures['steps']} steps, {before:.4f}: the class is what it began from. Give a lower --lr"
    lines = [
        f"\nThe loss on {figures['loss_on']} {result}; {figures['parameters']:,} numbers, {figures['seconds']:.0f} s.",
        *found.sentences,
    ]
    if len(images.pixels) < 4:
        lines.append(
            f"So few images ({len(images.pixels)}) show little of what may vary: expect variants of them. All steps were done, since none "
            "is held out; look at the previews, and give fewer --steps if later ones copy."
        )
    return "\n".join(lines)
