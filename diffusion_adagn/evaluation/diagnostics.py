"""Effects of guidance that need no extractor: size of the guidance term, clipping, colour and contrast."""

import numpy as np
import torch
from torch import Tensor

from ..diffusion.schedule import ModelEval

VALUES = ("brightness", "contrast", "saturation", "extremes")


def image_values(pixels: np.ndarray) -> np.ndarray:
    """Statistics of each image: uint8 [N, H, W, C] -> float64 [N, 4], each in 0..1, in the order of VALUES.

    brightness: the mean of all values. contrast: the standard deviation of the channel mean over the pixels.
    saturation: the mean over the pixels of the largest minus the smallest channel (0 for gray). extremes: the
    fraction of values at 0 or 255.
    """
    x = pixels.astype(np.float64) / 255
    gray = x.mean(axis=3)
    extremes = ((pixels == 0) | (pixels == 255)).mean(axis=(1, 2, 3))
    columns = (x.mean(axis=(1, 2, 3)), gray.std(axis=(1, 2)), np.ptp(x, axis=3).mean(axis=(1, 2)), extremes)
    return np.stack(columns, axis=1)


class GuidanceMeter:
    """A `SamplingCallback` that accumulates two diagnostics for each network call, summed over images.

    Attributes:
        difference: float64 [calls], the RMS of cond - uncond over an image's values, in the units of the prediction;
            0 for calls without a second forward pass.
        clipped: float64 [calls], the fraction of the values of x0 outside [-1, 1].
    """

    def __init__(self, calls: int):
        self.difference, self.clipped = np.zeros(calls), np.zeros(calls)

    def on_guidance(self, call: ModelEval, cond: Tensor, uncond: Tensor) -> None:
        difference = (cond - uncond).float().square().flatten(1).mean(1).sqrt()
        self.difference[call.index] += difference.cpu().double().sum().item()

    def on_pred_x0(self, call: ModelEval, x0: Tensor) -> None:
        outside = (x0.abs() > 1).flatten(1).to(torch.float32).mean(1)
        self.clipped[call.index] += outside.cpu().double().sum().item()


def compared_with_data(values: np.ndarray, reference: np.ndarray) -> dict[str, float | None]:
    """Compare the means of `image_values` of sampled and real images, float64 [4] each.

    Returns:
        contrast_ratio and saturation_ratio: sampled / real, None if the real value is 0. brightness_shift and
        extremes_shift: sampled - real.
    """

    def ratio(column: int) -> float | None:
        return float(values[column] / reference[column]) if reference[column] > 1e-6 else None

    return {
        "contrast_ratio": ratio(1),
        "saturation_ratio": ratio(2),
        "brightness_shift": float(values[0] - reference[0]),
        "extremes_shift": float(values[3] - reference[3]),
    }
