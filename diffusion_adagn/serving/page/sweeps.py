"""Tab Sweeps: the table and curves of a saved sweep; selecting a row shows its images."""

from html import escape

import gradio as gr
from PIL import Image

from ...commands import command
from ..actions import Models, find
from . import markup
from .folders import Folders, read_sweep, shown_images
from .reports import address
from .tab import QUIET, Tab

SETTINGS = ("scale", "sampler", "steps")
FIGURES = {"curves.png": "Metrics over the guidance scale", "tradeoff.png": "One metric against another"}
MAX_SHOWN = 40  # images of a row


def build(models: Models, model: gr.Dropdown, folders: dict[str, Folders]) -> Tab:
    """The tab's controls and events."""
    tab = Tab("sweeps", model)
    names = list(folders[find(models, None).name].sweeps)
    sweep = gr.Dropdown(names, value=names[0] if names else None, label="Sweep", elem_id="sweeps-name")
    tab.controls["sweep"], tab.choices["sweep"] = sweep, lambda model: list(folders[model.name].sweeps)
    advice = gr.HTML(elem_id="sweeps-advice")
    table = gr.Dataframe(
        interactive=False, label="Points: select a row to see its images", buttons=[], elem_id="sweeps-table"
    )
    images = gr.HTML(elem_id="sweeps-images")
    curves = gr.HTML(elem_id="sweeps-curves")

    def show(model, name):
        folder = folders[model].sweeps.get(name)
        if folder is None:
            text = "There is no saved sweep. The command below makes one; open this tab again to see it."
            return markup.note(text), gr.update(value=None, visible=False), "", ""
        saved = read_sweep(folder)
        sentence = (saved.get("advice") or {}).get("sentence") or " ".join(saved["sentences"])
        headers, rows = table_of(saved)
        value = {"headers": headers, "data": rows}
        drawn = figures_of(folder) + link_to_report(model, name, folders[model])
        return markup.note(sentence), gr.update(value=value, visible=True), drawn, ""

    def select(model, name, event: gr.SelectData) -> str:
        return images_of(folders[model].sweeps[name], event.index[0])

    tab.refresh(show, tab.inputs, [advice, table, curves, images], [sweep])
    table.select(select, tab.inputs, images, **QUIET)

    tab.add_copy_buttons(
        lambda model, name: sweep_command(find(models, model).checkpoint, folders[model].sweeps.get(name))
    )
    return tab


def table_of(saved: dict) -> tuple[list[str], list[list]]:
    """Headers and rows: settings, then each metric that was measured."""
    metrics = list(dict.fromkeys(name for row in saved["rows"] for name in row["metrics"]))
    metrics = [m for m in metrics if any(_value(row, m) is not None for row in saved["rows"])]
    rows = [[*(row.get(s) for s in SETTINGS), *(_text(row, m) for m in metrics)] for row in saved["rows"]]
    return [*SETTINGS, *(m.replace("_", " ") for m in metrics)], rows


def _value(row: dict, metric: str) -> float | None:
    return (row["metrics"].get(metric) or {}).get("value")


def _text(row: dict, metric: str) -> str:
    value = _value(row, metric)
    return "" if value is None else f"{value:.4g}"


def images_of(folder, index: int) -> str:
    """The images of a row of the table."""
    saved = read_sweep(folder)
    row, names = saved["rows"][index], saved["sweep"]["class_names"]
    shown = shown_images(folder, row["id"])
    title = markup.heading(", ".join(f"{s} {row.get(s)}" for s in SETTINGS))
    if shown is None or not shown.size:
        return title + markup.note("This sweep saved no images.")
    each = [(names[c] if c < len(names) else f"class {c}", one) for c, group in enumerate(shown) for one in group]
    return title + markup.grid(
        [markup.figure(one, name, f"Image of class {name}, scale {row['scale']:g}") for name, one in each[:MAX_SHOWN]]
    )


def figures_of(folder) -> str:
    """The curves that the sweep drew."""
    html = ""
    for name, alt in FIGURES.items():
        if (folder / name).is_file():
            with Image.open(folder / name) as opened:
                drawn = markup.image(opened.convert("RGB"), alt, "adagn-figure")
                html += f'{markup.heading(alt)}<div class="adagn-scroll" tabindex="0" role="group">{drawn}</div>'
    return html or markup.note("This sweep has no curves.")


def link_to_report(model: str, name: str, folders: Folders) -> str:
    """A link to the report of a sweep; empty for one of an earlier version."""
    report = f"sweep {name}"
    if report not in folders.reports:
        return ""
    return (
        f'<p class="adagn-note"><a href="{escape(address(model, report))}" target="_blank">Open the full report</a></p>'
    )


def sweep_command(source: str, folder) -> str:
    """The command that made a sweep; without one, a command that makes one."""
    if folder is not None:
        return read_sweep(folder)["sweep"]["command"]
    return command("sweep", source, guidance="1,2,4")
