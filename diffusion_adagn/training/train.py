"""train(config): a training run, top to bottom."""

import dataclasses
import math
import os
import signal
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from ..atomic import atomic_write, exclusive_lock
from ..commands import command, resume_command, shell_line, with_commands
from ..config import (
    DiffusionConfig,
    RunConfig,
    SpeedConfig,
    TrainingConfig,
    as_config,
    differences,
    read_config,
    to_dict,
    to_yaml,
)
from ..data import ImageDataset, open_dataset
from ..data.find import ResolvedSource, find_source
from ..data.store import NothingHeldOut
from ..diffusion.loss import DiffusionLoss
from ..diffusion.schedule import make_scheduler
from ..errors import InputError
from ..labels import LabelSpace
from ..models.cost import Cost, estimate_cost
from ..models.unet import AdaGNUNet
from ..runs.checkpoint import latest_valid, load_checkpoint, read_state, remove_partial, save_checkpoint
from ..runs.layout import RunFolder, label_space, network_config
from ..runtime.distributed import main_first, process_state
from ..runtime.precision import AUTOCAST, use_tf32
from ..runtime.speed import (
    apply_speed,
    compile_blocks,
    describe_speed,
    has_bf16,
    measure_peak_flops,
    resolve_speed,
    resolve_speed_together,
)
from ..runtime.stopping import SIGNALS, listen_for_signals
from ..sampling.load import make_pipeline
from ..schema import flatten
from .diagnostics import ConditioningDiagnostics
from .ema import EMA
from .export import sample_command, write_pipeline
from .image_fetcher import choose_image_fetcher, on_device
from .loader import Batch, BatchLoader
from .metrics_log import LR_CHANGE, Metrics, check_tracker
from .nonfinite import NonFiniteGuard, find_nonfinite, gradient_fault
from .prefetcher import Prefetcher
from .preview import check_preview, draw_preview, heldout_loss
from .transfer import transfer

# gloo's destructor joins, with Python's lock held, a thread that may be waiting for that lock: now and then a process that
# is done would hang for ever. It goes with the process instead.
_never_destroyed: list[torch.nn.Module] = []

FUSED = ("cpu", "cuda", "mps")  # devices that AdamW has one kernel for
STOPPED = 75  # exit status: saved and left on a signal (EX_TEMPFAIL: try again)


def train(config: RunConfig | Mapping | str | Path, resume: bool = False) -> int:
    """Train to `training.max_steps`. A step with a non-finite loss or gradient is skipped and reported.

    Args:
        config: a RunConfig, a YAML file, the name of a recipe, or a dict of settings.
        resume: continue from the latest checkpoint of `output_dir`; start if there is none.

    Returns:
        0 when finished; 75 when a signal stopped the run after a checkpoint was saved.

    Raises:
        InputError: the settings or the data cannot be used (nothing is changed), or too many consecutive steps were not finite
            (earlier checkpoints are intact).
    """
    with ExitStack() as held:  # the run folder's lock
        return _train(as_config(config), resume, held)


def _train(config: RunConfig, resume: bool, held: ExitStack) -> int:
    """`train`, holding the run folder's lock in `held`."""
    run = _check_run(config, resume)
    training = config.training
    processes = process_state(config.speed.device)
    main, device = processes.is_main_process, processes.device
    with main_first(processes):
        found = find_source(config.data)  # its files are looked at once for both parts
        config, dataset = resolve(config, progress=main, found=found)
    heldout = _heldout(config, main, found)
    per_pass = images_per_pass(training, processes.num_processes)
    cost = estimate_cost(network_config(config))
    asked = _resume_precision(run, config) if resume else config.speed
    speed = resolve_speed_together(asked, device, cost.flops)
    plan = describe(dataclasses.replace(config, speed=asked), dataset, processes.num_processes, device, cost)
    config = dataclasses.replace(config, speed=dataclasses.replace(asked, precision=speed.precision))
    held.enter_context(use_tf32(speed.precision == "tf32"))
    AcceleratorState._reset_state()  # an earlier run in this interpreter may have had another precision
    accelerator = Accelerator(
        mixed_precision="no" if AUTOCAST[speed.precision] is None else speed.precision,
        cpu=device.type == "cpu",
        log_with=None if training.tracker == "none" else training.tracker,
        project_dir=str(run.path),
    )

    # the network; whatever does not fit is found before anything is written
    torch.manual_seed(training.seed)
    unet = AdaGNUNet(**network_config(config))
    newest = [latest_valid(run.checkpoints) if main and resume else None]  # every byte is looked at once
    at = broadcast_object_list(newest)[0]
    if config.init_from and at is None:
        plan += f"\n{transfer(config.init_from, unet, label_space(config))}"
    recorded_lr = None
    if main:
        recorded_lr = _open_run_dir(run, config, resume, at, held)
        print(plan)
    accelerator.wait_for_everyone()
    unet.to(device)
    apply_speed(unet, speed)
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    ema = EMA(unet, training.ema_decay)
    optimizer = make_optimizer(unet, training)
    state = _restore(run, at, accelerator, dataset, unet, ema, optimizer)
    step = state["step"]
    if speed.compile:  # after the EMA was made: previews are few
        compile_blocks(unet)
    model, optimizer = accelerator.prepare(unet, optimizer)
    if accelerator.num_processes > 1:
        _never_destroyed.append(model)

    # what it learns from
    objective = make_objective(config.diffusion).to(device)
    feed = held.enter_context(Prefetcher(make_batches(config, dataset, device)))
    count = training.gradient_accumulation

    def positions_of(number: int) -> torch.Tensor:
        """The positions of this process's pass 0, 1, ... of the run."""
        part = accelerator.process_index * count + number % count
        first = number // count * training.batch_size + part * per_pass
        return torch.arange(first, first + per_pass)

    # logging
    signals = ConditioningDiagnostics(unet, ema.model, objective, label_space(config), training, heldout, per_pass)
    if step:
        signals.restore(state.get("signals", []), accelerator)
    health = NonFiniteGuard(training.max_nonfinite_steps, state.get("faults", 0))
    metrics = Metrics(run.metrics_file if main else None, last_step=step)
    if training.tracker != "none":
        flat = {
            k: v if isinstance(v, int | float | str) else str(v) for k, v in flatten(RunConfig, to_dict(config)).items()
        }
        accelerator.init_trackers("diffusion_adagn", config=flat)

    def log(**values: float) -> None:
        metrics.write(step=step, **values)
        if training.tracker != "none":
            accelerator.log(values, step=step)

    lr_before = state.get("lr", recorded_lr)  # of the checkpoint; before it was saved there, of config.yaml
    if main and step and lr_before not in (None, training.lr):
        print(f"training.lr is {training.lr:g} from step {step} on; it was {lr_before:g}")
        log(**{LR_CHANGE: lr_before, "lr_changed_to": training.lr})

    def save() -> None:
        collected = signals.sums(accelerator)
        if main:
            state = {
                "signals": collected,
                "step": step,
                "position": step * training.batch_size,
                "lr": training.lr,
                "data_fingerprint": dataset.fingerprint,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "faults": health.consecutive,
            }
            keep = training.keep_checkpoints, training.keep_every
            path = save_checkpoint(
                run.checkpoints, state, unet, ema.model, optimizer.optimizer, *keep, prune=not stopping
            )
            say(f"saved {path}")
        accelerator.wait_for_everyone()

    def losses_at(network: torch.nn.Module, positions: torch.Tensor) -> tuple[torch.Tensor, Batch]:
        batch = feed.batch(positions)
        x_t = objective.add_noise(batch.x0, batch.noise, batch.t)
        output = network(x_t, batch.t, batch.labels).sample
        return objective.loss(output, batch.x0, batch.noise, batch.t), batch

    effort = _format_throughput(cost, speed, device, accelerator.num_processes) if main else lambda rate: ""
    on_screen = sys.stderr.isatty() or any("notebook" in c.__module__ for c in tqdm.__mro__)
    bar = tqdm(
        total=training.max_steps,
        initial=step,
        unit="step",
        disable=not (main and on_screen),
        desc=run.path.name,
        smoothing=0.05,
    )
    held.callback(bar.close)  # an error is not printed on the bar's line

    def say(text: str, file: TextIO | None = None) -> None:
        """Print above the bar, at once; of the main process."""
        if main:
            bar.write(text, file=file)
            (file or sys.stdout).flush()

    shown, done, label_gap, fault = None, "", "", False
    since, since_step = time.perf_counter(), step
    began, since_start, waited = since, step, 0.0
    with StopSignal(run, lambda text: say(text, sys.stderr)) as stop:
        while step < training.max_steps:
            lr = learning_rate(training, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(_dropout_seed(training.seed, step, accelerator.process_index))
            numbers = range(step * count, (step + 1) * count)
            passes = [positions_of(number) for number in numbers]
            seen = []
            for number, positions in zip(numbers, passes):
                with nullcontext() if positions is passes[-1] else accelerator.no_sync(model):
                    each, batch = losses_at(model, positions)
                    accelerator.backward(each.mean() / len(passes))
                seen.append((each.detach(), batch.t, batch.labels))
                feed.prefetch(*(positions_of(n) for n in (number + 1, number + 2) if n < training.max_steps * count))
            norm = accelerator.clip_grad_norm_(model.parameters(), training.clip_norm or math.inf)
            loss = torch.stack([each.mean() for each, _, _ in seen]).mean()
            own = loss.item()
            stopping, fault = any_process(accelerator, stop.name is not None, not math.isfinite(own))
            fault = fault or gradient_fault(float(norm), accelerator.scaler)  # gradients are the same everywhere by now
            health.update(fault)
            if step == since_start and (built := _built(speed, device)):
                say(f"{built}: the first step took {time.perf_counter() - began:.0f} s")
            norms = {}
            if not fault:
                for each in seen:
                    signals.add(*each)
                norms = signals.gradient_norms(float(norm)) if signals.due(step + 1) else {}
            if (
                not fault or accelerator.scaler is not None
            ):  # the scaler wants its step, and leaves out what is not finite
                optimizer.step()
            optimizer.zero_grad()
            step += 1
            if not fault:
                ema.update(unet, step)
            else:
                where = _where(accelerator, unet, [partial(losses_at, unet, positions) for positions in passes])
                message = f"step {step} skipped: its loss is {own:g}, the norm of its gradient {float(norm):g}; {where}"
                say(message)
                log(left_out=health.consecutive)
                if health.exceeded:
                    raise InputError(
                        f"{health.consecutive} consecutive steps had a non-finite loss or gradient and were skipped (training.max_nonfinite_steps). "
                        f"{message}. The checkpoints in {run.checkpoints} are valid. Start another run with a lower training.lr or "
                        f"speed.precision fp32; {shell_line(['--init_from', str(run.path)])} keeps the weights so far."
                    )

            due = stopping or step % training.checkpoint_every == 0 or step == training.max_steps
            saving = due and not fault  # the step before may be what broke it: no good checkpoint is pruned for it
            logging = not fault and (step % training.log_every == 0 or step in (1, training.max_steps))
            mean = accelerator.reduce(loss, "mean").item() if logging else 0.0
            if logging:
                now = time.perf_counter()
                rate = (step - since_step) * training.batch_size / (now - since)
                waiting = (feed.wait_seconds - waited) / (now - since)
                since, since_step, waited = now, step, feed.wait_seconds
                log(
                    loss=mean,
                    lr=lr,
                    grad_norm=float(norm),
                    epoch=step * training.batch_size / len(dataset),
                    images_per_s=round(rate, 1),
                    data_wait=round(waiting, 4),
                )
                done = f", {rate:.0f} images/s, {effort(rate)}"
            if not fault:
                shown = own if shown is None else 0.95 * shown + 0.05 * own
                progress = f"loss {shown:.4f}{done}{label_gap}"
                bar.set_postfix_str(progress, refresh=False)
            bar.update()
            if logging and not on_screen:
                left = (training.max_steps - step) * training.batch_size / rate
                say(f"step {step:,}/{training.max_steps:,}, {progress}, {tqdm.format_interval(left)} left")

            if signals.due(step):
                seen = norms | signals.read(accelerator, accelerator.autocast)
                log(**seen)
                warning = signals.warning(step, seen)
                if main and warning is not None:
                    say(with_commands(warning, command("trace", run.path, **{"label-check": True})))
                if "label_gap_wrong" in seen:
                    label_gap = f", label gap {seen['label_gap_wrong']:+.4f}"
            if heldout is not None and training.heldout_every and step % training.heldout_every == 0:
                log(
                    heldout_loss=heldout_loss(
                        ema.model, heldout, objective, training, accelerator.autocast, device, per_pass
                    )
                )
            if main and training.preview_every and (step % training.preview_every == 0 or step == training.max_steps):
                with accelerator.autocast():
                    pipe = make_pipeline(config, ema.model, training.ema_decay, step)
                    file = draw_preview(run, pipe, training, step, per_pass)
                say(f"preview {file}")
            if saving:  # last: what a killed run had not yet shown of a step, it shows again
                save()
            if stopping:
                break
    share = feed.wait_seconds / (time.perf_counter() - began)
    bar.close()
    accelerator.print(f"data      {100 * share:.1f} % of the time was spent waiting for images")
    if step < training.max_steps:
        accelerator.print(
            with_commands(
                f"Stopped by {stop.name or 'a signal'} at step {step}; "
                f"{'not saved, since it was skipped' if fault else 'saved'}. Resume with:",
                resume_command(run.path),
            )
        )
        accelerator.end_training()
        return STOPPED

    if main:
        write_pipeline(run, config, ema.model, dataset, step)
        print(
            with_commands(
                f"\nDone: {step} steps. The model (EMA weights) is in {run.pipeline}\nSample it:",
                sample_command(str(run.path), label_space(config)),
            )
        )
    accelerator.end_training()
    return 0


# ---------------------------------------------------------------------- before the first step


def resolve(
    config: RunConfig, progress: bool = True, found: ResolvedSource | None = None
) -> tuple[RunConfig, ImageDataset]:
    """Open the data and write what it decides (image size, channels, classes) into the config.

    Raises InputError if the config records other classes than the data has.
    """
    dataset = open_dataset(config.data, "train", progress, found)
    space = dataset.label_space
    if config.labels is not None and LabelSpace.from_dict(config.labels) != space:
        recorded = LabelSpace.from_dict(config.labels)
        raise InputError(
            f"the config records {recorded.K} classes ({', '.join(recorded.names[:5])}, ...), the data {dataset.name} has {space.K} "
            f"({', '.join(space.names[:5])}, ...): they must be the same classes in the same order. To train on other classes "
            "start another run, with --init_from to keep the weights."
        )
    data = dataclasses.replace(config.data, image_size=dataset.image_size, channels=dataset.channels)
    config = dataclasses.replace(config, data=data, labels=space.to_dict())
    if config.training.preview_every:
        check_preview(config)
    return config, dataset


def _heldout(config: RunConfig, main: bool, found: ResolvedSource) -> ImageDataset | None:
    """The held-out images, on the main process, if anything uses them. The diagnostics work without them, and so does everything
    if every class needs its images for training (`open_dataset` prints it)."""
    asked = config.training.heldout_every > 0
    if not main or not (asked or (config.training.diagnostics_every and config.model.class_conditional)):
        return None
    try:
        return open_dataset(config.data, "heldout", main, found)
    except NothingHeldOut:
        return None
    except InputError:
        if asked:
            raise
        return None


def describe(
    config: RunConfig,
    dataset: ImageDataset,
    processes: int = 1,
    device: torch.device | None = None,
    cost: Cost | None = None,
) -> str:
    """`facts`, a line each: the head of a run."""
    return "\n".join(f"{name:10}{text}" for name, text in facts(config, dataset, processes, device, cost).items())


def facts(
    config: RunConfig,
    dataset: ImageDataset,
    processes: int = 1,
    device: torch.device | None = None,
    cost: Cost | None = None,
) -> dict[str, str]:
    """What will be trained, on what, at what cost, by name. device: this process's, unless given."""
    training, cost = config.training, cost or estimate_cost(network_config(config))
    device = device or process_state(config.speed.device).device
    speed = resolve_speed(config.speed, device, cost.flops)
    per_pass = images_per_pass(training, processes)
    memory = (
        cost.training_bytes(per_pass, AUTOCAST[speed.precision] is not None, training.gradient_checkpointing) / 2**30
    )
    stored = dataset.images[0].nbytes * len(dataset) / 2**30 if on_device(dataset, device, training.images_on) else 0
    steps = training.max_steps
    seen = (steps or 0) * training.batch_size
    length = (
        f"{steps:,} steps = {seen:,} images = {shown_number(seen / len(dataset))} epochs"
        if steps
        else "training.max_steps is not set"
    )
    found = {
        "data": f"{dataset.name}: {len(dataset):,} images of {dataset.image_size}x{dataset.image_size}x{dataset.channels}, "
        f"{dataset.label_space.K} classes" + ("" if config.model.class_conditional else " (labels not used)"),
        "network": f"{config.model.conditioning}, {cost.parameters / 1e6:.2f} M parameters, {cost.flops / 1e9:.3f} GFLOPs per image "
        f"(forward; training about {3 * cost.flops / 1e9:.3f})",
        "batch": f"{training.batch_size} = {processes} process(es) x {training.gradient_accumulation} pass(es) x {per_pass} images, "
        f"on {device}",
        "speed": describe_speed(speed, config.speed, device),
        "memory": f"about {memory + stored:.2f} GiB per process (weights, gradients, AdamW, EMA, activations"
        + (
            f", {stored:.2f} for the images, which are on the device; training.images_on host avoids this"
            if stored
            else ""
        )
        + "; an estimate)",
        "length": length,
        "extras": _extras(config),
    }
    if speed.precision == "bf16" and device.type == "cpu" and not has_bf16(device):
        found["note"] = (
            "this CPU has no bf16 instructions and imitates them, many times slower than fp32: --speed.precision fp32"
        )
    return found


def shown_number(x: float) -> str:
    """With the digits that say something: 0.019, 3.4, 1,536."""
    return f"{x:.2g}" if x < 10 else f"{x:,.0f}"


def _extras(config: RunConfig) -> str:
    default, on = RunConfig(), []
    for section in ("model", "diffusion", "training", "data"):
        mine, plain = getattr(config, section), getattr(default, section)
        on += [
            f"{section}.{f.name}={getattr(mine, f.name)}"
            for f in dataclasses.fields(mine)
            if isinstance(getattr(plain, f.name), bool) and getattr(mine, f.name) != getattr(plain, f.name)
        ]
    d = config.diffusion
    on += [f"model.join={config.model.join}"] if config.model.join != default.model.join else []
    on += [f"loss_weight={d.loss_weight}(gamma {d.min_snr_gamma:g})"] if d.loss_weight != "uniform" else []
    return f"schedule {d.schedule}, prediction {d.prediction}" + "".join(f", {e}" for e in on)


def _check_run(config: RunConfig, resume: bool) -> RunFolder:
    training = config.training
    if config.output_dir is None:
        raise InputError("where should the run go? Give --output_dir, such as runs/my-run.")
    run = RunFolder(Path(config.output_dir))
    if not resume and run.config_file.is_file():
        raise _occupied(run)
    if training.max_steps is None:
        raise InputError("how long should it train? Give training.max_steps, such as --training.max_steps 10000.")
    check_tracker(training.tracker)
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise InputError(
                f"accelerate is configured to shard the network ({name}), which is not supported: every process holds the whole network. "
                "Launch it with --multi_gpu, or by torchrun."
            )
    return run


def _occupied(run: RunFolder) -> InputError:
    at = run.newest_checkpoint()
    text = f"{run.path} already holds a run ({f'at {at.name}' if at else 'without a checkpoint yet'}). Give another --output_dir, or resume it:"
    return InputError(with_commands(text, resume_command(run.path)))


def _resume_precision(run: RunFolder, config: RunConfig) -> SpeedConfig:
    """The speed section, the precision that `auto` means being the one that the run began with."""
    if config.speed.precision == "auto" and run.config_file.is_file():
        return dataclasses.replace(config.speed, precision=read_config(run.config_file).speed.precision)
    return config.speed


def images_per_pass(training: TrainingConfig, processes: int) -> int:
    """How many images one process holds at once. Raises InputError if the batch cannot be split evenly."""
    parts = processes * training.gradient_accumulation
    if training.batch_size % parts:
        raise InputError(
            f"training.batch_size {training.batch_size} (for all processes together) cannot be dealt to {processes} process(es) in "
            f"{training.gradient_accumulation} pass(es): make it a multiple of {parts}."
        )
    return training.batch_size // parts


def _open_run_dir(run: RunFolder, config: RunConfig, resume: bool, at: Path | None, held: ExitStack) -> float | None:
    """Make the folder this run's, or check that it is, and lock it. The main process alone does this.

    Returns the learning rate that was recorded there before; None for a new run.
    """
    recorded = None
    if run.config_file.is_file():
        at = at or run.newest_checkpoint()
        if resume and at is not None and read_state(at)["step"] > config.training.max_steps:
            raise InputError(
                f"{run.path} is at {at.name} already, beyond training.max_steps {config.training.max_steps}: give a larger one, or "
                "leave it out."
            )
        if not resume:
            raise _occupied(run)  # by a process that started meanwhile
        recorded = read_config(run.config_file)
        same_lr = dataclasses.replace(config.training, lr=recorded.training.lr)  # the learning rate may change
        changed = differences(recorded, dataclasses.replace(config, training=same_lr))
        if same_lr != config.training and at is not None and read_state(at)["step"] == config.training.max_steps:
            raise InputError(
                f"{run.path} is at its last step, {config.training.max_steps}, and no step remains for training.lr {config.training.lr:g}: "
                "give a larger training.max_steps too."
            )
        if changed and at is not None:
            raise InputError(
                f"{run.path} was started with other settings, and going on would change its result: {'; '.join(changed)}. "
                "Put them back, or start another run (with --init_from to keep the weights). Only training.lr may be changed."
            )
    elif run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise InputError(f"{run.path} exists and is not a run (no config.yaml in it): give another --output_dir.")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the run folder {run.path} cannot be made ({error.strerror}): give another --output_dir."
        ) from error
    held.enter_context(exclusive_lock(run.path))
    remove_partial(run.checkpoints)
    atomic_write(run.config_file, lambda tmp: tmp.write_text(to_yaml(config), encoding="utf-8"))
    return None if recorded is None else recorded.training.lr


def _restore(
    run: RunFolder, checkpoint: Path | None, accelerator: Accelerator, dataset: ImageDataset, unet, ema: EMA, optimizer
) -> dict:
    """Load a checkpoint, if there is one to go on from. Returns its state."""
    if checkpoint is None:
        return {"step": 0}
    state = read_state(checkpoint)
    if state.get("data_fingerprint") != dataset.fingerprint:
        raise InputError(
            f"the data {dataset.name} is not what {run.path} was trained on (its images, labels or names have changed): put it "
            "back, or start another run with --init_from."
        )
    load_checkpoint(checkpoint, unet, ema.model, optimizer)
    if accelerator.scaler is not None and state.get("scaler"):
        accelerator.scaler.load_state_dict(state["scaler"])
    accelerator.print(f"going on from {checkpoint}")
    return state


# ---------------------------------------------------------------------- inside the loop


def make_optimizer(unet: AdaGNUNet, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with the run's settings. The network is on its device already."""
    return torch.optim.AdamW(
        unet.parameters(),
        lr=training.lr,
        betas=(0.9, training.adam_beta2),
        weight_decay=training.weight_decay,
        fused=unet.device.type in FUSED,
    )


def make_objective(diffusion: DiffusionConfig) -> DiffusionLoss:
    """The loss, on the CPU."""
    return DiffusionLoss(
        make_scheduler(diffusion).alphas_cumprod,
        diffusion.prediction,
        diffusion.loss_weight,
        diffusion.min_snr_gamma,
        diffusion.vlb_weight if diffusion.learned_variance else None,
    )


def make_batches(config: RunConfig, dataset: ImageDataset, device: torch.device) -> BatchLoader:
    """What the network is trained on at each position of the run."""
    return BatchLoader(
        dataset,
        config.training.seed,
        config.diffusion.num_train_timesteps,
        device,
        conditional=config.model.class_conditional,
        label_dropout=config.training.label_dropout if config.model.class_conditional else 0.0,
        flip=config.data.flip,
        pixels=choose_image_fetcher(dataset, device, config.training.images_on),
        balance=config.data.balance,
    )


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up over warmup_steps, then constant or decayed to 0 at max_steps."""
    if step < training.warmup_steps:
        return training.lr * (step + 1) / training.warmup_steps
    if training.lr_decay == "none":
        return training.lr
    done = (step - training.warmup_steps) / max(1, training.max_steps - training.warmup_steps)
    return training.lr * (1 - done if training.lr_decay == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def _dropout_seed(seed: int, step: int, process: int) -> int:
    """The global generator serves dropout layers alone; seeded each step, it needs no saving."""
    return (seed * 1_000_003 + step) * 4096 + process & 0x7FFFFFFFFFFFFFFF


def _format_throughput(cost: Cost, speed: SpeedConfig, device: torch.device, processes: int) -> Callable[[float], str]:
    """images/s -> "12.3 GFLOP/s, 41 % of peak": the network's own arithmetic, beside what this machine's matrix products reach."""
    dtype = AUTOCAST[speed.precision] or torch.float32
    if device.type == "cpu" and not has_bf16(device):  # a product in imitated bf16 takes seconds, and is no peak
        dtype = torch.float32
    peak = processes * measure_peak_flops(device, dtype, seconds=0.1)

    def formatted(rate: float) -> str:
        share = 300 * cost.flops * rate / peak
        # the peak is what a few products reached just now; what is above it is no percentage
        return f"{3 * cost.flops * rate / 1e9:.3g} GFLOP/s ({f'{share:.0f} % of' if share <= 100 else 'at'} peak)"

    return formatted


class StopSignal:
    """SIGTERM, SIGUSR1 and Ctrl-C set a flag; the loop saves and leaves at the end of the step. A second Ctrl-C leaves without saving.

    Args:
        run: The run, for the message of a second Ctrl-C.
        say: Prints a message at once, from another thread: the main one may compute for seconds before it notices a signal.
    """

    def __init__(self, run: RunFolder, say: Callable[[str], None]):
        self.run, self.say = run, say
        self.name: str | None = None
        self._came = self._again = False

    def __enter__(self) -> "StopSignal":
        self._before, self._noted = {}, ExitStack()
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._before = {s: signal.signal(s, self._handle) for s in SIGNALS}
            self._noted.enter_context(listen_for_signals(self._report_signal))
        return self

    def __exit__(self, *_) -> None:
        try:
            self._noted.close()
        finally:
            for s, handler in self._before.items():
                signal.signal(s, handler)

    def _report_signal(self, number: int) -> None:
        """In the thread that receives every signal; the main one runs one handler for two that come within one call."""
        if not self._came:
            self._came = True
            again = " Ctrl-C again exits without saving." if number == signal.SIGINT else ""
            self.say(f"{signal.Signals(number).name}: stopping after this step and saving a checkpoint.{again}")
        elif number == signal.SIGINT and not self._again:
            at = self.run.newest_checkpoint()
            text = f"exiting without saving; {f'a resumed run continues from {at}' if at else 'there is no checkpoint yet: a resumed run starts at step 0'}."
            self.say(with_commands(text, resume_command(self.run.path)))
            self._again = True
            interrupt_main()

    def _handle(self, number: int, _) -> None:
        if self._again:
            for s in SIGNALS:  # what follows must not be interrupted
                signal.signal(s, signal.SIG_IGN)
            raise KeyboardInterrupt
        self.name = self.name or signal.Signals(number).name


def _built(speed: SpeedConfig, device: torch.device) -> str:
    """What the first step compiles, in words; "" for nothing."""
    if speed.compile:
        return "compiled"
    return "Triton kernels compiled, or loaded from its cache" * (device.type == "cuda" and speed.operator == "fused")


def any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process. The result is the same everywhere, so that all act at the same step."""
    if accelerator.num_processes == 1:
        return list(flags)
    sums = accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=accelerator.device), "sum")
    return (sums > 0).tolist()


def _where(accelerator: Accelerator, unet: AdaGNUNet, passes: list[Callable]) -> str:
    """Which value was not finite first, on the first process that has one."""
    with accelerator.autocast():
        mine = find_nonfinite(unet, [lambda p=p: p()[0] for p in passes])
    found = [f for f in gather_object([mine]) if f is not None]
    return f"first not finite: {found[0]}" if found else "made again, all values are finite"
