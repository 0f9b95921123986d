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
MAX_NUMBER = 2**53 - 1  # JavaScript has no larger whole numbers
# Functions receive what the controls hold: gradio would answer a number out of its range by an error of its own.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "preprocess": False}


@dataclass
class Tab:
    """A tab of the page.

    Args:
        id: its name in the address.
        model: the control that chooses the model.
        controls: its settings by their name in the address.
        classes: those of `controls` that choose classes.
        loads: the events that fill the tab when the page is opened, as arguments of gradio's `then`.
        choices: (model) -> the choices of those of `controls` whose choices depend on the model or on files.
    """

    id: str
    model: gr.Dropdown
    controls: dict[str, Component] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    loads: list[dict[str, Any]] = field(default_factory=list)
    choices: dict[str, Callable[[ServedModel], list[Any]]] = field(default_factory=dict)

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
        copied = copy.click(command, self.inputs, box, **QUIET)  # it may be older than the settings
        copied.then(None, box, js="(text) => adagn.copy(text)", **QUIET)
        link.click(None, self.inputs, js=f"(...v) => adagn.copyLink('{self.id}', {names}, v)", **QUIET)
        self.refresh(command, self.inputs, box, self.inputs)

    def refresh(self, fn: Callable, inputs: Sequence[Component], outputs: Any, after: Sequence[Component]) -> None:
        """Call fn(*inputs) -> outputs when the page is opened, and when one of `after` changes."""
        event = {"fn": fn, "inputs": list(inputs), "outputs": outputs, **QUIET}
        self.loads.append(event)
        gr.on([one.change for one in after], trigger_mode="always_last", **event)

    def read_again(self, item: gr.Tab, models: Models) -> None:
        """Read the choices that depend on files again whenever the tab is opened.

        Args:
            item: the tab in the bar.
            models: by name.
        """
        for name, choices in self.choices.items():
            item.select(
                lambda model, value, choices=choices: choice_update(choices(models[model]), value),
                [self.model, self.controls[name]],
                self.controls[name],
                **QUIET,
            )

    def read(self, query: Mapping[str, str], model: ServedModel) -> list[Any]:
        """The updates of all controls for a model and an address; see `wrong` for what the address has wrong."""
        return [self._read(name, query.get(name), model) for name in self.controls]

    def wrong(self, query: Mapping[str, str], model: ServedModel) -> list[str]:
        """The settings of an address that are not possible, each with its value."""
        given = {name: query[name] for name in self.controls if name in query}
        return [f"{name} {text[:80]}" for name, text in given.items() if not self._possible(name, text, model)]

    def _read(self, name: str, text: str | None, model: ServedModel) -> Any:
        control = self.controls[name]
        if name in self.classes:
            return class_update(control, (text or "").split(","), model)
        if name in self.choices:
            return choice_update(self.choices[name](model), text)
        if text is None or not self._possible(name, text, model):
            return gr.skip()
        return gr.update(value=float(text) if isinstance(control, gr.Slider | gr.Number) else text)

    def _possible(self, name: str, text: str, model: ServedModel) -> bool:
        control = self.controls[name]
        if isinstance(control, gr.Slider | gr.Number):
            return _fits(control, text)
        if name in self.classes:
            several = isinstance(control.value, list)
            return not set(text.split(",")) - {value for _, value in class_choices(model, null=several)}
        choices = self.choices[name](model) if name in self.choices else getattr(control, "choices", None)
        return choices is None or text in [one[1] if isinstance(one, tuple) else one for one in choices]


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


def choice_update(choices: Sequence[Any], value: str | None) -> Any:
    """A list for other choices, texts or (what is shown, value). value: what is chosen, if it is still possible."""
    values = [one[1] if isinstance(one, tuple) else one for one in choices]
    return gr.update(choices=list(choices), value=value if value in values else next(iter(values), None))


def _fits(control: gr.Slider | gr.Number, text: str) -> bool:
    """Whether a text is a number that the control can have."""
    try:
        value = float(text)
    except ValueError:
        return False
    most = MAX_NUMBER if control.maximum is None else control.maximum
    whole = control.precision == 0 or (isinstance(control, gr.Slider) and control.step == 1)
    return (control.minimum or 0) <= value <= most and (not whole or value.is_integer())
