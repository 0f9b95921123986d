"""Conditioning diagnostics during training: loss by noise level and class, label usage, modulation statistics.

The losses are those of training; the rest is measured every `training.diagnostics_every` steps.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..commands import command, with_commands
from ..data import ImageDataset
from ..evaluation.label_usage import gap_verdict, label_use
from ..runs.layout import label_space
from ..runtime.distributed import has_float64, to_float64
from .trainer import Trainer

LOSS_BINS = 5  # of the noise level, equally frequent in training; under ddpm fifths of the timesteps
MAX_LOGGED_CLASSES = 100  # with more, losses by class are not logged
# of label usage; between them, about 1 % of the training since the last report
MAX_EVALUATIONS, MIN_EVALUATIONS = 256, 32
DEAD = 0.01  # of the median gain of the channel's site


class ConditioningDiagnostics:
    """Accumulates losses by noise level and class; every `training.diagnostics_every` steps, reports them with label usage.

    Args:
        trainer: The run. A call of the network has at most as many rows as a pass of training has images.
        heldout: Held-out images for label usage, on the main process only; None: not measured.
    """

    def __init__(self, trainer: Trainer, heldout: ImageDataset | None):
        self.trainer, self.heldout, self.labels = trainer, heldout, label_space(trainer.config)
        self.unet, self.ema, self.loss = trainer.unet, trainer.ema.model, trainer.loss
        self.accelerator, self.training = trainer.accelerator, trainer.config.training
        self.every = self.training.diagnostics_every
        rows = self.labels.K + 1 if 0 < self.labels.K <= MAX_LOGGED_CLASSES else 0
        device = self.unet.device if has_float64(self.unet.device) else "cpu"
        self._sums = torch.zeros(LOSS_BINS + rows, 2, dtype=torch.float64, device=device)  # loss, count
        images = self.every * self.training.batch_size
        self.evaluations = max(MIN_EVALUATIONS, min(MAX_EVALUATIONS, images // 100))
        self.warned = False
        self._gradient_norms: dict[str, float] = {}

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def observe(self, step: int, outputs: Iterable[tuple[Tensor, Tensor, Tensor | None]], norm: float) -> None:
        """Take the losses, quantiles and labels of each pass of a step, and its gradients before they are applied."""
        for output in outputs:
            self.add(*output)
        if self.due(step):
            self._gradient_norms = self.gradient_norms(norm)

    @torch.no_grad()
    def add(self, losses: Tensor, quantile: Tensor, labels: Tensor | None) -> None:
        """Accumulate losses of samples [B] at quantiles [B] of the training noise, under labels [B] (K: null)."""
        if not self.every:
            return
        losses, bins = to_float64(losses), (quantile * LOSS_BINS).long().to(self._sums.device)
        rows = torch.stack([losses, torch.ones_like(losses)], dim=1)
        self._sums.index_add_(0, bins, rows)
        if labels is not None and len(self._sums) > LOSS_BINS:
            self._sums.index_add_(0, LOSS_BINS + labels.to(self._sums.device), rows)

    def gradient_norms(self, norm: float) -> dict[str, float]:
        """The norm of the conditioning path's gradient (embedding, projections) and of the rest. norm: of all, before clipping."""
        squares = {"condition": 0.0, "trunk": 0.0}
        for name, p in self.unet.named_parameters():
            if p.grad is not None:
                path = "condition" if name.startswith(("embedding.", "projection.", "token_projection.")) else "trunk"
                squares[path] = squares[path] + to_float64(p.grad).square().sum()
        clipped = math.sqrt(float(sum(squares.values()))) or 1.0
        return {f"grad_norm_{path}": math.sqrt(float(square)) * norm / clipped for path, square in squares.items()}

    def state_dict(self) -> dict:
        """The sums of all processes since the last report."""
        return {"signals": self.accelerator.reduce(self._sums.clone(), "sum").tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Restore the sums, on the main process; the others start at 0."""
        sums = state.get("signals", [])
        if self.accelerator.is_main_process and len(sums) == len(self._sums):
            self._sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def run(self, step: int, say: Callable[[str], None]) -> dict[str, float]:
        """The diagnostics since the last report, on every process; a warning if the label is not used."""
        values, self._gradient_norms = self._gradient_norms | self.read(), {}
        if warning := self.warning(step, values):
            say(with_commands(warning, command("trace", self.trainer.run.path, **{"label-check": True})))
        return values

    def read(self) -> dict[str, float]:
        """Mean losses since the last report, on every process; modulation and label usage on the main one."""
        sums = self.accelerator.reduce(self._sums.clone(), "sum").cpu()
        self._sums.zero_()
        means = (sums[:, 0] / sums[:, 1]).tolist()
        names = [f"loss_t{i + 1}of{LOSS_BINS}" for i in range(LOSS_BINS)]
        if len(means) > LOSS_BINS:
            names += [f"loss_class/{self.labels.name(i)}" for i in range(self.labels.K)] + ["loss_class/null"]
        values = {name: mean for name, mean in zip(names, means) if math.isfinite(mean)}
        if self.accelerator.is_main_process:
            values |= self._modulation_statistics() | self._label_use()
        return values

    @torch.no_grad()
    def _modulation_statistics(self) -> dict[str, float]:
        """RMS of each field over the sites, and the share of channels whose gain is nearly 0, on a small grid of (t, y)."""
        classes = min(self.labels.K, 8)
        y = torch.arange(classes).repeat(4).to(self.ema.device) if classes else None
        t = torch.linspace(*self.loss.process.times, 4).repeat_interleave(classes or 1).to(self.ema.device)
        squares: dict[str, list[Tensor]] = {}
        dead = channels = 0
        for name, params in self.ema.modulation(t, y).items():
            for field, values in params._asdict().items():
                squares.setdefault(field, []).append(to_float64(values).square().mean())
            if "gamma" in params._fields:
                weight = getattr(self.ema.get_submodule(name), "weight", None)
                gain = ((1 + params.gamma) * (1 if weight is None else weight)).abs()
                dead += int((gain.amax(0) < DEAD * gain.median()).sum())
                channels += gain.shape[1]
        values = {f"rms_{field}": torch.stack(means).mean().sqrt().item() for field, means in squares.items()}
        return values | ({"dead_channels": dead / channels} if channels else {})

    def _label_use(self) -> dict[str, float]:
        if self.heldout is None or not self.labels.K:
            return {}
        settings = self.evaluations, self.training.batch_size, self.accelerator.autocast
        use = label_use(self.ema, self.heldout, self.loss, *settings, max_rows=self.trainer.images_per_pass)
        values = {"heldout_loss_true": use.true.mean().item()}
        for against in ("wrong", "null"):
            if (gap := use.gap(against)) is not None:
                values |= {f"label_gap_{against}": gap[0], f"label_gap_{against}_ci95": gap[1]}
        return values

    def warning(self, step: int, values: dict[str, float]) -> str | None:
        """A warning, once, if the label is not used after `training.warn_label_unused_after` steps."""
        gap, half = (values.get(f"label_gap_wrong{end}", math.nan) for end in ("", "_ci95"))
        late = 0 < self.training.warn_label_unused_after <= step
        verdict = gap_verdict(gap, half)
        if self.warned or not late or verdict in ("used", "open"):
            return None
        self.warned, finding = True, "misleads" if verdict == "misleads" else "shows no use"
        return (
            f"warning: after {step} steps the label {finding}: with a wrong class the loss on held-out images is {gap:+.5f} relative to "
            f"the true one (95% interval +-{half:.5f}). Are the labels right (adagn data inspect)? Does training.label_dropout leave "
            "enough of them? Does the label do anything?"
        )
