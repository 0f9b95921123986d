"""Files around the package: one version of ruff, one of the package, and an install that says what it downloads."""

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


def test_one_version_of_ruff_everywhere():
    pinned = next(r for r in PROJECT["optional-dependencies"]["test"] if r.startswith("ruff")).removeprefix("ruff==")
    assert f"\nruff=={pinned}\n" in (ROOT / "constraints.txt").read_text()
    (hooks,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert hooks["rev"] == f"v{pinned}"
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_workflow_tests_every_claimed_python():
    job = read_yaml(".github/workflows/tests.yml")["jobs"]["tests"]
    claimed = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert job["strategy"]["matrix"]["python"] == claimed
    assert PROJECT["requires-python"] == f">={claimed[0]}"
    assert job["steps"][-1]["run"] == "bash .ci/run"
    assert all(re.search(r"@v\d+$", step["uses"]) for step in job["steps"] if "uses" in step)


def test_citation_names_version_and_licence():
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"]
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])


def test_constraints_allow_every_dependency():
    """A pin outside pyproject's range would make the documented install impossible."""
    from packaging.requirements import Requirement

    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = dict(line.split("==") for line in lines if line)
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]:
        wanted = Requirement(text)
        assert pins[wanted.name] in wanted.specifier, text
    assert int(pins["pillow"].split(".")[0]) < 13  # gradio 6


def test_the_source_archive_has_every_file():
    manifest = (ROOT / "MANIFEST.in").read_text()
    named = {
        word for line in manifest.splitlines() if line.startswith(("include", "graft")) for word in line.split()[1:]
    }
    missing = {path.name for path in ROOT.iterdir() if path.suffix in (".md", ".cff", ".txt", ".py")} - named
    assert missing <= {"setup.py"}  # setuptools adds it
    assert {".ci", ".github", ".pre-commit-config.yaml", "tests", "docs", "configs"} <= named


def demo_install(tmp_path, *options: str, uv: bool) -> str:
    """What `make demo` would run before training, with or without a uv on PATH."""
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
def test_make_demo_takes_the_cpu_torch(tmp_path, uv, options, installer):
    commands = demo_install(tmp_path, *options, uv=uv)
    first, install = commands.index("GB"), commands.index(" -c constraints.txt -e .\n")
    assert first < install  # the download is announced
    assert commands[:install].endswith(installer.format(venv=f"{tmp_path}/venv/bin/python"))
    assert "[test]" not in commands
    assert (f"{tmp_path}/venv/bin/python -m pip install --quiet --disable-pip-version-check uv" in commands) == (
        options == ["TORCH=cpu"] and not uv
    )
