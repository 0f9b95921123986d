"""Tab Inside: what the modulation says about a model, the influence of each site, and saved reports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from html import escape

import gradio as gr

from ...commands import command
from ...errors import InputError
from ...render.report import section_html
from .. import actions
from ..actions import Models, find
from ..settings import ModelQuery
from ..worker import Job, Unavailable
from . import markup
from .folders import Folders
from .reports import address
from .tab import QUIET, Tab


def build(models: Models, model: gr.Dropdown, folders: dict[str, Folders]) -> Tab:
    """The tab's controls and events."""
    tab, first = Tab("inside", model), find(models, None)

    async def atlas(model) -> str:
        return await _shown(lambda: actions.sections(models, ModelQuery(model=model)))

    async def influence(model) -> str:
        return await _shown(lambda: actions.sections(models, ModelQuery(model=model), influence=True))

    def report(model, name) -> str:
        return frame(model, folders[model], name)

    with gr.Row():
        show = gr.Button("Show the modulation", variant="primary", elem_id="inside-start")
        measure = gr.Button("Measure the influence of each site", elem_id="inside-influence")
    result = gr.HTML(elem_id="inside-result", elem_classes="adagn-sections")
    changed = gr.HTML(elem_id="inside-influence-result", elem_classes="adagn-sections")
    names = list(folders[first.name].reports)
    saved = gr.Dropdown(names, value=names[0] if names else None, label="Saved report", elem_id="inside-report")
    tab.controls["report"], tab.choices["report"] = saved, lambda model: list(folders[model.name].reports)
    framed = gr.HTML(elem_id="inside-frame")
    for button, run, output in ((show, atlas, result), (measure, influence, changed)):
        button.click(lambda: markup.note("This takes some seconds."), None, output, **QUIET).then(
            run, model, output, concurrency_limit=None, **QUIET
        )
    tab.refresh(report, [model, saved], framed, [saved])
    tab.add_copy_buttons(lambda model, report: command("trace", find(models, model).checkpoint))
    return tab


def frame(model: str, folders: Folders, name: str | None) -> str:
    """A saved report in a frame without scripts, or what to type if there is none."""
    if name not in folders.reports:
        return markup.note("There is no saved report. The command below makes one; open this tab again to see it.")
    title = f"Report of {model}, {name}"
    return f'<iframe sandbox="" class="adagn-report" title="{escape(title)}" src="{escape(address(model, name))}"></iframe>'


async def _shown(start: Callable[[], Job]) -> str:
    """The sections of a job as HTML, or its error."""
    try:
        job = await asyncio.to_thread(start)
        return "".join(await asyncio.to_thread(lambda: [*map(section_html, job.wait())]))
    except (InputError, Unavailable) as error:
        return markup.alert(error)
