"""Sheets of labelled images: rows of cells with names beside and above them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..errors import InputError
from .text import one_line, shorten

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageFont

PAPER, INK, FAINT, HOLLOW = (250, 250, 248), (32, 34, 38), (116, 120, 128), (236, 236, 232)
GAP, MARGIN = 4, 16
WIDEST_LABEL = 220  # px; longer row labels are shortened


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str | Sequence[str]] = (),
    title: str = "",
    min_side: int = 64,
    captions: Sequence[Sequence[str]] = (),
    corner: str = "",
) -> Image.Image:
    """A sheet with one row of cells per row label, RGB.

    rows: cells uint8 [H, W, C], all of one shape, C 1 or 3; None leaves a cell empty, and rows may differ in length.
    column_labels: a text is wrapped to two lines; of several texts each is a line.
    captions: a text above each cell. corner: a heading above the row labels.
    Small cells are enlarged by a whole factor (nearest neighbour) until both sides are at least `min_side` px.
    Raises InputError for cells that differ in shape and for labels that differ in number from what they name.
    """
    from PIL import Image, ImageDraw

    shape = _shape_of(rows, row_labels, column_labels)
    factor = max(1, -(-min_side // min(shape[:2])))
    height, width = shape[0] * factor, shape[1] * factor
    columns = max((len(r) for r in rows), default=0)
    font, small, large = _font(14), _font(12), _font(17)

    names = [shorten(label, WIDEST_LABEL, partial(_width, font)) for label in row_labels]
    left = MARGIN + (max(_width(font, n) for n in [*names, corner]) + 10 if any(names) else 0)
    above = 15 if captions else 0
    heads = [_head_lines(label, small, width + GAP - 6) for label in column_labels]
    lines = max((len(h) for h in heads), default=0)
    right = left + columns * (width + GAP) - GAP + MARGIN
    title_lines = _wrap(title, large, max(right - 2 * MARGIN, 360), most=3) if title else []
    top = MARGIN + 24 * len(title_lines) + (6 if title else 0) + 16 * lines + (4 if lines else 0)
    right = max([right, *(2 * MARGIN + _width(large, t) for t in title_lines)])

    sheet = Image.new("RGB", (right, top + len(rows) * (above + height + GAP) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(title_lines):
        draw.text((MARGIN, MARGIN + 24 * i), line, INK, large)
    for c, head in enumerate(heads):
        for i, line in enumerate(reversed(head)):  # the last line stands on the cells
            draw.text((left + c * (width + GAP) + width / 2, top - 6 - 16 * i), line, INK, small, anchor="ms")
    draw.text((left - 10, top - 6), corner, FAINT, small, anchor="rs")
    for r, (row, name) in enumerate(zip(rows, names)):
        y = top + above + r * (above + height + GAP)
        draw.text((left - 10, y + height / 2), name, INK, font, anchor="rm")
        for c in range(columns):
            at = (left + c * (width + GAP), y)
            cell = row[c] if c < len(row) else None
            if captions and c < len(captions[r]):
                caption = shorten(captions[r][c], width + GAP - 6, partial(_width, small))
                draw.text((at[0] + width / 2, y - 4), caption, FAINT, small, anchor="ms")
            if cell is None:
                draw.rectangle((*at, at[0] + width - 1, at[1] + height - 1), HOLLOW)
            else:
                image = Image.fromarray(cell[:, :, 0] if shape[2] == 1 else cell)
                sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), at)
    return sheet


def captioned_grid(cells: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Images in reading order, with a caption above each row's cells.

    cells: uint8 [H, W, C], all of one shape, C 1 or 3. Raises InputError as `labelled_grid` does.
    """
    from PIL import Image

    sheets = [
        labelled_grid([cells[i : i + columns]], [""], captions[i : i + columns], min_side=96)
        for i in range(0, len(cells), columns)
    ]
    sheet = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    top = 0
    for part in sheets:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _shape_of(rows: Sequence, row_labels: Sequence, column_labels: Sequence) -> tuple[int, int, int]:
    columns = max((len(r) for r in rows), default=0)
    if len(rows) != len(row_labels) or (column_labels and len(column_labels) != columns):
        raise InputError(
            f"a grid of {len(rows)} rows and {columns} columns was given {len(row_labels)} row labels and {len(column_labels)} column labels."
        )
    kinds = sorted({(str(c.dtype), c.shape) for r in rows for c in r if c is not None})
    dtype, shape = kinds[0] if kinds else ("no cell", ())
    if len(kinds) != 1 or dtype != "uint8" or len(shape) != 3 or shape[2] not in (1, 3):
        found = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in kinds[:4]) or "no cell at all"
        raise InputError(f"the cells of a grid must be of one shape, uint8 [H, W, C] with C 1 or 3; got {found}.")
    return shape


def _font(size: int) -> ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _width(font: ImageFont.ImageFont, text: str) -> int:
    return int(font.getlength(text)) + 1


def _head_lines(label: str | Sequence[str], font: ImageFont.ImageFont, width: int) -> list[str]:
    if isinstance(label, str):
        return _wrap(label, font, width)
    return [shorten(line, width, partial(_width, font)) for line in label]


def _wrap(text: str, font: ImageFont.ImageFont, width: int, most: int = 2) -> list[str]:
    """The text in at most `most` lines of at most `width` px; what does not fit is shortened."""
    lines: list[str] = []
    for word in one_line(text).split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and (_width(font, joined) <= width or len(lines) == most):
            lines[-1] = joined
        else:
            lines.append(word)
    return [shorten(line, width, partial(_width, font)) for line in lines]
