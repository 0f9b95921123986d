"""The kernel distance between two sets of features, in float64, in blocks: no array of size [N, M] is allocated."""

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .measured import BLOCK_IMAGES, MetricValue, blocks, checked, same_extractor


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3 of every pair, float64 (Binkowski et al. 2018, section 4)."""
    base = (x.double() @ y.double().T).div_(x.shape[1]).add_(1)
    return base.square().mul_(base)


class KernelReference:
    """Reference features [M, D] for `kid`.

    Their M^2 kernel values are computed at the first call; the means are cached.
    """

    def __init__(self, features: np.ndarray, device: str = "cpu", block: int = BLOCK_IMAGES):
        self.features = torch.from_numpy(checked(features, "the reference")).to(device)
        self.block, self._own = block, None

    def own(self, progress: bool = False) -> Tensor:
        """The mean kernel value of each image with the others, float64 [M]."""
        if self._own is None:
            self._own = _own(self.features, self.block, progress)
        return self._own


def _own(x: Tensor, block: int, progress: bool) -> Tensor:
    """The mean kernel value of each image with the others, float64 [N]. Each pair is computed once."""
    sums, parts = torch.zeros(len(x), dtype=torch.float64, device=x.device), list(blocks(len(x), block))
    pairs = [(a, b) for i, a in enumerate(parts) for b in parts[i:]]
    for a, b in tqdm(pairs, desc="kernels", unit="block", leave=False, disable=not progress):
        kernel = _kernel(x[a], x[b])
        if a == b:
            kernel.fill_diagonal_(0)
        else:
            sums[b] += kernel.sum(0)
        sums[a] += kernel.sum(1)
    return sums / (len(x) - 1)


def _mutual(x: Tensor, y: Tensor, block: int, progress: bool) -> Tensor:
    """The mean kernel value of each image of x with all of y, float64 [N]."""
    of_x = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    pairs = [(a, b) for a in blocks(len(x), block) for b in blocks(len(y), block)]
    for a, b in tqdm(pairs, desc="kernels with the reference", unit="block", leave=False, disable=not progress):
        of_x[a] += _kernel(x[a], y[b]).sum(1)
    return of_x / len(y)


def kid(
    x: np.ndarray,
    y: np.ndarray | KernelReference,
    device: str = "cpu",
    block: int = BLOCK_IMAGES,
    progress: bool = False,
) -> MetricValue:
    """Unbiased MMD^2 with the kernel (x.y / D + 1)^3 over all pairs of images and reference. It may be negative.

    If both distributions are equal, the first-order term vanishes. The true spread is then of order 1 / N, and larger
    than the standard error. Source: Binkowski et al. 2018; Gretton et al. 2012, equation 3.

    Args:
        x: [N, D], N >= 2.
        y: [M, D], M >= 2; or a `KernelReference`, if the same reference is used several times. Its device is then
            used.
        device: The device that computes it.
        block: Images per block.
        progress: Show a progress bar.
    """
    y = y if isinstance(y, KernelReference) else KernelReference(y, device, block)
    x = torch.from_numpy(checked(x)).to(y.features.device)
    n, m = len(x), len(y.features)
    same_extractor(x.shape[1], y.features.shape[1])
    if min(n, m) < 2:
        return MetricValue.unavailable(f"{n:,} sampled and {m:,} reference images: a kernel distance needs two of each")
    own_x, own_y = _own(x, block, progress), y.own(progress)
    x_to_y = _mutual(x, y.features, block, progress)
    value = own_x.mean() + own_y.mean() - 2 * x_to_y.mean()
    return MetricValue.of(value.item(), (2 * (own_x - x_to_y)).cpu().numpy())
