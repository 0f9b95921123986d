"""One style for every chart, and its files. A chart is a function that returns a matplotlib Figure.

@chart
def loss_curve(losses): ...  # Figure objects only: pyplot's global state is not safe in threads
save(loss_curve(losses), Path("loss.png"))
"""

from __future__ import annotations

import base64
import functools
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import atomic_write
from .text import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    Drawn = Figure | Image.Image

WIDTH = 11.6  # inches
DPI = 130  # of PNGs
PAPER, INK, FAINT, RULE, HOLLOW = "#ffffff", "#202226", "#5c6068", "#dcdcd6", "#e2e2dd"
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#4D4D4D",
    "#B8A200",
)  # Okabe & Ito, nearly
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINE_STYLES = ("-", "--", "-.", ":")
SEQUENTIAL = ("#fdfaf0", "#fdd696", "#f5965c", "#d6525e", "#8c296e", "#3e1258", "#0e0628")  # ordered by lightness
DIVERGING = ("#00528c", "#56a0cd", "#cee2ee", "#f8f7f4", "#fadabe", "#e88a42", "#b24200")
STYLE = {
    "svg.hashsalt": "diffusion_adagn",  # the same figure is the same file
    "svg.fonttype": "none",  # text stays text, and a browser has fonts for every script
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a name may contain $
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "errorbar.capsize": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "image.interpolation": "nearest",
}
_LOCK = threading.RLock()  # matplotlib's settings are global, and its fonts are not safe in threads


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with _LOCK, warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # an SVG has it nevertheless
        yield


def chart(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator of a function that returns a Figure, which it draws in the style."""

    @functools.wraps(draw)
    def styled(*args, **options) -> Figure:
        with _style():
            return draw(*args, **options)

    return styled


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure; its layout makes room for all text. Sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def colour_map(anchors: tuple[str, ...] | str):
    """A colour map through these colours, or matplotlib's of this name; values that are missing are grey."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    if isinstance(anchors, str):
        return colormaps[anchors].with_extremes(bad=HOLLOW)
    return LinearSegmentedColormap.from_list("adagn", anchors).with_extremes(bad=HOLLOW)


def ink_on(colour) -> str:
    """The colour of text on a colour: dark or white, whichever has more contrast."""
    from matplotlib.colors import to_rgb

    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.2 else "white"


def category_axis(axis, names: list[str], most: int = 28, **options) -> None:
    """Names as ticks at 0, 1, 2, ...; long ones are shortened. axis: an Axes' xaxis or yaxis."""
    axis.set_ticks(range(len(names)), [shorten(name, most) for name in names], **options)


def without_frame(ax: Axes) -> None:
    """Only what is drawn: no grid, spines and tick marks."""
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


# ---------------------------------------------------------------------- files


def png(drawn: Drawn) -> bytes:
    """A figure or an image as the bytes of a PNG."""
    return _bytes(drawn, "png")


def svg(figure: Figure) -> bytes:
    """A figure as the bytes of an SVG."""
    return _bytes(figure, "svg")


def _bytes(drawn: Drawn, kind: str) -> bytes:
    file = io.BytesIO()
    if is_image(drawn):
        drawn.save(file, "PNG", optimize=True)
        return file.getvalue()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with _style():
        lay_out(drawn)
        # not savefig, which draws everything twice
        if kind == "png":
            FigureCanvasAgg(drawn).print_png(file, metadata={"Software": None})
        else:
            FigureCanvasSVG(drawn).print_svg(file, metadata={"Date": None})
    return file.getvalue()


def lay_out(figure: Figure) -> None:
    """Make room for all text, once for all formats: it takes longer than the drawing."""
    if layout := figure.get_layout_engine():
        layout.execute(figure)
        figure.set_layout_engine("none")


def is_image(drawn: Drawn) -> bool:
    """Whether it is an image of pixels, not a figure."""
    return not hasattr(drawn, "savefig")


def save(drawn: Drawn, file: Path) -> list[Path]:
    """Write the PNG, and of a figure the SVG beside it, atomically. Returns the files."""
    contents = {file: png(drawn)} | ({} if is_image(drawn) else {file.with_suffix(".svg"): svg(drawn)})
    return [
        atomic_write(path, lambda tmp, content=content: tmp.write_bytes(content)) for path, content in contents.items()
    ]


def data_uri(content: bytes, kind: str) -> str:
    """A PNG ("png") or SVG ("svg+xml") inside a page: nothing is fetched."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
