"""Batches prepared in advance where that hides their cost; the time spent waiting for them is measured."""

import time

from torch import Tensor

from .loader import Batch, BatchLoader


class Prefetcher:
    """`BatchLoader.batch`, with the time it takes. A prepared batch is identified by its positions, so it cannot be a wrong one.

    early: prepare the next batch while the device computes; None: on CUDA, where the host only queues kernels for it.
    A context: leaving it ends the threads.
    """

    def __init__(self, batches: BatchLoader, early: bool | None = None):
        self.batches = batches
        self.early = batches.device.type == "cuda" if early is None else early
        self.wait_seconds = 0.0  # seconds, in all
        self._prepared: tuple[Tensor, Batch] | None = None

    def batch(self, positions: Tensor) -> Batch:
        """positions [B] int64 on the CPU."""
        began = time.perf_counter()
        if self._prepared is not None and positions.equal(self._prepared[0]):
            batch, self._prepared = self._prepared[1], None
        else:
            batch = self.batches.batch(positions)
        self.wait_seconds += time.perf_counter() - began
        return batch

    def prefetch(self, *coming: Tensor) -> None:
        """To be called when the device has a pass to compute. coming: the positions of the next passes, soonest first."""
        if not self.early:
            return
        for positions in coming:
            self.batches.pixels.prefetch(self.batches.order(positions))
        # pixels that are still being gathered are awaited at their step; errors are raised then
        if coming and self.batches.pixels.ready(self.batches.order(coming[0])):
            self._prepared = coming[0], self.batches.batch(coming[0])

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_) -> None:
        self.batches.pixels.close()
