"""The guidance scale as an input of the network."""

import json

import pytest
import torch
from conftest import tiny_unet
from torch.nn import functional as F

from diffusion_adagn import AdaGNUNet
from diffusion_adagn.config import read_config
from diffusion_adagn.errors import InputError
from diffusion_adagn.models.embeddings import sinusoidal_embedding
from diffusion_adagn.runs.layout import network_config
from diffusion_adagn.sampling.pretrained import load_unet, model_hash

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T, Y, S = torch.tensor([0.0, 749.2, 999.0]), torch.tensor([0, 2, 1]), torch.tensor([1.0, 2.5, 4.0])
SMALL = {"sample_size": 8, "in_channels": 1, "num_classes": 3, "model_channels": 16, "channel_mult": (1, 2),
         "num_res_blocks": 1, "norm_groups": 4, "num_head_channels": 16}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"join": "concat"}, {"conditioning": "cross_attention"}])
def test_scale_is_added_to_the_vector_of_time(changes):
    unet = tiny_unet(max_guidance_scale=4.0, **changes)
    e = unet.embedding
    added = torch.stack([e.scale.weight @ sinusoidal_embedding(1000 / s[None], 16)[0] for s in S])
    vector = e.time(sinusoidal_embedding(T, 16)) + added
    if e.join is not None:
        classes = e.classes.weight[Y]
        vector = vector + classes if e.join == "sum" else torch.cat([vector, classes], dim=1)
    wanted = F.linear(F.silu(vector), unet.projection.weight, unet.projection.bias)
    torch.testing.assert_close(unet.project_condition(T, Y, guidance_scale=S)[0], wanted, atol=1e-5, rtol=1e-5)
    out = unet(X, T, Y, guidance_scale=S).sample
    assert torch.equal(out, unet.denoise(X, unet.modulation(T, Y, guidance_scale=S)))
    plain = unet(X, T, Y).sample
    assert torch.equal(out[:1], plain[:1]) and (out - plain)[1:].abs().max() > 1e-3  # none given is scale 1
    assert torch.equal(unet(X, T, Y, guidance_scale=2).sample, unet(X, T, Y, guidance_scale=torch.full((3,), 2)).sample)
    rows = unet.modulation(500, 1, guidance_scale=S)  # one timestep and class, three images
    torch.testing.assert_close(unet.denoise(X, rows), unet(X, 500, torch.tensor([1, 1, 1]), guidance_scale=S).sample)


def test_null_label_is_at_scale_1():
    unet, null = tiny_unet(max_guidance_scale=4.0), torch.full((3,), 3)
    assert torch.equal(unet(X, T, null, guidance_scale=S).sample, unet(X, T, null).sample)
    weights = F.one_hot(null, 4).float()  # a soft label may be partly null
    assert not torch.equal(unet(X, T, weights, guidance_scale=S).sample, unet(X, T, weights).sample)


def test_network_without_it_is_the_network_of_before(tmp_path):
    networks = {}
    for largest in (None, 4.0):
        torch.manual_seed(3)
        networks[largest] = AdaGNUNet(**SMALL, max_guidance_scale=largest)
    states = {largest: unet.state_dict() for largest, unet in networks.items()}
    added = states[4.0].pop("embedding.scale.weight")
    assert added.shape == (64, 16) and not added.any()  # so the scale changes nothing at first
    assert states[None].keys() == states[4.0].keys()
    assert all(torch.equal(v, states[4.0][k]) for k, v in states[None].items())
    networks[4.0].save_pretrained(tmp_path)
    assert load_unet(tmp_path).config.max_guidance_scale == 4
    networks[None].save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "max_guidance_scale"}))
    old = load_unet(tmp_path)
    assert old.config.max_guidance_scale is None
    assert model_hash(old) == model_hash(networks[None]) != model_hash(networks[4.0])


def test_gradients():
    unet = tiny_unet(max_guidance_scale=4.0).train()
    unet(X, T, Y, guidance_scale=S).sample.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in unet.parameters())


@pytest.mark.parametrize(
    ("changes", "scale", "message"),
    [
        ({}, S, "takes no guidance_scale .* Guide with two passes"),
        ({"max_guidance_scale": 4.0}, torch.tensor([1.0, 2.0]), "2 guidance scales were given for 3 timesteps"),
        ({"max_guidance_scale": 3.0}, S, "trained for 1 to 3, not 4"),
        ({"max_guidance_scale": 3.0}, 0.5, "trained for 1 to 3, not 0.5"),
    ],
)
def test_wrong_scales_are_rejected(changes, scale, message):
    with pytest.raises(InputError, match=message):
        tiny_unet(**changes)(X, T, Y, guidance_scale=scale)


@pytest.mark.parametrize("changes", [{"num_classes": None}, {"null_class": False}, {"conditioning": "none"}])
def test_needs_a_null_class(changes):
    with pytest.raises(InputError, match=r"model.max_guidance_scale needs a class and a null class"):
        AdaGNUNet(**SMALL | {"max_guidance_scale": 4.0} | changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training.teacher": "runs/a"}, "teacher runs/a has no effect without model.max_guidance_scale"),
        ({"training.teacher_rule": "tcfg"}, "teacher_rule has no effect"),
        ({"model.max_guidance_scale": "1"}, "model.max_guidance_scale: must be greater than 1|above 1"),
        ({"model.max_guidance_scale": "4", "model.null_class": "false", "training.label_dropout": "0"}, "needs a class"),
        ({"model.max_guidance_scale": "4", "training.label_dropout": "0"}, "never trains the null label"),
        ({"model.max_guidance_scale": "4", "training.teacher_rule": "tcfg"}, "there is none: give training.teacher"),
        ({"model.max_guidance_scale": "4", "init_from": "a", "training.teacher": "none", "training.teacher_rule": "tcfg"},
         "there is none"),
    ],
)  # fmt: skip
def test_wrong_settings_are_rejected(settings, message):
    with pytest.raises(InputError, match=message):
        read_config(None, settings)


def test_run_config():
    images = {"data.image_size": "8", "data.channels": "1", "model.max_guidance_scale": "4"}
    config = read_config(None, images)
    config.labels = {"names": ["a", "b"]}
    assert config.teacher is None and network_config(config)["max_guidance_scale"] == 4
    teachers = {"auto": "runs/a", "none": None, "runs/b": "runs/b"}
    for given, meant in teachers.items():
        assert read_config(None, images | {"init_from": "runs/a", "training.teacher": given}).teacher == meant
