"""Invalid labelled images: an error that names the fault, or a counted skip, and no partial files."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageCms
from processes import Process

from malformed_data import DISK_THAT_FILLS, MEMORY_OF_IMAGES, OPENED, PREPARE, SLOW_DECODING, bomb  # isort: skip
from malformed_data import check_named_and_skipped, chunk, encoded, image_rows, lab, make_folders  # isort: skip
from malformed_data import make_special, make_table, message, mount_tmpfs, opened, pixels, png, raw_png  # isort: skip
from malformed_data import rejection, set_age, start_process  # isort: skip

from diffusion_adagn.config import DataConfig
from diffusion_adagn.data import open_dataset
from diffusion_adagn.data import store as store_module
from diffusion_adagn.data.images import BrokenImage, open_image, to_array
from diffusion_adagn.data.rng import SampleOrder
from diffusion_adagn.errors import InputError


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def root(tmp_path):
    """Two class folders of two images."""
    return make_folders(tmp_path / "d")


def first_image(source, position=0, **settings):
    return opened(source, **settings).gather([position])[0][0]


# ---------------------------------------------------------------------- one image


@pytest.mark.parametrize(("format", "options"), [
    ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("BMP", {}),
    ("GIF", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}),
])  # fmt: skip
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


@pytest.mark.serial
def test_bombs_are_rejected_before_allocation(tmp_path):
    (tmp_path / "good").write_bytes(png())
    names, formats = [str(tmp_path / "good")], ("png", "gif", "gif frame", "webp", "bmp", "jpeg")
    for format in formats:
        names.append(str(tmp_path / format))
        Path(names[-1]).write_bytes(bomb(format))
    command = [sys.executable, "-c", OPENED + MEMORY_OF_IMAGES, *names]
    *lines, grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(formats) and all("bomb" in line for line in lines)
    assert int(grown) < 50_000  # KiB; the pixels would be 2.5 million and more


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "off"), [("LAB", 20), ("YCbCr", 4), ("CMYK", 1), ("HSV", 5), ("RGBX", 0), ("RGBa", 0)]
)
def test_colour_spaces_convert_to_rgb(mode, off, channels):
    rgb = Image.fromarray(pixels())
    image = lab(rgb) if mode == "LAB" else (rgb.convert("RGBA") if mode == "RGBa" else rgb).convert(mode)
    # Pillow before 13 cannot read back an uncompressed YCbCr TIFF that it wrote (python-pillow issue 9770)
    if mode in ("LAB", "CMYK") or (mode == "YCbCr" and int(PIL.__version__.split(".")[0]) >= 13):
        image = open_image(encoded(image, "TIFF"))
        assert image.mode == mode
    expected = np.asarray(rgb.convert("L" if channels == 1 else "RGB")).reshape(8, 8, channels)
    assert np.abs(to_array(image, None, channels).astype(int) - expected).max() <= off


def test_16_bit_transparency_uses_the_background():
    gray = open_image(raw_png(16, 0, b"\0\0\0\xff\xff" * 2, chunk(b"tRNS", b"\0\0")))
    assert to_array(gray, None, 1, "white")[0].ravel().tolist() == [255, 255]
    assert to_array(gray, None, 3, "black")[0].ravel().tolist() == [0] * 3 + [255] * 3
    rows = b"\0" + (b"\x80\x7f" * 3 + b"\0\0") + (b"\x80\x7f" * 3 + b"\xff\xff") + b"\0" * 17
    assert to_array(open_image(raw_png(16, 6, rows)), None, 3, "white")[0].tolist() == [[255] * 3, [128] * 3]


def test_invalid_palettes_and_transparencies():
    for extra in ([], [chunk(b"PLTE", b"\1\2\3")], [chunk(b"PLTE", b"\1\2\3\4\5\6"), chunk(b"tRNS", b"\0" * 300)]):
        try:
            assert to_array(open_image(raw_png(8, 3, b"\0\0\1" * 2, *extra)), None, 3).shape == (2, 2, 3)
        except BrokenImage as error:
            assert "palette" in str(error)


@pytest.mark.parametrize(
    ("format", "options"),
    [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("PNG", {"default_image": True}), ("TIFF", {})],
)
def test_animations_use_the_first_frame(format, options):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    image = open_image(encoded(frames[0], format, save_all=True, append_images=frames[1:], **options))
    assert image.n_frames >= 3
    assert to_array(image, None, 3).reshape(-1, 3).tolist() == [[255, 0, 0]] * 16


@pytest.mark.parametrize(("format", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True}), ("TIFF", {})])
@pytest.mark.parametrize(
    ("orientation", "corners"), list(enumerate(["rgb", "grk", "kbg", "bkr", "rbg", "brk", "kgb", "gkr"], 1))
)
def test_exif_orientation_of_each_format(format, options, orientation, corners):
    """The rotated image has its first row and column where EXIF says."""
    colours = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255), "k": (0, 0, 0)}
    stored = np.zeros((32, 64, 3), np.uint8)  # r g over b k
    stored[:16, :32], stored[:16, 32:], stored[16:, :32] = (colours[c] for c in "rgb")
    exif = Image.Exif()
    exif[0x0112] = orientation
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
    out, expected = (to_array(open_image(encoded(image, format, **o)), None, 3) for o in ({"exif": exif}, {}))
    assert np.array_equal(out, expected)


def test_colour_profiles_are_not_applied():
    for profile in (b"junk" * 40, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        image = open_image(encoded(Image.fromarray(pixels()), icc_profile=profile))
        assert np.array_equal(to_array(image, None, 3), pixels())


def test_images_without_pixels_are_broken():
    for raw in (Image.new("RGB", (0, 4)), np.zeros((4, 0, 3), np.uint8)):
        with pytest.raises(BrokenImage, match="none"):
            open_image(raw)


# ---------------------------------------------------------------------- class folders


@pytest.mark.parametrize(("name", "reason", "create"), [
    ("x.png", "bomb", lambda path: path.write_bytes(bomb("png"))),
    ("x.tif", "floating point", lambda path: Image.new("F", (8, 8)).save(path)),
    ("x.tif", "32-bit", lambda path: Image.new("I", (8, 8)).save(path)),
    ("x.png", "bytes, more", lambda path: (path.touch(), os.truncate(path, 2**36))),
    ("x.png", "No such file", "dangling"), ("x.png", "symbolic links", "loop"), ("x.png", "not a file", "pipe"),
    ("x.png", "not a file", "socket"),
])  # fmt: skip
def test_invalid_files_are_named_and_skipped(root, name, reason, create):
    make_special(root / "bee" / name, create) if isinstance(create, str) else create(root / "bee" / name)
    check_named_and_skipped(root, f"bee/{name}", reason, 4)


def test_contents_determine_the_format(root):
    image = Image.fromarray(pixels(5))
    (root / "ant" / "000.png").write_bytes(encoded(image, "JPEG", quality=95))
    (root / "ant" / "001.png").write_bytes(encoded(image, "WEBP", lossless=True))
    (root / "bee" / "000.png").rename(root / "bee" / "000.GIF")
    assert np.array_equal(first_image(root, 1), pixels(5)) and np.array_equal(first_image(root, 2), pixels(2))
    (root / "bee" / "001.png").write_text("this is a text, not an image")
    assert re.search(r"broken image bee/001\.png .*not an image", message(root))
    assert opened(root, skip_broken=True).skipped == ("bee/001.png: it is not an image that Pillow can read",)


def test_training_reports_skipped_images(root, capsys):
    (root / "ant" / "000.png").write_bytes(b"")
    for part, lines in (("train", 1), (None, 1), ("heldout", 0)):
        open_dataset(DataConfig(source=str(root), skip_broken=True), part)
        notes = [line for line in capsys.readouterr().err.splitlines() if "broken" in line]
        assert len(notes) == lines
        assert all("1 of 4 images are broken and skipped" in n and "ant/000.png: it is empty" in n for n in notes)


def test_folders_and_links_are_told_apart(root, tmp_path):
    (root / "ant" / "x.png").mkdir()
    (root / "ant" / "x.png" / "inside.png").write_bytes(png(9))
    (root / "y.png").mkdir()
    assert "its 3 classes: y.png" in rejection(root)
    (root / "y.png").rmdir()
    assert opened(root).counts().tolist() == [3, 2]
    again = make_folders(tmp_path / "again")
    (again / "ant" / "up").symlink_to("..")  # not followed
    (again / "self").symlink_to("self")
    (again / "cow").symlink_to(make_folders(tmp_path / "e", ("cow",)) / "cow")
    data = opened(again)
    assert data.counts().tolist() == [2, 2, 2] and data.label_space.names == ("ant", "bee", "cow")


@pytest.mark.parametrize("target", [".", "..", "/"])
def test_class_folder_linking_to_parent_is_rejected(root, monkeypatch, target):
    (root / "cow").symlink_to(target)
    listed = []
    for name in ("listdir", "scandir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real: listed.append(args) or real(*args))
    assert "cow is a link to a folder that contains it" in rejection(root)
    assert len(listed) < 10  # the folders are not traversed


def test_file_names_that_are_not_utf8(root):
    (root / "ant" / "000.png").rename(root / "ant" / "\udcff 0.png")
    (root / "bee" / "000.png").rename(root / "bee" / "two\nlines\t.png")
    assert len(opened(root)) == 4
    for path in (p for p in root.rglob("*.png") if "001" not in p.name):
        path.write_bytes(b"?")
    text = message(root)
    assert r"broken image ant/\udcff 0.png" in text and text.encode()
    skipped = opened(root, skip_broken=True).skipped
    assert [s.split(":")[0] for s in skipped] == [r"ant/\udcff 0.png", r"bee/two\nlines\t.png"]


def test_folder_names_that_are_not_utf8(root, tmp_path):
    (root / "bee").rename(root / "\udcffbee")
    assert r"d/\udcffbee has a name that is not UTF-8 text. Rename it." in rejection(root)
    root.rename(tmp_path / "\udcffd")
    assert r"/\udcffd is not UTF-8 text" in rejection(f"{tmp_path}/\udcffd")
    assert r"source: expected a word, got 'a\x00b'" in rejection("a\0b")


def test_hidden_and_system_files_are_ignored(tmp_path):
    root = make_folders(tmp_path / "my pics ü", ("ä b", "c", "two\nlines", " 日本 語 "))
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._000.png", ".hidden.png"):
        (root / "c" / name).write_bytes(b"\0\5\x16\7")
    for name in (".DS_Store", "Thumbs.db"):
        (root / name).write_bytes(b"\0")
    for folder in (root / ".cache", root / "c" / ".thumbs"):
        folder.mkdir()
        (folder / "x.png").write_bytes(b"")
    data = opened(root)
    assert data.counts().tolist() == [2] * 4
    assert data.label_space.names == ("日本 語", "c", "two lines", "ä b")  # on one line


def test_class_names_differing_by_spaces_or_case(tmp_path):
    root = make_folders(tmp_path / "d", ("red ant", "red  ant", "bee"))
    text = rejection(root)
    assert f"the class names of {root}" in text and "'red ant'" in text and "spaces" in text
    (root / "red  ant").rename(root / "Red Ant")
    labels = opened(root).label_space
    assert labels.names == ("Red Ant", "bee", "red ant")
    assert [labels.parse([n])[0] for n in ("Red Ant", "red ant")] == [0, 2]
    with pytest.raises(InputError, match="matches several classes"):
        labels.parse(["RED ANT"])
    (root / "bee").rename(root / "   ")
    assert re.search("the class names of .* an empty name", message(root))


def test_fewer_images_than_a_batch(tmp_path):
    root = make_folders(tmp_path / "d", ("only",), each=3)
    data = opened(root)
    assert (data.label_space.K, data.counts().tolist()) == (1, [3])
    images, labels = data.gather(SampleOrder(3, seed=0)(torch.arange(8)).tolist())
    assert images.shape == (8, 8, 8, 3) and labels.tolist() == [0] * 8
    assert [len(opened(root, part, heldout_fraction=0.05)) for part in ("train", "heldout")] == [2, 1]
    alone = make_folders(tmp_path / "e", ("only",), each=1)
    assert len(opened(alone, "train", heldout_fraction=0.05)) == 1
    assert "has one image" in message(alone, "heldout", heldout_fraction=0.05)


@pytest.mark.parametrize("hidden", ["d", "bee"])
def test_unreadable_folders_are_rejected(root, monkeypatch, hidden):
    """chmod does not restrict root, so the error is simulated."""
    scandir = os.scandir

    def fail(path="."):
        if Path(os.fsdecode(path)).name == hidden:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    monkeypatch.setattr(os, "listdir", lambda path=".": [e.name for e in fail(path)])
    assert re.search(rf"data\.source {root} cannot be read.*Permission denied", rejection(root))


@pytest.mark.parametrize(("path", "reason"), [
    ("pipe", "is a file; expected"), ("dangling", "no such path"), ("x" * 5000, "File name too long"),
])  # fmt: skip
def test_source_that_is_not_a_folder(tmp_path, path, reason):
    if len(path) < 10:
        make_special(tmp_path / path, path)
    assert reason in rejection(tmp_path / path)
    root = make_folders(tmp_path / "d" / "train").parent
    (root / "test").mkdir()
    assert f"{root / 'test'} is not a folder of class folders: it contains no images" in rejection(f"{root}:test")
    (root / "test" / "ant").mkdir()
    assert "it contains no images" in rejection(f"{root}:test")


# ---------------------------------------------------------------------- the store


def test_changed_source_gets_new_store(root, tmp_path, store):
    first = opened(root)
    (root / "ant" / "000.png").write_bytes(png(77))
    os.utime(root / "ant" / "000.png", ns=(1, 1))
    second = opened(root)
    assert second.folder != first.folder and np.array_equal(second.gather([0])[0][0], pixels(77))
    assert np.array_equal(first.gather([0])[0][0], pixels(0))  # an open data set stays readable
    third = opened(make_table(tmp_path / "p.parquet", [0, 1]))
    fourth = opened(make_table(tmp_path / "p.parquet", [0, 1], image=image_rows(2, start=50)))
    assert np.array_equal(fourth.gather([0])[0][0], pixels(50)) and fourth.folder != third.folder
    assert len(list(store.iterdir())) == 4


def npy(*labels):
    file = io.BytesIO()
    np.save(file, np.array(labels))
    return file.getvalue()


@pytest.mark.parametrize(("name", "contents"), [
    ("meta.json", b""), ("meta.json", b"[]"), ("meta.json", b"\xff\xfe"), ("meta.json", b"[" * 100_000),
    ("labels.npy", b""), ("labels.npy", b"PK\x03\x04 no archive"), ("labels.npy", b"\x93NUMPY\x01\x00\x06\x00('''{\n"),
    ("images.npy", b""), ("images.npy", b"PK\x05\x06" + b"\0" * 18), ("images.npy", b"\x93NUMPY" + b"\xff" * 90),
    *(("labels.npy", npy(0, 0, 1, label)) for label in (-1, 2, 2**62)), ("meta.json", {"label_space": None}),
    ("meta.json", {"counts": "x"}), ("meta.json", {"skipped": 7}), ("meta.json", {"shape": {}}),
    ("meta.json", {"label_space": {"names": 3}}),
])  # fmt: skip
def test_corrupted_store_files_are_rewritten(root, store, name, contents):
    data = opened(root)
    whole = json.loads((data.folder / "meta.json").read_text())
    contents = contents if isinstance(contents, bytes) else json.dumps(whole | contents).encode()
    (data.folder / name).write_bytes(contents)
    again = opened(root)
    assert again.fingerprint == data.fingerprint and json.loads((again.folder / "meta.json").read_text()) == whole
    assert np.array_equal(again.gather([3])[0][0], pixels(3)) and again.labels.tolist() == [0, 0, 1, 1]
    assert [p.name for p in store.iterdir()] == [data.folder.name]


def test_file_or_link_in_place_of_store(root, tmp_path, store):
    folder = opened(root).folder
    folder.rename(tmp_path / "moved")
    folder.write_text("-")
    assert re.search(r"cannot be stored in .*data\.store_dir", message(root))
    assert [p.name for p in store.iterdir()] == [folder.name]
    folder.unlink()
    folder.symlink_to(tmp_path / "moved")
    assert len(opened(root)) == 4 and folder.is_symlink()


@pytest.fixture
def small_disk(tmp_path):
    mount_tmpfs(tmp_path / "disk", "size=1m")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", str(tmp_path / "disk")], check=True)


def test_disk_full_while_decoding(root, tmp_path, small_disk):
    """The free space was checked, and is gone later. In another process, since a memory map would kill it."""
    first = opened(root, store_dir=str(small_disk))
    run = start_process(DISK_THAT_FILLS, make_folders(tmp_path / "big", each=60, size=64), small_disk)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert out.count("\n") == 1 and "No space left" in out and "data.store_dir" in out
    assert list(small_disk.iterdir()) == [first.folder]
    again = opened(root, store_dir=str(small_disk))
    assert again.fingerprint == first.fingerprint and np.array_equal(again.gather([3])[0][0], pixels(3))


@pytest.mark.parametrize(
    "target", ["numpy.save", *(f"diffusion_adagn.data.decode.{n}" for n in ("_write_header", "_write_meta"))]
)
def test_no_space_for_each_file(root, tmp_path, store, monkeypatch, target):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    good = opened(make_folders(tmp_path / "good"))
    monkeypatch.setattr(target, full)
    words = r"cannot be stored in .*No space left on device\. Set data\.store_dir"
    assert re.search(words, message(root)) and list(store.iterdir()) == [good.folder]


def test_read_only_store_folder(root, small_disk):
    first = opened(root, store_dir=str(small_disk))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert opened(root, store_dir=str(small_disk)).fingerprint == first.fingerprint
    for folder in (small_disk, small_disk / "below"):
        text = message(root, image_size=4, store_dir=str(folder))
        assert re.search(r"cannot be stored in .*Read-only file system.*data\.store_dir", text)


@pytest.mark.serial
def test_killed_while_decoding(root, tmp_path, store):
    """Partial files of a killed process are ignored, and removed after ten minutes; those of a running process stay."""
    another = make_folders(tmp_path / "e")
    killed, working = (start_process(SLOW_DECODING, r) for r in (root, another))  # each decodes its own store

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
        assert np.array_equal(first_image(root, 3), pixels(3)) and partial_stores() == before
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


@pytest.mark.serial
@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("corrupted", [False, True])
def test_processes_share_one_new_store(tmp_path, store, n, corrupted):
    root = make_folders(tmp_path / "d", each=40, size=32)
    if corrupted:
        os.truncate(opened(root).folder / "images.npy", 1000)
    words = [root, 3, tmp_path / "go"]
    processes = [Process(OPENED + PREPARE, words, tmp_path / f"log-{i}") for i in range(n)]
    while not all(process.printed().startswith("here\n") for process in processes):
        assert all(process.running() for process in processes), [process.printed() for process in processes]
        time.sleep(0.01)
    (tmp_path / "go").touch()
    statuses = [process.wait(120) for process in processes]
    assert statuses == [0] * n, [process.printed()[-500:] for process in processes]
    lines = {line for process in processes for line in process.printed().splitlines()[1:]}
    assert len(lines) == 1
    assert [p.name for p in store.iterdir()] == [lines.pop().split()[2]]


def test_store_moved_by_another_process_is_readable(root, tmp_path, monkeypatch):
    """Another process that found the old store corrupted may move the new one away: it stays readable once opened."""
    rename = Path.rename

    def rename_and_move_away(self, target):
        moved = rename(self, target)
        if Path(target).parent == store_module._root(DataConfig()):
            rename(Path(target), tmp_path / "moved")
        return moved

    monkeypatch.setattr(Path, "rename", rename_and_move_away)
    assert np.array_equal(first_image(root, 3), pixels(3))
