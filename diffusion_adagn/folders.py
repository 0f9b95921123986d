"""Folders and files written whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """Where what can be made again is kept: $DIFFUSION_ADAGN_CACHE or ~/.cache/diffusion_adagn."""
    return Path(os.environ.get("DIFFUSION_ADAGN_CACHE") or "~/.cache/diffusion_adagn").expanduser().absolute()


def into_place(out: Path, write: Callable[[Path], None]) -> Path:
    """Write a folder beside `out` and rename it, so that a broken-off write leaves `out` as it was. Returns `out`."""
    beside, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if out.exists():
        out.rename(old)
    beside.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return out


def file_into_place(file: Path, write: Callable[[Path], None]) -> Path:
    """Write a file beside itself and rename it, so that a broken-off write leaves it as it was. The name's ending is kept. Returns it."""
    beside = file.with_name(f".{uuid.uuid4().hex[:8]}.{file.name}")  # machines that share a disk share process numbers
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(beside)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    return file
