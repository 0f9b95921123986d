"""Times that may be compared: interleaved in one process, in rounds whose order alternates, as medians of paired ratios."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

CLEAN = 0.97  # of a sample's wall time that one thread must have been running
MAX_ROUNDS = 2  # times the rounds asked for, while samples are noisy


@dataclass(frozen=True)
class Sample:
    """seconds: of one call. cpu_share: CPU time of the process / wall time; None where it says nothing (CUDA)."""

    seconds: float
    cpu_share: float | None = None

    @property
    def clean(self) -> bool | None:
        return None if self.cpu_share is None else self.cpu_share >= CLEAN


class Deadline:
    """A moment after which nothing new is begun. minutes: from now; None: never."""

    def __init__(self, minutes: float | None = None):
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds, not below 0."""
        return max(0.0, self.end - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.left == 0


class Clock:
    """Times calls on one device: wall and CPU time, or CUDA events.

    threads: a sample is judged clean or noisy with one thread alone, since with more an idle thread is no noise.
    """

    def __init__(self, device: torch.device | str, threads: int = 1):
        self.device, self.threads = torch.device(device), threads

    def sample(self, call: Callable[[], object], repeats: int = 1) -> Sample:
        """The mean of `repeats` calls, one after the other."""
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
    """{name: one sample a round} of calls that have been warmed up.

    A sample repeats a short call until it lasts about sample_seconds. Every second round goes backwards. Up to twice the
    rounds are made while some are noisy. Past the deadline no further round is begun, except the first.
    expected: {name: seconds of one call} where they are known; the others are called once more to tell.
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
    """median_s, min_s, max_s (seconds), rounds, clean (samples, None where not told) and every sample."""
    seconds = [s.seconds for s in samples]
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "rounds": len(samples),
        "clean": clean_count(samples),
        "samples_s": seconds,
        "cpu_shares": [s.cpu_share for s in samples],
    }


def clean_count(samples: Sequence[Sample]) -> int | None:
    told = [s.clean for s in samples if s.clean is not None]
    return sum(told) if told else None


def paired(ours: Sequence[Sample], theirs: Sequence[Sample]) -> dict:
    """How many times faster ours is: median, min and max of theirs / ours within each round.

    Rounds in which both samples were clean are used where there are three or more, else all; rounds: of how many were made;
    used: how many went into the ratio; clean: how many were clean on both sides (None where not told).
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"paired samples come in rounds: {len(ours)} and {len(theirs)} were given")
    pairs = list(zip(ours, theirs))
    told = [pair for pair in pairs if pair[0].clean is not None and pair[1].clean is not None]
    clean = [pair for pair in told if pair[0].clean and pair[1].clean]
    used = clean if len(clean) >= 3 else pairs
    ratios = [b.seconds / a.seconds for a, b in used]
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "rounds": len(pairs),
        "used": len(used),
        "clean": len(clean) if told else None,
    }


def fastest(rows: Sequence[dict]) -> dict | None:
    """The measured row of the least median time."""
    measured = [row for row in rows if row.get("median_s")]
    return min(measured, key=lambda row: row["median_s"]) if measured else None
