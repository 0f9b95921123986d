"""The page: a model, seven tabs, and the address that holds their settings."""

from collections.abc import Callable
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from gradio.components import Component
from starlette.routing import Match, Mount
from starlette.types import Message, Receive, Scope, Send

from ..actions import Models, find
from ..errors import nothing_at
from ..models import ServedModel
from ..security import BEARER_ONLY, belongs_to
from . import inside, interpolate, markup, mix, runs, sample, style, sweeps
from .folders import Folders, find_folders
from .reports import add_reports
from .tab import QUIET, Tab

FILES = Path(__file__).parent
SECONDS = 5  # between two looks at a run
OTHERS = "Programs use the API at /v1, described in [/openapi.json](/openapi.json); agents use the tools at /mcp."
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

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See starlette's `Mount`. An unknown address is answered as the API answers it."""
        unknown = False

        async def watch(message: Message) -> None:
            nonlocal unknown
            unknown = unknown or message.get("status") == 404
            if not unknown:
                await send(message)

        path = scope["path"]
        await super().handle(scope, receive, watch)
        if unknown:
            await nothing_at(path)(scope, receive, send)


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
        "Style": lambda: style.build(models, model),
        "Inside": lambda: inside.build(models, model, folders),
        "Runs": lambda: runs.build(models, model, folders, timer),
        "Sweeps": lambda: sweeps.build(models, model, folders),
    }
    with gr.Blocks(title="diffusion_adagn", analytics_enabled=False) as page:
        gr.Markdown(f"# diffusion_adagn\n{OTHERS}")
        model = gr.Dropdown(list(models), value=first.name, label="Model", visible=len(models) > 1)
        served = gr.HTML(_served(first), elem_id="served")
        ignored = gr.HTML(elem_id="ignored")
        timer = gr.Timer(SECONDS, active=False)
        tabs: list[Tab] = []
        with gr.Tabs() as bar:
            for title, build in builders.items():
                with gr.Tab(title, id=title.lower()) as item:
                    tabs.append(build())
                tabs[-1].read_again(item, models)
        bar.select(_activate_on_runs, None, timer, **QUIET)
        _add_address(page, bar, [model, served, ignored, timer], tabs, models)
    return page


def _served(model: ServedModel) -> str:
    return markup.note(f"{model.name}: {model.kind}. The weights stay as they were when the server started.")


def _activate_on_runs(event: gr.SelectData) -> gr.Timer:
    return gr.Timer(active=event.value == "Runs")


def _add_address(page: gr.Blocks, bar: gr.Tabs, head: list[Component], tabs: list[Tab], models: Models) -> None:
    """Read the address when the page is opened; then fill what depends on the settings.

    Args:
        page: the page.
        bar: the bar of the tabs.
        head: the control of the model, the lines below it (what is served, what the address has wrong), and the timer.
        tabs: the tabs.
        models: by name.
    """
    model, served, _, _ = head
    tabs_by_id = {tab.id: tab for tab in tabs}
    controls = [control for tab in tabs for control in tab.controls.values()]

    def read(request: gr.Request):
        query = dict(request.query_params)
        chosen = models.get(query.get("model"), find(models, None))
        opened = tabs_by_id.get(query.get("tab"), tabs[0])
        updates = [u for tab in tabs for u in tab.read(query if tab is opened else {}, chosen)]
        wrong = [
            n for n, known in (("model", models), ("tab", tabs_by_id)) if query.get(n, next(iter(known))) not in known
        ]
        wrong = [f"{name} {query[name][:80]}" for name in wrong] + opened.wrong(query, chosen)
        note = markup.alert(f"Not used, since the address has wrong values: {', '.join(wrong)}.") if wrong else ""
        first = [gr.Tabs(selected=opened.id), chosen.name, _served(chosen), note, gr.Timer(active=opened.id == "runs")]
        return [*first, *updates]

    def change_model(name: str):
        return [_served(models[name]), *(update for tab in tabs for update in tab.read({}, models[name]))]

    opened = page.load(read, None, [bar, *head, *controls], **QUIET)
    for event in (event for tab in tabs for event in tab.loads):
        opened.then(**event)
    opened.then(None, js="() => adagn.opened()", **QUIET)
    model.input(change_model, model, [served, *controls], **QUIET)
