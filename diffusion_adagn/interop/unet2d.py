"""diffusers' UNet2DModel: the same network out and in, weight by weight.

What both can express: ADM's U-Net with AdaGN (`resnet_time_scale_shift` "scale_shift") or addition ("default").
"""

import torch
from diffusers import UNet2DModel

from ..errors import InputError
from ..models.unet import AdaGNUNet
from .layout import Correspondence, correspondence, gather, scatter

TIME_SCALE_SHIFT = {"adagn": "scale_shift", "additive": "default"}  # our conditioning -> their resnet_time_scale_shift

WORDS = {
    **{name: (name,) for name in ("norm1", "conv1", "norm2", "conv2")},
    "skip": ("conv_shortcut",),
    "told": ("time_emb_proj",),
    "norm": ("group_norm",),
    "qkv": ("to_q", "to_k", "to_v"),
    "proj": ("to_out.0",),
}


def to_unet2d(unet: AdaGNUNet) -> UNet2DModel:
    """The same network as a stock UNet2DModel: the same outputs and gradients; weights copied, mode (train, eval) kept.

    A null class is the last row of its class table, and a learned variance the second half of its output channels.
    Raises InputError, with every reason, for what UNet2DModel cannot express.
    """
    reasons = _not_expressible(unet)
    if reasons:
        raise InputError(f"UNet2DModel cannot express this network: {'; '.join(reasons)}.")
    c = unet.config
    attends = [level.stages[0].attention is not None for level in unet.down]
    step = "Resnet{}sampleBlock2D" if c.resblock_updown else "{}Block2D"
    classes = unet.embedding.classes
    with torch.device("meta"):
        model = UNet2DModel(
            sample_size=c.sample_size,
            in_channels=c.in_channels,
            out_channels=unet.conv_out.out_channels,
            block_out_channels=tuple(level.stages[0].block.conv1.out_channels for level in unet.down),
            layers_per_block=c.num_res_blocks,
            down_block_types=tuple("AttnDownBlock2D" if a else step.format("Down") for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else step.format("Up") for a in reversed(attends)),
            downsample_type="resnet" if c.resblock_updown else "conv",
            upsample_type="resnet" if c.resblock_updown else "conv",
            attention_head_dim=_head_width(unet),
            norm_num_groups=c.norm_groups,
            attn_norm_num_groups=c.norm_groups,
            norm_eps=c.norm_eps,
            dropout=c.dropout,
            resnet_time_scale_shift=TIME_SCALE_SHIFT[c.conditioning],
            num_class_embeds=classes.num_embeddings if classes is not None else None,
            flip_sin_to_cos=True,
            freq_shift=0,
        )
    model.load_state_dict(scatter(_names(unet), unet, model), assign=True)
    return model.train(unet.training)


def from_unet2d(model: UNet2DModel, null_class: bool = False) -> AdaGNUNet:
    """The same network as an AdaGNUNet: the same outputs and gradients; weights copied, mode (train, eval) kept.

    null_class: whether the last row of its class table is a null class, which the model itself does not tell. Twice as many
    output channels as input channels are taken for a learned variance.
    Raises InputError, with every reason, for what AdaGNUNet cannot express.
    """
    if not isinstance(model, UNet2DModel):
        raise InputError(f"a diffusers UNet2DModel is expected, not {type(model).__name__}.")
    reasons = _not_ours(model, null_class)
    if reasons:
        short = [reason if len(reason) <= 200 else f"{reason[:200]}..." for reason in reasons]
        raise InputError(f"AdaGNUNet cannot express this UNet2DModel: {'; '.join(short)}.")
    c = model.config
    first = c.block_out_channels[0]
    side = c.sample_size if isinstance(c.sample_size, int) else c.sample_size[0]
    learned = c.out_channels == 2 * c.in_channels
    with torch.device("meta"):
        unet = AdaGNUNet(
            sample_size=side,
            in_channels=c.in_channels,
            out_channels=None if learned or c.out_channels == c.in_channels else c.out_channels,
            num_classes=c.num_class_embeds - int(null_class) if c.num_class_embeds else None,
            null_class=null_class,
            model_channels=first,
            channel_mult=tuple(w // first if w % first == 0 else w / first for w in c.block_out_channels),
            num_res_blocks=c.layers_per_block,
            attention_resolutions=tuple(
                side // 2**level for level, kind in enumerate(c.down_block_types) if kind.startswith("Attn")
            ),
            num_heads=1,
            num_head_channels=c.attention_head_dim,
            resblock_updown=_resamplers(model) == {"ResnetBlock2D"},
            dropout=c.dropout,
            norm_groups=c.norm_num_groups,
            norm_eps=c.norm_eps,
            conditioning={theirs: ours for ours, theirs in TIME_SCALE_SHIFT.items()}[c.resnet_time_scale_shift],
            learned_variance=learned,
        )
    unet.load_state_dict(gather(_names(unet), unet, model.state_dict()), assign=True)
    return unet.train(model.training)


def _names(unet: AdaGNUNet) -> Correspondence:
    places = {
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
        places["embedding.classes"] = "class_embedding"
    for way, levels in (("down", unet.down), ("up", unet.up)):
        for i, level in enumerate(levels):
            block = f"{way}_blocks.{i}"
            for j, stage in enumerate(level.stages):
                places[f"{way}.{i}.stages.{j}.block"] = f"{block}.resnets.{j}"
                if stage.attention is not None:
                    places[f"{way}.{i}.stages.{j}.attention"] = f"{block}.attentions.{j}"
            if level.resample is not None:
                residual = unet.config.resblock_updown
                places[f"{way}.{i}.resample" + (".block" if residual else "")] = f"{block}.{way}samplers.0" + (
                    "" if residual else ".conv"
                )
    return correspondence(unet, places, WORDS)


# ---------------------------------------------------------------------- what the other cannot express


def _not_expressible(unet: AdaGNUNet) -> list[str]:
    c = unet.config
    widths = sorted(_head_widths(unet))
    checks = {
        f"conditioning is {c.conditioning}, and it knows {' and '.join(TIME_SCALE_SHIFT)}": c.conditioning
        not in TIME_SCALE_SHIFT,
        f"join is {c.join}, and it adds time and class (sum)": c.join != "sum",
        "modulate_both_norms: it tells the second norm alone": c.modulate_both_norms,
        f"channel_mult starts with {c.channel_mult[0]}, and its timestep embedding is as wide as its first level (1)": (
            c.channel_mult[0] != 1
        ),
        f"attention heads are {', '.join(map(str, widths))} channels wide, and it has one width everywhere (num_head_channels)": (
            len(widths) > 1 and not _one_head(unet)
        ),
    }
    return [reason for reason, refused in checks.items() if refused]


def _not_ours(model: UNet2DModel, null_class: bool) -> list[str]:
    c = model.config
    attends = [kind.startswith("Attn") for kind in c.down_block_types]
    known = {f"{kind}{way}Block2D" for kind in ("", "Attn") for way in ("Down", "Up")}
    known |= {f"Resnet{way}sampleBlock2D" for way in ("Down", "Up")}
    others = sorted({*c.down_block_types, *c.up_block_types} - known)
    steps = _resamplers(model)
    groups = c.attn_norm_num_groups
    if groups is None and c.resnet_time_scale_shift == "default":
        groups = c.norm_num_groups
    rows = c.num_class_embeds or 0
    sides = c.sample_size if isinstance(c.sample_size, list | tuple) else (c.sample_size,) * 2
    checks = {
        f"block types {', '.join(others)}": bool(others),
        "attention on the way down and up at different levels": (
            attends != [kind.startswith("Attn") for kind in reversed(c.up_block_types)]
        ),
        f"levels resampled in different ways ({', '.join(sorted(steps))})": (
            not (steps == {"ResnetBlock2D"} or steps <= {"Downsample2D", "Upsample2D"})
        ),
        f"a middle of type {c.mid_block_type}": c.mid_block_type != "UNetMidBlock2D",
        "a middle without attention (add_attention false)": not c.add_attention,
        f"mid_block_scale_factor {c.mid_block_scale_factor} (1 is expected)": c.mid_block_scale_factor != 1,
        f"attn_norm_num_groups {groups}, unlike norm_num_groups {c.norm_num_groups}": groups != c.norm_num_groups,
        f"{c.time_embedding_type} timestep embedding": c.time_embedding_type != "positional",
        f"time_embedding_dim {c.time_embedding_dim} (4 times the first width is expected)": (
            c.time_embedding_dim not in (None, 4 * c.block_out_channels[0])
        ),
        f"freq_shift {c.freq_shift} (0 is expected)": c.freq_shift != 0,
        "flip_sin_to_cos false (cosines first are expected)": not c.flip_sin_to_cos,
        f"activation {c.act_fn} (silu is expected)": c.act_fn not in ("silu", "swish"),
        f"class_embed_type {c.class_embed_type} (a table is expected)": c.class_embed_type is not None,
        f"downsample_padding {c.downsample_padding} (1 is expected)": c.downsample_padding != 1,
        "center_input_sample": c.center_input_sample,
        f"sample_size {c.sample_size}: one side, of square pictures, is expected; model.register_to_config(sample_size=...)": (
            None in sides or sides[0] != sides[1]
        ),
        f"null_class is asked of a class table of {rows} rows": null_class and rows < 2,
    }
    return [reason for reason, refused in checks.items() if refused]


def _resamplers(model: UNet2DModel) -> set[str]:
    """The classes of the layers between levels."""
    layers = [getattr(b, "downsamplers", None) for b in model.down_blocks]
    layers += [getattr(b, "upsamplers", None) for b in model.up_blocks]
    return {type(layer).__name__ for several in layers for layer in several or ()}


def _attentions(unet: AdaGNUNet) -> list:
    stages = [*unet.middle, *(stage for way in (unet.down, unet.up) for level in way for stage in level.stages)]
    return [stage.attention for stage in stages if stage.attention is not None]


def _head_widths(unet: AdaGNUNet) -> set[int]:
    return {a.proj.in_features // a.heads for a in _attentions(unet)}


def _one_head(unet: AdaGNUNet) -> bool:
    return all(a.heads == 1 for a in _attentions(unet))


def _head_width(unet: AdaGNUNet) -> int | None:
    """Their attention_head_dim: the one width, or None, which means one head."""
    widths = _head_widths(unet)
    return widths.pop() if len(widths) == 1 else None
