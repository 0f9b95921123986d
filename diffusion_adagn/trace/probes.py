"""Causal probes: tell a part of the network something else, and see how far its answer moves.

changed = swap(m, other, names)  # two modulations joined: the sites named are told the other
influence = probe(unet, objective, x0, labels, timesteps, "swap")
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.rng import normal, uniform
from ..diffusion.loss import DiffusionLoss
from ..errors import InputError
from ..models.unet import AdaGNUNet, Modulation
from ..runtime.distributed import to_float64

Intervention = Literal["swap", "null", "zero", "freeze"]
INTERVENTIONS = {
    "swap": "told another class",
    "null": "told the null label",
    "zero": "told zeros",
    "freeze": "told the middle of the timesteps, whatever t is",
}


def swap(m: Modulation, other: Modulation, names: Collection[str]) -> Modulation:
    """`m`, with the sites in `names` told what `other` says."""
    return {name: other[name] if name in names else told for name, told in m.items()}


def zero(m: Modulation) -> Modulation:
    """Every site told zeros: gamma = beta = 0 and the like."""
    return {name: type(told)(*(torch.zeros_like(part) for part in told)) for name, told in m.items()}


@dataclass(frozen=True)
class Influence:
    """How far the network's answer moves when a group of sites is told something else, at each timestep.

    change: [groups, T] RMS change of the predicted x0 (pixels run from -1 to 1), over pictures, channels and positions.
    whole: [T], the same when every site is.
    """

    intervention: Intervention
    groups: list[str]
    timesteps: list[int]
    change: np.ndarray
    whole: np.ndarray


@contextmanager
def _still(unet: AdaGNUNet) -> Iterator[None]:
    """Without dropout and without gradients."""
    training = unet.training
    unet.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        unet.train(training)


def probe(
    unet: AdaGNUNet,
    objective: DiffusionLoss,
    x0: Tensor,
    labels: Tensor,
    timesteps: Sequence[int],
    intervention: Intervention,
    by: Literal["site", "resolution"] = "site",
    progress: bool = False,
) -> Influence:
    """Intervene at one group of sites after another.

    x0: pictures [N, C, H, W] in [-1, 1], real or sampled; labels: [N] int, their classes. timesteps: where to look, whole, t >= 0.
    swap: to a class drawn from the other K - 1 (K > 1); null: to the null label; zero: gamma = beta = 0; freeze: to what is told
    at the middle timestep of the grid. The noise is always the same, dropout is off.
    Raises InputError for an intervention the network has no label for.
    """
    if intervention not in INTERVENTIONS:
        raise InputError(f"an intervention is {', '.join(INTERVENTIONS)}, not {intervention!r}.")
    other = _other_labels(unet, labels, intervention)
    sites = unet.sites()
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(site.name if by == "site" else f"{site.resolution}x{site.resolution}", []).append(site.name)
    noise = normal(0, "heldout", torch.arange(len(x0)), tuple(x0.shape[1:])).to(x0)
    change, whole = np.zeros((len(groups), len(timesteps))), np.zeros(len(timesteps))
    middle = float(timesteps[len(timesteps) // 2])
    with _still(unet):
        for column, at in enumerate(tqdm(timesteps, desc=f"probe {intervention}", disable=not progress, leave=False)):
            t = torch.full((len(x0),), int(at), device=x0.device)
            x_t = objective.add_noise(x0, noise, t)
            told = unet.modulation(t.float(), labels)
            then = torch.full_like(t, middle, dtype=torch.float32) if intervention == "freeze" else t.float()
            instead = zero(told) if intervention == "zero" else unet.modulation(then, other)
            answer = _x0(unet, objective, x_t, told, t)
            for row, names in enumerate(groups.values()):
                change[row, column] = _rms(_x0(unet, objective, x_t, swap(told, instead, names), t) - answer)
            whole[column] = _rms(_x0(unet, objective, x_t, instead, t) - answer)
    return Influence(intervention, list(groups), [int(t) for t in timesteps], change, whole)


@dataclass(frozen=True)
class Sensitivity:
    """What the label changes in the answer, over t: told the class against told null (or another class without null).

    x0: [T] RMS difference of the predicted x0 (pixels run from -1 to 1). prediction: [T] of the network's own prediction, the
    ||cond - null|| that guidance multiplies, RMS. against: "null" or "another class".
    """

    timesteps: list[int]
    x0: np.ndarray
    prediction: np.ndarray
    against: str

    def band(self, share: float = 0.5) -> tuple[int, int] | None:
        """The timesteps (low, high) around where the x0 moves most, while it moves by at least that share of it: a *candidate*
        interval for guidance, which only a metric can confirm. None where it moves nowhere."""
        if not self.x0.any():
            return None
        low = high = int(self.x0.argmax())
        enough = self.x0 >= share * self.x0.max()
        while low > 0 and enough[low - 1]:
            low -= 1
        while high < len(enough) - 1 and enough[high + 1]:
            high += 1
        return tuple(sorted((self.timesteps[low], self.timesteps[high])))


def label_sensitivity(
    unet: AdaGNUNet, objective: DiffusionLoss, x0: Tensor, labels: Tensor, timesteps: Sequence[int]
) -> Sensitivity:
    """x0, labels, timesteps: as `probe` takes them."""
    against = "null" if unet.config.null_class else "another class"
    other = _other_labels(unet, labels, "null" if unet.config.null_class else "swap")
    noise = normal(0, "heldout", torch.arange(len(x0)), tuple(x0.shape[1:])).to(x0)
    of_x0, of_prediction = [], []
    with _still(unet):
        for at in timesteps:
            t = torch.full((len(x0),), int(at), device=x0.device)
            x_t = objective.add_noise(x0, noise, t)
            cond, null = (unet.denoise(x_t, unet.modulation(t.float(), y))[:, : x0.shape[1]] for y in (labels, other))
            of_prediction.append(_rms(cond - null))
            of_x0.append(_rms(objective.x0(cond, x_t, t).clamp(-1, 1) - objective.x0(null, x_t, t).clamp(-1, 1)))
    return Sensitivity([int(t) for t in timesteps], np.array(of_x0), np.array(of_prediction), against)


def _other_labels(unet: AdaGNUNet, labels: Tensor, intervention: Intervention) -> Tensor:
    k = unet.config.num_classes or 0
    if intervention == "null":
        if not k or not unet.config.null_class:
            raise InputError("this network has no null label to be told: probe with swap, zero or freeze.")
        return torch.full_like(labels, k)
    if intervention == "swap":
        if k < 2:
            raise InputError("there is no other class to swap to: probe with null, zero or freeze.")
        draw = uniform(0, "wrong_label", torch.arange(len(labels))) * (k - 1)
        return (labels + 1 + draw.long().to(labels)) % k
    return labels


def _x0(unet: AdaGNUNet, objective: DiffusionLoss, x_t: Tensor, m: Modulation, t: Tensor) -> Tensor:
    return objective.x0(unet.denoise(x_t, m)[:, : x_t.shape[1]], x_t, t).clamp(-1, 1)


def _rms(difference: Tensor) -> float:
    return to_float64(difference).square().mean().sqrt().item()
