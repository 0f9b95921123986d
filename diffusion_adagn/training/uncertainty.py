"""Learned uncertainty: the weight of the loss by noise level, learned beside the network."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..diffusion.process import Level

FEATURES = 64  # frequencies of ln(sigma) / 4
MAX_LOG_SIGMA = 12.0  # at pure noise ln(sigma) is infinite


class LogVariance(nn.Module):
    """u(sigma), a linear function of Fourier features of ln(sigma) / 4; 0 at first. Only training uses it.

    The loss is L / exp(u) + u, least at u = log L: every noise level then contributes as much (Karras et al. 2024, EDM2,
    equation 21; Kendall & Gal 2018).
    """

    def __init__(self):
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2 * torch.pi * torch.randn(FEATURES, generator=draws), persistent=False)
        self.register_buffer("phases", 2 * torch.pi * torch.rand(FEATURES, generator=draws), persistent=False)
        self.linear = nn.Linear(FEATURES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, level: Level) -> Tensor:
        """u [B] float32 at levels of tensors [B]."""
        log_sigma = (level.sigma.float() / level.alpha.float()).log().clamp(-MAX_LOG_SIGMA, MAX_LOG_SIGMA)
        features = (log_sigma[:, None] / 4 * self.frequencies + self.phases).cos()
        return self.linear(features)[:, 0]


class LearnedUncertainty:
    """LogVariance with its own AdamW; its gradients are averaged over the processes.

    Args:
        accelerator: of the run.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.head = accelerator, LogVariance().to(accelerator.device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), weight_decay=0.0)

    def weighted(self, losses: Tensor, level: Level) -> Tensor:
        """L / exp(u) + u for losses L [B]."""
        u = self.head(level)
        return losses / u.exp() + u

    def step(self, lr: float, skip: bool) -> None:
        """Apply the gradients, unless the step is skipped.

        Args:
            lr: learning rate.
            skip: whether the network's step is skipped.
        """
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        for p in self.head.parameters():
            p.grad = self.accelerator.reduce(p.grad / scale, "mean")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not skip and all(bool(p.grad.isfinite().all()) for p in self.head.parameters()):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict:
        """Its numbers as lists, for state.json: a float32 is exact there."""
        rows = []
        for p in self.head.parameters():
            state = self.optimizer.state.get(p, {})
            moments = [state[name].flatten().tolist() if state else [] for name in ("exp_avg", "exp_avg_sq")]
            rows.append([p.detach().flatten().tolist(), *moments, float(state["step"]) if state else 0.0])
        return {"uncertainty": rows}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned, if the state has it."""
        for p, (values, average, square, step) in zip(self.head.parameters(), state.get("uncertainty", [])):
            p.copy_(torch.tensor(values).reshape(p.shape))
            if average:
                moments = {"exp_avg": average, "exp_avg_sq": square}
                tensors = {name: torch.tensor(v).reshape(p.shape).to(p) for name, v in moments.items()}
                self.optimizer.state[p] = {"step": torch.tensor(step), **tensors}
