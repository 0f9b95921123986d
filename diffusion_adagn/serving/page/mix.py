"""Tab Mix: two classes in one image, by layer or noise level."""

import math
from itertools import groupby
from operator import itemgetter

import gradio as gr
import torch

from ...errors import InputError
from ...sampling.class_mix import ClassMix
from ...trace.plots import class_map
from ..actions import Models, find
from ..images import Images
from ..models import ServedModel
from ..settings import MixQuery
from . import markup
from .choices import class_text
from .sampling import add_sampling, add_sampling_controls, sampler_settings
from .tab import Tab, class_list

COARSE, FINE, RESOLUTION, LEVEL = "coarse", "fine", "resolution", "level"
PLACES = [("coarse layers", COARSE), ("fine layers", FINE), ("one resolution", RESOLUTION), ("noise levels", LEVEL)]
LEVELS = 50  # noise levels at which the map is computed


def build(models: Models, model: gr.Dropdown) -> Tab:
    """The tab's controls and events."""
    tab, first = Tab("mix", model, classes=("first", "second")), find(models, None)
    with gr.Row():
        tab.controls["first"] = class_list(first, 3, "Class")
        tab.controls["second"] = class_list(first, 8, "Second class")
    tab.controls["where"] = gr.Radio(PLACES, value=FINE, label="The second class enters at")
    sides = resolutions(first)
    with gr.Row():
        tab.controls["resolution"] = gr.Number(sides[0], precision=0, minimum=1, label="Resolution", visible=False)
        tab.controls["sigma"] = gr.Number(1, minimum=0, label="Noise levels (sigma) above", visible=False)
    where, side, sigma = (tab.controls[name] for name in ("where", "resolution", "sigma"))
    tab.refresh(
        lambda where: (gr.update(visible=where == RESOLUTION), gr.update(visible=where == LEVEL)),
        [where],
        [side, sigma],
        [where],
    )
    map_ = gr.HTML(elem_id="mix-map")
    add_sampling_controls(tab, first, 8, "Images")

    def text(model, first, second, where, resolution, sigma) -> str:
        return mix_text(find(models, model), first, second, where, resolution, sigma)

    def query(model, first, second, where, resolution, sigma, scale, count, steps, seed, sampler) -> MixQuery:
        mix = text(model, first, second, where, resolution, sigma)
        settings, scales = sampler_settings(steps, sampler), (scale,)
        return MixQuery(model=model, mixes=(mix,), scales=scales, count=count, seed=seed or 0, sampler=settings)

    def draw(model, *values) -> str:
        try:
            return draw_mix(find(models, model), text(model, *values))
        except InputError as error:
            return markup.alert(error)

    def show(images: Images) -> str:
        rules = [rule for mix in images.record.get("mixes", {}).values() for rule in mix.splitlines()]
        return "".join(map(markup.note, rules)) + markup.sampled(images)

    placing = tab.inputs[:6]
    tab.refresh(draw, placing, map_, placing)
    add_sampling(tab, models, query, show)
    return tab


def resolutions(model: ServedModel) -> list[int]:
    """The resolutions of a model's sites, the highest first."""
    return sorted({site.resolution for site in model.pipe.unet.sites()}, reverse=True)


def mix_text(model: ServedModel, first: str, second: str, where: str, resolution: float, sigma: float) -> str:
    """A mix such as "3,8@fine". Raises InputError if a class or a number is missing."""
    names = [class_text(model.pipe.labels, [value] if value else []) for value in (first, second)]
    sides = resolutions(model)
    if where == RESOLUTION and resolution not in sides:
        raise InputError(f"no site has resolution {resolution}: type one of {', '.join(map(str, sides))}.")
    if where == LEVEL and not (sigma is not None and math.isfinite(sigma)):
        raise InputError("no noise level is given: type a number such as 1.")
    place = {RESOLUTION: f"{resolution}", LEVEL: f"sigma>{sigma}"}.get(where, where)
    return f"{names[0]},{names[1]}@{place}"


def draw_mix(model: ServedModel, text: str) -> str:
    """The U-Net with each site in the colour of its class; one map for each range of noise levels."""
    pipe = model.pipe
    sites = pipe.unet.sites()
    mix = ClassMix.parse(text, pipe.labels, sites, pipe.process)
    names = [site.name for site in sites]
    low, high = pipe.process.times
    times = torch.linspace(high, low, LEVELS, dtype=torch.float64)
    levels = pipe.process.level(times)
    by_level = zip((levels.sigma / levels.alpha).tolist(), [mix.class_by_site(t, names) for t in times.tolist()])
    groups = [list(group) for _, group in groupby(by_level, key=itemgetter(1))]
    legend = [pipe.labels.name(part.class_id) for part in mix.parts]
    parts = []
    for i, group in enumerate(groups):
        classes = [pipe.labels.name(group[0][1][name]) for name in names]
        high, low = group[0][0], group[-1][0]
        span = f"down to about {low:.2g}" if i == 0 else f"below about {high:.2g}"
        title = "At all noise levels" if len(groups) == 1 else f"At noise levels (sigma) {span}"
        alt = f"{title}: sites of the U-Net in the colour of their class, {text}"
        parts.append(markup.note(title) + markup.chart(class_map(sites, classes, legend), alt))
    return "".join(parts)
