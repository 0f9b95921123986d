"""Settings and documents as pydantic dataclasses, which convert, check and describe their values; and one reader of files.

Settings reject unknown keys. Documents, which are the content of files, ignore them. Nothing heavy is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import inspect
import json
import os
import re
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from functools import partial, wraps
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from .errors import InputError, did_you_mean, one_line

MAX_YAML = 4 * 2**20  # bytes; the labels of 20,000 classes are 1 MB
MAX_YAML_VALUES = 250_000  # PyYAML reads 20,000 in a second
MAX_JSON = 16 * 2**20
MAX_INT = 2**63 - 1
T = TypeVar("T")


class Option(NamedTuple):
    """Metadata of a setting whose command-line option differs from the generated one.

    Args:
        name: Name of the option, without dashes; None: the key.
        metavar: Placeholder of the value in --help; None: from the type.
        default: Text of the default in --help; None: the default itself.
    """

    name: str | None = None
    metavar: str | None = None
    default: str | None = None


NO_OPTION = Option("")  # metadata: not on the command line
AS_GIVEN = "as given"  # metadata: the words "none" and "null" are values
RESUMABLE = "resumable"  # metadata: a resumed run may change it, since it does not change the results

# ---------------------------------------------------------------------- declaring


def settings(cls: type[T] | None = None, *, frozen: bool = False, from_file: bool = False, kw_only: bool = False):
    """A class decorator: a dataclass whose values are converted, as YAML and command lines write them, and checked.

    A field is declared as `name: Annotated[int, Ge(1)] = 128`, and documented by the string below it. Class attributes
    hold the defaults; `dataclasses.replace` checks again. An invalid value raises InputError.

    Args:
        cls: The class.
        frozen: Attributes cannot be assigned.
        from_file: For the content of a file: values are not converted, and unknown keys are ignored.
        kw_only: Fields are arguments by name only, so that those without a default may come last.
    """

    def decorate(cls: type[T]) -> type[T]:
        hints, plain = typing.get_type_hints(cls, include_extras=True), typing.get_type_hints(cls)
        if not from_file:
            own = inspect.get_annotations(cls)
            cls.__annotations__ = {name: _with_conversion(hints[name], plain[name]) for name in own}
        config = {
            "extra": "ignore" if from_file else "forbid",
            "allow_inf_nan": False,
            "coerce_numbers_to_str": True,
            "use_attribute_docstrings": True,
            "arbitrary_types_allowed": True,
        }
        made = pydantic_dataclass(cls, frozen=frozen, kw_only=kw_only, config=config)
        for name, info in made.__pydantic_fields__.items():  # subclasses inherit types, not the strings below fields
            if info.description and not from_file:
                inherited = made.__dataclass_fields__[name]
                inherited.type = Annotated[inherited.type, Field(description=info.description)]
        init = made.__init__

        @wraps(init)
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            try:
                init(self, *args, **kwargs)
            except ValidationError as error:
                raise InputError(Problem.of(error, made).text(made)) from None

        made.__init__ = __init__
        return made

    return decorate if cls is None else decorate(cls)


document = partial(settings, frozen=True, from_file=True)


def _with_conversion(hint: Any, plain: Any) -> Any:
    if isinstance(hint, dataclasses.InitVar) or AS_GIVEN in getattr(hint, "__metadata__", ()):
        return hint
    return Annotated[hint, BeforeValidator(partial(_convert, hint=plain))]


def _convert(value: Any, hint: Any) -> Any:
    """A value as YAML or a command line writes it, in the form that pydantic accepts for this type; else unchanged."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in args:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return _convert(value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        given = str(value) if isinstance(value, bool) else value  # True equals 1
        return next((choice for choice in args if str(choice) == str(value)), given)
    if origin is tuple and args[-1] is ...:
        if isinstance(value, str):
            words = value.strip("[]() ").removesuffix(",")
            value = re.split(r"\s*,\s*|\s+", words) if words else []
        return tuple(_convert(v, args[0]) for v in (value if isinstance(value, list | tuple) else [value]))
    if hint is str:
        return _text(value)
    if hint in (int, float, int | float):
        return _number(value, hint)
    return value


def _text(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a word, got {value!r}: YAML reads a bare yes/no/on/off as true/false, so quote it")
    if isinstance(value, datetime.date):
        raise ValueError(f"expected a word, got {value}: YAML reads it as a date, so quote it")
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bytes) or (isinstance(value, str) and b"\0" in os.fsencode(value)):
        raise ValueError(f"expected a word, got {short_repr(value)}")
    return value


def _number(value: Any, hint: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected {'a whole number' if hint is int else 'a number'}, got {value!r}")
    if isinstance(value, str) and hint is int:
        with contextlib.suppress(ValueError):
            value = int(value) if value.strip("+-").isdecimal() or not float(value).is_integer() else int(float(value))
    if isinstance(value, Real):  # of NumPy too
        value = int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, int) and abs(value) > MAX_INT:
        limit = f"at most {MAX_INT}" if value > 0 else f"at least -{MAX_INT}"
        raise ValueError(f"must be {limit}, got {short_repr(value)}")
    if hint == int | float:  # 1.0 is 1: config.json is hashed
        try:
            return int(float(value)) if float(value) == int(float(value)) else float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"expected a number, got {short_repr(value)}") from None
    return value


# ---------------------------------------------------------------------- describing


class Setting(NamedTuple):
    """A setting. key: dotted, with its sections. hint: its type, without metadata. section: the class that declares it."""

    key: str
    hint: Any
    info: FieldInfo
    section: type

    @property
    def option(self) -> Option:
        return next((m for m in self.info.metadata if isinstance(m, Option)), Option())


def fields_of(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a class, including those of its sections."""
    for name, info in cls.__pydantic_fields__.items():
        if info.init_var:
            continue
        if is_section(info.annotation):
            yield from fields_of(info.annotation, f"{prefix}{name}.")
        else:
            yield Setting(f"{prefix}{name}", info.annotation, info, cls)


def is_section(hint: Any) -> bool:
    """Whether a field's type is a class of settings."""
    return isinstance(hint, type) and hasattr(hint, "__pydantic_fields__")


def json_schema(cls: type) -> str:
    """The JSON schema of a class of settings, as text."""
    return json.dumps(TypeAdapter(cls).json_schema(), indent=1)


def type_name(hint: Any) -> str:
    """A type in a word, for --help."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hasattr(hint, "__metadata__"):
        return type_name(args[0])
    if hint == int | float:
        return "NUMBER"
    if origin in (typing.Union, types.UnionType):
        return type_name(next(a for a in args if a is not type(None)))
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is tuple:
        return f"{type_name(args[0])},..."
    return {int: "INT", float: "NUMBER", bool: "true|false"}.get(hint, "TEXT")


def nearest_choice(word: str, choices: list[str]) -> str | None:
    """The choice that a misspelt word may mean."""
    same_start = [c for c in choices if c[:3] == word.lower()[:3]]  # dpm, dpmpp, dpmsolver: dpm++
    return next(iter(same_start or difflib.get_close_matches(word.lower(), choices, n=1)), None)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlevel = 2


def short_repr(value: Any) -> str:
    """A value for an error message: shortened, since it may be of any size."""
    return _REPR.repr(value)


# ---------------------------------------------------------------------- checking

_EXPECTED = {
    "int": "a whole number",
    "bool": "true or false",
    "string": "a word",
}  # by the first word of an error's type
_EXPECTED |= {"float": "a number", "finite": "a number"}
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class Problem(NamedTuple):
    """The first problem that pydantic found.

    Args:
        key: Dotted key of the setting; "" for a rule across settings.
        type: pydantic's error type.
        message: What was expected and what was given; of a rule, the whole message.
        hint: The nearest valid value, as a sentence; or "".
    """

    key: str
    type: str
    message: str
    hint: str = ""

    @classmethod
    def of(cls, error: ValidationError, settings: type) -> Problem:
        return cls.from_details(error.errors(include_url=False)[0], settings)

    @classmethod
    def from_details(cls, first: Mapping[str, Any], settings: type | None) -> Problem:
        """first: what pydantic reports of a problem. settings: None if every part of its place is a key."""
        hint = ""
        kind, context, value = first["type"], first.get("ctx", {}), first["input"]
        if isinstance(context.get("error"), InputError):
            return cls("", kind, str(context["error"]))
        if kind == "value_error":
            message = str(context["error"])
        elif kind == "literal_error":
            choices = context["expected"].replace("'", "").replace(" or ", ", ")
            near = nearest_choice(str(value), choices.split(", "))
            message, hint = f"expected {choices}, got {short_repr(value)}", f" Did you mean {near}?" if near else ""
        elif limit := next((name for name in context if name in _LIMITS), None):
            given = f"{value:g}" if isinstance(value, float) else short_repr(value).strip("'")
            message = f"must be {_LIMITS[limit]} {context[limit]:g}, got {given}"
        elif kind == "too_short":
            message = f"needs at least {context['min_length']} value"
        elif kind in ("too_long", "string_too_long"):
            message = f"must have at most {context['max_length']:,} {'characters' if kind[0] == 's' else 'values'}"
        elif kind in ("missing", "missing_argument"):
            message = "is missing"
        elif expected := _EXPECTED.get(kind.partition("_")[0]):
            message = f"expected {expected}, got {short_repr(value)}"
        else:
            message = f"{first['msg']}: {short_repr(value)}"
        keys: list[str] = []
        for part in first["loc"]:  # a union adds the names of its types
            if settings is None:
                keys.append(str(part))
            elif is_section(settings):
                keys.append(str(part))
                field = settings.__pydantic_fields__.get(part)
                settings = None if field is None else field.annotation
        return cls(".".join(keys), kind, message, hint)

    def text(self, cls: type, where: str = "") -> str:
        """The error message. where: where the value was given, such as "in c.yaml"."""
        place = f" ({where})" if where else ""
        if not self.key:
            return self.message
        if self.type == "unexpected_keyword_argument":
            return _unknown_key(self.key, [s.key for s in fields_of(cls)], where)
        if self.type == "dataclass_type":
            auto = ", or auto" if self.key == "speed" else ""
            example, given = f"'{self.key}:' with its settings below{auto}", self.message.rpartition(": ")[2]
            return f"'{self.key}' is a section, such as {example}, not {given}{place}."
        return f"{self.key}: {self.message}{place}.{self.hint}"


class Layer(NamedTuple):
    """Values that were given together; later layers take precedence.

    Args:
        values: By dotted key, or nested in sections.
        where: The place, for messages, such as "in c.yaml".
        error: The class of errors in these values.
        labels: What messages call a key; a key that is missing here is called by itself.
    """

    values: Mapping[str, Any]
    where: str = ""
    error: type[InputError] = InputError
    labels: Mapping[str, str] = MappingProxyType({})


def build(cls: type[T], *layers: Layer, renamed: Mapping[str, str] = MappingProxyType({})) -> T:
    """An instance of a class of settings from several layers of values.

    Args:
        cls: The class.
        layers: The values; the defaults of the class are below all layers.
        renamed: Old keys and their new names.

    Raises:
        InputError: A key is unknown, a value is invalid, or two contradict each other; of the layer's own class where
            one layer is the cause.
    """
    known = [s.key for s in fields_of(cls)]
    sections = {key.rpartition(".")[0] for key in known} - {""}
    flat, source = {}, {}
    for layer in layers:
        for key, value in flatten(cls, layer.values).items():
            key = renamed.get(key, key)
            if key not in known and key not in sections:
                raise layer.error(_unknown_key(key, known, layer.where))
            flat[key], source[key] = value, layer
    nested: dict[str, Any] = {}
    no_sections = tuple(f"{key}." for key in flat if key in sections)
    for key, value in flat.items():
        if key.startswith(no_sections):  # another value was given in place of its section, which pydantic reports
            continue
        *path, name = key.split(".")
        parent = nested
        for part in path:
            parent = parent.setdefault(part, {})
        parent[name] = value
    try:
        return TypeAdapter(cls).validate_python(nested)
    except ValidationError as error:
        problem = Problem.of(error, cls)
        layer = source.get(problem.key, Layer({}))
        problem = problem._replace(key=layer.labels.get(problem.key, problem.key))
        raise layer.error(problem.text(cls, layer.where)) from None


def flatten(cls: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by dotted key. An empty section has none."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        field = cls.__pydantic_fields__.get(key)
        if field is not None and is_section(field.annotation) and (value is None or isinstance(value, Mapping)):
            flat |= flatten(field.annotation, value or {}, f"{prefix}{key}.")
        elif field is None and isinstance(value, Mapping) and not prefix:  # an unknown section
            flat |= {f"{key}.{name}": inner for name, inner in value.items()} or {str(key): value}
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _unknown_key(key: str, known: list[str], where: str) -> str:
    hint = did_you_mean(key[:80], known) or " `adagn train --help` lists them all."
    return f"there is no setting {short_repr(key)}{f' ({where})' if where else ''}.{hint}"


# ---------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that also rejects duplicate keys, and what takes minutes or gigabytes to read."""

    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self.nodes += 1
        if self.check_event(yaml.AliasEvent):  # a few lines of them expand to gigabytes
            raise yaml.YAMLError(f"an alias, where the value itself is expected{self.peek_event().start_mark}")
        if self.nodes > MAX_YAML_VALUES:
            raise yaml.YAMLError(f"more than {MAX_YAML_VALUES:,} values")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                raise yaml.YAMLError(f"duplicate key '{key.value}'{key.start_mark}")
            keys.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        if len(node.value) > 100 and not node.tag.endswith((":str", ":binary")):
            raise yaml.YAMLError(f"a number of {len(node.value)} characters{node.start_mark}")
        if node.tag.endswith((":int", ":float")) and re.fullmatch(r"[+-]?0[0-7_]+|.*:.*", node.value):
            text = f"{node.value}, which YAML reads in base 8 or 60: write a decimal number, or quote it"
            raise yaml.YAMLError(f"{text}{node.start_mark}")
        return super().construct_scalar(node)


def read_document(
    file: str | Path, schema: type[T] | None = None, max_bytes: int | None = None, is_yaml: bool = False
) -> T | dict:
    """Read a JSON or YAML file.

    Args:
        file: The file.
        schema: The class of its content. None: a dict of any content.
        max_bytes: Largest size accepted. None: MAX_YAML or MAX_JSON.
        is_yaml: Whether it is YAML, for sections of settings.

    Returns:
        An instance of `schema`, or the dict.

    Raises:
        InputError: The file is missing, too large, not valid, or its content does not have the schema.
    """
    file, max_bytes = Path(file), max_bytes or (MAX_YAML if is_yaml else MAX_JSON)
    try:
        if not file.is_file():  # a pipe would block
            raise ValueError("it is missing")
        with open(file, "rb") as handle:
            content = handle.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ValueError(f"it is larger than the {max_bytes:,} bytes expected here")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("it is not UTF-8 text; save it as UTF-8") from None
        values = yaml.load(text, Loader=_Loader) if is_yaml else json.loads(text)
        values = {} if is_yaml and values is None else values
        if not isinstance(values, dict):
            expected = "sections of settings, such as data: and training:" if is_yaml else "an object with keys"
            raise ValueError(f"expected {expected}, not {type(values).__name__}")
    except Exception as error:  # PyYAML raises KeyError, IndexError and others for unusual tags
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise InputError(f"{file} is not valid {'YAML' if is_yaml else 'JSON'} here: {reason}.") from None
    return values if schema is None else as_document(values, schema, file)


def as_document(values: Any, schema: type[T], file: str | Path) -> T:
    """Values that were read from a file, checked. Raises InputError, which names the file, if they lack the schema."""
    try:
        return TypeAdapter(schema).validate_python(values)
    except ValidationError as error:
        raise InputError(f"{file} is corrupted: {Problem.of(error, schema).text(schema)}") from None
