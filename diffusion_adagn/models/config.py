"""The settings of a network, and whether this machine can hold it. Nothing heavy is imported."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import AfterValidator

from ..errors import InputError
from ..labels import MAX_CLASSES
from ..schema import settings

MAX_LEVELS = 14
AUGMENT_DIM = 9  # parameters of an augmented image, see data/augment.py
PatchSize = Literal[1, 2, 4]
PATCH_SIZES: tuple[int, ...] = get_args(PatchSize)


def _distinct(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError(f"names a value twice: {', '.join(map(str, values))}")
    return values


@settings
class ModelConfig:
    """The network, in the terms of OpenAI's ADM. These are AdaGNUNet's defaults too."""

    model_channels: Annotated[int, Ge(1)] = 128
    """Base width: level i has model_channels * channel_mult[i] channels."""
    channel_mult: Annotated[tuple[Annotated[int | float, Ge(0.125)], ...], MinLen(1)] = (1, 2, 2, 2)
    """Width multiplier of each resolution level; each width must be whole."""
    num_res_blocks: Annotated[int, Ge(1), Le(64)] = 2
    """Residual blocks per level (one more on the way up)."""
    attention_resolutions: Annotated[tuple[Annotated[int, Ge(1)], ...], AfterValidator(_distinct)] = (16, 8)
    """Sides of the feature maps, in pixels, at which blocks are followed by self-attention. Feature maps are smaller
    than images by patch_size: 32-pixel images in patches of 2 begin at 16."""
    num_heads: Annotated[int, Ge(1)] = 4
    """Attention heads, where num_head_channels is unset."""
    num_heads_upsample: Annotated[int | None, Ge(1)] = None
    """Heads on the way up, where num_head_channels is unset. Unset: num_heads."""
    num_head_channels: Annotated[int | None, Ge(1)] = 64
    """Channels per attention head; unset: num_heads decides."""
    resblock_updown: bool = False
    """Resample inside residual blocks (ADM's large nets) instead of plain convolutions."""
    dropout: Annotated[float, Ge(0), Le(0.99)] = 0.0
    """Dropout before the last convolution of each residual block."""
    norm_groups: Annotated[int, Ge(1)] = 32
    """Groups of every GroupNorm; must divide every width."""
    norm_eps: Annotated[float, Gt(0)] = 1e-5
    """Epsilon of every GroupNorm."""
    conditioning: Literal[
        "adagn", "adagn_zero", "adain", "additive", "gain", "film", "cross_attention", "none"
    ] = "adagn"  # fmt: skip
    """How timestep and class condition a site: adagn, adagn_zero, adain, additive, gain, film, cross_attention, or
    none (time only). See docs/conditioning.md."""
    join: Literal["sum", "concat"] = "sum"
    """How the vectors of timestep and class are merged before the projection (ADM: sum)."""
    class_tokens: Annotated[int, Ge(2)] = 4
    """Tokens per class under cross_attention; at least 2, since attention over one token is constant."""
    modulate_both_norms: bool = False
    """Modulate the first norm of each residual block too (ADM: the second only)."""
    zero_init_modulation: bool = False
    """Start with gamma = beta = 0, so that a new net ignores time and class (ADM: no)."""
    class_conditional: bool = True
    """False: train without labels."""
    null_class: bool = True
    """Add a null row to the class table; guidance needs it."""
    patch_size: PatchSize = 1
    """Side of the patches whose pixels the network takes as channels: feature maps of image_size / patch_size, at 1/4
    (2) or 1/16 (4) of the cost for the same channels. Noise, loss and samples stay images."""
    max_guidance_scale: Annotated[float | None, Gt(1), Le(100)] = None
    """Make the guidance scale an input of the network, from 1 to this: guided samples then take one pass per step in
    place of two (Tang et al. 2025, arXiv 2501.15420). Unset: not an input. See docs/guidance.md."""


@settings
class NetworkConfig(ModelConfig):
    """AdaGNUNet's arguments, as in the config.json of a network."""

    sample_size: Annotated[int, Ge(1), Le(2**13)] = 32
    """Side of the images in pixels."""
    in_channels: Annotated[int, Ge(1), Le(4096)] = 3
    """Channels of the images."""
    out_channels: Annotated[int | None, Ge(1), Le(4096)] = None
    """Unset: in_channels."""
    num_classes: Annotated[int | None, Ge(0), Le(MAX_CLASSES)] = None
    """K; unset or 0: no labels."""
    learned_variance: bool = False
    """Twice the output channels, the second half for the variance."""
    augment_dim: Annotated[int, Ge(0), Le(4096)] = 0
    """Augmentation parameters per image that `modulation` may receive; 0: none."""


def machine_memory() -> int:
    """Bytes; a terabyte where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**40


def check_size(network: Mapping[str, Any]) -> None:
    """Raises InputError if this machine cannot hold AdaGNUNet(**network), or if counting its layers would take minutes.

    The size is a lower bound: weights of the residual blocks, class table and class tokens, and one feature map, in fp32.
    """
    network = vars(NetworkConfig()) | dict(network)
    levels, width = len(network["channel_mult"]), network["model_channels"]
    if levels > MAX_LEVELS:
        expected = f"expected at most {MAX_LEVELS}, such as 1,2,2"
        raise InputError(f"model.channel_mult has {levels:,} numbers, one per level; {expected}.")
    widths = [float(width) * mult for mult in network["channel_mult"]]
    table = 4.0 * width * (network["num_classes"] or 0)
    tokens = 4.0 * width * width * network["class_tokens"] * (network["conditioning"] == "cross_attention")
    weights = 18 * (2.0 * network["num_res_blocks"] + 1) * sum(w * w for w in widths) + table + tokens
    patch = network["patch_size"]
    side = float(network["sample_size"]) / patch
    pixels = side * side * max([network["in_channels"] * patch**2, *widths[:1]])
    if 4 * (weights + pixels) > machine_memory():
        raise InputError(
            f"the network takes {4 * (weights + pixels) / 2**30:,.0f} GiB or more ({weights:.3g} weights, and {pixels:.3g} numbers in a "
            f"feature map of one image), and this machine has {machine_memory() / 2**30:,.0f}: choose a smaller model.model_channels "
            f"(now {width:,}), model.channel_mult, model.num_res_blocks, model.class_tokens, data.image_size, or fewer classes."
        )
