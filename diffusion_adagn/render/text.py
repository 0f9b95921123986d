"""Numbers and names as text: one line, shortened to a width, lists, percentages, intervals."""

import math
import unicodedata
from collections.abc import Callable, Sequence

LONGEST = 1000  # characters that are looked at


def one_line(text: str) -> str:
    """Any text as one line that can be written and drawn, without control characters and lone surrogates."""
    text = " ".join(str(text).split()).encode("utf-8", "replace").decode()
    return "".join(c for c in text if c == " " or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))


def columns(text: str) -> int:
    """The width of a line in characters; a wide one, such as a Chinese one, counts twice."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, most: float, width: Callable[[str], float] = columns) -> str:
    """The text in one line of at most this width, with an ellipsis where it was cut.

    Args:
        text: Any text.
        most: The largest width.
        width: Measures a line, such as a font's `getlength`.
    """
    text = one_line(text)[:LONGEST]
    if width(text) <= most:
        return text
    while text and width(text + "…") > most:
        text = text[:-1]
    return text.rstrip(" ,") + "…"


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def counted(count: int, noun: str) -> str:
    """ "1 image", "1,200 images"; a plural of s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(words: Sequence[str], max_items: int = 4) -> str:
    """ "a, b and c"; "a, b and 7 more"."""
    words = list(words)
    if len(words) > max_items:
        words = [*words[: max_items - 1], f"{len(words) - max_items + 1} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def percent(fraction: float) -> str:
    """Whole per cent; "0%" and "100%" only for exactly 0 and 1."""
    if 0 < fraction < 0.01:
        return "under 1%"
    return "over 99%" if 0.99 < fraction < 1 else f"{fraction:.0%}"


def number(value: float) -> str:
    """Two or three significant digits."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def plus_minus(mean: float, half: float) -> str:
    """Mean and half-width of an interval, rounded to two digits of the half-width: "0.0213 ± 0.0011"."""
    digits = 4 if not half or not math.isfinite(half) else min(12, max(0, 1 - math.floor(math.log10(half))))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"
