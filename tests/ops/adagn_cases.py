"""The operator by its formula, written out in float64, and inputs to try it on."""

import torch
from torch import Tensor

# [B, C, H, W], groups, mean of x: usual widths, one group, one channel a group, odd sizes, a mean far off
CASES = [
    ((2, 64, 8, 8), 32, 0.0),
    ((3, 24, 7, 5), 4, 100.0),
    ((1, 96, 16, 16), 32, 3.0),
    ((5, 13, 3, 3), 1, 0.0),
    ((2, 12, 5, 5), 12, 0.0),
    ((2, 8, 1, 1), 2, 0.0),
    ((1, 64, 33, 31), 8, 1.0),
]


def inputs(
    shape: tuple[int, ...], mean: float, dtype: torch.dtype, last: bool, rows: int, seed: int = 0
) -> list[Tensor]:
    """x, gamma, beta, weight, bias and the gradient that comes back."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    layout = torch.channels_last if last else torch.contiguous_format
    c = shape[1]
    x = (torch.randn(shape, generator=g) + mean).to(dtype).contiguous(memory_format=layout)
    gamma, beta = torch.randn(rows, c, generator=g), torch.randn(rows, c, generator=g)
    weight, bias = 1 + 0.1 * torch.randn(c, generator=g), torch.randn(c, generator=g)
    dy = torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=layout)
    return [x, gamma, beta, weight, bias, dy]


def slow(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """Equation 2 of Wu & He 2018 for every group of every image, then equation 3 of Dhariwal & Nichol 2021."""
    d = x.shape[1] // groups
    gamma, beta = gamma.expand(len(x), -1), beta.expand(len(x), -1)
    rows = []
    for n in range(len(x)):
        planes = []
        for c in range(x.shape[1]):
            group = x[n, c // d * d : c // d * d + d]
            spread = ((group - group.mean()) ** 2).mean()
            h = (x[n, c] - group.mean()) / (spread + eps).sqrt() * weight[c] + bias[c]
            h = h * (1 + gamma[n, c]) + beta[n, c]
            planes.append(h / (1 + torch.exp(-h)) if silu else h)
        rows.append(torch.stack(planes))
    return torch.stack(rows)


def apart(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, the norms over all numbers."""
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
