"""Whether a signal has asked this process to save and leave: known at once, also while the main thread computes.

Python runs a signal's handler between two lines of the main thread, and one line may be minutes of waiting for other processes.
The signal's number is written to a pipe at once, and another thread can read it there. Nothing heavy is imported.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

# Windows lacks one
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
_asked = False
_pipe: tuple[int, int] | None = None


def asked() -> bool:
    """Whether one of SIGNALS has come since the last `listening` began."""
    global _asked
    if not _asked and _pipe is not None:
        with contextlib.suppress(BlockingIOError):
            _asked = any(number in SIGNALS for number in os.read(_pipe[0], 4096))
    return _asked


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """In here signals that have a Python handler are noted, from the main thread on. Without pipes for signals (Windows): nothing."""
    global _asked, _pipe
    if os.name != "posix":
        yield
        return
    if _pipe is None:
        _pipe = os.pipe()
        for end in _pipe:
            os.set_blocking(end, False)
    asked()  # empties the pipe
    _asked = False
    before = signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
