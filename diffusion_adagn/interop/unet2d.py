"""Conversion to and from diffusers' UNet2DModel, weight by weight.

Both can express ADM's U-Net with AdaGN (`resnet_time_scale_shift` "scale_shift") or addition ("default").
"""

import torch
from diffusers import UNet2DModel

from ..errors import InputError
from ..models.config import ModelConfig
from ..models.unet import AdaGNUNet
from .layout import Correspondence, correspondence, gather, scatter

TIME_SCALE_SHIFT = {"adagn": "scale_shift", "additive": "default"}  # our conditioning -> their resnet_time_scale_shift

LAYER_NAMES = {
    **{name: (name,) for name in ("norm1", "conv1", "norm2", "conv2")},
    "skip": ("conv_shortcut",),
    "projection": ("time_emb_proj",),
    "norm": ("group_norm",),
    "qkv": ("to_q", "to_k", "to_v"),
    "proj": ("to_out.0",),
}


def to_unet2d(unet: AdaGNUNet) -> UNet2DModel:
    """The same network as a stock UNet2DModel, with the same outputs and gradients.

    Weights are copied; the mode (train, eval) stays. A null class is the last row of its class table, and a learned
    variance the second half of its output channels. Of a network with patches of p x p pixels it is the part between the
    two shuffles, for inputs [C p^2, side / p, side / p]: unet(x) is pixel_shuffle(model(pixel_unshuffle(x, p)), p).
    Weights for augmentation parameters are dropped: UNet2DModel has no such input, and sampling has zeros there.
    Raises InputError, with all reasons, for what UNet2DModel cannot express.
    """
    reasons = _reasons_against_export(unet)
    if reasons:
        raise InputError(f"UNet2DModel cannot express this network: {'; '.join(reasons)}.")
    c = unet.config
    has_attention = [level.stages[0].attention is not None for level in unet.down]
    step = "Resnet{}sampleBlock2D" if c.resblock_updown else "{}Block2D"
    classes = unet.embedding.classes
    with torch.device("meta"):
        model = UNet2DModel(
            sample_size=c.sample_size // c.patch_size,
            in_channels=unet.conv_in.in_channels,
            out_channels=unet.conv_out.out_channels,
            block_out_channels=tuple(level.stages[0].block.conv1.out_channels for level in unet.down),
            layers_per_block=c.num_res_blocks,
            down_block_types=tuple("AttnDownBlock2D" if a else step.format("Down") for a in has_attention),
            up_block_types=tuple("AttnUpBlock2D" if a else step.format("Up") for a in reversed(has_attention)),
            downsample_type="resnet" if c.resblock_updown else "conv",
            upsample_type="resnet" if c.resblock_updown else "conv",
            attention_head_dim=_attention_head_dim(unet),
            norm_num_groups=c.norm_groups,
            attn_norm_num_groups=c.norm_groups,
            norm_eps=c.norm_eps,
            dropout=c.dropout,
            resnet_time_scale_shift=TIME_SCALE_SHIFT[c.conditioning],
            num_class_embeds=classes.num_embeddings if classes is not None else None,
            flip_sin_to_cos=True,
            freq_shift=0,
        )
    model.load_state_dict(scatter(_correspondence(unet), unet, model), assign=True)
    return model.train(unet.training)


def from_unet2d(model: UNet2DModel, null_class: bool = False, patch_size: int = 1) -> AdaGNUNet:
    """The same network as an AdaGNUNet, with the same outputs and gradients.

    Weights are copied; the mode (train, eval) stays. Twice as many output channels as input channels mean a learned
    variance.
    null_class: whether the last row of the class table is a null class; the model does not store this.
    patch_size: p of a model that works on pixel_unshuffle(image, p) (`to_unet2d`); the model does not store this either.
    Raises InputError, with all reasons, for what AdaGNUNet cannot express.
    """
    if not isinstance(model, UNet2DModel):
        raise InputError(f"expected a diffusers UNet2DModel, not {type(model).__name__}.")
    reasons = _reasons_against_import(model, null_class, patch_size)
    if reasons:
        short = [reason if len(reason) <= 200 else f"{reason[:200]}..." for reason in reasons]
        raise InputError(f"AdaGNUNet cannot express this UNet2DModel: {'; '.join(short)}.")
    c = model.config
    first = c.block_out_channels[0]
    side = c.sample_size if isinstance(c.sample_size, int) else c.sample_size[0]
    learned = c.out_channels == 2 * c.in_channels
    with torch.device("meta"):
        unet = AdaGNUNet(
            sample_size=side * patch_size,
            in_channels=c.in_channels // patch_size**2,
            out_channels=None if learned or c.out_channels == c.in_channels else c.out_channels // patch_size**2,
            num_classes=c.num_class_embeds - int(null_class) if c.num_class_embeds else None,
            null_class=null_class,
            model_channels=first,
            channel_mult=tuple(w // first if w % first == 0 else w / first for w in c.block_out_channels),
            num_res_blocks=c.layers_per_block,
            attention_resolutions=tuple(
                side // 2**level for level, block_type in enumerate(c.down_block_types) if block_type.startswith("Attn")
            ),
            num_heads=ModelConfig.num_heads if c.attention_head_dim else 1,
            num_head_channels=c.attention_head_dim,
            resblock_updown=_resamplers(model) == {"ResnetBlock2D"},
            dropout=c.dropout,
            norm_groups=c.norm_num_groups,
            norm_eps=c.norm_eps,
            conditioning={theirs: ours for ours, theirs in TIME_SCALE_SHIFT.items()}[c.resnet_time_scale_shift],
            learned_variance=learned,
            patch_size=patch_size,
        )
    unet.load_state_dict(gather(_correspondence(unet), unet, model.state_dict()), assign=True)
    return unet.train(model.training)


def _correspondence(unet: AdaGNUNet) -> Correspondence:
    names = {
        "conv_in": "conv_in",
        "embedding.time.0": "time_embedding.linear_1",
        "embedding.time.2": "time_embedding.linear_2",
        "middle.0.block": "mid_block.resnets.0",
        "middle.0.attention": "mid_block.attentions.0",
        "middle.1.block": "mid_block.resnets.1",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    if unet.embedding.classes is not None:
        names["embedding.classes"] = "class_embedding"
    for direction, levels in (("down", unet.down), ("up", unet.up)):
        for i, level in enumerate(levels):
            block = f"{direction}_blocks.{i}"
            for j, stage in enumerate(level.stages):
                names[f"{direction}.{i}.stages.{j}.block"] = f"{block}.resnets.{j}"
                if stage.attention is not None:
                    names[f"{direction}.{i}.stages.{j}.attention"] = f"{block}.attentions.{j}"
            if level.resample is not None:
                residual = unet.config.resblock_updown
                names[f"{direction}.{i}.resample" + (".block" if residual else "")] = (
                    f"{block}.{direction}samplers.0" + ("" if residual else ".conv")
                )
    return correspondence(unet, names, LAYER_NAMES)


# ---------------------------------------------------------------------- reasons against a conversion


def _reasons_against_export(unet: AdaGNUNet) -> list[str]:
    c = unet.config
    widths = sorted(_head_widths(unet))
    checks = {
        f"conditioning is {c.conditioning}, but it supports {' and '.join(TIME_SCALE_SHIFT)}": c.conditioning
        not in TIME_SCALE_SHIFT,
        f"join is {c.join}, but it adds time and class (sum)": c.join != "sum",
        "it reads the guidance scale: fix one, such as --scale 2": c.max_guidance_scale is not None,
        "modulate_both_norms, but it modulates only the second norm": c.modulate_both_norms,
        f"channel_mult starts with {c.channel_mult[0]}, but its timestep embedding is as wide as its first level (1)": (
            c.channel_mult[0] != 1
        ),
        f"attention heads are {', '.join(map(str, widths))} channels wide, but it has one width (num_head_channels)": (
            len(widths) > 1 and not _one_head(unet)
        ),
    }
    return [reason for reason, applies in checks.items() if applies]


def _reasons_against_import(model: UNet2DModel, null_class: bool, patch_size: int) -> list[str]:
    c = model.config
    has_attention = [block_type.startswith("Attn") for block_type in c.down_block_types]
    known = {f"{block_type}{direction}Block2D" for block_type in ("", "Attn") for direction in ("Down", "Up")}
    known |= {f"Resnet{direction}sampleBlock2D" for direction in ("Down", "Up")}
    unknown = sorted({*c.down_block_types, *c.up_block_types} - known)
    steps = _resamplers(model)
    groups = c.attn_norm_num_groups
    if groups is None and c.resnet_time_scale_shift == "default":
        groups = c.norm_num_groups
    rows = c.num_class_embeds or 0
    sides = c.sample_size if isinstance(c.sample_size, list | tuple) else (c.sample_size,) * 2
    checks = {
        f"block types {', '.join(unknown)}": bool(unknown),
        "attention at different levels of the encoder and the decoder": (
            has_attention != [block_type.startswith("Attn") for block_type in reversed(c.up_block_types)]
        ),
        f"levels resampled in different ways ({', '.join(sorted(steps))})": (
            not (steps == {"ResnetBlock2D"} or steps <= {"Downsample2D", "Upsample2D"})
        ),
        f"a middle block of type {c.mid_block_type}": c.mid_block_type != "UNetMidBlock2D",
        "a middle block without attention (add_attention false)": not c.add_attention,
        f"mid_block_scale_factor {c.mid_block_scale_factor} (expected: 1)": c.mid_block_scale_factor != 1,
        f"attn_norm_num_groups {groups}, but norm_num_groups {c.norm_num_groups}": groups != c.norm_num_groups,
        f"{c.time_embedding_type} timestep embedding": c.time_embedding_type != "positional",
        f"time_embedding_dim {c.time_embedding_dim} (expected: 4 times the first width)": (
            c.time_embedding_dim not in (None, 4 * c.block_out_channels[0])
        ),
        f"freq_shift {c.freq_shift} (expected: 0)": c.freq_shift != 0,
        "flip_sin_to_cos false (expected: cosines first)": not c.flip_sin_to_cos,
        f"activation {c.act_fn} (expected: silu)": c.act_fn not in ("silu", "swish"),
        f"class_embed_type {c.class_embed_type} (expected: a table)": c.class_embed_type is not None,
        f"downsample_padding {c.downsample_padding} (expected: 1)": c.downsample_padding != 1,
        "center_input_sample": c.center_input_sample,
        f"sample_size {c.sample_size} (expected: one side of square images; model.register_to_config(sample_size=...))": (
            None in sides or sides[0] != sides[1]
        ),
        f"{c.in_channels} input and {c.out_channels} output channels are no images in patches of {patch_size}x{patch_size} pixels "
        f"(expected: multiples of {patch_size**2})": bool(
            c.in_channels % patch_size**2 or c.out_channels % patch_size**2
        ),
        f"null_class needs a class table of at least 2 rows, not {rows}": null_class and rows < 2,
    }
    return [reason for reason, applies in checks.items() if applies]


def _resamplers(model: UNet2DModel) -> set[str]:
    """Class names of the layers between levels."""
    layers = [getattr(b, "downsamplers", None) for b in model.down_blocks]
    layers += [getattr(b, "upsamplers", None) for b in model.up_blocks]
    return {type(layer).__name__ for group in layers for layer in group or ()}


def _attentions(unet: AdaGNUNet) -> list:
    stages = [
        *unet.middle,
        *(stage for direction in (unet.down, unet.up) for level in direction for stage in level.stages),
    ]
    return [stage.attention for stage in stages if stage.attention is not None]


def _head_widths(unet: AdaGNUNet) -> set[int]:
    return {a.proj.in_features // a.heads for a in _attentions(unet)}


def _one_head(unet: AdaGNUNet) -> bool:
    return all(a.heads == 1 for a in _attentions(unet))


def _attention_head_dim(unet: AdaGNUNet) -> int | None:
    """Their attention_head_dim: the common width of all heads, or None, which means one head."""
    widths = _head_widths(unet)
    return widths.pop() if len(widths) == 1 else None
