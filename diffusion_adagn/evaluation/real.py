"""The real images of --against: a data set, a folder or .npz of images, published statistics, or a saved reference."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from ..config import DataConfig, RunConfig, with_overrides
from ..data import ImageDataset, open_dataset
from ..data.find import find_source
from ..errors import InputError
from .extractors import Extractor
from .image_set import ImageSet, is_image_source, read_image_set
from .memorisation import Gather
from .reference import Reference, published, reference_of, reference_of_images


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
    stored: Reference | None = None
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
            self.stored = Reference.load(path)
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
    ) -> Reference:
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

    def gather(self, reference: Reference) -> Gather | None:
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
