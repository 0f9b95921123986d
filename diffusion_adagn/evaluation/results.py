"""The results of a set of images: all metrics against real ones, over all images and per class, and diagnostics."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import numpy as np
from tqdm.auto import tqdm

from ..diffusion.schedule import ModelEval
from ..errors import InputError
from ..version import __version__
from .diagnostics import VALUES, compared_with_data
from .features import FeatureSet
from .metrics import METRICS, MetricValue, accuracy, frechet, inception_score, kid, precision_recall
from .metrics.gaussian import singular
from .metrics.measured import checked, same_extractor
from .points import Sampled
from .setup import EvalSetup

MIN_CLASS_IMAGES = 50  # with fewer images of a class, its metrics have a warning
MAX_NAMED_CLASSES = 5  # classes that a note names; it counts the others
BY_CLASS = ("frechet", "kid", "accuracy")
STATISTICS_ONLY = (
    "the reference is a mean and a covariance alone, which serve only frechet; give its images to measure this"
)
NO_PROBABILITIES = "the extractor is no classifier"
NO_CLASSIFIER = "no classifier available; accuracy not computed"
NO_LABELS = "the images are of no class, or their labels are not known"


def versions() -> dict[str, str]:
    """The versions of this package and of the libraries that computed the results."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "numpy")}
    return {"diffusion_adagn": __version__, "python": platform.python_version(), **libraries}


@dataclass(frozen=True)
class Results:
    """The results of a set of N images.

    Args:
        overall: Each of METRICS over all images; {} without an extractor.
        per_class: frechet, kid and accuracy, one value per class; {} if not requested, or without labels or classes.
            The influences of a class are in the order of its images.
        notes: Sentences on missing or unreliable values.
        diagnostics: JSON values.
    """

    overall: dict[str, MetricValue] = field(default_factory=dict)
    per_class: dict[str, list[MetricValue]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    diagnostics: dict = field(default_factory=dict)

    @property
    def row(self) -> dict:
        """JSON values with the keys "metrics", "per_class" and "diagnostics"."""
        return {
            "metrics": {name: m.to_dict() for name, m in self.overall.items()},
            "per_class": {name: [m.to_dict() for m in values] for name, values in self.per_class.items()},
            "diagnostics": self.diagnostics,
        }


def results(
    sampled: Sampled, setup: EvalSetup, calls: Sequence[ModelEval], k: int = 5, progress: bool = False
) -> Results:
    """Compute the metrics and diagnostics of a point.

    Args:
        sampled: The sampled images.
        setup: Without an extractor, there are diagnostics only; without a reference, they are not compared.
        calls: The network calls of the point; () for images that were not sampled here.
        k: Neighbours of precision, recall, density and coverage.
        progress: Show a progress bar.
    """
    reference, classifier = setup.reference, setup.classifier
    diagnostics = _diagnostics(sampled, None if reference is None else reference.values, calls)
    if setup.extractor is None:
        return Results(diagnostics=diagnostics)
    probabilities = None if classifier is None else sampled.features[classifier.name].probabilities
    images = sampled.features[setup.extractor.name]
    measured = measure(images, reference, list(setup.class_names) or None, probabilities, k, progress=progress)
    return replace(measured, diagnostics=diagnostics)


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


def measure(
    images: FeatureSet,
    reference: FeatureSet,
    class_names: list[str] | None,
    probabilities: np.ndarray | None = None,
    k: int = 5,
    per_class: bool = True,
    progress: bool = False,
) -> Results:
    """Compute all metrics of a set of images.

    With labels, standard errors are for a fixed number of images per class.

    Args:
        images: Their features, labels (ids of class_names; others, such as null, count overall, but not in a class or in
            the accuracy), and the extractor's own probabilities, for the inception score.
        reference: The real images.
        class_names: The classes; None without classes.
        probabilities: [N, K], over class_names, for the accuracy, and for the inception score if the extractor has none;
            None without a classifier.
        k: Neighbours of precision, recall, density and coverage.
        per_class: Compute the metrics per class too.
        progress: Show a progress bar.

    Raises:
        InputError: The features are not finite or have another dimension than the reference's, or the number of rows of
            probabilities or labels is not N.
    """
    pooled, labels = checked(images.pooled, "the sampled images"), images.labels
    same_extractor(pooled.shape[1], reference.dimension)
    if probabilities is not None and len(probabilities) != len(pooled):
        raise InputError(
            f"there are {len(pooled):,} images, but probabilities of {len(probabilities):,}; expected one row an image."
        )
    own = probabilities if images.probabilities is None else images.probabilities
    values = _by_features(pooled, reference, k, progress)
    values["inception_score"] = MetricValue.unavailable(NO_PROBABILITIES) if own is None else inception_score(own)
    values["accuracy"] = _accuracy(probabilities, labels, class_names)
    overall = {name: values[name] if labels is None else values[name].within(labels) for name in METRICS}
    classes, notes = {}, _blanks(overall)
    if per_class and labels is not None and class_names is not None:
        classes = _by_class(pooled, probabilities, labels, reference, class_names, progress)
        notes += _class_notes(labels, reference, class_names)
    return Results(overall, classes, notes)


def _by_features(pooled: np.ndarray, reference: FeatureSet, k: int, progress: bool) -> dict[str, MetricValue]:
    values = {"frechet": _frechet(pooled, reference)}
    if reference.pooled is None:
        return values | {
            name: MetricValue.unavailable(STATISTICS_ONLY)
            for name in ("kid", "precision", "recall", "density", "coverage")
        }
    values["kid"] = kid(pooled, reference.kernel, progress=progress)
    enough = 1 <= k < min(len(pooled), len(reference.pooled))
    known = reference.radii(k, progress) if enough else None
    return values | precision_recall(pooled, reference.pooled, k, known, reference.device, progress=progress)


def _frechet(pooled: np.ndarray, reference: FeatureSet) -> MetricValue:
    if reference.pooled is not None and (why := singular(*pooled.shape, len(reference.pooled))):
        # before the [D, D] matrices of perhaps a thousand classes are computed and cached
        return MetricValue.unavailable(why)
    return frechet(pooled, reference.gaussian, reference.device)


def _accuracy(
    probabilities: np.ndarray | None, labels: np.ndarray | None, class_names: list[str] | None
) -> MetricValue:
    if labels is None or (class_names is not None and not (labels < len(class_names)).any()):
        return MetricValue.unavailable(NO_LABELS)
    if probabilities is None:
        return MetricValue.unavailable(NO_CLASSIFIER)
    num_classes = probabilities.shape[1]
    if class_names is not None and num_classes != len(class_names):
        return MetricValue.unavailable(f"the classifier has {num_classes:,} classes, the images {len(class_names):,}")
    return accuracy(probabilities, labels)


def _by_class(
    pooled: np.ndarray,
    probabilities: np.ndarray | None,
    labels: np.ndarray,
    reference: FeatureSet,
    class_names: list[str],
    progress: bool,
) -> dict[str, list[MetricValue]]:
    values: dict[str, list[MetricValue]] = {name: [] for name in BY_CLASS}
    for label, name in enumerate(tqdm(class_names, desc="classes", unit="class", leave=False, disable=not progress)):
        members = labels == label
        if not members.any():
            one = dict.fromkeys(BY_CLASS, MetricValue.unavailable(f"no image of the class {name} was sampled"))
        else:
            one = _against(pooled[members], reference, label, name)
            class_probabilities = None if probabilities is None else probabilities[members]
            class_accuracy = _accuracy(class_probabilities, labels[members], class_names)
            one["accuracy"] = _warned(class_accuracy, _few(int(members.sum())))
        for metric, measured in one.items():
            values[metric].append(measured)
    return values


def _against(pooled: np.ndarray, reference: FeatureSet, label: int, name: str) -> dict[str, MetricValue]:
    """frechet and kid of the images of one class against the reference images of that class."""

    def unavailable(why: str) -> dict[str, MetricValue]:
        return {metric: MetricValue.unavailable(why) for metric in ("frechet", "kid")}

    if reference.labels is None:
        return unavailable("the reference has no labels, so its images of one class are not known")
    real = reference.of_class(label)
    if real is None:
        return unavailable(f"no image of the reference is of the class {name}")
    if len(real.pooled) < 2:
        return unavailable(f"one image of the reference is of the class {name}; it takes two or more")
    few = _few(len(pooled), len(real.pooled))
    values = {"frechet": _frechet(pooled, real), "kid": kid(pooled, real.kernel)}
    return {metric: _warned(measured, few) for metric, measured in values.items()}


def _few(sampled: int, reference: int = MIN_CLASS_IMAGES) -> str:
    """A warning about too few images; "" if there are enough."""
    if sampled < MIN_CLASS_IMAGES:
        return f"{_count_images(sampled)}: the spread is large"
    return f"{_count_images(reference)} of the reference: the spread is large" if reference < MIN_CLASS_IMAGES else ""


def _count_images(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"


def _warned(measured: MetricValue, warning: str) -> MetricValue:
    """The same metric with the warning, if it has a value."""
    if measured.value is None or not warning:
        return measured
    return replace(measured, why="; ".join(filter(None, (warning, measured.why))))


def _blanks(overall: dict[str, MetricValue]) -> list[str]:
    """One sentence for each distinct reason or warning."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for name, measured in overall.items():
        if measured.why:
            groups.setdefault((measured.why, measured.value is None), []).append(METRICS[name].title)
    return [
        f"{', '.join(titles)}{' not computed' * unavailable}: {why}." for (why, unavailable), titles in groups.items()
    ]


def _class_notes(labels: np.ndarray, reference: FeatureSet, class_names: list[str]) -> list[str]:
    """Sentences on classes with few sampled or reference images, and on classes without reference images."""
    sampled = [(name, int((labels == label).sum())) for label, name in enumerate(class_names)]
    notes = [
        _listed(
            f"Fewer than {MIN_CLASS_IMAGES} sampled images",
            [f"{name} ({n})" for name, n in sampled if n < MIN_CLASS_IMAGES and any(n for _, n in sampled)],
        )
    ]
    if reference.labels is None:
        return [*filter(None, notes), "The reference has no labels, so classes are measured by accuracy alone."]
    real = [(name, int((reference.labels == label).sum())) for label, name in enumerate(class_names)]
    few = [f"{name} ({n})" for name, n in real if 0 < n < MIN_CLASS_IMAGES]
    notes.append(_listed(f"Fewer than {MIN_CLASS_IMAGES} reference images", few))
    notes.append(_listed("No reference image", [name for name, n in real if not n]))
    return [*filter(None, notes)]


def _listed(what: str, classes: list[str]) -> str:
    """ "what: cat (12), dog (3) and 4 more classes."; "" without any."""
    more = len(classes) - MAX_NAMED_CLASSES
    tail = f" and {more} more class{'es' * (more > 1)}" if more > 0 else ""
    return f"{what}: {', '.join(classes[:MAX_NAMED_CLASSES])}{tail}." if classes else ""
