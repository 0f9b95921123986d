"""Tab Style: sums of class vectors, truncated, or along a principal direction of the classes."""

import gradio as gr
import numpy as np

from ...errors import InputError
from ...sampling.style import along, example, find_directions
from ..actions import Models, find
from ..images import Images
from ..models import ServedModel
from ..settings import StyleQuery
from . import markup
from .sampling import add_sampling, add_sampling_controls, sampler_settings
from .tab import Tab

STEPS = 5  # images along a direction
DIRECTIONS = 9  # that can be chosen


def build(models: Models, model: gr.Dropdown) -> Tab:
    """The tab's controls and events."""
    tab, first = Tab("style", model), find(models, None)
    tab.controls["style"] = gr.Textbox(
        "", label="Sum of class vectors", placeholder=f"such as {example(first.pipe.labels)}", max_lines=1
    )
    with gr.Row():
        tab.controls["psi"] = gr.Slider(0, 2, value=1, step=0.1, label="Truncation (psi): 0 is the mean class")
        tab.controls["direction"] = gr.Dropdown(directions(first), value="", label="Along a direction")
        tab.controls["reach"] = gr.Slider(0.5, 5, value=2, step=0.5, label="As far as ± standard deviations")
    tab.choices["direction"] = directions
    add_sampling_controls(tab, first, 8, "Images of each")

    def query(model, style, psi, direction, reach, scale, count, steps, seed, sampler) -> StyleQuery:
        return StyleQuery(
            model=model,
            styles=styles(style.strip() or example(find(models, model).pipe.labels), direction, reach),
            psi=None if psi == 1 else psi,
            scales=(scale,),
            count=count,
            seed=seed or 0,
            sampler=sampler_settings(steps, sampler),
        )

    add_sampling(tab, models, query, show)
    return tab


def show(images: Images) -> str:
    """The images of each noise in a row."""
    rows: dict[int, list[str]] = {}
    for pixels, record in zip(images.pixels, images.record["images"]):
        name = record["class_name"]
        rows.setdefault(record["seed"], []).append(markup.figure(pixels, name, f"Sampled image: {name}"))
    return "".join(
        markup.note(f"From the noise of seed {seed}") + markup.strip(row, f"images of seed {seed}")
        for seed, row in rows.items()
    )


def directions(model: ServedModel) -> list[tuple[str, str]]:
    """The first principal directions of a model's class vectors as choices."""
    try:
        found = find_directions(model.pipe.unet, model.pipe.process, count=DIRECTIONS)
    except InputError:  # a model without class vectors
        return [("none", "")]
    choices = [("none", "")]
    for i, share in enumerate(found.share.tolist()):
        low, high = found.ends(i, model.pipe.labels)
        choices.append((f"{i + 1}: from {', '.join(low)} to {', '.join(high)} ({share:.0%})", f"{i + 1}"))
    return choices


def styles(text: str, direction: str, reach: float) -> tuple[str, ...]:
    """The style, or some along a direction, the middle one as it is."""
    if not direction:
        return (text,)
    return tuple(along(text, int(direction), amount) for amount in np.linspace(-reach, reach, STEPS).tolist())
