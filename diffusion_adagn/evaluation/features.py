"""Features of images: what extractors give, and what sampled and real images are compared by."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from pydantic import StrictInt, StrictStr

from ..atomic import atomic_write
from ..errors import InputError
from ..renamed import extractor_name
from ..schema import as_document, document
from .metrics import Gaussian, KernelReference, radii
from .metrics.measured import checked_labels

FILE_VERSION = 1  # files of another version are computed again
ARRAYS = {"features": "pooled", "labels": "labels", "values": "values", "indices": "indices"}  # in a file: attribute
CORRUPTED = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    MemoryError,
    RecursionError,
    zipfile.BadZipFile,
)


@document
class FeaturesAbout:
    """What is checked of the origin of saved features."""

    name: StrictStr
    count: StrictInt | None
    extractor: dict[str, Any] | None


@document
class FeaturesHead:
    """The head of an .npz of features, which is JSON text."""

    version: StrictInt
    class_names: tuple[StrictStr, ...]
    about: FeaturesAbout


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of N images, and their statistics, which are computed at the first use.

    An extractor gives `pooled` and `probabilities` of a batch. Real images, with which others are compared, have the rest.

    Args:
        pooled: float32 [N, D]; None if there are only statistics or values.
        probabilities: float32 [N, K], over the extractor's own classes; rows sum to 1. None if it has no classes.
        labels: int64 [N], ids of class_names; other ids for images without a class. None without labels.
        class_names: The classes; () without labels.
        values: float64 [4], the mean of `image_values`; None if unknown.
        about: JSON values: name (of the data), fingerprint, count (N), of (available images), seed, image_size,
            channels, resized, extractor, date.
        indices: int64 [N], indices in the data set; None without one.
        statistics: Published statistics, used for the Frechet distance in place of the features.
        device: The device that computes statistics and metrics, in float64.

    Raises:
        InputError: The number of labels is not N.
    """

    pooled: np.ndarray | None = field(repr=False)
    probabilities: np.ndarray | None = field(default=None, repr=False)
    labels: np.ndarray | None = field(default=None, repr=False)
    class_names: tuple[str, ...] = ()
    values: np.ndarray | None = None
    about: dict = field(default_factory=dict, repr=False)
    indices: np.ndarray | None = field(default=None, repr=False)
    statistics: Gaussian | None = field(default=None, repr=False)
    device: str = "cpu"
    _radii: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)
    _classes: dict[int, FeatureSet | None] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.pooled is not None and self.labels is not None:
            object.__setattr__(self, "labels", checked_labels(self.labels, len(self.pooled)))

    @property
    def dimension(self) -> int:
        """D, the number of features."""
        return len(self.gaussian.mean) if self.pooled is None else self.pooled.shape[1]

    @cached_property
    def gaussian(self) -> Gaussian:
        """Mean and covariance of the features. Raises InputError for fewer than two images."""
        if self.statistics is None and self.pooled is None:
            raise InputError(f"the reference {self.about['name']} has no features: nothing can be measured against it.")
        return self.statistics or Gaussian.of(self.pooled, self.device)

    @cached_property
    def kernel(self) -> KernelReference:
        return KernelReference(self.pooled, self.device)

    def radii(self, k: int, progress: bool = False) -> np.ndarray:
        """The distance of each image to its k-th nearest neighbour, float64 [N]."""
        if k not in self._radii:
            self._radii[k] = radii(self.pooled, k, self.device, progress=progress)
        return self._radii[k]

    def of_class(self, label: int) -> FeatureSet | None:
        """The features of one class; None if it has no images."""
        if label not in self._classes:
            members = self.labels == label
            self._classes[label] = FeatureSet(self.pooled[members], device=self.device) if members.any() else None
        return self._classes[label]

    def check(self, extractor: Extractor) -> None:
        """Raises InputError unless the features are those of this extractor."""
        made_with, name = self.about["extractor"], self.about["name"]
        fault = ""
        if made_with is None:
            fault = f"the reference {name} was made without an extractor: it has no features to measure against"
        elif made_with.get("hash") is None:
            if not extractor.is_fid or self.dimension != extractor.dimension:
                fault = (
                    f"{name} holds {self.dimension} features of the FID's Inception network in statistics; the extractor is "
                    f"{extractor.name} of {extractor.dimension}. Type --extractor inception, or give real images by --against"
                )
        elif made_with["hash"] != extractor.hash:
            measured_with = {"hash": extractor.hash, "dimension": extractor.dimension}
            fault = (
                f"the reference {name} was made with the extractor {extractor_name(made_with['name'])} ({_describe_record(made_with)}), and the images are "
                f"measured with {extractor_name(extractor.name)} ({_describe_record(measured_with)}): distances between the two mean nothing. Type "
                f"--extractor {extractor_name(made_with['name'])} and, if it is trained on data, --data.source with that data; or make the reference "
                "again, with adagn evaluate reference"
            )
        if fault:
            raise InputError(f"{fault}.")

    def save(self, file: Path) -> Path:
        """Save as an .npz without pickled objects, but for the probabilities. `FeatureSet.load` reads it."""
        head = {"version": FILE_VERSION, "class_names": list(self.class_names), "about": self.about}
        arrays = {"head": np.array(json.dumps(head, ensure_ascii=False))}
        arrays |= {key: getattr(self, name) for key, name in ARRAYS.items() if getattr(self, name) is not None}
        if self.statistics is not None:
            s = self.statistics
            arrays |= {"mu": s.mean, "sigma": s.covariance, "behind": np.array(s.count)}
        return atomic_write(file, lambda tmp: np.savez(tmp, **arrays))

    @classmethod
    def load(cls, file: Path) -> FeatureSet:
        """Raises InputError for a file that `save` did not write."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return cls._read({name: arrays[name] for name in arrays.files})
        except CORRUPTED as error:
            raise InputError(f"{file} is no reference: {error}. adagn evaluate reference makes one.") from None

    @classmethod
    def _read(cls, arrays: Mapping[str, np.ndarray]) -> FeatureSet:
        head = json.loads(str(arrays["head"]))
        version = as_document(head, FeaturesHead, "its head").version
        if version != FILE_VERSION:
            raise ValueError(f"it is of version {version}, this program's are of {FILE_VERSION}")
        values = {name: arrays.get(key) for key, name in ARRAYS.items()}
        statistics = Gaussian(arrays["mu"], arrays["sigma"], int(arrays["behind"])) if "mu" in arrays else None
        pooled, labels, k = values["pooled"], values["labels"], len(head["class_names"])
        if pooled is None and statistics is None and values["values"] is None:
            raise ValueError("neither features nor statistics are in it")
        if pooled is not None and (pooled.ndim != 2 or pooled.dtype != np.float32 or not len(pooled)):
            raise ValueError(f"its features are {pooled.dtype} {list(pooled.shape)}, not float32 [M, D]")
        if labels is not None and (labels.shape != (head["about"]["count"],) or labels.min() < 0 or labels.max() >= k):
            raise ValueError(f"its labels are not one of {k} classes for each image")
        return cls(**values, class_names=tuple(head["class_names"]), about=head["about"], statistics=statistics)


@runtime_checkable
class Extractor(Protocol):
    """Computes the features by which images are compared. Users may implement it.

    Attributes:
        name: "judge" (the classifier; the name is part of its hash), "sklearn", "efficientnet_lite0", "inception",
            "dinov2", or the user's own.
        hash: 16 hex digits over the weights and all settings that affect the features (resolution, resizing,
            version).
        dimension: D, the number of pooled features.
        resolution: The side of the square to which images are resized.
        resize: The method, such as "none" or "bilinear with antialiasing".
        class_names: The classes of the probabilities, if they are those of the user's data; else None.
        is_fid: True only for the Inception network of the FID: only its Frechet distance is called FID.
    """

    name: str
    hash: str
    dimension: int
    resolution: int
    resize: str
    class_names: tuple[str, ...] | None
    is_fid: bool

    def __call__(self, pixels: np.ndarray) -> FeatureSet:
        """Extract the features of a batch, uint8 [N, H, W, C], C 1 or 3.

        Images do not affect each other, up to rounding.
        """
        ...

    def to_dict(self) -> dict:
        """A description as JSON values, saved with each result."""
        ...


def _describe_record(record: Mapping[str, Any]) -> str:
    data = f", trained on {record['data']}" if record.get("data") else ""
    return f"{record['hash']}, {record['dimension']} features{data}"
