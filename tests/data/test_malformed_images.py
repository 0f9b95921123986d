"""Invalid labelled images: an error that names the fault, or a counted skip, and no partial files."""

import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from diffusion_adagn.config import DataConfig
from diffusion_adagn.data import open_dataset
from diffusion_adagn.data.images import BrokenImage, open_image, to_array
from diffusion_adagn.data.rng import SampleOrder
from diffusion_adagn.errors import InputError

SIDE = 50_000  # of the decompression bombs


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


def pixels(seed: int = 0, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(seed: int = 0, size: int = 8) -> bytes:
    return encoded(Image.fromarray(pixels(seed, size)))


def make_folders(root: Path, names=("ant", "bee"), each: int = 2, size: int = 8) -> Path:
    for class_id, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i:03}.png").write_bytes(png(each * class_id + i, size))
    return root


def opened(source, part=None, **settings):
    config = DataConfig(source=str(source), **{"heldout_fraction": 0.0} | settings)
    return open_dataset(config, part, progress=False)


def rejection(source, part=None, **settings) -> str:
    """The error message of an invalid source. The store stays empty."""
    with pytest.raises(InputError) as error:
        opened(source, part, **settings)
    assert "\n" not in str(error.value)
    root = Path(os.environ["DIFFUSION_ADAGN_CACHE"])
    assert not root.exists() or not list(root.iterdir())
    return str(error.value)


def check_named_and_skipped(root: Path, name: str, reason: str, remaining: int, fault: str = "broken image") -> None:
    """One image of the source is broken: the error names it, and data.skip_broken skips and counts it."""
    message = rejection(root)
    assert f"{fault} {name} " in message and reason in message and "data.skip_broken" in message
    data = opened(root, skip_broken=True)
    assert len(data) == remaining
    assert len(data.skipped) == 1 and data.skipped[0].startswith(f"{name}: ") and reason in data.skipped[0]


# ---------------------------------------------------------------------- one image


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("BMP", {}),
        ("GIF", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_truncated_images_are_broken_or_complete(format, options):
    image = Image.fromarray(pixels(0, 40))
    raw = encoded(image.convert("P") if format == "GIF" else image, format, **options)
    whole, broken = to_array(open_image(raw), None, 3), 0
    for length in (*range(1, len(raw), max(1, len(raw) // 40)), len(raw) - 1):
        try:
            assert np.array_equal(to_array(open_image(raw[:length]), None, 3), whole)
        except BrokenImage as error:
            assert str(error)
            broken += 1
    assert broken > 30


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(format: str) -> bytes:
    """A small file that claims 50,000 x 50,000 pixels."""
    image = Image.new("RGB", (4, 4))
    if format == "png":
        raw = encoded(image)
        return raw[:8] + chunk(b"IHDR", struct.pack(">II", SIDE, SIDE) + raw[24:29]) + raw[33:]
    if format in ("gif", "gif frame"):
        raw = bytearray(encoded(image.convert("P"), "GIF"))
        offset = 6 if format == "gif" else raw.index(b",\0\0\0\0") + 5
        raw[offset : offset + 4] = struct.pack("<HH", SIDE, SIDE)
    elif format == "webp":
        raw = bytearray(encoded(image, "WEBP", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")]))
        offset = raw.index(b"VP8X") + 12
        raw[offset : offset + 6] = (SIDE - 1).to_bytes(3, "little") * 2
    elif format == "bmp":
        raw = bytearray(encoded(image, "BMP"))
        raw[18:26] = struct.pack("<ii", SIDE, SIDE)
    else:
        raw = bytearray(encoded(image, "JPEG"))
        offset = raw.index(b"\xff\xc0") + 5
        raw[offset : offset + 4] = struct.pack(">HH", SIDE, SIDE)
    return bytes(raw)


@pytest.mark.serial
def test_bombs_are_rejected_before_allocation(tmp_path):
    formats = ("png", "gif", "gif frame", "webp", "bmp", "jpeg")
    for i, format in enumerate(formats):
        (tmp_path / str(i)).write_bytes(bomb(format))
    code = """if True:
        import resource, sys
        from pathlib import Path
        from diffusion_adagn.data.images import BrokenImage, open_image
        open_image(Path(sys.argv[1]))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name in sys.argv[2:]:
            try:
                open_image(Path(name))
            except BrokenImage as error:
                print(error)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    (tmp_path / "good").write_bytes(png())
    names = [str(tmp_path / "good"), *(str(tmp_path / str(i)) for i in range(len(formats)))]
    run = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    *messages, grown = run.stdout.splitlines()
    assert len(messages) == len(formats) and all("bomb" in line for line in messages)
    assert int(grown) < 50_000  # KiB; the pixels would be 2.5 million and more


def test_bomb_in_class_folder(tmp_path):
    root = make_folders(tmp_path / "d")
    (root / "ant" / "000.png").write_bytes(bomb("png"))
    check_named_and_skipped(root, "ant/000.png", "bomb", 3, "image too large:")


def lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "off"), [("LAB", 20), ("YCbCr", 4), ("CMYK", 1), ("HSV", 5), ("RGBX", 0), ("RGBa", 0)]
)
def test_colour_spaces_convert_to_rgb(mode, off, channels):
    rgb = Image.fromarray(pixels())
    image = lab(rgb) if mode == "LAB" else rgb.convert("RGBA").convert(mode) if mode == "RGBa" else rgb.convert(mode)
    # Pillow before 13 cannot read back an uncompressed YCbCr TIFF that it wrote (python-pillow issue 9770)
    if mode in ("LAB", "CMYK") or (mode == "YCbCr" and int(PIL.__version__.split(".")[0]) >= 13):
        image = open_image(encoded(image, "TIFF"))
        assert image.mode == mode
    expected = np.asarray(rgb.convert("L" if channels == 1 else "RGB")).reshape(8, 8, channels)
    assert np.abs(to_array(image, None, channels).astype(int) - expected).max() <= off


def test_float_and_32_bit_tiffs_are_broken(tmp_path):
    root = make_folders(tmp_path / "d")
    for mode, reason in (("F", "floating point"), ("I", "32-bit")):
        Image.new(mode, (8, 8)).save(root / "bee" / "x.tif")
        check_named_and_skipped(root, "bee/x.tif", reason, 4)
        for folder in Path(os.environ["DIFFUSION_ADAGN_CACHE"]).iterdir():
            folder.rename(tmp_path / mode)


def raw_png(depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG file of 2 x 2 pixels, with extra chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_transparency_uses_the_background():
    gray = open_image(raw_png(16, 0, b"\0\0\0\xff\xff" * 2, chunk(b"tRNS", b"\0\0")))
    assert to_array(gray, None, 1, "white")[0].ravel().tolist() == [255, 255]
    assert to_array(gray, None, 3, "black")[0].ravel().tolist() == [0] * 3 + [255] * 3
    colour = open_image(
        raw_png(16, 6, b"\0" + (b"\x80\x7f" * 3 + b"\0\0") + (b"\x80\x7f" * 3 + b"\xff\xff") + b"\0" * 17)
    )
    assert to_array(colour, None, 3, "white")[0].tolist() == [[255] * 3, [128] * 3]


def test_invalid_palettes_and_transparencies():
    rows = b"\0\0\1" * 2
    for extra in ([], [chunk(b"PLTE", b"\1\2\3")], [chunk(b"PLTE", b"\1\2\3\4\5\6"), chunk(b"tRNS", b"\0" * 300)]):
        try:
            assert to_array(open_image(raw_png(8, 3, rows, *extra)), None, 3).shape == (2, 2, 3)
        except BrokenImage as error:
            assert "palette" in str(error)


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("PNG",
    {"default_image": True}), ("TIFF", {})],)  # fmt: skip
def test_animations_use_the_first_frame(format, options):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    image = open_image(encoded(frames[0], format, save_all=True, append_images=frames[1:], **options))
    assert image.n_frames >= 3
    assert to_array(image, None, 3).reshape(-1, 3).tolist() == [[255, 0, 0]] * 16


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_each_format(format, orientation):
    """The rotated image has its first row and column where EXIF says."""
    corners = {1: "rgb", 2: "grk", 3: "kbg", 4: "bkr", 5: "rbg", 6: "brk", 7: "kgb", 8: "gkr"}[orientation]
    colours = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255), "k": (0, 0, 0)}
    stored = np.zeros((32, 64, 3), np.uint8)  # r g over b k
    stored[:16, :32], stored[:16, 32:], stored[16:, :32] = (colours[c] for c in "rgb")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "TIFF": {}}[format]
    out = to_array(open_image(encoded(Image.fromarray(stored), format, exif=exif, **options)), None, 3)
    assert out.shape == ((32, 64, 3) if orientation < 5 else (64, 32, 3))
    for (row, column), name in zip(((4, 4), (4, -5), (-5, 4)), corners):
        assert np.abs(out[row, column].astype(int) - colours[name]).max() < 8


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", 9, (1, 2)])
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_corrupted_exif_is_ignored(exif, format):
    if not isinstance(exif, bytes):
        value, exif = exif, Image.Exif()
        exif[0x0112] = value
    image = Image.fromarray(np.repeat(np.repeat(pixels()[:4, :6], 8, 0), 8, 1))
    out = to_array(open_image(encoded(image, format, exif=exif)), None, 3)
    assert np.array_equal(out, to_array(open_image(encoded(image, format)), None, 3))


def test_colour_profiles_are_not_applied():
    from PIL import ImageCms

    image = Image.fromarray(pixels())
    for profile in (b"junk" * 40, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        assert np.array_equal(to_array(open_image(encoded(image, icc_profile=profile)), None, 3), pixels())


def test_images_without_pixels_are_broken():
    for raw in (Image.new("RGB", (0, 4)), np.zeros((4, 0, 3), np.uint8)):
        with pytest.raises(BrokenImage, match="none"):
            open_image(raw)


# ---------------------------------------------------------------------- class folders


def test_contents_determine_the_format(tmp_path):
    root = make_folders(tmp_path / "d")
    image = Image.fromarray(pixels(5))
    (root / "ant" / "000.png").write_bytes(encoded(image, "JPEG", quality=95))
    (root / "ant" / "001.png").write_bytes(encoded(image, "WEBP", lossless=True))
    (root / "bee" / "000.png").rename(root / "bee" / "000.GIF")
    data = opened(root)
    assert np.array_equal(data.gather([1])[0][0], pixels(5))
    assert np.array_equal(data.gather([2])[0][0], pixels(2))
    (root / "bee" / "001.png").write_text("this is a text, not an image")
    with pytest.raises(InputError, match=r"broken image bee/001\.png .*not an image"):
        opened(root)
    assert opened(root, skip_broken=True).skipped == ("bee/001.png: it is not an image that Pillow can read",)


def test_training_reports_skipped_images(tmp_path, capsys):
    root = make_folders(tmp_path / "d")
    (root / "ant" / "000.png").write_bytes(b"")
    for part, lines in (("train", 1), (None, 1), ("heldout", 0)):
        open_dataset(DataConfig(source=str(root), skip_broken=True), part)
        notes = [line for line in capsys.readouterr().err.splitlines() if "broken" in line]
        assert len(notes) == lines
        assert all("1 of 4 images are broken and skipped" in n and "ant/000.png: it is empty" in n for n in notes)


@pytest.mark.parametrize(
    ("file_type", "reason"),
    [("dangling", "No such file"), ("loop", "symbolic links"), ("pipe", "not a file"), ("socket", "not a file"), ("huge", "bytes, more")],
)  # fmt: skip
def test_files_that_are_not_images(tmp_path, monkeypatch, file_type, reason):
    root = make_folders(tmp_path / "d")
    path = root / "bee" / "x.png"
    if file_type == "dangling":
        path.symlink_to("nothing.png")
    elif file_type == "loop":
        path.symlink_to("x.png")
    elif file_type == "pipe":
        os.mkfifo(path)
    elif file_type == "socket":
        monkeypatch.chdir(path.parent)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("x.png")
    else:
        path.touch()
        os.truncate(path, 2**36)
    check_named_and_skipped(root, "bee/x.png", reason, 4)


def test_folder_named_like_an_image(tmp_path):
    root = make_folders(tmp_path / "d")
    (root / "ant" / "x.png").mkdir()
    (root / "ant" / "x.png" / "inside.png").write_bytes(png(9))
    (root / "y.png").mkdir()
    assert "its 3 classes: y.png" in rejection(root)
    (root / "y.png").rmdir()
    assert opened(root).counts().tolist() == [3, 2]


def test_links_between_folders(tmp_path):
    root = make_folders(tmp_path / "d")
    (root / "ant" / "up").symlink_to("..")  # not followed
    (root / "self").symlink_to("self")
    (root / "cow").symlink_to(make_folders(tmp_path / "e", ("cow",)) / "cow")
    assert opened(root).counts().tolist() == [2, 2, 2]
    assert opened(root).label_space.names == ("ant", "bee", "cow")


@pytest.mark.parametrize("target", [".", "..", "/"])
def test_class_folder_linking_to_parent_is_rejected(tmp_path, monkeypatch, target):
    root = make_folders(tmp_path / "d")
    (root / "cow").symlink_to(target)
    listed = []
    for name in ("listdir", "scandir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real: listed.append(args) or real(*args))
    assert "cow is a link to a folder that contains it" in rejection(root)
    assert len(listed) < 10  # the folders are not traversed


def test_file_names_that_are_not_utf8(tmp_path):
    root = make_folders(tmp_path / "d")
    (root / "ant" / "000.png").rename(root / "ant" / "\udcff 0.png")
    (root / "bee" / "000.png").rename(root / "bee" / "two\nlines\t.png")
    assert len(opened(root)) == 4
    for path in (*(root / "ant").iterdir(), *(root / "bee").iterdir()):
        path.write_bytes(path.read_bytes() if "001" in path.name else b"?")
    with pytest.raises(InputError, match=r"broken image ant/\\udcff 0\.png") as error:
        opened(root)
    str(error.value).encode()
    skipped = opened(root, skip_broken=True).skipped
    assert [s.split(":")[0] for s in skipped] == [r"ant/\udcff 0.png", r"bee/two\nlines\t.png"]


def test_folder_names_that_are_not_utf8(tmp_path):
    root = make_folders(tmp_path / "d")
    (root / "bee").rename(root / "\udcffbee")
    assert r"d/\udcffbee has a name that is not UTF-8 text. Rename it." in rejection(root)
    root.rename(tmp_path / "\udcffd")
    assert r"/\udcffd is not UTF-8 text" in rejection(f"{tmp_path}/\udcffd")
    assert "is not UTF-8 text" in rejection("a\0b")


def test_class_names_become_one_line(tmp_path):
    root = make_folders(tmp_path / "d", ("two\nlines", " 日本 語 "))
    assert opened(root).label_space.names == ("日本 語", "two lines")


def test_hidden_and_system_files_are_ignored(tmp_path):
    root = make_folders(tmp_path / "my pics ü", ("ä b", "c"))
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._000.png", ".hidden.png"):
        (root / "c" / name).write_bytes(b"\0\5\x16\7")
    for name in (".DS_Store", "Thumbs.db"):
        (root / name).write_bytes(b"\0")
    (root / ".cache").mkdir()
    (root / ".cache" / "x.png").write_bytes(b"")
    (root / "c" / ".thumbs").mkdir()
    (root / "c" / ".thumbs" / "x.png").write_bytes(b"")
    assert opened(root).counts().tolist() == [2, 2]


def test_class_names_differing_by_spaces_or_case(tmp_path):
    root = make_folders(tmp_path / "d", ("red ant", "red  ant", "bee"))
    message = rejection(root)
    assert f"the class names of {root}" in message and "'red ant'" in message and "spaces" in message
    (root / "red  ant").rename(root / "Red Ant")
    data = opened(root)
    assert data.label_space.names == ("Red Ant", "bee", "red ant")
    assert [data.label_space.parse([n])[0] for n in ("Red Ant", "red ant")] == [0, 2]
    with pytest.raises(InputError, match="matches several classes"):
        data.label_space.parse(["RED ANT"])
    (root / "bee").rename(root / "   ")
    with pytest.raises(InputError, match=r"the class names of .* empty name"):
        opened(root)


def test_fewer_images_than_a_batch(tmp_path):
    root = make_folders(tmp_path / "d", ("only",), each=3)
    data = opened(root)
    assert (data.label_space.K, data.counts().tolist()) == (1, [3])
    images, labels = data.gather(SampleOrder(3, seed=0)(torch.arange(8)).tolist())
    assert images.shape == (8, 8, 8, 3) and labels.tolist() == [0] * 8
    train, heldout = (opened(root, part, heldout_fraction=0.05) for part in ("train", "heldout"))
    assert (len(train), len(heldout)) == (2, 1)
    alone = make_folders(tmp_path / "e", ("only",), each=1)
    assert len(opened(alone, "train", heldout_fraction=0.05)) == 1
    with pytest.raises(InputError, match="has one image"):
        opened(alone, "heldout", heldout_fraction=0.05)


def test_empty_split_is_rejected(tmp_path):
    root = tmp_path / "d"
    make_folders(root / "train")
    (root / "test").mkdir()
    assert f"{root / 'test'} is not a folder of class folders: it contains no images" in rejection(f"{root}:test")
    (root / "test" / "ant").mkdir()
    assert "it contains no images" in rejection(f"{root}:test")


@pytest.mark.parametrize("hidden", ["d", "bee"])
def test_unreadable_folders_are_rejected(tmp_path, monkeypatch, hidden):
    """chmod does not restrict root, so the error is simulated."""
    root, scandir = make_folders(tmp_path / "d"), os.scandir

    def fail(path="."):
        if Path(os.fsdecode(path)).name == hidden:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    monkeypatch.setattr(os, "listdir", lambda path=".": [e.name for e in fail(path)])
    message = rejection(root)
    assert f"data.source {root} cannot be read" in message and "Permission denied" in message


@pytest.mark.parametrize("path_type", ["pipe", "long", "dangling"])
def test_source_that_is_not_a_folder(tmp_path, path_type):
    path = tmp_path / ("x" * 5000 if path_type == "long" else "x")
    if path_type == "pipe":
        os.mkfifo(path)
    elif path_type == "dangling":
        path.symlink_to("nothing")
    expected = {"pipe": "is a file; expected", "long": "File name too long", "dangling": "no such path"}
    assert expected[path_type] in rejection(path)


# ---------------------------------------------------------------------- parquet


def make_parquet(path: Path, columns: dict, metadata: dict | None = None, schema=None) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns, schema=schema)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)
    return path


def image_rows(n: int, start: int = 0) -> list[dict]:
    return [{"bytes": png(start + i), "path": None} for i in range(n)]


def class_names_metadata(names: list[str]) -> dict:
    """The metadata that `datasets` writes if the labels have names."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def test_misspelt_columns_get_suggestions(tmp_path):
    file = make_parquet(tmp_path / "p.parquet", {"image": image_rows(2), "label": [0, 1]})
    assert "no column 'imgae' (data.image_column). Nearest: image. Its columns: image, label." in rejection(
        file, image_column="imgae"
    )
    assert "(data.label_column). Nearest: label." in rejection(file, label_column="Label")
    assert "Its columns" in rejection(file, label_column="zzz") and "Nearest" not in rejection(file, label_column="zzz")


@pytest.mark.parametrize(("labels", "message"), [([0, 5],
    "row 1: label 5 in column 'label' is not among the 2 classes (ant, bee)"), ([0, -7],
    "row 1: label -7 in column 'label'"), ([None, 1], "row 0: label None in column 'label'"), ([0, 2**40],
    "row 1: label 1099511627776"),],)  # fmt: skip
def test_labels_outside_the_named_classes(tmp_path, labels, message):
    import pyarrow as pa

    labels = pa.array(labels, pa.int64())
    file = make_parquet(
        tmp_path / "p.parquet", {"image": image_rows(2), "label": labels}, class_names_metadata(["ant", "bee"])
    )
    assert message in rejection(file)
    assert f"{file}:train" in rejection(file)


@pytest.mark.parametrize(("labels", "message"), [([0.0, float("nan")], "column 'label' of .* contains float64"),
    ([float("nan")] * 2, "contains float64"), ([None, None], "contains null"), (["a", None], "row 1: label None"),
    (["a", ""], "empty name"), (["red ant", "red  ant"], r"class names of .* \(column 'label'\).*'red ant'"), ([b"a",
    b"b"], "contains binary"), ([{"x": 1}, {"x": 2}], "contains several values"), ([-3, -4], "row 0: label -3"),],
    )  # fmt: skip
@pytest.mark.parametrize("has_names", [False, True])  # in the metadata; only whole numbers can have names
def test_labels_of_wrong_type(tmp_path, labels, message, has_names):
    import re

    metadata = class_names_metadata(["ant", "bee"]) if has_names else None
    file = make_parquet(tmp_path / "p.parquet", {"image": image_rows(2), "label": labels}, metadata)
    assert re.search(message, rejection(file))


def test_pandas_categories_are_class_names(tmp_path):
    import pyarrow as pa

    labels = pa.array(["bee", "ant", "bee"]).dictionary_encode()
    file = make_parquet(tmp_path / "p.parquet", {"image": image_rows(3), "label": labels})
    data = opened(file)
    assert (data.label_space.names, data.labels.tolist()) == (("ant", "bee"), [1, 0, 1])
    labels = pa.array([1, 0, 1]).dictionary_encode()
    data = opened(make_parquet(tmp_path / "q.parquet", {"image": image_rows(3), "label": labels}))
    assert (data.label_space.names, data.labels.tolist()) == (("0", "1"), [1, 0, 1])


def test_duplicate_class_names_are_rejected(tmp_path):
    file = make_parquet(
        tmp_path / "p.parquet", {"image": image_rows(2), "label": [0, 1]}, class_names_metadata(["ant", "ant"])
    )
    message = rejection(file)
    assert str(file) in message and "duplicated" in message


@pytest.mark.parametrize(("image", "reason"), [(None, "it is empty"), ({"bytes": None, "path": None}, "it is empty"),
    ({"bytes": b"", "path": ""}, "it is empty"), ({"bytes": b"no image", "path": None}, "not an image"),
    ({"bytes": None, "path": "absent.png"}, "No such file"), ({"bytes": None, "path": "."}, "not a file"),
    ({"bytes": None, "path": "../secret.png"}, "outside"), ({"bytes": None, "path": "sub/../../secret.png"},
    "outside"), ({"bytes": None, "path": "ABSOLUTE"}, "outside"), ({"bytes": None, "path": "link.png"}, "outside"),
    ({"bytes": None, "path": "loop.png"}, "loop"), ({"bytes": None, "path": "a\0b"}, "null"), ({"bytes": None,
    "path": "https://example.com/x.png"}, "No such file"),],)  # fmt: skip
def test_rows_with_invalid_images_or_paths(tmp_path, image, reason):
    """secret.png is a valid image: it would be read if its path were followed."""
    (tmp_path / "secret.png").write_bytes(png())
    if image and image["path"] == "ABSOLUTE":
        image["path"] = str(tmp_path / "secret.png")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "link.png").symlink_to("../secret.png")
    (tmp_path / "p" / "loop.png").symlink_to("loop.png")
    rows = [*image_rows(1), image, *image_rows(1)]
    file = make_parquet(tmp_path / "p" / "train.parquet", {"image": rows, "label": [0, 1, 1]})
    message = rejection(file.parent)
    assert "broken image train.parquet, row 1 " in message and reason in message
    data = opened(file, skip_broken=True)
    assert (len(data), len(data.skipped)) == (2, 1) and reason in data.skipped[0]


def test_paths_inside_the_parquet_folder_work(tmp_path, monkeypatch):
    root = make_folders(tmp_path / "p" / "files")
    rows = [{"path": f"files/ant/{i:03}.png"} for i in range(2)]
    import pyarrow as pa

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": None, **row} for row in rows], struct)
    make_parquet(tmp_path / "p" / "train.parquet", {"image": image, "label": [0, 1]})
    monkeypatch.chdir("/")
    assert np.array_equal(opened(tmp_path / "p").gather([1])[0][0], np.asarray(Image.open(root / "ant" / "001.png")))


def test_hub_paths_outside_cache_are_rejected(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root = make_folders(tmp_path / "hub", ("ant",))
    (tmp_path / "secret.png").write_bytes(png())
    paths = [root / "ant" / "001.png", tmp_path / "secret.png"]
    rows = {"image": [{"bytes": None, "path": str(p)} for p in paths], "label": [0, 0]}
    table = datasets.Dataset.from_dict(
        rows, features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    )
    builder = SimpleNamespace(config=SimpleNamespace(data_files=None), info=SimpleNamespace(features=table.features))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train"])
    assert "secret.png" in rejection("some/one") and "outside" in rejection("some/one")
    data = opened("some/one", skip_broken=True)
    assert len(data.skipped) == 1 and np.array_equal(data.gather([0])[0][0], pixels(1))


def test_struct_without_bytes_is_not_images(tmp_path):
    file = make_parquet(tmp_path / "p.parquet", {"image": [{"path": "a.png"}], "label": [0]})
    assert "no known image column" in rejection(file)
    assert "column 'image'" in rejection(file, image_column="image")


@pytest.mark.parametrize("file_type", ["empty", "pipe", "folder", "dangling", "text"])
def test_files_that_are_not_parquet(tmp_path, file_type):
    path = tmp_path / "p" / "train.parquet"
    path.parent.mkdir()
    if file_type == "pipe":
        os.mkfifo(path)
    elif file_type == "folder":
        path.mkdir()
    elif file_type == "dangling":
        path.symlink_to("nothing")
    else:
        path.write_text("image,label\n" if file_type == "text" else "")
    message = rejection(tmp_path / "p")
    assert "train.parquet" in message or f"data.source {tmp_path / 'p'} cannot be read" in message


def test_corrupted_parquet_bytes_are_handled(tmp_path):
    """Each corrupted copy is read, or rejected with a message of one line."""
    raw = make_parquet(tmp_path / "good.parquet", {"image": image_rows(3), "label": ["ä", "b", "c"]}).read_bytes()
    path, random = tmp_path / "p.parquet", np.random.default_rng(0)
    for position in random.integers(0, len(raw), 60):
        corrupted = bytearray(raw)
        corrupted[position] ^= int(random.integers(1, 256))
        path.write_bytes(corrupted)
        try:
            assert opened(path, skip_broken=True).labels.shape[0] <= 3
        except InputError as error:
            assert "\n" not in str(error)
    for cut in range(0, len(raw), max(1, len(raw) // 15)):
        path.write_bytes(raw[:cut])
        with pytest.raises(InputError, match=r"p\.parquet"):
            opened(path)


def test_missing_images_never_shift_labels(tmp_path, monkeypatch):
    """As in a corrupted file: images after a gap would get the labels of others."""
    from diffusion_adagn.data.tables import ParquetTable

    for i in range(2):
        make_parquet(tmp_path / "p" / f"train-{i}.parquet", {"image": image_rows(3, 3 * i), "label": [0, 1, 2]})
    batches = ParquetTable.batches
    short = lambda *a: ((file, rows[1:] if "-0" in file else rows) for file, rows in batches(*a))  # noqa: E731
    monkeypatch.setattr(ParquetTable, "batches", short)
    for skip in (False, True):
        assert "6 rows in column 'label', but 5 in column 'image'" in rejection(tmp_path / "p", skip_broken=skip)


def test_labels_that_are_not_utf8(tmp_path):
    import pyarrow as pa

    labels = pa.array([b"ok", b"\xff\xfe"]).view(pa.string())
    file = make_parquet(tmp_path / "p.parquet", {"image": image_rows(2), "label": labels})
    assert "p.parquet" in rejection(file)


def test_invalid_column_descriptions(tmp_path):
    for text in ("{no json", '{"info": {"features": {"label": {"_type": "Nothing"}}}}', "[]", '{"info": 3}'):
        file = make_parquet(tmp_path / "p.parquet", {"image": image_rows(2), "label": [0, 1]}, {"huggingface": text})
        try:
            assert opened(file).labels.tolist() == [0, 1]
        except InputError as error:
            assert "p.parquet" in str(error)


def test_files_of_one_split_must_match(tmp_path):
    first = {"image": image_rows(2), "label": [0, 1]}
    make_parquet(tmp_path / "p" / "train-0.parquet", first, class_names_metadata(["ant", "bee"]))
    second = tmp_path / "p" / "train-1.parquet"
    make_parquet(second, {"photo": image_rows(2), "label": [0, 1]})
    assert f"{second} has the columns photo, label, but train-0.parquet image, label" in rejection(tmp_path / "p")
    make_parquet(second, first | {"label": ["ant", "bee"]})
    assert f"{second} has" in rejection(tmp_path / "p") and "in column 'label'" in rejection(tmp_path / "p")
    make_parquet(second, first, class_names_metadata(["bee", "ant"]))  # the same numbers mean other classes
    assert "in column 'label'" in rejection(tmp_path / "p")
    make_parquet(second, first | {"image": [1, 2]}, {})
    make_parquet(tmp_path / "p" / "train-0.parquet", first)
    assert f"{second} has" in rejection(tmp_path / "p") and "in column 'image'" in rejection(tmp_path / "p")


def test_splits_must_have_same_classes(tmp_path):
    rows, root = {"image": image_rows(2), "label": [0, 1]}, tmp_path / "p"
    make_parquet(root / "train.parquet", rows, class_names_metadata(["ant", "bee"]))
    make_parquet(root / "test.parquet", rows, class_names_metadata(["bee", "ant"]))
    message = rejection(root, "heldout")
    assert "the classes bee, ant in 'test', but the classes ant, bee in 'train'" in message
    make_parquet(root / "test.parquet", rows | {"label": ["ant", "bee"]})
    assert "contains names in 'test'" in rejection(root, "heldout")
    make_parquet(root / "train.parquet", {"image": image_rows(2), "other": [0, 1]})
    assert "train has no column 'label'" in rejection(root, "heldout")


def test_split_without_rows_is_rejected(tmp_path):
    import pyarrow as pa

    make_parquet(tmp_path / "p" / "train.parquet", {"image": image_rows(2), "label": [0, 1]})
    nothing = {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}
    make_parquet(tmp_path / "p" / "test.parquet", nothing)
    assert "the split 'test'" in rejection(tmp_path / "p", "heldout") and "no rows" in rejection(
        tmp_path / "p", "heldout"
    )


# ---------------------------------------------------------------------- the store


def test_changed_source_gets_new_store(tmp_path, store):
    root = make_folders(tmp_path / "d")
    first = opened(root)
    path = root / "ant" / "000.png"
    path.write_bytes(encoded(Image.fromarray(pixels(77))))
    os.utime(path, ns=(1, 1))
    second = opened(root)
    assert second.folder != first.folder and np.array_equal(second.gather([0])[0][0], pixels(77))
    assert np.array_equal(first.gather([0])[0][0], pixels(0))  # an open data set stays readable
    file = make_parquet(tmp_path / "p.parquet", {"image": image_rows(2), "label": [0, 1]})
    third = opened(file)
    make_parquet(file, {"image": image_rows(2, start=50), "label": [0, 1]})
    assert np.array_equal(opened(file).gather([0])[0][0], pixels(50)) and opened(file).folder != third.folder
    assert len(list(store.iterdir())) == 4


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("meta.json", b""), ("meta.json", b"[]"), ("meta.json", b"\xff\xfe"), ("meta.json", b"[" * 100_000),
        ("labels.npy", b""), ("labels.npy", b"PK\x03\x04 no archive"), ("labels.npy", b"\x93NUMPY\x01\x00\x06\x00('''{\n"),
        ("images.npy", b""), ("images.npy", b"PK\x05\x06" + b"\0" * 18), ("images.npy", b"\x93NUMPY" + b"\xff" * 90),
    ],
)  # fmt: skip
def test_corrupted_store_files_are_rewritten(tmp_path, store, name, contents):
    root = make_folders(tmp_path / "d")
    data = opened(root)
    (data.folder / name).write_bytes(contents)
    again = opened(root)
    assert again.fingerprint == data.fingerprint
    assert np.array_equal(again.gather([3])[0][0], pixels(3))
    assert [p.name for p in store.iterdir()] == [data.folder.name]


@pytest.mark.parametrize("label", [-1, 2, 2**62])
def test_store_with_out_of_range_labels(tmp_path, label):
    root = make_folders(tmp_path / "d")
    data = opened(root)
    np.save(data.folder / "labels.npy", np.array([0, 0, 1, label]))
    assert opened(root).labels.tolist() == [0, 0, 1, 1]


def test_meta_values_of_wrong_type(tmp_path):
    root = make_folders(tmp_path / "d")
    data = opened(root)
    whole = json.loads((data.folder / "meta.json").read_text())
    for key, value in (("label_space", None), ("counts", "x"), ("skipped", 7), ("shape", {}), ("label_space",
        {"names": 3}),):  # fmt: skip
        (data.folder / "meta.json").write_text(json.dumps(whole | {key: value}))
        assert opened(root).fingerprint == data.fingerprint
        assert json.loads((data.folder / "meta.json").read_text()) == whole


def test_file_or_link_in_place_of_store(tmp_path, store):
    root = make_folders(tmp_path / "d")
    folder = opened(root).folder
    folder.rename(tmp_path / "moved")
    folder.write_text("-")
    with pytest.raises(InputError, match=r"cannot be stored in .*data\.store_dir"):
        opened(root)
    assert [p.name for p in store.iterdir()] == [folder.name]
    folder.unlink()
    folder.symlink_to(tmp_path / "moved")
    assert len(opened(root)) == 4 and folder.is_symlink()


def mount_tmpfs(path: Path, options: str) -> None:
    path.mkdir()
    result = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True)
    if result.returncode:
        pytest.skip("cannot mount a file system here")


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    mount_tmpfs(disk, "size=1m")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def start_process(code: str, *arguments, **variables) -> subprocess.Popen:
    """A process that runs code which may call `opened`."""
    start = """if True:
        import sys
        from diffusion_adagn.config import DataConfig
        from diffusion_adagn.data import open_dataset
        from diffusion_adagn.errors import InputError
        def opened(source, **settings):
            return open_dataset(DataConfig(source=source, heldout_fraction=0.0, **settings), progress=False)
    """
    lines = [sys.executable, "-c", start + "\n" + code, *map(str, arguments)]
    return subprocess.Popen(
        lines, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | variables
    )


def test_disk_full_while_decoding(tmp_path, small_disk):
    """The free space was checked, and is gone later. In another process, since a memory map would kill it."""
    good, big = make_folders(tmp_path / "good"), make_folders(tmp_path / "big", each=60, size=64)
    first = opened(good, store_dir=str(small_disk))
    code = """
import shutil
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(0, 0, 10**12)
try:
    opened(sys.argv[1], store_dir=sys.argv[2])
except InputError as error:
    print(error)
"""
    run = start_process(code, big, small_disk)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert out.count("\n") == 1 and "No space left" in out and "data.store_dir" in out
    assert list(small_disk.iterdir()) == [first.folder]
    again = opened(good, store_dir=str(small_disk))
    assert again.fingerprint == first.fingerprint and np.array_equal(again.gather([3])[0][0], pixels(3))


@pytest.mark.parametrize("file", ["images", "labels", "meta"])
def test_no_space_for_each_file(tmp_path, store, monkeypatch, file):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    target = {"images": ("diffusion_adagn.data.decode._write_header", full), "labels": ("numpy.save", full),
        "meta": ("diffusion_adagn.data.decode._write_meta", full),}[file]  # fmt: skip
    good = opened(make_folders(tmp_path / "good"))
    root = make_folders(tmp_path / "d")
    monkeypatch.setattr(*target)
    with pytest.raises(InputError, match=r"cannot be stored in .*No space left on device\. Set data\.store_dir"):
        opened(root)
    assert list(store.iterdir()) == [good.folder]


def test_read_only_store_folder(tmp_path, small_disk):
    root = make_folders(tmp_path / "d")
    first = opened(root, store_dir=str(small_disk))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert opened(root, store_dir=str(small_disk)).fingerprint == first.fingerprint
    for folder in (small_disk, small_disk / "below"):
        with pytest.raises(InputError, match=r"cannot be stored in .*Read-only file system.*data\.store_dir"):
            opened(root, image_size=4, store_dir=str(folder))


SLOW_DECODING = """
import os, time
from diffusion_adagn.data import images
load = images.open_image
def slow(raw):
    os.write(1, b"decoding\\n")  # one write per line: print writes the line end separately, and there are two threads
    time.sleep(60)
    return load(raw)
images.open_image = slow
opened(sys.argv[1])
"""


def set_age(folder: Path, seconds: int) -> None:
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.serial
def test_killed_while_decoding(tmp_path, store):
    """Partial files of a killed process are ignored, and removed after ten minutes; those of a running process stay."""
    root, another = make_folders(tmp_path / "d"), make_folders(tmp_path / "e")
    killed, working = (
        start_process(SLOW_DECODING, root),
        start_process(SLOW_DECODING, another),
    )  # each decodes its own store

    def partial_stores():
        return {p for p in store.iterdir() if p.name.startswith(".") and p.suffix != ".lock"}

    try:
        for process in (killed, working):
            line = process.stdout.readline()
            assert line == "decoding\n", (line, process.poll(), process.poll() is not None and process.communicate())
        before = partial_stores()
        assert len(before) == 2
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        data = opened(root)
        assert np.array_equal(data.gather([3])[0][0], pixels(3))
        assert partial_stores() == before
        (store / ".mine").mkdir()
        for folder in (*before, store / ".mine"):
            set_age(folder, 700)
        opened(root, image_size=4)
        remaining = partial_stores() - {store / ".mine"}
        assert len(remaining) == 1 and remaining < before and (store / ".mine").is_dir()
    finally:
        for process in (killed, working):
            process.kill()
            process.communicate()
    set_age(*remaining, 700)
    opened(root, channels=1)
    assert partial_stores() == {store / ".mine"}
    assert opened(another).folder.is_dir() and not list(store.glob(".*.lock"))  # a dead process has no lock


PREPARE = """
import hashlib
import numpy as np
from pathlib import Path
print("here", flush=True)
while not Path(sys.argv[3]).exists():
    pass
for round in range(int(sys.argv[2])):
    data = opened(sys.argv[1])
    images, labels = data.gather(np.arange(len(data)))
    print(data.fingerprint, hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(), data.folder.name, flush=True)
"""


@pytest.mark.serial
@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("corrupted", [False, True])
def test_processes_share_one_new_store(tmp_path, store, n, corrupted):
    root = make_folders(tmp_path / "d", each=40, size=32)
    if corrupted:
        os.truncate(opened(root).folder / "images.npy", 1000)
    processes = [start_process(PREPARE, root, 3, tmp_path / "go") for _ in range(n)]
    for process in processes:
        assert process.stdout.readline() == "here\n"
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * n, [err[-500:] for _, err in outputs]
    lines = {line for out, _ in outputs for line in out.splitlines()}
    assert len(lines) == 1
    assert [p.name for p in store.iterdir()] == [lines.pop().split()[2]]


def test_store_moved_by_another_process_is_readable(tmp_path, monkeypatch):
    """Another process that found the old store corrupted may move the new one away: it stays readable once opened."""
    import diffusion_adagn.data.store as module

    root, rename = make_folders(tmp_path / "d"), Path.rename

    def rename_and_move_away(self, target):
        moved = rename(self, target)
        if Path(target).parent == module._root(DataConfig()):
            rename(Path(target), tmp_path / "moved")
        return moved

    monkeypatch.setattr(Path, "rename", rename_and_move_away)
    assert np.array_equal(opened(root).gather([3])[0][0], pixels(3))
