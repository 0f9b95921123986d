from functools import partial

import numpy as np
import pytest

from diffusion_adagn.errors import InputError
from diffusion_adagn.render.grids import (
    GAP,
    HOLLOW,
    MARGIN,
    WIDEST_LABEL,
    _font,
    _width,
    _wrap,
    labelled_grid,
)
from diffusion_adagn.render.text import shorten

RNG = np.random.default_rng(0)


def cell(height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 200, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(("side", "shown"), [(8, 64), (28, 84), (64, 64), (100, 100)])
def test_small_images_grow_by_whole_factors(side, shown):
    a = cell(side, side)
    sheet = np.asarray(labelled_grid([[a]], [""]))
    assert sheet.shape == (2 * MARGIN + shown, 2 * MARGIN + shown, 3)
    inner = sheet[MARGIN:-MARGIN, MARGIN:-MARGIN]
    assert np.array_equal(inner, a.repeat(shown // side, 0).repeat(shown // side, 1))


def test_cells_lie_where_their_row_and_column_say():
    rows = [[cell(64, 64, 1) for _ in range(3)] for _ in range(2)]
    rows[1][1] = None
    sheet = np.asarray(labelled_grid(rows, ["a", "b"]))
    left = sheet.shape[1] - MARGIN - 3 * 64 - 2 * GAP
    for r, row in enumerate(rows):
        for c, expected in enumerate(row):
            y, x = MARGIN + r * (64 + GAP), left + c * (64 + GAP)
            shown = sheet[y : y + 64, x : x + 64]
            assert (shown == (HOLLOW if expected is None else expected)).all()


def test_rows_may_differ_in_length():
    sheet = labelled_grid([[cell()], [cell(), cell()]], ["", ""])
    assert sheet.size == (2 * MARGIN + 2 * 64 + GAP, 2 * MARGIN + 2 * 64 + GAP)


def test_long_row_labels_are_shortened():
    font = _font(14)
    short = shorten("Carassius auratus, the goldfish of many a pond " * 3, WIDEST_LABEL, partial(_width, font))
    assert short.endswith("…") and WIDEST_LABEL - 30 < _width(font, short) <= WIDEST_LABEL
    sheet = labelled_grid([[cell()]], ["w" * 500])
    assert sheet.width <= WIDEST_LABEL + 64 + 2 * MARGIN + 12


def test_column_labels_never_leave_their_column():
    font = _font(12)
    for text in ("guidance scale 7.5 with a long tail", "w" * 60, "0", "a b c d e f g h i j k l m n"):
        lines = _wrap(text, font, 62)
        assert 1 <= len(lines) <= 2
        assert all(_width(font, line) <= 62 for line in lines)
    assert _wrap("scale 2", font, 62) == ["scale 2"]
    wide = labelled_grid([[cell(), cell()]], [""], ["w" * 60, "w" * 60])
    ink = (np.asarray(wide)[MARGIN : -MARGIN - 64] < 200).any((0, 2))
    assert not ink[MARGIN + 64 : MARGIN + 64 + GAP].any()  # the gap between two columns stays free


@pytest.mark.parametrize("name", ["猫", "кошка", "🐈 cat", "a\nb\tc", "\udce9", "", "null"])
def test_any_name_can_be_drawn(name):
    assert labelled_grid([[cell()]], [name], [name], title=name).mode == "RGB"


def test_a_title_takes_room_above():
    plain, titled = labelled_grid([[cell()]], [""]), labelled_grid([[cell()]], [""], title="t " * 400)
    assert plain.height < titled.height < plain.height + 120
    assert titled.width < 400


@pytest.mark.parametrize(
    ("rows", "labels", "columns", "wrong"),
    [
        ([[cell()]], ["a", "b"], (), "2 row labels"),
        ([[cell()]], ["a"], ["1", "2"], "2 column labels"),
        ([[cell(), cell(16, 16)]], ["a"], (), "one shape"),
        ([[None]], ["a"], (), "no cell"),
        ([], [], (), "no cell"),
        ([[cell(8, 8, 4)]], ["a"], (), "C 1 or 3"),
        ([[cell().astype(np.float32)]], ["a"], (), "uint8"),
        ([[cell()[0]]], ["a"], (), r"\[H, W, C\]"),
    ],
)
def test_wrong_grids(rows, labels, columns, wrong):
    with pytest.raises(InputError, match=wrong):
        labelled_grid(rows, labels, columns)


def test_captions_stand_above_their_cells():
    rows = [[cell(64, 64, 1) for _ in range(3)] for _ in range(2)]
    sheet = np.asarray(labelled_grid(rows, ["a", "b"], captions=[["1", "2", "3"], ["4", "w" * 99]], corner="class"))
    plain = np.asarray(labelled_grid(rows, ["a", "b"]))
    assert sheet.shape[0] == plain.shape[0] + 2 * 15
    left = sheet.shape[1] - MARGIN - 3 * 64 - 2 * GAP
    for r, row in enumerate(rows):
        for c, expected in enumerate(row):
            y, x = MARGIN + 15 + r * (15 + 64 + GAP), left + c * (64 + GAP)
            assert (sheet[y : y + 64, x : x + 64] == expected).all()
            assert (sheet[y - 15 : y, x : x + 64] < 200).any() == ((r, c) != (1, 2))


def test_lines_of_a_column_label():
    one, two = (labelled_grid([[cell()]], [""], [label]) for label in ("scale 3", ["use this", "scale 3", "w" * 99]))
    assert two.height == one.height + 2 * 16 and two.width == one.width
