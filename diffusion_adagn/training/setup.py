"""What a run decides before its first step: settings, data, devices, network; and the run folder."""

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from ..atomic import atomic_write, exclusive_lock
from ..commands import resume_command, with_commands
from ..config import DiffusionConfig, RunConfig, SpeedConfig, differences, read_config, to_yaml
from ..data import ImageDataset, open_dataset
from ..data.find import ResolvedSource, find_source
from ..data.store import NothingHeldOut
from ..diffusion.schedule import make_scheduler, set_timesteps
from ..errors import InputError
from ..labels import LabelSpace
from ..models.cost import Cost, estimate_cost
from ..models.unet import AdaGNUNet
from ..runs.checkpoint import latest_valid, read_state, remove_partial
from ..runs.layout import RunFolder, label_space, network_config
from ..runtime.distributed import main_first, process_state
from ..runtime.precision import AUTOCAST
from ..runtime.speed import describe_speed, has_bf16, resolve_speed, resolve_speed_together
from ..sampling.guidance import Guidance
from .image_fetcher import device_bytes
from .loader import images_per_pass
from .transfer import transfer


@dataclass(frozen=True)
class Setup:
    """What training starts from.

    config: resolved. heldout: None where it is not used. unet: on the CPU, with its initial weights. checkpoint: the one to
    resume from; None to start. summary: the lines that a run prints first.
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
    summary = describe(dataclasses.replace(config, speed=requested), dataset, count, device, cost)
    config = dataclasses.replace(config, speed=dataclasses.replace(requested, precision=speed.precision))
    AcceleratorState._reset_state()  # an earlier run in this interpreter may have had another precision
    mixed, tracker = AUTOCAST[speed.precision] is not None, None if training.tracker == "none" else training.tracker
    precision, on_cpu = speed.precision if mixed else "no", device.type == "cpu"
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu, log_with=tracker, project_dir=str(run.path))
    torch.manual_seed(training.seed)
    unet = AdaGNUNet(**network_config(config))
    newest = [latest_valid(run.checkpoints) if main and resume else None]  # every byte is checked once
    checkpoint = broadcast_object_list(newest)[0]
    if config.init_from and checkpoint is None:
        summary += f"\n{transfer(config.init_from, unet, label_space(config))}"
    return Setup(run, config, dataset, heldout, cost, speed, accelerator, unet, checkpoint, summary)


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
    if recorded_lr is None and run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise InputError(f"{run.path} exists and is not a run (no config.yaml in it): give another --output_dir.")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"the run folder {run.path} cannot be made ({error.strerror}): give another --output_dir."
        raise InputError(text) from error
    with exclusive_lock(run.path):
        remove_partial(run.checkpoints)
        atomic_write(run.config_file, lambda tmp: tmp.write_text(to_yaml(config), encoding="utf-8"))
        print(setup.summary)
        setup.accelerator.wait_for_everyone()
        yield recorded_lr


def _check_recorded(setup: Setup, resume: bool) -> float:
    """The recorded learning rate. Raises InputError if this config cannot resume the recorded run."""
    run, config, training = setup.run, setup.config, setup.config.training
    if not resume:
        raise _occupied(run)  # by a process that started meanwhile
    step = read_state(setup.checkpoint)["step"] if setup.checkpoint is not None else None
    if step is not None and step > training.max_steps:
        raise InputError(
            f"{run.path} is at {setup.checkpoint.name} already, beyond training.max_steps {training.max_steps}: give a larger one, or leave it out."
        )
    recorded = read_config(run.config_file)
    same_lr = dataclasses.replace(training, lr=recorded.training.lr)  # the learning rate may change
    if same_lr != training and step == training.max_steps:
        raise InputError(
            f"{run.path} is at its last step, {step}, and no step remains for training.lr {training.lr:g}: give a larger training.max_steps too."
        )
    changed = differences(recorded, dataclasses.replace(config, training=same_lr))
    if changed and step is not None:
        raise InputError(
            f"{run.path} was started with other settings, and resuming with these would change its result: {'; '.join(changed)}. "
            "Put them back, or start another run (with --init_from to keep the weights). Only training.lr may be changed."
        )
    return recorded.training.lr


def _check_run(config: RunConfig, resume: bool) -> RunFolder:
    if config.output_dir is None:
        raise InputError("where should the run go? Give --output_dir, such as runs/my-run.")
    run = RunFolder(Path(config.output_dir))
    if not resume and run.config_file.is_file():
        raise _occupied(run)
    if config.training.max_steps is None:
        raise InputError("how long should it train? Give training.max_steps, such as --training.max_steps 10000.")
    check_tracker(config.training.tracker)
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise InputError(
                f"accelerate is configured to shard the network ({name}), which is not supported: every process holds the whole network. "
                "Launch it with --multi_gpu, or by torchrun."
            )
    return run


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
    if config.labels is not None and (recorded := LabelSpace.from_dict(config.labels)) != space:
        raise InputError(
            f"the config records {recorded.K} classes ({', '.join(recorded.names[:5])}, ...), the data {dataset.name} has {space.K} "
            f"({', '.join(space.names[:5])}, ...): they must be the same classes in the same order. To train on other classes "
            "start another run, with --init_from to keep the weights."
        )
    data = dataclasses.replace(config.data, image_size=dataset.image_size, channels=dataset.channels)
    config = dataclasses.replace(config, data=data, labels=space.to_dict())
    if config.training.preview_every:
        _check_preview(config)
    return config, dataset


def _check_preview(config: RunConfig) -> None:
    """Raises InputError for settings that the first preview would reject, hours later."""
    steps = config.training.preview_steps
    label_space(config).parse(config.training.preview_classes if config.model.class_conditional else "null")
    Guidance(config.training.preview_guidance)
    if reason := _rejection(config.diffusion, steps):
        counts = sorted(range(1, config.diffusion.num_train_timesteps + 1), key=lambda n: abs(n - steps))
        valid = next(n for n in counts if not _rejection(config.diffusion, n))
        reason = reason.partition(": use")[0].rstrip(".")  # the remedies are for sampling, where the grid can be chosen
        raise InputError(f"training.preview_steps {steps}: {reason}. Give training.preview_steps {valid}.")


def _rejection(diffusion: DiffusionConfig, steps: int) -> str:
    """Why a preview cannot have this number of steps; "" if it can."""
    try:
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


def describe(config: RunConfig, dataset: ImageDataset, processes: int, device: torch.device, cost: Cost) -> str:
    """`describe_by_name`, a line each: what a run prints first."""
    lines = describe_by_name(config, dataset, processes, device, cost)
    return "\n".join(f"{name:10}{text}" for name, text in lines.items())


def describe_by_name(
    config: RunConfig, dataset: ImageDataset, processes: int, device: torch.device, cost: Cost
) -> dict[str, str]:
    """What is trained, on what, at what cost. Keys: data, network, batch, speed, memory, length, extras and sometimes note."""
    training, size, flops = config.training, dataset.image_size, cost.flops
    speed, per_pass = resolve_speed(config.speed, device, flops), images_per_pass(training, processes)
    half, images = AUTOCAST[speed.precision] is not None, device_bytes(dataset, device, training.images_on)
    memory = cost.training_bytes(per_pass, half, training.gradient_checkpointing) + images
    of_images = f", {images / 2**30:.2f} for the images, which are on the device; training.images_on host avoids this"
    length = "training.max_steps is not set"
    if training.max_steps:
        total = training.max_steps * training.batch_size
        length = f"{training.max_steps:,} steps = {total:,} images = {format_number(total / len(dataset))} epochs"
    lines = {
        "data": f"{dataset.name}: {len(dataset):,} images of {size}x{size}x{dataset.channels}, {dataset.label_space.K} classes"
        + " (labels not used)" * (not config.model.class_conditional),
        "network": f"{config.model.conditioning}, {cost.parameters / 1e6:.2f} M parameters, {flops / 1e9:.3f} GFLOPs per image "
        f"(forward; training about {3 * flops / 1e9:.3f})",
        "batch": f"{training.batch_size} = {processes} process(es) x {training.gradient_accumulation} pass(es) x {per_pass} images, "
        f"on {device}",
        "speed": describe_speed(speed, config.speed, device),
        "memory": f"about {memory / 2**30:.2f} GiB per process (weights, gradients, AdamW, EMA, activations"
        f"{of_images * (images > 0)}; an estimate)",
        "length": length,
        "extras": _extras(config),
    }
    if speed.precision == "bf16" and device.type == "cpu" and not has_bf16(device):
        note = (
            "this CPU has no bf16 instructions and imitates them, many times slower than fp32: --speed.precision fp32"
        )
        lines["note"] = note
    return lines


def _extras(config: RunConfig) -> str:
    """Schedule, prediction, and every switch that differs from its default."""
    default, d = RunConfig(), config.diffusion
    extras = [f"schedule {d.schedule}", f"prediction {d.prediction}"]
    for section in ("model", "diffusion", "training", "data"):
        defaults = dataclasses.asdict(getattr(default, section))
        values = dataclasses.asdict(getattr(config, section)).items()
        extras += [f"{section}.{k}={v}" for k, v in values if isinstance(defaults[k], bool) and v != defaults[k]]
    extras += [f"model.patch_size={config.model.patch_size}"] if config.model.patch_size > 1 else []
    extras += [f"data.augment={config.data.augment:g}"] if config.data.augment else []
    extras += [f"model.join={config.model.join}"] if config.model.join != default.model.join else []
    extras += [f"loss_weight={d.loss_weight}(gamma {d.min_snr_gamma:g})"] if d.loss_weight != "uniform" else []
    return ", ".join(extras)


def format_number(x: float) -> str:
    """Two significant digits below 10, whole numbers above: 0.019, 3.4, 1,536."""
    return f"{x:.2g}" if x < 10 else f"{x:,.0f}"
