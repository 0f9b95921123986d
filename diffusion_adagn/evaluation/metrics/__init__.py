"""Metrics of sampled pictures against real ones, from features. By name in METRICS; all at once by `measure`."""

from dataclasses import dataclass
from typing import Literal

from .classified import accuracy, inception_score
from .gaussian import Gaussian, Moments, frechet, frechet_distance
from .kernel import KernelReference, kid
from .measured import Measured
from .neighbours import nearest, precision_recall, radii

__all__ = [
    "METRICS",
    "Gaussian",
    "KernelReference",
    "Kind",
    "Measured",
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
class Kind:
    """A metric: how it is called, whether lower or higher is better, and what a bad value of it says."""

    title: str
    better: Literal["lower", "higher"]
    about: Literal["fidelity", "diversity", "both"]


METRICS = {
    "frechet": Kind("Frechet distance", "lower", "both"),
    "kid": Kind("Kernel distance", "lower", "both"),
    "precision": Kind("Precision", "higher", "fidelity"),
    "recall": Kind("Recall", "higher", "diversity"),
    "density": Kind("Density", "higher", "fidelity"),
    "coverage": Kind("Coverage", "higher", "diversity"),
    "inception_score": Kind("Inception score", "higher", "fidelity"),
    "accuracy": Kind("Accuracy", "higher", "fidelity"),
}
