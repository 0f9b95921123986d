"""`adagn COMMAND ...`: run a command; print an error as one paragraph and exit with a status.

Exit status: 0 success, 1 invalid input or a failure, 2 usage, 75 stopped by a signal after saving.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from .. import recipes
from ..commands import command, paragraph, with_commands
from ..errors import InputError, Note, UsageError, did_you_mean, failed_allocation, memory_advice, out_of_memory
from ..runtime.launcher import exit_with_launcher, leave
from ..version import __version__

COMMANDS = {
    "init": "print a recipe, to save and edit",
    "train": "train a class-conditional diffusion model",
    "sample": "sample images by class label",
    "evaluate": "compare images or a model with real images",
    "sweep": "compare guidance scales, intervals, steps and samplers by metrics",
    "guide": "train a small guide for a run, for guidance against a weaker network",
    "ema": "compare EMA lengths of a run by the loss on held-out images",
    "trace": "show the effect of the condition, and whether the label is used",
    "classify": "find the class of images by the loss of denoising them",
    "style": "show principal directions, truncation and sums of class vectors",
    "learn-class": "learn a new class from a few images, as one file",
    "merge-classes": "write a pipeline with learned classes in its class table",
    "data": "inspect labelled images (adagn data inspect)",
    "schema": "print the JSON schema of the settings",
    "completion": "print a script that completes commands and options in a shell",
    "doctor": "check this installation and report problems",
    "serve": "serve models: HTTP API, tools for agents, page",
    "mcp": "give an agent tools that generate images (MCP over stdio)",
    "ablate": "train the same run with several conditioning layers, and compare",
    "import-adm": "convert an OpenAI ADM checkpoint to a pipeline folder",
    "import-diffusers": "convert a diffusers folder with a UNet2DModel to a pipeline folder",
    "push": "upload a model to the Hugging Face hub",
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
            hint = did_you_mean(name, COMMANDS, most=1)
            raise UsageError(f"there is no command '{argv[0]}'.{hint} Commands: {', '.join(COMMANDS)}.")
        module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
        return module.run(module.parser().parse(argv[1:])) or 0
    except BrokenPipeError:  # `adagn schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if "tqdm" in sys.modules:  # close progress bars, so that an error starts on a new line
            for bar in list(sys.modules["tqdm"].tqdm._instances):
                bar.close()
        if isinstance(error, KeyboardInterrupt):
            print("\ninterrupted", file=sys.stderr)
            return 130
        if "--debug" in argv:
            raise
        if isinstance(error, InputError):
            print(paragraph(error), file=sys.stderr)
            return 2 if isinstance(error, UsageError) else 1
        if os.environ.get("RANK", "0") != "0" and "onnection" in str(error):
            return 1  # the process that failed has printed why
        text = f"{type(error).__name__}: {error}"
        if out_of_memory(error):
            text = f"out of memory{failed_allocation(error)}. {memory_advice(argv[0])}"
        print(paragraph(f"{text} (--debug shows where)"), file=sys.stderr)
        return 1


def script(command: str) -> None:
    """Entry point of train.py and sample.py, also under launchers. Ends the interpreter with the status of `main`."""
    _start()
    leave(main([command, *sys.argv[1:]]))


def console() -> None:
    """Entry point of the console script `adagn`."""
    _start()
    leave(main())


def _start() -> None:
    exit_with_launcher()
    show = warnings.showwarning

    def show_note(message: Warning | str, category: type[Warning], *place) -> None:
        if issubclass(category, Note):
            print(f"note: {message}", file=sys.stderr)
        else:
            show(message, category, *place)

    warnings.showwarning = show_note


def _overview() -> str:
    what = "Class-conditional diffusion models, with tools that show the effect of the condition."
    commands = "\n".join(f"  {name:18}{what}" for name, what in COMMANDS.items())
    text = f"usage: adagn COMMAND [options]\n\n{what}\n\n{commands}\n\n"
    text += "`adagn COMMAND --help` lists the options of a command. Start with:"
    return with_commands(text, command("train", recipes.name_in_command("digits")))
