"""The page: a model, six tabs, and the address that holds their settings."""

from collections.abc import Callable
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Match, Mount
from starlette.types import Scope

from ..actions import Models, find
from ..security import BEARER_ONLY, belongs_to
from . import inside, interpolate, mix, runs, sample, sweeps
from .folders import Folders, find_folders
from .reports import add_reports
from .tab import QUIET, Tab

FILES = Path(__file__).parent
SECONDS = 5  # between two looks at a run
FONT = ["system-ui", "sans-serif"]


def mount(app: FastAPI, models: Models) -> None:
    """Put the page at /.

    Args:
        app: the application, with all other routes.
        models: by name.
    """
    folders = {name: find_folders(model) for name, model in models.items()}
    add_reports(app, folders)
    script = (FILES / "page.js").read_text(encoding="utf-8")
    gr.mount_gradio_app(
        app,
        make_page(models, folders),
        path="/",
        theme=gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"]),
        css_paths=FILES / "page.css",
        head=f"<script>{script}</script>",
        footer_links=[],
        show_error=False,
        max_file_size=1,  # nothing is uploaded
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
    )
    app.router.routes.append(Rest("", app.router.routes.pop().app))


class Rest(Mount):
    """All addresses but those of the API and the tools, which answer unknown addresses and methods themselves."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """See starlette's `Mount`."""
        return (Match.NONE, {}) if belongs_to(scope["path"], BEARER_ONLY) else super().matches(scope)


def make_page(models: Models, folders: dict[str, Folders]) -> gr.Blocks:
    """The tabs.

    Args:
        models: by name.
        folders: of each model.
    """
    first = find(models, None)
    builders: dict[str, Callable[[], Tab]] = {
        "Sample": lambda: sample.build(models, model),
        "Mix": lambda: mix.build(models, model),
        "Interpolate": lambda: interpolate.build(models, model),
        "Inside": lambda: inside.build(models, model, folders),
        "Runs": lambda: runs.build(models, model, folders, timer),
        "Sweeps": lambda: sweeps.build(models, model, folders),
    }
    with gr.Blocks(title="diffusion_adagn", analytics_enabled=False) as page:
        gr.Markdown("# diffusion_adagn")
        model = gr.Dropdown(list(models), value=first.name, label="Model", visible=len(models) > 1)
        timer = gr.Timer(SECONDS, active=False)
        tabs: list[Tab] = []
        with gr.Tabs() as bar:
            for title, build in builders.items():
                with gr.Tab(title, id=title.lower()):
                    tabs.append(build())
        bar.select(_activate_on_runs, None, timer, **QUIET)
        _add_address(page, bar, model, timer, tabs, models)
    return page


def _activate_on_runs(event: gr.SelectData) -> gr.Timer:
    return gr.Timer(active=event.value == "Runs")


def _add_address(
    page: gr.Blocks, bar: gr.Tabs, model: gr.Dropdown, timer: gr.Timer, tabs: list[Tab], models: Models
) -> None:
    """Read the address when the page is opened; then fill what depends on the settings."""
    ids = [tab.id for tab in tabs]
    controls = [control for tab in tabs for control in tab.controls.values()]

    def read(request: gr.Request):
        query = dict(request.query_params)
        chosen = models.get(query.get("model"), find(models, None))
        opened = query["tab"] if query.get("tab") in ids else ids[0]
        updates = [u for tab in tabs for u in tab.read(query if tab.id == opened else {}, chosen)]
        return [gr.Tabs(selected=opened), chosen.name, gr.Timer(active=opened == "runs"), *updates]

    def change_model(name: str):
        return [update for tab in tabs for update in tab.read({}, models[name])]

    opened = page.load(read, None, [bar, model, timer, *controls], **QUIET)
    for event in (event for tab in tabs for event in tab.loads):
        opened.then(**event)
    model.input(change_model, model, controls, **QUIET)
