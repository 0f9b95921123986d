"""Whether a signal has requested that this process saves and exits.

This is known at once, also while the main thread computes.

Python runs a signal handler only between two bytecode instructions of the main thread, and one instruction may wait
minutes for other processes. Here the number of the signal is written to a socket at once, and another thread reads
it. This module imports without torch.
"""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

# Windows has no SIGUSR1
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
_END = b"\0"  # not the number of a signal
_requested = False


def stop_requested() -> bool:
    """Whether one of SIGNALS was received since the start of the last `listen_for_signals`."""
    return _requested


@contextlib.contextmanager
def listen_for_signals(on_signal: Callable[[int], None]) -> Iterator[None]:
    """Record signals that have a Python handler, within the block. Must be entered in the main thread.

    Args:
        on_signal: Called at once with the number of each of SIGNALS, in another thread.
    """
    global _requested
    _requested = False
    read, write = socket.socketpair()

    def listen() -> None:
        global _requested
        while (byte := read.recv(1)) != _END:
            if byte[0] in SIGNALS:
                _requested = True
                on_signal(byte[0])

    with read, write:
        write.setblocking(False)
        thread = threading.Thread(target=listen, daemon=True)
        previous = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)
            write.send(_END)
            thread.join()
