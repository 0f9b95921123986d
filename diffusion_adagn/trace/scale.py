"""What the guidance scale changes in the modulation of a network that reads it, site by site."""

import numpy as np
import torch

from ..models.unet import AdaGNUNet

MAX_CLASSES = 256  # with more, evenly spread ones
NUM_SCALES = 3


def shown_scales(unet: AdaGNUNet) -> np.ndarray:
    """Evenly spread scales above 1, the largest last, float64 [NUM_SCALES]; [0] for a network that reads none."""
    largest = unet.config.max_guidance_scale
    return np.empty(0) if largest is None else np.linspace(1, largest, NUM_SCALES + 1)[1:]


@torch.no_grad()
def scale_changes(unet: AdaGNUNet, times: np.ndarray, scales: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """How far the modulation at a scale is from that at scale 1: the RMS over classes and channels.

    Args:
        unet: A network that reads the guidance scale.
        times: What it receives, [T].
        scales: [S].

    Returns:
        By site and field, float64 [S, T]. The null label is excluded: it was trained at scale 1 only.
    """
    k = unet.config.num_classes
    labels = torch.arange(0, k, -(-k // MAX_CLASSES), device=unet.device)
    changes: dict[str, dict[str, np.ndarray]] = {}
    for column, time in enumerate(torch.as_tensor(times, dtype=torch.float32, device=unet.device)):
        unguided = unet.modulation(time, labels)
        for row, scale in enumerate(scales):
            guided = unet.modulation(time, labels, guidance_scale=float(scale))
            for site in (site.name for site in unet.sites()):
                params = guided[site]
                for field, values in params._asdict().items():
                    change = (values - getattr(unguided[site], field)).float().square().mean().sqrt().item()
                    table = changes.setdefault(site, {}).setdefault(field, np.zeros((len(scales), len(times))))
                    table[row, column] = change
    return changes
