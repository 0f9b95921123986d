"""Folders and files written whole or not at all."""

import contextlib
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import InputError

WINDOWS = os.name == "nt"  # which syncs what is open for writing alone, and moves no folder with an open file


def cache_root() -> Path:
    """Where what can be made again is kept: $DIFFUSION_ADAGN_CACHE or ~/.cache/diffusion_adagn."""
    return Path(os.environ.get("DIFFUSION_ADAGN_CACHE") or "~/.cache/diffusion_adagn").expanduser().absolute()


def atomic_dir(out: Path, write: Callable[[Path], None]) -> Path:
    """Write a folder beside `out` and rename it, so that a broken-off write leaves `out` as it was. Returns `out`."""
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
    """Write a file beside itself and rename it, so that a broken-off write leaves it as it was. The name's ending is kept. Returns it."""
    tmp = file.with_name(f".{uuid.uuid4().hex[:8]}.{file.name}")  # machines that share a disk share process numbers
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(tmp)
        tmp.replace(file)
    finally:
        tmp.unlink(missing_ok=True)
    return file


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[bool | None]:
    """Whether a lock on the folder could be had: False if another process has it, None where there are no locks (not on Unix,
    or a file system without). Held until the end, or until the process dies; seen on one machine."""
    try:
        import fcntl

        held = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield None
        return
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            got = False
        except OSError:
            got = None
        else:
            got = True
        yield got
    finally:
        os.close(held)


@contextlib.contextmanager
def one_at_a_time(folder: Path, what: str = "") -> Iterator[None]:
    """Held while a process makes `folder`. Another that wants to make it waits, and should look again once it is in.

    The lock is a hidden folder beside, removed at the end. As with `locked`, it does nothing where there are no locks.

    Args:
        folder: what is made; it need not be there.
        what: in words, for a line on stderr where there is a wait; "" for none.
    """
    lock = folder.with_name(f".{folder.name}.lock")
    with contextlib.suppress(OSError):
        lock.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        if held.enter_context(locked(lock)) is False:
            if what:
                print(f"waiting for another process: {what}", file=sys.stderr)
            held.enter_context(locked(lock, wait=True))
        try:
            yield
        finally:  # who waits for it has it open, and finds what was made
            with contextlib.suppress(OSError):
                lock.rmdir()


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Held while a process works in a folder. Raises InputError if another does."""
    with locked(folder) as got:
        if got is False:
            raise InputError(f"another process is at work in {folder}: wait for it, stop it, or give another folder.")
        yield
