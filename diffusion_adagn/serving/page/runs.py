"""Tab Runs: how a run goes: loss, label gap and previews, refreshed while the tab is open."""

import gradio as gr
import pandas as pd
from PIL import Image

from ...commands import command, resume_command
from ...runs.shipped import shipped_folder
from ..actions import Models, find
from ..models import ServedModel
from . import markup
from .folders import Folders, Log, newest_previews
from .tab import QUIET, Tab

GAP = "label_gap_wrong"


def build(models: Models, model: gr.Dropdown, folders: dict[str, Folders], timer: gr.Timer) -> Tab:
    """The tab's controls and events. timer: active while the tab is open."""
    tab = Tab("runs", model)
    status = gr.HTML(elem_id="runs-status")
    with gr.Row():
        loss = gr.LinePlot(x="step", y="loss", title="Training loss", height=260, buttons=[], min_width=320)
        gap = gr.LinePlot(x="step", y=GAP, title="Label gap (wrong class)", height=260, buttons=[], min_width=320)
    previews = gr.HTML(elem_id="runs-previews")

    def refresh(model):
        found = folders[model]
        film = film_strip(found)
        return describe(found.log), frame_of(found.log, "loss"), frame_of(found.log, GAP), film

    outputs = [status, loss, gap, previews]
    tab.refresh(refresh, [model], outputs, [model])
    timer.tick(refresh, model, outputs, **QUIET)
    tab.add_copy_buttons(lambda model: run_command(find(models, model), folders[model]))
    return tab


def describe(log: Log) -> str:
    """The last numbers as a sentence."""
    rows = log.read()
    if not rows:
        return markup.note("This model has no metrics.jsonl: it was not trained here.")
    text = f"Step {rows[-1]['step']:,}"
    for name, words in (("loss", "loss"), (GAP, "label gap")):
        points = log.curve(name)
        text += f", {words} {points[-1][1]:.4g}" if points else ""
    return markup.note(f"{text}.")


def frame_of(log: Log, name: str) -> pd.DataFrame:
    """The curve as LinePlot takes it."""
    return pd.DataFrame(log.curve(name), columns=["step", name])


def film_strip(folders: Folders) -> str:
    """The newest previews in a row; files that disappear meanwhile are skipped."""
    figures = []
    for file in newest_previews(folders):
        try:
            with Image.open(file) as opened:
                pixels = opened.convert("RGB")
        except OSError:
            continue
        step = int(file.stem.removeprefix("step-"))
        shown = markup.image(pixels, f"Preview at step {step:,}: classes in rows", "adagn-preview")
        figures.append(f"<figure>{shown}<figcaption>step {step:,}</figcaption></figure>")
    return markup.heading("Previews") + markup.strip(figures, "previews, the newest last") if figures else ""


def run_command(model: ServedModel, folders: Folders) -> str:
    """The command that goes on with the run; for a shipped model, one that trains a new one."""
    if shipped_folder(model.source) or folders.run is None:
        return command("train", config="digits")
    return resume_command(folders.run.path)
