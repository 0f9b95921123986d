"""`adagn COMMAND ...`: find the command, run it, turn errors into a paragraph and a status.

Status: 0 done, 1 an error of the input, 2 usage, 75 saved and left on a signal.
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

POLL_SECONDS = 2  # seconds between two looks at the launcher
MAX_SAVE_SECONDS = 600  # seconds that a save may take after the launcher has ended
STATUS_FILE = "DIFFUSION_ADAGN_STATUS"  # names a file for the exit status, which torchrun reports as 1

REMEDY = "Close other programs, or use a machine with more memory."  # where memory is exhausted
REMEDIES = dict.fromkeys(
    ("train", "ablate"),
    "To need less: raise training.gradient_accumulation (2 halves the images in memory at once), set training.gradient_checkpointing "
    "true (slower), lower training.batch_size, set speed.precision bf16 where the device computes in it, or take a smaller model "
    "(model.model_channels, data.image_size). A resumed run may change the first two.",
) | dict.fromkeys(("sample", "evaluate", "sweep"), f"Lower --batch_size. {REMEDY}")

COMMANDS = {
    "init": "print a recipe, to make it your own",
    "train": "train a class-conditional diffusion model",
    "sample": "sample pictures by class label",
    "evaluate": "measure pictures or a model against real ones",
    "sweep": "guidance, intervals, steps and samplers, side by side with numbers",
    "trace": "see what the condition does, and whether the label is used",
    "data": "look at labelled images (adagn data inspect)",
    "doctor": "look at this installation, and say what is wrong with it",
    "ablate": "train the same run under several conditioning kinds, and compare",
    "import-adm": "turn an OpenAI ADM checkpoint into a pipeline folder",
    "import-diffusers": "turn a diffusers folder with a UNet2DModel into a pipeline folder",
    "export": "write a folder that stock diffusers loads without this package",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; argv without the program's name. Returns the exit status."""
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
            return 1  # another process left, and has said why
        text = f"{type(error).__name__}: {error}"
        if out_of_memory(error):
            text = f"out of memory{_asked_for(error)}. {REMEDIES.get(argv[0], REMEDY)}"
        print(_paragraph(f"{text} (--debug shows where)"), file=sys.stderr)
        return 1


def _close_bars() -> None:
    """An error is not printed on the line of a progress bar."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()


def _asked_for(error: BaseException) -> str:
    """ " (64 MiB were asked for)", where the allocator says so."""
    found = re.search(r"allocate ([\d.]+) ?(bytes|[KMGT]iB)", str(error))
    if not found:
        return ""
    amount, unit = found.groups()
    return f" ({f'{int(amount) / 2**20:,.4g} MiB' if unit == 'bytes' else f'{amount} {unit}'} could not be allocated)"


def script(command: str) -> None:
    """Entry of train.py and sample.py, and of several processes: ends the interpreter with main's status."""
    _end_with_the_launcher()
    leave(main([command, *sys.argv[1:]]))


def console() -> None:
    """Entry of the console script `adagn`."""
    _end_with_the_launcher()
    leave(main())


def _end_with_the_launcher() -> None:
    """One of several processes would wait for the others for hours where torchrun was killed and could not end them."""
    if _several():
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(launcher: int) -> None:
    """End this process when its launcher has ended. If a signal has asked it to save, it has some minutes, and leaves by itself."""
    while os.getppid() == launcher:
        time.sleep(POLL_SECONDS)
    time.sleep(POLL_SECONDS)  # the signal that ended the launcher may come here a moment later
    until = time.monotonic() + MAX_SAVE_SECONDS
    while stopping.stop_requested() and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    os._exit(143)


def leave(status: int) -> None:
    """End the interpreter. The main process leaves the status in the file that $DIFFUSION_ADAGN_STATUS names, if it is set."""
    sys.stdout.flush()
    sys.stderr.flush()
    file, main_process = os.environ.get(STATUS_FILE), os.environ.get("RANK", "0") == "0"
    if file and main_process:
        try:
            with open(file, "w", encoding="utf-8") as handle:
                handle.write(f"{status}\n")
        except OSError as error:
            print(f"the status {status} could not be written to {file} ({error})", file=sys.stderr, flush=True)
    if _several():
        if status and not main_process:
            # torchrun ends all when one leaves with an error: the main process has more to do, and goes first
            time.sleep(1)
        os._exit(status)  # gloo's threads now and then abort a normal exit, after all is done
    sys.exit(status)


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _paragraph(error: object) -> str:
    """The message as one line, and each command of it on a line of its own. The terminal wraps them: what a program
    breaks (a command, a path with a space) cannot be copied."""
    prose, commands = [], []
    for line in str(error).splitlines():
        is_command = line.startswith((f"{INDENT}adagn ", f"{INDENT}torchrun ", f"{INDENT}pip "))
        commands.append(line.rstrip()) if is_command else prose.extend(line.split())
    return "\n".join([f"adagn: {' '.join(prose)}", *commands])


def _overview() -> str:
    commands = "\n".join(f"  {name:18}{what}" for name, what in COMMANDS.items())
    return (
        "usage: adagn COMMAND [options]\n\nClass-conditional diffusion models that show what the condition does.\n\n"
        + with_commands(
            f"{commands}\n\n`adagn COMMAND --help` lists a command's options. Start with:",
            command("train", recipes.name_in_command("digits")),
        )
    )
