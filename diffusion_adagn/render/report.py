"""A report is a title and sections of paragraphs, tables and images: the same one as Markdown and as an HTML page.

Report("Sweep of digits", [Section("Points", [Table(["point", "FID"], rows, "± one standard error.")])])
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import atomic_write
from .figures import data_uri, is_image, png, svg
from .text import one_line, percent

if TYPE_CHECKING:
    from .figures import Drawn


class Strong(str):
    """Bold text of a cell."""


class Code(str):
    """Text of a cell, or lines between paragraphs, that is typed as it is."""


@dataclass(frozen=True)
class Table:
    """A table of texts. caption: the sentence below it, which says what the columns mean."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Shown:
    """An image of a report.

    Args:
        name: Of its file, without the ending.
        draw: Draws it when it is needed.
        alt: What it shows, for screen readers.
    """

    name: str
    draw: Callable[[], Drawn]
    alt: str

    @cached_property
    def drawn(self) -> Drawn:
        return self.draw()

    @cached_property
    def files(self) -> dict[str, bytes]:
        """{file name: content}: a PNG, and of a figure an SVG."""
        files = {f"{self.name}.png": png(self.drawn)}
        return files if is_image(self.drawn) else files | {f"{self.name}.svg": svg(self.drawn)}

    @property
    def uri(self) -> str:
        """The image inside a page, a figure as SVG."""
        name, content = list(self.files.items())[-1]
        return data_uri(content, "svg+xml" if name.endswith("svg") else "png")


Part = str | Code | list | Table | Shown  # a paragraph, a command, bullets, a table, an image


@dataclass(frozen=True)
class Section:
    """Parts under a heading."""

    heading: str
    parts: list[Part]


@dataclass(frozen=True)
class Report:
    """A page. Its images are drawn when it is saved, or made HTML.

    Args:
        title: What it is about.
        sections: The parts.
        lead: The sentences that matter most.
        state: "used", "unused" or "open", for the colour beside the title; empty: none.
        kicker: A line above the title.
        about: What was measured, and how.
        meanings: Terms with their explanations as the HTML of a `fragment`, at the end of the page.
    """

    title: str
    sections: Sequence[Section]
    lead: Sequence[str] = ()
    state: str = ""
    kicker: str = ""
    about: str = ""
    meanings: str = ""

    @property
    def images(self) -> list[Shown]:
        return [part for section in self.sections for part in section.parts if isinstance(part, Shown)]

    def html(self) -> str:
        """A page that fetches nothing."""
        return _template("render/report.html.j2").render(report=self)

    def markdown(self) -> str:
        """The same text, with the images as files beside it."""
        parts = [f"# {plain(self.title)}", *map(plain, self.lead), *filter(None, [plain(self.about)])]
        for section in self.sections:
            parts += [f"## {plain(section.heading)}", *map(_markdown, section.parts)]
        return "\n\n".join(parts) + "\n"

    def save(self, out: Path, page: str = "report.html", text: str = "") -> list[Path]:
        """Write the page, its images, and the Markdown into `out`, atomically.

        Args:
            out: A folder.
            page: File name of the HTML page.
            text: File name of the Markdown; empty: none.

        Returns:
            The files, the page first.
        """
        texts = {page: self.html()} | ({text: self.markdown()} if text else {})
        files = {name: content.encode() for name, content in texts.items()}
        for shown in self.images:
            files |= shown.files
        return [
            atomic_write(out / name, lambda tmp, content=content: tmp.write_bytes(content))
            for name, content in files.items()
        ]


# ---------------------------------------------------------------------- Markdown


def plain(text: str) -> str:
    """Text from anywhere as one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>\[\]|#~])", r"\\\1", one_line(text))


def table_lines(table: Table, cell: Callable[[str], str] = one_line) -> list[str]:
    """A table as aligned lines, for a terminal; with `markdown_cell` for Markdown."""
    rows = [[cell(text) for text in row] for row in [table.head, *table.rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def markdown_cell(text: str) -> str:
    if isinstance(text, Code):
        return f"`{one_line(text).replace('`', chr(39)).replace('|', '/')}`" if text else ""
    return f"**{plain(text)}**" if isinstance(text, Strong) else plain(text)


def _markdown(part: Part) -> str:
    if isinstance(part, Table):
        return "\n".join([*table_lines(part, markdown_cell), *(["", plain(part.caption)] if part.caption else [])])
    if isinstance(part, Shown):
        return f"![{plain(part.alt)}]({part.name}.png)"
    if isinstance(part, Code):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", part)), default=0))
        return f"{fence}bash\n{part}\n{fence}"
    return "\n".join(f"- {plain(line)}" for line in part) if isinstance(part, list) else plain(part)


# ---------------------------------------------------------------------- HTML


def section_html(section: Section) -> str:
    """A section inside another page, without the style sheet, under a heading of level 3."""
    return str(_template("render/parts.html.j2").module.section(section, 3))


def fragment(name: str, **values) -> str:
    """A template of the package, such as "trace/meanings.html.j2", as a part of a page."""
    from markupsafe import Markup

    return Markup(_template(name).render(**values))


@lru_cache
def _template(name: str):
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader(__package__.rpartition(".")[0], ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else one_line(value),
    )
    environment.filters |= {"kind": lambda part: type(part).__name__, "percent": percent, "number": "{:g}".format}
    return environment.get_template(name)
