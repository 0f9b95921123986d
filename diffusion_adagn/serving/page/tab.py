"""What the tabs share: controls with a name in the address, and the buttons that copy the command and the address."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from gradio.components import Component

from ...errors import InputError
from ..actions import Models, find
from ..models import ServedModel
from .choices import NULL, class_choices

MAX_BOXES = 24
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass
class Tab:
    """A tab of the page.

    Args:
        id: its name in the address.
        model: the control that chooses the model.
        controls: its settings by their name in the address.
        classes: those of `controls` that choose classes.
        loads: the events that fill the tab when the page is opened, as arguments of gradio's `then`.
    """

    id: str
    model: gr.Dropdown
    controls: dict[str, Component] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    loads: list[dict[str, Any]] = field(default_factory=list)

    @property
    def inputs(self) -> list[Component]:
        """The model and all settings, in the order of the functions' arguments."""
        return [self.model, *self.controls.values()]

    def add_copy_buttons(self, make: Callable[..., str]) -> None:
        """Show the command that does the same, with buttons that copy it and the address.

        Args:
            make: (model, *settings) -> the command; the text of an InputError is shown instead.
        """

        def command(*values: Any) -> str:
            try:
                return make(*values)
            except InputError as error:
                return f"# {error}"

        box = gr.Textbox(label="On the command line", interactive=False, lines=2, elem_id=f"{self.id}-command")
        with gr.Row():
            copy = gr.Button("Copy command", size="sm", elem_id=f"{self.id}-copy")
            link = gr.Button("Copy link", size="sm", elem_id=f"{self.id}-link")
        names = json.dumps(["model", *self.controls])
        copy.click(None, box, js="(text) => adagn.copy(text)", **QUIET)
        link.click(None, self.inputs, js=f"(...v) => adagn.copyLink('{self.id}', {names}, v)", **QUIET)
        self.refresh(command, self.inputs, box, self.inputs)

    def refresh(self, fn: Callable, inputs: Sequence[Component], outputs: Any, after: Sequence[Component]) -> None:
        """Call fn(*inputs) -> outputs when the page is opened, and when one of `after` changes."""
        event = {"fn": fn, "inputs": list(inputs), "outputs": outputs, **QUIET}
        self.loads.append(event)
        gr.on([one.change for one in after], trigger_mode="always_last", **event)

    def read(self, query: Mapping[str, str], model: ServedModel) -> list[Any]:
        """The updates of all controls for a model and an address; what the address has wrong is ignored."""
        return [
            class_update(control, query.get(name, "").split(","), model)
            if name in self.classes
            else _update(control, query.get(name))
            for name, control in self.controls.items()
        ]


def classes_control(models: Models) -> gr.CheckboxGroup | gr.Dropdown:
    """Several classes of the first model; its first two are chosen.

    Check boxes, or a list with a search field if a model has more than `MAX_BOXES` classes.
    """
    choices = class_choices(find(models, None), null=True)
    settings = {"choices": choices, "value": [value for _, value in choices[:2]], "label": "Classes"}
    if max(model.pipe.labels.K for model in models.values()) <= MAX_BOXES:
        return gr.CheckboxGroup(**settings)
    return gr.Dropdown(**settings, multiselect=True, info="Type a part of a name to find a class.")


def class_list(model: ServedModel, index: int, label: str) -> gr.Dropdown:
    """One class. index: of the one that is chosen at first."""
    choices = class_choices(model)
    return gr.Dropdown(choices, value=choices[min(index, len(choices) - 1)][1] if choices else None, label=label)


def class_update(control: Component, values: list[str], model: ServedModel) -> Any:
    """A class control for a model. values: what is chosen; unknown ones are ignored."""
    several = isinstance(control.value, list)
    choices = class_choices(model, null=several)
    known = [value for _, value in choices]
    chosen = [value for value in values if value in known]
    if several:
        return gr.update(choices=choices, value=chosen or [value for value in known if value != NULL][:2])
    usual = control.value if control.value in known else next(iter(known), None)
    return gr.update(choices=choices, value=chosen[0] if chosen else usual)


def _update(control: Component, text: str | None) -> Any:
    """A control for the text that an address gives, if that is a possible value."""
    if text is None:
        return gr.skip()
    if isinstance(control, gr.Slider | gr.Number):
        try:
            value = float(text)
        except ValueError:
            return gr.skip()
        fits = value >= (control.minimum or 0) and (control.maximum is None or value <= control.maximum)
        return gr.update(value=value) if fits else gr.skip()
    choices = getattr(control, "choices", None)
    fits = choices is None or text in [value for _, value in choices]
    return gr.update(value=text) if fits else gr.skip()
