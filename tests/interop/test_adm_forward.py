"""ADM's forward pass in plain torch on a state dict in ADM's layout, with any number of heads; load_adm must equal it."""

import math
import re

import pytest
import torch
from test_adm import TINY, T, adm_state_dict, stock
from torch.nn import functional as F

from diffusion_adagn.interop.adm import load_adm


def adm(w, x, t, y, num_res_blocks, heads, heads_up, new_order, updown):
    """w: the state dict; x [B, 3, H, W], t [B], y [B] or None. heads, heads_up: channels -> number of heads (encoder and middle; decoder)."""

    def layer(key):
        return w[f"{key}.weight"], w[f"{key}.bias"]

    def norm(key, h):
        return F.group_norm(h, 32, *layer(key), eps=1e-5)

    half = w["time_embed.0.weight"].shape[1] // 2
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    emb = torch.cat([angles.cos(), angles.sin()], dim=1)
    emb = F.linear(F.silu(F.linear(emb, *layer("time_embed.0"))), *layer("time_embed.2"))
    emb = emb if y is None else emb + w["label_emb.weight"][y]

    def block(key, h, resample):
        inner = F.conv2d(resample(F.silu(norm(f"{key}.in_layers.0", h))), *layer(f"{key}.in_layers.2"), padding=1)
        projection = F.linear(F.silu(emb), *layer(f"{key}.emb_layers.1"))[..., None, None]
        if projection.shape[1] == 2 * inner.shape[1]:
            scale, shift = projection.chunk(2, dim=1)
            inner = norm(f"{key}.out_layers.0", inner) * (1 + scale) + shift
        else:
            inner = norm(f"{key}.out_layers.0", inner + projection)
        inner = F.conv2d(F.silu(inner), *layer(f"{key}.out_layers.3"), padding=1)
        h = resample(h)
        return inner + (F.conv2d(h, *layer(f"{key}.skip_connection")) if f"{key}.skip_connection.weight" in w else h)

    def attention(key, h, count):
        flat = h.flatten(2)
        qkv = F.conv1d(norm(f"{key}.norm", flat), *layer(f"{key}.qkv"))
        width, out = h.shape[1] // count, []
        for i in range(count):
            if new_order:
                q, k, v = (part[:, i * width : (i + 1) * width] for part in qkv.chunk(3, dim=1))
            else:
                q, k, v = qkv[:, 3 * i * width : 3 * (i + 1) * width].split(width, dim=1)
            weights = (q.transpose(1, 2) @ k / math.sqrt(width)).softmax(-1)  # [B, to, from]
            out.append(v @ weights.transpose(1, 2))
        return (flat + F.conv1d(torch.cat(out, dim=1), *layer(f"{key}.proj_out"))).view_as(h)

    def module(key, h, count, resample=lambda h: h):
        for j in range(3):
            module_key = f"{key}.{j}"
            if f"{module_key}.weight" in w:
                h = F.conv2d(h, *layer(module_key), padding=1)
            elif f"{module_key}.op.weight" in w:
                h = F.conv2d(h, *layer(f"{module_key}.op"), stride=2, padding=1)
            elif f"{module_key}.conv.weight" in w:
                h = F.conv2d(up(h), *layer(f"{module_key}.conv"), padding=1)
            elif f"{module_key}.qkv.weight" in w:
                h = attention(module_key, h, count(h.shape[1]))
            elif f"{module_key}.in_layers.0.weight" in w:
                h = block(module_key, h, resample if (j > 0) == (resample is up) else lambda h: h)
        return h

    def up(h):
        return h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def down(h):
        return (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2]) / 4

    def count_of(prefix):
        return 1 + max(int(m[1]) for m in (re.match(rf"{prefix}\.(\d+)\.", key) for key in w) if m)

    h, skips = x, []
    for i in range(count_of("input_blocks")):
        steps = updown and i > 0 and i % (num_res_blocks + 1) == 0
        h = module(f"input_blocks.{i}", h, heads, down if steps else lambda h: h)
        skips.append(h)
    h = block("middle_block.0", h, lambda h: h)
    h = block("middle_block.2", attention("middle_block.1", h, heads(h.shape[1])), lambda h: h)
    for i in range(count_of("output_blocks")):
        h = module(f"output_blocks.{i}", torch.cat([h, skips.pop()], dim=1), heads_up, up if updown else lambda h: h)
    return F.conv2d(F.silu(norm("out.0", h)), *layer("out.2"), padding=1)


@pytest.mark.parametrize("new_order", [True, False], ids=["new", "legacy"])
@pytest.mark.parametrize("updown", [False, True], ids=["conv", "residual"])
@pytest.mark.parametrize("scale_shift", [True, False], ids=["scale-shift", "additive"])
@pytest.mark.parametrize(
    ("shape", "flags", "heads", "heads_up"),
    [
        ({}, {"num_head_channels": 16}, lambda c: c // 16, lambda c: c // 16),
        ({"sigma": True, "blocks": 2}, {"num_head_channels": -1, "num_heads": 4, "learn_sigma": True, "num_res_blocks": 2},
         lambda c: 4, lambda c: 4),
        ({"classes": None, "mult": (1, 2, 3), "attend": (True, False, True)},
         {"num_head_channels": "-1", "num_heads": "2", "num_heads_upsample": "8", "class_cond": "False", "channel_mult": "1,2,3",
          "attention_resolutions": "8,2"}, lambda c: 2, lambda c: 8),
    ],
    ids=["head channels", "heads", "decoder heads"],
)  # fmt: skip
def test_imported_network_equals_adm(shape, flags, heads, heads_up, scale_shift, updown, new_order):
    w = adm_state_dict(stock(**shape, updown=updown, scale_shift=scale_shift))
    common_flags = {
        "use_scale_shift_norm": scale_shift,
        "resblock_updown": updown,
        "use_new_attention_order": new_order,
    }
    unet = load_adm(w, **(TINY | flags | common_flags))
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 2, 4]) if "label_emb.weight" in w else None
    with torch.no_grad():
        expected = adm(w, x, T, y, int(flags.get("num_res_blocks", 1)), heads, heads_up, new_order, updown)
        actual = unet(x, T, y).sample
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
