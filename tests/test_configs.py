"""Every shipped recipe is read and dry-run, on images that the test makes."""

import dataclasses
import json
import re

import numpy as np
import pytest
import yaml
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


def test_decayed_recipe_is_the_twin_of_cifar10_cpu():
    twin, recipe = (read_config(ROOT / f"configs/{name}.yaml") for name in ("cifar10_cpu_decayed", "cifar10_cpu"))
    assert twin.training.lr_decay == "linear" != recipe.training.lr_decay
    same = dataclasses.replace(recipe.training, lr_decay="linear")
    assert twin == dataclasses.replace(recipe, output_dir=twin.output_dir, training=same)


def check_schema(value, schema, defs, where):
    """Types, choices and keys of a JSON schema that pydantic wrote."""
    schema = defs[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if "anyOf" in schema:
        kinds = [one.get("type") for one in schema["anyOf"]]
        schema = schema["anyOf"][kinds.index("null") if value is None else 0]
    types = {"integer": int, "number": int | float, "string": str, "boolean": bool, "array": list, "object": dict}
    types["null"] = type(None)
    assert isinstance(value, types[schema["type"]] if "type" in schema else object), f"{where}: {value!r}"
    assert value in schema.get("enum", [value]), f"{where}: {value!r}"
    for key, inner in value.items() if isinstance(value, dict) else ():
        check_schema(inner, schema["properties"][key], defs, f"{where}.{key}")
    for inner in value if isinstance(value, list) else ():
        check_schema(inner, schema["items"], defs, where)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_recipes_fit_the_schema_as_pyyaml_reads_them(config):
    """PyYAML reads 2e-3 as text, and 2.0e-3 as a number."""
    schema = json.loads((ROOT / "configs/run.schema.json").read_text())
    check_schema(yaml.safe_load(config.read_text()), schema, schema["$defs"], config.stem)


def test_recipe_headers_state_their_results():
    for config in CONFIGS:
        head = config.read_text().partition("# yaml-language-server")[0]
        assert head.startswith("# "), config
        assert re.search(r"(?<!not )\bmeasured|Published", head), config


def test_recipes_name_their_process():
    """Images train with flow matching: eps-prediction has wrong colours until training is long (docs/quality.md)."""
    for config in CONFIGS:
        process = yaml.safe_load(config.read_text())["diffusion"]["process"]
        assert process == ("ddpm" if config.stem == "digits" else "flow"), config
