"""Imports within the package go from higher to lower packages, without cycles; the error names the import."""

import ast
from pathlib import Path

import pytest

import diffusion_adagn

PACKAGE = Path(diffusion_adagn.__file__).parent
LAYERS = (  # low to high; a module imports from its own layer and from those above it in this list
    ("errors", "version", "renamed"),
    ("commands", "labels", "atomic", "schema", "recipes"),
    ("render",),
    ("ops",),
    ("models",),
    ("config",),
    ("diffusion",),
    ("data",),
    ("runs",),
    ("runtime",),
    ("sampling",),
    ("evaluation",),
    ("training",),
    ("trace",),
    ("experiments",),
    ("personal",),
    ("interop",),
    ("serving",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
OUTSIDE = {"__init__", "__main__"}  # the public names and the command, which no module imports


def imports(file: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of the package's own modules, in functions too; module: "data.store"."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = list(parts[: len(parts) - node.level]) if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            if node.level or base.startswith("diffusion_adagn"):
                base = base.removeprefix("diffusion_adagn").removeprefix(".")
                for alias in node.names:
                    module = ".".join(filter(None, [base, alias.name]))
                    found.append((node.lineno, module if is_module(module) else base))
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("diffusion_adagn.")]
            found += [(node.lineno, name.removeprefix("diffusion_adagn.")) for name in names]
    return found


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


FILES = sorted(f for f in PACKAGE.rglob("*.py") if f.stem not in OUTSIDE or f.parent != PACKAGE)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file):
    level = LEVEL[file.relative_to(PACKAGE).with_suffix("").parts[0]]
    upward = [
        f"{file.relative_to(PACKAGE)}:{line} imports {module}, which is higher"
        for line, module in imports(file)
        if module and LEVEL[module.split(".")[0]] > level
    ]
    assert not upward


def test_imports_have_no_cycle():
    graph = {}
    for file in FILES:
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        graph[name] = {module for _, module in imports(file) if module} - {name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for module in sorted(graph.get(name, ())):
                visit(module, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
