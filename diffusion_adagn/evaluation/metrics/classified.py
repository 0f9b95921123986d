"""Metrics of class probabilities: the inception score, and how many images are what was asked for."""

import numpy as np
import torch

from ...errors import InputError
from .measured import MetricValue, checked, checked_labels

MIN_IMAGES_PER_CLASS = 10  # images for each class, below which an inception score is warned about


def _probabilities(probabilities: np.ndarray) -> np.ndarray:
    """As float64 [N, K]. Raises InputError where rows do not sum to 1."""
    p = checked(probabilities).astype(np.float64)
    sums = p.sum(1)
    if p.min() < 0 or np.abs(sums - 1).max() > 1e-3:
        raise InputError(
            f"probabilities lie in 0..1 and sum to 1 for each image; these begin at {p.min():.3g} and sum to "
            f"{sums.min():.3g}..{sums.max():.3g}. Take the softmax of logits."
        )
    return p


def inception_score(probabilities: np.ndarray) -> MetricValue:
    """exp of the mean KL(p || mean p) of class probabilities [N, K], 1..K (Salimans et al. 2016), over all images at once: no splits."""
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
    """The fraction of images whose most probable class is their label. probabilities: [N, K]; labels: int64 [N].

    Labels outside 0..K-1 (null) do not count and have no influence; an image that does then weighs N / counted. Raises InputError
    where there is not one label an image.
    """
    p = _probabilities(probabilities)
    n, k = p.shape
    labels = checked_labels(labels, n)
    counts = (labels >= 0) & (labels < k)
    left = n - int(counts.sum())
    if left == n:
        return MetricValue.unavailable(f"none of the {n:,} labels is one of the {k:,} classes")
    right = p.argmax(1) == labels
    value = right[counts].mean()
    why = f"{left:,} of {n:,} images have no label among the {k:,} classes and do not count" if left else ""
    return MetricValue.of(value, counts * (right - value) * (n / (n - left)), why)
