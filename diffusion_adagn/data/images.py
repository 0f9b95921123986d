"""One picture of any kind -> uint8 pixels of the size and channels that the config says."""

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

# Only pictures: Pillow would also hand PostScript to an interpreter.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
_MAX_BYTES = 2**30  # of a file: more than all the pixels that Pillow takes
_ORIENTATION = 0x0112  # EXIF's


class BrokenImage(InputError):
    """A picture that cannot be decoded; the message is the reason, without the picture's name."""


class TooLarge(BrokenImage):
    """A picture with more pixels than are decoded: a sound one, or a decompression bomb."""

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
def _broken_reason() -> Iterator[None]:
    """Pillow's errors as BrokenPicture: it raises OSError, SyntaxError, ValueError, struct.error, zlib.error ..."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (BrokenImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BrokenImage("it is not a picture that Pillow knows") from None
    except Image.DecompressionBombError as error:  # beyond twice the limit
        limit = Image.MAX_IMAGE_PIXELS or 0
        pixels = re.search(r"\d+", str(error))
        raise TooLarge(int(pixels[0]) if pixels else 2 * limit, limit) from None
    except Exception as error:
        raise BrokenImage(" ".join(str(error).split()) or type(error).__name__) from None


@_broken_reason()
def open_image(raw: Raw) -> Image.Image:
    """A decoded picture (its first frame) from file contents, a path, an array uint8 [H, W] or [H, W, 3], or a picture.
    What it is shows in its contents, not in its name.

    Raises BrokenPicture for whatever Pillow cannot read whole, for decompression bombs (before their pixels are
    allocated), and the one that it is given.
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
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, for ever
        raise BrokenImage("it is not a file")
    if found.st_size > _MAX_BYTES:
        raise BrokenImage(f"it has {found.st_size:,} bytes, more than any picture that is read ({_MAX_BYTES:,})")
    return path.read_bytes()


def to_array(image: Image.Image, size: int | None, channels: int, background: str = "white") -> np.ndarray:
    """uint8 [size, size, channels], or [H, W, channels] as it is if size is None.

    In this order: turned upright (EXIF; one that cannot be read turns nothing), made 8-bit gray (channels 1) or RGB (3), transparency laid over `background`,
    centre-cropped to a square, resized: the area average (BOX) when shrinking, BICUBIC when growing.
    16-bit gray is divided by 257; colour profiles (ICC) are not applied. Raises BrokenPicture for what has no agreed
    8-bit meaning (floats, 32-bit ints), and for what Pillow cannot convert.
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
    """Not ImageOps.exif_transpose, which also writes the EXIF anew, and fails where that is damaged."""
    from PIL.Image import Transpose

    turns = dict(zip(range(2, 9), (
        Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
        Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90,
    )))  # fmt: skip
    try:
        turn = turns.get(image.getexif().get(_ORIENTATION))
    except Exception:  # SyntaxError, struct.error ...
        return image
    return image if turn is None else image.transpose(turn)


@_broken_reason()
def _eight_bit(image: Image.Image, mode: str, background: str) -> Image.Image:
    import numpy as np
    from PIL import Image, ImageColor

    if image.mode == "F":
        raise BrokenImage("its pixels are floating point, which has no agreed range; save it as 8 or 16 bits")
    if image.mode == "I" and image.format != "PNG":  # a 16-bit PNG may be opened as this; other files mean 32 bits
        raise BrokenImage("its pixels are 32-bit integers, which have no agreed range; save it as 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BrokenImage(f"its pixels are {values.min()}..{values.max()}, beyond 16 bits; save it as 8 or 16 bits")
        seen = ((values + 128) // 257).astype(np.uint8)
        if isinstance(clear := image.info.get("transparency"), int):  # the gray that means transparent
            seen[values == clear] = ImageColor.getcolor(background, "L")
        return Image.fromarray(seen).convert(mode)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if image.mode == mode:
        return image
    # a palette holds colours; gray is made of those, as of every other colour space
    return image.convert("RGB").convert(mode) if image.mode not in ("1", "L", "RGB") else image.convert(mode)
