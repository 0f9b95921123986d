"""The two errors meant for users, and context managers that turn other errors into them."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Invalid input. The message says what was wrong, what was expected and what to type.

    The command line prints it as one paragraph and exits with status 1.
    """


class UsageError(InputError):
    """An invalid command line (an unknown option, a value of the wrong type). The exit status is 2."""


class Note(UserWarning):
    """A warning of this package for users. The commands print its message without the place in the code."""


def reject_first(faults: Mapping[str, object], before: str = "", after: str = "") -> None:
    """Raises InputError for the first fault whose condition is true.

    Args:
        faults: Message -> condition.
        before: Text before the message.
        after: Text after it.
    """
    if fault := next((message for message, condition in faults.items() if condition), None):
        raise InputError(f"{before}{fault}{after}")


@contextmanager
def named(key: str) -> Iterator[None]:
    """Puts the key of a setting before the message of an InputError in the block."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{key}: {error}") from None


def did_you_mean(key: str, known: Iterable[str], most: int = 3) -> str:
    """ " Did you mean ...?" with the keys of that name in other sections, then the most similar ones; or ""."""
    near = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near += [k for k in difflib.get_close_matches(key, known, most) if k not in near]
    return f" Did you mean {' or '.join(near[:most])}?" if near else ""


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's message on one line, cut at this many characters."""
    return " ".join(str(error).split())[:limit]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means exhausted memory: in Python, NumPy or any of torch's allocators."""
    texts = r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
    is_allocator = isinstance(error, RuntimeError) and re.search(texts, str(error)) is not None
    return is_allocator or isinstance(error, MemoryError)


def failed_allocation(error: BaseException) -> str:
    """ " (64 MiB could not be allocated)", if the allocator reports the amount; else ""."""
    match = re.search(r"allocate ([\d.]+) ?(bytes|[KMGT]iB)", str(error))
    if not match:
        return ""
    amount, unit = match.groups()
    return f" ({f'{int(amount) / 2**20:,.4g} MiB' if unit == 'bytes' else f'{amount} {unit}'} could not be allocated)"


def memory_advice(command: str) -> str:
    """What to do when memory is exhausted in a command."""
    if command in ("train", "ablate"):
        return (
            "To use less: raise training.gradient_accumulation (2 halves the images in memory at once), set "
            "training.gradient_checkpointing true (slower), lower training.batch_size, set speed.precision bf16 if the "
            "device supports it, or use a smaller model (model.model_channels, data.image_size). A resumed run may change "
            "the first two."
        )
    advice = "Close other programs, or use a machine with more memory."
    return f"Lower --batch_size. {advice}" if command in ("sample", "evaluate", "sweep") else advice


@contextmanager
def errors_as_input_error(folder: Path) -> Iterator[None]:
    """Turns any error in the block into an InputError that the folder is corrupted. The folder may contain anything."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = f"{folder} is corrupted ({type(error).__name__}: {one_line(error)}): make or copy it again, or name another."
        raise InputError(text) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns an OSError in the block into an InputError that the folder cannot be written to."""
    try:
        yield
    except OSError as error:
        text = f"{folder} cannot be written to ({error.strerror or error}): make room, or name another folder."
        raise InputError(text) from error
