"""Successive halving over images: a sweep within a given time, in which poor points get few images.

All points are sampled with the same few images and compared; the better half gets more images, and so on (Jamieson &
Talwalkar 2016). Every round compares at equal numbers of images: the Frechet distance depends on them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TypeVar

from accelerate.utils import broadcast_object_list
from annotated_types import Ge

from ..atomic import atomic_json
from ..errors import InputError
from ..evaluation.metrics import METRICS
from ..evaluation.points import SamplePlan, remove_batches
from ..schema import document, read_document
from .point_results import PointResult, metric_value
from .points import SweepPoint
from .runner import SweepRunner, load_point
from .selection import best_sets, primary_metric

FINALISTS = 4  # points of the last round, at least
MARGIN = 0.8  # of the time left that is planned: a busy machine becomes slower
SLOWER = (0.2, 20.0)  # a measured time is between these times the predicted one
clock = time.monotonic
P = TypeVar("P")


@document
class Round:
    """A round, in rounds.json.

    count: images per point. points: the names of those compared. metric: by which; "" in an unfinished round. dropped: names,
    the worst last. values: of the metric, by name. seconds: spent until its end, from the start of the sweep.
    """

    count: Annotated[int, Ge(1)]
    points: tuple[str, ...]
    metric: str = ""
    dropped: tuple[str, ...] = ()
    values: dict[str, float | None] | None = None
    seconds: float = 0.0


@document
class Rounds:
    """rounds.json."""

    rounds: tuple[Round, ...] = ()


def rounds_json(rounds: Sequence[Round]) -> dict:
    """The content of rounds.json."""
    return {"rounds": [asdict(one) for one in rounds]}


def survivors_of(count: int) -> int:
    """How many of the points a round leaves for the next; the same number after the last round."""
    return count if count <= FINALISTS else max(FINALISTS, math.ceil(count / 2))


def rounds_for(count: int) -> int:
    """How many rounds a number of points takes."""
    rounds = 1
    while survivors_of(count) < count:
        count, rounds = survivors_of(count), rounds + 1
    return rounds


def next_count(before: int, left: float, costs: Sequence[float], rounds: int, batch: int, most: int) -> int:
    """Images per point of the next round: an equal share of what is left goes to each round.

    Args:
        before: Images per point that exist already.
        left: What may still be spent, in the unit of `costs`.
        costs: Of an image, for each point of the round.
        rounds: That are left, this one included.
        batch: The count is a multiple of it.
        most: The largest count.
    """
    more = left / rounds / sum(costs)
    return min(most, before + max(batch, math.floor(more / batch) * batch))


def ranked(values: Mapping[P, float | None], metric: str) -> list[P]:
    """The points from the best to the worst; those without a value last."""
    sign = 1 if METRICS[metric].better == "lower" else -1
    return sorted(values, key=lambda p: math.inf if values[p] is None else sign * values[p])


def budget_record(budget: float | None) -> dict:
    """What plan.json has of a budget: nothing without one."""
    return {} if budget is None else {"budget": budget}


class BudgetSearch:
    """Successive halving of a sweep's points.

    OUT/rounds.json has the rounds that began, so that a resumed sweep repeats their decisions; OUT/rounds/1/NAME is a point
    measured in round 1. The batches of the points that remain are in OUT/batches until the last round.

    Args:
        runner: Samples and measures.
        points: All points.
        plan: The images; its count is the most that a point gets.
        budget: Seconds of sampling and measuring.
        out: The sweep's folder.

    Raises:
        InputError: Rounds of other points began, or the budget is too short.
    """

    def __init__(self, runner: SweepRunner, points: Sequence[SweepPoint], plan: SamplePlan, budget: float, out: Path):
        self.runner, self.plan, self.budget, self.out = runner, plan, budget, out
        self.points = {p.name: p for p in points}
        seconds = {p.name: runner.costs[p].seconds / runner.state.num_processes for p in points}
        self.seconds, self.rounds = broadcast_object_list(
            [seconds, self._read()]
        )  # of an image; the main process decides
        names, rounds = list(self.points), rounds_for(len(points))
        if self.rounds and set(self.rounds[0].points) != set(names):
            raise InputError("the points of a sweep with --budget cannot be changed: give another --out.")
        batch = plan.batch_size * sum(self.seconds.values())
        if not self.rounds and batch * rounds > MARGIN * budget:
            raise InputError(
                f"a budget of {budget:g} s is too short: a batch of {plan.batch_size} images of each of {len(points)} points takes about "
                f"{batch:.0f} s, and the first of {rounds} rounds gets an equal share. Give --budget "
                f"{math.ceil(batch * rounds / MARGIN / 60)}m or more, fewer points, or a smaller --batch_size."
            )

    def run(self) -> list[PointResult]:
        """Run the rounds that are left, and return the points of the last one."""
        began, spent = clock(), max((one.seconds for one in self.rounds), default=0.0)
        number = next((i for i, one in enumerate(self.rounds) if not one.metric), len(self.rounds))
        if number == len(self.rounds) > 0 and self._is_last(number - 1):
            number -= 1  # the sweep is finished: its points are read again
        while True:
            if number == len(self.rounds):
                self._agree([*self.rounds, self._next(self.budget - spent - (clock() - began))])
            points = self._measure(number)
            if not self.rounds[number].metric:
                judged = _judged(self.rounds[number], points, self._is_last(number), spent + clock() - began)
                self._agree([*self.rounds[:number], judged])
            if self._is_last(number):
                break
            number += 1
        if self.runner.state.is_main_process:
            remove_batches(self.out / "batches")
        return points

    def _read(self) -> list[Round]:
        file = self.out / "rounds.json"
        return list(read_document(file, Rounds).rounds) if file.is_file() else []

    def _agree(self, rounds: list[Round]) -> None:
        """Take over the main process's rounds, and write them."""
        (self.rounds,) = broadcast_object_list([rounds])
        if self.runner.state.is_main_process:
            atomic_json(self.out / "rounds.json", rounds_json(rounds))

    def _is_last(self, number: int) -> bool:
        one = self.rounds[number]
        return len(one.points) == survivors_of(len(one.points)) or one.count == self.plan.count

    def _measure(self, number: int) -> list[PointResult]:
        one, folder = self.rounds[number], self.out / "rounds" / str(number + 1)
        points = [self.points[name] for name in one.points]
        title = f"round {number + 1}: {len(points)} points of {one.count:,} images"
        self.runner.run(points, self.plan, folder, self.out / "batches", title, one.count)
        return [load_point(folder / p.name) for p in points]

    def _next(self, left: float) -> Round:
        """The next round. left: seconds of the budget."""
        points, before, slower = tuple(self.points), 0, 1.0
        if self.rounds:
            last = self.rounds[-1]
            points = tuple(name for name in last.points if name not in last.dropped)
            before, slower = last.count, self._slower()
        costs = [slower * self.seconds[name] for name in points]
        batch, most = self.plan.batch_size, self.plan.count
        return Round(next_count(before, max(0.0, MARGIN * left), costs, rounds_for(len(points)), batch, most), points)

    def _slower(self) -> float:
        """Measured time over predicted time, of the rounds so far."""
        predicted, before = 0.0, 0
        for one in self.rounds:
            predicted += (one.count - before) * sum(self.seconds[name] for name in one.points)
            before = one.count
        low, high = SLOWER
        return min(high, max(low, self.rounds[-1].seconds / predicted))


def _judged(one: Round, points: Sequence[PointResult], is_last: bool, seconds: float) -> Round:
    """A finished round: the metric that decides, and the points that are dropped."""
    choices = best_sets(points)
    metric = primary_metric(choices) or next(iter(choices), "kid")
    values = {point.id: metric_value(point.row, metric)[0] for point in points}
    order = ranked(values, metric)
    dropped = () if is_last else tuple(order[survivors_of(len(order)) :])
    return Round(one.count, one.points, metric, dropped, values, seconds)
