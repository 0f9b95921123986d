import io

import numpy as np
import pytest
from PIL import Image

from diffusion_adagn.data.images import BrokenImage, open_image, to_array

RNG = np.random.default_rng(0)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, 16), (64, 64, 32), (48, 80, 12), (90, 60, 20)])
def test_shrinking_is_a_block_mean(height, width, size):
    pixels = noise(height, width)
    side = min(height, width)
    top, left, block = (height - side) // 2, (width - side) // 2, side // size
    square = pixels[top : top + side, left : left + side].astype(np.float64)
    mean = square.reshape(size, block, size, block, 3).mean((1, 3))
    # Pillow rounds once along each axis: at most half a level each
    assert np.abs(to_array(Image.fromarray(pixels), size, 3) - mean).max() <= 1


def test_equal_size_and_bicubic_enlarging():
    pixels = noise(8, 8)
    assert np.array_equal(to_array(Image.fromarray(pixels), 8, 3), pixels)
    assert np.array_equal(to_array(Image.fromarray(pixels), None, 3), pixels)
    grown = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(to_array(Image.fromarray(pixels), 16, 3), np.asarray(grown))


def test_size_none_does_not_crop():
    assert to_array(Image.fromarray(noise(4, 6)), None, 3).shape == (4, 6, 3)


def test_gray_to_colour_and_colour_to_gray():
    gray = noise(4, 4, 1)
    assert np.array_equal(to_array(Image.fromarray(gray[:, :, 0]), None, 3), np.repeat(gray, 3, axis=2))
    colour = noise(4, 4)
    luma = colour.astype(np.float64) @ [0.299, 0.587, 0.114]
    assert np.abs(to_array(Image.fromarray(colour), None, 1)[:, :, 0] - luma).max() <= 1


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("black", 0)])
def test_rgba_uses_the_background(background, level):
    pixels = noise(6, 6, 4)
    pixels[0, 0, 3], pixels[0, 1, 3] = 0, 255
    out = to_array(open_image(encoded(Image.fromarray(pixels), "PNG")), None, 3, background)
    alpha = pixels[:, :, 3:].astype(np.float64) / 255
    assert np.abs(out - (pixels[:, :, :3] * alpha + level * (1 - alpha))).max() <= 1
    assert out[0, 0].tolist() == [level] * 3
    assert out[0, 1].tolist() == pixels[0, 1, :3].tolist()


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("black", 0)])
def test_gray_with_alpha_and_palette_with_transparency(background, level):
    la = np.array([[[10, 0], [10, 255]]], np.uint8)
    image = open_image(encoded(Image.fromarray(la, "LA"), "PNG"))
    assert to_array(image, None, 1, background)[0, :, 0].tolist() == [level, 10]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 100, 50, 1, 2, 3])
    palette.putdata([0, 1])
    image = open_image(encoded(palette, "PNG", transparency=1))
    assert image.mode == "P"
    assert to_array(image, None, 3, background).tolist() == [[[200, 100, 50], [level] * 3]]


def test_palette_colours_and_gray():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 100, 50, 1, 2, 3])
    palette.putdata([0, 1])
    assert to_array(palette, None, 3).tolist() == [[[200, 100, 50], [1, 2, 3]]]
    assert abs(int(to_array(palette, None, 1)[0, 0, 0]) - 124) <= 1


def test_16_bit_gray_is_divided_by_257():
    values = np.array([[0, 257, 65535, 32896, 128, 129]], np.uint16)
    image = open_image(encoded(Image.fromarray(values), "PNG"))
    assert to_array(image, None, 1)[0, :, 0].tolist() == [0, 1, 255, 128, 0, 1]
    as_int = Image.fromarray(values.astype(np.int32))
    assert as_int.mode == "I"
    with pytest.raises(BrokenImage, match="32-bit"):  # a TIFF with values 0..255 would become black
        to_array(as_int, None, 3)
    as_int.format = "PNG"  # 16 bits, as older versions of Pillow open them
    assert to_array(as_int, None, 3)[0, :, 2].tolist() == [0, 1, 255, 128, 0, 1]
    tiff = open_image(encoded(Image.fromarray(values), "TIFF"))
    assert to_array(tiff, None, 1)[0, :, 0].tolist() == [0, 1, 255, 128, 0, 1]


@pytest.mark.parametrize(
    "image", [Image.new("F", (2, 2), 0.5), Image.new("I", (2, 2), 70000), Image.new("I", (2, 2), -1)]
)
def test_float_and_32_bit_pixels_are_rejected(image):
    with pytest.raises(BrokenImage, match="8 or 16 bits"):
        to_array(image, None, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0], upright[3, 5] = (255, 0, 0), (0, 255, 0)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(to_array(open_image(raw), None, 3), upright)


def test_cmyk_becomes_rgb():
    raw = encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=95)
    image = open_image(raw)
    assert image.mode == "CMYK"
    assert np.abs(to_array(image, None, 3).astype(int) - [255, 0, 0]).max() < 8


def test_animation_uses_the_first_frame():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    raw = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert to_array(open_image(raw), None, 3)[0, 0].tolist() == [255, 0, 0]


def test_one_bit_images():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert to_array(image, None, 3).tolist() == [[[0] * 3, [255] * 3]]


def test_broken_images_have_a_reason(tmp_path):
    whole = encoded(Image.fromarray(noise(64, 64)), "PNG")
    for raw, reason in [
        (b"", "empty"),
        (None, "empty"),
        (whole[: len(whole) // 2], "truncated|cut|broken"),
        (b"hello, I am text", "not an image"),
        (tmp_path / "absent.png", "No such file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ]:
        with pytest.raises(BrokenImage, match=reason):
            open_image(raw)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [100, 1000])  # of 1200 pixels: Pillow raises above twice its limit, else it warns
def test_decompression_bomb_is_rejected(monkeypatch, limit):
    raw = encoded(Image.new("L", (40, 30)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BrokenImage, match=r"bomb|pixels"):
        open_image(raw)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(raw).size == (40, 30)
