"""The numbers of one point: its metrics against the reference, over all images and for each class, and its diagnostics."""

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
    """The versions behind the numbers."""
    made = {name: version(name) for name in ("torch", "diffusers", "numpy")}
    return {"diffusion_adagn": __version__, "python": platform.python_version(), **made}


@dataclass(frozen=True)
class Results:
    """row: plain JSON, with "metrics", "per_class" and "diagnostics". notes: sentences on what is blank or doubtful.

    influence: metric -> float64 [N]; class_influence: metric -> for each class float64 [N_c] or None. See `MetricValue`.
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
    """Measure what was sampled.

    extractor: whose features are compared (None: diagnostics alone); classifier: whose probabilities over `class_names` say what an image shows (None: no
    accuracy). class_names: the model's classes, () without. calls: of the point; () for images from elsewhere. device: where the
    metrics are computed, in float64.
    """
    diagnostics = _diagnostics(sampled, None if reference is None else reference.values, calls)
    if extractor is None:
        return Results({"metrics": {}, "per_class": {}, "diagnostics": diagnostics}, {}, {}, [])
    features = sampled.features[extractor.name]
    judged = None if classifier is None else sampled.features[classifier.name].probabilities
    names = list(class_names) or None
    target = reference.target(k, device)
    found = measure(features.pooled, judged, sampled.labels, target, names, k, True, progress, features.probabilities)
    overall = found.overall
    return Results(
        row={
            "metrics": {name: _record(m) for name, m in overall.items()},
            "per_class": {name: [_record(m) for m in some] for name, some in found.per_class.items()},
            "diagnostics": diagnostics,
        },
        influence={name: m.influence for name, m in overall.items() if m.value is not None and m.influence is not None},
        class_influence={
            name: [None if m.value is None else m.influence for m in some] for name, some in found.per_class.items()
        },
        notes=found.notes,
    )


def _record(m: MetricValue) -> dict:
    return {"value": m.value, "standard_error": m.standard_error, "why": m.why}


def _diagnostics(sampled: Sampled, reference: np.ndarray | None, calls: Sequence[ModelEval]) -> dict:
    """`difference` and `clipped` are a number a network call, `difference` None where there was no second pass."""
    values = sampled.values.mean(axis=0)
    pull = [float(d) if d > 0 else None for d in sampled.difference]
    found = {
        "timesteps": [call.t for call in calls],
        "difference": pull if any(d is not None for d in pull) else None,
        "clipped": sampled.clipped.tolist(),
        **dict(zip(VALUES, values.tolist())),
    }
    unknown = dict.fromkeys(("contrast_ratio", "saturation_ratio", "brightness_shift", "extremes_shift"))
    return found | (unknown if reference is None else compared_with_data(values, reference))
