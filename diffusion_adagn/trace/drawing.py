"""A drawing is a list of shapes that is saved as SVG and as PNG."""

import base64
import io
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..render.grids import INK, PAPER
from ..render.text import one_line

Colour = tuple[int, int, int]
PNG_SCALE = 2
FONT = "system-ui, 'DejaVu Sans', sans-serif"

TIME, LABEL, BOTH = (0, 114, 178), (213, 94, 0), (190, 174, 120)  # blue, vermilion (Okabe & Ito) and sand
BAND = (224, 238, 230)

_SEQUENTIAL = [
    (253, 250, 240),
    (253, 214, 150),
    (245, 150, 92),
    (214, 82, 94),
    (140, 41, 110),
    (62, 18, 88),
    (14, 6, 40),
]
_DIVERGING = [
    (0, 82, 140),
    (86, 160, 205),
    (206, 226, 238),
    (248, 247, 244),
    (250, 218, 190),
    (232, 138, 66),
    (178, 66, 0),
]


def sequential(values: np.ndarray) -> np.ndarray:
    """0..1 -> uint8 [..., 3]: paper (0) to dark; ordered by lightness, so readable without hue."""
    return _between(_SEQUENTIAL, values)


def diverging(values: np.ndarray) -> np.ndarray:
    """-1..1 -> uint8 [..., 3]: blue, paper, vermilion, which also colour-blind readers can distinguish."""
    return _between(_DIVERGING, (np.asarray(values) + 1) / 2)


def _between(anchors: list[Colour], values: np.ndarray) -> np.ndarray:
    position = np.clip(np.nan_to_num(np.asarray(values, dtype=float)), 0, 1) * (len(anchors) - 1)
    table = np.array(anchors, dtype=float)
    parts = [np.interp(position, np.arange(len(anchors)), table[:, c]) for c in range(3)]
    return np.stack(parts, axis=-1).round().astype(np.uint8)


@lru_cache(maxsize=64)
def _font(size: float) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


@dataclass(frozen=True)
class Rect:
    x: float
    y: float
    width: float
    height: float
    fill: Colour | None
    stroke: Colour | None
    title: str

    def svg(self) -> str:
        shape = f'<rect x="{self.x:.6g}" y="{self.y:.6g}" width="{self.width:.6g}" height="{self.height:.6g}"'
        fill = "transparent" if self.fill is None else _hex(self.fill)
        stroke = f' stroke="{_hex(self.stroke)}"' if self.stroke else ""
        title = f"<title>{escape(self.title)}</title></rect>" if self.title else "</rect>"
        return f'{shape} fill="{fill}"{stroke}>{title}'

    def paint(self, image: Image.Image, scale: float) -> None:
        if self.fill is None and self.stroke is None:
            return
        left, top = self.x * scale, self.y * scale
        right, bottom = max(left, left + self.width * scale - 1), max(top, top + self.height * scale - 1)
        ImageDraw.Draw(image).rectangle((left, top, right, bottom), self.fill, self.stroke)


@dataclass(frozen=True)
class Line:
    points: list[tuple[float, float]]
    stroke: Colour
    width: float

    def svg(self) -> str:
        points = " ".join(f"{x:.6g},{y:.6g}" for x, y in self.points)
        return f'<polyline points="{points}" fill="none" stroke="{_hex(self.stroke)}" stroke-width="{self.width:g}"/>'

    def paint(self, image: Image.Image, scale: float) -> None:
        points = [(x * scale, y * scale) for x, y in self.points]
        ImageDraw.Draw(image).line(points, self.stroke, max(1, round(self.width * scale)), "curve")


@dataclass(frozen=True)
class Text:
    x: float
    y: float
    text: str
    size: float
    fill: Colour
    anchor: str
    upright: bool

    def svg(self) -> str:
        turn = f' transform="rotate(-90 {self.x:.6g} {self.y:.6g})"' if self.upright else ""
        anchor = f' text-anchor="{self.anchor}"' if self.anchor != "start" else ""
        place = (
            f'<text x="{self.x:.6g}" y="{self.y:.6g}" font-size="{self.size:g}"{anchor} fill="{_hex(self.fill)}"{turn}>'
        )
        return f"{place}{escape(self.text)}</text>"

    def paint(self, image: Image.Image, scale: float) -> None:
        font = _font(self.size * scale)
        width, above, below = font.getlength(self.text), *font.getmetrics()
        if not width:
            return
        ink = Image.new("L", (int(width) + 2, above + below))
        ImageDraw.Draw(ink).text((0, above), self.text, 255, font, anchor="ls")
        back = {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        x, y = self.x * scale, self.y * scale
        corner = (x - above, y + back - ink.width) if self.upright else (x - back, y - above)
        ink = ink.transpose(Image.Transpose.ROTATE_90) if self.upright else ink
        image.paste(Image.new("RGB", ink.size, self.fill), (round(corner[0]), round(corner[1])), ink)


@dataclass(frozen=True)
class PixelGrid:
    """An image of few pixels, each drawn as a large sharp rectangle, such as the cells of a heat map."""

    x: float
    y: float
    width: float
    height: float
    pixels: np.ndarray

    def svg(self) -> str:
        box = f'x="{self.x:.6g}" y="{self.y:.6g}" width="{self.width:.6g}" height="{self.height:.6g}"'
        return f'<image {box} preserveAspectRatio="none" class="cells" href="{data_uri(self.pixels)}"/>'

    def paint(self, image: Image.Image, scale: float) -> None:
        size = max(1, round(self.width * scale)), max(1, round(self.height * scale))
        cells = Image.fromarray(self.pixels).convert("RGB").resize(size, Image.Resampling.NEAREST)
        image.paste(cells, (round(self.x * scale), round(self.y * scale)))


class Drawing:
    """Shapes on a page of `width` x `height` px, each drawn over the earlier ones."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.shapes: list[Rect | Line | Text | PixelGrid] = []

    def rect(self, x, y, width, height, fill: Colour | None = None, stroke: Colour | None = None, title: str = ""):
        """title: the text under the pointer."""
        self.shapes.append(Rect(x, y, width, height, _int_colour(fill), stroke, one_line(title)))

    def line(self, points: list[tuple[float, float]], stroke: Colour = INK, width: float = 1):
        self.shapes.append(Line(points, stroke, width))

    def text(self, x, y, text: str, size: float = 12, fill: Colour = INK, anchor: str = "start", upright: bool = False):
        """(x, y): start, middle or end of the baseline. upright: rotated, to be read from the right."""
        self.shapes.append(Text(x, y, one_line(text), size, _int_colour(fill), anchor, upright))

    def cells(self, x, y, width, height, pixels: np.ndarray):
        self.shapes.append(PixelGrid(x, y, width, height, pixels))

    def svg(self, name: str) -> str:
        """name: description of the image, for screen readers."""
        head = f'<svg viewBox="0 0 {self.width:.6g} {self.height:.6g}" width="{self.width:.6g}" role="img" aria-label="{escape(name)}"'
        return f'{head} font-family="{FONT}">{"".join(s.svg() for s in self.shapes)}</svg>'

    def image(self, scale: float = PNG_SCALE) -> Image.Image:
        page = Image.new("RGB", (round(self.width * scale), round(self.height * scale)), PAPER)
        for shape in self.shapes:
            shape.paint(page, scale)
        return page

    def save(self, file: Path) -> Path:
        self.image().save(file)
        return file


def data_uri(image: np.ndarray | Image.Image) -> str:
    """The image as a data URI, so that nothing is fetched."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _int_colour(colour) -> Colour | None:
    return None if colour is None else tuple(int(c) for c in colour)


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
