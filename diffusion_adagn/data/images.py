"""Decode one image of any format to uint8 pixels of a given size and number of channels."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Raw = bytes | Path | np.ndarray | Image.Image | "BrokenImage" | None

# Image formats only: Pillow would pass PostScript to an interpreter.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
_MAX_BYTES = 2**30  # per file: more than the pixels of the largest image that Pillow accepts
_ORIENTATION = 0x0112  # EXIF tag


class BrokenImage(InputError):
    """An image that cannot be decoded. The message is the reason, without the image's name."""


class TooLarge(BrokenImage):
    """An image with more pixels than Pillow's limit: a valid one, or a decompression bomb."""

    def __init__(self, pixels: int, limit: int):
        super().__init__(
            f"it has {pixels:,} pixels, more than the limit of {limit:,} (Pillow's guard against decompression bombs)"
        )


@functools.cache
def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [f for f in _FORMATS if f in Image.OPEN]


@contextlib.contextmanager
def _errors_as_broken_image() -> Iterator[None]:
    """Turns Pillow's errors into BrokenImage: OSError, SyntaxError, ValueError, struct.error, zlib.error ..."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (BrokenImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BrokenImage("it is not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:  # above twice the limit
        limit = Image.MAX_IMAGE_PIXELS or 0
        pixels = re.search(r"\d+", str(error))
        raise TooLarge(int(pixels[0]) if pixels else 2 * limit, limit) from None
    except Exception as error:
        raise BrokenImage(" ".join(str(error).split()) or type(error).__name__) from None


@_errors_as_broken_image()
def open_image(raw: Raw) -> Image.Image:
    """Decode an image (its first frame). Its contents determine the format, not its file name.

    Args:
        raw: File contents, a path, an array uint8 [H, W] or [H, W, 3], or a Pillow image. A BrokenImage is raised.

    Raises:
        BrokenImage: Pillow cannot read the whole image, or it is a decompression bomb (found before its pixels are
            allocated).
    """
    from PIL import Image

    if isinstance(raw, BrokenImage):
        raise raw
    if isinstance(raw, Path):
        raw = _contents(raw)
    if raw is None or (isinstance(raw, bytes) and not raw):
        raise BrokenImage("it is empty")
    if isinstance(raw, bytes):
        image = Image.open(io.BytesIO(raw), formats=_formats())
    else:
        image = raw if isinstance(raw, Image.Image) else Image.fromarray(raw)
    limit = Image.MAX_IMAGE_PIXELS  # Pillow itself only warns up to twice its limit
    if limit and image.width * image.height > limit:
        raise TooLarge(image.width * image.height, limit)
    if not image.width * image.height:
        raise BrokenImage(f"it is {image.width}x{image.height} pixels: none")
    image.load()
    return image


def _contents(path: Path) -> bytes:
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):  # reading a pipe could wait forever
        raise BrokenImage("it is not a file")
    if info.st_size > _MAX_BYTES:
        raise BrokenImage(f"it has {info.st_size:,} bytes, more than the limit of {_MAX_BYTES:,} for an image")
    return path.read_bytes()


def to_array(image: Image.Image, size: int | None, channels: int, background: str = "white") -> np.ndarray:
    """Convert an image to an array of the given size and channels.

    In this order: rotate by the EXIF orientation (unreadable EXIF is ignored), convert to 8-bit gray or RGB with
    `background` behind transparent pixels, centre-crop to a square, resize: area average (BOX) to shrink, BICUBIC to
    enlarge. 16-bit gray is divided by 257. Colour profiles (ICC) are not applied.

    Args:
        image: The image.
        size: The side in pixels; None neither crops nor resizes.
        channels: 1 for gray, 3 for RGB.
        background: A colour that Pillow knows.

    Returns:
        uint8 [size, size, channels], or [H, W, channels] if size is None.

    Raises:
        BrokenImage: The pixels have no agreed 8-bit meaning (floats, 32-bit integers), or Pillow cannot convert the
            image.
    """
    import numpy as np
    from PIL import Image

    image = _eight_bit(_upright(image), "L" if channels == 1 else "RGB", background)
    if size is not None:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        if width != height:
            image = image.crop((left, top, left + side, top + side))
        if side != size:
            image = image.resize((size, size), Image.Resampling.BOX if size < side else Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array[:, :, None] if channels == 1 else array


def _upright(image: Image.Image) -> Image.Image:
    """Rotate by the EXIF orientation. ImageOps.exif_transpose also rewrites the EXIF, and fails if it is corrupted."""
    from PIL.Image import Transpose

    transposes = dict(zip(range(2, 9), (
        Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
        Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90,
    )))  # fmt: skip
    try:
        transpose = transposes.get(image.getexif().get(_ORIENTATION))
    except Exception:  # SyntaxError, struct.error ...
        return image
    return image if transpose is None else image.transpose(transpose)


@_errors_as_broken_image()
def _eight_bit(image: Image.Image, mode: str, background: str) -> Image.Image:
    import numpy as np
    from PIL import Image, ImageColor

    if image.mode == "F":
        raise BrokenImage("its pixels are floating point, which has no agreed range; save it as 8 or 16 bits")
    if (
        image.mode == "I" and image.format != "PNG"
    ):  # a 16-bit PNG may open in this mode; in other formats it means 32 bits
        raise BrokenImage("its pixels are 32-bit integers, which have no agreed range; save it as 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BrokenImage(f"its pixels are {values.min()}..{values.max()}, beyond 16 bits; save it as 8 or 16 bits")
        gray = ((values + 128) // 257).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):  # the gray value that means transparent
            gray[values == transparent] = ImageColor.getcolor(background, "L")
        return Image.fromarray(gray).convert(mode)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if image.mode == mode:
        return image
    # palettes and other colour spaces are converted to gray by way of RGB
    return image.convert("RGB").convert(mode) if image.mode not in ("1", "L", "RGB") else image.convert(mode)
