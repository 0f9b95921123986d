"""The classes of a model as choices in the page, and back to the text that requests have."""

from collections.abc import Sequence

from ...errors import InputError
from ...labels import LabelSpace
from ..models import ServedModel

NULL = "null"


def class_choices(model: ServedModel, null: bool = False) -> list[tuple[str, str]]:
    """(what is shown, the value) of each class: its name and its id. null: also the null label, if there is one."""
    labels = model.pipe.labels
    choices = [(labels.name(i), str(i)) for i in (*range(labels.K), *labels.learned_ids)]
    return [*choices, ("no class", NULL)] if null and labels.has_null else choices


def class_text(labels: LabelSpace, values: Sequence[str]) -> str:
    """What a request calls these classes: the names if they mean the same, else "id:3,id:8".

    Raises:
        InputError: no class was chosen.
    """
    if not values:
        raise InputError("no class is chosen: choose one or more.")
    ids = [labels.null_id if value == NULL else int(value) for value in values]
    names = ",".join(NULL if value == NULL else labels.name(i) for value, i in zip(values, ids))
    try:
        if "@" not in names and labels.parse(names) == ids:
            return names
    except InputError:
        pass  # a name that means two classes
    return ",".join(NULL if value == NULL else f"id:{value}" for value in values)
