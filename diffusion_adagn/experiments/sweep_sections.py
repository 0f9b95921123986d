"""Sections of a sweep's page: settings each at their own best, ranked models, the rounds of a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ..evaluation.metrics import METRICS
from ..render.markdown import plain, table, tick
from .comparison import OwnBest, Ranking
from .cost import duration
from .intervals import verdict
from .selection import NAMES, BestSet, PointResult, metric_names, primary_metric


class Report(Protocol):
    """What a section needs of a report.

    row: of every point, by id. metrics: those with values. titles, words: of metrics, in tables and in sentences.
    """

    points: list[PointResult]
    choices: dict[str, BestSet]
    row: dict[str, dict]
    metrics: list[str]
    titles: dict[str, str]
    words: dict[str, str]

    def format_point(self, point: str) -> str:
        """A point by the settings that distinguish it."""

    def with_error(self, row: Mapping, metric: str) -> str:
        """A metric's value with its standard error."""


def compared(report: Report, one: OwnBest) -> list[str]:
    """The values of a setting, each at its own best point."""
    name = NAMES.get(one.setting, one.setting)
    head = [name, "best at", "evaluations per image", *(plain(report.titles[m]) for m in report.metrics)]
    rows = []
    for value, point in one.best.items():
        row = report.row[point]
        values = [report.with_error(row, m) for m in report.metrics]
        rows.append([plain(value), plain(report.format_point(point)), str(row.get("nfe", "-")), *values])
    note = plain(one.sentence(report.words))
    return [f"## Each {name} at its own best", "", *table(head, rows), "", note]


def ranked(report: Report, one: Ranking | None) -> list[str]:
    """Models unguided and each at its best guidance."""
    if one is None:
        return ["## Models", "", "No two models have points both at scale 1 and at other scales: none are ranked."]
    places = list(one.guided)
    rows = []
    for i, (model, point) in enumerate(one.unguided.items()):
        best = one.guided[model]
        unguided = [f"{i + 1}", report.with_error(report.row[point], one.metric)]
        guided = [
            f"{places.index(model) + 1}",
            plain(report.format_point(best)),
            report.with_error(report.row[best], one.metric),
        ]
        rows.append([plain(model), *unguided, *guided])
    head = ["model", "place unguided", "value", "place at best guidance", "at", "value"]
    title = f"## Models unguided and at their best guidance, by {metric_names(report.words)[one.metric]}"
    return [title, "", *table(head, rows), "", plain(one.sentence(report.words))]


def intervals(report: Report, found: Mapping) -> list[str]:
    """The intervals that were proposed, and whether they held up."""
    metric = primary_metric(report.choices)
    held = verdict(report.points, found["proposed"], metric, report.words) if metric else "No metric compares them."
    return ["## Proposed intervals", "", plain(found["sentence"]), "", plain(held)]


def rounds(budget: float, found: Sequence[Mapping], titles: Mapping[str, str]) -> list[str]:
    """What was dropped in which round of a budget."""
    rows = []
    for i, one in enumerate(found):
        dropped = ", ".join(f"`{tick(name)}`" for name in one["dropped"]) or "none"
        better = METRICS[one["metric"]].better
        by = f"{plain(metric_names(titles)[one['metric']])} ({better} is better)"
        rows.append([f"{i + 1}", f"{len(one['points'])}", f"{one['count']:,}", by, dropped, duration(one["seconds"])])
    head = ["round", "points", "images of each", "compared by", "dropped, the worst last", "time until its end"]
    note = (
        f"A budget of {duration(budget)}. Every round compares at equal numbers of images and gives more to the better half; "
        "everything else in this report is of the last round."
    )
    return ["## Rounds", "", note, "", *table(head, rows)]
