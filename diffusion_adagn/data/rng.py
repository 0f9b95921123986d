"""Counter-based random numbers: what a run draws for its p-th sample depends on (seed, p) only.

A checkpoint needs no random state, and each process draws for exactly its own samples. So the data, noise and dropped
labels are the same on 1, 2 or 8 processes and after every resume.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: Sequence, key: tuple[int, int]) -> tuple:
    """Philox4x32-10, a counter-based generator: four 32-bit words for each counter of four words.

    Words are int64 tensors or uint64 arrays with values 0..2^32-1. Their shapes are broadcast; the first two rounds are
    cheap while the shapes are smaller than the result. Source: Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3". Tested against the known answers of its Random123 library.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products wrap around and lose no bits
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ (c1 ^ k0), b & _MASK, ((a >> 32) & _MASK) ^ (c3 ^ k1), a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


# one stream per purpose; new ones are appended, since recorded runs use these numbers
STREAMS = {
    name: i
    for i, name in enumerate(
        (
            "order",
            "noise",
            "timestep",
            "label_drop",
            "flip",
            "heldout",
            "wrong_label",
            "balance",
            "balance_order",
            "augment",
            "augment_normal",
            "zero_shot",
            "guidance",
        )
    )
}


def _philox(seed: int, *counter: Tensor) -> list[Tensor]:
    """`philox` with the run's seed, on int64 tensors.

    On the CPU it uses NumPy, which is twice as fast as torch here.
    """
    key = (seed & _MASK, (seed >> 32) & _MASK)
    if counter[0].device.type != "cpu":
        return list(philox(counter, key))
    words = philox([c.numpy().view(np.uint64) for c in counter], key)
    return [torch.from_numpy(w.view(np.int64)) for w in words]


def words(seed: int, stream: str, positions: Tensor, count: int) -> Tensor:
    """At least `count` 32-bit words for each position: int64 [B, 4 * ceil(count / 4)], on the positions' device."""
    blocks = torch.arange(math.ceil(count / 4), device=positions.device)
    low, high = positions[:, None] & _MASK, (positions[:, None] >> 32) & _MASK
    return torch.stack(_philox(seed, blocks, low, high, torch.full_like(low[:1], STREAMS[stream])), dim=-1).flatten(1)


def uniforms(seed: int, streams: Sequence[str], positions: Tensor) -> Tensor:
    """One number in [0, 1) per stream and position, float64 [S, B]. Several streams cost as much as one."""
    zero = torch.zeros_like(positions[:1])
    stream_ids = torch.tensor([[STREAMS[s]] for s in streams], device=positions.device)
    return _philox(seed, zero, positions & _MASK, (positions >> 32) & _MASK, stream_ids)[0].double() / 2**32


def uniform(seed: int, stream: str, positions: Tensor) -> Tensor:
    """One number in [0, 1) per position, float64 [B]."""
    return uniforms(seed, (stream,), positions)[0]


def normal(seed: int, stream: str, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32 [B, *shape], by the Box-Muller transform of pairs of words."""
    size = math.prod(shape)
    values = words(seed, stream, positions, 2 * math.ceil(size / 2)).double().add_(0.5).div_(2**32)
    # in place: allocating every intermediate took longer than the arithmetic
    radius, angle = values.unflatten(1, (2, -1)).unbind(1)
    radius.log_().mul_(-2).sqrt_()
    sine = angle.mul_(2 * math.pi).sin().mul_(radius)
    radius.mul_(angle.cos_())  # the first half of `values` is done; the sines replace the angles
    angle.copy_(sine)
    return values[:, :size].float().reshape(len(positions), *shape)


class SampleOrder:
    """The sample at each position: position p is place p % n in the permutation of 0..n-1 of epoch p // n.

    Args:
        n: The number of samples.
        seed: The seed of the run.
    """

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, positions: Tensor) -> Tensor:
        """positions [B] int64 -> sample indices [B] int64. A batch may span epochs."""
        epochs, places = positions // self.n, positions % self.n
        indices = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            mask = epochs == epoch
            indices[mask] = self._permutation(epoch)[places[mask]]
        return indices

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = _permutation(self.n, self.seed, epoch, 0, "order")
        return self._epochs[epoch]


def _permutation(n: int, seed: int, number: int, group: int, stream: str) -> Tensor:
    """A permutation of 0..n-1, int64 [n]: the `number`-th of a group (a class, or 0)."""
    # place i sorts by two words of counter (i, number, group), which makes ties rare; the sort is stable for ties
    rest = [torch.tensor([word]) for word in (number, group, STREAMS[stream])]
    high, low, *_ = _philox(seed, torch.arange(n), *rest)
    return torch.argsort((high << 31) | (low >> 1), stable=True)


class BalancedOrder:
    """The sample at each position if classes are drawn equally often (`data.balance`).

    Position p draws one of the K classes uniformly, then the next image of that class. The m-th draw of a class with
    n_c images is place m % n_c of the class's permutation m // n_c. The result depends on (seed, p) only: the draws of
    each class before a block of positions are counted once, from the start of the run.

    Args:
        labels: int64 [N], 0..K-1. Every class has an image.
        seed: The seed of the run.
    """

    BLOCK = 2**16  # positions whose draws are counted together; a multiple of 4

    def __init__(self, labels: np.ndarray, seed: int):
        labels = torch.from_numpy(np.asarray(labels))
        self.seed, self.sizes = seed, torch.bincount(labels)
        self._members = torch.argsort(labels, stable=True).split(self.sizes.tolist())
        self._before = {0: torch.zeros_like(self.sizes)}  # block -> draws of each class before it
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}
        self._orders: dict[
            int, tuple[int, np.ndarray]
        ] = {}  # class -> (number of the permutation, its images in that order)

    def __call__(self, positions: Tensor) -> Tensor:
        """positions [B] int64 -> sample indices [B] int64."""
        indices = torch.empty_like(positions)
        for block in (positions // self.BLOCK).unique().tolist():
            mask = positions // self.BLOCK == block
            classes, ranks = (values[positions[mask] % self.BLOCK] for values in self._block(block))
            indices[mask] = torch.tensor([self._image(*pair) for pair in zip(classes.tolist(), ranks.tolist())])
        return indices

    def _classes(self, block: int) -> Tensor:
        """The class drawn at each position of a block, int64 [BLOCK]: position p uses word p % 4 of counter p // 4."""
        counters = torch.arange(block * self.BLOCK // 4, (block + 1) * self.BLOCK // 4)
        return words(self.seed, "balance", counters, 4).flatten() * len(self.sizes) >> 32

    def _block(self, block: int) -> tuple[Tensor, Tensor]:
        """The class at each position of a block, and the number of earlier draws of that class; int64 [BLOCK] each."""
        if block not in self._blocks:
            while len(self._blocks) > 1:
                self._blocks.pop(min(self._blocks))
            nearest = max(b for b in self._before if b <= block)
            before = self._before[nearest]
            for earlier in range(nearest, block):
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
