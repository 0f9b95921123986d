"""Project files: one version of ruff and of the package, and an install that announces its download."""

import re
import shutil
import subprocess
import tomllib

import pytest
import yaml
from conftest import ROOT

from diffusion_adagn.version import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_yaml(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text())


def test_ruff_has_one_version():
    pinned = next(r for r in PROJECT["optional-dependencies"]["test"] if r.startswith("ruff")).removeprefix("ruff==")
    assert f"\nruff=={pinned}\n" in (ROOT / "constraints.txt").read_text()
    (hooks,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert hooks["rev"] == f"v{pinned}"
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]


def test_workflow_covers_supported_pythons():
    job = read_yaml(".github/workflows/tests.yml")["jobs"]["tests"]
    supported = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert job["strategy"]["matrix"]["python"] == supported
    assert PROJECT["requires-python"] == f">={supported[0]}"
    assert job["steps"][-1]["run"] == "bash .ci/run"
    assert all(re.search(r"@v\d+$", step["uses"]) for step in job["steps"] if "uses" in step)


def test_citation_has_version_and_licence():
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"]
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])


def test_constraints_satisfy_dependency_ranges():
    """A pin outside the range in pyproject would break the documented install."""
    from packaging.requirements import Requirement

    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = dict(line.split("==") for line in lines if line)
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["test"], *extras["serve"]]:
        requirement = Requirement(text)
        assert pins[requirement.name] in requirement.specifier, text
    assert int(pins["pillow"].split(".")[0]) < 13  # gradio 6


def test_source_archive_has_every_file():
    manifest = (ROOT / "MANIFEST.in").read_text()
    included = {
        word for line in manifest.splitlines() if line.startswith(("include", "graft")) for word in line.split()[1:]
    }
    missing = {path.name for path in ROOT.iterdir() if path.suffix in (".md", ".cff", ".txt", ".py")} - included
    assert missing <= {"setup.py"}  # setuptools adds it
    assert {".ci", ".github", ".pre-commit-config.yaml", "tests", "docs", "configs"} <= included


def demo_commands(tmp_path, *options: str, uv: bool) -> str:
    """The commands of `make demo` before training, with or without uv on PATH."""
    if uv:
        (tmp_path / "uv").write_text("#!/bin/sh\n")
        (tmp_path / "uv").chmod(0o755)
    run = subprocess.run(
        ["make", "-n", "demo", f"VENV={tmp_path}/venv", *options],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.partition("adagn train")[0]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(
    "uv, options, installer",
    [
        (False, [], "venv/bin/python -m pip install --quiet --disable-pip-version-check"),
        (False, ["TORCH=cpu"], "venv/bin/uv pip install --quiet --python {venv} --torch-backend=cpu"),
        (True, [], "/uv pip install --quiet --python {venv} --torch-backend=cpu"),
        (True, ["TORCH=auto"], "/uv pip install --quiet --python {venv} --torch-backend=auto"),
    ],
    ids=["pip", "pip-cpu", "uv", "uv-auto"],
)
def test_make_demo_installs_cpu_torch(tmp_path, uv, options, installer):
    commands = demo_commands(tmp_path, *options, uv=uv)
    first, install = commands.index("GB"), commands.index(" -c constraints.txt -e .\n")
    assert first < install  # the download is announced
    assert commands[:install].endswith(installer.format(venv=f"{tmp_path}/venv/bin/python"))
    assert "[test]" not in commands
    assert (f"{tmp_path}/venv/bin/python -m pip install --quiet --disable-pip-version-check uv" in commands) == (
        options == ["TORCH=cpu"] and not uv
    )
