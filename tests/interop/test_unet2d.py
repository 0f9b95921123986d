"""Conversion between our network and diffusers' UNet2DModel, in both directions: equal outputs and gradients."""

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DModel
from torch.nn import functional as F

from diffusion_adagn import InputError
from diffusion_adagn.interop.unet2d import from_unet2d, to_unet2d

T = torch.tensor([0.0, 749.25, 999.0])
THREE = {"channel_mult": (1, 2, 3), "attention_resolutions": (8, 2)}
ONE_HEAD = {"num_head_channels": None, "num_heads": 1}

OURS = [
    {},
    {"resblock_updown": True},
    {"conditioning": "additive"},
    {"conditioning": "additive", "resblock_updown": True, "null_class": False},
    {"num_classes": None},
    {"null_class": False},
    {"learned_variance": True},
    {"out_channels": 3},
    {"in_channels": 3, "num_res_blocks": 2, "dropout": 0.1},
    {**THREE, "num_head_channels": 8},
    {**THREE, **ONE_HEAD, "resblock_updown": True},
    {**THREE, "attention_resolutions": (), "resblock_updown": True, "conditioning": "additive"},
    {"channel_mult": (1, 1.5, 0.5), "num_head_channels": 4},
    {"channel_mult": (1, 2, 2), "attention_resolutions": (4, 2), "num_head_channels": None, "num_heads": 2},
    {"channel_mult": (1,), "attention_resolutions": (8,)},
]


def stock(**changes) -> UNet2DModel:
    """A small UNet2DModel in ADM's shape, with random weights, none of them zero."""
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 16,
        "norm_num_groups": 4,
        "attn_norm_num_groups": 4,
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 4,
    }
    torch.manual_seed(0)
    model = UNet2DModel(**(settings | changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return model


RESIDUAL = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
DEEP = {
    "block_out_channels": (16, 32, 48),
    "layers_per_block": 2,
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
}
THEIRS = [
    {},
    RESIDUAL,
    {"resnet_time_scale_shift": "default"},
    {"resnet_time_scale_shift": "default", "attn_norm_num_groups": None, **RESIDUAL},
    {"num_class_embeds": None},
    {"out_channels": 2},
    {"in_channels": 3, "out_channels": 3, "norm_eps": 1e-4, "sample_size": (8, 8)},
    {"time_embedding_dim": 64, "attention_head_dim": None},
    {**DEEP, "attention_head_dim": 8},
    {**DEEP, "attention_head_dim": None, "downsample_type": "resnet", "upsample_type": "resnet",
     "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
     "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D")},
    {"block_out_channels": (24, 40, 16), "layers_per_block": 2, "attention_head_dim": 8,
     "down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3},
]  # fmt: skip


def assert_equal_networks(unet, model, layers):
    """Assert that outputs, and gradients of the image and of weights, agree within 1e-4 of the largest.

    layers: [(our parameter, their parameters, whose concatenated rows are ours)]
    """
    channels = unet.config.in_channels
    classes = model.config.num_class_embeds
    x = torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 2, classes - 1]) if classes else None
    results = []
    for network in (unet, model):
        network.zero_grad()
        image = x.clone().requires_grad_()
        out = network(image, T, y).sample
        (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
        results.append((out.detach(), image.grad))
    pairs = list(zip(*results))
    pairs += [(ours.grad, torch.cat([p.grad for p in theirs])) for ours, theirs in layers]
    for a, b in pairs:
        assert b.abs().max() > 0
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


def layers_of(unet, model):
    """Pairs of our parameters and theirs: class table, projection, embedding, first and last layer; sites in forward order."""
    blocks = []
    for down in model.down_blocks:
        blocks += [*down.resnets, *(down.downsamplers or [])]
    blocks += model.mid_block.resnets
    for up in model.up_blocks:
        blocks += [*up.resnets, *(up.upsamplers or [])]
    projections = [b.time_emb_proj for b in blocks if hasattr(b, "time_emb_proj")]
    pairs = [
        (unet.projection.weight, [p.weight for p in projections]),
        (unet.projection.bias, [p.bias for p in projections]),
        (unet.embedding.time[0].weight, [model.time_embedding.linear_1.weight]),
        (unet.conv_in.weight, [model.conv_in.weight]),
        (unet.conv_out.bias, [model.conv_out.bias]),
    ]
    attention = model.mid_block.attentions[0]
    pairs.append(
        (unet.middle[0].attention.qkv.weight, [p.weight for p in (attention.to_q, attention.to_k, attention.to_v)])
    )
    if model.class_embedding is not None:
        pairs.append((unet.embedding.classes.weight, [model.class_embedding.weight]))
    return pairs


@pytest.mark.parametrize("changes", OURS, ids=str)
def test_our_network_round_trip(changes):
    unet = tiny_unet(**changes)
    model = to_unet2d(unet)
    assert type(model) is UNet2DModel and not model.training
    assert_equal_networks(unet, model, layers_of(unet, model))

    back = from_unet2d(model, null_class=bool(unet.config.num_classes) and unet.config.null_class)
    state = back.state_dict()
    assert all(torch.equal(tensor, state.pop(name)) for name, tensor in unet.state_dict().items()) and not state
    for name in ("num_classes", "channel_mult", "resblock_updown", "conditioning", "learned_variance", "dropout"):
        assert back.config[name] == unet.config[name]


@pytest.mark.parametrize("changes", THEIRS, ids=str)
def test_stock_network_round_trip(changes):
    model = stock(**changes)
    unet = from_unet2d(model)
    assert unet.config.num_classes == model.config.num_class_embeds and not unet.training
    assert_equal_networks(unet, model, layers_of(unet, model))
    again = to_unet2d(unet).state_dict()
    assert all(torch.equal(tensor, again.pop(name)) for name, tensor in model.state_dict().items()) and not again


def test_patches_are_left_to_the_caller():
    unet = tiny_unet(patch_size=2, in_channels=3, sample_size=16, learned_variance=True)
    model = to_unet2d(unet)
    assert (model.config.sample_size, model.config.in_channels, model.config.out_channels) == (8, 12, 24)
    x, y = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)), torch.tensor([1, 3])
    theirs = F.pixel_shuffle(model(F.pixel_unshuffle(x, 2), T[:2], y).sample, 2)
    assert torch.allclose(theirs, unet(x, T[:2], y).sample, atol=1e-5)
    back = from_unet2d(model, null_class=True, patch_size=2)
    for name in ("sample_size", "in_channels", "out_channels", "learned_variance", "patch_size"):
        assert back.config[name] == unet.config[name]
    assert torch.equal(back(x, T[:2], y).sample, unet(x, T[:2], y).sample)
    with pytest.raises(
        InputError, match=r"12 input and 24 output channels are no images in patches of 4x4 .* multiples of 16"
    ):
        from_unet2d(model, null_class=True, patch_size=4)


def test_augmentation_weights_are_dropped():
    unet = tiny_unet(augment_dim=9)
    model = to_unet2d(unet)
    x, y = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([1, 3])
    assert torch.allclose(model(x, T[:2], y).sample, unet(x, T[:2], y).sample, atol=1e-5)
    assert not any("augment" in name for name in model.state_dict())
    assert from_unet2d(model, null_class=True).config.augment_dim == 0


def test_last_row_as_null_class():
    model = stock()
    unet = from_unet2d(model, null_class=True)
    assert (unet.config.num_classes, unet.config.null_class) == (3, True)
    assert to_unet2d(unet).config.num_class_embeds == 4
    with pytest.raises(InputError, match="null_class needs a class table of at least 2 rows, not 0"):
        from_unet2d(stock(num_class_embeds=None), null_class=True)


def test_weights_are_copied_and_mode_stays():
    unet = tiny_unet().train()
    model = to_unet2d(unet)
    assert model.training and from_unet2d(model, null_class=True).training
    before = unet.conv_in.weight.clone()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(unet.conv_in.weight, before)
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


def test_converted_network_saves_and_loads(tmp_path):
    unet = tiny_unet()
    to_unet2d(unet).save_pretrained(tmp_path)
    model = UNet2DModel.from_pretrained(tmp_path)
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 3])
    assert torch.allclose(model(x, T[:2], y).sample, unet(x, T[:2], y).sample, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conditioning": "adain"}, "conditioning is adain"),
        ({"join": "concat"}, "join is concat"),
        ({"modulate_both_norms": True}, "modulate_both_norms"),
        ({"channel_mult": (2, 2)}, "channel_mult starts with 2"),
        ({**THREE, "num_head_channels": None, "num_heads": 2}, "heads are 8, 24 channels wide"),
        ({"num_head_channels": None, "num_heads": 2, "num_heads_upsample": 4}, "heads are 8, 16 channels wide"),
        ({"join": "concat", "modulate_both_norms": True}, "join.*modulate_both_norms"),
    ],
    ids=str,
)
def test_unsupported_export_is_rejected(changes, reason):
    with pytest.raises(InputError, match=f"UNet2DModel cannot express this network: .*{reason}"):
        to_unet2d(tiny_unet(**changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")}, "block types SkipDownBlock2D"),
        ({"up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D")}, "different levels"),
        ({"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}, "resampled in different ways"),
        ({"upsample_type": "resnet"}, "resampled in different ways"),
        ({"mid_block_type": None}, "a middle block of type None"),
        ({"add_attention": False}, "middle block without attention"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor 2"),
        ({"attn_norm_num_groups": None}, "attn_norm_num_groups None, but norm_num_groups 4"),
        ({"attn_norm_num_groups": 8}, "attn_norm_num_groups 8"),
        ({"time_embedding_type": "fourier"}, "fourier timestep"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 10}, "learned timestep"),
        ({"time_embedding_dim": 32}, "time_embedding_dim 32"),
        ({"freq_shift": 1}, "freq_shift 1"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ({"act_fn": "gelu"}, "activation gelu"),
        ({"class_embed_type": "timestep"}, "class_embed_type timestep"),
        ({"class_embed_type": "identity"}, "class_embed_type identity"),
        ({"downsample_padding": 0}, "downsample_padding 0"),
        ({"center_input_sample": True}, "center_input_sample"),
        ({"sample_size": None}, "sample_size None"),
        ({"sample_size": (8, 16)}, "of square images"),
        ({"freq_shift": 1, "act_fn": "gelu"}, "freq_shift.*gelu"),
    ],
    ids=str,
)
def test_unsupported_import_is_rejected(changes, reason):
    with pytest.raises(InputError, match=f"AdaGNUNet cannot express this UNet2DModel: .*{reason}"):
        from_unet2d(stock(**changes))


def test_indivisible_heads_are_rejected():
    with pytest.raises(InputError, match="heads of 5"):
        from_unet2d(stock(attention_head_dim=5))


def test_other_models_are_rejected():
    with pytest.raises(InputError, match="expected a diffusers UNet2DModel, not Linear"):
        from_unet2d(torch.nn.Linear(1, 1))
