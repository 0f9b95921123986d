"""adagn push: what the hub receives."""

import json

import huggingface_hub
import pytest
import yaml
from conftest import one_line
from PIL import Image

from diffusion_adagn import ClassConditionalPipeline
from diffusion_adagn.cli.main import main
from diffusion_adagn.sampling.pretrained import model_hash


@pytest.fixture
def uploaded(monkeypatch):
    """Uploads by repository: the files' names, and the card."""
    uploads = {}

    def upload_folder(repo_id, folder_path, **settings):
        from pathlib import Path

        files = {file.name for file in Path(folder_path).rglob("*") if file.is_file()}
        uploads[repo_id] = files, Path(folder_path, "README.md").read_text(), settings
        return f"https://hub/{repo_id}"

    class Repo:
        def __init__(self, repo_id, **settings):
            self.repo_id = repo_id

    monkeypatch.setattr(huggingface_hub, "create_repo", Repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    return uploads


@pytest.fixture
def evaluation(tmp_path):
    """An evaluation of the shipped digits."""
    weights = model_hash(ClassConditionalPipeline.from_pretrained("digits").unet)
    frechet = {"title": "Frechet distance (classifier)", "value": 0.1414, "standard_error": 0.017}
    record = {"date": "2026-11-28", "notes": [], "memorisation": None, "command": "adagn evaluate digits", "count": 1000,
              "metrics": {"frechet": frechet, "kid": {"title": "Kernel distance", "value": None}},
              "model": {"hash": weights}, "reference": {"name": "digits:train"}}  # fmt: skip
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/evaluation.json").write_text(json.dumps(record))
    return tmp_path / "evaluation"


def test_card_has_numbers_and_image(uploaded, evaluation, tmp_path, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "grid.png")
    argv = ["push", "digits", "me/digits", "--evaluation", str(evaluation), "--image", str(tmp_path / "grid.png")]
    assert main([*argv, "--license", "mit", "--private"]) == 0
    assert "https://hub/me/digits" in capsys.readouterr().out
    files, card, _ = uploaded["me/digits"]
    assert {"model_index.json", "samples.png", "README.md", "diffusion_pytorch_model.safetensors"} <= files
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit" and front["datasets"] == ["digits"]
    assert front["widget"] == [{"output": {"url": "samples.png"}}]
    (metric,) = front["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == 0.1414 and "| Frechet distance (classifier) | 0.1414 | 0.017 |" in card
    assert "![Samples](samples.png)" in card and "1,000 images against digits:train" in card


def test_card_without_evaluation(uploaded):
    assert main(["push", "digits", "me/digits"]) == 0
    _, card, _ = uploaded["me/digits"]
    assert "No quality figure was measured" in card and "model-index" not in card and "license" not in card


def test_evaluation_of_other_weights_is_rejected(uploaded, evaluation, capsys):
    file = evaluation / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": {"hash": "abc"}}))
    assert main(["push", "digits", "me/digits", "--evaluation", str(evaluation)]) == 1
    assert "measures other weights (hash abc" in one_line(capsys.readouterr().err) and not uploaded


@pytest.mark.parametrize(
    ("argv", "words", "status"),
    [
        (["digits", "digits"], "expected OWNER/NAME", 2),
        (["digits", "me/digits", "--image", "no.png"], "there is no image no.png", 1),
        (
            ["digits", "me/digits", "--evaluation", "nowhere"],
            "nowhere has no evaluation.json: --evaluation is a folder",
            1,
        ),
        (["nowhere", "me/digits"], "nowhere", 1),
    ],
)
def test_wrong_arguments_are_rejected(uploaded, capsys, argv, words, status):
    assert main(["push", *argv]) == status
    assert words in one_line(capsys.readouterr().err) and not uploaded


def test_failed_upload_is_explained(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "create_repo", fail)
    assert main(["push", "digits", "me/digits"]) == 1
    assert "the hub cannot be reached" in one_line(capsys.readouterr().err)
