"""`adagn COMMAND ...`: run a command; print an error as one paragraph and exit with a status.

Exit status: 0 success, 1 invalid input or a failure, 2 usage, 75 stopped by a signal after saving.
"""

import difflib
import importlib
import os
import re
import sys
import threading
import time
from collections.abc import Sequence

from .. import recipes
from ..commands import INDENT, command, with_commands
from ..errors import InputError, UsageError, out_of_memory
from ..runtime import stopping
from ..version import __version__

POLL_SECONDS = 2  # between checks of the launcher
MAX_SAVE_SECONDS = 600  # allowed for a save after the launcher has ended
STATUS_FILE = "DIFFUSION_ADAGN_STATUS"  # file for the exit status, since torchrun reports 1 for every error

REMEDY = "Close other programs, or use a machine with more memory."  # when memory is exhausted
REMEDIES = dict.fromkeys(
    ("train", "ablate"),
    "To use less: raise training.gradient_accumulation (2 halves the images in memory at once), set "
    "training.gradient_checkpointing "
    "true (slower), lower training.batch_size, set speed.precision bf16 if the device supports it, or use a smaller "
    "model (model.model_channels, data.image_size). A resumed run may change the first two.",
) | dict.fromkeys(("sample", "evaluate", "sweep"), f"Lower --batch_size. {REMEDY}")

COMMANDS = {
    "init": "print a recipe, to save and edit",
    "train": "train a class-conditional diffusion model",
    "sample": "sample images by class label",
    "evaluate": "compare images or a model with real images",
    "sweep": "compare guidance scales, intervals, steps and samplers by metrics",
    "trace": "show the effect of the condition, and whether the label is used",
    "data": "inspect labelled images (adagn data inspect)",
    "doctor": "check this installation and report problems",
    "ablate": "train the same run with several conditioning layers, and compare",
    "import-adm": "convert an OpenAI ADM checkpoint to a pipeline folder",
    "import-diffusers": "convert a diffusers folder with a UNet2DModel to a pipeline folder",
    "export": "export a folder that stock diffusers loads without this package",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status. `argv` excludes the program's name."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["help"] and len(argv) > 1:
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version", "version"):
        print(f"diffusion-adagn {__version__}")
        return 0
    try:
        name = argv[0].replace("_", "-")
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(f"there is no command '{argv[0]}'.{hint} Commands: {', '.join(COMMANDS)}.")
        return importlib.import_module(f".{name.replace('-', '_')}", __package__).run(argv[1:]) or 0
    except InputError as error:
        _close_bars()
        if "--debug" in argv:
            raise
        print(_paragraph(error), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        _close_bars()
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        _close_bars()
        if "--debug" in argv:
            raise
        if os.environ.get("RANK", "0") != "0" and "onnection" in str(error):
            return 1  # the process that failed has printed why
        text = f"{type(error).__name__}: {error}"
        if out_of_memory(error):
            text = f"out of memory{_failed_allocation(error)}. {REMEDIES.get(argv[0], REMEDY)}"
        print(_paragraph(f"{text} (--debug shows where)"), file=sys.stderr)
        return 1


def _close_bars() -> None:
    """Close progress bars, so that an error starts on a new line."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()


def _failed_allocation(error: BaseException) -> str:
    """ " (64 MiB could not be allocated)", if the allocator reports the amount; else ""."""
    match = re.search(r"allocate ([\d.]+) ?(bytes|[KMGT]iB)", str(error))
    if not match:
        return ""
    amount, unit = match.groups()
    return f" ({f'{int(amount) / 2**20:,.4g} MiB' if unit == 'bytes' else f'{amount} {unit}'} could not be allocated)"


def script(command: str) -> None:
    """Entry point of train.py and sample.py, also under launchers. Ends the interpreter with the status of `main`."""
    _exit_with_launcher()
    leave(main([command, *sys.argv[1:]]))


def console() -> None:
    """Entry point of the console script `adagn`."""
    _exit_with_launcher()
    leave(main())


def _exit_with_launcher() -> None:
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


def _paragraph(error: object) -> str:
    """The message on one line, and each of its commands on its own line.

    The terminal wraps them: commands and paths that a program breaks across lines cannot be copied.
    """
    prose, commands = [], []
    for line in str(error).splitlines():
        is_command = line.startswith((f"{INDENT}adagn ", f"{INDENT}torchrun ", f"{INDENT}pip "))
        commands.append(line.rstrip()) if is_command else prose.extend(line.split())
    return "\n".join([f"adagn: {' '.join(prose)}", *commands])


def _overview() -> str:
    commands = "\n".join(f"  {name:18}{what}" for name, what in COMMANDS.items())
    return (
        "usage: adagn COMMAND [options]\n\nClass-conditional diffusion models, with tools that show the effect of the "
        "condition.\n\n"
        + with_commands(
            f"{commands}\n\n`adagn COMMAND --help` lists the options of a command. Start with:",
            command("train", recipes.name_in_command("digits")),
        )
    )
