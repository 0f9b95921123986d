"""Existing images: a folder of `adagn sample`, any folder of images, an .npz of the ADM evaluator, or a data set."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..data import open_dataset
from ..data.classes import to_label_space
from ..data.images import BrokenImage, open_image, to_array
from ..data.npz import read_npz
from ..data.sources import BUILT_IN, IMAGE_SUFFIXES, image_files, subfolders
from ..data.tables import parquet_files
from ..errors import InputError, reject_first
from ..models.config import machine_memory
from ..runs.recorded import MAX_INDEX, SamplesIndex
from ..runs.shipped import shipped_folder
from ..runs.weights import Weights
from ..schema import as_document, read_document

GRAY = {"1", "L", "LA", "I", "I;16", "I;16B"}
SAMPLES_INDEX = "samples.json"  # of adagn sample


@dataclass(frozen=True)
class ImageSet:
    """Images in memory, with their labels and their origin.

    Args:
        pixels: uint8 [N, H, W, C].
        labels: int64 [N], ids of class_names, or len(class_names) for null and for mixes; None without labels.
        class_names: () if only the ids are known (an .npz).
        about: The origin of the images, as JSON values.
    """

    pixels: np.ndarray = field(repr=False)
    labels: np.ndarray | None = field(repr=False)
    class_names: tuple[str, ...]
    about: dict = field(repr=False)

    def labels_among(self, class_names: Sequence[str]) -> np.ndarray | None:
        """The labels as ids of these classes, int64 [N]; None without labels or classes.

        The number of classes is the id of images without a class. Raises InputError for a label that is not one of
        these classes.
        """
        k = len(class_names)
        if self.labels is None or not k:
            return None
        if not self.class_names:
            outside = (self.labels < 0) | (self.labels >= k)
            null = self.labels == k  # sampled without a class: null_id is recorded, or all labels are null
            if outside.any() and not null.all() and not (self.about.get("null_id") == k and null[outside].all()):
                raise InputError(
                    f"{int(outside.sum())} of the labels (arr_1) are outside 0..{k - 1}, the ids of the reference's {k} classes, such as "
                    f"{int(self.labels[outside][0])}. Expected the ids of {', '.join(class_names[:5])}{', ...' * (k > 5)}; or leave arr_1 out."
                )
            return self.labels
        new = {name: i for i, name in enumerate(class_names)}
        used = [n for i, n in enumerate(self.class_names) if (self.labels == i).any()]
        unknown = [n for n in used if n not in new]
        if unknown:
            raise InputError(
                f"the images are of classes that the reference does not have: {', '.join(unknown[:5])}{', ...' * (len(unknown) > 5)}. Its "
                f"classes are {', '.join(class_names[:8])}{', ...' * (k > 8)}: give --against data with the same classes."
            )
        return np.array([new.get(name, k) for name in self.class_names] + [k], dtype=np.int64)[self.labels]

    def with_channels(self, channels: int | None) -> np.ndarray:
        """The pixels; gray images saved as colour become gray again if the reference is gray."""
        p = self.pixels
        gray = channels == 1 and p.shape[3] == 3 and (p[..., :1] == p[..., 1:]).all()
        return p[..., :1] if gray else p


def read_image_set(path: Path, guidance: float | None = None) -> ImageSet:
    """Read all images of a folder or .npz file, without resizing.

    Args:
        path: The folder or file.
        guidance: Which scale to read, if a folder of `adagn sample` contains several.

    Raises:
        InputError: The folder is empty, an image is broken, sizes differ, or the folder lacks this scale.
    """
    if path.is_file():
        images = read_npz(path)
        about = {"source": str(path), "kind": "npz", "null_id": images.null_id}
        return ImageSet(images.pixels, images.labels, (), about)
    if (path / SAMPLES_INDEX).is_file():
        return _sampled(path, guidance)
    if guidance is not None:
        raise InputError(
            f"--guidance chooses among the scales of adagn sample's folders; {path} has no {SAMPLES_INDEX}."
        )
    loose = _files(path, nested=False)
    folders = {name: files for name in subfolders(path) if (files := _files(path / name))}
    if bool(loose) == bool(folders):
        found = (
            f"images and folders of images ({', '.join([*folders][:3])})"
            if loose
            else f"no image ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
        raise InputError(f"{path} holds {found}: expected images alone, or one folder of images for each class.")
    about = {"source": str(path), "kind": "folder"}
    if loose:
        return ImageSet(_read(loose), None, (), about)
    labels = np.repeat(np.arange(len(folders)), [len(files) for files in folders.values()]).astype(np.int64)
    return ImageSet(
        _read([file for files in folders.values() for file in files]),
        labels,
        to_label_space(list(folders)).names,
        about,
    )


def is_model(what: str) -> bool:
    """Whether it is a model rather than images; of a missing path, whether it looks like a hub id.

    digits and cifar10 are the shipped models; digits:train and digits:test are the data.
    """
    what = Weights.parse(what).path
    if shipped_folder(what):
        return True
    path = Path(what).expanduser()
    if path.suffix == ".npz" or path.is_file() or is_data(what):
        return False
    marks = ("config.yaml", "state.json", "model_index.json", "pipeline/model_index.json")
    return not path.is_dir() or any((path / mark).is_file() for mark in marks)


def is_image_source(path: Path) -> bool:
    """Whether the path is an .npz, a folder of `adagn sample`, or a folder that contains images directly."""
    return path.suffix == ".npz" or (
        path.is_dir() and ((path / SAMPLES_INDEX).is_file() or bool(_files(path, nested=False)))
    )


def is_data(what: str) -> bool:
    """Whether the text names a data set instead of images: a built-in name, parquet files, or NAME_OR_PATH:split."""
    path = Path(what).expanduser()
    if path.exists():
        return path.suffix == ".parquet" or (path.is_dir() and bool(parquet_files(path)))
    return what in BUILT_IN or ":" in what


def read_data(config: DataConfig) -> ImageSet:
    """All images of a data set's split, in memory."""
    dataset = open_dataset(config)
    about = {"source": dataset.name, "kind": "data", "fingerprint": dataset.fingerprint}
    return ImageSet(*dataset.gather(range(len(dataset))), dataset.label_space.names, about)


def sampled_from(path: Path) -> str | None:
    """The model that a folder of `adagn sample` was sampled from, as typed; None if it is not recorded."""
    try:
        model = read_document(path / SAMPLES_INDEX, SamplesIndex, MAX_INDEX).model
    except InputError:
        return None
    source = (model or {}).get("source")
    return source if isinstance(source, str) else None


def _sampled(folder: Path, guidance: float | None) -> ImageSet:
    record = read_document(folder / SAMPLES_INDEX, max_bytes=MAX_INDEX)
    index = as_document(record, SamplesIndex, folder / SAMPLES_INDEX)
    entries, names = record["images"], (*index.labels.names, *index.labels.learned)
    scales = sorted({e.guidance for e in index.images})
    place = {name: i for i, name in enumerate(names)}  # null and mixes are of no class
    known = dict(enumerate(index.labels.label_names)) | {None: "null"}
    unknown = next((e.class_id for e in index.images if e.class_id not in known), None)
    labels = [place.get(known.get(e.class_id, "null"), len(names)) for e in index.images]
    # the file name only, since a path could lead outside the folder
    files = [folder / Path(e.file).name[:255] for e in index.images]
    listed = ", ".join(f"{s:g}" for s in scales)
    faults = {
        f"is corrupted: {SAMPLES_INDEX} lists no image, or one of class {unknown}, and has {len(names)} classes. "
        "Sample again with adagn sample": not labels or unknown is not None,
        "is not finished: its sampling is running or was stopped. Sample again, with --overwrite": index.unfinished,
        f"holds images at the guidance scales {listed}: choose one, such as --guidance {min(scales, default=1):g}": (
            guidance is None and len(scales) > 1
        ),
        f"holds no images at guidance {guidance}: it has {listed}": guidance is not None and guidance not in scales,
    }
    reject_first(faults, f"{folder} ", ".")
    chosen = [i for i, e in enumerate(index.images) if guidance in (None, e.guidance)]
    selected = [entries[i] for i in chosen]
    shared = {k: v for k, v in selected[0].items() if all(e.get(k) == v for e in selected)}
    seeds = [e["seed"] for e in selected if "seed" in e]
    about = {"source": str(folder), "kind": "samples", "made_by": record.get("model"), "settings": shared}
    about |= {"seeds": [min(seeds), max(seeds)]} if seeds else {}
    return ImageSet(_read([files[i] for i in chosen]), np.array(labels, dtype=np.int64)[chosen], names, about)


def read_images(path: Path, size: int, channels: int) -> tuple[list[Path], np.ndarray]:
    """A single image, or all images in a folder and its subfolders: the files, and uint8 [N, size, size, channels].

    Raises InputError if there is none, or one is broken.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist. Expected an image, or a folder of images.")
    files = _files(path) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} contains no images. Expected files such as .png or .jpg.")
    return files, np.stack([_pixels(file, size, channels) for file in files])


def _files(folder: Path, nested: bool = True) -> list[Path]:
    """The images in a folder, sorted. nested: also in its subfolders."""
    return [folder / name for name in image_files(folder, nested)]


def _pixels(file: Path, size: int | None = None, channels: int | None = None) -> np.ndarray:
    """uint8 [H, W, C]. None: the image's own size; 1 channel if it is gray, else 3. Raises InputError if it is broken."""
    try:
        if not file.is_file():
            raise BrokenImage("it is missing, or no file")
        image = open_image(file)
        return to_array(image, size, channels or (1 if image.mode in GRAY else 3))
    except BrokenImage as error:
        raise InputError(f"broken image {file}: {error}. Replace or remove it.") from None


def _read(files: list[Path]) -> np.ndarray:
    """uint8 [N, H, W, C], with one channel if all images are gray. Raises InputError that names an unusable image."""
    images = []
    for file in files:
        pixels = _pixels(file)
        if images and pixels.shape[:2] != images[0].shape[:2]:
            (h, w), (first_h, first_w) = pixels.shape[:2], images[0].shape[:2]
            raise InputError(
                f"images must be of one size: {file} is {w}x{h}, {files[0]} is {first_w}x{first_h}. Resize them before they are measured."
            )
        images.append(pixels)
        if len(files) * pixels.nbytes > machine_memory():
            raise InputError(
                f"{len(files):,} images like {file} ({pixels.shape[1]}x{pixels.shape[0]}) take {len(files) * pixels.nbytes / 2**30:,.0f} GiB, "
                f"and this machine has {machine_memory() / 2**30:,.0f}: give fewer or smaller ones."
            )
    channels = max(p.shape[2] for p in images)
    return np.stack([np.repeat(p, channels, axis=2) if p.shape[2] < channels else p for p in images])
