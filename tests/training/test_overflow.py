"""fp16's scaler that has nothing left to shrink, and numbers that JSON does not have."""

import json
import math
from types import SimpleNamespace

import torch

from diffusion_adagn.config import SpeedConfig
from diffusion_adagn.training.logger import Metrics, compiled_parts
from diffusion_adagn.training.trainer import FUSED, is_nonfinite_gradient


def scaler(factor):
    return SimpleNamespace(get_scale=lambda: factor)


def test_overflow_counts_below_scale_one():
    for norm in (math.inf, math.nan):
        assert is_nonfinite_gradient(norm, None) and is_nonfinite_gradient(norm, scaler(0.5))
        assert not is_nonfinite_gradient(norm, scaler(65536.0)) and not is_nonfinite_gradient(norm, scaler(1.0))
    assert not is_nonfinite_gradient(3.0, None) and not is_nonfinite_gradient(3.0, scaler(0.5))


def test_nonfinite_metrics_become_null(tmp_path):
    file = tmp_path / "metrics.jsonl"
    Metrics(file).write(step=1, loss=0.5, grad_norm=math.inf, lr=math.nan)

    def reject(word):
        raise AssertionError(word)

    assert json.loads(file.read_text(), parse_constant=reject) == {
        "step": 1,
        "loss": 0.5,
        "grad_norm": None,
        "lr": None,
    }


def test_adamw_is_fused_where_available():
    supported = set(torch.utils._foreach_utils._get_fused_kernels_supported_devices())
    assert set(FUSED) == {"cpu", "cuda", "mps"} and set(FUSED) <= supported


def test_first_step_reports_compilation():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    fused, eager = SpeedConfig(operator="fused"), SpeedConfig(operator="eager")
    assert "Triton kernels compiled" in compiled_parts(fused, cuda)
    assert compiled_parts(eager, cuda) == compiled_parts(fused, cpu) == ""
    assert compiled_parts(SpeedConfig(operator="fused", compile=True), cuda) == "compiled"
