"""Waiting for a job in an event loop: its result, its progress, and what happens when the client goes away."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from .worker import Dropped, Job

PROGRESS_SECONDS = 0.1  # between two looks at a job


def _result(job: Job) -> asyncio.Future:
    result = asyncio.wrap_future(job.future)
    result.add_done_callback(lambda done: done.cancelled() or done.exception())  # a dropped job's error is nobody's
    return result


async def result_of(job: Job, gone: Coroutine[Any, Any, None] | None = None) -> Any:
    """The result of a job, which is dropped if this task is cancelled.

    Args:
        job: the job.
        gone: returns when the client has gone away; the job is then dropped.

    Raises:
        Dropped: the client has gone away.
        Unavailable: the job took too long; also what else the job raised.
    """
    result = _result(job)
    watching = None if gone is None else asyncio.ensure_future(gone)
    try:
        await asyncio.wait(
            [result, *([watching] if watching else [])], timeout=job.seconds_left, return_when=asyncio.FIRST_COMPLETED
        )
        if not job.seconds_left:
            job.stop(job.too_slow())
    finally:
        job.stop(Dropped())
        if watching:
            watching.cancel()
    return await result


async def progress_of(job: Job) -> AsyncIterator[int]:
    """The steps that are done, at every change, until the job is done; it is dropped if the reader stops before.

    Args:
        job: the job.
    """
    result, before = _result(job), -1
    try:
        while not result.done() and job.wanted:
            if job.steps_done != before:
                before = job.steps_done
                yield before
            await asyncio.wait([result], timeout=PROGRESS_SECONDS)
    finally:
        job.stop(Dropped())
