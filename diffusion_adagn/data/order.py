"""Randomness as a function of position: what a run draws for its p-th sample depends on (seed, p) alone.

Nothing of it is saved in a checkpoint, and a process can draw for exactly its own samples: the same data, noise and
drops are seen on 1, 2 or 8 processes and after every resume.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: Sequence, key: tuple[int, int]) -> tuple:
    """Philox4x32-10, a counter-based generator: four 32-bit words for each counter of four words.

    Words are int64 tensors or uint64 arrays holding 0..2^32-1, of shapes that broadcast together (the first two rounds are
    almost free where they are not yet of the full shape). Source: Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3"; checked against the known answers of its Random123 library.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products wrap, which keeps all their bits
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ (c1 ^ k0), b & _MASK, ((a >> 32) & _MASK) ^ (c3 ^ k1), a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


# what the draws are for; a stream each
STREAMS = {
    name: i for i, name in enumerate(("order", "noise", "timestep", "label_drop", "flip", "heldout", "wrong_label"))
}


def _philox(seed: int, *counter: Tensor) -> list[Tensor]:
    """philox under the run's seed; int64 tensors in and out. On the CPU NumPy does it, twice as fast as torch does."""
    key = (seed & _MASK, (seed >> 32) & _MASK)
    if counter[0].device.type != "cpu":
        return list(philox(counter, key))
    words = philox([c.numpy().view(np.uint64) for c in counter], key)
    return [torch.from_numpy(w.view(np.int64)) for w in words]


def words(seed: int, stream: str, positions: Tensor, count: int) -> Tensor:
    """count 32-bit words for each position: int64 [B, 4 * ceil(count / 4)], on positions' device."""
    blocks = torch.arange(math.ceil(count / 4), device=positions.device)
    low, high = positions[:, None] & _MASK, (positions[:, None] >> 32) & _MASK
    return torch.stack(_philox(seed, blocks, low, high, torch.full_like(low[:1], STREAMS[stream])), dim=-1).flatten(1)


def uniforms(seed: int, streams: Sequence[str], positions: Tensor) -> Tensor:
    """One number in [0, 1) a stream and position, float64 [S, B]: `uniform` of several streams at the cost of one."""
    zero = torch.zeros_like(positions[:1])
    which = torch.tensor([[STREAMS[s]] for s in streams], device=positions.device)
    return _philox(seed, zero, positions & _MASK, (positions >> 32) & _MASK, which)[0].double() / 2**32


def uniform(seed: int, stream: str, positions: Tensor) -> Tensor:
    """One number in [0, 1) a position, float64 [B]."""
    return uniforms(seed, (stream,), positions)[0]


def normal(seed: int, stream: str, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32 [B, *shape], by Box & Muller's transform of pairs of words."""
    size = math.prod(shape)
    both = words(seed, stream, positions, 2 * math.ceil(size / 2)).double().add_(0.5).div_(2**32)
    # in place: new memory for every intermediate took longer than the arithmetic
    radius, angle = both.unflatten(1, (2, -1)).unbind(1)
    radius.log_().mul_(-2).sqrt_()
    sine = angle.mul_(2 * math.pi).sin().mul_(radius)
    radius.mul_(angle.cos_())  # the first half of `both` is done; the angles' half takes the sines
    angle.copy_(sine)
    return both[:, :size].float().reshape(len(positions), *shape)


class SampleOrder:
    """Which sample stands at a position: position p is epoch p // n, place p % n of that epoch's permutation of 0..n-1."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, positions: Tensor) -> Tensor:
        """positions [B] int64 -> sample indices [B] int64. A batch may span epochs."""
        epochs, places = positions // self.n, positions % self.n
        indices = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            mine = epochs == epoch
            indices[mine] = self._permutation(epoch)[places[mine]]
        return indices

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            # word i of counter (i, epoch): n places, two words each to make ties rare; stable where they happen
            rest = [torch.tensor([word]) for word in (epoch, 0, STREAMS["order"])]
            high, low, *_ = _philox(self.seed, torch.arange(self.n), *rest)
            self._epochs[epoch] = torch.argsort((high << 31) | (low >> 1), stable=True)
        return self._epochs[epoch]
