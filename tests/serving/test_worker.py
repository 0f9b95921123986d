"""The queue: which jobs are worked on together, and what happens to those that nobody waits for."""

import threading
import time

import pytest

from diffusion_adagn.serving.worker import Dropped, Job, Unavailable, Worker


class Recorder:
    """Work that doubles numbers; it waits for `go` before each of its three steps."""

    def __init__(self):
        self.batches, self.go, self.started = [], threading.Semaphore(0), threading.Event()
        self.stopped = 0

    def __call__(self, batch):
        self.batches.append(list(batch.items))
        self.started.set()
        for step in range(3):
            assert self.go.acquire(timeout=30)
            try:
                batch.report((step + 1) / 3)
            except Dropped:
                self.stopped = step + 1
                raise
        return [2 * item for item in batch.items]

    def let(self, batches):
        for _ in range(3 * batches):
            self.go.release()


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def worker(recorder):
    worker = Worker(recorder, max_batch=4, max_waiting=3)
    yield worker
    recorder.let(20)
    worker.close()
    assert not worker.thread.is_alive()


def job(*items, kind="a", seconds=30, **more):
    return Job(items, kind, list, seconds, **more)


def test_waiting_jobs_of_one_kind_share_a_batch(worker, recorder):
    first = worker.submit(job(1))
    assert recorder.started.wait(10)
    waiting = [worker.submit(job(2, 3)), worker.submit(job(4, kind="b")), worker.submit(job(5))]
    recorder.let(3)
    assert [j.wait() for j in [first, *waiting]] == [[2], [4, 6], [8], [10]]
    assert recorder.batches == [[1], [2, 3, 5], [4]]


def test_large_job_is_split_into_batches(worker, recorder):
    large = worker.submit(job(*range(6)))
    assert recorder.started.wait(10)
    small = worker.submit(job(10))
    recorder.let(2)
    assert large.wait() == [0, 2, 4, 6, 8, 10] and small.wait() == [20]
    assert recorder.batches == [[0, 1, 2, 3], [4, 5, 10]]


def test_full_queue_rejects_with_retry_after(worker, recorder):
    worker.submit(job(0))
    assert recorder.started.wait(10)
    waiting = [worker.submit(job(i)) for i in range(3)]
    with pytest.raises(Unavailable, match=r"as many requests wait as this server allows \(3\)") as caught:
        worker.submit(job(9))
    assert caught.value.status == 429 and caught.value.retry_after >= 1
    waiting[0].stop()
    worker.submit(job(9))  # a job that nobody waits for takes no room
    assert worker.waiting == 3


def test_batch_stops_when_every_job_is_dropped(worker, recorder):
    one = worker.submit(job(1))
    assert recorder.started.wait(10)
    one.stop()
    recorder.go.release()
    after = worker.submit(job(2))
    recorder.let(1)
    assert after.wait() == [4]
    assert recorder.stopped == 1
    with pytest.raises(Dropped):
        one.wait()


def test_batch_goes_on_for_the_jobs_that_remain(worker, recorder):
    worker.submit(job(0, kind="first"))
    assert recorder.started.wait(10)
    gone, stays = worker.submit(job(1)), worker.submit(job(2))
    recorder.let(1)
    while len(recorder.batches) < 2:
        time.sleep(0.01)
    gone.stop()
    recorder.let(1)
    assert stays.wait() == [4] and recorder.stopped == 0


def test_dropped_job_is_not_started(worker, recorder):
    worker.submit(job(0))
    assert recorder.started.wait(10)
    waiting = worker.submit(job(1))
    waiting.stop()
    recorder.let(2)
    worker.submit(job(2)).wait()
    assert recorder.batches == [[0], [2]]


def test_slow_job_ends_with_status_504(worker, recorder):
    slow = worker.submit(job(1, seconds=0.2))
    with pytest.raises(Unavailable, match=r"longer than 0\.2 seconds") as caught:
        slow.wait()
    assert caught.value.status == 504
    recorder.go.release()  # the next step notices that nobody waits
    recorder.let(1)
    assert worker.submit(job(2)).wait() == [4]
    assert recorder.stopped == 1


def test_progress_counts_steps(worker, recorder):
    one = worker.submit(job(*range(8), steps=30))
    assert one.steps_done == 0
    for steps in (5, 10):
        recorder.go.release()
        while one.steps_done != steps:
            time.sleep(0.01)
    recorder.let(2)
    one.wait()
    assert one.steps_done == 30


def test_error_reaches_its_jobs_only():
    def work(batch):
        if batch.items[0] == 0:
            raise ZeroDivisionError("no")
        return batch.items

    worker = Worker(work, 4, 4)
    with pytest.raises(ZeroDivisionError):
        worker.submit(job(0)).wait()
    assert worker.submit(job(1)).wait() == [1]
    worker.close()
    with pytest.raises(Unavailable, match="stopping"):
        worker.submit(job(1))


def test_thread_survives_an_error_of_its_counter():
    def count(batch, seconds):
        raise ZeroDivisionError

    worker = Worker(lambda batch: batch.items, 4, 4, count)
    assert [worker.submit(job(i)).wait() for i in range(3)] == [[0], [1], [2]]
    worker.close()


def test_close_ends_waiting_and_running_jobs(worker, recorder):
    running = worker.submit(job(0))
    assert recorder.started.wait(10)
    waiting = worker.submit(job(1))
    closing = threading.Thread(target=worker.close)
    closing.start()
    for one in (running, waiting):
        with pytest.raises(Unavailable, match="stopping"):
            one.wait()
    recorder.let(1)
    closing.join(10)
    assert recorder.batches == [[0]]
