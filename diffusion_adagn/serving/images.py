"""What a request for images returns, and images as PNG files."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from ..render.grids import captioned_grid


@dataclass
class Images:
    """What a request for images returns.

    Args:
        record: plain JSON types, with which the images can be sampled again: model, command, and of each image its
            class, seed and settings.
        pixels: uint8 [H, W, C], C 1 or 3, one per image.
        strips: of each image the predicted images on the way to it, the noisiest first.
    """

    record: dict[str, Any]
    pixels: list[np.ndarray]
    strips: list[list[np.ndarray]]

    def sheet(self, columns: int = 8) -> Image.Image:
        """All images on one sheet, with class, seed and guidance scale above each."""
        images = self.record["images"]
        captions = [f"{one['class_name']} #{one['seed']} g{one['guidance']:g}" for one in images]
        return captioned_grid(self.pixels, captions, columns)


def png(pixels: np.ndarray | Image.Image, record: Mapping[str, Any] | None = None, min_side: int = 1) -> bytes:
    """An image as a PNG file.

    Args:
        pixels: uint8 [H, W, C], or an image.
        record: written into the file as the text "adagn".
        min_side: pixels; smaller images are enlarged by a whole factor without smoothing until no side is below.
    """
    image = pixels
    if not isinstance(image, Image.Image):
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if (factor := -(-min_side // min(image.size))) > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    info = PngImagePlugin.PngInfo()
    if record is not None:
        info.add_itxt("adagn", json.dumps(record, ensure_ascii=False))
    file = io.BytesIO()
    image.save(file, "png", pnginfo=info)
    return file.getvalue()
