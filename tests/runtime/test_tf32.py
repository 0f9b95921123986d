"""TF32 is decided by the precision, in one place, wherever a network is computed; and cuDNN stays on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import DiffusionConfig, SpeedConfig
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation.extractors.base import NetworkExtractor
from diffusion_adagn.evaluation.points import PointSampler, SamplePlan
from diffusion_adagn.experiments import ablation
from diffusion_adagn.models.unet import AdaGNUNet
from diffusion_adagn.runs.layout import RunFolder
from diffusion_adagn.runtime import precision as precision_module
from diffusion_adagn.runtime import speed
from diffusion_adagn.sampling.guidance import Guidance
from diffusion_adagn.sampling.settings import SamplerSettings
from diffusion_adagn.trace import tracing
from diffusion_adagn.training import setup

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FULL, FAST = (True, False, "ieee"), (True, True, "tf32")


def flags():
    """Whether cuDNN is on; whether TF32 is, in both of torch's ways, which agree."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    words = {cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision}
    assert cudnn.allow_tf32 == matmul.allow_tf32 and len(words) == 1
    assert torch.get_float32_matmul_precision() == ("high" if matmul.allow_tf32 else "highest")
    return cudnn.enabled, cudnn.allow_tf32, words.pop()


@pytest.fixture
def as_before():
    """What the test sets, and what it must find again."""
    before = precision_module._tf32_state()
    yield before
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
    precision_module._set_tf32(*before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "pipe"
    pipe_of().save_pretrained(folder)
    return folder


def pipe_of():
    pipe = ClassConditionalPipeline(tiny_unet(), make_scheduler(DiffusionConfig()), LabelSpace(("cat", "dog", "bird")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def seen(monkeypatch):
    """The flags of every call of a network."""
    seen, real = set(), AdaGNUNet.denoise

    def denoise(unet, x, m):
        if not x.is_meta:  # its cost is counted
            seen.add(flags())
        return real(unet, x, m)

    monkeypatch.setattr(AdaGNUNet, "denoise", denoise)
    return seen


@pytest.fixture
def pretended(monkeypatch):
    """This CPU has TF32, so that the word is taken."""
    monkeypatch.setattr(precision_module, "has_tf32", lambda device: True)


def test_precision_sets_and_restores_flags(as_before):
    for precision, wanted in {"fp32": FULL, "bf16": FULL, "fp16": FULL, "tf32": FAST}.items():
        with precision_module.use_precision(precision, CPU):
            assert flags() == wanted
            assert torch.is_autocast_enabled("cpu") == (precision in ("bf16", "fp16"))
            with precision_module.use_precision("tf32", CPU):
                assert flags() == FAST
            assert flags() == wanted
        assert precision_module._tf32_state() == as_before
    with pytest.raises(ZeroDivisionError), precision_module.use_tf32(True):
        1 / 0  # noqa: B018
    assert precision_module._tf32_state() == as_before


@pytest.mark.parametrize("output", ["old", "new", "both", "parent", "medium"])
def test_settings_of_the_caller_come_back(as_before, output):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if output in ("old", "both"):
        cudnn.allow_tf32, matmul.allow_tf32 = False, True
    if output in ("new", "both"):
        cudnn.conv.fp32_precision = matmul.fp32_precision = "ieee"
    if output == "parent":
        cudnn.fp32_precision = "tf32"
    if output == "medium":
        torch.set_float32_matmul_precision("medium")
    before, products = precision_module._tf32_state(), torch.backends.mkldnn.matmul.fp32_precision
    for on in (False, True):
        with precision_module.use_tf32(on):
            assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == on
            assert cudnn.conv.fp32_precision == matmul.fp32_precision == ("tf32" if on else "ieee")
        after = precision_module._tf32_state()
        assert all(b in (None, a) for a, b in zip(after, before))  # None: torch raised
        assert torch.backends.mkldnn.matmul.fp32_precision == products  # the CPU's


def test_tf32_needs_cuda(monkeypatch):
    asked = SpeedConfig(precision="tf32", operator="eager")
    for device in (CPU, CUDA, torch.device("mps")):
        if not precision_module.has_tf32(device):
            with pytest.raises(InputError, match=r"speed.precision tf32 needs a CUDA GPU .*Ampere.*use fp32"):
                speed.resolve_speed(asked, device, 1)
    monkeypatch.setattr(precision_module, "has_tf32", lambda device: device.type == "cuda")
    chosen = speed.resolve_speed(asked, CUDA, 1)
    assert (chosen.precision, chosen.memory_format) == ("tf32", "channels_last")
    assert speed.describe_speed(chosen, asked).startswith("tf32, channels_last, eager operator")
    assert speed.resolve_speed(SpeedConfig(operator="eager"), CPU, 1).precision == "fp32"  # auto never takes it


@pytest.mark.parametrize("command", ["sample", "evaluate", "sweep"])
def test_commands_reject_tf32_early(model, tmp_path, command, monkeypatch):
    monkeypatch.setattr(precision_module, "has_tf32", lambda device: False)
    with pytest.raises(InputError, match="precision tf32 needs a CUDA GPU"):
        main([command, str(model), "--precision", "tf32", "--out", str(tmp_path / "out"), "--debug"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision, wanted", [("fp32", FULL), ("tf32", FAST)])
def test_tf32_samples_are_recorded(model, tmp_path, seen, pretended, as_before, precision, wanted):
    out = tmp_path / "out"
    words = "--classes", "cat", "--count", "1", "--steps", "2", "--batch_size", "auto", "--precision", precision
    assert main(["sample", str(model), "--out", str(out), *words, "--debug"]) == 0
    assert seen == {wanted} and precision_module._tf32_state() == as_before
    assert {i["precision"] for i in json.loads((out / "samples.json").read_text())["images"]} == {precision}


class Recording(NetworkExtractor):
    name, resize = "recording", "none"

    def __init__(self):
        super().__init__(torch.nn.Conv2d(1, 2, 1), 2, 8, "cpu", {})
        self.seen = []

    def forward(self, x):
        self.seen.append((*flags(), torch.is_autocast_enabled("cpu")))
        return self.network(x.float()).mean((2, 3)), None


def test_extractors_keep_cudnn_and_float32(as_before):
    extractor = Recording()
    with torch.autocast("cpu", torch.bfloat16), precision_module.use_tf32(True):
        assert extractor(np.zeros((2, 8, 8, 1), np.uint8)).pooled.dtype == np.float32
        assert flags() == FAST and torch.is_autocast_enabled("cpu")
    assert extractor.seen == [(*FULL, False)] and precision_module._tf32_state() == as_before


@pytest.mark.parametrize("precision, wanted", [("fp32", FULL), ("tf32", FAST)])
def test_evaluation_measures_in_float32(seen, as_before, precision, wanted):
    extractor, draw = Recording(), SamplePlan((0, 1), count=2, precision=precision)
    PointSampler(pipe_of(), SamplerSettings(Guidance(2.0), steps=2), draw, [extractor])._batch(range(2))
    assert seen == {wanted} and extractor.seen == [(*FULL, False)] and precision_module._tf32_state() == as_before
    assert draw.to_dict()["precision"] == precision


def test_measurements_use_full_fp32(monkeypatch, as_before):
    def opened(*_):
        assert flags() == FULL
        raise InputError("opened")

    for module, name in ((tracing, "_open"), (ablation, "open_pipeline")):
        monkeypatch.setattr(module, name, opened)
    member = ablation.Member("adagn", 0, RunFolder(Path("nowhere")))
    for entry in (
        lambda: tracing.trace("m", Path("nowhere"), tracing.TraceRequest()),
        lambda: tracing.check("m", tracing.TraceRequest()),
        lambda: ablation._measure(member, None, None, None),
    ):
        with pytest.raises(InputError, match="opened"), precision_module.use_tf32(True):
            entry()
    assert precision_module._tf32_state() == as_before


@pytest.mark.parametrize("precision, wanted", [("tf32", FAST), pytest.param("fp32", FULL, marks=pytest.mark.slow)])
def test_training_uses_tf32(tmp_path, seen, pretended, as_before, monkeypatch, precision, wanted):
    mixed, real = [], setup.Accelerator
    monkeypatch.setattr(setup, "Accelerator", lambda **how: mixed.append(how["mixed_precision"]) or real(**how))
    words = {
        "speed.precision": precision, "model.model_channels": 16, "model.num_res_blocks": 1, "model.norm_groups": 4,
        "model.channel_mult": "1,2", "model.num_head_channels": 16, "training.max_steps": 1, "training.batch_size": 2,
        "training.preview_every": 0,
    }  # fmt: skip
    assert (
        main(["train", "--output_dir", str(tmp_path / "run"), *(f"--{k}={v}" for k, v in words.items()), "--debug"])
        == 0
    )
    assert seen == {wanted} and mixed == ["no"] and precision_module._tf32_state() == as_before
    assert f"precision: {precision}" in (tmp_path / "run/config.yaml").read_text()
