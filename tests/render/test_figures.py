"""Charts: the same file each time, any text, no change of matplotlib's settings, several threads."""

import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
from PIL import Image

from diffusion_adagn.render.figures import DIVERGING, SEQUENTIAL, chart, colour_map, ink_on, new_figure, png, save, svg

NASTY = "<b>&$x_1$ \u65e5\u672c"


@chart
def curve(values, title="title"):
    figure = new_figure(2, 3)
    ax = figure.subplots()
    ax.plot(values)
    ax.set_title(title)
    return figure


def test_same_chart_is_the_same_file(tmp_path):
    first, second = (save(curve([1, 2, 3]), tmp_path / name / "a.png") for name in "ab")
    assert [f.name for f in first] == ["a.png", "a.svg"]
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]
    assert b"<dc:date>" not in first[1].read_bytes()


def test_settings_of_matplotlib_stay_as_they_were():
    before = dict(matplotlib.rcParams)
    svg(curve([1, 2]))
    assert dict(matplotlib.rcParams) == before


def test_any_text_can_be_drawn():
    assert NASTY in [e.text for e in ET.fromstring(svg(curve([1, 2], NASTY))).iter("{http://www.w3.org/2000/svg}text")]
    assert png(curve([1, 2], NASTY))[:4] == b"\x89PNG"


def test_threads_draw_the_same():
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda _: svg(curve([1, 3, 2])), range(8)))
    assert set(drawn) == {svg(curve([1, 3, 2]))}


def test_images_are_saved_as_png(tmp_path):
    files = save(Image.new("RGB", (3, 4), "red"), tmp_path / "grid.png")
    assert [f.name for f in files] == ["grid.png"] and Image.open(files[0]).size == (3, 4)


def test_colours_are_readable_without_hue():
    light = np.array([colour_map(SEQUENTIAL)(x)[:3] for x in np.linspace(0, 1, 20)]) @ [0.3, 0.6, 0.1]
    assert (np.diff(light) < 0).all()
    low, middle, high = (np.array(colour_map(DIVERGING)(x)) for x in (0.0, 0.5, 1.0))
    assert low[2] > low[0] and high[0] > high[2] and middle.min() > 0.9
    assert ink_on("#0e0628") == "white" and ink_on("#fdfaf0") != "white"
