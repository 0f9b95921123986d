"""Every shipped recipe is read and dry-run, on images that the test makes."""

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from diffusion_adagn.cli.main import main
from diffusion_adagn.config import read_config

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SIZES = {
    "cifar10": (50e6, 60e6),
    "cifar10_small": (5e6, 8e6),
    "digits": (0.5e6, 1e6),
}  # parameters that the headers promise


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders named as imagenet64_subset.yaml asks for them."""
    folder = tmp_path_factory.mktemp("images")
    for wnid in read_config(ROOT / "configs/imagenet64_subset.yaml").data.classes.split(","):
        (folder / wnid).mkdir()
        for i in range(2):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (70, 80, 3), "uint8")).save(
                folder / wnid / f"{i}.png"
            )
    return folder


def test_the_recipes_are_there():
    assert {c.stem for c in CONFIGS} >= {"digits", "cifar10", "cifar10_small", "imagenet64_subset", "own_images"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_every_recipe_dry_runs(config, images, step_time, capsys):
    source = (
        []
        if config.stem == "digits"
        else ["--data.source", str(images), "--data.image_size", "64" if "64" in config.stem else "32"]
    )
    assert main(["train", "--config", str(config), "--dry_run", "--verbose", "--debug", *source]) == 0
    printed = capsys.readouterr().out
    for word in ("GFLOPs", "GiB", "epochs", "max_steps:", "10 classes"):
        assert word in printed
    if config.stem in SIZES:
        millions = float(printed.split(" M parameters")[0].split()[-1])
        low, high = SIZES[config.stem]
        assert low <= millions * 1e6 <= high


def test_recipe_headers_state_their_results():
    for config in CONFIGS:
        head = config.read_text().splitlines()[:6]
        assert head[0].startswith("# "), config
        assert config.stem == "own_images" or any("measured" in line for line in head), config


def test_image_recipes_predict_v():
    """eps-prediction gives oversaturated, noisy images until training is long."""
    for config in CONFIGS:
        assert read_config(config).diffusion.prediction == ("eps" if config.stem == "digits" else "v"), config
