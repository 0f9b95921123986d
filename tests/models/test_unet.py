import pytest
import torch
from conftest import tiny_unet
from diffusers.models.embeddings import get_timestep_embedding
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_adagn import AdaGNUNet
from diffusion_adagn.errors import InputError
from diffusion_adagn.models.conditioning import AdaGN
from diffusion_adagn.models.cost import estimate_cost
from diffusion_adagn.models.embeddings import sinusoidal_embedding

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0.0, 749.2, 999.0])
Y = torch.tensor([0, 2, 3])  # class 0, the last class, null

SHAPES = [
    {},
    {"resblock_updown": True},
    {"modulate_both_norms": True, "resblock_updown": True},
    {"num_classes": None},
    {
        "channel_mult": (1, 2, 2),
        "num_res_blocks": 2,
        "attention_resolutions": (4, 2),
        "num_head_channels": None,
        "num_heads": 2,
    },
    {"learned_variance": True, "in_channels": 1},
    {"null_class": False},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_forward_is_denoise_of_modulation(changes):
    unet = tiny_unet(**changes)
    y = None if "num_classes" in changes else Y.clamp(max=2)
    out = unet(X, T, y).sample
    assert out.shape == (3, 2 if "learned_variance" in changes else 1, 8, 8)
    assert torch.equal(out, unet.denoise(X, unet.modulation(T, y)))
    assert torch.equal(out, unet(X, T, y, return_dict=False)[0])


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_sites_follow_the_forward_pass(changes):
    unet = tiny_unet(**changes)
    met = []
    for name, module in unet.named_modules():
        if isinstance(module, AdaGN):
            module.register_forward_hook(lambda m, i, o, name=name: met.append((name, o.shape[2], o.shape[1])))
    unet(X, T, None if "num_classes" in changes else Y.clamp(max=2))
    sites = unet.sites()
    assert [(s.name, s.resolution, s.channels) for s in sites] == met
    assert [s.depth for s in sites] == list(range(len(sites)))
    m = unet.modulation(T, None if "num_classes" in changes else Y.clamp(max=2))
    assert list(m) == [s.name for s in sites]
    assert all(m[s.name].gamma.shape == m[s.name].beta.shape == (3, s.channels) for s in sites)


def test_site_modulation_acts_from_its_site():
    unet = tiny_unet()
    m = unet.modulation(T, Y)
    site = unet.sites()[2].name
    seen = {}
    for s in unet.sites():
        unet.get_submodule(s.name).register_forward_hook(lambda mod, i, o, n=s.name: seen.setdefault(n, []).append(o))
    unet.denoise(X, m)
    mod = m[site]
    unet.denoise(X, {**m, site: mod._replace(gamma=mod.gamma + 1)})
    changed = [n for n, (a, b) in seen.items() if not torch.equal(a, b)]
    assert changed == [s.name for s in unet.sites()][2:]


def test_modulation_needs_no_image():
    unet = tiny_unet()
    one = unet.modulation(5, 1)
    assert torch.allclose(unet.denoise(X, one), unet(X, 5, torch.tensor([1, 1, 1])).sample, atol=1e-5)
    rows = unet.modulation(5, Y)  # one timestep, three labels
    assert torch.allclose(unet.denoise(X, rows), unet(X, 5, Y).sample, atol=1e-5)


def test_label_and_timestep_change_the_output():
    unet = tiny_unet()
    x = X[:1].expand(4, -1, -1, -1)
    out = unet(x, 500, torch.arange(4)).sample
    assert min((out[i] - out[j]).abs().max() for i in range(4) for j in range(i)) > 1e-3
    assert (unet(x, 500.0, Y[0].expand(4)).sample - unet(x, 500.5, Y[0].expand(4)).sample).abs().max() > 1e-5


def test_gradients_reach_every_parameter():
    unet = tiny_unet(resblock_updown=True, modulate_both_norms=True).train()
    unet(X, T, Y).sample.square().sum().backward()
    silent = [n for n, p in unet.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert silent == []


def test_new_network_outputs_zero():
    unet = AdaGNUNet(sample_size=8, in_channels=1, num_classes=3, model_channels=16, channel_mult=(1, 2), norm_groups=4,
                     num_head_channels=16, zero_init_modulation=True)  # fmt: skip
    assert unet(X, T, Y).sample.abs().max() == 0
    assert all(part.abs().max() == 0 for mod in unet.modulation(T, Y).values() for part in mod)
    plain = AdaGNUNet(sample_size=8, in_channels=1, num_classes=3, model_channels=16, channel_mult=(1, 2), norm_groups=4,
                      num_head_channels=16)  # fmt: skip
    assert min(part.abs().max() for mod in plain.modulation(T, Y).values() for part in mod) > 0
    for module in plain.modules():
        if hasattr(module, "conv2"):
            assert module.conv2.weight.abs().max() == 0 == module.conv2.bias.abs().max()
        if hasattr(module, "proj"):
            assert module.proj.weight.abs().max() == 0


def test_checkpointed_attention_trains_in_bf16():
    """guided-diffusion recomputes its attention outside autocast and fails."""
    unet = tiny_unet().train()
    with torch.autocast("cpu", torch.bfloat16):
        unet(X, T, Y).sample.float().square().sum().backward()
    plain = {n: p.grad.clone() for n, p in unet.named_parameters()}
    unet.zero_grad()
    unet.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        loss = unet(X, T, Y).sample.float().square().sum()
    loss.backward()
    assert all(torch.equal(p.grad, plain[n]) for n, p in unet.named_parameters())


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_save_and_load(tmp_path, changes):
    unet = tiny_unet(**changes)
    unet.save_pretrained(tmp_path)
    y = None if "num_classes" in changes else Y.clamp(max=2)
    assert torch.equal(AdaGNUNet.from_pretrained(tmp_path)(X, T, y).sample, unet(X, T, y).sample)


@pytest.mark.parametrize(
    ("changes", "y", "message"),
    [
        ({"num_classes": None}, Y, "without classes"),
        ({"num_classes": 0}, Y, "without classes"),
        ({}, None, "missing.*0..2, or 3 for null"),
        ({}, torch.tensor([0, 1, 4]), "label 4 is out of range"),
        ({}, torch.tensor([0, 1, -1]), "label -1"),
        ({"null_class": False}, Y, "no null class"),
        ({}, Y.float(), "whole numbers"),
    ],
)
def test_wrong_labels_are_rejected(changes, y, message):
    with pytest.raises(InputError, match=message):
        tiny_unet(**changes)(X, T, y)


def test_wrong_images_and_modulations_are_rejected():
    unet = tiny_unet()
    with pytest.raises(InputError, match="multiples of 2"):
        unet(torch.zeros(1, 1, 7, 8), 5, Y[:1])
    m = unet.modulation(5, 1)
    m.pop(unet.sites()[1].name)
    with pytest.raises(InputError, match="missing 1 sites: down"):
        unet.denoise(X, m)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": 9}, "halved"),
        ({"norm_groups": 5}, "norm_groups 5"),
        ({"num_head_channels": 5}, "heads of 5"),
        ({"conditioning": "adaglm"}, "adagn"),
    ],
)
def test_inconsistent_sizes_are_rejected(changes, message):
    with pytest.raises(InputError, match=message):
        tiny_unet(**changes)


def test_the_embedding_is_diffusers():
    t = torch.tensor([0.0, 1.0, 17.25, 999.0])
    for dim in (32, 33):
        theirs = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        assert torch.allclose(sinusoidal_embedding(t, dim), theirs, atol=1e-5)


def test_adm_networks_have_published_sizes():
    """296 M parameters for ADM 64x64, 554 M for 256x256 unconditional (Dhariwal & Nichol 2021); counted, not allocated."""
    adm64 = estimate_cost({"sample_size": 64, "model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3,
                        "attention_resolutions": (32, 16, 8), "resblock_updown": True, "num_classes": 1000, "null_class": False,
                        "learned_variance": True})  # fmt: skip
    assert round(adm64.parameters / 1e6) == 296
    adm256 = estimate_cost({"sample_size": 256, "model_channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2,
                         "attention_resolutions": (32, 16, 8), "resblock_updown": True, "learned_variance": True})  # fmt: skip
    assert round(adm256.parameters / 1e6) == 553


@pytest.mark.slow
def test_export_takes_any_batch_size():
    unet, batch = tiny_unet(resblock_updown=True).eval(), torch.export.Dim("B")
    given = {"sample": X[:2], "timestep": T[:2], "class_labels": Y[:2]}
    shapes = {key: {0: batch} for key in given} | {"return_dict": None}
    made = torch.export.export(unet, (), given | {"return_dict": False}, dynamic_shapes=shapes).module()
    with torch.no_grad():
        found = made(sample=X, timestep=T, class_labels=Y, return_dict=False)[0]
        torch.testing.assert_close(found, unet(X, T, Y).sample, atol=1e-5, rtol=1e-5)


def test_per_image_and_second_gradients():
    unet = tiny_unet().eval()
    weights = dict(unet.named_parameters())

    def loss(weights, x, t, y):
        out = torch.func.functional_call(unet, weights, (x[None], t[None], y[None])).sample
        return out.square().mean()

    with sdpa_kernel(SDPBackend.MATH):  # torch's other attentions have no second derivatives
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(weights, X, T, Y)
        wanted = torch.autograd.grad(loss(weights, X[1], T[1], Y[1]), list(weights.values()))
        for found, one in zip(each.values(), wanted):
            torch.testing.assert_close(found[1], one, atol=1e-5, rtol=1e-4)
        penalties = []
        for operator in ("auto", "eager"):
            unet.set_operator(operator)
            x = X.clone().requires_grad_()
            (slope,) = torch.autograd.grad(unet(x, T, Y).sample.square().sum(), x, create_graph=True)
            penalties.append(torch.autograd.grad(slope.square().sum(), unet.conv_in.weight)[0])
        torch.testing.assert_close(*penalties, atol=1e-3 * penalties[1].abs().max().item(), rtol=1e-3)
