"""All metrics at once, over all images and per class, against a reference that is prepared once."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from tqdm.auto import tqdm

from ...errors import InputError
from . import METRICS
from .classified import accuracy, inception_score
from .gaussian import Gaussian, frechet, singular
from .kernel import KernelReference, kid
from .measured import MetricValue, checked, checked_labels, same_extractor
from .neighbours import precision_recall, radii

MIN_CLASS_IMAGES = 50  # with fewer images of a class, its metrics have a warning
MAX_NAMED_CLASSES = 5  # classes that a note names; it counts the others
BY_CLASS = ("frechet", "kid", "accuracy")
STATISTICS_ONLY = (
    "the reference is a mean and a covariance alone, which serve only frechet; give its images to measure this"
)
NO_PROBABILITIES = "the extractor is no classifier"
NO_CLASSIFIER = "no classifier available; accuracy not computed"
NO_LABELS = "the images are of no class, or their labels are not known"


class Target:
    """The reference with which images are compared. Expensive parts are computed at the first use and cached.

    Args:
        features: [M, D], of the reference's images.
        labels: int64 [M], for metrics per class; None without labels.
        k: Neighbours of precision, recall, density and coverage.
        device: The device that computes all metrics.

    Raises:
        InputError: The features are not finite, or the number of labels is not M.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray | None = None, k: int = 5, device: str = "cpu"):
        self.features = checked(features, "the reference")
        self.labels = None if labels is None else checked_labels(labels, len(self.features))
        self.k, self.device = k, device
        self._radii: dict[int, np.ndarray] = {}
        self._classes: dict[int, Target | None] = {}

    @classmethod
    def of_gaussian(cls, gaussian: Gaussian, device: str = "cpu") -> "Target":
        """A target of published statistics without images. Only the Frechet distance has a value."""
        target = cls.__new__(cls)
        target.features = target.labels = None
        target.k, target.device, target.gaussian = 5, device, gaussian
        target._radii, target._classes = {}, {}
        return target

    @property
    def dimension(self) -> int:
        """D, the number of features."""
        return len(self.gaussian.mean) if self.features is None else self.features.shape[1]

    @cached_property
    def gaussian(self) -> Gaussian:
        return Gaussian.of(self.features, self.device)

    @cached_property
    def kernel(self) -> KernelReference:
        return KernelReference(self.features, self.device)

    def radii(self, k: int, progress: bool = False) -> np.ndarray:
        """The distance of each image to its k-th nearest neighbour, float64 [M]."""
        if k not in self._radii:
            self._radii[k] = radii(self.features, k, self.device, progress=progress)
        return self._radii[k]

    def of_class(self, label: int) -> "Target | None":
        """The target of one class; None if it has no images."""
        if label not in self._classes:
            members = self.labels == label
            self._classes[label] = Target(self.features[members], None, self.k, self.device) if members.any() else None
        return self._classes[label]


@dataclass(frozen=True)
class Measurement:
    """All metrics of a set of images.

    Args:
        overall: Each of METRICS over all N images.
        per_class: frechet, kid and accuracy, one value per class; {} if not requested, or without labels or classes.
            The influences of a class are in the order of its images.
        notes: Sentences on missing or unreliable values.
    """

    overall: dict[str, MetricValue]
    per_class: dict[str, list[MetricValue]]
    notes: list[str]


def measure(
    pooled: np.ndarray,
    probabilities: np.ndarray | None,
    labels: np.ndarray | None,
    target: Target,
    class_names: list[str] | None,
    k: int | None = None,
    per_class: bool = True,
    progress: bool = False,
    own: np.ndarray | None = None,
) -> Measurement:
    """Compute all metrics of a set of images.

    With labels, standard errors are for a fixed number of images per class.

    Args:
        pooled: [N, D], the features.
        probabilities: [N, K], over class_names, for the accuracy; None without a classifier.
        labels: int64 [N], the class of each image, 0..len(class_names)-1; None without labels. Images with other
            labels (null) count overall, but not in a class or in the accuracy.
        target: The reference.
        class_names: The classes; None without classes.
        k: Neighbours of precision, recall, density and coverage; None: the target's.
        per_class: Compute the metrics per class too.
        progress: Show a progress bar.
        own: The extractor's own probabilities, over any classes, for the inception score; None: `probabilities`.

    Raises:
        InputError: The features are not finite or have another dimension than the target's, or the number of rows of
            probabilities or labels is not N.
    """
    pooled, k = checked(pooled, "the sampled images"), target.k if k is None else k
    n = len(pooled)
    same_extractor(pooled.shape[1], target.dimension)
    labels = None if labels is None else checked_labels(labels, n)
    if probabilities is not None and len(probabilities) != n:
        raise InputError(
            f"there are {n:,} images, but probabilities of {len(probabilities):,}; expected one row an image."
        )
    own = probabilities if own is None else own
    values = _by_features(pooled, target, k, progress)
    values["inception_score"] = MetricValue.unavailable(NO_PROBABILITIES) if own is None else inception_score(own)
    values["accuracy"] = _accuracy(probabilities, labels, class_names)
    overall = {name: values[name] if labels is None else values[name].within(labels) for name in METRICS}
    classes, notes = {}, _blanks(overall)
    if per_class and labels is not None and class_names is not None:
        classes = _by_class(pooled, probabilities, labels, target, class_names, progress)
        notes += _class_notes(labels, target, class_names)
    return Measurement(overall, classes, notes)


def _by_features(pooled: np.ndarray, target: Target, k: int, progress: bool) -> dict[str, MetricValue]:
    values = {"frechet": _frechet(pooled, target)}
    if target.features is None:
        return values | {
            name: MetricValue.unavailable(STATISTICS_ONLY)
            for name in ("kid", "precision", "recall", "density", "coverage")
        }
    values["kid"] = kid(pooled, target.kernel, progress=progress)
    enough = 1 <= k < min(len(pooled), len(target.features))
    known = target.radii(k, progress) if enough else None
    return values | precision_recall(pooled, target.features, k, known, target.device, progress=progress)


def _frechet(pooled: np.ndarray, target: Target) -> MetricValue:
    if target.features is not None and (why := singular(*pooled.shape, len(target.features))):
        # before the [D, D] matrices of perhaps a thousand classes are computed and cached
        return MetricValue.unavailable(why)
    return frechet(pooled, target.gaussian, target.device)


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
    target: Target,
    class_names: list[str],
    progress: bool,
) -> dict[str, list[MetricValue]]:
    values: dict[str, list[MetricValue]] = {name: [] for name in BY_CLASS}
    for label, name in enumerate(tqdm(class_names, desc="classes", unit="class", leave=False, disable=not progress)):
        members = labels == label
        if not members.any():
            one = dict.fromkeys(BY_CLASS, MetricValue.unavailable(f"no image of the class {name} was sampled"))
        else:
            one = _against(pooled[members], target, label, name)
            class_probabilities = None if probabilities is None else probabilities[members]
            class_accuracy = _accuracy(class_probabilities, labels[members], class_names)
            one["accuracy"] = _warned(class_accuracy, _few(int(members.sum())))
        for metric, measured in one.items():
            values[metric].append(measured)
    return values


def _against(pooled: np.ndarray, target: Target, label: int, name: str) -> dict[str, MetricValue]:
    """frechet and kid of the images of one class against the reference images of that class."""

    def unavailable(why: str) -> dict[str, MetricValue]:
        return {metric: MetricValue.unavailable(why) for metric in ("frechet", "kid")}

    if target.labels is None:
        return unavailable("the reference has no labels, so its images of one class are not known")
    reference = target.of_class(label)
    if reference is None:
        return unavailable(f"no image of the reference is of the class {name}")
    if len(reference.features) < 2:
        return unavailable(f"one image of the reference is of the class {name}; it takes two or more")
    few = _few(len(pooled), len(reference.features))
    values = {"frechet": _frechet(pooled, reference), "kid": kid(pooled, reference.kernel)}
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


def _class_notes(labels: np.ndarray, target: Target, class_names: list[str]) -> list[str]:
    """Sentences on classes with few sampled or reference images, and on classes without reference images."""
    sampled = [(name, int((labels == label).sum())) for label, name in enumerate(class_names)]
    notes = [
        _listed(
            f"Fewer than {MIN_CLASS_IMAGES} sampled images",
            [f"{name} ({n})" for name, n in sampled if n < MIN_CLASS_IMAGES],
        )
    ]
    if target.labels is None:
        return [*filter(None, notes), "The reference has no labels, so classes are measured by accuracy alone."]
    reference = [(name, int((target.labels == label).sum())) for label, name in enumerate(class_names)]
    few = [f"{name} ({n})" for name, n in reference if 0 < n < MIN_CLASS_IMAGES]
    notes.append(_listed(f"Fewer than {MIN_CLASS_IMAGES} reference images", few))
    notes.append(_listed("No reference image", [name for name, n in reference if not n]))
    return [*filter(None, notes)]


def _listed(what: str, classes: list[str]) -> str:
    """ "what: cat (12), dog (3) and 4 more classes."; "" without any."""
    more = len(classes) - MAX_NAMED_CLASSES
    tail = f" and {more} more class{'es' * (more > 1)}" if more > 0 else ""
    return f"{what}: {', '.join(classes[:MAX_NAMED_CLASSES])}{tail}." if classes else ""
