"""Conditioning kinds: what a site is told, and how it applies it to the feature map.

A kind is a normalisation layer of one site. `Told` names what modulation(t, y) hands it, each [B, channels];
`forward(h, told)` applies it. A new kind is one class and one line in KINDS.
"""

from typing import NamedTuple

from torch import Tensor, nn


class AdaGN(nn.GroupNorm):
    """Adaptive group normalisation:  h <- GroupNorm(h) * (1 + gamma) + beta.

    Source: Dhariwal & Nichol 2021 (arXiv 2105.05233), section 3, equation 3 and `use_scale_shift_norm`.
    The norm keeps its own weight w and bias b, so the gain a channel meets is w (1 + gamma), the shift b (1 + gamma) + beta.
    """

    class Told(NamedTuple):
        """gamma, beta: [B, channels]."""

        gamma: Tensor
        beta: Tensor

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__(groups, channels, eps)

    def forward(self, h: Tensor, told: "AdaGN.Told") -> Tensor:
        """h [B, channels, H, W] -> the same shape."""
        return super().forward(h) * (1 + told.gamma[..., None, None]) + told.beta[..., None, None]


KINDS: dict[str, type[nn.Module]] = {"adagn": AdaGN}
