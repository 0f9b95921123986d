"""What --against means: a data set, images of a folder or an .npz, published statistics, a file of `adagn evaluate reference`."""

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
    """The real images, before an extractor has seen them: one of dataset, found, stored and file; the others are None.

    dataset: its split. found: images of a folder or .npz. stored: a reference made earlier. file: published statistics.
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
        """against: None for the recorded data. overrides: config fields by dotted key. recorded: the run's own data settings.
        size, channels: of a model's images, which a data set is decoded to. Raises InputError for what cannot be opened."""
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
        held = _held(path)
        if "head" in held:
            self.stored = Reference.load(path)
        elif {"mu", "sigma"} <= held:
            self.file = path
        else:
            self.found = read_image_set(path)

    def settings(self, base: DataConfig | None, source: str | None = None) -> DataConfig:
        """`base` (None: the defaults) with what was given on the command line, for another source if one is named."""
        given = self.overrides | ({} if source is None else {"data.source": source})
        config = with_overrides(RunConfig(data=base or DataConfig()), given)
        size, channels = config.data.image_size or self.size, config.data.channels or self.channels
        return dataclasses.replace(config.data, image_size=size, channels=channels)

    @cached_property
    def learned(self) -> ImageDataset | None:
        """The labelled images that a classifier learns from: --data.source, or the training part of the data that are measured
        against, or of the run's own, or of those that the reference's classifier learned from. None if there are none."""
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
        """() where they are not known."""
        if self.dataset is not None:
            return self.dataset.label_space.names
        some = self.stored or self.found
        return () if some is None else some.class_names

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(H, W, C); None where it is not known: published statistics do not say."""
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
        if (h, w) != (height, width):
            remedy = f"--data.image_size {height}" if height == width else "cutting them to squares"
            raise InputError(
                f"{whose} have {width}x{height} pixels, the real ones of {self.name} {w}x{h}: make those equal, by {remedy} where they are "
                "a data set. Nothing is resized here, since resizing would be measured too."
            )
        written_as_colour = self.found is not None and self.found.with_channels(channels).shape[3] == channels
        if c != channels and not written_as_colour:
            raise InputError(
                f"{whose} have {_channels(channels)}, the real ones of {self.name} {_channels(c)}: make those equal, by --data.channels "
                f"{channels} where they are a data set."
            )

    def reference(
        self,
        extractor: Extractor,
        count: int,
        class_names: tuple[str, ...],
        channels: int | None,
        progress: bool = True,
    ) -> Reference:
        """count: of a data set's images, at most. class_names, channels: of what is measured, for files that do not say.

        Raises InputError for a stored reference of another extractor, and for labels that are none of the classes."""
        if self.dataset is not None:
            return reference_of(self.dataset, extractor, count, progress=progress)
        if self.stored is not None:
            self.stored.check(extractor)
            return self.stored
        if self.file is not None:
            return published(self.file, extractor, progress)
        found, labels = self.found, self.found.labels_among(class_names)
        names = () if labels is None else class_names
        return reference_of_images(
            found.with_channels(channels), labels, names, found.about["source"], extractor, progress
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


def _held(path: Path) -> set[str]:
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
    """None where there is none: a source with a test part alone, or whose files are gone."""
    try:
        _, head, _ = find_source(config)
        return open_dataset(dataclasses.replace(config, source=head))
    except InputError:
        return None
