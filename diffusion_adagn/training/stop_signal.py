"""Signals that stop a run after the current step."""

import signal
import threading
from _thread import interrupt_main
from collections.abc import Callable
from contextlib import ExitStack

from ..commands import resume_command, with_commands
from ..runs.layout import RunFolder
from ..runtime.stopping import SIGNALS, listen_for_signals


class StopSignal:
    """SIGTERM, SIGUSR1 and Ctrl-C set `name`: the run saves and exits after the step. A second Ctrl-C exits without saving.

    Args:
        run: The run, for the message of a second Ctrl-C.
        say: Prints a message at once, from another thread: the main one may compute for seconds before it handles a signal.
    """

    def __init__(self, run: RunFolder, say: Callable[[str], None]):
        self.run, self.say = run, say
        self.name: str | None = None
        self._received = self._exit_now = False

    def __enter__(self) -> "StopSignal":
        self._undo = ExitStack()
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            for s in SIGNALS:
                self._undo.callback(signal.signal, s, signal.signal(s, self._handle))
            self._undo.enter_context(listen_for_signals(self._report))
        return self

    def __exit__(self, *_) -> None:
        self._undo.close()

    def _report(self, number: int) -> None:
        """Runs in the thread that receives every signal; the main one runs one handler for two that arrive within one call."""
        if not self._received:
            self._received = True
            again = " Ctrl-C again exits without saving." if number == signal.SIGINT else ""
            self.say(f"{signal.Signals(number).name}: stopping after this step and saving a checkpoint.{again}")
        elif number == signal.SIGINT and not self._exit_now:
            newest = self.run.newest_checkpoint()
            start = f"continues from {newest}" if newest else "starts at step 0"
            text = f"exiting without saving; {'' if newest else 'there is no checkpoint yet: '}a resumed run {start}."
            self.say(with_commands(text, resume_command(self.run.path)))
            self._exit_now = True
            interrupt_main()

    def _handle(self, number: int, _) -> None:
        if self._exit_now:
            for s in SIGNALS:  # what follows must not be interrupted
                signal.signal(s, signal.SIG_IGN)
            raise KeyboardInterrupt
        self.name = self.name or signal.Signals(number).name
