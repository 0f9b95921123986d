"""Tab Interpolate: from one class to another, from the same noise; a slider goes through the images."""

import gradio as gr

from ..actions import Models, find
from ..images import Images
from ..settings import InterpolateQuery
from . import markup
from .choices import class_text
from .sampling import add_sampling, sampler_settings, sampling_controls
from .tab import QUIET, Tab, class_list


def build(models: Models, model: gr.Dropdown) -> Tab:
    """The tab's controls and events."""
    tab, first = Tab("interpolate", model, classes=("first", "second")), find(models, None)
    with gr.Row():
        tab.controls["first"] = class_list(first, 3, "From class")
        tab.controls["second"] = class_list(first, 8, "To class")
    tab.controls |= sampling_controls(first, 30, "Images between")
    tab.controls["count"].value = 7

    def query(model, first, second, scale, between, steps, seed, sampler) -> InterpolateQuery:
        labels = find(models, model).pipe.labels
        classes = ",".join(class_text(labels, [value] if value else []) for value in (first, second))
        return InterpolateQuery(
            model=model,
            between=classes,
            steps_between=int(between),
            scales=(scale,),
            seed=int(seed or 0),
            sampler=sampler_settings(steps, sampler),
        )

    share = gr.Slider(
        0, 1, value=0, step=0.01, label="Share of the second class in the large image", elem_id="interpolate-share"
    )
    share.change(None, share, js="(share) => adagn.show('interpolate-result', share)", **QUIET)
    add_sampling(tab, models, query, show)
    return tab


def show(images: Images) -> str:
    """One large image, which the slider chooses, and all of them in a row."""
    names = [record["class_name"] for record in images.record["images"]]
    figures = [markup.figure(p, name, f"Sampled image: {name}") for p, name in zip(images.pixels, names)]
    large = f'<div class="adagn-large">{figures[0]}</div>'
    return large + markup.strip(figures, "all images, from the first class to the second")
