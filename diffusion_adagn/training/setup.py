"""What a run decides before its first step: settings, data, devices, network; and the run folder."""

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from ..atomic import atomic_write, exclusive_lock
from ..commands import command, option_value, resume_command, with_commands
from ..config import DiffusionConfig, RunConfig, SpeedConfig, decisive, differences, read_config, to_yaml
from ..data import ImageDataset, open_dataset
from ..data.find import ResolvedSource, find_source
from ..data.store import NothingHeldOut
from ..diffusion.schedule import make_scheduler, set_timesteps
from ..errors import InputError, named
from ..labels import LabelSpace
from ..models.cost import Cost, estimate_cost
from ..models.unet import AdaGNUNet, check_guidance_scales
from ..runs.checkpoint import latest_valid, read_state, remove_partial
from ..runs.ema_snapshots import snapshot_count
from ..runs.layout import RunFolder, label_space, network_config
from ..runtime.distributed import main_first, process_state
from ..runtime.precision import AUTOCAST
from ..runtime.speed import describe_speed, has_bf16, resolve_speed, resolve_speed_together
from ..sampling.guidance import Guidance
from .image_fetcher import device_bytes
from .loader import images_per_pass
from .objective import forward_passes
from .teacher import Teacher, open_teacher
from .transfer import transfer

MAX_MEASURED = 20_000  # images of which sigma_data is the standard deviation


@dataclass(frozen=True)
class Setup:
    """What training starts from.

    config: resolved. heldout: None where it is not used. unet: on the CPU, with its initial weights. checkpoint: the one to
    resume from; None to start. summary: the lines that a run prints first. teacher: on the CPU; None: the run has none.
    """

    run: RunFolder
    config: RunConfig
    dataset: ImageDataset
    heldout: ImageDataset | None
    cost: Cost
    speed: SpeedConfig
    accelerator: Accelerator
    unet: AdaGNUNet
    checkpoint: Path | None
    summary: str
    teacher: Teacher | None = None


def prepare(config: RunConfig, resume: bool) -> Setup:
    """Check the settings, open the data, choose the devices and create the network. Writes no file of the run.

    Raises:
        InputError: The settings or the data cannot be used.
    """
    run, training = _check_run(config, resume), config.training
    processes = process_state(config.speed.device)
    main, device, count = processes.is_main_process, processes.device, processes.num_processes
    with main_first(processes):
        source = find_source(config.data)  # once for both parts
        config, dataset = resolve(config, progress=main, source=source)
    heldout = _open_heldout(config, main, source)
    images_per_pass(training, count)  # raises before the network is counted
    cost = estimate_cost(network_config(config))
    requested = config.speed
    if resume and requested.precision == "auto" and run.config_file.is_file():  # what auto meant when the run began
        requested = dataclasses.replace(requested, precision=read_config(run.config_file).speed.precision)
    speed = resolve_speed_together(requested, device, cost.flops)
    lines = describe(dataclasses.replace(config, speed=requested), dataset, count, device, cost)
    summary = "\n".join(f"{name:10}{text}" for name, text in lines.items())
    config = dataclasses.replace(config, speed=dataclasses.replace(requested, precision=speed.precision))
    AcceleratorState._reset_state()  # an earlier run in this interpreter may have had another precision
    mixed, tracker = AUTOCAST[speed.precision] is not None, None if training.tracker == "none" else training.tracker
    precision, on_cpu = speed.precision if mixed else "no", device.type == "cpu"
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu, log_with=tracker, project_dir=str(run.path))
    teacher = open_teacher(config)
    torch.manual_seed(training.seed)
    unet = AdaGNUNet(**network_config(config))
    newest = [latest_valid(run.checkpoints) if main and resume else None]  # every byte is checked once
    checkpoint = broadcast_object_list(newest)[0]
    if config.init_from and checkpoint is None:
        summary += f"\n{transfer(config.init_from, unet, label_space(config), config.diffusion)}"
    return Setup(run, config, dataset, heldout, cost, speed, accelerator, unet, checkpoint, summary, teacher)


@contextmanager
def open_run_folder(setup: Setup, resume: bool) -> Iterator[float | None]:
    """Check or create the run folder, lock it for the block and write config.yaml. The main process alone does this.

    Yields:
        The learning rate that config.yaml recorded before; None for a new run, and in other processes.
    """
    if not setup.accelerator.is_main_process:
        setup.accelerator.wait_for_everyone()
        yield None
        return
    run, config = setup.run, setup.config
    recorded_lr = _check_recorded(setup, resume) if run.config_file.is_file() else None
    with making(run):
        run.path.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(run.path):
        remove_partial(run.checkpoints)
        atomic_write(run.config_file, lambda tmp: tmp.write_text(to_yaml(config), encoding="utf-8"))
        print(setup.summary)
        setup.accelerator.wait_for_everyone()
        yield recorded_lr


@contextmanager
def making(run: RunFolder) -> Iterator[None]:
    """Raises InputError for a folder that is not a run, and for an OSError in the block."""
    try:
        if not run.config_file.is_file() and run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            raise InputError(f"{run.path} exists and is not a run (no config.yaml in it): give another --output_dir.")
        yield
    except OSError as error:
        text = f"the run folder {run.path} cannot be made ({error.strerror}): give another --output_dir."
        raise InputError(text) from error


def _check_recorded(setup: Setup, resume: bool) -> float:
    """The recorded learning rate. Raises InputError if this config cannot resume the recorded run."""
    run, config, training = setup.run, setup.config, setup.config.training
    if not resume:
        raise _occupied(run)  # by a process that started meanwhile
    recorded = read_config(run.config_file)
    same_lr = dataclasses.replace(training, lr=recorded.training.lr)  # the learning rate may change
    if setup.checkpoint is None:
        return recorded.training.lr
    state = read_state(setup.checkpoint)
    step, old = state["step"], decisive(recorded) | state.get("settings", {})  # config.yaml may have been edited
    fault, changed = "", differences(old, dataclasses.replace(config, training=same_lr))
    back = [key for key, value in decisive(recorded).items() if old[key] != value]
    if step > training.max_steps:
        fault = f"is at {setup.checkpoint.name} already, beyond training.max_steps {training.max_steps}: give a larger one, or leave it out"
    elif same_lr != training and step == training.max_steps:
        fault = f"is at its last step, {step}, and no step remains for training.lr {training.lr:g}: give a larger training.max_steps too"
    elif changed:
        fault = (
            f"was started with other settings, and resuming with these would change its result: {'; '.join(changed)}"
        )
        if back:  # the checkpoint knows better
            longer = (
                {"training.max_steps": training.max_steps} if training.max_steps != recorded.training.max_steps else {}
            )
            typed = command("train", resume=run.path, **{key: option_value(old[key]) for key in back}, **longer)
            raise InputError(
                with_commands(f"{run.path} {fault}. {run.config_file} was edited; resume with the old values:", typed)
            )
        fault += ". Put them back, or start another run (with --init_from to keep the weights). Only training.lr may be changed"
    if fault:
        raise InputError(f"{run.path} {fault}.")
    return recorded.training.lr


def _check_run(config: RunConfig, resume: bool) -> RunFolder:
    if config.output_dir is None:
        raise InputError("where should the run go? Give --output_dir, such as runs/my-run.")
    run = RunFolder(config.output_dir)
    if not resume and run.config_file.is_file():
        raise _occupied(run)
    if config.training.max_steps is None:
        raise InputError("how long should it train? Give training.max_steps, such as --training.max_steps 10000.")
    check_environment(config)
    return run


def check_environment(config: RunConfig) -> None:
    """Raises InputError if the tracker's package is missing, or accelerate would shard the network."""
    check_tracker(config.training.tracker)
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            text = f"accelerate is configured to shard the network ({name}), which is not supported: every process holds the whole network"
            raise InputError(f"{text}. Launch it with --multi_gpu, or by torchrun.")


def _occupied(run: RunFolder) -> InputError:
    newest = run.newest_checkpoint()
    state = f"at {newest.name}" if newest else "without a checkpoint yet"
    text = f"{run.path} already holds a run ({state}). Give another --output_dir, or resume it:"
    return InputError(with_commands(text, resume_command(run.path)))


def check_tracker(name: str) -> None:
    """Raises InputError if a tracker's package is missing."""
    if name != "none" and importlib.util.find_spec(name) is None:
        text = f"training.tracker {name} needs the package {name}. Set it to none (metrics.jsonl is written in any case), or:"
        raise InputError(with_commands(text, f"pip install 'diffusion-adagn[{name}]'"))


def resolve(
    config: RunConfig, progress: bool = True, source: ResolvedSource | None = None
) -> tuple[RunConfig, ImageDataset]:
    """Open the training data and write what it determines (image size, channels, classes) into the config.

    Raises:
        InputError: The config records other classes than the data has, or settings contradict each other.
    """
    dataset = open_dataset(config.data, "train", progress, source)
    space = dataset.label_space
    recorded = space if config.labels is None else LabelSpace.from_dict(config.labels)
    if recorded != space:
        recorded_words, words = (f"{s.K} classes ({', '.join(s.names[:5])}, ...)" for s in (recorded, space))
        text = f"the config records {recorded_words}, the data {dataset.name} has {words}: they must be the same classes in the same order"
        raise InputError(f"{text}. To train on other classes start another run, with --init_from to keep the weights.")
    data = dataclasses.replace(config.data, image_size=dataset.image_size, channels=dataset.channels)
    diffusion = config.diffusion
    if diffusion.process == "edm" and diffusion.sigma_data is None:
        diffusion = dataclasses.replace(diffusion, sigma_data=measure_sigma_data(dataset))
    config = dataclasses.replace(config, data=data, diffusion=diffusion, labels=space.to_dict())
    if config.training.preview_every:
        _check_preview(config)
    return config, dataset


def measure_sigma_data(dataset: ImageDataset) -> float:
    """The standard deviation of the images in [-1, 1], of at most MAX_MEASURED evenly spaced ones; four decimal places."""
    count = min(len(dataset), MAX_MEASURED)
    total = squares = values = 0
    for places in np.array_split(np.arange(count) * len(dataset) // count, max(1, count // 1000)):
        pixels = dataset.gather(places)[0].astype(np.int64)
        total, squares, values = total + pixels.sum(), squares + (pixels**2).sum(), values + pixels.size
    mean = total / values
    return round(float(max(squares / values - mean**2, 1e-4) ** 0.5 / 127.5), 4)


def _check_preview(config: RunConfig) -> None:
    """Raises InputError for settings that the first preview would reject, hours later."""
    steps = config.training.preview_steps
    with named("training.preview_classes"):
        label_space(config).parse(config.training.preview_classes if config.model.class_conditional else "null")
    with named("training.preview_guidance"):
        Guidance(config.training.preview_guidance)
        if config.model.max_guidance_scale is not None:
            check_guidance_scales([config.training.preview_guidance], config.model.max_guidance_scale)
    if reason := _rejection(config.diffusion, steps):
        counts = sorted(range(1, config.diffusion.num_train_timesteps + 1), key=lambda n: abs(n - steps))
        valid = next(n for n in counts if not _rejection(config.diffusion, n))
        reason = reason.partition(": use")[0].rstrip(".")  # the remedies are for sampling, where the grid can be chosen
        raise InputError(f"training.preview_steps {steps}: {reason}. Give training.preview_steps {valid}.")


def _rejection(diffusion: DiffusionConfig, steps: int) -> str:
    """Why a preview cannot have this number of steps; "" if it can."""
    try:
        if diffusion.process == "edm":  # not measured yet
            diffusion = dataclasses.replace(diffusion, sigma_data=diffusion.sigma_data or 0.5)
        set_timesteps(make_scheduler(diffusion), steps)
    except InputError as error:
        return str(error)
    return ""


def _open_heldout(config: RunConfig, main: bool, source: ResolvedSource) -> ImageDataset | None:
    """The held-out images, on the main process, if something uses them. The diagnostics work without them, and so does
    everything if every class needs its images for training (`open_dataset` prints it)."""
    needed = config.training.heldout_every > 0
    if not main or not (needed or (config.training.diagnostics_every and config.model.class_conditional)):
        return None
    try:
        return open_dataset(config.data, "heldout", main, source)
    except InputError as error:
        if needed and not isinstance(error, NothingHeldOut):
            raise
        return None


def describe(
    config: RunConfig, dataset: ImageDataset, processes: int, device: torch.device, cost: Cost
) -> dict[str, str]:
    """What is trained, on what, at what cost. Keys: data, network, batch, speed, memory, length, extras and sometimes note."""
    training, size, flops = config.training, dataset.image_size, cost.flops
    speed, per_pass = resolve_speed(config.speed, device, flops), images_per_pass(training, processes)
    half, images = AUTOCAST[speed.precision] is not None, device_bytes(dataset, device, training.images_on)
    averages = copies_of_weights(config, cost)
    memory = cost.training_bytes(per_pass, half, training.gradient_checkpointing, averages) + images
    of_images = f", {images / 2**30:.2f} for the images, which are on the device; training.images_on host avoids this"
    classes = f"{dataset.label_space.K} classes" + " (labels not used)" * (not config.model.class_conditional)
    length = "training.max_steps is not set"
    if training.max_steps:
        total = training.max_steps * training.batch_size
        length = f"{training.max_steps:,} steps = {total:,} images = {format_number(total / len(dataset))} epochs"
    lines = {
        "data": f"{dataset.name}: {len(dataset):,} images of {size}x{size}x{dataset.channels}, {classes}",
        "network": f"{config.model.conditioning}, {cost.parameters / 1e6:.2f} M parameters, {flops / 1e9:.3f} GFLOPs per image "
        f"(forward; training about {forward_passes(config) * flops / 1e9:.3f})",
        "batch": f"{training.batch_size} = {processes} process(es) x {training.gradient_accumulation} pass(es) x {per_pass} images, "
        f"on {device}",
        "speed": describe_speed(speed, config.speed, device),
        "memory": f"about {memory / 2**30:.2f} GiB per process (weights, gradients, AdamW, EMA, activations"
        f"{of_images * (images > 0)}; an estimate)",
        "length": length,
        "extras": _extras(config),
    }
    if speed.precision == "bf16" and device.type == "cpu" and not has_bf16(device):
        lines["note"] = "this CPU has no bf16 instructions and imitates them, many times slower than fp32"
        lines["note"] += ": --speed.precision fp32"
    return lines


def copies_of_weights(config: RunConfig, cost: Cost) -> int:
    """Copies of the weights beside those that are trained: averages, and a teacher, which has about as many."""
    tracked = len(config.training.ema_lengths) * (snapshot_count(config.training, cost.parameters) > 0)
    return 1 + tracked + (config.teacher is not None)


def _extras(config: RunConfig) -> str:
    """Schedule, prediction, and every switch that differs from its default."""
    default, d = RunConfig(), config.diffusion
    extras = [f"schedule {d.schedule}", f"prediction {d.prediction}"]
    if d.process != "ddpm":
        extras = [f"process {d.process}", f"noise {d.noise or 'log_normal'}"]
        extras += [f"sigma_data {d.sigma_data}"] * (d.process == "edm")
    for section in ("model", "diffusion", "training", "data"):
        defaults, given = vars(getattr(default, section)), vars(getattr(config, section))
        extras += [f"{section}.{k}={given[k]}" for k, v in defaults.items() if isinstance(v, bool) and given[k] != v]
    extras += [f"model.patch_size={config.model.patch_size}"] if config.model.patch_size > 1 else []
    extras += [f"data.augment={config.data.augment:g}"] if config.data.augment else []
    largest = config.model.max_guidance_scale
    extras += [] if largest is None else [f"model.max_guidance_scale={largest:g}"]
    extras += [f"teacher {config.teacher} ({config.training.teacher_rule})"] if config.teacher else []
    extras += [f"model.join={config.model.join}"] if config.model.join != default.model.join else []
    extras += [f"loss_weight={d.loss_weight}(gamma {d.min_snr_gamma:g})"] if d.loss_weight != "uniform" else []
    return ", ".join(extras)


def format_number(x: float) -> str:
    """Two significant digits below 10, whole numbers above: 0.019, 3.4, 1,536."""
    return f"{x:.2g}" if x < 10 else f"{x:,.0f}"
