"""What the tabs that sample share: controls of the sampler, and a request with its progress bar."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import gradio as gr

from ...diffusion.schedule import SAMPLERS, with_sampler
from ...errors import InputError
from ...sampling.settings import SamplerSettings
from .. import actions
from ..actions import Models
from ..images import Images
from ..models import ServedModel
from ..settings import ImagesQuery
from ..waiting import progress_of
from ..worker import Dropped, Job, Unavailable
from . import markup
from .tab import QUIET, Tab

STRIP = 8  # predicted images on the way from noise


def add_sampling_controls(tab: Tab, model: ServedModel, most: int, count: str) -> None:
    """Add scale, count, steps, seed and sampler to a tab. most: highest count. count: its label."""
    limits = model.limits
    with gr.Row():
        scale = gr.Slider(1, 8, value=2, step=0.5, label="Guidance scale")
        number = gr.Slider(1, min(most, limits.max_images), value=1, step=1, label=count)
        steps = gr.Slider(1, limits.max_steps, value=min(20, limits.max_steps), step=1, label="Steps")
    with gr.Row():
        seed = gr.Number(0, precision=0, minimum=0, label="Seed")
        sampler = gr.Dropdown(sampler_choices(model), value="", label="Sampler")
    tab.choices["sampler"] = sampler_choices
    tab.controls |= {"scale": scale, "count": number, "steps": steps, "seed": seed, "sampler": sampler}


def sampler_choices(model: ServedModel) -> list[tuple[str, str]]:
    """The samplers of a model's process as choices."""
    fitting = [name for name in SAMPLERS if _samples(model, name)]
    return [("the model's", ""), *((name, name) for name in fitting)]


def _samples(model: ServedModel, sampler: str) -> bool:
    try:
        with_sampler(model.pipe.scheduler, sampler)
    except InputError:
        return False
    return True


def sampler_settings(steps: float, sampler: str | None) -> SamplerSettings:
    """The settings of a request."""
    return SamplerSettings(steps=steps, sampler=sampler or None)


def add_sampling(tab: Tab, models: Models, query: Callable[..., ImagesQuery], show: Callable[[Images], str]) -> gr.HTML:
    """The buttons that start and stop a request, its result, and the command that does the same.

    Args:
        tab: with all its controls.
        models: of the server.
        query: (model, *settings) -> the request.
        show: the images -> HTML.

    Returns:
        The result.
    """

    jobs: dict[str, Job] = {}  # of each browser window

    async def run(request: gr.Request, *values: Any) -> AsyncIterator[str]:
        window = request.session_hash
        try:
            async for html in sample(models, lambda: query(*values), show, partial(jobs.__setitem__, window)):
                yield html
        finally:
            jobs.pop(window, None)

    def end(request: gr.Request) -> None:
        if job := jobs.get(request.session_hash):
            job.stop()

    def command(*values: Any) -> str:
        return actions.images_command(models, query(*values))

    with gr.Row():
        start = gr.Button("Sample", variant="primary", elem_id=f"{tab.id}-start")
        stop = gr.Button("Stop", elem_id=f"{tab.id}-stop")
    result = gr.HTML(elem_id=f"{tab.id}-result")
    start.click(run, tab.inputs, result, concurrency_limit=None, **QUIET)
    stop.click(end, **QUIET)  # gradio's own `cancels` writes an error to the console
    tab.add_copy_buttons(command)
    return result


async def sample(
    models: Models,
    query: Callable[[], ImagesQuery],
    show: Callable[[Images], str],
    started: Callable[[Job], None] = lambda job: None,
) -> AsyncIterator[str]:
    """HTML while a request is sampled: a progress bar, then what `show` makes of the images, or an error.

    Args:
        models: of the server.
        query: makes the request; may raise InputError.
        show: the images -> HTML.
        started: receives the job.

    Yields:
        HTML, which replaces the earlier one. When nobody reads on, the request stops.
    """
    job = None
    try:
        job = await asyncio.to_thread(lambda: actions.images(models, query()))
        started(job)
        async for done in progress_of(job):
            yield markup.progress(done, job.steps)
        yield await asyncio.to_thread(lambda: show(job.wait()))
    except (InputError, Unavailable) as error:
        yield markup.alert(error)
    except Dropped:
        yield markup.note("Stopped.")
    finally:
        if job is not None:
            job.stop()
