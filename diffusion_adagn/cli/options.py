"""The parser that every command shares: dashes and underscores alike, unknown options answered with the nearest one."""

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from ..config import RunConfig, fields_of, type_name
from ..errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse, raising UsageError instead of leaving, and naming the nearest option."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args([_canonical(word) for word in argv])
        if unknown:
            known = [o for action in self._actions for o in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=2)
            hint = f" Did you mean {' or '.join(near)}?" if near else f" `{self.prog} --help` lists the options."
            raise UsageError(f"{self.prog} does not know '{unknown[0]}'.{hint}")
        return args

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}. `{self.prog} --help` lists the options.")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=118)


def _canonical(word: str) -> str:
    """--dry-run and --dry_run are one option."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def add_config_options(parser: argparse.ArgumentParser, sections: Sequence[str] = ()) -> None:
    """An option for every config field, with its one documentation; values stay words until config.py reads them."""
    docs = {
        f.name: f.default_factory for f in dataclasses.fields(RunConfig) if f.default_factory is not dataclasses.MISSING
    }
    groups = {}
    for key, hint, f in fields_of(RunConfig):
        section = key.rpartition(".")[0]
        if key == "labels" or (sections and section not in sections):
            continue
        if section not in groups:
            title = f"{section}.*" if section else "run"
            groups[section] = parser.add_argument_group(title, docs[section].__doc__ if section else None)
        default = "" if f.default is None else f" [{_shown(f.default)}]"
        flag = {"nargs": "?", "const": "true"} if hint is bool else {}
        groups[section].add_argument(
            f"--{key}",
            dest=key,
            default=argparse.SUPPRESS,
            metavar=type_name(hint),
            help=(f.metadata["help"] + default).replace("%", "%%"),
            **flag,
        )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """RUN and --weights, as `loading.open_pipeline` takes them."""
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run folder (runs/digits), one of its checkpoints, a pipeline folder, or owner/name on the hub",
    )
    parser.add_argument(
        "--weights", choices=["ema", "raw"], default="ema", help="raw: the unaveraged weights of a checkpoint [ema]"
    )


def config_overrides(args: argparse.Namespace) -> dict[str, str]:
    """The config options that were given, by dotted key."""
    known = {key for key, _, _ in fields_of(RunConfig)}
    return {key: value for key, value in vars(args).items() if key in known}


def _shown(default: Any) -> str:
    return (
        ",".join(map(str, default))
        if isinstance(default, tuple)
        else str(default).lower()
        if isinstance(default, bool)
        else str(default)
    )
