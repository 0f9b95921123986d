"""Memorization: the real images nearest to each sampled one, compared with the distances between real images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..atomic import atomic_write
from ..renamed import extractor_name
from ..render.grids import labelled_grid
from .features import FeatureSet
from .metrics import nearest
from .reference import Gather

NEAREST = 4  # real images per sampled one
DISTANCE_BATCH = 500
MUCH_NEARER = 0.5  # fraction of the distance between real images
MAX_NAMED_COPIES = 5


@dataclass(frozen=True)
class Memorisation:
    """The real images nearest to each sampled one.

    Args:
        places: int64 [N, n], rows of the reference, nearest first.
        distances: float64 [N, n], the distances to these images.
        real: float64 [M], the distance of each real image to the nearest other real one; None for a single real image.
        copies: (sampled, real) pairs that are equal in every pixel; None if the pixels are not available.
        sentence: A summary.
    """

    places: np.ndarray = field(repr=False)
    distances: np.ndarray = field(repr=False)
    real: np.ndarray | None = field(repr=False)
    copies: list[tuple[int, int]] | None
    sentence: str

    @property
    def order(self) -> np.ndarray:
        """The sampled images, sorted by the distance to the nearest real one."""
        return np.argsort(self.distances[:, 0], kind="stable")

    def to_dict(self, rows: int) -> dict:
        return {
            "sentence": self.sentence,
            "median_distance_sampled": float(np.median(self.distances[:, 0])),
            "median_distance_real": None if self.real is None else float(np.median(self.real)),
            "copies": self.copies,
            "nearest": [
                {"sampled": int(i), "real": self.places[i].tolist(), "distances": self.distances[i].tolist()}
                for i in self.order[:rows]
            ],
        }


def memorisation(
    pooled: np.ndarray,
    pixels: np.ndarray,
    reference: FeatureSet,
    gather: Gather | None,
    progress: bool = False,
) -> Memorisation:
    """Find the reference images nearest to each sampled one, in the extractor's features.

    Args:
        pooled: float32 [N, D], the features of the sampled images.
        pixels: uint8 [N, H, W, C], the sampled images.
        reference: The real images. It needs features.
        gather: A function: rows of the reference -> pixels; None if they are not available.
        progress: Show a progress bar.
    """
    real = reference.pooled
    places, distances = nearest(pooled, real, min(NEAREST, len(real)), reference.device, progress=progress)
    apart = reference.radii(1, progress) if len(real) > 1 else None
    copies = None if gather is None else _copies(pixels, len(real), gather)
    sentence = " ".join([_how_near(distances[:, 0], apart, reference), _said(copies, len(real))]).strip()
    return Memorisation(places, distances, apart, copies, sentence)


def draw_neighbours(
    file: Path,
    found: Memorisation,
    pixels: np.ndarray,
    names: Sequence[str] | None,
    reference: FeatureSet,
    gather: Gather,
    rows: int,
) -> Path:
    """Draw the `rows` sampled images that are nearest to a real one. names: [N], their class names, or None."""
    shown = found.order[:rows]
    real = gather(found.places[shown].ravel()).reshape(*found.places[shown].shape, *pixels.shape[1:])
    cells = [[pixels[i], *neighbours] for i, neighbours in zip(shown, real)]
    captions = [["", *(f"distance {d:.3g}" for d in found.distances[i])] for i in shown]
    labels = [f"{i}" if names is None else names[i] for i in shown]
    columns = ["sampled", *(f"real {n + 1}" for n in range(found.places.shape[1]))]
    title = f"Sampled images nearest to a real one of {reference.about['name']}, and beside each its nearest real ones"
    corner = "image" if names is None else "class"
    sheet = labelled_grid(cells, labels, columns, title, min_side=96, captions=captions, corner=corner)
    return atomic_write(file, sheet.save)


def _how_near(sampled: np.ndarray, real: np.ndarray | None, reference: FeatureSet) -> str:
    about, median = reference.about, float(np.median(sampled))
    where = f"{about['name']}, {'all ' if about['count'] == about['of'] else ''}{about['count']:,} images"
    if about["count"] != about["of"]:
        where += f" drawn from {about['of']:,}"
    sentence = f"Nearest real image ({where}; median distance in the features of {extractor_name(about['extractor']['name'])}): {median:.3g} from a sampled one"
    if real is None:
        return f"{sentence}."
    between = float(np.median(real))
    sentence += f", {between:.3g} from another real one"
    if between > 0 and median < MUCH_NEARER * between:
        return f"{sentence}. Sampled images lie much nearer to real ones than those to each other: look for copies in the sheet."
    return f"{sentence}."


def _copies(pixels: np.ndarray, count: int, gather: Gather) -> list[tuple[int, int]]:
    """(sampled, real) pairs that are equal in every pixel, at most one per sampled image."""
    by_digest: dict[bytes, list[int]] = {}
    for i, image in enumerate(pixels):
        by_digest.setdefault(_digest(image), []).append(i)
    copies: dict[int, int] = {}
    for start in range(0, count, DISTANCE_BATCH):
        for place, image in enumerate(gather(np.arange(start, min(start + DISTANCE_BATCH, count))), start):
            for i in by_digest.get(_digest(image), ()):
                copies.setdefault(i, place)
    return sorted(copies.items())


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image)).digest()


def _said(copies: list[tuple[int, int]] | None, count: int) -> str:
    if copies is None:
        return ""
    if not copies:
        return f"No sampled image equals one of these {count:,} in every pixel."
    pairs = ", ".join(f"sampled {i} = real {j}" for i, j in copies[:MAX_NAMED_COPIES])
    more = f" and {len(copies) - MAX_NAMED_COPIES} more" if len(copies) > MAX_NAMED_COPIES else ""
    one = len(copies) == 1
    return f"{len(copies)} sampled image{'' if one else 's'} {'equals' if one else 'equal'} a real one in every pixel: {pairs}{more}."
