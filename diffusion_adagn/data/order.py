"""Randomness as a function of position: what a run draws for its p-th sample depends on (seed, p) alone.

Nothing of it is saved in a checkpoint, and a process can draw for exactly its own samples: the same data, noise and
drops are seen on 1, 2 or 8 processes and after every resume.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10, a counter-based generator: four 32-bit words for each counter of four words.

    Words are int64 tensors holding 0..2^32-1, of one shape. Source: Salmon et al. 2011, "Parallel random numbers: as easy
    as 1, 2, 3"; checked against the known answers of its Random123 library.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products wrap, which keeps all their bits
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


# what the draws are for; a stream each
STREAMS = {
    name: i for i, name in enumerate(("order", "noise", "timestep", "label_drop", "flip", "heldout", "wrong_label"))
}


def words(seed: int, stream: str, positions: Tensor, count: int) -> Tensor:
    """count 32-bit words for each position: int64 [B, 4 * ceil(count / 4)], on positions' device."""
    blocks = torch.arange(math.ceil(count / 4), device=positions.device)
    low, high = positions[:, None] & _MASK, (positions[:, None] >> 32) & _MASK
    counter = torch.broadcast_tensors(blocks, low, high, torch.full_like(low, STREAMS[stream]))
    return torch.stack(philox(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=-1).flatten(1)


def uniform(seed: int, stream: str, positions: Tensor) -> Tensor:
    """One number in [0, 1) a position, float64 [B]."""
    return words(seed, stream, positions, 1)[:, 0].double() / 2**32


def normal(seed: int, stream: str, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32 [B, *shape], by Box & Muller's transform of pairs of words."""
    size = math.prod(shape)
    u, v = (
        (words(seed, stream, positions, 2 * math.ceil(size / 2)).double() + 0.5)
        .div(2**32)
        .unflatten(1, (2, -1))
        .unbind(1)
    )
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
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
            places = torch.arange(self.n)
            counter = torch.broadcast_tensors(
                places, torch.tensor(epoch), torch.tensor(0), torch.tensor(STREAMS["order"])
            )
            high, low, *_ = philox(counter, (self.seed & _MASK, (self.seed >> 32) & _MASK))
            self._epochs[epoch] = torch.argsort((high << 31) | (low >> 1), stable=True)
        return self._epochs[epoch]
