"""A folder of a few images of one class, in memory: what a class is learned from."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..diffusion.loss import normalize_images
from ..errors import InputError
from .images import BrokenImage, open_image, to_array
from .sources import image_files

MAX_IMAGES = 200


class OutsideCrop(BrokenImage):
    """The box lies outside of the image."""


@dataclass(frozen=True)
class ClassImages:
    """Images of one class.

    Attributes:
        pixels: uint8 [N, H, W, C].
        heldout: how many, evenly spaced among them, are not learned from.
        source: their folder.
    """

    pixels: np.ndarray
    heldout: int
    source: str

    @property
    def is_heldout(self) -> np.ndarray:
        """bool [N]"""
        n = len(self.pixels)
        places = (np.arange(self.heldout) * n + n // 2) // max(1, self.heldout)
        return np.isin(np.arange(n), places)

    def x0(self, heldout: bool) -> Tensor:
        """Those held out or those learned from: float32 [n, C, H, W] in [-1, 1]."""
        return normalize_images(torch.from_numpy(self.pixels[self.is_heldout == heldout]))

    @property
    def all_x0(self) -> Tensor:
        """All of them: float32 [N, C, H, W] in [-1, 1]."""
        return normalize_images(torch.from_numpy(self.pixels))

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the pixels."""
        content = f"{self.pixels.shape}".encode() + np.ascontiguousarray(self.pixels).tobytes()
        return hashlib.sha256(content).hexdigest()[:16]


def read_images(folder: str, size: int, channels: int, crop: tuple[int, ...] | None = None) -> np.ndarray:
    """All images of a folder, without its subfolders, in the order of their names.

    Args:
        folder: The folder.
        size: Their side after cropping and resizing.
        channels: 1 for gray, 3 for RGB.
        crop: The box that is used of each: left, top, width, height; None: the largest square in the middle.

    Returns:
        uint8 [N, size, size, channels].

    Raises:
        InputError: The folder does not exist, has no image or more than 200, or images cannot be read; the message
            names them.
    """
    path = Path(folder).expanduser()
    files = [path / name for name in image_files(path, nested=False)] if path.is_dir() else []
    if not 1 <= len(files) <= MAX_IMAGES:
        found = f"has {len(files)} images" if path.is_dir() else "is no folder"
        raise InputError(
            f"--images {folder} {found}: expected a folder with 1 to {MAX_IMAGES} images of the new class."
        )
    images, broken, outside = [], [], False
    for file in files:
        try:
            images.append(to_array(_cropped(open_image(file), crop), size, channels))
        except BrokenImage as error:
            broken.append(f"{file.name} ({error})")
            outside |= isinstance(error, OutsideCrop)
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise InputError(
            f"{len(broken)} of {len(files)} images in {folder} cannot be used: {', '.join(broken[:5])}{more}. "
            + ("Give a --crop inside of all images." if outside else "Remove them, or replace them.")
        )
    return np.stack(images)


def _cropped(image, crop: tuple[int, ...] | None):
    if crop is None:
        return image
    left, top, width, height = crop
    if left + width > image.width or top + height > image.height:
        raise OutsideCrop(
            f"it has {image.width}x{image.height} pixels, and --crop {left},{top},{width},{height} lies outside"
        )
    return image.crop((left, top, left + width, top + height))
