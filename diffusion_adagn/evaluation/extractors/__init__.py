"""Extractors: the networks whose features are compared, opened by name.

An extractor's own libraries are imported when it is opened.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from ...errors import InputError
from ...renamed import extractor_name
from ..features import Extractor, FeatureSet

if TYPE_CHECKING:
    import torch

    from ...data import ImageDataset

__all__ = ["Extractor", "FeatureSet", "Features", "features_of", "open_extractor"]

Features = FeatureSet  # the old name, for extractors of users

CHOICES = {
    "classifier": "a small network trained on your own labelled images, in minutes, and cached",
    "sklearn": "scikit-learn's small network, for images of at most 16x16 pixels",
    "inception": "the Inception network of the FID (inception:WEIGHTS.pth for a file of yours)",
    "dinov2": "dinov2:FOLDER_OR_HUB_ID, through transformers",
    "efficientnet": "efficientnet:PATH.safetensors, EfficientNet-Lite0 of ImageNet",
}


def open_extractor(
    spec: str, dataset: ImageDataset | None = None, device: str | torch.device = "cpu", progress: bool = True
) -> Extractor:
    """Open an extractor.

    Args:
        spec: One of CHOICES, some with ":ARGUMENT"; the path of a .safetensors file (EfficientNet-Lite0); or
            "package.module:attribute", an `Extractor` or a callable that returns one. The callable receives dataset,
            device and progress if it has these parameters.
        dataset: The labelled images on which "classifier" and "sklearn" are trained.
        device: The device of the network.
        progress: Show a progress bar while training.

    Raises:
        InputError: There is no such extractor, or it cannot be opened.
    """
    word, _, argument = spec.partition(":")
    if spec.endswith(".safetensors") and word not in CHOICES:
        word, argument = "efficientnet", spec
    word = extractor_name(word)
    if word in ("classifier", "sklearn"):
        return _learned(word, argument, spec, dataset, device, progress)
    if word == "inception":
        from .inception import open_inception

        return open_inception(argument or None, device)
    if word == "dinov2":
        from .dinov2 import open_dinov2

        return open_dinov2(argument, device)
    if word == "efficientnet":
        from .efficientnet import open_efficientnet

        return open_efficientnet(argument, device)
    if argument:
        return _of_the_user(spec, dataset, device, progress)
    near = difflib.get_close_matches(word, CHOICES, n=1)
    guess = f" Did you mean {near[0]}?" if near else ""
    raise InputError(f"there is no extractor {spec!r}.{guess} {_choices()}")


def features_of(
    extractor: Extractor, batches: Iterable[np.ndarray], total: int | None = None, progress: bool = True
) -> FeatureSet:
    """The features of all images of the batches (uint8 [N, H, W, C] each), in order.

    total: the number of images, for the progress bar. Raises InputError without images, and for a wrong number of
    features.
    """
    pooled, probabilities = [], []
    with tqdm(desc=extractor.name, unit="image", total=total, disable=not progress, leave=False) as bar:
        for pixels in batches:
            if not len(pixels):
                continue
            features = extractor(pixels)
            if features.pooled.shape != (len(pixels), extractor.dimension):
                raise InputError(
                    f"the extractor {extractor.name} gave features of shape {list(features.pooled.shape)} for {len(pixels)} images: "
                    f"expected [{len(pixels)}, {extractor.dimension}], its dimension."
                )
            pooled.append(features.pooled)
            probabilities.append(features.probabilities)
            bar.update(len(pixels))
    if not pooled:
        raise InputError("there is no image to take features of; expected one at least.")
    known = [p for p in probabilities if p is not None]
    return FeatureSet(np.concatenate(pooled), np.concatenate(known) if len(known) == len(pooled) else None)


def _choices() -> str:
    words = "; ".join(f"{word}: {what}" for word, what in CHOICES.items())
    return f"Extractors are: {words}; or package.module:attribute, one of your own."


def _learned(
    word: str,
    argument: str,
    spec: str,
    dataset: ImageDataset | None,
    device: str | torch.device,
    progress: bool,
) -> Extractor:
    if argument or dataset is None:
        fault = (
            f"takes no argument: it is trained on your data. Type {word}"
            if argument
            else "is trained on labelled images, and none are known: give --data.source NAME_OR_PATH, or another --extractor"
        )
        raise InputError(f"the extractor {spec!r} {fault}.")
    from .classifier import open_classifier, open_sklearn

    return open_sklearn(dataset) if word == "sklearn" else open_classifier(dataset, device, progress)


def _of_the_user(spec: str, dataset: ImageDataset | None, device: str | torch.device, progress: bool) -> Extractor:
    module, _, attribute = spec.partition(":")
    try:
        with _working_folder():
            extractor = importlib.import_module(module)
        for part in attribute.split("."):
            extractor = getattr(extractor, part)
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"the extractor {spec!r} cannot be imported: {error}. {_choices()}") from None
    if callable(extractor) and not _is_extractor(extractor):
        arguments = {"dataset": dataset, "device": device, "progress": progress}
        extractor = extractor(**_accepted_arguments(spec, extractor, arguments))
    if not _is_extractor(extractor) or extractor.is_fid:
        fault = (
            "sets is_fid, which is reserved for the Inception network of the FID: set it to False"
            if _is_extractor(extractor)
            else f"is not an extractor and does not return one, but a {type(extractor).__name__}; one is called with images and has "
            f"{', '.join(Extractor.__annotations__)} and to_dict()"
        )
        raise InputError(f"{spec!r} {fault}.")
    return extractor


def _is_extractor(value: object) -> bool:
    if hasattr(value, "record") and not hasattr(value, "to_dict") and not isinstance(value, type):
        value.to_dict = value.record  # the old name of the method
    return isinstance(value, Extractor) and not isinstance(value, type)


def _accepted_arguments(spec: str, function: Callable, given: dict) -> dict:
    """Those of `given` that the function accepts. Raises InputError if it requires others."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in functions have no signature
        return {}
    known = {key: value for key, value in given.items() if key in parameters}
    try:
        inspect.signature(function).bind(**known)
    except TypeError as error:
        raise InputError(
            f"{spec!r} cannot be called for an extractor: {error}. It may take dataset, device and progress, nothing else "
            "that must be given."
        ) from None
    return known


@contextmanager
def _working_folder():
    """Import from the working directory too, as python -m does and a console script does not."""
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")
