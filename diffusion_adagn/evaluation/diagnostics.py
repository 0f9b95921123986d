"""Effects of guidance that need no extractor: size of the guidance term, clipping, colour and contrast."""

import numpy as np
import torch
from torch import Tensor

from ..diffusion.schedule import ModelEval

VALUES = ("brightness", "contrast", "saturation", "extremes")


def image_values(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, C] -> float64 [N, 4], each in 0..1, as in VALUES.

    brightness: mean of all values. contrast: standard deviation over the pixels of the channels' mean. saturation: mean over
    the pixels of the largest channel less the smallest (0 for gray). extremes: share of values at 0 or 255.
    """
    x = pixels.astype(np.float64) / 255
    gray = x.mean(axis=3)
    extremes = ((pixels == 0) | (pixels == 255)).mean(axis=(1, 2, 3))
    columns = (x.mean(axis=(1, 2, 3)), gray.std(axis=(1, 2)), np.ptp(x, axis=3).mean(axis=(1, 2)), extremes)
    return np.stack(columns, axis=1)


class GuidanceMeter:
    """A `SamplingCallback` that sums over images, a number a network call: sums of several batches may be added.

    difference: float64 [calls], the rms over an image's values of cond - against, in the units of the prediction; 0 where there
    is no second pass. clipped: float64 [calls], the share of x0's values beyond [-1, 1].
    """

    def __init__(self, calls: int):
        self.difference, self.clipped = np.zeros(calls), np.zeros(calls)

    def on_guidance(self, call: ModelEval, cond: Tensor, uncond: Tensor) -> None:
        pull = (cond - uncond).float().square().flatten(1).mean(1).sqrt()
        self.difference[call.index] += pull.cpu().double().sum().item()

    def on_pred_x0(self, call: ModelEval, x0: Tensor) -> None:
        beyond = (x0.abs() > 1).flatten(1).to(torch.float32).mean(1)
        self.clipped[call.index] += beyond.cpu().double().sum().item()


def compared_with_data(values: np.ndarray, reference: np.ndarray) -> dict[str, float | None]:
    """Means of `image_values` against those of the data: float64 [4] each.

    contrast_ratio, saturation_ratio: 1 is the data's; None where the data have none. brightness_shift, extremes_shift: differences.
    """

    def ratio(column: int) -> float | None:
        return float(values[column] / reference[column]) if reference[column] > 1e-6 else None

    return {
        "contrast_ratio": ratio(1),
        "saturation_ratio": ratio(2),
        "brightness_shift": float(values[0] - reference[0]),
        "extremes_shift": float(values[3] - reference[3]),
    }
