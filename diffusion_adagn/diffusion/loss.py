"""The loss of training, and its weights."""

import math

import torch
from torch import Tensor

from ..errors import InputError
from .process import Level, Process


def normalize_images(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, C] in 0..255 -> float32 [B, C, H, W] in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


class DiffusionLoss:
    """The loss of each sample: the mean squared error of the network's own output F.

    Its weight `uniform` is that of Karras et al. 2022 under edm, and that of flow matching under flow.

    With a learned variance (2C output channels) the loss is the hybrid one of Nichol & Dhariwal 2021 (arXiv 2102.09672),
    equation 16 and section 3.1, with the gradient to the mean stopped in L_vlb:

        L = L_simple + vlb_weight * T * L_vlb(t)      for the single t that was drawn

    Args:
        process: what is predicted.
        loss_weight: "uniform" | "min_snr" (Hang et al. 2023).
        min_snr_gamma: gamma of min_snr.
        vlb_weight: None, or the weight of the variational bound (0.001 in the paper).

    Raises:
        InputError: the schedule has zero terminal SNR, and the prediction is eps or the weight min_snr.
    """

    def __init__(
        self,
        process: Process,
        loss_weight: str = "uniform",
        min_snr_gamma: float = 5.0,
        vlb_weight: float | None = None,
    ):
        abar = None if process.alphas_cumprod is None else process.alphas_cumprod.double()
        zero_snr = abar is not None and abar[-1] == 0
        if zero_snr and (process.prediction == "eps" or loss_weight == "min_snr"):
            raise InputError(
                "a zero-SNR schedule cannot be trained with eps-prediction, nor with loss_weight min_snr, which gives its last timestep "
                "weight 0: use prediction v or x0, and loss_weight uniform."
            )
        self.process = process
        self.weight = _min_snr(abar, process.prediction, min_snr_gamma).float() if loss_weight == "min_snr" else None
        self.vlb_weight = vlb_weight
        self.posterior = Posterior(abar) if vlb_weight is not None else None

    def to(self, device: torch.device) -> "DiffusionLoss":
        self.weight = None if self.weight is None else self.weight.to(device)
        self.posterior = None if self.posterior is None else self.posterior.to(device)
        return self

    def loss(self, output: Tensor, x0: Tensor, noise: Tensor, level: Level, target: Tensor | None = None) -> Tensor:
        """The loss of each sample, float32 [B].

        Args:
            output: of the network at `process.add_noise(x0, noise, level)`, [B, C or 2C, H, W].
            x0: images in [-1, 1], [B, C, H, W].
            noise: [B, C, H, W].
            level: of tensors [B].
            target: of the mean squared error, [B, C, H, W]. None: that of x0 and noise.
        """
        loss = self.mse(output, x0, noise, level, target)
        if self.vlb_weight is None:
            return loss
        weight = self.vlb_weight * len(self.process.alphas_cumprod)
        return loss + weight * self.vlb(output, x0, noise, level)

    def mse(self, output: Tensor, x0: Tensor, noise: Tensor, level: Level, target: Tensor | None = None) -> Tensor:
        """Weighted mean squared error of each sample, float32 [B]: of the first C output channels. See `loss`."""
        target = self.process.target(x0, noise, level) if target is None else target
        error = output[:, : x0.shape[1]].float() - target.float()
        loss = error.square().flatten(1).mean(1)
        return loss if self.weight is None else loss * self.weight[level.time.long()]

    def vlb(self, output: Tensor, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """The term of the variational bound at t, in bits per dimension, float32 [B]; without gradient to the mean."""
        mean, variance = output.float().chunk(2, dim=1)
        x_t = self.process.add_noise(x0, noise, level)
        predicted = self.process.to_x0(mean.detach(), x_t, level)
        return self.posterior.bits_per_dim(x0, x_t, predicted, variance, level.time.long())


class Posterior:
    """q(x_{t-1} | x_t, x0), the network's estimate of it with a learned variance, and the distance between the two.

    q has mean c0 x0 + c1 x_t and variance beta~_t (Ho et al. 2020, equations 6, 7). The network's variance is
    exp(v log beta_t + (1 - v) log beta~_t) with v = (output + 1) / 2 (Nichol & Dhariwal 2021, equation 15). At t = 0
    beta~_0 = 0 is replaced by beta~_1, as there.
    """

    def __init__(self, alphas_cumprod: Tensor):
        abar = alphas_cumprod.double()
        before = torch.cat([abar.new_ones(1), abar[:-1]])
        beta = 1 - abar / before
        tilde = beta * (1 - before) / (1 - abar)
        self.of_x0 = (before.sqrt() * beta / (1 - abar)).float()
        self.of_x_t = ((1 - beta).sqrt() * (1 - before) / (1 - abar)).float()
        self.log_beta = beta.log().float()
        self.log_tilde = torch.cat([tilde[1:2], tilde[1:]]).log().float()

    def to(self, device: torch.device) -> "Posterior":
        for name, values in vars(self).items():
            setattr(self, name, values.to(device))
        return self

    def bits_per_dim(self, x0: Tensor, x_t: Tensor, predicted_x0: Tensor, variance: Tensor, t: Tensor) -> Tensor:
        """Bits per dimension, [B]: for t > 0 KL(q || p), for t = 0 -log p(x0) of the 8-bit pixels (DDPM, section 3.3)."""
        low, high = _broadcast(self.log_tilde, t), _broadcast(self.log_beta, t)
        log_variance = low + (variance + 1) / 2 * (high - low)
        # the means differ by c0 times the difference in x0; computed this way, nothing cancels
        gap = _broadcast(self.of_x0, t) * (x0 - predicted_x0)
        kl = 0.5 * (log_variance - low + (low - log_variance).exp() + gap.square() * (-log_variance).exp() - 1)
        mean = _broadcast(self.of_x0, t) * predicted_x0 + _broadcast(self.of_x_t, t) * x_t
        nll = -_log_pixel_probability(x0, mean, log_variance)
        return torch.where((t == 0)[:, None, None, None], nll, kl).flatten(1).mean(1) / math.log(2)


def _log_pixel_probability(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the Gaussian's mass on the pixel value x in [-1, 1], of 256; the outermost bins extend to infinity."""
    half, scale = 1 / 255, (-0.5 * log_variance).exp()
    low = ((x - mean - half) * scale).masked_fill(x < -0.999, -math.inf)
    high = ((x - mean + half) * scale).masked_fill(x > 0.999, math.inf)
    right = low > 0  # differences in the right tail are computed in the left one, where floats are precise
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    return (torch.special.ndtr(high) - torch.special.ndtr(low)).clamp(min=1e-30).log()


def _min_snr(abar: Tensor, prediction: str, gamma: float) -> Tensor:
    """min(SNR, gamma) in units of the x0 loss, divided by the weight that the prediction type implies (Hang et al. 2023, section 3.4)."""
    snr = abar / (1 - abar)
    return snr.clamp(max=gamma) / {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[prediction]


def _broadcast(values: Tensor, t: Tensor) -> Tensor:
    """values [T] at t [B] -> [B, 1, 1, 1]."""
    return values[t][:, None, None, None]
