"""Every command of the README and the user guide: run with small settings; those that need a GPU or the network are parsed."""

import functools
import re
import shlex

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from diffusion_adagn.cli import import_adm as adm_cli
from diffusion_adagn.cli import sample as sample_cli
from diffusion_adagn.cli import serve as serve_cli
from diffusion_adagn.cli import sweep as sweep_cli
from diffusion_adagn.cli import train as train_cli
from diffusion_adagn.cli.main import main
from diffusion_adagn.cli.options import config_file, config_overrides
from diffusion_adagn.config import read_config
from diffusion_adagn.evaluation.label_usage import label_check
from diffusion_adagn.experiments import ablation
from diffusion_adagn.trace import tracing

NARROW = "--model.model_channels 16 --model.num_head_channels 16 --model.norm_groups 4"
SHRINK = {
    "train": f"--training.max_steps 2 --training.batch_size 8 --training.preview_every 0 --training.heldout_every 0 {NARROW} "
    "--speed.precision fp32",
    "sample": "--steps 2 --count 2",
    "data": "--count 2",
    "ablate": f"--training.max_steps 2 --training.batch_size 8 --seeds 0 --training.preview_steps 2 {NARROW}",
    "ema": "--lengths 0.05,0.1",
    "export": "",
    "sweep": "--guidance 1,2 --steps 2 --count 20 --extractor sklearn",
    "evaluate": "",
    "trace": "--timesteps 3 --images 2",
    "import-diffusers": "",
}
SETUP = ("make ", "python3 -m venv", "pip install", "uv pip install")


PAGES = ("README.md", "docs/guide.md")


def blocks(language):
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands():
    """Every command once; of the two pages' sweeps of one run, the last."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    key = lambda line: " ".join(line.split()[:3]) if line.startswith("adagn sweep") else line  # noqa: E731
    last = {key(line): i for i, line in enumerate(lines)}
    return [line for i, line in enumerate(lines) if last[key(line)] == i]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that looks like a clone, with a few labelled images in it."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("cat", "dog"):
        (tmp_path / "my_images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), "uint8")
            Image.fromarray(pixels).save(tmp_path / "my_images" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_commands_run(place, step_time, monkeypatch):
    monkeypatch.setattr(ablation, "EVALUATIONS", 32)  # no command says how many of these
    for name, number in (("MIX_COLUMNS", 1), ("SAMPLER_STEPS", 3), ("NUM_PROBED_TIMESTEPS", 2)):
        monkeypatch.setattr(tracing, name, number)
    monkeypatch.setattr(tracing, "label_check", functools.partial(label_check, evaluations=180))
    ran = 0
    for command in commands():
        words = shlex.split(command)
        if command.startswith(SETUP):
            continue
        if words[0] in ("torchrun", "accelerate"):
            if "-m" in words:
                words = ["adagn", *words[words.index("diffusion_adagn") + 1 :]]
            else:
                script = next(i for i, w in enumerate(words) if w.endswith(".py"))
                assert (ROOT / words[script]).is_file()
                words = ["adagn", words[script].removesuffix(".py"), *words[script + 1 :]]
            only_parse = True
        else:
            only_parse = (
                words[1] == "serve" or "cifar10" in command or "imagenet" in command or "64x64_diffusion" in command
            )
        assert words[0] == "adagn", command
        name, argv = words[1], words[2:]
        if only_parse:
            args = (
                {
                    "train": train_cli,
                    "sample": sample_cli,
                    "import-adm": adm_cli,
                    "sweep": sweep_cli,
                    "serve": serve_cli,
                }[name]
                .parser()
                .parse(argv)
            )
            if name == "train":
                read_config(config_file(args), config_overrides(args))
            continue
        # on resume the recorded settings must not be shrunk again
        shrink = "--training.max_steps 3" if "--resume" in argv and "--config" not in argv else SHRINK[name]
        if name == "evaluate" and argv[0].startswith("runs/"):
            shrink = "--steps 2 --count 20 --extractor sklearn"
        status = 3 if "--label_check" in argv else 0  # two steps teach no label
        assert main([name, *argv, *shrink.split(), "--debug"]) == status, command
        ran += 1
    assert ran >= 6
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert (place / "three.png").exists() and (place / "threes.png").exists()


def test_readme_files_exist():
    text = (ROOT / "README.md").read_text()
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / image).is_file(), image
    for target in ("demo", "test", "test-slow", "coverage", "lint"):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text()
    assert "RESULTS" not in text
    assert [line for line in text.splitlines() if len(line) >= 160] == []


def test_guide_contents_list_every_section():
    text = (ROOT / "docs/guide.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
    assert re.findall(r"\]\(#(.*?)\)", text) == anchors


def test_doc_links_resolve():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), (page.name, link)
