"""Cached features of real images, with which sampled images are compared."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import StrictInt, StrictStr

from ..atomic import atomic_write, cache_root
from ..data import ImageDataset
from ..data.npz import read_npz
from ..errors import InputError
from ..schema import as_document, document
from .diagnostics import VALUES, image_values
from .extractors import Extractor, features_of
from .extractors.base import described
from .metrics import Gaussian
from .metrics.measure import Target

FILE_VERSION = 1  # files of another version are computed again
FEATURE_BATCH = 250  # images
UNKNOWN_COUNT = 10**9  # number of images of published statistics, which do not record it
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
class ReferenceAbout:
    """What is checked of the origin of a reference."""

    name: StrictStr
    count: StrictInt | None
    extractor: dict[str, Any] | None


@document
class ReferenceHead:
    """The head of a reference's .npz, which is JSON text."""

    version: StrictInt
    class_names: tuple[StrictStr, ...]
    about: ReferenceAbout


@dataclass(frozen=True)
class Reference:
    """Features and statistics of real images.

    Args:
        features: float32 [M, D]; None if there are only statistics or values.
        labels: int64 [M], ids of class_names, or None.
        class_names: The classes; () without labels.
        values: float64 [4], the mean of `image_values`; None if unknown.
        about: JSON values: name (of the data), fingerprint, count (M), of (available images), seed, image_size,
            channels, resized, extractor, date.
        indices: int64 [M], indices in the data set; None without one.
        statistics: Published statistics, used for the Frechet distance in place of the features.
    """

    features: np.ndarray | None = field(repr=False)
    labels: np.ndarray | None = field(repr=False)
    class_names: tuple[str, ...]
    values: np.ndarray | None
    about: dict = field(repr=False)
    indices: np.ndarray | None = field(default=None, repr=False)
    statistics: Gaussian | None = field(default=None, repr=False)
    _targets: dict[tuple[int, str], Target] = field(default_factory=dict, init=False, repr=False, compare=False)

    def target(self, k: int = 5, device: str = "cpu") -> Target:
        """The target of the metrics, with expensive parts cached. k: neighbours. device: that computes the metrics."""
        if (k, device) not in self._targets:
            if self.features is None:
                if self.statistics is None:
                    raise InputError(
                        f"the reference {self.about['name']} has no features: nothing can be measured against it."
                    )
                target = Target.of_gaussian(self.statistics, device)
            else:
                target = Target(self.features, self.labels, k, device)
                if self.statistics is not None:
                    target.gaussian = self.statistics
            self._targets[k, device] = target
        return self._targets[k, device]

    @property
    def gaussian(self) -> Gaussian:
        """Mean and covariance of the features. Raises InputError for fewer than two images."""
        return self.target().gaussian

    def check(self, extractor: Extractor) -> None:
        """Raises InputError unless the features are those of this extractor."""
        made_with, name = self.about["extractor"], self.about["name"]
        same = made_with is not None and made_with.get("hash") == extractor.hash
        fault = ""
        if made_with is None:
            fault = f"the reference {name} was made without an extractor: it has no features to measure against"
        elif made_with.get("hash") is not None and not same:
            fault = (
                f"the reference {name} was made with the extractor {made_with['name']} ({_describe_record(made_with)}), and the images are "
                f"measured with {extractor.name} ({_describe_record(described(extractor))}): distances between the two mean nothing. Type "
                f"--extractor {made_with['name']} and, if it is trained on data, --data.source with that data; or make the reference "
                "again, with adagn evaluate reference"
            )
        elif made_with.get("hash") is None and (not extractor.is_fid or self.target().dimension != extractor.dimension):
            fault = (
                f"{name} holds {self.target().dimension} features of the FID's Inception network in statistics; the extractor is "
                f"{extractor.name} of {extractor.dimension}. Type --extractor inception, or give real images by --against"
            )
        if fault:
            raise InputError(f"{fault}.")

    def save(self, file: Path) -> Path:
        """Save as an .npz without pickled objects. `Reference.load` reads it."""
        head = {"version": FILE_VERSION, "class_names": list(self.class_names), "about": self.about}
        arrays = {"head": np.array(json.dumps(head, ensure_ascii=False))}
        arrays |= {name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None}
        if self.statistics is not None:
            s = self.statistics
            arrays |= {"mu": s.mean, "sigma": s.covariance, "behind": np.array(s.count)}
        return atomic_write(file, lambda tmp: np.savez(tmp, **arrays))

    @classmethod
    def load(cls, file: Path) -> "Reference":
        """Raises InputError for a file that `save` did not write."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return cls._read({name: arrays[name] for name in arrays.files})
        except CORRUPTED as error:
            raise InputError(f"{file} is no reference: {error}. adagn evaluate reference makes one.") from None

    @classmethod
    def _read(cls, arrays: dict[str, np.ndarray]) -> "Reference":
        head = json.loads(str(arrays["head"]))
        version = as_document(head, ReferenceHead, "its head").version
        if version != FILE_VERSION:
            raise ValueError(f"it is of version {version}, this program's are of {FILE_VERSION}")
        values = {name: arrays.get(name) for name in ARRAYS}
        statistics = Gaussian(arrays["mu"], arrays["sigma"], int(arrays["behind"])) if "mu" in arrays else None
        features, labels, k = values["features"], values["labels"], len(head["class_names"])
        if features is None and statistics is None and values["values"] is None:
            raise ValueError("neither features nor statistics are in it")
        if features is not None and (features.ndim != 2 or features.dtype != np.float32 or not len(features)):
            raise ValueError(f"its features are {features.dtype} {list(features.shape)}, not float32 [M, D]")
        if labels is not None and (labels.shape != (head["about"]["count"],) or labels.min() < 0 or labels.max() >= k):
            raise ValueError(f"its labels are not one of {k} classes for each image")
        return cls(**values, class_names=tuple(head["class_names"]), about=head["about"], statistics=statistics)


ARRAYS = ("features", "labels", "values", "indices")


def reference_of(
    dataset: ImageDataset, extractor: Extractor | None, count: int = 10_000, seed: int = 0, progress: bool = True
) -> Reference:
    """The reference of a data set, cached in DIFFUSION_ADAGN_CACHE.

    Args:
        dataset: The real images.
        extractor: The extractor; None: only `values` are computed.
        count: The maximum number of images, drawn by `some_of`.
        seed: Of the draw.
        progress: Show a progress bar.

    Raises:
        InputError: count is less than 1, or the cache cannot be written.
    """
    key_parts = [FILE_VERSION, dataset.fingerprint, extractor and extractor.hash, min(count, len(dataset)), seed]
    file = references_folder() / f"{hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()[:16]}.npz"
    try:
        cached = Reference.load(file)
        if extractor is None or _is_current(cached, dataset, extractor):
            return replace(cached, about=cached.about | {"name": dataset.name})  # the same images, elsewhere
    except InputError:  # missing or corrupted
        pass
    indices = some_of(dataset.labels, count, seed)
    about = {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "of": len(dataset),
        "seed": seed,
        "image_size": dataset.image_size,
        "channels": dataset.channels,
        "resized": dataset.resized,
    }
    batches = (dataset.gather(indices[i : i + FEATURE_BATCH])[0] for i in range(0, len(indices), FEATURE_BATCH))
    names = dataset.label_space.names
    reference = _made(batches, len(indices), dataset.labels[indices], names, about, extractor, indices, progress)
    try:
        reference.save(file)
    except OSError as error:
        raise InputError(
            f"the reference cannot be saved in {file.parent}: {error}. Set DIFFUSION_ADAGN_CACHE."
        ) from None
    return reference


def _is_current(cached: Reference, dataset: ImageDataset, extractor: Extractor) -> bool:
    """Whether the extractor reproduces the cached features: its code may have changed under the same hash."""
    first_rows = cached.features[:4]
    now = extractor(dataset.gather(cached.indices[:4])[0]).pooled
    return now.shape == first_rows.shape and np.allclose(
        now, first_rows, rtol=1e-2, atol=1e-3 * np.abs(first_rows).max()
    )


def reference_of_images(
    pixels: np.ndarray,
    labels: np.ndarray | None,
    class_names: tuple[str, ...],
    name: str,
    extractor: Extractor,
    progress: bool = True,
) -> Reference:
    """The reference of all these images, uint8 [M, H, W, C], not cached.

    labels: int64 [M], ids of class_names, or None.

    Raises InputError if the images are not squares.
    """
    if pixels.shape[1] != pixels.shape[2]:
        raise InputError(f"the images of {name} are {pixels.shape[2]}x{pixels.shape[1]}: expected squares.")
    about = {
        "name": name,
        "fingerprint": hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest(),
        "of": len(pixels),
        "seed": None,
        "image_size": pixels.shape[1],
        "channels": pixels.shape[3],
        "resized": "",
    }
    batches = (pixels[i : i + FEATURE_BATCH] for i in range(0, len(pixels), FEATURE_BATCH))
    return _made(batches, len(pixels), labels, class_names, about, extractor, None, progress)


def published(file: Path, extractor: Extractor, progress: bool = True) -> Reference | None:
    """The reference in an .npz with statistics of the FID's Inception network, mu [D] and sigma [D, D].

    The file may contain images too (arr_0). As in the ADM evaluator, the Frechet distance uses the statistics. Other
    metrics use the images.

    Args:
        file: The .npz.
        extractor: The extractor.
        progress: Show a progress bar.

    Returns:
        The reference; None if the file has no statistics.

    Raises:
        InputError: The file cannot be read, or it has no images and the extractor is not the Inception network.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if not {"mu", "sigma"} <= set(arrays.files):
                return None
            statistics = Gaussian(arrays["mu"], arrays["sigma"], UNKNOWN_COUNT)
            images = "arr_0" in arrays.files
    except CORRUPTED as error:
        raise InputError(
            f"{file} cannot be read: {error}. Expected mu [D] and sigma [D, D], or images arr_0."
        ) from None
    if images:
        pixels = read_npz(file).pixels
        reference = reference_of_images(pixels, None, (), str(file), extractor, progress)
        fits = extractor.is_fid and extractor.dimension == len(statistics.mean)
        return replace(reference, statistics=statistics) if fits else reference
    about = {
        "name": str(file),
        "fingerprint": hashlib.sha256(statistics.mean.tobytes() + statistics.covariance.tobytes()).hexdigest(),
        "count": None,
        "extractor": {"name": "inception", "hash": None, "dimension": len(statistics.mean), "is_fid": True},
        "date": None,
    }
    reference = Reference(None, None, (), None, about, statistics=statistics)
    reference.check(extractor)
    return reference


def some_of(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """A random sample of the indices 0..N-1, stratified by the labels [N] to within one image per class.

    Returns:
        int64 [min(count, N)], ascending.
    """
    n = len(labels)
    if count >= n:
        return np.arange(n)
    order = np.random.RandomState(seed).permutation(n)  # the stream of RandomState never changes
    by_class = order[np.argsort(labels[order], kind="stable")]
    return np.sort(by_class[(2 * np.arange(count) + 1) * n // (2 * count)])


def references_folder() -> Path:
    """The folder of cached references, in DIFFUSION_ADAGN_CACHE or ~/.cache/diffusion_adagn."""
    return cache_root() / "references"


def _made(
    batches: Iterable[np.ndarray],
    count: int,
    labels: np.ndarray | None,
    class_names: tuple[str, ...],
    about: dict,
    extractor: Extractor | None,
    indices: np.ndarray | None,
    progress: bool,
) -> Reference:
    sums, features, record = np.zeros(len(VALUES)), None, None
    batches = _seen(batches, sums.__iadd__)
    if extractor is None:
        for _ in batches:
            pass
    else:
        features, record = (
            features_of(extractor, batches, count, progress).pooled,
            described(extractor) | extractor.to_dict(),
        )
    about = about | {
        "count": count,
        "extractor": record,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    return Reference(features, labels, tuple(class_names), sums / count, about, indices)


def _seen(batches: Iterable[np.ndarray], add: Callable[[np.ndarray], object]) -> Iterator[np.ndarray]:
    """Yields the batches and passes the sum of their image values to `add`."""
    for pixels in batches:
        add(image_values(pixels).sum(axis=0))
        yield pixels


def _describe_record(record: dict) -> str:
    data = f", trained on {record['data']}" if record.get("data") else ""
    return f"{record['hash'] or 'published'}, {record['dimension']} features{data}"
