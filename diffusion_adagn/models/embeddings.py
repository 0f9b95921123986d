"""Timestep and class label -> one vector a sample."""

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos(t w_0) ... cos(t w_{h-1}), sin(t w_0) ... sin(t w_{h-1})], w_i = max_period^(-i/h), h = dim // 2.

    Args: timesteps [B], whole or fractional, in 0..T-1 (not 0..1). Returns float32 [B, dim]; an odd dim ends in a zero.
    Source: Vaswani et al. 2017, section 3.5; cosines first as in DDPM's descendants (ADM).
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


class ConditionEmbedding(nn.Module):
    """emb(t, y) = MLP(sinusoidal(t)) + table[y]: ADM's sum of time and class (Dhariwal & Nichol 2021, section 3).

    The table has a row for each of the K classes and, with a null class, one more (row K).
    """

    def __init__(self, model_channels: int, num_classes: int | None, null_class: bool):
        super().__init__()
        self.model_channels = model_channels
        self.dim = 4 * model_channels
        self.time = nn.Sequential(nn.Linear(model_channels, self.dim), nn.SiLU(), nn.Linear(self.dim, self.dim))
        self.classes = nn.Embedding(num_classes + int(null_class), self.dim) if num_classes else None

    def forward(self, timesteps: Tensor, class_labels: Tensor | None) -> Tensor:
        """timesteps [B], class_labels [B] int or None -> [B, 4 * model_channels]."""
        time = sinusoidal_embedding(timesteps, self.model_channels).to(self.time[0].weight.dtype)
        embedding = self.time(time)
        return embedding if self.classes is None else embedding + self.classes(class_labels)
