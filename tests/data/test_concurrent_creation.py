"""One process of a machine creates shared files; the others wait and use them."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from accelerate import PartialState

from diffusion_adagn.atomic import one_at_a_time
from diffusion_adagn.config import DataConfig
from diffusion_adagn.data import open_dataset, store
from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation import setup
from diffusion_adagn.evaluation.extractors import classifier
from diffusion_adagn.runtime.distributed import main_first


def in_two_threads(create):
    """The results of create() in two threads that start together."""
    start = threading.Barrier(2)

    def one(_):
        start.wait()
        return create()

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(one, range(2)))


def count_slow_calls(monkeypatch, module, name):
    """A list of the calls of module.name, which is slowed down."""
    calls, real = [], getattr(module, name)

    def slow(*args, **kwargs):
        calls.append(name)
        time.sleep(0.1)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, slow)
    return calls


def test_two_threads_decode_once(tmp_path, monkeypatch):
    calls = count_slow_calls(monkeypatch, store, "decode")
    first, second = in_two_threads(lambda: open_dataset(DataConfig(store_dir=str(tmp_path)), progress=False))
    assert calls == ["decode"]
    assert first.folder == second.folder and first.fingerprint == second.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == [first.folder.name]  # the lock is removed


def test_two_threads_train_one_classifier(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path))
    for name in ("MIN_PASSES", "MAX_PASSES"):
        monkeypatch.setattr(classifier, name, 64)
    calls = count_slow_calls(monkeypatch, classifier, "train_classifier")
    data = open_dataset(DataConfig(), progress=False)
    first, second = in_two_threads(lambda: classifier.open_classifier(data, progress=False))
    assert calls == ["train_classifier"] and first.hash == second.hash


def test_waiting_is_announced_and_survives_errors(tmp_path, capsys):
    began, order = threading.Event(), []

    def failing():
        with one_at_a_time(tmp_path / "new"):
            began.set()
            time.sleep(0.1)
            order.append("failed")
            raise ValueError

    with ThreadPoolExecutor(1) as thread:
        failed = thread.submit(failing)
        began.wait()
        with one_at_a_time(tmp_path / "new", "it decodes digits"):
            order.append("next")
        assert isinstance(failed.exception(), ValueError)
    assert order == ["failed", "next"] and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "waiting for another process: it decodes digits\n"


class Rank:
    """A fake accelerate process, with real barriers."""

    def __init__(self, rank, local, barrier):
        self.is_main_process, self.is_local_main_process, self.barrier = rank == 0, local == 0, barrier

    def main_process_first(self):
        return _first_process_context(self, self.is_main_process)

    def local_main_process_first(self):
        return _first_process_context(self, self.is_local_main_process)

    def wait_for_everyone(self):
        self.barrier.wait(timeout=10)


def _first_process_context(rank, first):
    return contextlib.contextmanager(PartialState._goes_first)(rank, first)


def test_first_process_of_each_machine_goes_first():
    barrier, done = threading.Barrier(6), []
    ranks = [Rank(r, r % 3, barrier) for r in range(6)]  # two machines of three

    def enter(rank):
        with main_first(ranks[rank]):
            time.sleep(0.02)
            done.append(rank)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(enter, range(6)))
    assert done[:2] == [0, 3] and sorted(done[2:]) == [1, 2, 4, 5]


class FakeExtractor:
    def __init__(self, name, hash):
        self.name, self.hash = name, hash


def test_different_extractors_across_processes_are_rejected(monkeypatch):
    class State:
        num_processes = 2

    mine = [FakeExtractor("inception", "aa"), FakeExtractor("judge", "bb")]
    for other, rejected in (("bb", False), ("cc", True)):
        monkeypatch.setattr(
            setup, "gather_object", lambda own, other=other: [*own, [("inception", "aa"), ("judge", other)]]
        )
        if not rejected:
            setup.check_same_extractors(mine, State())
            continue
        with pytest.raises(InputError, match=r"judge of process 0 .* process 1 \(bb, cc\).*DIFFUSION_ADAGN_CACHE"):
            setup.check_same_extractors(mine, State())
