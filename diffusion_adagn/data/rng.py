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
    name: i
    for i, name in enumerate(
        ("order", "noise", "timestep", "label_drop", "flip", "heldout", "wrong_label", "balance", "balance_order")
    )
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
            self._epochs[epoch] = _permutation(self.n, self.seed, epoch, 0, "order")
        return self._epochs[epoch]


def _permutation(n: int, seed: int, number: int, of: int, stream: str) -> Tensor:
    """A permutation of 0..n-1, the `number`-th of `of`."""
    # word i of counter (i, number): n places, two words each to make ties rare; stable where they happen
    rest = [torch.tensor([word]) for word in (number, of, STREAMS[stream])]
    high, low, *_ = _philox(seed, torch.arange(n), *rest)
    return torch.argsort((high << 31) | (low >> 1), stable=True)


class BalancedOrder:
    """Which sample stands at a position when classes are drawn equally often (`data.balance`).

    Position p draws one of the K classes uniformly, then the next image of that class: its m-th draw in the run takes place
    m % n_c of the class's permutation m // n_c, n_c being its number of images. A function of (seed, p) alone: how many
    draws of a class stand before a block of positions is counted once, from the start of the run.

    Args:
        labels: int64 [N], 0..K-1. Each class has an image.
        seed: The run's.
    """

    BLOCK = 2**16  # positions whose draws are counted at a time; a multiple of 4

    def __init__(self, labels: np.ndarray, seed: int):
        labels = torch.from_numpy(np.asarray(labels))
        self.seed, self.sizes = seed, torch.bincount(labels)
        self._members = torch.argsort(labels, stable=True).split(self.sizes.tolist())
        self._before = {0: torch.zeros_like(self.sizes)}  # block -> draws of each class before it
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # class -> (number, its images in that permutation)

    def __call__(self, positions: Tensor) -> Tensor:
        """positions [B] int64 -> sample indices [B] int64."""
        indices = torch.empty_like(positions)
        for block in (positions // self.BLOCK).unique().tolist():
            mine = positions // self.BLOCK == block
            classes, ranks = (some[positions[mine] % self.BLOCK] for some in self._block(block))
            indices[mine] = torch.tensor([self._image(*pair) for pair in zip(classes.tolist(), ranks.tolist())])
        return indices

    def _classes(self, block: int) -> Tensor:
        """The class that each position of a block draws: position p has word p % 4 of counter p // 4."""
        at = torch.arange(block * self.BLOCK // 4, (block + 1) * self.BLOCK // 4)
        return words(self.seed, "balance", at, 4).flatten() * len(self.sizes) >> 32

    def _block(self, block: int) -> tuple[Tensor, Tensor]:
        """(class, how many draws of that class stand before) of each position of a block."""
        if block not in self._blocks:
            while len(self._blocks) > 1:
                self._blocks.pop(min(self._blocks))
            near = max(b for b in self._before if b <= block)
            before = self._before[near]
            for earlier in range(near, block):
                before = before + torch.bincount(self._classes(earlier), minlength=len(self.sizes))
            self._before = {0: self._before[0], block: before}
            classes = self._classes(block)
            grouped = torch.argsort(classes, stable=True)
            counts = torch.bincount(classes, minlength=len(self.sizes))
            ranks = torch.empty_like(classes)
            ranks[grouped] = torch.arange(self.BLOCK) - (counts.cumsum(0) - counts)[classes[grouped]]
            self._blocks[block] = classes, ranks + before[classes]
        return self._blocks[block]

    def _image(self, class_id: int, rank: int) -> int:
        members = self._members[class_id]
        number, place = divmod(rank, len(members))
        if self._orders.get(class_id, (None,))[0] != number:
            order = _permutation(len(members), self.seed, number, class_id, "balance_order")
            self._orders[class_id] = number, members[order].numpy()
        return int(self._orders[class_id][1][place])
