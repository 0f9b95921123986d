"""docs/serving.md: its commands run against a server, its programs run."""

import re
import shlex
import shutil
import subprocess

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from conftest import ROOT
from served import running

from diffusion_adagn.cli import serve
from diffusion_adagn.cli.main import COMMANDS

TEXT = (ROOT / "docs/serving.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def lines():
    return [line for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture(scope="module")
def server():
    with running(["digits"]) as client:
        yield client


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_requests_of_the_page_are_answered(server, tmp_path):
    requests = [line for line in lines() if line.startswith("curl") and "label_check" not in line]
    assert len(requests) == 8
    for line in requests:
        words = shlex.split(line.replace(":7860", f":{server.port}"))
        done = subprocess.run([*words, "--silent", "--fail-with-body"], capture_output=True, check=False)
        assert done.returncode == 0, (line, done.stdout)
    for name in ("three", "mixed", "between"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_commands_of_the_page_are_commands():
    for line in lines():
        words = shlex.split(line)
        assert words[0] in ("curl", "pip") or words[1] in COMMANDS
        if words[:2] == ["adagn", "serve"]:
            assert serve.parser().parse(words[2:]).runs == ["digits"]


def test_programs_of_the_page_run(server, tmp_path):
    for block in blocks("python"):
        exec(compile(block.replace(":7860", f":{server.port}"), "docs/serving.md", "exec"), {})
    assert (tmp_path / "shipped_three.png").exists() and (tmp_path / "agent_three.png").exists()


def test_limits_of_the_page_are_the_defaults():
    from diffusion_adagn.serving.settings import Limits

    table = dict(re.findall(r"\| `--(max_\w+)` \|.*\| (\d+) \|", TEXT))
    assert {name: float(value) for name, value in table.items()} == vars(Limits())
