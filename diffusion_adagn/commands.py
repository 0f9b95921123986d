"""Commands as they are printed for people to type: complete, quoted for a shell, each on a line of its own."""

import itertools
import shlex
from collections.abc import Iterable
from pathlib import Path

INDENT = "  "


def command(name: str, *arguments: object, **options: object) -> str:
    """`adagn NAME ARGUMENT ... --option value ...`, on one line.

    Args:
        name: The command.
        *arguments: Its positional arguments; those that begin with a dash are written as paths (./-x).
        **options: Its options by name; True: a flag, None: left out.
    """
    words = ["adagn", name, *(f"./{a}" if a.startswith("-") else a for a in map(str, arguments))]
    return with_options(shell_line(words), **options)


def with_options(line: str, **options: object) -> str:
    """A command with these options added, as `command` writes them."""
    words = []
    for option, value in options.items():
        if value is True:
            words.append(f"--{option}")
        elif value is not None and str(value).startswith("-"):
            words.append(f"--{option}={value}")
        elif value is not None:
            words += [f"--{option}", str(value)]
    return " ".join([line, shell_line(words)]) if words else line


def shell_line(words: Iterable[str]) -> str:
    """The words as one line of a shell."""
    return " ".join(map(_quote, words))


def with_commands(text: str, *commands: str) -> str:
    """The text, and below it each command on a line of its own. The command line prints such lines as they are."""
    return "\n".join([text, *(INDENT + line for line in commands)])


def resume_hint(text: str, typed: str) -> str:
    """The text, and that the command that was typed goes on from there."""
    text = f"{text} The same command goes on from there"
    return with_commands(f"{text}:", typed) if typed else f"{text}."


def overwrite_hint(text: str, typed: str, out: str | Path) -> str:
    """The text, that something is in `out` already, and the typed command with --overwrite, or with another --out."""
    if not typed:
        return f"{text}: give another --out, or --overwrite to replace it."
    overwrite = f"{typed} --overwrite"
    if " --out" in typed:
        return with_commands(f"{text}: give another --out, or replace it:", overwrite)
    return with_commands(
        f"{text}. Replace it, or write elsewhere:", overwrite, with_options(typed, out=unused_path(str(out)))
    )


def resume_command(run: str | Path) -> str:
    """What to type to go on with a run."""
    return command("train", resume=run)


def unused_path(path: str) -> str:
    """The path, or path-2, path-3, ... if something is there already."""
    return next(
        name for name in itertools.chain([path], (f"{path}-{i}" for i in itertools.count(2))) if not Path(name).exists()
    )


def _quote(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    # $'...' of bash and zsh: a control character would break the line
    return "$'" + "".join(c if c.isprintable() and c not in "\\'" else _escape(c) for c in word) + "'"


def _escape(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
