"""Metrics of class probabilities: the inception score and the class accuracy."""

import numpy as np
import torch

from ...errors import InputError
from .measured import MetricValue, checked, checked_labels

MIN_IMAGES_PER_CLASS = 10  # with fewer images per class, an inception score has a warning


def _probabilities(probabilities: np.ndarray) -> np.ndarray:
    """The probabilities as float64 [N, K]. Raises InputError if a row does not sum to 1."""
    p = checked(probabilities).astype(np.float64)
    sums = p.sum(1)
    if p.min() < 0 or np.abs(sums - 1).max() > 1e-3:
        raise InputError(
            f"probabilities lie in 0..1 and sum to 1 for each image; these begin at {p.min():.3g} and sum to "
            f"{sums.min():.3g}..{sums.max():.3g}. Take the softmax of logits."
        )
    return p


def inception_score(probabilities: np.ndarray) -> MetricValue:
    """The inception score: exp of the mean KL(p || mean p), between 1 and K.

    It uses all images at once, without splits.

    Source: Salimans et al. 2016.

    Args:
        probabilities: [N, K], class probabilities.
    """
    p = _probabilities(probabilities)
    n, k = p.shape
    mean = p.mean(0)
    divergence = torch.special.xlogy(torch.from_numpy(p), torch.from_numpy(p)).sum(1).numpy()
    divergence = divergence - p @ np.log(np.where(mean > 0, mean, 1))
    score = float(np.exp(divergence.mean()))
    why = (
        f"{n:,} images for {k:,} classes: below {MIN_IMAGES_PER_CLASS} a class the score is too low"
        if n < MIN_IMAGES_PER_CLASS * k
        else ""
    )
    return MetricValue.of(score, score * (divergence - divergence.mean()), why)


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> MetricValue:
    """The fraction of images whose most probable class is their label.

    Images with labels outside 0..K-1 (null) are excluded and have no influence. The other images then have weight
    N / (number of counted images).

    Args:
        probabilities: [N, K].
        labels: int64 [N].

    Raises:
        InputError: The number of labels is not N.
    """
    p = _probabilities(probabilities)
    n, k = p.shape
    labels = checked_labels(labels, n)
    counts = (labels >= 0) & (labels < k)
    excluded = n - int(counts.sum())
    if excluded == n:
        return MetricValue.unavailable(f"none of the {n:,} labels is one of the {k:,} classes")
    right = p.argmax(1) == labels
    value = right[counts].mean()
    why = f"{excluded:,} of {n:,} images have no label among the {k:,} classes and do not count" if excluded else ""
    return MetricValue.of(value, counts * (right - value) * (n / (n - excluded)), why)
