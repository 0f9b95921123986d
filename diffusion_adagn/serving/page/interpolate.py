"""Tab Interpolate: from one class to another, from the same noise; a slider goes through the images."""

import gradio as gr

from ..actions import Models, find
from ..images import Images
from ..settings import InterpolateQuery
from . import markup
from .choices import class_text
from .sampling import add_sampling, add_sampling_controls, sampler_settings
from .tab import QUIET, Tab, class_list


def build(models: Models, model: gr.Dropdown) -> Tab:
    """The tab's controls and events."""
    tab, first = Tab("interpolate", model, classes=("first", "second")), find(models, None)
    with gr.Row():
        tab.controls["first"] = class_list(first, 3, "From class")
        tab.controls["second"] = class_list(first, 8, "To class")
    add_sampling_controls(tab, first, 30, "Images between")
    tab.controls["count"].value = 7

    def query(model, first, second, scale, between, steps, seed, sampler, share) -> InterpolateQuery:
        labels = find(models, model).pipe.labels
        classes = ",".join(class_text(labels, [value] if value else []) for value in (first, second))
        return InterpolateQuery(
            model=model,
            between=classes,
            steps_between=between,
            scales=(scale,),
            seed=seed or 0,
            sampler=sampler_settings(steps, sampler),
        )

    share = gr.Slider(
        0, 1, value=0, step=0.01, label="Share of the second class in the large image", elem_id="interpolate-share"
    )
    tab.controls["share"] = share
    result = add_sampling(tab, models, query, show)
    for changed in (share, result):
        changed.change(None, share, js="(share) => adagn.show('interpolate-result', share)", **QUIET)
    return tab


def show(images: Images) -> str:
    """One large image, which the slider chooses, and all of them in a row."""
    names = captions([record["class_name"] for record in images.record["images"]])
    figures = [markup.figure(p, name, f"Sampled image: {name}") for p, name in zip(images.pixels, names)]
    large = f'<div class="adagn-large">{figures[0]}</div>'
    return large + markup.strip(figures, "all images, from the first class to the second")


def captions(names: list[str]) -> list[str]:
    """The captions of images from the first to the last of these classes, such as "63 % 3, 37 % 8" between them."""
    shares = [100 * i / (len(names) - 1) for i in range(len(names))]
    between = [f"{100 - share:.3g} % {names[0]}, {share:.3g} % {names[-1]}" for share in shares[1:-1]]
    return [names[0], *between, names[-1]]
