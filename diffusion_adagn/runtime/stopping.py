"""Whether a signal has asked this process to save and leave: known at once, also while the main thread computes.

Python runs a signal's handler between two lines of the main thread, and one line may be minutes of waiting for other processes.
The signal's number is written to a socket at once, and another thread reads it there. Nothing heavy is imported.
"""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

# Windows lacks one
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
_END = b"\0"  # the number of no signal
_requested = False


def stop_requested() -> bool:
    """Whether one of SIGNALS has come since the last `listen_for_signals` began."""
    return _requested


@contextlib.contextmanager
def listen_for_signals(came: Callable[[int], None]) -> Iterator[None]:
    """In here signals that have a Python handler are noted, from the main thread on.

    Args:
        came: Called with the number of each of SIGNALS at once, in another thread.
    """
    global _requested
    _requested = False
    read, write = socket.socketpair()

    def listen() -> None:
        global _requested
        while (byte := read.recv(1)) != _END:
            if byte[0] in SIGNALS:
                _requested = True
                came(byte[0])

    with read, write:
        write.setblocking(False)
        thread = threading.Thread(target=listen, daemon=True)
        before = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            write.send(_END)
            thread.join()
