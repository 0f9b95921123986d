"""Conditioning diagnostics during training: loss by timestep and class, label usage, modulation statistics.

Cheap on purpose: the losses are those of training anyway, the rest is looked at every `training.diagnostics_every` steps.
"""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import TrainingConfig
from ..data import ImageDataset
from ..diffusion.loss import DiffusionLoss
from ..evaluation.label_usage import gap_verdict, label_use
from ..labels import LabelSpace
from ..models.unet import AdaGNUNet
from ..runtime.distributed import has_float64, to_float64

LOSS_BINS = 5  # of the timestep, evenly wide
MAX_LOGGED_CLASSES = 100  # with more, losses by class are not logged
# of the label's use; between them, about 1% of the training since the last look
MAX_EVALUATIONS, MIN_EVALUATIONS = 256, 32
DEAD = 0.01  # of the median gain of its site


class ConditioningDiagnostics:
    """Collects losses as the run goes, and looks at the network when asked.

    heldout: held-out images for label usage, on the main process only; None: not measured. most_rows: of a call of
    the network there; None: training.batch_size. One process trains on a part of that, and its memory is sized for the part.
    """

    def __init__(
        self,
        unet: AdaGNUNet,
        ema: AdaGNUNet,
        objective: DiffusionLoss,
        labels: LabelSpace,
        training: TrainingConfig,
        heldout: ImageDataset | None,
        max_rows: int | None = None,
    ):
        self.unet, self.ema, self.objective, self.labels = unet, ema, objective, labels
        self.training, self.heldout = training, heldout
        self.max_rows = training.batch_size if max_rows is None else max_rows
        self.every = training.diagnostics_every
        rows = labels.K + 1 if 0 < labels.K <= MAX_LOGGED_CLASSES else 0
        where = unet.device if has_float64(unet.device) else "cpu"
        self._sums = torch.zeros(LOSS_BINS + rows, 2, dtype=torch.float64, device=where)  # loss, how many
        seen = self.every * training.batch_size
        self.evaluations = max(MIN_EVALUATIONS, min(MAX_EVALUATIONS, seen // 100))
        self.warned = False

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    @torch.no_grad()
    def add(self, losses: Tensor, t: Tensor, labels: Tensor | None) -> None:
        """Add losses of samples [B] at timesteps [B] under labels [B] (K: null), to be logged at the next report."""
        if not self.every:
            return
        losses, t = to_float64(losses), t.to(self._sums.device)
        both = torch.stack([losses, torch.ones_like(losses)], dim=1)
        self._sums.index_add_(0, t * LOSS_BINS // self.objective.num_timesteps, both)
        if labels is not None and len(self._sums) > LOSS_BINS:
            self._sums.index_add_(0, LOSS_BINS + labels.to(self._sums.device), both)

    def gradient_norms(self, norm: float) -> dict[str, float]:
        """Of the gradient's norm (before clipping) the parts of the condition's path (embedding, projections) and of the rest."""
        parts = {"condition": 0.0, "trunk": 0.0}
        for name, p in self.unet.named_parameters():
            if p.grad is not None:
                path = "condition" if name.startswith(("embedding.", "projection.", "token_projection.")) else "trunk"
                parts[path] = parts[path] + to_float64(p.grad).square().sum()
        clipped = math.sqrt(float(sum(parts.values()))) or 1.0
        return {f"grad_norm_{path}": math.sqrt(float(square)) * norm / clipped for path, square in parts.items()}

    def sums(self, accelerator: Accelerator) -> list[list[float]]:
        """What was collected since the last look, of all processes, for the checkpoint."""
        return accelerator.reduce(self._sums.clone(), "sum").tolist()

    def restore(self, sums: list[list[float]], accelerator: Accelerator) -> None:
        """Put it back (on the main process; the others start at 0)."""
        if accelerator.is_main_process and len(sums) == len(self._sums):
            self._sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def read(self, accelerator: Accelerator, autocast: Callable) -> dict[str, float]:
        """The signals since the last look, on every process; the network's own and the label's use on the main one."""
        sums = accelerator.reduce(self._sums.clone(), "sum").cpu()
        self._sums.zero_()
        means = (sums[:, 0] / sums[:, 1]).tolist()
        names = [f"loss_t{i + 1}of{LOSS_BINS}" for i in range(LOSS_BINS)]
        if len(means) > LOSS_BINS:
            names += [f"loss_class/{self.labels.name(i)}" for i in range(self.labels.K)] + ["loss_class/null"]
        values = {name: mean for name, mean in zip(names, means) if math.isfinite(mean)}
        if accelerator.is_main_process:
            values |= self._modulation_statistics() | self._label_use(autocast)
        return values

    @torch.no_grad()
    def _modulation_statistics(self) -> dict[str, float]:
        """RMS of each field over the sites, and the share of channels whose gain is nearly 0, on a small grid of (t, y)."""
        k, total = self.labels.K, self.objective.num_timesteps
        y = torch.arange(min(k, 8)).repeat(4).to(self.ema.device) if k else None
        t = torch.linspace(0, total - 1, 4).repeat_interleave(min(k, 8) if k else 1).to(self.ema.device)
        m = self.ema.modulation(t, y)
        squares: dict[str, list[Tensor]] = {}
        dead = channels = 0
        for name, params in m.items():
            for field, part in params._asdict().items():
                squares.setdefault(field, []).append(to_float64(part).square().mean())
            if "gamma" in params._fields:
                weight = getattr(self.ema.get_submodule(name), "weight", None)
                gain = ((1 + params.gamma) * (1 if weight is None else weight)).abs()
                dead += int((gain.amax(0) < DEAD * gain.median()).sum())
                channels += gain.shape[1]
        values = {f"rms_{field}": torch.stack(some).mean().sqrt().item() for field, some in squares.items()}
        return values | ({"dead_channels": dead / channels} if channels else {})

    def _label_use(self, autocast: Callable) -> dict[str, float]:
        if self.heldout is None or not self.labels.K:
            return {}
        size = self.training.batch_size
        use = label_use(
            self.ema, self.heldout, self.objective, self.evaluations, size, autocast, max_rows=self.max_rows
        )
        values = {"heldout_loss_true": use.true.mean().item()}
        for against in ("wrong", "null"):
            gap = use.gap(against)
            if gap is not None:
                values |= {f"label_gap_{against}": gap[0], f"label_gap_{against}_ci95": gap[1]}
        return values

    def warning(self, step: int, values: dict[str, float]) -> str | None:
        """A sentence, once, if the label is still unused after `training.warn_label_unused_after` steps."""
        gap, half = (values.get(f"label_gap_wrong{end}", math.nan) for end in ("", "_ci95"))
        late = 0 < self.training.warn_label_unused_after <= step
        verdict = gap_verdict(gap, half)
        if self.warned or not late or verdict in ("used", "open"):
            return None
        self.warned = True
        return (
            f"warning: after {step} steps the label {'misleads' if verdict == 'misleads' else 'shows no use'}: with a wrong "
            f"class the loss on held-out images is {gap:+.5f} relative to the true one (95% interval +-{half:.5f}). Are the labels right (adagn data inspect)? Does "
            "training.label_dropout leave enough of them? Does the label do anything?"
        )
