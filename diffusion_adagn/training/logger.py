"""What a run reports: metrics.jsonl and a tracker, progress on the terminal, messages."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from tqdm.auto import tqdm

from ..atomic import atomic_write
from ..config import RunConfig, SpeedConfig, to_dict
from ..models.cost import Cost
from ..runtime.precision import AUTOCAST
from ..runtime.speed import has_bf16, measure_peak_flops
from ..schema import flatten
from .objective import forward_passes
from .trainer import StepResult, Trainer

LR_CHANGE = "lr_changed_from"  # in the line that a resume with another learning rate writes


class Logger:
    """Metrics, progress and messages of a run; only the main process prints and writes.

    Progress is a bar on a terminal or in a notebook, elsewhere a line per log step. A context: leaving it closes the bar,
    so that an error is not printed on the bar's line.

    Args:
        trainer: The run, at the step where it starts or resumes.
        cost: Of its network.
        speed: What `resolve_speed` returned.
        previous_lr: training.lr before this resume; None for a new run.
    """

    def __init__(self, trainer: Trainer, cost: Cost, speed: SpeedConfig, previous_lr: float | None):
        accelerator, training, start = trainer.accelerator, trainer.config.training, trainer.step
        self.trainer, self.training, self.main = trainer, training, accelerator.is_main_process
        self.metrics = Metrics(trainer.run.metrics_file if self.main else None, last_step=start)
        if training.tracker != "none":
            flat = flatten(RunConfig, to_dict(trainer.config)).items()
            settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in flat}
            accelerator.init_trackers("diffusion_adagn", config=settings)
        if self.main and start and previous_lr not in (None, training.lr):
            print(f"training.lr is {training.lr:g} from step {start} on; it was {previous_lr:g}")
            self.log(**{LR_CHANGE: previous_lr, "lr_changed_to": training.lr})
        self.throughput = lambda rate: ""
        if self.main:
            flops = forward_passes(trainer.config) * cost.flops
            self.throughput = format_throughput(flops, speed, accelerator.device, accelerator.num_processes)
        self.on_screen = sys.stderr.isatty() or any("notebook" in c.__module__ for c in tqdm.__mro__)
        hidden, name = not (self.main and self.on_screen), trainer.run.path.name
        self.bar = tqdm(total=trainer.max_steps, initial=start, unit="step", disable=hidden, desc=name, smoothing=0.05)
        self.compiled, self.first_step = compiled_parts(speed, accelerator.device), start + 1
        self.average: float | None = None  # of the loss, exponentially weighted
        self.rate_text = self.label_gap_text = ""
        self.started = time.perf_counter()
        self.last_log = self.started, start, 0.0  # time, step, seconds spent waiting for images

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Print at once, above the bar."""
        if self.main:
            self.bar.write(text, file=file)
            (file or sys.stdout).flush()

    def log(self, **values: float) -> None:
        """Write values of the trainer's step to metrics.jsonl and to the tracker."""
        if values:
            self.metrics.write(step=self.trainer.step, **values)
        if values and self.training.tracker != "none":
            self.trainer.accelerator.log(values, step=self.trainer.step)
        if "label_gap_wrong" in values:
            self.label_gap_text = f", label gap {values['label_gap_wrong']:+.4f}"

    def log_step(self, result: StepResult) -> None:
        """Report a step: its progress, and its numbers every `training.log_every` steps, at the first and the last."""
        step, training = self.trainer.step, self.training
        if step == self.first_step and self.compiled:
            self.say(f"{self.compiled}: the first step took {time.perf_counter() - self.started:.0f} s")
        if not result.skipped:
            due = step % training.log_every == 0 or step in (1, training.max_steps)
            rate = self._log_numbers(result) if due else 0.0
            self.average = 0.95 * self.average + 0.05 * result.loss if self.average is not None else result.loss
            progress = f"loss {self.average:.4f}{self.rate_text}{self.label_gap_text}"
            self.bar.set_postfix_str(progress, refresh=False)
            if due and not self.on_screen:
                left = tqdm.format_interval((training.max_steps - step) * training.batch_size / rate)
                self.say(f"step {step:,}/{training.max_steps:,}, {progress}, {left} left")
        self.bar.update()

    def _log_numbers(self, result: StepResult) -> float:
        """Log the numbers of a step. Returns images per second since the last ones."""
        trainer, training, step = self.trainer, self.training, self.trainer.step
        loss = trainer.accelerator.reduce(torch.tensor(result.loss, device=trainer.accelerator.device), "mean").item()
        last_time, last_step, last_wait = self.last_log
        self.last_log = now, _, wait = time.perf_counter(), step, trainer.batches.wait_seconds
        rate = (step - last_step) * training.batch_size / (now - last_time)
        self.rate_text = f", {rate:.0f} images/s, {self.throughput(rate)}"
        epoch, data_wait = step * training.batch_size / len(trainer.dataset), (wait - last_wait) / (now - last_time)
        numbers = {"loss": loss, "lr": result.lr, "grad_norm": result.grad_norm, "epoch": epoch}
        self.log(**numbers, images_per_s=round(rate, 1), data_wait=round(data_wait, 4))
        return rate

    def finish(self) -> None:
        """Print what share of the time the run waited for images."""
        share = self.trainer.batches.wait_seconds / (time.perf_counter() - self.started)
        self.trainer.accelerator.print(f"data      {100 * share:.1f} % of the time was spent waiting for images")


class Metrics:
    """Appends one JSON object per line to metrics.jsonl, each with its `step`; only where `path` is given.

    On resume the file is cut back to the lines up to `last_step`, so that no step is in it twice. A change of the learning
    rate at that very step belongs to an earlier resume from there, and is cut too.
    """

    def __init__(self, path: Path | None, last_step: int = 0):
        self.path = path
        if path is not None and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            valid = [x for x in lines if (s := _step(x)) < last_step or (s == last_step and LR_CHANGE not in x)]
            if valid != lines:
                atomic_write(path, lambda tmp: tmp.write_text("".join(valid), encoding="utf-8"))

    def write(self, **values: float) -> None:
        """A value that is not finite becomes null: JSON has no Infinity and no NaN."""
        if self.path is not None:
            known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(known, allow_nan=False) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut in half by a kill


def format_throughput(
    flops_per_image: int, speed: SpeedConfig, device: torch.device, processes: int
) -> Callable[[float], str]:
    """images/s -> "12.3 GFLOP/s (41 % of peak)": the network's arithmetic, relative to this machine's matrix products."""
    dtype = AUTOCAST[speed.precision] or torch.float32
    if device.type == "cpu" and not has_bf16(device):  # a product in imitated bf16 takes seconds, and is no peak
        dtype = torch.float32
    peak = processes * measure_peak_flops(device, dtype, seconds=0.1)

    def formatted(rate: float) -> str:
        flops = flops_per_image * rate
        # a few products were measured just now; a percentage above their rate means nothing
        share = f"{100 * flops / peak:.0f} % of" if flops <= peak else "at"
        return f"{flops / 1e9:.3g} GFLOP/s ({share} peak)"

    return formatted


def compiled_parts(speed: SpeedConfig, device: torch.device) -> str:
    """What the first step compiles; "" for nothing."""
    if speed.compile:
        return "compiled"
    return "Triton kernels compiled, or loaded from its cache" * (device.type == "cuda" and speed.operator == "fused")
