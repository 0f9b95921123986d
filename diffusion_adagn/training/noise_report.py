"""Which noise levels training should visit: a suggestion from the held-out loss."""

import math
from collections.abc import Callable

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data import ImageDataset
from ..data.rng import normal
from ..diffusion.loss import normalize_images
from ..diffusion.process import Level, Process, edm
from ..models.unet import AdaGNUNet

LEVELS, IMAGES = 24, 64
RANGE = (math.log(0.002), math.log(80.0))  # of ln sigma


def suggest_noise(loss_by_level: np.ndarray, log_sigma: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of ln sigma under the weight max(0, 1 - L).

    L is the mean squared error of EDM's F, whose target has variance 1: where L is 1 nothing can be learned, since x
    says nothing about F, and where it is small much is.

    Args:
        loss_by_level: L, [N].
        log_sigma: evenly spaced, [N].
    """
    weight = np.maximum(0, 1 - loss_by_level)
    if not weight.any():
        return math.nan, math.nan
    mean = np.average(log_sigma, weights=weight)
    return float(mean), float(np.average((log_sigma - mean) ** 2, weights=weight) ** 0.5)


@torch.no_grad()
def loss_by_level(
    unet: AdaGNUNet, dataset: ImageDataset, process: Process, sigma_data: float, autocast: Callable, max_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """The held-out loss of EDM's F over the noise level, whatever the process.

    Args:
        unet: the network.
        dataset: held-out images; IMAGES of them are used.
        process: what the network predicts.
        sigma_data: standard deviation of the images.
        autocast: makes the context of the network's calls.
        max_rows: images per call.

    Returns:
        L and ln sigma, float64 [LEVELS] each.
    """
    log_sigma, device = np.linspace(*RANGE, LEVELS), unet.device
    pixels, labels = dataset.gather(dataset.evenly_spread(IMAGES))
    n = len(labels)
    x0 = normalize_images(torch.from_numpy(pixels)).to(device)
    y = torch.from_numpy(labels).to(device) if unet.config.num_classes else None
    noise = normal(0, "heldout", torch.arange(n), tuple(x0.shape[1:])).to(device)
    table, losses = edm(sigma_data), []
    for log in tqdm(log_sigma, desc="held-out loss by noise level", unit="level", leave=False):
        s = torch.full((n,), math.exp(log), dtype=torch.float64)
        level, scale = process.level(process.time_at(s)).to(device), table.at(math.exp(log)).out
        total = 0.0
        for rows in torch.arange(n).split(max_rows):
            here = Level(*(value[rows.to(device)] for value in level))
            x = process.add_noise(x0[rows], noise[rows], here)
            with autocast():
                output = unet(x, here.time, None if y is None else y[rows]).sample[:, : x.shape[1]]
            error = process.to_x0(output.float(), x, here) - x0[rows]
            total += (error / scale).square().flatten(1).mean(1).sum().item()
        losses.append(total / n)
    return np.array(losses), log_sigma
