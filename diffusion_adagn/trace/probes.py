"""Causal probes: edit the modulation of some sites, and measure how far the network's output moves.

edited = swap(m, other, names)  # the modulation m, with the named sites taken from `other`
influence = probe(unet, objective, x0, labels, times, "swap")
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.rng import normal, uniform
from ..diffusion.loss import DiffusionLoss
from ..diffusion.process import Level, Process
from ..errors import InputError
from ..models.unet import AdaGNUNet, Modulation, frozen
from ..runtime.distributed import to_float64
from .levels import NoiseLevels

Intervention = Literal["swap", "null", "zero", "freeze"]
INTERVENTIONS = {
    "swap": "given another class",
    "null": "given the null label",
    "zero": "given zeros",
    "freeze": "given the modulation of the middle noise level",
}


def swap(m: Modulation, other: Modulation, names: Collection[str]) -> Modulation:
    """`m`, with the sites in `names` taken from `other`."""
    return {name: other[name] if name in names else params for name, params in m.items()}


def zero(m: Modulation) -> Modulation:
    """Zeros for every site: gamma = beta = 0 and the like."""
    return {name: type(params)(*(torch.zeros_like(part) for part in params)) for name, params in m.items()}


@dataclass(frozen=True)
class Influence:
    """How far the network's output moves when the modulation of a group of sites is changed.

    Args:
        intervention: What the sites receive instead.
        groups: Names of sites, or resolutions such as "8x8".
        levels: T noise levels.
        change: [groups, T], RMS change of the predicted x0 (pixels from -1 to 1) over images, channels and positions.
        all_sites: [T], the same when all sites are changed at once.
    """

    intervention: Intervention
    groups: list[str]
    levels: NoiseLevels
    change: np.ndarray
    all_sites: np.ndarray


def probe(
    unet: AdaGNUNet,
    objective: DiffusionLoss,
    x0: Tensor,
    labels: Tensor,
    timesteps: Sequence[float],
    intervention: Intervention,
    by: Literal["site", "resolution"] = "site",
    progress: bool = False,
) -> Influence:
    """Change the modulation of one group of sites after another. The noise is always the same, dropout is off.

    Args:
        unet: The network.
        objective: Its process.
        x0: Images [N, C, H, W] in [-1, 1], real or sampled.
        labels: Their classes, int [N].
        timesteps: Times of the process: 0..T-1 under ddpm, 1000 t under flow, ln(sigma) / 4 under edm.
        intervention: "swap": a class drawn from the other K - 1 (K > 1). "null": the null label.
            "zero": gamma = beta = 0. "freeze": the modulation at the middle one of the timesteps.
        by: Each site is a group, or all sites of one resolution.
        progress: Show a progress bar.

    Raises:
        InputError: For an unknown intervention, or one for which the network has no label.
    """
    if intervention not in INTERVENTIONS:
        raise InputError(f"an intervention is {', '.join(INTERVENTIONS)}, not {intervention!r}.")
    other = _other_labels(unet, labels, intervention)
    sites = unet.sites()
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(site.name if by == "site" else f"{site.resolution}x{site.resolution}", []).append(site.name)
    noise = normal(0, "heldout", torch.arange(len(x0)), tuple(x0.shape[1:])).to(x0)
    change, all_sites = np.zeros((len(groups), len(timesteps))), np.zeros(len(timesteps))
    middle, process = float(timesteps[len(timesteps) // 2]), objective.process
    with frozen(unet):
        for column, step in enumerate(tqdm(timesteps, desc=f"probe {intervention}", disable=not progress, leave=False)):
            level = process.level(torch.full((len(x0),), step)).to(x0.device)
            x_t, t = process.add_noise(x0, noise, level), level.time
            m = unet.modulation(t, labels)
            other_t = torch.full_like(t, middle) if intervention == "freeze" else t
            other_m = zero(m) if intervention == "zero" else unet.modulation(other_t, other)
            plain = _predict_x0(unet, process, x_t, m, level)
            for row, names in enumerate(groups.values()):
                change[row, column] = _rms(_predict_x0(unet, process, x_t, swap(m, other_m, names), level) - plain)
            all_sites[column] = _rms(_predict_x0(unet, process, x_t, other_m, level) - plain)
    return Influence(intervention, list(groups), NoiseLevels.of(process, timesteps), change, all_sites)


@dataclass(frozen=True)
class Sensitivity:
    """What the label changes in the output, by noise level: the class against null (without null: another class).

    Args:
        levels: T noise levels, increasing.
        x0: [T], RMS difference of the predicted x0 (pixels from -1 to 1).
        prediction: [T], RMS difference of the network's own prediction: the ||cond - null|| that guidance multiplies.
        against: "null" or "another class".
    """

    levels: NoiseLevels
    x0: np.ndarray
    prediction: np.ndarray
    against: str

    def band(self, fraction: float = 0.5) -> tuple[float, float] | None:
        """The noise levels (low, high) around the peak of the change of x0 where it is at least `fraction` of the peak.

        It is a *candidate* interval for guidance, which only a metric can confirm. None if x0 moves nowhere.
        """
        band = self.band_indices(fraction)
        return None if band is None else tuple(self.levels.sigmas[i] for i in band)

    def band_indices(self, fraction: float = 0.5) -> tuple[int, int] | None:
        """The first and the last index of `band`."""
        if not self.x0.any():
            return None
        low = high = int(self.x0.argmax())
        enough = self.x0 >= fraction * self.x0.max()
        while low > 0 and enough[low - 1]:
            low -= 1
        while high < len(enough) - 1 and enough[high + 1]:
            high += 1
        return low, high


def label_sensitivity(
    unet: AdaGNUNet, objective: DiffusionLoss, x0: Tensor, labels: Tensor, timesteps: Sequence[float]
) -> Sensitivity:
    """x0, labels, timesteps: as `probe` takes them."""
    against = "null" if unet.config.null_class else "another class"
    other = _other_labels(unet, labels, "null" if unet.config.null_class else "swap")
    noise = normal(0, "heldout", torch.arange(len(x0)), tuple(x0.shape[1:])).to(x0)
    process, x0_change, prediction_change = objective.process, [], []
    with frozen(unet):
        for step in timesteps:
            level = process.level(torch.full((len(x0),), step)).to(x0.device)
            x_t = process.add_noise(x0, noise, level)
            cond, null = (unet.denoise(x_t, unet.modulation(level.time, y))[:, : x0.shape[1]] for y in (labels, other))
            prediction_change.append(_rms(cond - null))
            x0_change.append(
                _rms(process.to_x0(cond, x_t, level).clamp(-1, 1) - process.to_x0(null, x_t, level).clamp(-1, 1))
            )
    return Sensitivity(NoiseLevels.of(process, timesteps), np.array(x0_change), np.array(prediction_change), against)


def _other_labels(unet: AdaGNUNet, labels: Tensor, intervention: Intervention) -> Tensor:
    k = unet.config.num_classes or 0
    lacking = {"null": "null label", "swap": "other class to swap to"}
    if (intervention == "null" and not (k and unet.config.null_class)) or (intervention == "swap" and k < 2):
        others = ", ".join(i for i in INTERVENTIONS if i != intervention)
        raise InputError(f"this network has no {lacking[intervention]}: probe with one of {others}.")
    if intervention == "null":
        return torch.full_like(labels, k)
    if intervention == "swap":
        draw = uniform(0, "wrong_label", torch.arange(len(labels))) * (k - 1)
        return (labels + 1 + draw.long().to(labels)) % k
    return labels


def _predict_x0(unet: AdaGNUNet, process: Process, x_t: Tensor, m: Modulation, level: Level) -> Tensor:
    return process.to_x0(unet.denoise(x_t, m)[:, : x_t.shape[1]], x_t, level).clamp(-1, 1)


def _rms(difference: Tensor) -> float:
    return to_float64(difference).square().mean().sqrt().item()
