"""Settings as typed, documented fields of dataclasses: read from YAML and JSON files and dotted overrides, checked, compared.

Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import InputError
from .renamed import CONFIG_KEYS

MAX_YAML = 4 * 2**20  # bytes; the labels of 20,000 classes are 1 MB, and 60,000 values
MAX_VALUES = 250_000  # of a YAML file; PyYAML takes 30 us for each
MAX_JSON = 16 * 2**20
MAX_DEEP = 40  # nested lists and sections
MAX_WHOLE = 2**63 - 1


def setting(
    default: Any, help: str, *, minimum: float | None = None, maximum: float | None = None, resumable: bool = False
):
    """A documented setting.

    Args:
        default: its value if it is not given.
        help: the text of --help.
        minimum: smallest value allowed.
        maximum: largest value allowed.
        resumable: a resumed run may change it, since it does not change the results (training.lr is the one other exception).
    """
    return field(
        default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum, "resumable": resumable}
    )


def fields_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted key, type, field) of every field, including those of sections."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from fields_of(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", hints[f.name], f


def flatten(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted keys; `labels` stays whole."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" != "labels":
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is None and not prefix and key in {"data", "model", "diffusion", "training"}:
            continue  # a section with nothing in it
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def apply(
    config: Any,
    flat: Mapping[str, Any],
    where: str,
    error: type[InputError] = InputError,
) -> None:
    """Write dotted keys into a dataclass of settings, each turned into its field's type."""
    known = {key: (hint, f) for key, hint, f in fields_of(type(config))}
    for key, value in flat.items():
        key = CONFIG_KEYS.get(key, key)
        if key == "speed" and value == "auto" and "speed.memory_format" in known:
            config.speed = type(config.speed)()
            continue
        if key in {k.partition(".")[0] for k in known if "." in k}:
            auto = ", or auto" if key == "speed" else ""
            raise error(
                f"'{key}' is a section, such as '{key}:' with its settings below{auto}, not {short_repr(value)} ({where})."
            )
        if key not in known:
            raise error(f"there is no setting {short_repr(key)} ({where}).{did_you_mean(key[:80], known)}")
        hint, f = known[key]
        try:
            value = _convert(value, hint)
            _check_range(value, f)
        except ValueError as wrong:
            raise error(f"{key}: {wrong} ({where}).") from None
        section, _, name = key.rpartition(".")
        setattr(getattr(config, section) if section else config, name, value)


def did_you_mean(key: str, known: Mapping[str, Any]) -> str:
    """ " Did you mean ...?" with the keys of that name in other sections, then the most similar ones."""
    near = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near += [k for k in difflib.get_close_matches(key, known, n=3, cutoff=0.6) if k not in near]
    return f" Did you mean {' or '.join(near[:3])}?" if near else " `adagn train --help` lists them all."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def short_repr(value: Any) -> str:
    """A value for an error message: shortened, since it may be of any size."""
    return _REPR.repr(value)


def _convert(value: Any, hint: Any) -> Any:
    """A value from YAML, or a word of the command line, converted to the field's type. Raises ValueError with what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint == int | float:
        number = _convert(value, float)
        return int(number) if number == int(number) else number
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return _convert(value, next(a for a in args if a is not type(None)))
    if hint is dict:
        if not isinstance(value, dict):
            raise ValueError("written by the run itself, not by hand")
        return value
    if origin is Literal:
        for choice in args:
            if str(value) == str(choice):
                return choice
        raise ValueError(f"expected {', '.join(map(str, args))}, got {short_repr(value)}")
    if origin is tuple:
        if isinstance(value, str):
            value = [v for v in value.strip("[]() ").replace(" ", ",").split(",") if v]
        return tuple(_convert(v, args[0]) for v in (value if isinstance(value, list | tuple) else [value]))
    if hint is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise ValueError(f"expected true or false, got {short_repr(value)}")
    if hint is str:
        if isinstance(value, bool):
            raise ValueError(
                f"expected a word, got {value!r}: YAML reads a bare yes/no/on/off as true/false, so quote it"
            )
        if isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str | int | float):
            raise ValueError(f"expected a word, got {short_repr(value)}")
        if b"\0" in os.fsencode(str(value)):
            raise ValueError(f"expected a word, got {short_repr(value)}")
        return str(value)
    # numbers: PyYAML reads 1e-4 as a string, so strings are converted too
    expected = "a whole number" if hint is int else "a number"
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        number = int(value) if hint is int and isinstance(value, int | str) and _is_int(value) else float(value)
        fits = math.isfinite(number) and (hint is float or (number == int(number) and abs(number) <= MAX_WHOLE))
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(f"expected {expected}, got {short_repr(value)}")
    return hint(number)


def _is_int(value: int | str) -> bool:
    try:
        int(value)
    except ValueError:
        return False
    return True


def _check_range(value: Any, f: dataclasses.Field) -> None:
    low, high = f.metadata.get("minimum"), f.metadata.get("maximum")
    for v in value if isinstance(value, tuple) else (value,):
        if isinstance(v, int | float) and not isinstance(v, bool):
            if low is not None and v < low:
                raise ValueError(f"must be at least {low:g}, got {v:g}")
            if high is not None and v > high:
                raise ValueError(f"must be at most {high:g}, got {v:g}")


def type_name(hint: Any) -> str:
    """A field's type in a word, for --help."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint == int | float:
        return type_name(float)
    if origin in (typing.Union, types.UnionType):
        return type_name(next(a for a in args if a is not type(None)))
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is tuple:
        return f"{type_name(args[0])},..."
    return {int: "INT", float: "NUMBER", str: "TEXT", bool: "true|false"}[hint]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that also rejects duplicate keys, aliases and very long numbers.

    A few lines of aliases can expand to gigabytes, and a number of more than 100 characters can take minutes to read.
    """

    def construct_mapping(self, node, deep=False):
        keys = Counter(k for k in (self.construct_object(key, deep=True) for key, _ in node.value) if _hashable(k))
        duplicate = next((k for k, count in keys.items() if count > 1), None)
        if duplicate is not None:
            raise yaml.YAMLError(f"duplicate key '{duplicate}'{node.start_mark}")
        return super().construct_mapping(node, deep)

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"*{event.anchor} is an alias: write the value instead{event.start_mark}")
        self.values = getattr(self, "values", 0) + 1
        if self.values > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES:,} values, too many to be settings")
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor):
        node = super().compose_scalar_node(anchor)
        if len(node.value) > 100 and not node.tag.endswith((":str", ":binary")):
            raise yaml.YAMLError(f"a number of {len(node.value)} characters{node.start_mark}")
        return node


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:  # PyYAML reports it
        return False
    return True


def read_yaml(path: Path) -> dict:
    values = _read(path, "YAML", MAX_YAML, lambda text: yaml.load(text, Loader=_Loader))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(
            f"{path} should hold sections (data:, model:, diffusion:, training:, speed:), not {type(values).__name__}."
        )
    return values


def read_json(file: Path, max_bytes: int = MAX_JSON) -> dict:
    """The object in a JSON file of at most `max_bytes`. Raises InputError for anything else."""
    if not file.is_file():
        raise InputError(f"{file} is missing.")
    values = _read(file, "JSON", max_bytes, json.loads)
    if not isinstance(values, dict):
        raise InputError(f"{file} is corrupted: expected an object, not {type(values).__name__}.")
    return values


def _read(file: Path, file_type: str, max_bytes: int, parse: Callable[[str], Any]) -> Any:
    try:
        with open(file, "rb") as handle:
            content = handle.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise InputError(f"{file} is larger than the {max_bytes:,} bytes of {file_type} expected here.")
        values = parse(content.decode("utf-8"))
        if _is_deep(values):
            raise RecursionError
    except InputError:
        raise
    except RecursionError:
        raise InputError(
            f"{file} is not valid {file_type} here: it is nested more than {MAX_DEEP} levels deep."
        ) from None
    except Exception as error:  # PyYAML raises KeyError, IndexError and others for unusual tags
        raise InputError(f"{file} is not valid {file_type}: {' '.join(str(error).split())[:300]}") from None
    return values


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEEP):
        parts = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list | tuple)]
        level = [child for part in parts for child in part]
        if not level:
            return False
    return True
