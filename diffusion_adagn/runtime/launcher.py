"""The end of a process, also of one of several that a launcher such as torchrun started."""

import os
import sys
import threading
import time

from . import stopping

POLL_SECONDS = 2  # between checks of the launcher
MAX_SAVE_SECONDS = 600  # allowed for a save after the launcher has ended
STATUS_FILE = "DIFFUSION_ADAGN_STATUS"  # file for the exit status, since torchrun reports 1 for every error


def exit_with_launcher() -> None:
    """End this process when its launcher ends. After torchrun was killed, it would wait for the others for hours."""
    if _is_multi_process():
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(launcher: int) -> None:
    """Exit once the launcher has ended. A process that was signalled to save has MAX_SAVE_SECONDS for it."""
    while os.getppid() == launcher:
        time.sleep(POLL_SECONDS)
    time.sleep(POLL_SECONDS)  # the signal that ended the launcher may arrive here later
    deadline = time.monotonic() + MAX_SAVE_SECONDS
    while stopping.stop_requested() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    os._exit(143)


def leave(status: int) -> None:
    """End the interpreter. The main process writes the status to the file in $DIFFUSION_ADAGN_STATUS, if set."""
    sys.stdout.flush()
    sys.stderr.flush()
    file, main_process = os.environ.get(STATUS_FILE), os.environ.get("RANK", "0") == "0"
    if file and main_process:
        try:
            with open(file, "w", encoding="utf-8") as handle:
                handle.write(f"{status}\n")
        except OSError as error:
            print(f"the status {status} could not be written to {file} ({error})", file=sys.stderr, flush=True)
    if _is_multi_process():
        if status and not main_process:
            # torchrun ends all processes after the first error: the main process, which has more to do, exits first
            time.sleep(1)
        os._exit(status)  # gloo's threads sometimes abort a normal exit after all work is done
    sys.exit(status)


def _is_multi_process() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
