"""Metrics of sampled images against real ones, from features. METRICS lists them; `measure` computes all."""

from dataclasses import dataclass
from typing import Literal

from .classified import accuracy, inception_score
from .gaussian import Gaussian, Moments, frechet, frechet_distance
from .kernel import KernelReference, kid
from .measured import MetricValue
from .neighbours import nearest, precision_recall, radii

__all__ = [
    "METRICS",
    "Gaussian",
    "KernelReference",
    "MetricInfo",
    "MetricValue",
    "Moments",
    "accuracy",
    "frechet",
    "frechet_distance",
    "inception_score",
    "kid",
    "nearest",
    "precision_recall",
    "radii",
]


@dataclass(frozen=True)
class MetricInfo:
    """A metric: its title, whether lower or higher is better, and what it measures."""

    title: str
    better: Literal["lower", "higher"]
    about: Literal["fidelity", "diversity", "both"]


METRICS = {
    "frechet": MetricInfo("Frechet distance", "lower", "both"),
    "kid": MetricInfo("Kernel distance", "lower", "both"),
    "precision": MetricInfo("Precision", "higher", "fidelity"),
    "recall": MetricInfo("Recall", "higher", "diversity"),
    "density": MetricInfo("Density", "higher", "fidelity"),
    "coverage": MetricInfo("Coverage", "higher", "diversity"),
    "inception_score": MetricInfo("Inception score", "higher", "fidelity"),
    "accuracy": MetricInfo("Accuracy", "higher", "fidelity"),
}
