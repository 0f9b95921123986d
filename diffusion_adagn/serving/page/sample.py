"""Tab Sample: images of classes, at one or several guidance scales."""

import gradio as gr

from ..actions import Models, find
from ..settings import SampleQuery
from .choices import class_text
from .markup import sampled
from .sampling import STRIP, add_sampling, add_sampling_controls, sampler_settings
from .tab import Tab, classes_control


def build(models: Models, model: gr.Dropdown) -> Tab:
    """The tab's controls and events."""
    tab, first = Tab("sample", model, classes=("classes",)), find(models, None)
    tab.controls["classes"] = classes_control(models)
    add_sampling_controls(tab, first, 8, "Images per class")
    tab.controls["more"] = gr.Textbox(
        "", label="More scales, from the same noise", placeholder="such as 1,4", max_lines=1
    )

    def query(model, classes, scale, count, steps, seed, sampler, more) -> SampleQuery:
        text = class_text(find(models, model).pipe.labels, classes)
        scales = ",".join(filter(None, (str(scale), more.strip())))
        settings = sampler_settings(steps, sampler)
        return SampleQuery(
            model=model,
            classes=text,
            scales=scales,
            count=count,
            seed=seed or 0,
            sampler=settings,
            strip=STRIP,
        )

    add_sampling(tab, models, query, sampled)
    return tab
