"""The names at the front door: what editors see is what Python finds."""

import ast
import subprocess
import sys
from pathlib import Path

import diffusion_adagn
from diffusion_adagn.version import __version__

PACKAGE = Path(diffusion_adagn.__file__).parent


def typed_exports() -> dict[str, str]:
    """Name -> module, of the imports under TYPE_CHECKING."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    return {alias.name: f".{node.module}" for node in block.body for alias in node.names}


def test_editors_see_every_export():
    assert typed_exports() == diffusion_adagn._HOME
    assert set(diffusion_adagn.__all__) == {"__version__", *diffusion_adagn._HOME}
    assert (PACKAGE / "py.typed").is_file()


def test_every_export_is_importable():
    assert all(getattr(diffusion_adagn, name) is not None for name in diffusion_adagn.__all__)
    assert diffusion_adagn.__version__ == __version__


def test_no_module_imports_the_package_root():
    """`from diffusion_adagn import X` inside the package would be a cycle; so would `from . import __version__`."""
    for file in PACKAGE.rglob("*.py"):
        depth = len(file.relative_to(PACKAGE).parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name != "diffusion_adagn" for alias in node.names), file
            if (
                isinstance(node, ast.ImportFrom)
                and node.level == depth
                and node.module is None
                and file.parent != PACKAGE
            ):
                # `from .. import recipes` names a module, which is no cycle
                assert all((PACKAGE / f"{a.name}.py").exists() or (PACKAGE / a.name).is_dir() for a in node.names), file
            if isinstance(node, ast.ImportFrom):
                assert not (node.level == 0 and node.module == "diffusion_adagn"), file


def test_importing_the_root_imports_no_torch():
    code = "import sys, diffusion_adagn; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
