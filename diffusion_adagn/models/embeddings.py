"""Timestep and class label -> the vectors that modulation is projected from."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

SCALE_TIMES = 1000.0  # the embedding of a guidance scale s is that of the timestep SCALE_TIMES / s


def sinusoidal_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos(t w_0) ... cos(t w_{h-1}), sin(t w_0) ... sin(t w_{h-1})], w_i = max_period^(-i/h), h = dim // 2.

    Source: Vaswani et al. 2017, section 3.5; cosines first as in DDPM's descendants (ADM).

    Args:
        timesteps: [B], whole or fractional, in 0..T-1 (not 0..1).
        dim: width; an odd one ends in a zero.
        max_period: of the slowest wave.

    Returns:
        float32 [B, dim].
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


class Condition(NamedTuple):
    """vector: [B, ConditionEmbedding.dim], the input of the projection for all sites. tokens: [B, n, token_dim], or None.

    With a class vector for each site, what comes from the class has an axis of sites after B.
    """

    vector: Tensor
    tokens: Tensor | None


class ConditionEmbedding(nn.Module):
    """time(t) = MLP(sinusoidal(t)) and class(y) = table[y], merged as the conditioning layer requires.

        class_input "vector", join "sum":     vector = time(t) + class(y)      (ADM; Dhariwal & Nichol 2021, section 3)
        class_input "vector", join "concat":  vector = [time(t), class(y)]
        class_input "tokens":                 vector = time(t), tokens = Linear(class(y)), cut into n
        class_input None:                  vector = time(t)

    The table has one row per class and, with a null class, one more (row K).

    With augment_dim, the timestep's vector also has how a training image was augmented:

        time(t, a) = MLP(sinusoidal(t) + W a)      (Karras et al. 2022, EDM, appendix F.2, in its version of ADM)

    W has no bias and starts at 0, so that a = 0, an image that is not augmented, is the same as no a.

    With reads_scale, the guidance scale s is added to the timestep's vector:

        time(t, s) = time(t) + W_s sinusoidal(1000 / s)      (Tang et al. 2025, arXiv 2501.15420, whose beta is 1 / s)

    W_s has no bias and starts at 0, so that the scale changes nothing at first.
    """

    def __init__(
        self,
        model_channels: int,
        num_classes: int | None,
        null_class: bool,
        join: Literal["sum", "concat"] = "sum",
        class_input: Literal["vector", "tokens"] | None = "vector",
        class_tokens: int = 4,
        augment_dim: int = 0,
        reads_scale: bool = False,
    ):
        super().__init__()
        self.model_channels = model_channels
        self.class_dim = 4 * model_channels
        self.time = nn.Sequential(
            nn.Linear(model_channels, self.class_dim), nn.SiLU(), nn.Linear(self.class_dim, self.class_dim)
        )
        has_classes = num_classes and class_input is not None
        self.classes = nn.Embedding(num_classes + int(null_class), self.class_dim) if has_classes else None
        self.join = join if has_classes and class_input == "vector" else None
        self.dim = self.class_dim * (2 if self.join == "concat" else 1)
        self.token_dim = model_channels
        self.tokens = (
            nn.Linear(self.class_dim, class_tokens * self.token_dim)
            if has_classes and class_input == "tokens"
            else None
        )
        self.augment = None
        if augment_dim:
            with torch.random.fork_rng(devices=[]):  # the other layers start the same with and without augmentation
                self.augment = nn.Linear(augment_dim, model_channels, bias=False)
            nn.init.zeros_(self.augment.weight)
        self.scale = None
        if reads_scale:
            with torch.random.fork_rng(devices=[]):  # as for augment
                self.scale = nn.Linear(model_channels, self.class_dim, bias=False)
            nn.init.zeros_(self.scale.weight)

    def class_vectors(self, class_labels: Tensor) -> Tensor:
        """Labels int [B], or weights float [B, K or rows] over the table's rows (soft and mixed labels) -> [B, class_dim]."""
        if not class_labels.is_floating_point():
            return self.classes(class_labels)
        table = self.classes.weight[: class_labels.shape[1]]
        return class_labels.to(table.dtype) @ table

    def scale_vectors(self, scales: Tensor) -> Tensor:
        """Guidance scales [B] -> what they add to the timesteps' vectors, [B, class_dim]."""
        return self.scale(sinusoidal_embedding(SCALE_TIMES / scales, self.model_channels).to(self.scale.weight.dtype))

    def forward(
        self, timesteps: Tensor, classes: Tensor | None, augment: Tensor | None = None, scales: Tensor | None = None
    ) -> Condition:
        """timesteps [B]; classes: class vectors [B, class_dim] or [B, sites, class_dim], or None where no class is used; augment:
        [B, augment_dim], or None for zeros; scales: guidance scales [B], None for a network that does not read them. Each may
        have 1 row."""
        time = sinusoidal_embedding(timesteps, self.model_channels).to(self.time[0].weight.dtype)
        if augment is not None:
            time = time + self.augment(augment)
        vector, tokens = self.time(time), None
        if scales is not None:
            vector = vector + self.scale_vectors(scales)
        if self.join is not None and classes.ndim == 3:
            vector = vector[:, None].expand(-1, classes.shape[1], -1)
        if self.join == "sum":
            vector = vector + classes
        elif self.join == "concat":
            vector = torch.cat([vector, classes.expand(vector.shape)], dim=-1)
        elif self.tokens is not None:
            tokens = self.tokens(classes).unflatten(-1, (-1, self.token_dim))
        return Condition(vector, tokens)
