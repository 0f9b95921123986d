"""Print a script with which a shell completes commands and options: eval "$(adagn completion bash)"."""

import argparse
import importlib

from ..commands import with_commands
from ..errors import InputError
from .options import Parser

SHELLS = ("bash", "zsh", "tcsh")  # of shtab


def parser() -> Parser:
    p = Parser("completion", __doc__)
    help = "the script for this shell; put the line above into its start-up file"
    p.add_argument("shell", choices=SHELLS, metavar="|".join(SHELLS), help=help)
    return p


def run(args: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError:
        text = "completion needs the package shtab. Install it:"
        raise InputError(with_commands(text, "pip install 'diffusion-adagn[completion]'")) from None

    print(shtab.complete(all_commands(shtab.FILE), shell=args.shell))


def all_commands(files: object) -> argparse.ArgumentParser:
    """A parser with every command and its options. files: completes positional arguments without choices, as paths."""
    from .main import COMMANDS

    root = argparse.ArgumentParser("adagn")
    commands = root.add_subparsers(parser_class=argparse.ArgumentParser)
    for name, what in COMMANDS.items():
        module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
        own = module.parser()
        commands.add_parser(name, help=what)
        commands.choices[name] = own
        for action in own._actions:
            if not action.option_strings and action.choices is None:
                action.complete = files
    return root
