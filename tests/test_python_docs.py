"""docs/python.md is one program: it runs, with fewer steps."""

import re

import pytest
from conftest import ROOT

from diffusion_adagn.training import train as train_module


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)


@pytest.fixture
def shrunk(tmp_path, monkeypatch):
    """An empty folder, in which `train` makes two steps."""
    monkeypatch.chdir(tmp_path)
    train = train_module.train

    def short(config, resume=False):
        config = train_module.as_config(config)
        for key in ("preview_every", "heldout_every", "diagnostics_every"):
            setattr(config.training, key, 0)
        config.training.max_steps, config.training.batch_size = 2, 8
        return train(config, resume)

    monkeypatch.setattr(train_module, "train", short)
    return tmp_path


def test_python_page_runs(shrunk):
    names = {}
    for block in blocks():
        for setting, few in (
            ("max_steps = 400", "max_steps = 2"),
            (r"num_inference_steps=\d+", "num_inference_steps=6"),
        ):
            block = re.sub(setting, few, block)
        exec(compile(block, "docs/python.md", "exec"), names)
    assert {path.name for path in (shrunk / "runs").iterdir()} == {"digits", "digits_long"}
    assert len(names["out"].images) == 8 and (shrunk / "three.png").exists()
    assert len(names["images"]) == 2 and len(names["unfinished"]) == 1
