"""The results of one point: metrics against the reference, over all images and per class, and diagnostics."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np

from ..diffusion.schedule import ModelEval
from ..version import __version__
from .diagnostics import VALUES, compared_with_data
from .extractors import Extractor
from .metrics import MetricValue
from .metrics.measure import measure
from .points import Sampled
from .reference import Reference


def versions() -> dict[str, str]:
    """The versions of this package and of the libraries that computed the results."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "numpy")}
    return {"diffusion_adagn": __version__, "python": platform.python_version(), **libraries}


@dataclass(frozen=True)
class Results:
    """The results of one point.

    Args:
        row: JSON values with the keys "metrics", "per_class" and "diagnostics".
        influence: Metric -> float64 [N]. See `MetricValue`.
        class_influence: Metric -> float64 [N_c] or None for each class.
        notes: Sentences on missing or unreliable values.
    """

    row: dict
    influence: dict[str, np.ndarray] = field(repr=False)
    class_influence: dict[str, list[np.ndarray | None]] = field(repr=False)
    notes: list[str]


def results(
    sampled: Sampled,
    reference: Reference | None,
    extractor: Extractor | None,
    classifier: Extractor | None,
    class_names: Sequence[str],
    calls: Sequence[ModelEval],
    k: int = 5,
    device: str = "cpu",
    progress: bool = False,
) -> Results:
    """Compute the metrics and diagnostics of a point.

    Args:
        sampled: The sampled images.
        reference: The real images; None: diagnostics without comparison.
        extractor: The extractor whose features are compared; None: diagnostics only.
        classifier: The classifier, with probabilities over `class_names`, that measures accuracy; None: no accuracy.
        class_names: The model's classes; () without classes.
        calls: The network calls of the point; () for images that were not sampled here.
        k: Neighbours of precision, recall, density and coverage.
        device: The device that computes the metrics, in float64.
        progress: Show a progress bar.
    """
    diagnostics = _diagnostics(sampled, None if reference is None else reference.values, calls)
    if extractor is None:
        return Results({"metrics": {}, "per_class": {}, "diagnostics": diagnostics}, {}, {}, [])
    features = sampled.features[extractor.name]
    class_probabilities = None if classifier is None else sampled.features[classifier.name].probabilities
    names = list(class_names) or None
    target = reference.target(k, device)
    measured = measure(
        features.pooled, class_probabilities, sampled.labels, target, names, k, True, progress, features.probabilities
    )
    overall = measured.overall
    return Results(
        row={
            "metrics": {name: _record(m) for name, m in overall.items()},
            "per_class": {name: [_record(m) for m in values] for name, values in measured.per_class.items()},
            "diagnostics": diagnostics,
        },
        influence={name: m.influence for name, m in overall.items() if m.value is not None and m.influence is not None},
        class_influence={
            name: [None if m.value is None else m.influence for m in values]
            for name, values in measured.per_class.items()
        },
        notes=measured.notes,
    )


def _record(m: MetricValue) -> dict:
    return {"value": m.value, "standard_error": m.standard_error, "why": m.why}


def _diagnostics(sampled: Sampled, reference: np.ndarray | None, calls: Sequence[ModelEval]) -> dict:
    """The diagnostics as JSON values. `difference` and `clipped` have one number per network call.

    `difference` is None for calls without a second forward pass.
    """
    values = sampled.values.mean(axis=0)
    differences = [float(d) if d > 0 else None for d in sampled.difference]
    diagnostics = {
        "timesteps": [call.t for call in calls],
        "sigmas": [call.sigma if math.isfinite(call.sigma) else None for call in calls],  # pure noise: no JSON number
        "difference": differences if any(d is not None for d in differences) else None,
        "clipped": sampled.clipped.tolist(),
        **dict(zip(VALUES, values.tolist())),
    }
    unknown = dict.fromkeys(("contrast_ratio", "saturation_ratio", "brightness_shift", "extremes_shift"))
    return diagnostics | (unknown if reference is None else compared_with_data(values, reference))
