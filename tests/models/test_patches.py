"""Networks on patches: against shuffles by hand around a network for images of more channels."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import AdaGNUNet, ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig, read_config
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.models.config import check_size
from diffusion_adagn.models.cost import estimate_cost
from diffusion_adagn.sampling.pretrained import ADDED_LATER, load_unet, model_hash
from diffusion_adagn.trace.atlas import Atlas

T, Y = torch.tensor([0.0, 749.2, 999.0]), torch.tensor([0, 2, 3])
LABELS = LabelSpace(("cat", "dog", "eel"))


def images(channels=1, side=8):
    return torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(1))


def patched(patch, side=8, channels=1, **changes):
    """A network on patches, and the plain network on their pixels as channels, with the same weights."""
    changes = {"attention_resolutions": (side // patch // 2,)} | changes
    unet = tiny_unet(sample_size=side, in_channels=channels, patch_size=patch, **changes)
    plain = tiny_unet(sample_size=side // patch, in_channels=channels * patch**2, **changes)
    plain.load_state_dict(unet.state_dict())
    return unet, plain


def to_channels(x, p):
    """[C, H, W] -> [C p^2, H / p, W / p], pixel by pixel."""
    count, channels, height, width = x.shape
    out = torch.empty(count, channels * p * p, height // p, width // p)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                out[:, c * p * p + (i % p) * p + j % p, i // p, j // p] = x[:, c, i, j]
    return out


def to_pixels(x, p):
    """The inverse of `to_channels`."""
    count, channels, height, width = x.shape
    out = torch.empty(count, channels // p**2, height * p, width * p)
    for c in range(channels):
        image, place = divmod(c, p * p)
        out[:, image, place // p :: p, place % p :: p] = x[:, c]
    return out


@pytest.mark.parametrize(
    ("patch", "changes"),
    [
        (2, {}),
        (4, {"channels": 3, "side": 16, "resblock_updown": True}),
        (2, {"channels": 3, "learned_variance": True, "modulate_both_norms": True}),
        (2, {"conditioning": "cross_attention"}),
    ],
    ids=str,
)
def test_network_is_the_plain_one_between_two_shuffles(patch, changes):
    unet, plain = patched(patch, **changes)
    x = images(unet.config.in_channels, unet.config.sample_size)
    out = unet(x, T, Y).sample
    assert out.shape[1:] == (x.shape[1] * (2 if changes.get("learned_variance") else 1), *x.shape[2:])
    assert torch.equal(out, to_pixels(plain(to_channels(x, patch), T, Y).sample, patch))
    assert torch.equal(out, unet.denoise(x, plain.modulation(T, Y)))
    assert [tuple(s) for s in unet.sites()] == [tuple(s) for s in plain.sites()]


def test_mean_is_the_first_half_of_a_learned_variance():
    unet, _ = patched(2, channels=3, learned_variance=True)
    before = unet(images(3), T, Y).sample
    with torch.no_grad():
        unet.conv_out.bias[: 3 * 4] += 1  # the first C p^2 channels
    after = unet(images(3), T, Y).sample
    torch.testing.assert_close(after[:, :3], before[:, :3] + 1)
    assert torch.equal(after[:, 3:], before[:, 3:])


def test_patch_size_1_is_the_network_of_before():
    unet = tiny_unet()
    assert torch.equal(tiny_unet(patch_size=1)(images(), T, Y).sample, unet(images(), T, Y).sample)
    config = {k: v for k, v in unet.config.items() if k not in ADDED_LATER}
    torch.manual_seed(3)
    old = AdaGNUNet(**{k: v for k, v in config.items() if not k.startswith("_")})
    torch.manual_seed(3)
    new = AdaGNUNet(**{k: v for k, v in unet.config.items() if not k.startswith("_")})
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))
    digest = hashlib.sha256(
        json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True).encode()
    )
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert model_hash(unet) == digest.hexdigest()[:16]
    assert len({model_hash(tiny_unet(in_channels=4, sample_size=s, patch_size=p)) for s, p in ((8, 1), (16, 2))}) == 2


def test_config_json(tmp_path):
    unet, _ = patched(2)
    unet.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["patch_size"] == 2
    assert torch.equal(load_unet(tmp_path)(images(), T, Y).sample, unet(images(), T, Y).sample)
    for wrong in (3, "2x2", None):
        file.write_text(json.dumps(config | {"patch_size": wrong}))
        with pytest.raises(InputError, match=r"patch_size: expected 1, 2, 4, got .*config.json"):
            load_unet(tmp_path)
    tiny_unet().save_pretrained(tmp_path)
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "patch_size"}))
    assert load_unet(tmp_path).config.patch_size == 1


def test_wrong_sizes_are_rejected():
    with pytest.raises(InputError, match=r"20 pixels cannot be cut into patches of 4x4 .* smaller model.patch_size"):
        tiny_unet(sample_size=20, patch_size=4)
    with pytest.raises(InputError, match="one of 1, 2, 4, not 3"):
        tiny_unet(patch_size=3)
    with pytest.raises(InputError, match="multiples of 4"):
        tiny_unet(patch_size=2)(torch.zeros(3, 1, 6, 8), T, Y)
    with pytest.raises(InputError, match=r"model.patch_size: expected 1, 2, 4, got '3'"):
        read_config(None, {"model.patch_size": "3"})
    with pytest.raises(InputError, match=r"adain cannot work on the 1x1 .*a smaller model.patch_size"):
        tiny_unet(patch_size=4, conditioning="adain")


def test_cost_counts_feature_maps():
    config = {"model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (),
              "num_head_channels": 16, "norm_groups": 4, "num_classes": 3}  # fmt: skip
    patch = estimate_cost(config | {"sample_size": 32, "in_channels": 3, "patch_size": 2})
    assert patch == estimate_cost(config | {"sample_size": 16, "in_channels": 12})
    whole = estimate_cost(config | {"sample_size": 32, "in_channels": 3})
    assert 3.3 < whole.flops / patch.flops < 4.2
    check_size(config | {"sample_size": 8192, "in_channels": 1, "patch_size": 4, "model_channels": 64})


def test_memory_formats_and_checkpointing():
    unet, _ = patched(2, channels=3)
    x = images(3)

    def gradients():
        unet.zero_grad()
        out = unet.train()(x, T, Y).sample
        out.square().sum().backward()
        return out.detach(), {n: p.grad.clone() for n, p in unet.named_parameters()}

    out, plain = gradients()
    assert out.is_contiguous()
    assert all(g.abs().max() > 0 for g in plain.values())
    unet.enable_gradient_checkpointing()
    again, checkpointed = gradients()
    assert torch.equal(out, again) and all(torch.equal(plain[n], g) for n, g in checkpointed.items())
    unet.disable_gradient_checkpointing()
    for memory_format in ("contiguous", "channels_last"):
        unet.set_memory_format(memory_format)
        other, _ = gradients()
        torch.testing.assert_close(other, out, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_compiled_network():
    unet, _ = patched(2, channels=3)
    with torch.no_grad():
        out = torch.compile(unet, backend="eager", fullgraph=True)(images(3), T, Y).sample
        torch.testing.assert_close(out, unet(images(3), T, Y).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_torch_export_takes_any_batch_size():
    unet, _ = patched(2)
    given = {"sample": images()[:2], "timestep": T[:2], "class_labels": Y[:2]}
    shapes = {key: {0: torch.export.Dim("B")} for key in given} | {"return_dict": None}
    made = torch.export.export(unet, (), given | {"return_dict": False}, dynamic_shapes=shapes).module()
    with torch.no_grad():
        found = made(sample=images(), timestep=T, class_labels=Y, return_dict=False)[0]
        torch.testing.assert_close(found, unet(images(), T, Y).sample, atol=1e-5, rtol=1e-5)


def test_atlas_and_samples():
    unet, plain = patched(2)
    atlas = Atlas.of(unet, LABELS, timesteps=3)
    assert [s.site.resolution for s in atlas.sites.values()] == [s.resolution for s in plain.sites()]
    assert max(s.resolution for s in unet.sites()) == 4
    starts = []
    for network in (unet, tiny_unet()):  # the same start noise as without patches: it is drawn in the shape of images
        pipe = ClassConditionalPipeline(network, make_scheduler(DiffusionConfig()), LABELS)
        pipe.set_progress_bar_config(disable=True)
        network.denoise = lambda x, m, inner=network.denoise: (starts.append(x.clone()), inner(x, m))[1]
        out = pipe("all", seeds=4, num_inference_steps=2, output_type="np").images
        assert out.shape == (3, 8, 8, 1) and np.isfinite(out).all()
    assert torch.equal(starts[0], starts[2])
