"""Every command computes on a device that has no float64, such as Apple's GPUs."""

import json
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from no_float64 import Float64OnDevice, simulated

from diffusion_adagn.cli.main import main
from diffusion_adagn.evaluation.extractors import classifier
from diffusion_adagn.experiments import sweep_sections
from diffusion_adagn.models.unet import AdaGNUNet
from diffusion_adagn.trace import tracing
from diffusion_adagn.training import logger

SETTINGS = {
    "model.model_channels": 16, "model.channel_mult": "1", "model.num_res_blocks": 1, "model.attention_resolutions": 8,
    "model.num_head_channels": 16, "model.norm_groups": 4, "diffusion.learned_variance": "true", "data.flip": "true",
    "training.batch_size": 96, "training.max_steps": 1, "training.diagnostics_every": 1, "training.heldout_every": 1,
    "training.preview_every": 1, "training.preview_steps": 2, "training.preview_count": 1,
}  # fmt: skip


def adagn(*words):
    return main([*map(str, words), "--debug"])


def train(out, *more):
    return adagn("train", "--output_dir", out, *(f"--{k}={v}" for k, v in SETTINGS.items()), *more)


@pytest.fixture
def mac(monkeypatch):
    """Where torch says that there is an Apple GPU. Gives a list: where each call of a network was."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: None)
    monkeypatch.setattr(logger, "measure_peak_flops", lambda *_, **__: 1e12)
    for name, value in (("MIN_PASSES", 64), ("MAX_PASSES", 64)):  # a judge of one step
        monkeypatch.setattr(classifier, name, value)
    monkeypatch.setattr(tracing, "label_check", partial(tracing.label_check, evaluations=40))
    monkeypatch.setattr(tracing, "NUM_PROBED_TIMESTEPS", 2)
    monkeypatch.setattr(tracing, "SAMPLER_STEPS", 2)
    monkeypatch.setattr(tracing, "write_report", lambda results, out: [])  # it draws with NumPy
    monkeypatch.setattr(sweep_sections, "charts", lambda report: [])  # curves
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # accelerate sets it
    calls, denoise = [], AdaGNUNet.denoise

    def watched(unet, x, m):
        calls.append(x.device.type)
        return denoise(unet, x, m)

    monkeypatch.setattr(AdaGNUNet, "denoise", watched)
    AcceleratorState._reset_state(reset_partial_state=True)
    with simulated():
        yield calls
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run trained on the CPU."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert train(out, "--training.diagnostics_every=0", "--training.preview_every=0", "--training.heldout_every=0") == 0
    return out


def test_simulated_device_rejects_float64(mac):
    x = torch.ones(3).to("mps")
    module = torch.nn.Linear(3, 1).to("mps")
    module(x).sum().backward()
    assert x.device == (x + 1).device == module.weight.grad.device == torch.device("mps")
    assert torch.equal(x.cpu().double(), torch.ones(3, dtype=torch.float64)) and x.cpu().device.type == "cpu"
    for make in (
        x.double,
        lambda: x.sum(dtype=torch.float64),
        lambda: x.new_zeros(2, dtype=torch.float64),
        lambda: x * torch.ones(3, dtype=torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64).to("mps"),
        lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
    ):
        with pytest.raises(Float64OnDevice):
            make()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_training_needs_no_float64(tmp_path, mac):
    assert train(tmp_path / "run") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"label_gap_wrong", "heldout_loss", "loss_t1of5"} <= {key for line in lines for key in line}
    assert set(mac) == {"mps", "meta"}  # the FLOPs are counted on meta


def test_evaluating_needs_no_float64(tmp_path, trained, mac):
    assert adagn("evaluate", trained, "--out", tmp_path / "out", "--count", 12, "--steps", 2, "--guidance", 2) == 0
    assert set(mac) == {"mps"}


@pytest.mark.parametrize(
    "samplers", ["dpm++", pytest.param("ddim,ddpm,dpm++,unipc,euler,heun", marks=pytest.mark.slow)]
)
def test_sweeping_needs_no_float64(tmp_path, trained, mac, samplers):
    settings = ["--guidance", 2, "--steps", 2, "--sampler", samplers, "--extractor", "none", "--classes", "0,1"]
    assert adagn("sweep", trained, "--out", tmp_path / "out", "--count", 8, *settings) == 0
    assert set(mac) == {"mps"}


@pytest.mark.slow
def test_tracing_needs_no_float64(tmp_path, trained, mac):
    assert adagn("trace", trained, "--out", tmp_path / "out", "--timesteps", 3, "--images", 4) == 0
    assert set(mac) == {"mps"}
