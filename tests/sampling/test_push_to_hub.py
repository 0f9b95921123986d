"""Uploading: what the hub receives is what `from_pretrained` reads, with our card."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import tiny_unet

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that copies what is uploaded to a folder."""
    asked = {}

    def create_repo(repo_id, **settings):
        asked["repo"] = {"repo_id": repo_id, **settings}
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(repo_id, folder_path, **settings):
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
        return f"commit of {repo_id}"

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    return SimpleNamespace(asked=asked, folder=tmp_path / "hub")


def make_pipe():
    return ClassConditionalPipeline(tiny_unet(), make_scheduler(DiffusionConfig()), LabelSpace(("cat", "dog", "tench")))


def check(folder):
    assert json.loads((folder / "model_index.json").read_text())["unet"] == ["diffusion_adagn", "AdaGNUNet"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusion_adagn\n") and "| classes | cat, dog, tench |" in card
    assert ClassConditionalPipeline.from_pretrained(folder).labels.names == ("cat", "dog", "tench")


def test_upload_holds_model_and_card(hub):
    assert make_pipe().push_to_hub("me/pets", private=True) == "commit of me/pets"
    assert hub.asked["repo"] == {"repo_id": "me/pets", "private": True, "token": None, "exist_ok": True}
    check(hub.folder / "me/pets")


def test_saving_uploads_the_finished_folder(hub, tmp_path):
    make_pipe().save_pretrained(tmp_path / "pets", push_to_hub=True, repo_id="me/pets")
    check(hub.folder / "me/pets")
    assert not (tmp_path / "pets" / "README.md").exists()
