"""The number type that evaluate and sweep sample in: bf16 on CUDA, fp32 elsewhere, and what a sweep began with."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation import points
from diffusion_adagn.experiments import sweep_sections

CUDA, CPU, MPS = torch.device("cuda"), torch.device("cpu"), torch.device("mps")


def on(device):
    return SimpleNamespace(device=device)


def test_auto_is_bf16_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(points, "has_bf16", lambda device: True)
    assert [points.choose_precision("auto", on(d)) for d in (CUDA, CPU, MPS)] == ["bf16", "fp32", "fp32"]
    assert points.choose_precision("fp32", on(CUDA)) == "fp32"
    monkeypatch.setattr(points, "has_bf16", lambda device: False)
    assert points.choose_precision("auto", on(CUDA)) == "fp32"


def test_what_was_recorded_decides_auto(monkeypatch):
    monkeypatch.setattr(points, "has_bf16", lambda device: True)
    assert points.choose_precision("auto", on(CUDA), "fp32") == "fp32"
    assert points.choose_precision("auto", on(CPU), "bf16") == "bf16"
    assert points.choose_precision("bf16", on(CUDA), "fp32") == "bf16"  # `_open_run_dir` rejects it
    with pytest.raises(InputError, match="--precision tf32"):
        points.choose_precision("auto", on(CPU), "tf32")


def test_networks_are_prepared_as_for_sampling():
    def pipe():
        return SimpleNamespace(to=lambda device: None, set_progress_bar_config=lambda **_: None, unet=tiny_unet())

    there, guide, here = pipe(), pipe(), pipe()
    points.set_up([there, guide], "bf16", CUDA)
    points.set_up([here, None], "fp32", CPU)
    for one in (there, guide, here):
        assert one.unet.memory_format == "channels_last"
        assert one.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "pipe"
    ClassConditionalPipeline(
        tiny_unet(), make_scheduler(DiffusionConfig()), LabelSpace(("0", "1", "2"))
    ).save_pretrained(folder)
    return str(folder)


def test_sweep_resumes_at_planned_precision(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep_sections, "charts", lambda report: [])  # they take most of the time
    out = tmp_path / "sweep"

    def sweep(scales, *more):
        words = "--extractor", "none", "--steps", "2", "--count", "3", "--classes", "0", "--out", str(out)
        return main(["sweep", model, "--guidance", scales, *words, *more])

    assert sweep("1", "--precision", "bf16") == 0 and sweep("1,2") == 0
    assert json.loads((out / "plan.json").read_text())["draw"]["precision"] == "bf16"
    assert all("bf16" in row for row in (out / "sweep.csv").read_text().splitlines()[1:])
    capsys.readouterr()
    assert sweep("1", "--precision", "fp32") == 1 and "precision: bf16 -> fp32" in capsys.readouterr().err
