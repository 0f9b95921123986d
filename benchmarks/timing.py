"""Comparable times: interleaved in one process, in rounds of alternating order, as medians of paired ratios."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

CLEAN = 0.97  # minimum fraction of a sample's wall time that the thread was running
MAX_ROUNDS = 2  # at most this many times the requested rounds, while samples are noisy


@dataclass(frozen=True)
class Sample:
    """seconds: of one call. cpu_share: CPU time of the process / wall time; None on CUDA and with several threads."""

    seconds: float
    cpu_fraction: float | None = None

    @property
    def clean(self) -> bool | None:
        return None if self.cpu_fraction is None else self.cpu_fraction >= CLEAN


class Deadline:
    """A time after which nothing new is started. minutes: from now; None: never."""

    def __init__(self, minutes: float | None = None):
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    @property
    def remaining(self) -> float:
        """Remaining seconds, at least 0."""
        return max(0.0, self.end - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.remaining == 0


class Clock:
    """Times calls on one device: wall and CPU time, or CUDA events.

    threads: samples are classified as clean or noisy only with one thread; with more, an idle thread is not noise.
    """

    def __init__(self, device: torch.device | str, threads: int = 1):
        self.device, self.threads = torch.device(device), threads

    def sample(self, call: Callable[[], object], repeats: int = 1) -> Sample:
        """The mean of `repeats` calls in sequence."""
        if self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            first.record()
            for _ in range(repeats):
                call()
            last.record()
            torch.cuda.synchronize()
            return Sample(first.elapsed_time(last) / 1000 / repeats)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            call()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return Sample(wall / repeats, cpu / wall if self.threads == 1 else None)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    clock: Clock,
    rounds: int,
    sample_seconds: float = 0.2,
    deadline: Deadline | None = None,
    title: str = "",
    expected: Mapping[str, float] | None = None,
) -> dict[str, list[Sample]]:
    """Time calls in rounds, after their warm-up: {name: one sample per round}.

    A sample repeats a short call until it takes about sample_seconds. Every second round runs in reverse order. Up to twice
    the rounds are run while some are noisy. After the deadline no further round starts, except the first.

    Args:
        calls: By name.
        clock: Measures the samples.
        rounds: Requested rounds.
        sample_seconds: Minimum duration of a sample.
        deadline: None: no limit.
        title: Of the progress bar.
        expected: {name: seconds of one call} if known; the others are called once more to measure it.
    """
    deadline = deadline or Deadline()
    known = {name: (expected or {}).get(name) or clock.sample(call).seconds for name, call in calls.items()}
    repeats = {name: max(1, min(10_000, math.ceil(sample_seconds / max(s, 1e-9)))) for name, s in known.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    with tqdm(total=rounds * len(calls), desc=title, leave=False, disable=None) as bar:
        for number in range(MAX_ROUNDS * rounds):
            if number and deadline.passed:
                break
            for name in list(calls)[:: -1 if number % 2 else 1]:
                samples[name].append(clock.sample(calls[name], repeats[name]))
                bar.update()
            quiet = sum(all(s[i].clean is not False for s in samples.values()) for i in range(number + 1))
            if quiet >= rounds:
                break
    return samples


def summary(samples: Sequence[Sample]) -> dict:
    """median_s, min_s, max_s (seconds), rounds, clean (samples, None if not known) and every sample."""
    seconds = [s.seconds for s in samples]
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "rounds": len(samples),
        "clean": clean_count(samples),
        "samples_s": seconds,
        "cpu_fractions": [s.cpu_fraction for s in samples],
    }


def clean_count(samples: Sequence[Sample]) -> int | None:
    known = [s.clean for s in samples if s.clean is not None]
    return sum(known) if known else None


def paired(ours: Sequence[Sample], theirs: Sequence[Sample]) -> dict:
    """How many times faster ours is: median, min and max of theirs / ours within each round.

    Uses the rounds in which both samples were clean if there are three or more, else all.

    Returns:
        median, min and max of the ratio; rounds: the number of rounds; used: the number of rounds in the ratio; clean: the
        number of rounds that were clean on both sides (None if not known).
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            f"paired samples need equal numbers of rounds, at least one: got {len(ours)} and {len(theirs)}"
        )
    pairs = list(zip(ours, theirs))
    known = [pair for pair in pairs if pair[0].clean is not None and pair[1].clean is not None]
    clean = [pair for pair in known if pair[0].clean and pair[1].clean]
    used = clean if len(clean) >= 3 else pairs
    ratios = [b.seconds / a.seconds for a, b in used]
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "rounds": len(pairs),
        "used": len(used),
        "clean": len(clean) if known else None,
    }


def fastest(rows: Sequence[dict]) -> dict | None:
    """The measured row with the smallest median time; None if there is none."""
    measured = [row for row in rows if row.get("median_s")]
    return min(measured, key=lambda row: row["median_s"]) if measured else None
