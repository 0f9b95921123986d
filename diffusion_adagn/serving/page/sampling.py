"""What the tabs that sample share: controls of the sampler, and a request with its progress bar."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr
from gradio.components import Component

from ...diffusion.schedule import SAMPLERS
from ...errors import InputError
from ...sampling.settings import SamplerSettings
from .. import actions
from ..actions import Models
from ..images import Images
from ..models import ServedModel
from ..settings import ImagesQuery
from ..waiting import progress_of
from ..worker import Unavailable
from . import markup
from .tab import QUIET, Tab

STRIP = 8  # predicted images on the way from noise


def sampling_controls(model: ServedModel, most: int, count: str) -> dict[str, Component]:
    """Scale, count, steps, seed and sampler. most: highest count. count: its label."""
    limits = model.limits
    with gr.Row():
        scale = gr.Slider(1, 8, value=2, step=0.5, label="Guidance scale")
        number = gr.Slider(1, min(most, limits.max_images), value=1, step=1, label=count)
        steps = gr.Slider(1, limits.max_steps, value=min(20, limits.max_steps), step=1, label="Steps")
    with gr.Row():
        seed = gr.Number(0, precision=0, minimum=0, label="Seed")
        sampler = gr.Dropdown([("the model's", ""), *((name, name) for name in SAMPLERS)], value="", label="Sampler")
    return {"scale": scale, "count": number, "steps": steps, "seed": seed, "sampler": sampler}


def sampler_settings(steps: float, sampler: str | None) -> SamplerSettings:
    """The settings of a request."""
    return SamplerSettings(steps=int(steps), sampler=sampler or None)


def add_sampling(tab: Tab, models: Models, query: Callable[..., ImagesQuery], show: Callable[[Images], str]) -> None:
    """The buttons that start and stop a request, its result, and the command that does the same.

    Args:
        tab: with all its controls.
        models: of the server.
        query: (model, *settings) -> the request.
        show: the images -> HTML.
    """

    async def run(*values: Any) -> AsyncIterator[str]:
        async for html in sample(models, lambda: query(*values), show):
            yield html

    def command(*values: Any) -> str:
        request = query(*values)
        return actions.sample_command(actions.find(models, request.model), request.request())

    with gr.Row():
        start = gr.Button("Sample", variant="primary", elem_id=f"{tab.id}-start")
        stop = gr.Button("Stop", elem_id=f"{tab.id}-stop")
    result = gr.HTML(elem_id=f"{tab.id}-result")
    event = start.click(run, tab.inputs, result, concurrency_limit=None, **QUIET)
    stop.click(lambda: markup.note("Stopped."), None, result, cancels=event, **QUIET)
    tab.add_copy_buttons(command)


async def sample(models: Models, query: Callable[[], ImagesQuery], show: Callable[[Images], str]) -> AsyncIterator[str]:
    """HTML while a request is sampled: a progress bar, then what `show` makes of the images, or an error.

    Args:
        models: of the server.
        query: makes the request; may raise InputError.
        show: the images -> HTML.

    Yields:
        HTML, which replaces the earlier one. When nobody reads on, the request stops.
    """
    job = None
    try:
        job = await asyncio.to_thread(lambda: actions.images(models, query()))
        async for done in progress_of(job):
            yield markup.progress(done, job.steps)
        yield await asyncio.to_thread(lambda: show(job.wait()))
    except (InputError, Unavailable) as error:
        yield markup.alert(error)
    finally:
        if job is not None:
            job.stop()
