"""Text from anywhere as Markdown: plain lines, tables, code."""

import re
from collections.abc import Sequence

from .text import one_line


def plain(text: str) -> str:
    """Text from anywhere as one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>\[\]|#~])", r"\\\1", one_line(text))


def tick(text: str) -> str:
    """Text as one line that may stand between backticks, in a table too."""
    return one_line(text).replace("`", "'").replace("|", "/")


def code(text: str) -> list[str]:
    """The lines of a block of shell code."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}bash", text, fence]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]]
