"""The augmentation parameters as an input of the network."""

import json

import pytest
import torch
from conftest import tiny_unet
from torch.nn import functional as F

from diffusion_adagn import AdaGNUNet
from diffusion_adagn.config import read_config
from diffusion_adagn.errors import InputError
from diffusion_adagn.labels import LabelSpace
from diffusion_adagn.models.conditioning import CONDITIONING
from diffusion_adagn.models.embeddings import sinusoidal_embedding
from diffusion_adagn.runs.layout import network_config
from diffusion_adagn.sampling.pretrained import load_unet, model_hash

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T, Y = torch.tensor([0.0, 749.2, 999.0]), torch.tensor([0, 2, 3])
A = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
SMALL = {"sample_size": 8, "in_channels": 1, "num_classes": 3, "model_channels": 16, "channel_mult": (1, 2),
         "num_res_blocks": 1, "norm_groups": 4, "num_head_channels": 16}  # fmt: skip


@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_parameters_enter_before_the_timestep_mlp(conditioning):
    unet = tiny_unet(augment_dim=9, conditioning=conditioning)
    e = unet.embedding
    hidden = sinusoidal_embedding(T, 16) + torch.stack(
        [sum(a[i] * e.augment.weight[:, i] for i in range(9)) for a in A]
    )
    time = F.linear(F.silu(F.linear(hidden, e.time[0].weight, e.time[0].bias)), e.time[2].weight, e.time[2].bias)
    vector = time + e.classes.weight[Y] if conditioning not in ("cross_attention", "none") else time
    wanted = F.linear(F.silu(vector), unet.projection.weight, unet.projection.bias)
    torch.testing.assert_close(unet.project_condition(T, Y, augment=A)[0], wanted, atol=1e-5, rtol=1e-5)
    out = unet(X, T, Y, augment=A).sample
    assert torch.equal(out, unet.denoise(X, unet.modulation(T, Y, augment=A)))
    assert (out - unet(X, T, Y).sample).abs().max() > 1e-3
    assert torch.equal(unet(X, T, Y, augment=torch.zeros(3, 9)).sample, unet(X, T, Y).sample)  # absent is zero
    torch.testing.assert_close(unet(X, T, Y, augment=A[:1].expand(3, 9)).sample, unet(X, T, Y, augment=A[:1]).sample)
    rows = unet.modulation(500, 1, augment=A)  # one timestep and class, three images
    torch.testing.assert_close(unet.denoise(X, rows), unet(X, 500, torch.tensor([1, 1, 1]), augment=A).sample)


def test_network_without_it_is_the_network_of_before(tmp_path):
    networks = {}
    for dim in (0, 9):
        torch.manual_seed(3)
        networks[dim] = AdaGNUNet(**SMALL, augment_dim=dim)
    states = {dim: unet.state_dict() for dim, unet in networks.items()}
    added = states[9].pop("embedding.augment.weight")
    assert added.shape == (16, 9) and not added.any()
    assert states[0].keys() == states[9].keys() and all(torch.equal(v, states[9][k]) for k, v in states[0].items())
    assert [n for n, _ in networks[9].named_parameters() if "augment" in n] == ["embedding.augment.weight"]  # no bias
    networks[9].save_pretrained(tmp_path)
    assert load_unet(tmp_path).config.augment_dim == 9
    networks[0].save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "augment_dim"}))
    old = load_unet(tmp_path)
    assert old.config.augment_dim == 0 and model_hash(old) == model_hash(networks[0]) != model_hash(networks[9])


def test_gradients():
    unet = tiny_unet(augment_dim=9).train()
    unet(X, T, Y, augment=A).sample.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in unet.parameters())


def test_run_config():
    labels = LabelSpace(("a", "b")).to_dict()
    for augment, dim in (("0", 0), ("0.12", 9)):
        config = read_config(None, {"data.augment": augment, "data.image_size": "8", "data.channels": "1"})
        config.labels = labels
        assert network_config(config)["augment_dim"] == dim
    with pytest.raises(InputError, match=r"data.augment: must be at most 1, got '?12"):
        read_config(None, {"data.augment": "12"})


@pytest.mark.parametrize(
    ("dim", "augment", "message"),
    [
        (0, A, "takes no augmentation parameters .* do not pass augment"),
        (9, A[:, :8], r"numbers \[B, 9\] .* not torch.float32 \[3, 8\]"),
        (9, A.long(), "not torch.int64"),
        (9, A[0], r"\[9\]"),
        (9, A[:2], "2 rows of augment were given for 3 timesteps"),
    ],
)
def test_wrong_parameters_are_rejected(dim, augment, message):
    with pytest.raises(InputError, match=message):
        tiny_unet(augment_dim=dim)(X, T, Y, augment=augment)
