"""Values of a setting, each at its own best: rules, guides, EMA lengths; and runs, unguided and at their best guidance.

A rule at another rule's best scale is at a disadvantage, so that only best points are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..evaluation.metrics import METRICS
from ..render.text import listed
from .point_results import PointResult, differing, format_setting, in_order, metric_value
from .selection import BestSet, best_set
from .verdicts import metric_names

COMPARED = ("run", "checkpoint", "ema", "guide", "guide_ema", "rule", "negative", "schedule", "interval", "sampler")
OF_GUIDANCE = {"guide", "guide_ema", "rule", "negative", "schedule", "interval"}  # without effect at scale 1


@dataclass(frozen=True)
class OwnBest:
    """The values of a setting, each at its best point.

    Attributes:
        setting: a key of a point's row.
        metric: by which points were chosen.
        best: the id of the best point by the value as text; in the order of the values.
        choice: `best_set` of these points alone.
    """

    setting: str
    metric: str
    best: dict[str, str]
    choice: BestSet

    def sentence(self, titles: Mapping[str, str]) -> str:
        """Which values cannot be distinguished from the best, each at its own best point."""
        value_of = {point: value for value, point in self.best.items()}
        first, *equal = [value_of[point] for point in self.choice.members]
        name = metric_names(titles)[self.metric]
        if not self.choice.is_decisive:
            return f"By {name} no two of them can be distinguished."
        also = f", not distinguishable from {listed(equal, 6)}" if equal else ", distinguishably"
        return f"By {name} {first} is best{also}."


def own_bests(points: Sequence[PointResult], metric: str) -> list[OwnBest]:
    """Every setting of COMPARED with several values, where something else varies too."""
    varied = differing(points)
    settings = [s for s in COMPARED if s in varied] if len(varied) > 1 else []
    found = [own_best(points, setting, metric) for setting in settings]
    return [one for one in found if one is not None]


def own_best(points: Sequence[PointResult], setting: str, metric: str) -> OwnBest | None:
    """The best point of each value of a setting; None where fewer than two values have one.

    Args:
        points: All points. Where the setting belongs to guidance, those of scale 1 are left out.
        setting: One of COMPARED.
        metric: The metric to choose by.
    """
    groups: dict[str, list[PointResult]] = {}
    for point in in_order(points):
        if point.row["scale"] != 1 or setting not in OF_GUIDANCE:
            groups.setdefault(format_setting(setting, value_of(point, setting)), []).append(point)
    best = {value: chosen.best for value, group in groups.items() if (chosen := best_set(group, metric, draws=1))}
    if len(best) < 2:
        return None
    return OwnBest(setting, metric, best, best_set([p for p in points if p.id in best.values()], metric))


def value_of(point: PointResult, setting: str) -> object:
    """A setting's value, also where it is left out of the record as neutral."""
    return point.row.get(setting) or {"rule": "cfg", "negative": "null"}.get(setting)


@dataclass(frozen=True)
class Ranking:
    """Models ranked by one metric, unguided and each at its best guidance.

    Attributes:
        setting: what tells the models apart: run, checkpoint or ema.
        metric: by which they are ranked.
        unguided: the point without guidance by model, the best model first.
        guided: the best point with guidance by model, the best first.
        equal: of each of the two lists, the models that cannot be distinguished from its first.
    """

    setting: str
    metric: str
    unguided: dict[str, str]
    guided: dict[str, str]
    equal: tuple[tuple[str, ...], tuple[str, ...]]

    def sentence(self, titles: Mapping[str, str]) -> str:
        """Whether guidance changes the order."""
        name = metric_names(titles)[self.metric]
        before, after = list(self.unguided), list(self.guided)
        order = "the order is the same" if before == after else "the order changes"
        text = f"By {name}, unguided: {', '.join(before)}; each at its best guidance: {', '.join(after)}: {order}."
        notes = [f"{when} {listed([models[0], *others], 6)} cannot be distinguished" for when, models, others in zip(
            ("unguided", "guided"), (before, after), self.equal) if others]  # fmt: skip
        return f"{text} {'; '.join(notes).capitalize()}." if notes else text


def ranking(points: Sequence[PointResult], metric: str) -> Ranking | None:
    """Rank the models of a sweep; None where there are not two models with points both unguided and guided."""
    varied = differing(points)
    setting = next((s for s in ("run", "checkpoint", "ema") if s in varied), None)
    if setting is None:
        return None
    orders, equal = [], []
    for guided in (False, True):
        part = [p for p in points if (p.row["scale"] != 1) == guided]
        each = own_best(part, setting, metric)
        if each is None:
            return None
        sign = 1 if METRICS[metric].better == "lower" else -1
        value = {p.id: sign * metric_value(p.row, metric)[0] for p in part if p.id in each.best.values()}
        order = sorted(each.best, key=lambda model: value[each.best[model]])
        orders.append({model: each.best[model] for model in order})
        of_point = {point: model for model, point in each.best.items()}
        equal.append(tuple(of_point[member] for member in each.choice.members[1:]))
    return Ranking(setting, metric, *orders, tuple(equal)) if orders[0].keys() == orders[1].keys() else None
