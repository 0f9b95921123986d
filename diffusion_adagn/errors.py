"""The two errors that a user is meant to read, and how a stranger's folder ends in one."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """What the user gave cannot be used. The message says what was wrong, what was expected and what to type.

    The command line prints it as one paragraph and leaves with status 1.
    """


class UsageError(InputError):
    """The command line itself is wrong (an unknown option, a value of the wrong type): status 2."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted: Python's, NumPy's, or that of any of torch's allocators."""
    texts = r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(texts, str(error)) is not None
    )


@contextmanager
def errors_as_input_error(folder: Path) -> Iterator[None]:
    """Raises InputError, that the folder is damaged, for whatever goes wrong in here: anything may stand in it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{folder} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:300]}): make or copy it again, or name another."
        ) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises InputError, that the folder cannot be written to, for an OSError in here."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written to ({error.strerror or error}): make room, or name another folder."
        ) from error
