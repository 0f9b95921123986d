"""Every test here runs over the whole registry of kinds: a new kind is tested by being in it."""

from typing import get_args

import pytest
import torch
from conftest import tiny_unet
from torch import nn
from torch.nn import functional as F

from diffusion_adagn import AdaGNUNet
from diffusion_adagn.errors import InputError
from diffusion_adagn.models.conditioning import CONDITIONING, AdaGN, AdaIN, ConditioningLayer
from diffusion_adagn.models.config import ModelConfig
from diffusion_adagn.models.cost import estimate_cost
from diffusion_adagn.schema import fields_of

EVERY_KIND = pytest.mark.parametrize("kind", CONDITIONING)


def test_settings_list_every_kind():
    assert get_args(next(s.hint for s in fields_of(ModelConfig) if s.key == "conditioning")) == tuple(CONDITIONING)


CLASS_CONDITIONED = [k for k, kind in CONDITIONING.items() if kind.class_input is not None]
G = torch.Generator().manual_seed(1)
X = torch.randn(3, 1, 8, 8, generator=G)
T = torch.tensor([0.0, 749.2, 999.0])
Y = torch.tensor([0, 2, 3])  # class 0, the last class, null


def fresh(kind: str, **changes) -> AdaGNUNet:
    torch.manual_seed(0)
    settings = {"sample_size": 8, "in_channels": 1, "num_classes": 3, "model_channels": 16, "channel_mult": (1, 2),
                "num_res_blocks": 1, "attention_resolutions": (4,), "num_head_channels": 16, "norm_groups": 4}  # fmt: skip
    return AdaGNUNet(**(settings | {"conditioning": kind} | changes))


# ---------------------------------------------------------------------- formulas, in loops, in float64


def normalised(h: torch.Tensor, size: int, eps: float) -> torch.Tensor:
    """GroupNorm of one image [C, H, W] without weights, groups of `size` channels."""
    out = torch.empty_like(h)
    for c in range(0, len(h), size):
        group = h[c : c + size]
        out[c : c + size] = (group - group.mean()) / ((group - group.mean()).square().mean() + eps).sqrt()
    return out


def slow(kind: str, layer: nn.Module, h: torch.Tensor, mod: dict) -> torch.Tensor:
    """The formula of a conditioning layer for one image h [C, H, W]; mod: {field: [C] or [N, C]}."""

    def affine(z):
        return torch.stack([z[c] * layer.weight[c] + layer.bias[c] for c in range(len(z))])

    def each(values):
        return values.reshape(-1, 1, 1)

    if kind in ("adagn", "adagn_zero", "none"):
        return affine(normalised(h, 4, 1e-5)) * (1 + each(mod["gamma"])) + each(mod["beta"])
    if kind == "adain":
        return affine(normalised(h, 1, 1e-5)) * (1 + each(mod["gamma"])) + each(mod["beta"])
    if kind == "additive":
        return affine(normalised(h + each(mod["shift"]), 4, 1e-5))
    if kind == "gain":
        return affine(normalised(h, 4, 1e-5)) * (1 + each(mod["gamma"]))
    if kind == "film":
        return h * (1 + each(mod["gamma"])) + each(mod["beta"])
    assert kind == "cross_attention", f"{kind} needs its formula here"
    h = affine(normalised(h + each(mod["shift"]), 4, 1e-5))
    out = h.clone()
    for i in range(h.shape[1]):
        for j in range(h.shape[2]):
            q = layer.query.weight @ h[:, i, j] + layer.query.bias
            weights = torch.stack([q @ key / len(q) ** 0.5 for key in mod["keys"]]).softmax(0)
            uses_class = sum(w * value for w, value in zip(weights, mod["values"]))
            out[:, i, j] += layer.proj.weight @ uses_class + layer.proj.bias
    return out


@EVERY_KIND
def test_layers_equal_float64_reference(kind):
    torch.manual_seed(0)
    layer = CONDITIONING[kind](8, 2, 1e-5).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    h = torch.randn(2, 8, 3, 3).double()
    mod = {f: torch.randn(2, 5, 8) if f in layer.token_params else torch.randn(2, 8) for f in layer.Params._fields}
    mod = {f: v.double() for f, v in mod.items()}
    out = layer(h, layer.Params(**mod))
    for b in range(2):
        expected = slow(kind, layer, h[b], {f: v[b] for f, v in mod.items()})
        assert torch.allclose(out[b], expected, rtol=1e-10, atol=1e-10)


def test_adagn_equals_adain_at_one_channel():
    torch.manual_seed(0)
    h, mod = torch.randn(2, 8, 4, 4), AdaGN.Params(torch.randn(2, 8), torch.randn(2, 8))
    assert torch.equal(AdaGN(8, 8, 1e-5)(h, mod), AdaIN(8, 2, 1e-5)(h, mod))
    assert (AdaGN(8, 2, 1e-5)(h, mod) - AdaIN(8, 2, 1e-5)(h, mod)).abs().max() > 0.1


def test_adain_rejects_tiny_feature_maps():
    with pytest.raises(InputError, match=r"adain.*1x1"):
        fresh("adain", channel_mult=(1, 1, 1, 1))
    fresh("adain", channel_mult=(1, 1, 1))  # 2x2: four pixels
    fresh("adagn", channel_mult=(1, 1, 1, 1))
    with pytest.raises(InputError, match="1x2"):
        AdaIN(8, 2, 1e-5)(torch.zeros(1, 8, 1, 2), AdaGN.Params(torch.zeros(1, 8), torch.zeros(1, 8)))


# ---------------------------------------------------------------------- how a network starts


@EVERY_KIND
def test_a_new_network_answers_zero(kind):
    assert fresh(kind)(X, T, Y).sample.abs().max() == 0


@EVERY_KIND
@pytest.mark.parametrize("both", [False, True])
def test_new_block_equals_its_skip(kind, both):
    unet = fresh(kind, modulate_both_norms=both)
    m = unet.modulation(T, Y)
    block = unet.up[0].stages[0].block
    h = torch.randn(3, block.norm1.num_channels, 4, 4)
    assert torch.equal(block(h, [m[name] for name in block.sites]), block.skip(h))


@EVERY_KIND
def test_either_gate_or_convolution_starts_zero(kind):
    unet = fresh(kind)
    for block in (m for m in unet.modules() if hasattr(m, "conv2")):
        assert (block.conv2.weight.abs().max() > 0) == CONDITIONING[kind].gated
    mod = unet.modulation(T, Y)
    if CONDITIONING[kind].zero_init:
        assert all(part.abs().max() == 0 for site in mod.values() for part in site)
    else:
        assert all(part.abs().max() > 0 for site in mod.values() for part in site)


def test_zero_gated_block_still_learns():
    for zeroed in (False, True):
        unet = fresh("adagn_zero").train()
        nn.init.normal_(unet.conv_out.weight, std=0.1)
        block = unet.middle[0].block
        if zeroed:
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
        optimizer = torch.optim.SGD(unet.parameters(), lr=1e-3)
        start = block.conv2.weight.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            unet(X, T, Y).sample.square().sum().backward()
            optimizer.step()
        assert torch.isfinite(block.conv2.weight).all()
        assert torch.equal(block.conv2.weight, start) == zeroed


def test_conditioning_keeps_image_path_init():
    plain = fresh("adagn").state_dict()
    for kind in CONDITIONING:
        mine = fresh(kind).state_dict()
        same = [k for k in plain if k in mine and not k.startswith(("embedding.", "projection"))]
        changed = [k for k in same if not torch.equal(plain[k], mine[k])]
        assert len(same) > 20 and (all(".conv2." in k for k in changed) if CONDITIONING[kind].gated else changed == [])


# ---------------------------------------------------------------------- what the condition reaches


@EVERY_KIND
@pytest.mark.parametrize("both", [False, True])
def test_label_changes_output_and_gradient(kind, both):
    unet = tiny_unet(conditioning=kind, modulate_both_norms=both)
    x = X[:1].expand(4, -1, -1, -1)
    out = unet(x, 500, torch.arange(4)).sample
    apart = min((out[i] - out[j]).abs().max() for i in range(4) for j in range(i))
    assert (apart > 1e-3) == (kind in CLASS_CONDITIONED)
    assert (unet(x, 500, Y[:1]).sample - unet(x, 600, Y[:1]).sample).abs().max() > 1e-3
    unet.train()(X, T, Y).sample.square().sum().backward()
    silent = [n for n, p in unet.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert silent == []
    if kind in CLASS_CONDITIONED:
        rows = unet.embedding.classes.weight.grad.abs().sum(1) > 0
        assert rows.tolist() == [True, False, True, True]
    else:
        assert unet.embedding.classes is None


@EVERY_KIND
def test_timestep_and_class_enter_as_declared(kind):
    unet = tiny_unet(conditioning=kind)
    a, b, c = unet.modulation(500, 0), unet.modulation(500, 1), unet.modulation(600, 0)
    tokens = CONDITIONING[kind].token_params
    for site in unet.sites():
        for field in CONDITIONING[kind].Params._fields:
            by_class = not torch.equal(getattr(a[site.name], field), getattr(b[site.name], field))
            by_time = not torch.equal(getattr(a[site.name], field), getattr(c[site.name], field))
            expected = {"vector": (True, True), None: (False, True)}.get(
                CONDITIONING[kind].class_input, (field in tokens, field not in tokens)
            )
            assert (by_class, by_time) == expected


@EVERY_KIND
def test_site_parameters_act_from_their_site(kind):
    unet = tiny_unet(conditioning=kind, modulate_both_norms=True)
    m = unet.modulation(T, Y)
    sites = unet.sites()
    rows = unet.projection_slices()
    assert list(m) == [s.name for s in sites] == list(rows)
    assert rows[sites[-1].name].stop == len(unet.projection.weight)
    for s in sites:
        layer = unet.get_submodule(s.name)
        for field, part in m[s.name]._asdict().items():
            assert part.shape == ((3, 4, s.channels) if field in layer.token_params else (3, s.channels))
        plain = [f for f in layer.Params._fields if f not in layer.token_params]
        assert rows[s.name].stop - rows[s.name].start == s.channels * len(plain)
    seen = {}
    for s in sites:
        unet.get_submodule(s.name).register_forward_hook(lambda mod, i, o, n=s.name: seen.setdefault(n, []).append(o))
    unet.denoise(X, m)
    name = sites[3].name
    unet.denoise(X, {**m, name: type(m[name])(*(part + 1 + torch.rand_like(part) for part in m[name]))})
    changed = [n for n, (a, b) in seen.items() if not torch.equal(a, b)]
    assert changed == [s.name for s in sites][3:]


@EVERY_KIND
def test_one_row_broadcasts_over_batch(kind):
    unet = tiny_unet(conditioning=kind)
    assert torch.allclose(unet.denoise(X, unet.modulation(5, 1)), unet(X, 5, torch.tensor([1, 1, 1])).sample, atol=1e-5)
    whole = unet(X, T, Y).sample
    for i in range(3):
        assert torch.allclose(unet(X[i : i + 1], T[i], Y[i]).sample[0], whole[i], atol=1e-5)


# ---------------------------------------------------------------------- joining, class vectors


@EVERY_KIND
@pytest.mark.parametrize("join", ["sum", "concat"])
def test_labels_weights_and_vectors_agree(kind, join):
    unet = tiny_unet(conditioning=kind, join=join)
    by_label = unet(X, T, Y).sample
    assert torch.allclose(unet(X, T, F.one_hot(Y, 4).float()).sample, by_label, atol=1e-6)
    if kind not in CLASS_CONDITIONED:
        with pytest.raises(InputError, match="ignores the class"):
            unet(X, T, class_vectors=torch.zeros(3, 64))
        return
    vectors = unet.embedding.class_vectors(Y)
    assert torch.equal(unet(X, T, class_vectors=vectors).sample, by_label)
    half = torch.tensor([[0.5, 0.5, 0.0]]).expand(3, -1)  # without null's column
    table = unet.embedding.classes.weight
    mixed = unet(X, T, class_vectors=((table[0] + table[1]) / 2).expand(3, -1)).sample
    assert torch.allclose(unet(X, T, half).sample, mixed, atol=1e-6)
    assert (mixed - unet(X, T, torch.tensor([0, 0, 0])).sample).abs().max() > 1e-4


def test_joining_is_addition_or_concatenation():
    for join, width in (("sum", 64), ("concat", 128)):
        unet = tiny_unet(join=join)
        time = unet.embedding.time(_sinus(unet))
        classes = unet.embedding.classes(Y)
        vector = time + classes if join == "sum" else torch.cat([time, classes], dim=1)
        assert unet.projection.in_features == width
        mod = unet.projection(F.silu(vector))
        name = unet.sites()[1].name
        rows = unet.projection_slices()[name]
        gamma, beta = mod[:, rows].chunk(2, dim=1)
        m = unet.modulation(T, Y)[name]
        assert torch.allclose(m.gamma, gamma, atol=1e-6) and torch.allclose(m.beta, beta, atol=1e-6)


def _sinus(unet):
    from diffusers.models.embeddings import get_timestep_embedding

    return get_timestep_embedding(T, unet.config.model_channels, flip_sin_to_cos=True, downscale_freq_shift=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": torch.zeros(3, 5)}, r"\[B, 3\] \(or 4, with null\)"),
        ({"class_vectors": torch.zeros(3, 5)}, r"\[B, 64\]"),
        ({"class_vectors": torch.zeros(3, 64), "class_labels": Y}, "one of them"),
        ({"class_labels": Y[:2]}, "3 timesteps and 2 classes"),
        ({"class_labels": F.one_hot(Y, 4)}, r"one_hot\(...\).float\(\)"),
        ({"class_vectors": [[0.0] * 5] * 3}, r"\[B, 64\]"),
    ],
)
def test_wrong_classes_are_rejected(arguments, message):
    with pytest.raises(InputError, match=message):
        tiny_unet()(X, T, **arguments)


def test_impossible_networks_are_rejected():
    with pytest.raises(InputError, match="attends to the class"):
        fresh("cross_attention", num_classes=None)
    with pytest.raises(InputError, match="sum or concat"):
        fresh("adagn", join="add")
    with pytest.raises(InputError, match="whole width"):
        fresh("adagn", channel_mult=(0.3, 1))
    assert fresh("adagn", channel_mult=(0.5, 1), norm_groups=4, num_head_channels=8).conv_in.out_channels == 8


@EVERY_KIND
def test_network_without_classes_works(kind):
    if CONDITIONING[kind].class_input == "tokens":
        pytest.skip("it attends to the class")
    unet = tiny_unet(conditioning=kind, num_classes=None)
    assert unet(X, T).sample.shape == X.shape
    with pytest.raises(InputError, match="without classes"):
        unet(X, T, Y)


# ---------------------------------------------------------------------- machinery


@EVERY_KIND
def test_bf16_autocast_stays_close(kind):
    unet = tiny_unet(conditioning=kind)
    exact = unet(X, T, Y).sample
    with torch.autocast("cpu", torch.bfloat16):
        rough = unet(X, T, Y).sample
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


@EVERY_KIND
@pytest.mark.parametrize("join", ["sum", "concat"])
def test_save_and_load(tmp_path, kind, join):
    unet = tiny_unet(conditioning=kind, join=join)
    unet.save_pretrained(tmp_path)
    assert torch.equal(AdaGNUNet.from_pretrained(tmp_path)(X, T, Y).sample, unet(X, T, Y).sample)


@pytest.mark.slow  # by default blocks are compiled (test_speed) and the whole network is exported (test_unet)
@EVERY_KIND
def test_compiled_network_equals_eager(kind):
    torch.compiler.reset()
    unet = tiny_unet(conditioning=kind)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(X, T, Y).sample, unet(X, T, Y).sample, atol=1e-5)


@EVERY_KIND
def test_gradient_checkpointing_changes_no_number(kind):
    unet = tiny_unet(conditioning=kind).train()
    unet(X, T, Y).sample.square().sum().backward()
    plain = {n: p.grad.clone() for n, p in unet.named_parameters()}
    unet.zero_grad()
    unet.enable_gradient_checkpointing()
    unet(X, T, Y).sample.square().sum().backward()
    assert all(torch.allclose(p.grad, plain[n], atol=1e-6) for n, p in unet.named_parameters())


@EVERY_KIND
def test_cost_is_counted_without_allocating(kind):
    config = {k: v for k, v in fresh(kind).config.items() if not k.startswith("_")}
    cost = estimate_cost(config)
    assert cost.parameters == sum(p.numel() for p in fresh(kind).parameters()) and cost.flops > 0


@EVERY_KIND
def test_registry_names_its_sources(kind):
    assert issubclass(CONDITIONING[kind], ConditioningLayer)
    assert "<-" in CONDITIONING[kind].__doc__ or "functions of t" in CONDITIONING[kind].__doc__
    assert "Source:" in CONDITIONING[kind].__doc__ or issubclass(CONDITIONING[kind], AdaGN)
