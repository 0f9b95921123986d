"""GroupNorm followed by modulation and SiLU."""

from torch import Tensor, nn

from ..ops import adagn_silu


class Norm(nn.GroupNorm):
    """silu(GroupNorm(h) * (1 + gamma) + beta), each part except the norm optional.

    operator: "auto", "fused" or "eager", see `ops.adagn_silu`; `AdaGNUNet.set_operator` sets it everywhere.
    """

    operator = "auto"

    def forward(self, h: Tensor, apply_act: bool = False) -> Tensor:
        """h [B, channels, H, W] -> the same shape, type and layout."""
        return self.modulate(h, None, None, apply_act)

    def modulate(self, h: Tensor, gamma: Tensor | None, beta: Tensor | None, apply_act: bool) -> Tensor:
        """gamma, beta: [B or 1, channels], or None for 0."""
        return adagn_silu(h, gamma, beta, self.num_groups, self.eps, self.weight, self.bias, apply_act, self.operator)
