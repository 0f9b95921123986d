"""The state of a training run, and one optimizer step."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import DiffusionConfig, TrainingConfig, decisive
from ..diffusion.loss import DiffusionLoss
from ..diffusion.schedule import make_process
from ..models.unet import AdaGNUNet
from ..runs.ema_snapshots import snapshot_count
from ..runtime.speed import apply_speed, compile_blocks
from .ema import EMA, PowerEMA
from .learning_rate import learning_rate
from .loader import Batch, images_per_pass, make_batches
from .objective import Objective
from .prefetcher import Prefetcher
from .setup import Setup
from .uncertainty import LearnedUncertainty

# gloo's destructor joins, with Python's lock held, a thread that may be waiting for that lock: now and then a process that
# is done would hang for ever. It goes with the process instead.
_never_destroyed: list[torch.nn.Module] = []

FUSED = ("cpu", "cuda", "mps")  # devices that AdamW has one kernel for


@dataclass(frozen=True)
class StepResult:
    """What one step of this process computed.

    loss: the mean over this process's images. grad_norm: of the whole batch, before clipping. skipped: some process had a
    non-finite loss or gradient, and the weights did not change. stopping: some process received a stop signal. passes:
    the positions [images_per_pass] of each pass.
    """

    lr: float
    loss: float
    grad_norm: float
    skipped: bool
    stopping: bool
    passes: list[Tensor]


class Trainer:
    """The state of a run: step, network, EMAs, optimizer, batches, loss and processes.

    `batches` is a context: leaving it ends the threads that prefetch.
    """

    def __init__(self, setup: Setup):
        self.run, self.config, self.dataset = setup.run, setup.config, setup.dataset
        self.unet, self.accelerator, self.step = setup.unet, setup.accelerator, 0
        unet, training, accelerator, device = self.unet, self.config.training, self.accelerator, self.accelerator.device
        self.images_per_pass, self.max_steps = images_per_pass(training, accelerator.num_processes), training.max_steps
        unet.to(device)
        apply_speed(unet, setup.speed)
        if training.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.ema = EMA(unet, training.ema_decay)
        self.parameters = setup.cost.parameters
        count = snapshot_count(training, self.parameters)
        self.power_ema: PowerEMA | None = None  # on the main process, if lengths are tracked
        if count and accelerator.is_main_process:
            self.power_ema = PowerEMA(unet, training.ema_lengths, max(1, self.max_steps // count), count)
        if setup.speed.compile:  # after the EMA was made: previews are few
            compile_blocks(unet)
        self.model, self.optimizer = accelerator.prepare(unet, make_optimizer(unet, training))
        if accelerator.num_processes > 1:
            _never_destroyed.append(self.model)
        self.loss = make_loss(self.config.diffusion).to(device)
        learned = self.config.diffusion.loss_weight == "learned"
        self.objective = Objective(self.loss, unet, setup.teacher)
        if setup.teacher is not None:
            setup.teacher.autocast = accelerator.autocast
            apply_speed(setup.teacher.unet.to(device), setup.speed)
        self.uncertainty = LearnedUncertainty(accelerator) if learned else None
        self.batches = Prefetcher(make_batches(self.config, self.dataset, self.loss.process, device))

    @property
    def teacher_hash(self) -> str | None:
        return None if self.objective.teacher is None else self.objective.teacher.hash

    def positions(self, number: int) -> Tensor:
        """The positions [images_per_pass] of this process's pass 0, 1, ... of the run."""
        training = self.config.training
        step, part = divmod(number, training.gradient_accumulation)
        part += self.accelerator.process_index * training.gradient_accumulation
        first = step * training.batch_size + part * self.images_per_pass
        return torch.arange(first, first + self.images_per_pass)

    def forward_loss(self, model: torch.nn.Module, positions: Tensor) -> tuple[Tensor, Batch]:
        """The loss of each image [B] at these positions [B], and the batch. model: `self.model`, or the network itself."""
        batch = self.batches.batch(positions)
        return self.objective(model, batch), batch

    def train_step(self, stop: bool, observe: Callable[[int, list, float], None]) -> StepResult:
        """One optimizer step; it changes no weight if a loss or gradient is not finite in any process.

        Args:
            stop: Whether this process received a stop signal.
            observe: Called before the gradients are applied, unless the step is skipped, with the step, [(losses [B], quantiles
                [B], labels [B] or None)] of each pass and the norm of the gradient.
        """
        training, accelerator = self.config.training, self.accelerator
        lr = learning_rate(training, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # the global generator serves dropout layers alone; seeded at each step, it needs no saving
        seed = (training.seed * 1_000_003 + self.step) * 4096 + accelerator.process_index
        torch.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
        count, first = training.gradient_accumulation, self.step * training.gradient_accumulation
        passes, outputs = [self.positions(n) for n in range(first, first + count)], []
        for number, positions in enumerate(passes, first):
            with nullcontext() if positions is passes[-1] else accelerator.no_sync(self.model):
                losses, batch = self.forward_loss(self.model, positions)
                weighted = losses if self.uncertainty is None else self.uncertainty.weighted(losses, batch.level)
                accelerator.backward(weighted.mean() / count)
            outputs.append((losses.detach(), batch.quantile, batch.labels))
            coming = [n for n in (number + 1, number + 2) if n < self.max_steps * count]
            self.batches.prefetch(*map(self.positions, coming))
        norm = accelerator.clip_grad_norm_(self.model.parameters(), training.clip_norm or math.inf)
        loss = torch.stack([losses.mean() for losses, _, _ in outputs]).mean().item()
        stopping, skipped = any_process(accelerator, stop, not math.isfinite(loss))
        norm = float(norm)  # the same in all processes
        skipped = skipped or is_nonfinite_gradient(norm, accelerator.scaler)
        if not skipped:
            observe(self.step + 1, outputs, norm)
        if not skipped or accelerator.scaler is not None:  # the scaler needs its step, and skips what is not finite
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.uncertainty is not None:
            self.uncertainty.step(lr, skipped)
        self.step += 1
        if not skipped:
            self.ema.update(self.unet, self.step)
        if self.power_ema is not None:
            self.power_ema.update(self.unet, self.step)
        return StepResult(lr, loss, norm, skipped, stopping, passes)

    def state_dict(self) -> dict:
        """What a checkpoint's state.json has of the trainer; its tensors are in files of their own."""
        training, scaler = self.config.training, self.accelerator.scaler
        state = {"step": self.step, "position": self.step * training.batch_size, "lr": training.lr}
        state |= {} if self.uncertainty is None else self.uncertainty.state_dict()
        state |= {"ema_spacing": None if self.power_ema is None else self.power_ema.spacing}
        state["data_fingerprint"] = self.dataset.fingerprint
        state |= {} if self.teacher_hash is None else {"teacher": self.teacher_hash}
        own = ("training.lr", "labels")  # recorded as "lr", and in the fingerprint
        state["settings"] = {key: value for key, value in decisive(self.config).items() if key not in own}
        return state | {"scaler": None if scaler is None else scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        if self.power_ema is not None and state.get("ema_spacing"):
            self.power_ema.spacing = state["ema_spacing"]
        else:  # averages cannot begin in the middle
            self.power_ema = None
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.uncertainty is not None:
            self.uncertainty.load_state_dict(state)


def make_optimizer(unet: AdaGNUNet, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with the run's settings. The network is on its device already."""
    betas, fused = (0.9, training.adam_beta2), unet.device.type in FUSED
    return torch.optim.AdamW(unet.parameters(), training.lr, betas, weight_decay=training.weight_decay, fused=fused)


def make_loss(diffusion: DiffusionConfig) -> DiffusionLoss:
    """The loss, on the CPU."""
    vlb_weight = diffusion.vlb_weight if diffusion.learned_variance else None
    return DiffusionLoss(make_process(diffusion), diffusion.loss_weight, diffusion.min_snr_gamma, vlb_weight)


def any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process. The result is the same everywhere, so that all act at the same step."""
    if accelerator.num_processes == 1:
        return list(flags)
    sums = accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=accelerator.device), "sum")
    return (sums > 0).tolist()


def is_nonfinite_gradient(norm: float, scaler: "torch.amp.GradScaler | None") -> bool:
    """Whether a step with this gradient norm counts as skipped.

    fp16's scaler skips a non-finite step itself and halves its factor. That is normal until the factor is below 1: then the
    gradients themselves are too large.
    """
    return not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1)
