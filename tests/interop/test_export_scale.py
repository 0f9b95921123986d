"""A network that reads the guidance scale, exported at one scale."""

import json

import numpy as np
import pytest
import torch
from conftest import run_command, tiny_unet
from diffusers import DiffusionPipeline

from diffusion_adagn import ClassConditionalPipeline, Guidance, InputError, LabelSpace
from diffusion_adagn.cli import export as export_command
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.interop.export import export_diffusers, open_diffusers
from diffusion_adagn.interop.unet2d import to_unet2d
from diffusion_adagn.sampling.fixed_scale import fix_scale

LABELS = LabelSpace(("cat", "dog", "owl"))
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T, Y = torch.tensor([3.0, 500.0, 900.0]), torch.tensor([0, 1, 2])


def pipeline(**changes):
    unet = tiny_unet(**{"max_guidance_scale": 4.0} | changes)
    unet.conv_out.weight.data *= 0.2
    pipe = ClassConditionalPipeline(unet, make_scheduler(DiffusionConfig()), LABELS, ema_decay=0.99, trained_steps=7)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("conditioning", ["adagn", "additive"])
@pytest.mark.parametrize("scale", [1, 2.5, 4])
def test_stock_network_is_the_network_at_the_scale(conditioning, scale):
    pipe = pipeline(conditioning=conditioning)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    fixed = fix_scale(pipe, scale)
    wanted = pipe.unet(X, T, Y, guidance_scale=scale).sample
    torch.testing.assert_close(fixed.unet(X, T, Y).sample, wanted, atol=1e-4, rtol=0)
    stock = to_unet2d(fixed.unet)
    assert type(stock).__name__ == "UNet2DModel" and not fixed.one_pass
    torch.testing.assert_close(stock(X, T, Y).sample, wanted, atol=1e-4, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    assert fixed.labels.has_null == (scale == 1) and len(stock.class_embedding.weight) == 3 + (scale == 1)


def test_network_at_scale_1_is_guided_in_two_passes():
    pipe = pipeline()
    fixed = fix_scale(pipe, 1)
    cond, null = (pipe.unet(X, T, y).sample for y in (Y, torch.full((3,), 3)))
    assert fixed("cat", guidance=Guidance(3.0, rule="tcfg"), num_inference_steps=2, seeds=0).images
    torch.testing.assert_close(fixed.unet(X, T, Y).sample, cond, atol=1e-4, rtol=0)
    torch.testing.assert_close(fixed.unet(X, T, torch.full((3,), 3)).sample, null, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="guidance needs a null class"):
        fix_scale(pipe, 2)("cat", 3.0, 2)


def test_exported_folder_samples_the_same_in_one_pass(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "ours")
    assert run_command(export_command, [str(tmp_path / "ours"), str(tmp_path / "theirs"), "--scale", "2"]) == 0
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "theirs", trust_remote_code=True)
    theirs.set_progress_bar_config(disable=True)
    calls = []
    theirs.unet.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    images = theirs(["cat", "owl"], seeds=0, num_inference_steps=5, output_type="np").images
    wanted = pipe(["cat", "owl"], 2.0, 5, seeds=0, output_type="np").images
    assert np.abs(images - wanted).max() < 1e-4 and calls == [2] * 5
    with pytest.raises(ValueError, match="has guidance scale 2 in its weights: only guidance_scale=1 is possible"):
        theirs("cat", guidance_scale=3.0)
    assert "guidance scale 2 is part of the weights" in (tmp_path / "theirs/README.md").read_text()
    assert json.loads((tmp_path / "theirs/model_index.json").read_text())["record"]["scale"] == 2
    back = open_diffusers(tmp_path / "theirs")
    back.set_progress_bar_config(disable=True)
    again = back(["cat", "owl"], seeds=0, num_inference_steps=5, output_type="np").images
    assert np.abs(again - wanted).max() < 1e-4 and "scale 2 is part of the weights" in back.config.guidance_convention
    assert back.config.labels["has_null"] is False


def test_export_without_a_scale_is_rejected_with_the_advice(tmp_path):
    pipeline().save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match="it reads the guidance scale: fix one, such as --scale 2"):
        export_diffusers(tmp_path / "ours", tmp_path / "theirs")
    with pytest.raises(InputError, match="trained for 1 to 4, not 8"):
        export_diffusers(tmp_path / "ours", tmp_path / "theirs", scale=8)
    pipeline(max_guidance_scale=None).save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="does not read the guidance scale, so none can be fixed"):
        export_diffusers(tmp_path / "plain", tmp_path / "theirs", scale=2)
    assert not (tmp_path / "theirs").exists()
