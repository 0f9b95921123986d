"""How much a network uses its label: its loss on held-out pictures told the true class, a wrong one, or none.

An untrained net already answers differently to different labels; only a loss that is lower for the true label says that
the label is used.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import ImageDataset
from ..data.order import normal, uniform
from ..diffusion.objective import Objective, to_unit
from ..models.unet import AdaGNUNet

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class LabelUse:
    """Losses (simple, [N], float64) of the same x_t under each label, and what they were measured at.

    t: [N] timesteps of 0..num_timesteps-1. picture: [N], which held-out picture. true: told its class; wrong: told one drawn from
    the other K - 1 (None for K = 1); null: told the null label (None without one).
    """

    num_timesteps: int
    t: Tensor
    picture: Tensor
    true: Tensor
    wrong: Tensor | None
    null: Tensor | None

    def gap(self, against: Literal["wrong", "null"], low: float = 0.0, high: float = 1.0) -> tuple[float, float] | None:
        """Mean of loss(against) - loss(true) over low <= t / T < high, and the half-width of its 95% interval.

        Paired: same picture, timestep and noise. The interval is over pictures, whose own mean counts once. None where there
        is no such label; nan for an interval over fewer than two pictures.
        """
        other = getattr(self, against)
        if other is None:
            return None
        inside = (self.t >= low * self.num_timesteps) & (self.t < high * self.num_timesteps)
        pictures, place = self.picture[inside].unique(return_inverse=True)
        sums = torch.zeros(len(pictures), dtype=torch.float64).index_add_(0, place, (other - self.true)[inside])
        means = sums / torch.bincount(place)
        half = 1.96 * means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
        return means.mean().item(), half


@torch.no_grad()
def label_use(
    unet: AdaGNUNet,
    dataset: ImageDataset,
    objective: Objective,
    evaluations: int = 2048,
    batch_size: int = 128,
    autocast: Callable = nullcontext,
    progress: bool = False,
) -> LabelUse:
    """Measure it on about that many (picture, timestep, noise); each is shared by the three labels.

    dataset: held-out pictures, of which that many at most are taken, evenly spread. The draws depend on nothing but the data set,
    so two networks meet the same ones: noise and wrong labels of seed 0, and in each round over the pictures the timesteps
    evenly spread over 0..T-1, otherwise paired in each round.
    """
    device, n, k = unet.device, min(len(dataset), evaluations), unet.config.num_classes
    rounds = max(1, round(evaluations / n))
    positions = torch.arange(n * rounds)
    picture = positions % n * len(dataset) // n
    spread = (positions % n / n + positions // n * GOLDEN) % 1
    t = (spread * objective.num_timesteps).long()
    null = k if unet.config.null_class else None
    losses = {"true": [], "wrong": [], "null": []}
    batches = positions.split(batch_size)
    for places in tqdm(batches, desc="label use", unit="batch", disable=not progress, leave=False):
        pixels, labels = dataset.gather(picture[places].numpy())
        x0, true = to_unit(torch.from_numpy(pixels)), torch.from_numpy(labels)
        noise = normal(0, "heldout", places, tuple(x0.shape[1:]))
        told = {"true": true}
        if k > 1:
            told["wrong"] = (true + 1 + (uniform(0, "wrong_label", places) * (k - 1)).long()) % k
        if null is not None:
            told["null"] = torch.full_like(true, null)
        x0, noise, at = x0.to(device), noise.to(device), t[places].to(device)
        x_t = objective.noisy(x0, noise, at)
        many = len(told)
        with autocast():
            output = unet(x_t.repeat(many, 1, 1, 1), at.repeat(many), torch.cat(list(told.values())).to(device)).sample
        for label, answer in zip(told, output.chunk(many)):
            losses[label].append(objective.simple(answer, x0, noise, at).double().cpu())
    joined = {label: torch.cat(parts) if parts else None for label, parts in losses.items()}
    return LabelUse(objective.num_timesteps, t, picture, **joined)
