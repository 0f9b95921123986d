"""The process: how an image becomes noise, and what the network predicts. A table of numbers by noise level.

At a noise level the network receives x = alpha x0 + sigma eps and a time; its output F means x0 = skip x + out F.

    ddpm   alpha^2 + sigma^2 = 1 by a schedule of T timesteps; F is eps, x0 or v (Salimans & Ho 2022); time t
    edm    alpha = 1 / sqrt(s^2 + sigma_data^2), sigma = s alpha (Karras et al. 2022, table 1); time ln(s) / 4
    flow   alpha = 1 - t, sigma = t, F = eps - x0 (Lipman et al. 2023; Liu et al. 2023); time 1000 t

s = sigma / alpha, the noise level, is the same quantity in all three.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # of sampling: Karras et al. 2022, table 1
FLOW_TIMES = 1000.0  # what the embedding is made for
COSINE_OFFSET = 0.008  # of the cosine schedule, Nichol & Dhariwal 2021, equation 17
EDM_NOISE, FLOW_NOISE = (-1.2, 1.2), (0.0, 1.0)  # mean and standard deviation of ln sigma


class Level(NamedTuple):
    """Noise levels: the numbers of the table, each a float or a tensor [B].

    Attributes:
        time: what the network receives.
        alpha: of x = alpha x0 + sigma eps.
        sigma: of x = alpha x0 + sigma eps.
        skip: of x0 = skip x + out F.
        out: of x0 = skip x + out F.
    """

    time: Tensor | float
    alpha: Tensor | float
    sigma: Tensor | float
    skip: Tensor | float
    out: Tensor | float

    def to(self, device: torch.device) -> "Level":
        """The level in float32 on a device, in one copy."""
        return Level(*torch.stack([value.float() for value in self]).to(device))

    def repeat(self, count: int) -> "Level":
        """The levels [B], `count` times one after another."""
        return Level(*(value.repeat(count) for value in self))

    def item(self) -> "Level":
        """The numbers of a single level."""
        return Level(*(value.item() for value in self))


@dataclass(frozen=True, eq=False)
class Process:
    """How an image becomes noise, and what the network predicts. Make one with `ddpm`, `edm` or `flow`.

    Attributes:
        name: "ddpm", "edm" or "flow".
        prediction: what F is: "eps", "x0", "v", "edm" or "velocity".
        level: time [B] (of ddpm also between timesteps) -> Level of tensors [B].
        time_at: noise level s [B] > 0 -> time [B], float64.
        quantile: u [B] in [0, 1] -> the time below which a fraction u of the training noise lies, float64.
        share: time [B] -> 0 (image) to 1 (noise), float64.
        times: smallest and largest time of sampling.
        continuous: whether every time in between is trained.
        sigma_data: standard deviation of the images, under edm.
        alphas_cumprod: [T], under ddpm.
    """

    name: str
    prediction: str
    level: Callable[[Tensor], Level]
    time_at: Callable[[Tensor], Tensor]
    quantile: Callable[[Tensor], Tensor]
    share: Callable[[Tensor], Tensor]
    times: tuple[float, float]
    continuous: bool = True
    sigma_data: float = 1.0
    alphas_cumprod: Tensor | None = None

    def draw(self, u: Tensor, cell: float) -> tuple[Level, Tensor]:
        """Training noise: u says how much of it lies below.

        Args:
            u: the left ends of cells, [B] in [0, 1), float64. Continuous noise is taken at the cells' middles, since at
                u = 0 there would be none.
            cell: width of the cells.

        Returns:
            The levels, and u where the noise is continuous; t / T for uniform timesteps.
        """
        if self.continuous:
            u = (u + cell / 2) % 1
            return self.level(self.quantile(u)), u
        time = self.quantile(u)
        return self.level(time), self.share(time)

    def same_levels(self, other: "Process") -> bool:
        """Whether both have the same network input and time at each noise level; the prediction may differ."""
        ours, theirs = self.alphas_cumprod, other.alphas_cumprod
        if ours is None or theirs is None:
            return (self.name, self.sigma_data) == (other.name, other.sigma_data)
        return ours.shape == theirs.shape and torch.allclose(ours.cpu(), theirs.cpu(), atol=1e-5)

    def time_of(self, sigma: float) -> float:
        """The time at the noise level sigma / alpha = `sigma`."""
        return self.time_at(torch.tensor([sigma], dtype=torch.float64)).item()

    def at(self, sigma: float) -> Level:
        """The numbers at the noise level sigma / alpha = `sigma`."""
        return self.level(torch.tensor([self.time_of(sigma)], dtype=torch.float64)).item()

    def add_noise(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """x [B, C, H, W] from x0 in [-1, 1] and noise, both [B, C, H, W]."""
        return wide(level.alpha) * x0 + wide(level.sigma) * noise

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """F for which x0 = skip x + out F, [B, C, H, W]: without the cancellation of (x0 - skip x) / out."""
        if self.prediction in ("eps", "x0"):
            return noise if self.prediction == "eps" else x0
        alpha, sigma = wide(level.alpha), wide(level.sigma)
        if self.prediction == "v":
            return alpha * noise - sigma * x0
        if self.prediction == "edm":
            return sigma / self.sigma_data * x0 - alpha * self.sigma_data * noise
        return noise - x0

    def to_x0(self, prediction: Tensor, x: Tensor, level: Level) -> Tensor:
        """x0 [B, C, H, W], not clipped, from the network's output at x."""
        if self.prediction == "eps":
            return (x - wide(level.sigma) * prediction) / wide(level.alpha)
        return prediction if self.prediction == "x0" else wide(level.skip) * x + wide(level.out) * prediction

    def from_x0(self, x0: Tensor, x: Tensor, level: Level) -> Tensor:
        """The network's output that means x0 at x: the inverse of `to_x0` (sigma > 0)."""
        if self.prediction == "eps":
            return (x - wide(level.alpha) * x0) / wide(level.sigma)
        return x0 if self.prediction == "x0" else (x0 - wide(level.skip) * x) / wide(level.out)


def ddpm(alphas_cumprod: Tensor, prediction: str, noise: tuple[float, float] | None = None) -> Process:
    """The discrete process of Ho et al. 2020.

    Args:
        alphas_cumprod: [T], decreasing.
        prediction: "eps", "x0" or "v".
        noise: mean and standard deviation of ln sigma in training, which takes the nearest timestep. None: each timestep
            is drawn equally often.
    """
    bar = alphas_cumprod.cpu().double()
    alpha, sigma = bar.sqrt().float(), (1 - bar).sqrt().float()
    total, logs = len(bar), ((1 - bar) / bar).log() / 2

    def level(time: Tensor) -> Level:
        if not time.is_floating_point() or bool((time == time.round()).all()):
            t = time.long()
            return ddpm_level(time, alpha[t], sigma[t], prediction)
        low = time.long().clamp(0, total - 2)
        ratio = torch.lerp(logs[low], logs[low + 1], time.double() - low).exp()
        between = (1 + ratio**2).rsqrt()
        return ddpm_level(time, between, ratio * between, prediction)

    def time_at(ratio: Tensor) -> Tensor:
        value = ratio.double().log()
        low = (torch.searchsorted(logs, value) - 1).clamp(0, total - 2)
        return (low + (value - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, total - 1)

    def quantile(u: Tensor) -> Tensor:
        if noise is None:
            return (u * total).long()
        return time_at((noise[0] + noise[1] * torch.special.ndtri(u)).exp()).round().long()

    def share(time: Tensor) -> Tensor:
        return time.double() / total

    ends = (0.0, float(total - 1))
    return Process("ddpm", prediction, level, time_at, quantile, share, ends, noise is not None, 1.0, alphas_cumprod)


def ddpm_level(time: Tensor | float, alpha: Tensor | float, sigma: Tensor | float, prediction: str) -> Level:
    """The row of ddpm's table: skip and out by the prediction."""
    if prediction == "v":
        return Level(time, alpha, sigma, alpha, -sigma)
    if prediction == "x0":
        return Level(time, alpha, sigma, alpha * 0, alpha * 0 + 1)
    return Level(time, alpha, sigma, 1 / alpha, -sigma / alpha)


def edm(sigma_data: float, sigmas: Callable[[Tensor], Tensor] | None = None) -> Process:
    """The process of Karras et al. 2022: sigma = s times the noise, with their preconditioning.

    Args:
        sigma_data: standard deviation of the images in [-1, 1].
        sigmas: u [B] -> noise level s [B] of the training noise, increasing. None: ln s ~ N(-1.2, 1.2).
    """
    sigmas = sigmas or noise_levels("log_normal", *EDM_NOISE)
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)

    def level(time: Tensor) -> Level:
        s = (4 * time.double()).exp()
        alpha = (s**2 + sigma_data**2).rsqrt()
        return Level(time, alpha, s * alpha, sigma_data**2 * alpha, sigma_data * s * alpha)

    def time_at(s: Tensor) -> Tensor:
        return s.double().log() / 4

    def share(time: Tensor) -> Tensor:
        return (((4 * time.double() / RHO).exp() - low) / (high - low)).clamp(0, 1)

    ends = (math.log(SIGMA_MIN) / 4, math.log(SIGMA_MAX) / 4)
    return Process("edm", "edm", level, time_at, lambda u: time_at(sigmas(u)), share, ends, sigma_data=sigma_data)


def flow(sigmas: Callable[[Tensor], Tensor] | None = None) -> Process:
    """Flow matching along straight lines from image (t = 0) to noise (t = 1).

    Args:
        sigmas: u [B] -> noise level t / (1 - t) [B] of the training noise, increasing. None: logit t ~ N(0, 1).
    """
    sigmas = sigmas or noise_levels("log_normal", *FLOW_NOISE)

    def level(time: Tensor) -> Level:
        t = time.double() / FLOW_TIMES
        return Level(time, 1 - t, t, torch.ones_like(t), -t)

    def time_at(s: Tensor) -> Tensor:
        return FLOW_TIMES / (1 + 1 / s.double())

    def share(time: Tensor) -> Tensor:
        return time.double() / FLOW_TIMES

    ends = (FLOW_TIMES * SIGMA_MIN / (1 + SIGMA_MIN), FLOW_TIMES)
    return Process("flow", "velocity", level, time_at, lambda u: time_at(sigmas(u)), share, ends)


def noise_levels(noise: str, mean: float, std: float) -> Callable[[Tensor], Tensor]:
    """The inverse distribution function of the noise level in training: u [B] -> s [B], float64.

    uniform: t = s / (1 + s) is uniform. log_normal: ln s = logit t ~ N(mean, std). cosine: as under the cosine schedule
    with uniform timesteps.
    """
    if noise == "uniform":
        return lambda u: u.double() / (1 - u.double())
    if noise == "cosine":
        angle = lambda u: math.pi / 2 * (u + COSINE_OFFSET) / (1 + COSINE_OFFSET)  # noqa: E731
        return lambda u: ((math.cos(angle(0)) / angle(u.double()).cos()) ** 2 - 1).sqrt()
    return lambda u: (mean + std * torch.special.ndtri(u.double())).exp()


def wide(value: Tensor | float) -> Tensor | float:
    """[B] -> [B, 1, 1, 1]; a number as it is."""
    return value[:, None, None, None] if isinstance(value, Tensor) else value
