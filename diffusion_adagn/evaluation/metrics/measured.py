"""The value of a metric, and the checks of features that all metrics share."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from ...errors import InputError

BLOCK_IMAGES = 2048  # a block of pairs is 32 MB


@dataclass(frozen=True)
class MetricValue:
    """The value of a metric of N sampled images.

    Args:
        value: None if it could not be computed.
        influence: float64 [N], mean 0; None without a value. If the sampled images are resampled with replacement,
            the value changes by about the mean of the drawn influences (first order, with a fixed reference).
        standard_error: The spread of the value over sets of sampled images; None for fewer than two images.
        why: Why there is no value, or a warning about it.
    """

    value: float | None
    influence: np.ndarray | None = field(repr=False)
    standard_error: float | None
    why: str = ""

    @classmethod
    def unavailable(cls, why: str) -> "MetricValue":
        return cls(None, None, None, why)

    @classmethod
    def of(cls, value: float, influence: np.ndarray, why: str = "") -> "MetricValue":
        """A value with the standard error of its influence: the standard deviation / sqrt(N)."""
        n = len(influence)
        influence = np.asarray(influence, dtype=np.float64)
        influence = influence - influence.mean()
        return cls(float(value), influence, float(influence.std(ddof=1) / n**0.5) if n > 1 else None, why)

    def to_dict(self) -> dict:
        """JSON values, without the influence."""
        return {"value": self.value, "standard_error": self.standard_error, "why": self.why}

    def within(self, labels: np.ndarray) -> "MetricValue":
        """The same value with the standard error for a fixed number of images per class. labels: [N].

        Differences between classes then add no spread.
        """
        n, (classes, place) = len(labels), np.unique(labels, return_inverse=True)
        if self.influence is None or n <= len(classes):
            return self
        means = np.bincount(place, self.influence) / np.bincount(place)
        influence = self.influence - means[place]
        error = float(np.sqrt(np.square(influence).sum() / (n - len(classes)) / n))
        return replace(self, influence=influence, standard_error=error)


def checked(features: np.ndarray, of: str = "the images") -> np.ndarray:
    """The features [N, D], C-contiguous and writeable, as torch requires.

    Raises InputError for other shapes and for nan.
    """
    features = np.require(features, requirements=["C", "W"])
    fault = ""
    if features.ndim != 2 or not all(features.shape):
        fault = f"have the shape {list(features.shape)}; expected [N, D], one row an image"
    elif bad := sum(int((~np.isfinite(features[rows]).all(1)).sum()) for rows in blocks(len(features))):
        fault = (
            f"contain nan or inf, in {bad:,} of {len(features):,} images, so no metric can be computed. Inspect those images, and extract "
            "the features again in float32"
        )
    if fault:
        raise InputError(f"the features of {of} {fault}.")
    return features


def same_extractor(x: int, y: int) -> None:
    """Raises InputError if images and reference have different numbers of features."""
    if x != y:
        raise InputError(
            f"the sampled images have {x:,} features and the reference {y:,}: they were made with another extractor. "
            "Extract both with the same one."
        )


def blocks(n: int, size: int = BLOCK_IMAGES) -> Iterator[slice]:
    """Slices of 0..n-1, each of at most `size`."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def checked_labels(labels: np.ndarray, n: int) -> np.ndarray:
    """The labels as int64 [n]. Raises InputError if they are not n integers."""
    labels = np.asarray(labels)
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"the labels are {labels.dtype} of shape {list(labels.shape)}; expected one integer for each of {n:,} images."
        )
    return labels.astype(np.int64)
