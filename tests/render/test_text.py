"""Numbers and names as text."""

from diffusion_adagn.render.text import columns, listed, number, one_line, percent, plus_minus, shorten


def test_one_line_drops_control_characters():
    assert one_line("a\n\t b\x00\ud800") == "a b?"


def test_shortened_text_fits():
    assert shorten("日本語" * 50, 9) == "日本語日…" and columns("日本語日…") == 9
    assert shorten("short", 5) == "short" and shorten("a, longer", 4) == "a…"
    assert shorten("wide" * 9, 70, lambda text: 10 * len(text)) == "widewi…"


def test_number_formats():
    assert [percent(s) for s in (0, 0.001, 0.25, 0.999, 1)] == ["0%", "under 1%", "25%", "over 99%", "100%"]
    assert plus_minus(0.021349, 0.00112) == "0.0213 ± 0.0011"
    assert [number(v) for v in (0, 0.5, 1e-5)] == ["0", "0.5", "1.0e-05"]


def test_long_lists_are_cut():
    assert listed(list("abcdef")) == "a, b, c and 3 more" and listed(["a"]) == "a"
