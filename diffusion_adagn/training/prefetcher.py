"""The batches of a run as its steps take them: made ahead where that hides their cost, and the waiting for them measured."""

import time

from torch import Tensor

from .loader import Batch, BatchLoader


class Prefetcher:
    """`BatchLoader.batch`, by the clock. What is made ahead is found by its positions, so it cannot be another batch than asked for.

    early: the next batch is made while the device works at the present one; None: on CUDA, where making it is giving orders
    that the host does not wait for. A context: leaving it ends the threads.
    """

    def __init__(self, batches: BatchLoader, early: bool | None = None):
        self.batches = batches
        self.early = batches.device.type == "cuda" if early is None else early
        self.wait_seconds = 0.0  # seconds, in all
        self._made: tuple[Tensor, Batch] | None = None

    def batch(self, positions: Tensor) -> Batch:
        """positions [B] int64 on the CPU."""
        began = time.perf_counter()
        if self._made is not None and positions.equal(self._made[0]):
            batch, self._made = self._made[1], None
        else:
            batch = self.batches.batch(positions)
        self.wait_seconds += time.perf_counter() - began
        return batch

    def prefetch(self, *coming: Tensor) -> None:
        """To be called when the device has been given a pass to do. coming: the positions of the next passes, soonest first."""
        if not self.early:
            return
        for positions in coming:
            self.batches.pixels.prefetch(self.batches.order(positions))
        # pixels that are still being gathered are awaited at their step; errors are raised then
        if coming and self.batches.pixels.ready(self.batches.order(coming[0])):
            self._made = coming[0], self.batches.batch(coming[0])

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_) -> None:
        self.batches.pixels.close()
