"""One picture of any kind -> uint8 pixels of the size and channels that the config says."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Raw = bytes | Path | np.ndarray | Image.Image | None

# Only pictures: Pillow would also hand PostScript to an interpreter.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")


class BrokenPicture(InputError):
    """A picture that cannot be decoded; the message is the reason, without the picture's name."""


@functools.cache
def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [f for f in _FORMATS if f in Image.OPEN]


def open_picture(raw: Raw) -> Image.Image:
    """A decoded picture (its first frame) from file contents, a path, an array uint8 [H, W] or [H, W, 3], or a picture.

    Raises BrokenPicture for whatever Pillow cannot read whole, and for decompression bombs.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(raw, Path):
            raw = raw.read_bytes()
        if raw is None or (isinstance(raw, bytes) and not raw):
            raise BrokenPicture("it is empty")
        if isinstance(raw, bytes):
            image = Image.open(io.BytesIO(raw), formats=_formats())
        else:
            image = raw if isinstance(raw, Image.Image) else Image.fromarray(raw)
        limit = Image.MAX_IMAGE_PIXELS  # Pillow itself only warns up to twice its limit
        if limit and image.width * image.height > limit:
            raise BrokenPicture(f"{image.width}x{image.height} pixels is beyond Pillow's limit of {limit} (a bomb?)")
        image.load()
        return image
    except (BrokenPicture, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BrokenPicture("it is not a picture that Pillow knows") from None
    except Exception as error:  # the decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise BrokenPicture(" ".join(str(error).split()) or type(error).__name__) from None


def to_array(image: Image.Image, size: int | None, channels: int, background: str = "white") -> np.ndarray:
    """uint8 [size, size, channels], or [H, W, channels] as it is if size is None.

    In this order: turned upright (EXIF), made 8-bit gray (channels 1) or RGB (3), transparency laid over `background`,
    centre-cropped to a square, resized: the area average (BOX) when shrinking, BICUBIC when growing.
    16-bit gray is divided by 257. Raises BrokenPicture for what has no agreed 8-bit meaning (floats, 32-bit ints).
    """
    import numpy as np
    from PIL import Image, ImageOps

    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image = _eight_bit(image, "L" if channels == 1 else "RGB", background)
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


def _eight_bit(image: Image.Image, mode: str, background: str) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        raise BrokenPicture("its pixels are floating point, which has no agreed range; save it as 8 or 16 bits")
    if image.mode == "I" and image.format != "PNG":  # a 16-bit PNG may be opened as this; other files mean 32 bits
        raise BrokenPicture("its pixels are 32-bit integers, which have no agreed range; save it as 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BrokenPicture(
                f"its pixels are {values.min()}..{values.max()}, beyond 16 bits; save it as 8 or 16 bits"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert(mode)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if image.mode == mode:
        return image
    # a palette holds colours; gray is made of those, as of every other colour space
    return image.convert("RGB").convert(mode) if image.mode not in ("1", "L", "RGB") else image.convert(mode)
