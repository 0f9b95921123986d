"""The flags of OpenAI's guided-diffusion ("ADM"), named as in its scripts, and the network that they describe.

This module does not import torch, so that the command line can list the flags at once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge, Lt

from ..errors import InputError, did_you_mean
from ..schema import settings

CHANNEL_MULT = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}


@settings(frozen=True)
class AdmFlags:
    """Named as in ADM's scripts, with the scripts' defaults."""

    image_size: Annotated[int, Ge(1)] = 64
    """side of the images"""
    in_channels: Annotated[int, Ge(1)] = 3
    """channels of the images (ADM's scripts: always 3)"""
    num_channels: Annotated[int, Ge(1)] = 128
    """base width"""
    num_res_blocks: Annotated[int, Ge(1)] = 2
    """residual blocks per level"""
    channel_mult: tuple[int | float, ...] = ()
    """width multiplier of each level; empty: by image_size"""
    attention_resolutions: tuple[Annotated[int, Ge(1)], ...] = (16, 8)
    """sides with attention"""
    num_heads: Annotated[int, Ge(1)] = 4
    """attention heads, where num_head_channels is -1"""
    num_head_channels: int | None = -1
    """channels per attention head; -1: num_heads decides"""
    num_heads_upsample: int | None = -1
    """heads on the way up; -1: num_heads"""
    use_scale_shift_norm: bool = True
    """AdaGN; False: the condition is added before the norm"""
    resblock_updown: bool = False
    """resample inside residual blocks"""
    use_new_attention_order: bool = False
    """order of the rows of qkv"""
    class_cond: bool = False
    """the network has classes"""
    learn_sigma: bool = False
    """twice the output channels, the second half for the variance"""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """dropout in residual blocks"""
    diffusion_steps: Annotated[int, Ge(1)] = 1000
    """T"""
    noise_schedule: str = "linear"
    """linear or cosine"""
    predict_xstart: bool = False
    """the network predicts x0, not eps"""
    rescale_timesteps: bool = False
    """the network receives t * 1000 / T"""

    def __post_init__(self) -> None:
        for name in ("num_head_channels", "num_heads_upsample"):
            if (getattr(self, name) or 0) <= 0:
                object.__setattr__(self, name, None)
        if not self.channel_mult and self.image_size not in CHANNEL_MULT:
            text = f"ADM has a default channel_mult for {format_value(CHANNEL_MULT)} pixels, not for {self.image_size}"
            raise InputError(f"{text}: give channel_mult, such as 1,2,2.")
        object.__setattr__(self, "channel_mult", self.channel_mult or CHANNEL_MULT[self.image_size])


FLAGS = tuple(f.name for f in dataclasses.fields(AdmFlags))
SAME_NAME = ("in_channels", "channel_mult", "num_res_blocks", "num_heads", "num_heads_upsample", "num_head_channels")
SAME_NAME += ("resblock_updown", "dropout")  # the flags that AdaGNUNet's arguments are called after
# these do not affect the weights
IGNORED = ("use_checkpoint", "use_fp16", "timestep_respacing", "use_kl", "rescale_learned_sigmas")

# what differs from the scripts' defaults
_IMAGENET = {"num_channels": 256, "num_head_channels": 64, "attention_resolutions": "32,16,8"}
_IMAGENET |= {"resblock_updown": True, "learn_sigma": True, "class_cond": True}
_IMAGENET64 = {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "use_new_attention_order": True}
PRESETS: dict[str, dict[str, Any]] = {
    "imagenet64": _IMAGENET | _IMAGENET64 | {"dropout": 0.1, "noise_schedule": "cosine"},
    "imagenet128": _IMAGENET | {"image_size": 128, "num_heads": 4, "num_head_channels": -1},
    "imagenet256": _IMAGENET | {"image_size": 256},
    "imagenet256_uncond": _IMAGENET | {"image_size": 256, "class_cond": False},
    "imagenet512": _IMAGENET | {"image_size": 512},
    "lsun": _IMAGENET | {"image_size": 256, "class_cond": False, "dropout": 0.1},
}


def read_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """All flags by name; missing ones have the defaults of ADM's scripts. Values are ADM's strings or Python values.

    channel_mult is resolved; num_head_channels and num_heads_upsample are None for -1. Raises InputError for an unknown
    flag or an invalid value.
    """
    for name in flags:
        if name == "patch_size":
            raise InputError("ADM has no flag 'patch_size': its networks take whole images, not patches. Leave it out.")
        if name not in FLAGS and name not in IGNORED:
            hint = did_you_mean(name, [*FLAGS, *IGNORED]) or f" Its flags: {', '.join(FLAGS)}."
            raise InputError(f"ADM has no flag '{name}'.{hint}")
    return vars(AdmFlags(**{name: value for name, value in flags.items() if name in FLAGS}))


def network_config(flags: Mapping[str, Any], num_classes: int | None = 1000) -> dict[str, Any]:
    """AdaGNUNet's arguments. flags: from `read_flags`. num_classes: used with class_cond."""
    return {name: flags[name] for name in SAME_NAME} | {
        "sample_size": flags["image_size"],
        "num_classes": num_classes if flags["class_cond"] else None,
        "null_class": False,
        "model_channels": flags["num_channels"],
        "attention_resolutions": attention_sides(flags, attention_levels(flags)),
        "norm_groups": 32,
        "norm_eps": 1e-5,
        "conditioning": "adagn" if flags["use_scale_shift_norm"] else "additive",
        "learned_variance": flags["learn_sigma"],
    }


def attention_levels(flags: Mapping[str, Any]) -> set[int]:
    """The levels with attention: ADM compares image_size // resolution with a level's downsampling factor."""
    factors = {flags["image_size"] // side for side in flags["attention_resolutions"]}
    return {level for level in range(len(flags["channel_mult"])) if 2**level in factors}


def attention_sides(flags: Mapping[str, Any], levels: set[int]) -> tuple[int, ...]:
    return tuple(flags["image_size"] // 2**level for level in sorted(levels))


def format_value(value: Any) -> str:
    if isinstance(value, list | tuple | dict | set):
        return ",".join(f"{v:g}" for v in value) or "none"
    return str(value)


def preset_flags(preset: str | None) -> dict[str, Any]:
    """The flags of a preset, {} for None. Raises InputError with the known names."""
    if preset not in (None, *PRESETS):
        hint = did_you_mean(preset, PRESETS, most=1)
        raise InputError(f"there is no preset '{preset}'.{hint} Presets: {', '.join(PRESETS)}.")
    return dict(PRESETS.get(preset, {}))
