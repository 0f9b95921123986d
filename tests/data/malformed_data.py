"""Images, folders and tables for the tests of malformed data; how these are opened; and the code of other processes."""

import contextlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image, ImageCms

from diffusion_adagn.config import DataConfig
from diffusion_adagn.data import open_dataset
from diffusion_adagn.errors import InputError

SIDE = 50_000  # of the decompression bombs


def opened(source, part=None, **settings):
    config = DataConfig(source=str(source), **{"heldout_fraction": 0.0} | settings)
    return open_dataset(config, part, progress=False)


def message(source, part=None, **settings) -> str:
    """The error message of an invalid source."""
    with pytest.raises(InputError) as error:
        opened(source, part, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def rejection(source, part=None, **settings) -> str:
    """The error message of an invalid source. The store stays empty."""
    text, root = message(source, part, **settings), Path(os.environ["DIFFUSION_ADAGN_CACHE"])
    assert not root.exists() or not list(root.iterdir())
    return text


def check_named_and_skipped(root: Path, name: str, reason: str, remaining: int) -> None:
    """One image of the source is broken: the error names it, and data.skip_broken skips and counts it."""
    text = rejection(root)
    assert f"{'image too large:' if reason == 'bomb' else 'broken image'} {name} " in text
    assert reason in text and "data.skip_broken" in text
    data = opened(root, skip_broken=True)
    assert len(data) == remaining
    assert len(data.skipped) == 1 and data.skipped[0].startswith(f"{name}: ") and reason in data.skipped[0]


# ---------------------------------------------------------------------- images


def pixels(seed: int = 0, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(seed: int = 0, size: int = 8) -> bytes:
    return encoded(Image.fromarray(pixels(seed, size)))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG file of 2 x 2 pixels, with extra chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bomb(format: str) -> bytes:
    """A small file that claims 50,000 x 50,000 pixels."""
    image = Image.new("RGB", (4, 4))
    animated = {"save_all": True, "append_images": [Image.new("RGB", (4, 4), "red")]}
    if format == "png":
        raw = encoded(image)
        return raw[:8] + chunk(b"IHDR", struct.pack(">II", SIDE, SIDE) + raw[24:29]) + raw[33:]
    # what is saved, its options, the mark before the size, the offset of the size from it, and the size
    saved, options, mark, offset, size = {
        "gif": ("GIF", {}, b"GIF", 6, struct.pack("<HH", SIDE, SIDE)),
        "gif frame": ("GIF", {}, b",\0\0\0\0", 5, struct.pack("<HH", SIDE, SIDE)),
        "webp": ("WEBP", animated, b"VP8X", 12, (SIDE - 1).to_bytes(3, "little") * 2),
        "bmp": ("BMP", {}, b"BM", 18, struct.pack("<ii", SIDE, SIDE)),
        "jpeg": ("JPEG", {}, b"\xff\xc0", 5, struct.pack(">HH", SIDE, SIDE)),
    }[format]
    raw = bytearray(encoded(image.convert("P") if saved == "GIF" else image, saved, **options))
    position = raw.index(mark) + offset
    raw[position : position + len(size)] = size
    return bytes(raw)


def lab(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")


# ---------------------------------------------------------------------- folders and tables


def make_folders(root: Path, names=("ant", "bee"), each: int = 2, size: int = 8) -> Path:
    for class_id, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i:03}.png").write_bytes(png(each * class_id + i, size))
    return root


def make_special(path: Path, kind: str) -> None:
    """A dangling link, a loop of links, a pipe, a socket or a folder."""
    if kind == "socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)  # the path of a socket must be short
    else:
        {"dangling": lambda: path.symlink_to("nothing.png"), "loop": lambda: path.symlink_to(path.name),
         "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()  # fmt: skip


def image_rows(n: int, start: int = 0) -> list[dict]:
    return [{"bytes": png(start + i), "path": None} for i in range(n)]


def make_table(path: Path, labels, names=None, metadata: dict | None = None, **columns) -> Path:
    """A Parquet file of images and labels. names: of the classes, in the metadata that `datasets` writes for them."""
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = {"image": image_rows(len(labels)) if labels is not None else None, "label": labels} | columns
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)
    return path


# ---------------------------------------------------------------------- disks and processes


def mount_tmpfs(path: Path, options: str) -> None:
    path.mkdir()
    result = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True)
    if result.returncode:
        pytest.skip("cannot mount a file system here")


def start_process(code: str, *arguments, **variables) -> subprocess.Popen:
    """A process that runs code which may call `opened`."""
    command = [sys.executable, "-c", OPENED + code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | variables, **pipes)


def set_age(folder: Path, seconds: int) -> None:
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - seconds,) * 2)


OPENED = """
import hashlib, os, resource, shutil, sys, time
from pathlib import Path
import numpy as np
from diffusion_adagn.config import DataConfig
from diffusion_adagn.data import images, open_dataset
from diffusion_adagn.errors import InputError
def opened(source, **settings):
    return open_dataset(DataConfig(source=source, heldout_fraction=0.0, **settings), progress=False)
"""
MEMORY_OF_IMAGES = """
images.open_image(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[2:]:
    try:
        images.open_image(Path(name))
    except images.BrokenImage as error:
        print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
DISK_THAT_FILLS = """
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(0, 0, 10**12)
try:
    opened(sys.argv[1], store_dir=sys.argv[2])
except InputError as error:
    print(error)
"""
SLOW_DECODING = """
load = images.open_image
def slow(raw):
    os.write(1, b"decoding\\n")  # one write per line: print writes the line end separately, and there are two threads
    time.sleep(60)
    return load(raw)
images.open_image = slow
opened(sys.argv[1])
"""
PREPARE = """
print("here", flush=True)
while not Path(sys.argv[3]).exists():
    pass
for round in range(int(sys.argv[2])):
    data = opened(sys.argv[1])
    images, labels = data.gather(np.arange(len(data)))
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    print(data.fingerprint, digest, data.folder.name, flush=True)
"""
