"""Docstrings of the public names: a summary line, then Args, Returns and Raises where they apply."""

import inspect

import pytest

import diffusion_adagn
from diffusion_adagn.data.sources import Source
from diffusion_adagn.evaluation.extractors import Extractor
from diffusion_adagn.sampling.class_mix import ClassPlan
from diffusion_adagn.sampling.pipeline import SamplingCallback

PROTOCOLS = (ClassPlan, SamplingCallback, Extractor, Source)


def functions():
    """(name, function) of the exported functions and of the public methods of exported classes and protocols."""
    exported = [getattr(diffusion_adagn, name) for name in diffusion_adagn.__all__ if name != "__version__"]
    for thing in (*exported, *PROTOCOLS):
        if not inspect.isclass(thing):
            yield thing.__name__, thing
            continue
        for name, member in vars(thing).items():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if inspect.isfunction(function) and not name.startswith("_"):
                yield f"{thing.__name__}.{name}", function


@pytest.mark.parametrize(("name", "function"), functions(), ids=lambda value: value if isinstance(value, str) else "")
def test_docstring_has_its_sections(name, function):
    text = inspect.getdoc(function) or ""
    assert text.split("\n")[0].rstrip().endswith((".", ":")), f"{name}: the first line is not a summary"
    parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "cls", "args", "kwargs")]
    if len(parameters) > 1:
        section = text.partition("Args:")[2]
        missing = [p for p in parameters if f"\n    {p}:" not in section]
        assert not missing, f"{name}: Args lacks {missing}"


@pytest.mark.parametrize("name", diffusion_adagn.__all__)
def test_exported_names_are_documented(name):
    thing = getattr(diffusion_adagn, name)
    assert name == "__version__" or len(inspect.getdoc(thing) or "") > 20
