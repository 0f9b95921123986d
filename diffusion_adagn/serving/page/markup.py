"""The HTML of results. All text is escaped here; images are data in the page, so that no file is written for them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ...render.figures import data_uri, svg
from ...render.text import one_line
from ..images import Images, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRIPS = 4  # images whose way from noise is shown


def alert(text: object) -> str:
    """An error, as a sentence."""
    return f'<p class="adagn-alert" role="alert">{escape(one_line(text))}</p>'


def note(text: object) -> str:
    """A sentence."""
    return f'<p class="adagn-note">{escape(one_line(text))}</p>'


def progress(done: int, steps: int) -> str:
    """A progress bar."""
    text = f"step {done} of {steps}"
    return f'<p class="adagn-note"><progress max="{steps}" value="{done}" aria-label="{text}"></progress> {text}</p>'


def image(pixels: np.ndarray | Image.Image, alt: str, css: str = "adagn-pixels") -> str:
    """An image. css: its class; adagn-pixels is shown without smoothing."""
    data = base64.b64encode(png(pixels)).decode()
    return f'<img class="{css}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def figure(pixels: np.ndarray, caption: str, alt: str) -> str:
    """An image with its caption."""
    return f"<figure>{image(pixels, alt)}<figcaption>{escape(caption)}</figcaption></figure>"


def strip(figures: Sequence[str], label: str) -> str:
    """Figures in a row that scrolls. label: for screen readers."""
    return f'<div class="adagn-strip" role="group" tabindex="0" aria-label="{escape(label)}">{"".join(figures)}</div>'


def grid(figures: Sequence[str]) -> str:
    """Figures in rows that fit the width."""
    return f'<div class="adagn-grid">{"".join(figures)}</div>'


def chart(figure: Figure, name: str) -> str:
    """A chart, in a box that scrolls where it is wider than the page. name: for screen readers."""
    label = escape(name)
    uri = data_uri(svg(figure), "svg+xml")
    drawn = f'<img class="adagn-figure" alt="{label}" src="{uri}">'
    return f'<div class="adagn-scroll" role="group" tabindex="0" aria-label="{label}">{drawn}</div>'


def heading(text: str) -> str:
    """The heading of a part of a tab."""
    return f"<h3>{escape(text)}</h3>"


def sampled(images: Images) -> str:
    """The images of a request: those of one noise in a row if there are several scales; then the ways from noise."""
    records = images.record["images"]
    figures = [figure(p, _caption(r), f"Sampled image: {_caption(r)}") for p, r in zip(images.pixels, records)]
    noises = len(figures) // len({record["guidance"] for record in records})
    if noises == len(figures):
        body = grid(figures)
    else:
        rows = (figures[i::noises] for i in range(noises))
        body = "".join(strip(row, f"one noise, scales of row {i}") for i, row in enumerate(rows, 1))
    ways = [_way(steps, r) for steps, r in zip(images.strips, records) if steps][:STRIPS]
    title = heading("From noise to image") + note("The predicted image (x0), noisiest first.") if ways else ""
    return body + title + "".join(ways)


def _caption(record: dict) -> str:
    return f"{record['class_name']}, seed {record['seed']}, scale {record['guidance']:g}"


def _way(steps: Sequence[np.ndarray], record: dict) -> str:
    name = _caption(record)
    figures = [
        figure(one, f"{i} of {len(steps)}", f"Predicted image {i} of {len(steps)}: {name}")
        for i, one in enumerate(steps, 1)
    ]
    return note(name) + strip(figures, f"from noise to image: {name}")
