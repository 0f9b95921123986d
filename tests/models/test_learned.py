"""A learned class changes the rows that are conditioned on it, and nothing else."""

import pytest
import torch
from conftest import new_class, tiny_unet
from torch.nn import functional as F

from diffusion_adagn.errors import InputError
from diffusion_adagn.models.conditioning import CONDITIONING
from diffusion_adagn.models.learned import LearnedClass, LowRank, stage_of

X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0.0, 749.2, 999.0, 20.0, 300.0])
OLD = torch.tensor([0, 1, 3, 2, 1])  # 3 is null
NEW = torch.tensor([0, 4, 3, 4, 1])  # rows 1 and 3 are of the new class
DEPTHS = ("vector", "sites", "layers")
KINDS = [kind for kind, layer in CONDITIONING.items() if layer.class_input is not None]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_old_classes_stay_bit_equal(kind, depth):
    unet = tiny_unet(conditioning=kind, resblock_updown=True)
    before = unet(X, T, OLD).sample
    assert unet.add_class(new_class(unet, depth)) == 4
    assert torch.equal(unet(X, T, OLD).sample, before)
    after = unet(X, T, NEW).sample
    others = [0, 2, 4]
    assert torch.equal(after[others], before[others])
    assert all((after[i] - before[i]).abs().max() > 1e-4 for i in (1, 3))


@pytest.mark.parametrize("join", ["sum", "concat"])
@pytest.mark.parametrize("kind", ["adagn", "cross_attention"])
def test_each_site_reads_its_own_vector(kind, join):
    """Against a slow reference: the modulation of each vector, of which each site takes its part."""
    unet = tiny_unet(conditioning=kind, join=join)
    one = new_class(unet, "sites")
    label = unet.add_class(one)
    m = unet.modulation(T[:2], torch.tensor([label, 1]))
    for place, site in enumerate(unet.sites()):
        alone = unet.modulation(T[:1], class_vectors=one.vectors[place : place + 1])[site.name]
        for got, expected in zip(m[site.name], alone):
            torch.testing.assert_close(got[:1], expected, atol=1e-6, rtol=1e-5)


def test_vectors_by_site_are_accepted_directly():
    unet = tiny_unet()
    one = new_class(unet, "sites")
    label = unet.add_class(one)
    direct = unet(X, T, class_vectors=one.vectors.expand(5, -1, -1)).sample
    torch.testing.assert_close(direct, unet(X, T, torch.full((5,), label)).sample, atol=1e-6, rtol=1e-5)
    assert unet.class_vectors(torch.tensor([label, 2])).shape == (2, len(unet.sites()), unet.embedding.class_dim)
    with pytest.raises(InputError, match="class_vectors are numbers"):
        unet(X, T, class_vectors=one.vectors[:2].expand(5, -1, -1))


@pytest.mark.parametrize("changes", [{}, {"resblock_updown": True}, {"num_head_channels": None, "num_heads": 2}])
def test_change_of_layers_equals_changed_weights(changes):
    unet = tiny_unet(**changes)
    one = new_class(unet, "layers")
    label = unet.add_class(one)
    got = unet(X, T, torch.full((5,), label)).sample
    for path, layer in unet.changeable_layers().items():
        change = one.layers[path]
        product = torch.einsum("or,r...->o...", change.up, change.down)
        layer.weight.data.add_(product)
    unet.learned[0] = LearnedClass("pug", one.vectors)
    torch.testing.assert_close(got, unet(X, T, torch.full((5,), label)).sample, atol=2e-5, rtol=1e-4)


def test_strength_scales_the_change():
    unet = tiny_unet()
    label = unet.add_class(new_class(unet, "layers"))
    m = unet.modulation(T, torch.full((5,), label))
    none = unet.denoise(X, {name: mod for name, mod in m.items() if name not in unet._stages})
    assert torch.equal(unet.denoise(X, m | unet.stage_strengths(torch.zeros(5, 1))), none)
    small = unet.denoise(X, m | unet.stage_strengths(torch.full((5, 1), 1e-3)))
    assert 0 < (small - none).abs().max() < 0.1 * (unet.denoise(X, m) - none).abs().max()


def test_several_classes_do_not_mix():
    unet = tiny_unet()
    alone = {}
    for seed, depth in enumerate(DEPTHS):
        single = tiny_unet()
        label = single.add_class(new_class(single, depth, seed=seed))
        alone[depth] = single(X, T, torch.tensor([0, label, 3, label, 1])).sample
        unet.add_class(new_class(unet, depth, depth, seed))
    for label, depth in enumerate(DEPTHS, 4):
        torch.testing.assert_close(unet(X, T, torch.tensor([0, label, 3, label, 1])).sample, alone[depth])


def test_class_follows_the_network():
    unet = tiny_unet()
    unet.add_class(new_class(unet, "layers"))
    before = set(unet.state_dict())
    unet.to(torch.float64)
    assert {tensor.dtype for tensor in unet.learned[0].tensors().values()} == {torch.float64}
    assert set(unet.state_dict()) == before and not any("learned" in name for name in before)
    assert unet(X.double(), T, NEW).sample.dtype == torch.float64


def test_a_class_that_does_not_fit_is_rejected():
    unet, other = tiny_unet(), tiny_unet(channel_mult=(1, 2, 2))
    with pytest.raises(InputError, match="learned with another network: its vectors"):
        unet.add_class(new_class(other, "sites"))
    with pytest.raises(InputError, match="learned with another network"):
        unet.add_class(_with_layer(new_class(unet, "vector"), "middle.9.block.conv1"))
    for changes in ({"conditioning": "none"}, {"num_classes": None}):
        with pytest.raises(InputError, match="has no class vectors"):
            tiny_unet(**changes).add_class(new_class(unet, "vector"))
    with pytest.raises(InputError, match="out of range"):
        unet(X, T, NEW)


def _with_layer(one, path):
    one.layers[path] = LowRank(torch.zeros(1, 16), torch.zeros(16, 1))
    return one


def test_gradients_reach_every_tensor():
    unet = tiny_unet().requires_grad_(False)
    one = new_class(unet, "layers")
    label = unet.add_class(one)
    one.apply(lambda tensor: tensor.requires_grad_(True))
    unet(X, T, torch.full((5,), label)).sample.square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in one.tensors().values())


def test_tensors_come_back_by_name():
    unet = tiny_unet()
    one = new_class(unet, "layers")
    again = LearnedClass.from_tensors("pug", one.tensors())
    assert again.layers.keys() == one.layers.keys() == unet.changeable_layers().keys()
    assert again.sha256() == one.sha256() != new_class(unet, "layers", seed=1).sha256()


def test_low_rank_output_is_the_product():
    change = LowRank(torch.randn(2, 3, 3, 3), torch.randn(4, 2))
    x = torch.randn(2, 3, 5, 5)
    weight = torch.einsum("or,rihw->oihw", change.up, change.down)
    torch.testing.assert_close(change.output(x), F.conv2d(x, weight, padding=1), atol=1e-5, rtol=1e-4)
    assert stage_of("up.1.stages.0.block.norm2") == "up.1.stages.0"
