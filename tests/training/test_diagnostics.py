"""What a run says of its condition as it goes."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_unet
from tiny_run import run

from diffusion_adagn import LabelSpace
from diffusion_adagn.config import DiffusionConfig, RunConfig, TrainingConfig
from diffusion_adagn.diffusion.loss import DiffusionLoss
from diffusion_adagn.diffusion.schedule import make_process
from diffusion_adagn.training.diagnostics import ConditioningDiagnostics

LABELS = LabelSpace(("cat", "dog", "eel"))
OBJECTIVE = DiffusionLoss(make_process(DiffusionConfig()))


class Alone:
    """One process."""

    is_main_process = True

    def reduce(self, tensor, _):
        return tensor


def signals(unet=None, **training):
    unet = unet or tiny_unet()
    config = RunConfig(training=TrainingConfig(**training), labels=LABELS.to_dict())
    trainer = SimpleNamespace(
        unet=unet, ema=SimpleNamespace(model=unet), loss=OBJECTIVE, config=config, accelerator=Alone()
    )
    return ConditioningDiagnostics(trainer, None)


def test_losses_by_timestep_and_class():
    s = signals()
    t, y = torch.tensor([0, 199, 200, 999]), torch.tensor([0, 1, 1, 3])
    s.add(torch.tensor([1.0, 3.0, 5.0, 7.0]), t.double() / 1000, y)
    s.add(torch.tensor([9.0]), torch.tensor([0.25]), torch.tensor([0]))
    got = s.read()
    assert got["loss_t1of5"] == 2 and got["loss_t2of5"] == 7 and got["loss_t5of5"] == 7 and "loss_t3of5" not in got
    assert got["loss_class/cat"] == 5 and got["loss_class/dog"] == 4 and got["loss_class/null"] == 7
    assert "loss_class/eel" not in got
    s.add(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2]))
    assert s.read()["loss_t1of5"] == 1  # since the last look


def test_gradients_split_by_path():
    unet = tiny_unet(conditioning="cross_attention").train()
    unet(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 1])).sample.square().sum().backward()
    path = [
        p.grad for n, p in unet.named_parameters() if n.split(".")[0] in ("embedding", "projection", "token_projection")
    ]
    rest = [
        p.grad
        for n, p in unet.named_parameters()
        if n.split(".")[0] in ("conv_in", "down", "middle", "up", "norm_out", "conv_out")
    ]
    assert len(path) + len(rest) == len(list(unet.parameters()))
    norms = [math.sqrt(sum(g.double().square().sum().item() for g in some)) for some in (path, rest)]
    whole = math.hypot(*norms)
    got = signals(unet).gradient_norms(norm=2 * whole)  # as if clipping had halved it
    assert got["grad_norm_condition"] == pytest.approx(2 * norms[0]) and got["grad_norm_trunk"] == pytest.approx(
        2 * norms[1]
    )


def test_modulation_statistics():
    unet = tiny_unet()
    got = signals(unet).read()
    assert got["dead_channels"] == 0 and got["rms_gamma"] > 0 and got["rms_beta"] > 0
    with torch.no_grad():
        first = unet.get_submodule(unet.sites()[0].name)
        first.weight[:4] = 0
    channels = sum(s.channels for s in unet.sites())
    assert signals(unet).read()["dead_channels"] == pytest.approx(4 / channels)
    with torch.no_grad():
        unet.projection.weight.zero_()
        unet.projection.bias.fill_(0.5)
    got = signals(unet).read()
    assert got["rms_gamma"] == got["rms_beta"] == pytest.approx(0.5)
    assert "dead_channels" not in signals(tiny_unet(conditioning="additive")).read()


def test_unused_label_warns_once():
    unused = {"label_gap_wrong": 0.001, "label_gap_wrong_ci95": 0.002}
    used = {"label_gap_wrong": 0.003, "label_gap_wrong_ci95": 0.002}
    s = signals(warn_label_unused_after=100)
    assert s.warning(99, unused) is None and s.warning(100, used) is None and s.warning(100, {}) is None
    assert "shows no use" in s.warning(100, unused)
    assert s.warning(200, unused) is None
    nan = {"label_gap_wrong": math.nan, "label_gap_wrong_ci95": math.nan}  # nothing could be measured
    assert signals(warn_label_unused_after=100).warning(100, nan) is None
    assert "misleads" in signals(warn_label_unused_after=100).warning(
        100, {"label_gap_wrong": -0.1, "label_gap_wrong_ci95": 0.01}
    )
    assert signals(warn_label_unused_after=0).warning(10**6, unused) is None


def lines(out, key):
    return [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if key in line]


def test_diagnostics_change_no_loss(tmp_path, capsys):
    assert run(tmp_path / "with", training__diagnostics_every=3, training__warn_label_unused_after=3) == 0
    shown = capsys.readouterr()
    assert "shows no use" in shown.out + shown.err
    assert run(tmp_path / "without", training__diagnostics_every=0) == 0
    a, b = ([(x["step"], x["loss"]) for x in lines(tmp_path / n, "loss")] for n in ("with", "without"))
    assert a == b
    seen = lines(tmp_path / "with", "label_gap_wrong")
    assert [x["step"] for x in seen] == [3, 6]
    assert {"grad_norm_condition", "rms_gamma", "heldout_loss_true", "label_gap_null"} <= set(seen[0])
    assert not lines(tmp_path / "without", "rms_gamma")
    assert run(tmp_path / "none", training__diagnostics_every=3, data__heldout_fraction=0) == 0
    assert lines(tmp_path / "none", "rms_gamma") and not lines(tmp_path / "none", "label_gap_wrong")


def test_resumed_run_logs_same_diagnostics(tmp_path):
    run(tmp_path / "whole", training__diagnostics_every=4)
    run(tmp_path / "parts", training__diagnostics_every=4, training__max_steps=3)
    run(tmp_path / "parts", "--resume", "auto", training__diagnostics_every=4)
    assert lines(tmp_path / "whole", "rms_gamma") == lines(tmp_path / "parts", "rms_gamma") != []
