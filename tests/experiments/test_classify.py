"""`adagn classify` on the shipped model: labelled images, files of unknown class, wrong input."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusion_adagn.cli.main import main
from diffusion_adagn.data import open_dataset


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_heldout_images(here, capsys):
    assert main(["classify", "digits", "--count", "6", "--draws", "4", "--device", "cpu"]) == 0
    record = json.loads((here / "classify/pretrained/digits/classify.json").read_text())
    labels = open_dataset({"source": "digits"}, "heldout").labels
    index = [int(row["image"]) for row in record["images"]]
    assert index == [i * len(labels) // 6 for i in range(6)]
    assert [row["label"] for row in record["images"]] == [str(labels[i]) for i in index]
    hits = [row["class"] == row["label"] for row in record["images"]]
    assert record["accuracy"] == np.mean(hits) >= 5 / 6
    assert record["evaluations_per_image"] == 40 + 16 * 6 * 10 / 6
    assert [one["evaluations"] for one in record["curve"]] == [170, 180, 200]
    assert record["curve"][-1]["accuracy"] == record["accuracy"]
    assert Image.open(here / "classify/pretrained/digits/classify.png").width > 1280
    assert (here / "classify/pretrained/digits/classify.svg").is_file()
    out = capsys.readouterr().out
    assert f"{sum(hits)} of 6 images" in out and "adagn trace digits" in out


def test_another_folder_without_a_test_split(here, capsys):
    pixels, labels = open_dataset({"source": "digits"}, "heldout").gather(np.arange(40))
    for i, (image, label) in enumerate(zip(pixels, labels)):
        (here / f"mine/{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(here / f"mine/{label}/{i}.png")
    classify = ["classify", "digits", "--against", "mine", "--draws", "4", "--device", "cpu"]
    assert main([*classify, "--data.heldout_fraction", "0.5", "--out", "found"]) == 0
    found = len(json.loads((here / "found/classify.json").read_text())["images"])
    assert 10 <= found <= 30 and f"note: {found} images of mine are used" in capsys.readouterr().out


def test_image_files(here, capsys):
    pixels, labels = open_dataset({"source": "digits"}, "heldout").gather(np.arange(2))
    (here / "some/deep").mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image[..., 0]).resize((32, 32)).convert("RGB").save(here / f"some/deep/{i}.png")
    assert main(["classify", "digits", "--images", "some", "--draws", "8", "--out", "found", "--device", "cpu"]) == 0
    record = json.loads((here / "found/classify.json").read_text())
    assert [row["class"] for row in record["images"]] == [str(i) for i in labels]
    assert "accuracy" not in record and not (here / "found/classify.png").exists()
    assert "some/deep/1.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nosuch"], "nosuch does not exist"),
        (["--images", "empty"], "empty contains no images"),
        (["--images", "broken.png"], "broken image broken.png"),
        (["--images", "empty", "--against", "digits"], "give either --images"),
        (["--draws", "3"], "--draws: must be at least 4"),
    ],
)
def test_wrong_input(here, capsys, options, message):
    (here / "empty").mkdir()
    (here / "broken.png").write_bytes(b"no image")
    assert main(["classify", "digits", *options]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (here / "classify").exists()
