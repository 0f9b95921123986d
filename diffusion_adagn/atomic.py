"""Atomic writes of folders and files, and locks on folders."""

import contextlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import InputError

WINDOWS = os.name == "nt"  # syncs only files opened for writing; cannot move a folder with an open file


def cache_root() -> Path:
    """The folder of all caches: $DIFFUSION_ADAGN_CACHE or ~/.cache/diffusion_adagn."""
    return Path(os.environ.get("DIFFUSION_ADAGN_CACHE") or "~/.cache/diffusion_adagn").expanduser().absolute()


def atomic_dir(out: Path, write: Callable[[Path], None]) -> Path:
    """Write a temporary folder and rename it to `out`. An interrupted write leaves `out` unchanged. Returns `out`."""
    tmp, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    for leftover in (tmp, old):
        shutil.rmtree(leftover, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(tmp)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    if out.exists():
        out.rename(old)
    tmp.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return out


def atomic_write(file: Path, write: Callable[[Path], None]) -> Path:
    """Write a temporary file with the same suffix and rename it to `file`.

    An interrupted write leaves `file` unchanged. Returns `file`.
    """
    tmp = file.with_name(f".{uuid.uuid4().hex[:8]}.{file.name}")  # machines that share a disk share process numbers
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(tmp)
        tmp.replace(file)
    finally:
        tmp.unlink(missing_ok=True)
    return file


def atomic_json(file: Path, value: object) -> Path:
    """Write a value as indented JSON, atomically. Returns `file`."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return atomic_write(file, lambda tmp: tmp.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[bool | None]:
    """Lock a folder until the end of the block or of the process. Processes on other machines may not see the lock.

    Args:
        folder: An existing folder.
        wait: Wait for another process to release the lock.

    Yields:
        Whether the lock was acquired. None where locks are not supported (not on Unix, or by the file system).
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            acquired = False
        except OSError:
            acquired = None
        else:
            acquired = True
        yield acquired
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def one_at_a_time(folder: Path, what: str = "") -> Iterator[None]:
    """Lock the creation of `folder`: other processes wait. After the wait, check whether the folder exists by now.

    The lock is a hidden folder in the same parent folder, removed at the end. Like `locked`, it does nothing where
    locks are not supported.

    Args:
        folder: The folder to create; it need not exist.
        what: What the other process does, for a line on stderr before a wait; "" for none.
    """
    lock = folder.with_name(f".{folder.name}.lock")
    with contextlib.suppress(OSError):
        lock.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if stack.enter_context(locked(lock)) is False:
            if what:
                print(f"waiting for another process: {what}", file=sys.stderr)
            stack.enter_context(locked(lock, wait=True))
        try:
            yield
        finally:  # a waiting process has it open, and finds the new folder
            with contextlib.suppress(OSError):
                lock.rmdir()


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Lock a folder for the block. Raises InputError if another process has it locked."""
    with locked(folder) as acquired:
        if acquired is False:
            raise InputError(f"another process is using {folder}: wait for it, stop it, or give another folder.")
        yield
