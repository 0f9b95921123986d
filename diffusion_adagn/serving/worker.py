"""One thread per model samples for all clients; waiting requests of one kind share the calls of the network.

A client submits a job and waits for its result. Jobs that differ only in classes, seeds and guidance scales are sampled
together. A job that nobody waits for any more, or whose time is over, is dropped, and sampling stops when all jobs of a
batch were dropped.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

SECONDS_TO_END = 5  # for the running step when a worker is closed


class Unavailable(Exception):
    """The server cannot do this now: one clear sentence, with the HTTP status and when to try again.

    Args:
        text: the sentence.
        status: of HTTP.
        retry_after: seconds after which another try may succeed; None: unknown.
    """

    def __init__(self, text: str, status: int = 503, retry_after: int | None = None):
        super().__init__(text)
        self.status, self.retry_after = status, retry_after


class Dropped(Exception):
    """Sampling stops: no client waits for the result."""


class Job:
    """One request: items to work on, and the result that a client waits for.

    Args:
        items: what to work on, such as the images to sample.
        kind: jobs of an equal kind are worked on together.
        finish: the results, one per item -> what the client receives; called once, when all are there.
        seconds: how long the client waits, from now.
        steps: of each item, for the progress that clients see.
    """

    def __init__(self, items: Sequence, kind: Hashable, finish: Callable[[list], Any], seconds: float, steps: int = 1):
        self.items, self.kind, self.finish, self.seconds, self.steps = items, kind, finish, seconds, steps
        self.future: Future = Future()
        self.results: list = [None] * len(items)
        self.taken, self.completed = 0, 0
        self.running, self.progress = 0, 0.0  # items in the current batch, and how far it is, 0..1
        self.deadline = time.monotonic() + seconds

    @property
    def wanted(self) -> bool:
        """Whether a client still waits for the result."""
        if not self.seconds_left:
            self.stop(self.too_slow())
        return not self.future.done()

    @property
    def steps_done(self) -> int:
        """How many of the steps are done, on average over the items."""
        share = (self.completed + self.running * self.progress) / max(1, len(self.items))
        return int(share * self.steps)

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def too_slow(self) -> Unavailable:
        text = f"the request took longer than {self.seconds:g} seconds: ask for fewer images or steps, or try later."
        return Unavailable(text, 504)

    def stop(self, error: Exception | None = None) -> None:
        """Drop the job. error: what the client receives."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error or Dropped("the client does not wait any more"))

    def wait(self) -> Any:
        """The result, for a client in a thread. Raises what the job raised, and Unavailable after its time."""
        try:
            return self.future.result(self.seconds_left)
        except TimeoutError:
            self.stop(self.too_slow())
            return self.future.result()

    def fill(self, first: int, results: Sequence) -> None:
        """Results of the items from index `first`."""
        self.results[first : first + len(results)] = results
        self.completed += len(results)
        if self.completed == len(self.items) and not self.future.done():
            try:
                result = self.finish(self.results)
            except Exception as error:
                self.stop(error)
            else:
                with contextlib.suppress(InvalidStateError):
                    self.future.set_result(result)


class Batch:
    """Items of several jobs that are worked on together.

    Args:
        parts: of each job, the index of its first item here and how many follow.
    """

    def __init__(self, parts: list[tuple[Job, int, int]]):
        self.parts = parts
        self.items = [item for job, first, count in parts for item in job.items[first : first + count]]

    def report(self, share: float) -> None:
        """Record how far the batch is, 0..1. Raises Dropped if no job of it is wanted any more."""
        for job, _, _ in self.parts:
            job.progress = share
        if not any(job.wanted for job, _, _ in self.parts):
            raise Dropped

    def finish(self, results: Sequence) -> None:
        """Give each job its results, one per item."""
        results = iter(results)
        for job, first, count in self.parts:
            job.running, job.progress = 0, 0.0
            job.fill(first, [next(results) for _ in range(count)])


class Worker:
    """A queue and the thread that works on it.

    Args:
        work: works on a batch, and returns one result per item; it calls `batch.report` at every step.
        max_batch: most items per batch.
        max_waiting: most jobs in the queue.
        done: called after every batch with its seconds.
    """

    def __init__(
        self,
        work: Callable[[Batch], Iterable],
        max_batch: int,
        max_waiting: int,
        done: Callable[[Batch, float], None] = lambda batch, seconds: None,
    ):
        self.work, self.max_batch, self.max_waiting, self.done = work, max_batch, max_waiting, done
        self.queue: deque[Job] = deque()
        self.running: tuple[Job, ...] = ()
        self.changed = threading.Condition()
        self.closed, self.last_seconds = False, 1.0
        self.thread = threading.Thread(target=self._loop, daemon=True, name="adagn-worker")
        self.thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue that a client waits for."""
        with self.changed:
            return sum(job.wanted for job in self.queue)

    def submit(self, job: Job) -> Job:
        """Put a job into the queue. Raises Unavailable if the queue is full or the worker is closed."""
        with self.changed:
            self.queue = deque(j for j in self.queue if j.wanted)
            if self.closed:
                raise Unavailable("the server is stopping.")
            if len(self.queue) >= self.max_waiting:
                text = f"as many requests wait as this server allows ({self.max_waiting}): try again later."
                raise Unavailable(text, 429, math.ceil(self.last_seconds))
            self.queue.append(job)
            self.changed.notify()
        return job

    def stop(self) -> None:
        """Take no more jobs; all jobs receive Unavailable, and the running batch stops at its next step."""
        with self.changed:
            self.closed = True
            jobs = [*self.queue, *self.running]
            self.queue.clear()
            self.changed.notify()
        for job in jobs:
            job.stop(Unavailable("the server is stopping."))

    def close(self) -> None:
        """Stop, and wait for the end of the thread, for some seconds at most."""
        self.stop()
        self.thread.join(SECONDS_TO_END)

    def _loop(self) -> None:
        while (batch := self._next_batch()) is not None:
            began = time.monotonic()
            try:
                batch.finish(list(self.work(batch)))
                self.last_seconds = time.monotonic() - began
                self.done(batch, self.last_seconds)
            except Exception as error:  # the thread goes on for the other jobs
                for job, _, _ in batch.parts:
                    job.stop(error)

    def _next_batch(self) -> Batch | None:
        """The items of the oldest job, and of later ones of its kind, as far as there is room; None after `close`."""
        with self.changed:
            self.running = ()
            while not (jobs := [job for job in self.queue if job.wanted]):
                if self.closed:
                    return None
                self.queue.clear()
                self.changed.wait()
            parts = list(_share(self.max_batch, [job for job in jobs if job.kind == jobs[0].kind]))
            self.queue = deque(job for job in jobs if job.taken < len(job.items))
            self.running = tuple(job for job, _, _ in parts)
            return Batch(parts)


def _share(room: int, jobs: Sequence[Job]) -> Iterator[tuple[Job, int, int]]:
    """As many items of the jobs, in their order, as there is room for."""
    for job in jobs:
        count = min(room, len(job.items) - job.taken)
        if not count:
            return
        yield job, job.taken, count
        job.taken, job.running, room = job.taken + count, count, room - count
