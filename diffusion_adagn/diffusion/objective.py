"""What the network learns: noisy pictures, targets, loss weights; and predictions turned into x0 and back.

x_t = alpha_t x0 + sigma_t eps, alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alphas_cumprod[t]).
"""

import torch
from torch import Tensor

from ..errors import InputError


def to_x0(prediction: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, kind: str) -> Tensor:
    """The x0 that a prediction means. kind: "eps" | "x0" | "v" (v = alpha eps - sigma x0; Salimans & Ho 2022, appendix D)."""
    if kind == "eps":
        return (x_t - sigma * prediction) / alpha
    return prediction if kind == "x0" else alpha * x_t - sigma * prediction


def from_x0(x0: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, kind: str) -> Tensor:
    """The prediction that means this x0: the inverse of `to_x0` (sigma > 0)."""
    if kind == "eps":
        return (x_t - alpha * x0) / sigma
    return x0 if kind == "x0" else (alpha * x_t - x0) / sigma


class Objective:
    """The training target and the loss of one sample.

    alphas_cumprod: [T], the scheduler's own. prediction: "eps" | "x0" | "v". loss_weight: "uniform" | "min_snr".
    """

    def __init__(
        self, alphas_cumprod: Tensor, prediction: str, loss_weight: str = "uniform", min_snr_gamma: float = 5.0
    ):
        abar = alphas_cumprod.double()
        if prediction == "eps" and abar[-1] == 0:
            raise InputError("eps-prediction cannot be trained on a zero-SNR schedule: use prediction v or x0.")
        if loss_weight == "min_snr" and abar[-1] == 0:
            raise InputError(
                "min_snr would weight the last timestep of a zero-SNR schedule with 0: use loss_weight uniform."
            )
        self.prediction = prediction
        self.num_timesteps = len(abar)
        self.alpha, self.sigma = abar.sqrt().float(), (1 - abar).sqrt().float()
        self.weight = _min_snr(abar, prediction, min_snr_gamma).float() if loss_weight == "min_snr" else None

    def to(self, device: torch.device) -> "Objective":
        self.alpha, self.sigma = self.alpha.to(device), self.sigma.to(device)
        self.weight = None if self.weight is None else self.weight.to(device)
        return self

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t. x0 in [-1, 1] and noise [B, C, H, W], t [B] int."""
        return _at(self.alpha, t) * x0 + _at(self.sigma, t) * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should answer at x_t, [B, C, H, W]."""
        if self.prediction == "eps":
            return noise
        return x0 if self.prediction == "x0" else _at(self.alpha, t) * noise - _at(self.sigma, t) * x0

    def loss(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Weighted mean squared error of each sample, float32 [B]."""
        loss = (prediction.float() - target.float()).square().flatten(1).mean(1)
        return loss if self.weight is None else loss * self.weight[t]


def _min_snr(abar: Tensor, prediction: str, gamma: float) -> Tensor:
    """min(SNR, gamma) in units of the x0 loss, divided by what the prediction already weighs (Hang et al. 2023, section 3.4)."""
    snr = abar / (1 - abar)
    return snr.clamp(max=gamma) / {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[prediction]


def _at(values: Tensor, t: Tensor) -> Tensor:
    return values[t][:, None, None, None]
