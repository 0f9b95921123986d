"""The recipes: the YAML files of configs/, found by name. Imports nothing heavy.

A wheel contains them as diffusion_adagn/configs. In a checkout or an editable install they are in configs/, next to the
package.
"""

import difflib
from pathlib import Path

from .errors import InputError

SCHEMA = "run.schema.json"  # written by `adagn schema`


def folder() -> Path:
    """The folder with the recipes."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(file.stem for file in folder().glob("*.yaml"))


def text(name: str) -> str:
    """A recipe's YAML, which names the file of the JSON schema for editors.

    Raises:
        InputError: There is no recipe of that name.
    """
    if name not in names():
        raise InputError(f"there is no recipe {name}.{did_you_mean(name)}")
    return (folder() / f"{name}.yaml").read_text(encoding="utf-8").replace(f"={SCHEMA}", f"={folder() / SCHEMA}")


def headline(name: str) -> str:
    """The first line of a recipe's header."""
    return text(name).partition("\n")[0].removeprefix("#").strip()


def find(given: str | Path) -> Path:
    """The config file at a path, or of a recipe's name. An existing file takes precedence.

    Raises:
        InputError: It is neither.
    """
    path = Path(given)
    if path.is_file():
        return path
    if str(given) in names():
        return folder() / f"{given}.yaml"
    near = ", ".join(str(p) for p in sorted(path.parent.glob("*.yaml"))[:8]) if path.parent.is_dir() else ""
    others = f" In that folder: {near}." if near else ""
    missing = f"there is no config file {given} and no recipe of that name.{did_you_mean(path.stem)}{others}"
    inside = path / "config.yaml"
    raise InputError(f"{given} is a folder; the config in it is {inside}." if inside.is_file() else missing)


def name_in_command(name: str) -> str:
    """A recipe as written in a printed command: its name, or its path if a file of that name exists here."""
    return str(folder() / f"{name}.yaml") if Path(name).is_file() else name


def did_you_mean(name: str) -> str:
    """ " Did you mean ...? Recipes: ..." """
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
    return (f" Did you mean {near[0]}?" if near else "") + f" Recipes: {', '.join(names())}."
