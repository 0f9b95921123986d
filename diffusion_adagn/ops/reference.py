"""The formula of the fused operator in plain PyTorch: what the kernels are checked against, and what runs without them."""

import torch
from torch import Tensor
from torch.nn import functional as F


def adagn_silu_reference(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """`adagn_silu` in plain PyTorch. Half types are normalised in float32: in channels_last the CPU is slow at bfloat16."""
    wide = _accum_dtype(x)
    # weight and bias are applied separately if only one is given, or if they are trained and x is not: torch's backward
    # needs all or none, and kills the process otherwise
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias))
    separate = (weight is None) != (bias is None) or (trained and not x.requires_grad)
    affine = (None, None) if separate else (_to(weight, wide), _to(bias, wide))
    # not F.group_norm, which rejects groups of one value
    h = torch.group_norm(x.to(wide), groups, *affine, eps, torch.backends.cudnn.enabled)
    if separate and weight is not None:
        h = h * _broadcast(weight[None].to(wide), h)
    if separate and bias is not None:
        h = h + _broadcast(bias[None].to(wide), h)
    if gamma is not None:
        h = h * (1 + _broadcast(gamma.to(wide), h))
    if beta is not None:
        h = h + _broadcast(beta.to(wide), h)
    return (F.silu(h) if silu else h).to(x.dtype)


def _accum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _to(own: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if own is None else own.to(dtype)


def _broadcast(rows: Tensor, h: Tensor) -> Tensor:
    """[B, C] -> [B, C, 1, ...], to meet a feature map."""
    return rows.reshape(*rows.shape, *[1] * (h.ndim - 2))
