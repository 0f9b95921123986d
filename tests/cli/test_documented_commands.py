"""Every command line in the docs is one that its command takes: it ends at the model or the file, which does not exist here."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from diffusion_adagn import recipes
from diffusion_adagn.cli.main import main
from diffusion_adagn.cli.options import config_file, config_overrides
from diffusion_adagn.cli.train import parser as train_parser
from diffusion_adagn.config import read_config
from diffusion_adagn.runs.shipped import shipped_models

STOP_AT_THE_MODEL = (
    "sample", "sweep", "evaluate", "trace", "classify", "style", "learn-class", "merge-classes", "guide", "ema", "export",
)  # fmt: skip
PAGES = sorted((ROOT / "docs").glob("*.md"))


def commands(page):
    """The lines `adagn ...` of a page's shell blocks, as words; long ones are joined, comments removed."""
    for block in re.findall(r"```(?:bash|console|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["adagn"] and "..." not in words:
                yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_docs_are_valid(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        if words[0] == "train":
            args = train_parser().parse(words[1:])
            file = config_file(args)
            recipe = Path(str(file)).stem if Path(str(file)).stem in recipes.names() else None
            read_config(recipe, config_overrides(args))
        elif words[0] in STOP_AT_THE_MODEL and words[1:2] != ["reference"]:
            shown = [word if word not in shipped_models() else "runs/nowhere" for word in words]  # these are there
            assert main(shown) == 1, (words, capsys.readouterr().err)


def test_the_docs_have_commands():
    assert sum(len(list(commands(page))) for page in PAGES) > 60
