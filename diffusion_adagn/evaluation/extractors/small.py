"""scikit-learn's small network on raw pixels: a classifier of small images, such as the digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...atomic import one_at_a_time
from ...errors import InputError
from . import cache
from .base import Features, check_pixels, described, weights_hash

if TYPE_CHECKING:
    from ...data import ImageDataset

MAX_FLAT_SIDE = 16  # pixels
HIDDEN = 64
RECIPE_VERSION = 1  # of everything that determines the weights


class SklearnExtractor:
    """One hidden layer on pixels / 255. Its 64 activations are the features.

    The probabilities are over the data's classes, and 0 for a class without images.
    """

    name = "sklearn"
    resize = "none"
    is_fid = False

    def __init__(self, weights: dict[str, np.ndarray], facts: dict):
        """weights: float32 w0 [H*W*C, 64], b0 [64], w1 [64, K'] ([64, 1] for two classes), b1.

        facts: JSON values: shape (H, W, C of an image), classes (ids of the K' trained ones, ascending), class_names,
        and others for the record.
        """
        self.weights, self.facts = weights, facts
        self.class_names = tuple(facts["class_names"])
        self.dimension = HIDDEN
        self.resolution = facts["shape"][0]
        settings = {key: facts[key] for key in ("shape", "classes", "class_names")}
        self.hash = weights_hash(weights, {"name": self.name, "version": RECIPE_VERSION, **settings})

    def __call__(self, pixels: np.ndarray) -> Features:
        shape = list(check_pixels(pixels).shape[1:])
        if shape != self.facts["shape"]:
            raise InputError(
                f"the extractor sklearn was trained on images {self.facts['shape']} [H, W, C], not {shape}."
            )
        x = pixels.reshape(len(pixels), -1).astype(np.float32) / 255
        pooled = np.maximum(x @ self.weights["w0"] + self.weights["b0"], 0)
        logits = pooled @ self.weights["w1"] + self.weights["b1"]
        if logits.shape[1] == 1:  # two classes: one logit, for the second
            logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = np.zeros((len(pixels), len(self.class_names)), np.float32)
        probabilities[:, self.facts["classes"]] = odds / odds.sum(axis=1, keepdims=True)
        return Features(pooled, probabilities)

    def to_dict(self) -> dict:
        return described(self) | self.facts


def open_sklearn(dataset: ImageDataset) -> SklearnExtractor:
    """The extractor of these images: trained in seconds at first use, and cached.

    Raises InputError for large images.
    """
    if dataset.image_size > MAX_FLAT_SIDE:
        raise InputError(
            f"the extractor sklearn is for images of at most {MAX_FLAT_SIDE} pixels, and those of {dataset.name} have "
            f"{dataset.image_size}: type classifier."
        )
    folder = cache.folder_for(dataset, "sklearn", RECIPE_VERSION)
    cached = cache.read(folder)
    if cached is not None and set(cached[0]) == {"w0", "b0", "w1", "b1"}:
        return SklearnExtractor(*cached)
    with one_at_a_time(folder):
        cached = cache.read(folder)  # another process may have trained it during the wait
        if cached is None or set(cached[0]) != {"w0", "b0", "w1", "b1"}:
            cached = _trained(dataset)
            cache.save(folder, *cached)
    return SklearnExtractor(*cached)


def _trained(dataset: ImageDataset) -> tuple[dict[str, np.ndarray], dict]:
    """(weights, facts); 5 % of the images are held out for the accuracy."""
    from ...data.store import split_off

    learned, heldout = split_off(dataset.labels, 0.05)
    pixels, labels = dataset.gather(learned)
    classes = np.unique(labels)
    if len(classes) < 2 or not len(heldout):
        raise InputError(
            f"{dataset.name} has {len(dataset)} images, of {len(classes)} class(es) to learn from: too few. Expected images of two or "
            "more to learn from and to be tested on. Use an extractor that needs no labels: efficientnet:PATH.safetensors, inception "
            "or dinov2:FOLDER."
        )
    facts = {
        "shape": list(pixels.shape[1:]),
        "classes": classes.tolist(),
        "class_names": list(dataset.label_space.names),
        "data": dataset.name,
        "fingerprint": dataset.fingerprint,
        "trained_pictures": len(learned),
        "heldout_images": len(heldout),
    }
    weights = _fit(pixels, labels)
    pixels, labels = dataset.gather(heldout)
    predicted = SklearnExtractor(weights, facts)(pixels).probabilities.argmax(1)
    return weights, facts | {"heldout_accuracy": float((predicted == labels).mean())}


def _fit(pixels: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    network = MLPClassifier((HIDDEN,), random_state=0, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(pixels.reshape(len(pixels), -1).astype(np.float32) / 255, labels)
    (w0, w1), (b0, b1) = network.coefs_, network.intercepts_
    return {name: np.asarray(w, np.float32) for name, w in {"w0": w0, "b0": b0, "w1": w1, "b1": b1}.items()}
