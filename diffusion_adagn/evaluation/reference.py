"""The real images of --against, and their features: of a data set (cached), images, published statistics or a saved file."""

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np

from ..atomic import cache_root
from ..config import DataConfig, RunConfig, with_overrides
from ..data import ImageDataset, open_dataset
from ..data.find import find_source
from ..data.npz import read_npz
from ..errors import InputError
from .diagnostics import VALUES, image_values
from .extractors import Extractor, features_of
from .extractors.base import record_of
from .features import CORRUPTED, FILE_VERSION, FeatureSet
from .image_set import ImageSet, is_image_source, read_image_set
from .metrics import Gaussian

FEATURE_BATCH = 250  # images
UNKNOWN_COUNT = 10**9  # number of images of published statistics, which do not record it

Gather = Callable[[np.ndarray], np.ndarray]


class RealImages:
    """The real images, before feature extraction. One of the attributes is set; the others are None.

    Attributes:
        dataset: A split of a data set.
        found: Images of a folder or .npz.
        stored: A reference of `adagn evaluate reference`.
        file: A file of published statistics.
    """

    dataset: ImageDataset | None = None
    found: ImageSet | None = None
    stored: FeatureSet | None = None
    file: Path | None = None

    def __init__(
        self,
        against: str | None,
        overrides: Mapping[str, str],
        recorded: DataConfig | None = None,
        size: int | None = None,
        channels: int | None = None,
    ):
        """Open the real images.

        Args:
            against: A data set, path or file; None: the recorded data.
            overrides: Data settings by dotted key.
            recorded: The data settings of the run; None if they are not known.
            size: Side of the model's images, to which a data set is resized; None: the data set's own.
            channels: Channels of the model's images; None: the data set's own.

        Raises:
            InputError: The images cannot be opened.
        """
        self.against, self.overrides, self.recorded = against, dict(overrides), recorded
        self.size, self.channels = size, channels
        path = None if against is None else Path(against).expanduser()
        if path is not None and path.suffix == ".npz":
            self._open_file(path)
        elif path is not None and is_image_source(path):
            self.found = read_image_set(path)
        else:
            self.config = self.settings(recorded if against is None else None, against)
            self.dataset = open_dataset(self.config)

    def _open_file(self, path: Path) -> None:
        names = _array_names(path)
        if "head" in names:
            self.stored = FeatureSet.load(path)
        elif {"mu", "sigma"} <= names:
            self.file = path
        else:
            self.found = read_image_set(path)

    def settings(self, base: DataConfig | None, source: str | None = None) -> DataConfig:
        """Data settings: `base` (None: the defaults), changed by the overrides and by `source` (None: unchanged)."""
        changes = self.overrides | ({} if source is None else {"data.source": source})
        config = with_overrides(RunConfig(data=base or DataConfig()), changes)
        size, channels = config.data.image_size or self.size, config.data.channels or self.channels
        return dataclasses.replace(config.data, image_size=size, channels=channels)

    @cached_property
    def learned(self) -> ImageDataset | None:
        """The labelled images that a classifier is trained on; None if there are none.

        The first that exists of: --data.source, and the training parts of the real images, of the run's own data, and
        of the data that the reference's classifier was trained on.
        """
        if "data.source" in self.overrides:
            return open_dataset(self.settings(None))
        if self.dataset is not None:
            return _training_part(self.config) or self.dataset
        if self.recorded is not None:
            return _training_part(self.settings(self.recorded))
        about = {} if self.stored is None else self.stored.about
        source = (about.get("extractor") or {}).get("data")
        return source and _training_part(DataConfig(source, image_size=about["image_size"], channels=about["channels"]))

    @property
    def class_names(self) -> tuple[str, ...]:
        """() if they are not known."""
        if self.dataset is not None:
            return self.dataset.label_space.names
        source = self.stored or self.found
        return () if source is None else source.class_names

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(H, W, C); None if it is not known, as for published statistics."""
        if self.dataset is not None:
            return self.dataset.images.shape[1:]
        if self.found is not None:
            return self.found.pixels.shape[1:]
        about = {} if self.stored is None else self.stored.about
        return (about["image_size"], about["image_size"], about["channels"]) if about.get("image_size") else None

    @property
    def name(self) -> str:
        if self.dataset is not None:
            return self.dataset.name
        return self.found.about["source"] if self.found is not None else str(self.against)

    def check_shape(self, height: int, width: int, channels: int, whose: str = "the images") -> None:
        """Raises InputError unless the real images are of this size."""
        if self.image_shape is None:
            return
        h, w, c = self.image_shape
        written_as_colour = self.found is not None and self.found.with_channels(channels).shape[3] == channels
        found = expected = remedy = ""
        if (h, w) != (height, width):
            found, expected = f"{width}x{height} pixels", f"{w}x{h}"
            remedy = f"--data.image_size {height}" if height == width else "cutting them to squares"
        elif c != channels and not written_as_colour:
            found, expected, remedy = _channels(channels), _channels(c), f"--data.channels {channels}"
        if found:
            raise InputError(
                f"{whose} have {found}, the real ones of {self.name} {expected}: make those equal, by {remedy} where they are a data set. "
                "Nothing is resized here, since resizing would be measured too."
            )

    def reference(
        self,
        extractor: Extractor,
        count: int,
        class_names: tuple[str, ...],
        channels: int | None,
        progress: bool = True,
    ) -> FeatureSet:
        """Compute or load the reference.

        Args:
            extractor: The extractor of its features.
            count: The maximum number of images of a data set.
            class_names: Classes of the measured images, for files without class names.
            channels: Channels of the measured images, for gray images that were saved as colour.
            progress: Show a progress bar.

        Raises:
            InputError: A stored reference has another extractor, or a label is not one of the classes.
        """
        if self.dataset is not None:
            return reference_of(self.dataset, extractor, count, progress=progress)
        if self.stored is not None:
            self.stored.check(extractor)
            return self.stored
        if self.file is not None:
            return published(self.file, extractor, progress)
        images, labels = self.found, self.found.labels_among(class_names)
        names = () if labels is None else class_names
        return reference_of_images(
            images.with_channels(channels), labels, names, images.about["source"], extractor, progress
        )

    def gather(self, reference: FeatureSet) -> Gather | None:
        """A function: rows of the reference -> pixels; None if they are not available."""
        if self.found is not None:
            pixels = self.found.with_channels(reference.about["channels"])
            return lambda places: pixels[places]
        dataset = self.dataset if self.stored is None else self.learned
        if dataset is None or reference.indices is None or dataset.fingerprint != reference.about["fingerprint"]:
            return None
        return lambda places: dataset.gather(reference.indices[places])[0]


def _array_names(path: Path) -> set[str]:
    """The names of the arrays in an .npz."""
    if not path.is_file():
        raise InputError(f"there is no file {path} to measure against.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return set(arrays.files)
    except Exception as error:
        raise InputError(
            f"{path} is no .npz: {error}. Expected images (arr_0), statistics (mu, sigma), or a file of adagn evaluate reference."
        ) from None


def _channels(count: int) -> str:
    return "one channel (gray)" if count == 1 else f"{count} channels (colour)"


def _training_part(config: DataConfig) -> ImageDataset | None:
    """The training part of a source; None if it has only a test part, or if its files are missing."""
    try:
        _, head, _ = find_source(config)
        return open_dataset(dataclasses.replace(config, source=head))
    except InputError:
        return None


# ---------------------------------------------------------------------- features of real images


def reference_of(
    dataset: ImageDataset, extractor: Extractor | None, count: int = 10_000, seed: int = 0, progress: bool = True
) -> FeatureSet:
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
        cached = FeatureSet.load(file)
        if extractor is None or _is_current(cached, dataset, extractor):
            return dataclasses.replace(
                cached, about=cached.about | {"name": dataset.name}
            )  # the same images, elsewhere
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
    classes = {"labels": dataset.labels[indices], "class_names": dataset.label_space.names, "indices": indices}
    reference = _extract(batches, len(indices), extractor, about, progress, **classes)
    try:
        reference.save(file)
    except OSError as error:
        raise InputError(
            f"the reference cannot be saved in {file.parent}: {error}. Set DIFFUSION_ADAGN_CACHE."
        ) from None
    return reference


def _is_current(cached: FeatureSet, dataset: ImageDataset, extractor: Extractor) -> bool:
    """Whether the extractor reproduces the cached features: its code may have changed under the same hash."""
    first_rows = cached.pooled[:4]
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
) -> FeatureSet:
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
    return _extract(batches, len(pixels), extractor, about, progress, labels=labels, class_names=tuple(class_names))


def published(file: Path, extractor: Extractor, progress: bool = True) -> FeatureSet:
    """The reference in an .npz with statistics of the FID's Inception network, mu [D] and sigma [D, D].

    The file may contain images too (arr_0). As in the ADM evaluator, the Frechet distance uses the statistics. Other
    metrics use the images.

    Raises InputError if the file cannot be read, or has no images and the extractor is not the Inception network.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            statistics = Gaussian(arrays["mu"], arrays["sigma"], UNKNOWN_COUNT)
            images = "arr_0" in arrays.files
    except CORRUPTED as error:
        raise InputError(
            f"{file} cannot be read: {error}. Expected mu [D] and sigma [D, D], or images arr_0."
        ) from None
    if images:
        reference = reference_of_images(read_npz(file).pixels, None, (), str(file), extractor, progress)
        fits = extractor.is_fid and extractor.dimension == len(statistics.mean)
        return dataclasses.replace(reference, statistics=statistics) if fits else reference
    about = {
        "name": str(file),
        "fingerprint": hashlib.sha256(statistics.mean.tobytes() + statistics.covariance.tobytes()).hexdigest(),
        "count": None,
        "extractor": {"name": "inception", "hash": None, "dimension": len(statistics.mean), "is_fid": True},
        "date": None,
    }
    reference = FeatureSet(None, about=about, statistics=statistics)
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


def _extract(
    batches: Iterable[np.ndarray], count: int, extractor: Extractor | None, about: dict, progress: bool, **known
) -> FeatureSet:
    """The features and values of `count` images. known: other fields of the FeatureSet."""
    sums, pooled, record = np.zeros(len(VALUES)), None, None

    def seen() -> Iterator[np.ndarray]:
        for pixels in batches:
            np.add(sums, image_values(pixels).sum(axis=0), out=sums)
            yield pixels

    if extractor is None:
        deque(seen(), maxlen=0)
    else:
        pooled = features_of(extractor, seen(), count, progress).pooled
        record = record_of(extractor)
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    about = about | {"count": count, "extractor": record, "date": date}
    return FeatureSet(pooled, values=sums / count, about=about, **known)
