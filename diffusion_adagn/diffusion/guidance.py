"""Classifier-free guidance. Scale 1 means none: pred = null + scale * (cond - null); w of the paper is scale - 1."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import InputError


def guidance_scales(scale: float | Sequence[float], count: int) -> Tensor:
    """One scale a picture, float32 [count]. Raises InputError unless there is one, or one for each; finite and >= 0."""
    if hasattr(scale, "reshape"):  # arrays and tensors
        scale = scale.reshape(-1).tolist()
    scales = [float(s) for s in scale] if isinstance(scale, Iterable) else [float(scale)]
    if len(scales) not in (1, count):
        raise InputError(f"{len(scales)} guidance scales were given for {count} pictures: give one, or one for each.")
    for s in scales:
        if not math.isfinite(s) or s < 0:
            raise InputError(f"a guidance scale is a number of at least 0 (1 means no guidance), not {s}.")
    return torch.tensor(scales * (count if len(scales) == 1 else 1))


def guide(cond: Tensor, null: Tensor, scales: Tensor) -> Tensor:
    """null + scale * (cond - null), each picture at its own scale; all channels. cond, null [B, C, H, W], scales [B].

    torch.lerp gives exactly cond at scale 1.  Source: Ho & Salimans 2022, equation 6.
    """
    return torch.lerp(null, cond, scales.to(cond)[:, None, None, None])
