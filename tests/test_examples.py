"""The examples run."""

import asyncio
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    notebook = json.loads((EXAMPLES / "look_inside.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6 and not any(cell.get("outputs") for cell in notebook["cells"])
    code = "\n".join(cells)
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "up.1.stages.1.block.norm2" in run.stdout and "class" in run.stdout


def test_agent_saves_an_image_of_the_class(tmp_path, capsys):
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    pytest.importorskip("mcp", reason="the extra serve is not installed")
    sys.path.insert(0, str(ROOT / "tests/serving"))
    from PIL import Image
    from served import running

    from benchmarks.digits_judge import DigitsJudge

    spec = importlib.util.spec_from_file_location("example_agent", EXAMPLES / "agent.py")
    agent = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agent)
    with running(["digits"]) as server:
        address = f"http://127.0.0.1:{server.port}/mcp"
        (file,) = asyncio.run(agent.chat(["Draw me a three, please"], address, tmp_path))
        assert "calls sample_images with {'classes': '3'" in capsys.readouterr().out
        asyncio.run(agent.chat(["Mix 3 and 8", "Explain seven"], address, tmp_path))
        assert "calls mix_classes with {'mix': '3@coarse,8@fine'}" in capsys.readouterr().out
    pixels = np.asarray(Image.open(file))
    step = pixels.shape[0] // 8
    assert DigitsJudge().classes(pixels[::step, ::step].reshape(1, 8, 8, -1)[..., :1] / 255).tolist() == [3]
