"""`adagn train --dry_run`: time and memory that a run needs on this machine, on one screen, with a verdict on each number."""

import math
import os
import shutil
import sys
import textwrap
import time
from contextlib import closing
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ..config import RunConfig, SpeedConfig, TrainingConfig, to_yaml
from ..data import ImageDataset
from ..models.config import machine_memory
from ..models.cost import Cost, estimate_cost
from ..models.unet import AdaGNUNet
from ..runs.layout import RunFolder, label_space, network_config
from ..runtime.distributed import main_first, process_state
from ..runtime.precision import AUTOCAST, use_precision
from ..runtime.speed import apply_speed, measure_peak_flops, resolve_speed
from .ema import EMA
from .image_fetcher import device_bytes
from .loader import images_per_pass, make_batches
from .objective import Objective, forward_passes
from .setup import check_environment, copies_of_weights, describe, format_number, making, resolve
from .snapshots import describe_snapshots
from .teacher import open_teacher
from .trainer import make_loss, make_optimizer
from .transfer import transfer

BUDGET = 10  # seconds that a measured step may take; a longer one is measured on a part of its images
HOUR, DAY = 3600, 24 * 3600
MANY_EPOCHS = 2000  # CIFAR-10's published runs; the fewer the images, the sooner they are memorized


def dry_run(config: RunConfig, verbose: bool = False, is_guide: bool = False) -> None:
    """Print what the run needs. No run folder is made.

    Args:
        config: The run; training.max_steps and output_dir may be unset.
        verbose: Print every setting first, as YAML.
        is_guide: It is trained for few epochs on purpose, by `adagn guide`.

    Raises:
        InputError: For what would stop the run before its first step.
    """
    state = process_state(config.speed.device)
    check_environment(config)
    with main_first(state):
        config, dataset = resolve(config, progress=state.is_main_process)
    if not state.is_main_process:
        return
    if config.output_dir is not None:
        run = RunFolder(config.output_dir)
        with making(run), TemporaryDirectory(dir=next(p for p in run.path.absolute().parents if p.exists())):
            pass
    training, device = config.training, state.device
    cost = estimate_cost(network_config(config))
    speed = resolve_speed(config.speed, device, cost.flops)
    images = images_per_pass(training, state.num_processes)
    lines = describe(config, dataset, state.num_processes, device, cost)
    image_bytes = device_bytes(dataset, device, training.images_on)
    lines["memory"], fits = _memory(cost, config, speed, images, device, image_bytes)
    del lines["length"]
    lines["lengths"] = describe_snapshots(training, cost.parameters)
    if verbose:
        print(to_yaml(config))
    _print(lines)
    seconds = None
    if fits:
        if config.init_from:
            unet = AdaGNUNet(**network_config(config))
            _print({"weights": transfer(config.init_from, unet, label_space(config), config.diffusion)})
        seconds, measured = seconds_per_step(config, dataset, speed, device, cost, images)
        part = "" if measured == images else f" (from {measured} of the {images} images of a pass)"
        rate, compiled = format_number(training.batch_size / seconds), ", without speed.compile" * speed.compile
        _print({"step": f"{format_number(seconds)} s{part}, {rate} images/s; measured in two steps here{compiled}"})
    _print({"time": _time(training, seconds, device), "epochs": _epochs(training, len(dataset), is_guide)})
    _print({"classes": _classes(dataset, config)})
    print("No run was written." + ("" if verbose or is_guide else " --verbose prints every setting."))


def seconds_per_step(
    config: RunConfig, dataset: ImageDataset, speed: SpeedConfig, device: torch.device, cost: Cost, images: int
) -> tuple[float, int]:
    """The time of an optimizer step of this process: the second of two.

    Args:
        config: The resolved run.
        dataset: Its images.
        speed: What `resolve_speed` returned.
        device: Where it is computed.
        cost: Of its network.
        images: Per pass.

    Returns:
        Seconds, and how many images of a pass they were measured with.
    """
    training = config.training
    expected = forward_passes(config) * cost.flops / (0.3 * measure_peak_flops(device, seconds=0.1))  # seconds an image
    measured = max(1, min(images, int(BUDGET / expected)))
    unet = AdaGNUNet(**network_config(config)).to(device)
    apply_speed(unet, speed)
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    ema, optimizer = EMA(unet, training.ema_decay), make_optimizer(unet, training)
    teacher = open_teacher(config)
    if teacher is not None:
        apply_speed(teacher.unet.to(device), speed)
    objective = Objective(make_loss(config.diffusion).to(device), unet, teacher)
    batches = make_batches(config, dataset, objective.loss.process, device)
    with closing(batches.pixels):
        for step in range(2):
            start = time.perf_counter()
            batch = batches.batch(torch.arange(measured) + step * measured)
            with use_precision(speed.precision, device):
                loss = objective(unet, batch).mean()
            loss.backward()
            float(torch.nn.utils.clip_grad_norm_(unet.parameters(), training.clip_norm or torch.inf))  # waits
            backward_end = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(unet, step + 1)
            float(next(ema.model.parameters()).sum())  # waits
            end = time.perf_counter()
            if end - start > 3 * BUDGET:  # one-time work in the first step is a small part of it then
                break
    one_pass = (backward_end - start) * images / measured
    return one_pass * training.gradient_accumulation + end - backward_end, measured


def device_memory(device: torch.device) -> int:
    """Total memory of the device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return machine_memory()


# ---------------------------------------------------------------------- verdicts


def _memory(
    cost: Cost, config: RunConfig, speed: SpeedConfig, images: int, device: torch.device, image_bytes: int
) -> tuple[str, bool]:
    """The line, and whether the run fits. image_bytes: of the images that are stored on the device."""
    training, averages = config.training, copies_of_weights(config, cost)
    half, total = AUTOCAST[speed.precision] is not None, device_memory(device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1  # they share the machine's

    def needed(count: int, checkpointing: bool = training.gradient_checkpointing) -> int:
        return local * cost.training_bytes(count, half, checkpointing, averages) + image_bytes

    def is_easy(*of: int | bool) -> bool:
        return needed(*of) <= 0.8 * total

    text, fits = f"about {_gib(needed(images))} of the {_gib(total)} of {device}", needed(images) <= total
    if is_easy(images):
        return f"{text}: fits", True
    split = next((n for n in range(2, images + 1) if images % n == 0 and is_easy(images // n)), 0)
    remedies = {
        f"training.gradient_accumulation {split * training.gradient_accumulation}": split,
        "training.gradient_checkpointing true": not training.gradient_checkpointing and is_easy(images, True),
        "a lower training.batch_size": is_easy(1),
        "training.images_on host": image_bytes,
        "a smaller model (model.model_channels, data.image_size)": True,
    }
    verdict = "tight, and may fail" if fits else "WILL NOT FIT"
    return f"{text}: {verdict} -> {', or '.join(r for r, helps in remedies.items() if helps)}", fits


def _time(training: TrainingConfig, seconds: float | None, device: torch.device) -> str:
    if seconds is None:
        return "not measured, since it does not fit"
    if training.max_steps is None:
        return f"training.max_steps is not set: {HOUR / seconds:,.0f} steps take an hour"
    total = training.max_steps * seconds
    text = f"{training.max_steps:,} steps take about {_duration(total)}, previews not counted"
    limit, name = (DAY, "a day") if device.type == "cpu" else (7 * DAY, "a week")
    if total <= limit:
        return f"{text}: fine"
    steps = max(1, int(limit / seconds))
    hardware = "a GPU, or the recipe own_images_cpu" if device.type == "cpu" else "several GPUs (torchrun)"
    return f"{text}: TOO LONG for most -> training.max_steps {steps:,} takes {name}; or a smaller model or data.image_size, or {hardware}"


def _epochs(training: TrainingConfig, count: int, is_guide: bool) -> str:
    if training.max_steps is None:
        return f"{count / training.batch_size:,.0f} steps are one: training.max_steps is not set"
    epochs = training.max_steps * training.batch_size / count
    text = f"{format_number(epochs)}: each of the {count:,} images is seen {format_number(epochs)} times"

    def steps(of: int) -> str:
        return f"training.max_steps {max(1, of * count // training.batch_size):,} are {of:,} epochs"

    if epochs > MANY_EPOCHS:
        return f"{text}: MANY, images may be memorized -> {steps(500)}; or more images"
    return f"{text}: FEW -> {steps(50)}" if epochs < 10 and not is_guide else f"{text}: fine"


def _classes(dataset: ImageDataset, config: RunConfig) -> str:
    if not config.model.class_conditional:
        return "labels are not used (model.class_conditional false)"
    counts = np.bincount(np.asarray(dataset.labels), minlength=dataset.label_space.K)
    low, high = int(counts.min()), int(counts.max())
    name = dataset.label_space.name(int(counts.argmin()))
    text = f"{low:,} to {high:,} images per class" if low != high else f"{low:,} images per class"
    if low < 20:
        return f"{text}: FEW, samples may be copies ({name} has {low}) -> more images, or data.classes without it"
    if high > 5 * low and not config.data.balance:
        return f"{text}: UNBALANCED ({name} has {low:,}), rare classes are learned late -> data.balance true, or more images of it"
    return f"{text}: fine"


# ---------------------------------------------------------------------- words


def _print(lines: dict[str, str]) -> None:
    """Print each line, wrapped on a terminal."""
    width = min(100, shutil.get_terminal_size().columns)
    for name, text in lines.items():
        line, whole = f"{name:10}{text}", {"break_long_words": False, "break_on_hyphens": False}
        wrapped = textwrap.fill(line, width, subsequent_indent=10 * " ", **whole)
        print(wrapped if sys.stdout.isatty() else line, flush=True)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3g} GiB" if size < 1000 * 2**30 else f"{size / 2**30:,.0f} GiB"


def _duration(seconds: float) -> str:
    limits = {90: (1, "s"), 1.5 * HOUR: (60, "min"), 4 * DAY: (HOUR, "h"), math.inf: (DAY, "days")}
    unit, name = next(unit for limit, unit in limits.items() if seconds < limit)
    return f"{seconds / unit:,.0f} {name}"
