"""An exact denoiser: for images from a mixture of Gaussians, E[x0 | x] is known. It separates a wrong sampler from a weak network."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .ode_scheduler import OdeScheduler
from .schedule import model_evals, process_of


class GaussianMixture:
    """A mixture of isotropic Gaussians, with the posterior mean of x0 at x = alpha x0 + sigma eps.

    Args:
        means: [K, D].
        deviations: [K], standard deviations.
        weights: [K], of sum 1.
    """

    def __init__(self, means: Tensor, deviations: Tensor, weights: Tensor):
        self.means, self.deviations, self.weights = means.double(), deviations.double(), weights.double()

    def x0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x0 | x] for each row of x, [N, D] float64."""
        offset = x.double()[:, None] - alpha * self.means  # [N, K, D]
        variance = (alpha * self.deviations) ** 2 + sigma**2
        log = self.weights.log() - offset.square().sum(2) / (2 * variance) - x.shape[1] / 2 * variance.log()
        gain = alpha * self.deviations**2 / variance
        return (log.softmax(1)[..., None] * (self.means + gain[:, None] * offset)).sum(1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean [D] and the covariance [D, D]."""
        mean = self.weights @ self.means
        offset = self.means - mean
        spread = (self.weights * self.deviations**2).sum() * torch.eye(len(mean), dtype=torch.float64)
        return mean, spread + (self.weights[:, None] * offset).T @ offset


def two_classes() -> list[GaussianMixture]:
    """A mixture for each of two classes, of values in the plane mostly within [-1, 1]."""
    means = torch.tensor([[[-0.6, 0.1], [0.2, 0.6]], [[0.5, -0.5], [0.6, 0.4]]])
    deviations, weights = torch.tensor([[0.1, 0.25], [0.2, 0.05]]), torch.tensor([[0.4, 0.6], [0.7, 0.3]])
    return [GaussianMixture(*parts) for parts in zip(means, deviations, weights)]


def integrate(
    scheduler: OdeScheduler,
    x: Tensor,
    x0: Callable[[Tensor, float, float], Tensor],
    calls: int | None = None,
    **step: object,
) -> Tensor:
    """Run a scheduler, with its timesteps set, on an exact denoiser.

    Args:
        scheduler: of any process.
        x: the first sample [N, D], of the standard deviation that the scheduler starts from.
        x0: (network input [N, D], alpha, sigma) -> x0 [N, D].
        calls: stop after so many evaluations. None: all.
        step: arguments of the scheduler's step, such as generator.

    Returns:
        The sample [N, D].
    """
    process, image = process_of(scheduler), lambda rows: rows[:, :, None, None]
    for t, call in list(zip(scheduler.timesteps, model_evals(scheduler)))[:calls]:
        network_input = scheduler.scale_model_input(x, t)
        output = x0(network_input, call.level.alpha, call.level.sigma).to(x)
        if process.name != "ddpm":
            prediction = output
        else:
            prediction = process.from_x0(image(output), image(network_input), call.level)[:, :, 0, 0]
        x = scheduler.step(prediction, t, x, return_dict=False, **step)[0]
    return x


def order(errors: list[float], steps: list[int]) -> float:
    """The order of convergence between the first and the last of several numbers of steps."""
    return math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])
