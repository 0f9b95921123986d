"""Commands printed for users to copy: complete, quoted for a shell, one per line."""

import itertools
import shlex
from collections.abc import Iterable
from pathlib import Path

INDENT = "  "


def command(name: str, *arguments: object, **options: object) -> str:
    """`adagn NAME ARGUMENT ... --option value ...`, on one line.

    Args:
        name: The command.
        *arguments: Its positional arguments; one that begins with a dash is written as a path (./-x).
        **options: Its options by name. True writes a flag, None skips the option.
    """
    words = ["adagn", name, *(f"./{a}" if a.startswith("-") else a for a in map(str, arguments))]
    return with_options(shell_line(words), **options)


def option_value(value: object) -> str:
    """A setting's value as options take it: words for None, True and False, lists with commas."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def with_options(line: str, **options: object) -> str:
    """A command with more options, written as in `command`."""
    words = []
    for option, value in options.items():
        if value is True:
            words.append(f"--{option}")
        elif value is not None:
            words += [f"--{option}={value}"] if str(value).startswith("-") else [f"--{option}", str(value)]
    return f"{line} {shell_line(words)}" if words else line


def shell_line(words: Iterable[str]) -> str:
    """The words as one line of shell code."""
    return " ".join(map(_quote, words))


def with_commands(text: str, *commands: str) -> str:
    """The text, and each command on its own line below. `adagn` prints such lines without reflowing."""
    return "\n".join([text, *(INDENT + line for line in commands)])


def paragraph(error: object) -> str:
    """The message on one line, and each of its commands on its own line.

    The terminal wraps them: commands and paths that a program breaks across lines cannot be copied.
    """
    prose, commands = [], []
    for line in str(error).splitlines():
        is_command = line.startswith((f"{INDENT}adagn ", f"{INDENT}torchrun ", f"{INDENT}pip "))
        commands.append(line.rstrip()) if is_command else prose.extend(line.split())
    return "\n".join([f"adagn: {' '.join(prose)}", *commands])


def resume_hint(text: str, typed: str) -> str:
    """The text, and that the typed command resumes the work."""
    text = f"{text} The same command resumes it"
    return with_commands(f"{text}:", typed) if typed else f"{text}."


def overwrite_hint(text: str, typed: str, out: str | Path) -> str:
    """The text, and the typed command with --overwrite or another --out. `out` exists already."""
    if not typed:
        return f"{text}: give another --out, or --overwrite to replace it."
    overwrite = f"{typed} --overwrite"
    if " --out" in typed:
        return with_commands(f"{text}: give another --out, or replace it:", overwrite)
    elsewhere = with_options(typed, out=unused_path(str(out)))
    return with_commands(f"{text}. Replace it, or write elsewhere:", overwrite, elsewhere)


def resume_command(run: str | Path) -> str:
    """The command that resumes a run."""
    return command("train", resume=run)


def unused_path(path: str) -> str:
    """The path, or the first of path-2, path-3, ... that does not exist; of a file name-2.safetensors and so on."""
    suffix = Path(path).suffix if Path(path).is_file() else ""
    stem = path.removesuffix(suffix)
    names = itertools.chain([path], (f"{stem}-{i}{suffix}" for i in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


def _quote(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    # $'...' of bash and zsh: a raw control character would break the line
    return "$'" + "".join(c if c.isprintable() and c not in "\\'" else _escape(c) for c in word) + "'"


def _escape(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
