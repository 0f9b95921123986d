"""Conditioning layers: which parameters a site receives, and how it applies them to the feature map.

A layer of one site is made by `(channels, groups, eps)`. `Params` names what `modulation(t, y)` returns for it.
`forward(h, mod, apply_act)` applies these to h [B, channels, H, W], followed by SiLU if `apply_act`. To add one, write a class
and a line in CONDITIONING. Where the class enters, and how the layer starts, are class attributes of `ConditioningLayer`.

With one channel per group, GroupNorm is instance norm, and `adagn` equals `adain`. Compare layers at 4 or more channels per group.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .norm import Norm


class ConditioningLayer:
    """What the network reads from a conditioning layer; the values here are AdaGN's.

    Attributes:
        Params: NamedTuple of the parameters, [B, channels] each unless named in `token_params`.
        class_input: where the class enters: "vector", in one vector with the timestep; "tokens", as separate tokens; or None.
        token_params: the last fields of Params, [B, tokens, channels] each, projected from the class tokens.
        gated: Params has a `gate` [B, channels], which multiplies the residual branch at its end.
        zero_init: all parameters start at 0, whatever `model.zero_init_modulation` is.
        min_pixels: smaller feature maps are rejected.
        norm1_cls: the layer of a block's first norm where both are modulated; None: the same.
    """

    Params: ClassVar[type[tuple]]
    class_input: ClassVar[Literal["vector", "tokens"] | None] = "vector"
    token_params: ClassVar[tuple[str, ...]] = ()
    gated: ClassVar[bool] = False
    zero_init: ClassVar[bool] = False
    min_pixels: ClassVar[int] = 1
    norm1_cls: "ClassVar[type[ConditioningLayer] | None]" = None


class AdaGN(Norm, ConditioningLayer):
    """Adaptive group normalisation:  h <- GroupNorm(h) * (1 + gamma) + beta.

    Source: Dhariwal & Nichol 2021 (arXiv 2105.05233), section 3, equation 3 and `use_scale_shift_norm`.
    The norm keeps its own weight w and bias b, so the gain a channel meets is w (1 + gamma), the shift b (1 + gamma) + beta.
    """

    class Params(NamedTuple):
        """gamma, beta: [B, channels]."""

        gamma: Tensor
        beta: Tensor

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__(groups, channels, eps)

    def forward(self, h: Tensor, mod: "AdaGN.Params", apply_act: bool = False) -> Tensor:
        return self.modulate(h, mod.gamma, mod.beta, apply_act)


class AdaGNZero(AdaGN):
    """AdaGN and a gate on the residual branch:  x <- x + gate * conv2(silu(GroupNorm(h) * (1 + gamma) + beta)).

    gamma, beta and gate start at 0, so that a new block is the identity; conv2 keeps its normal init, since a zero gate
    times a zero convolution has no gradient and never learns.
    Source: adaLN-Zero of Peebles & Xie 2023 (arXiv 2212.09748), section 3.2, with GroupNorm for LayerNorm.
    """

    class Params(NamedTuple):
        """gamma, beta, gate: [B, channels]."""

        gamma: Tensor
        beta: Tensor
        gate: Tensor

    gated = True
    zero_init = True
    norm1_cls = AdaGN


class AdaIN(AdaGN):
    """Adaptive instance normalisation:  h <- InstanceNorm(h) * (1 + gamma) + beta.

    Each channel of each image is normalised separately, so its mean and contrast come from gamma and beta alone.
    Source: Huang & Belongie 2017 (arXiv 1703.06868), equation 8, gamma and beta predicted as in StyleGAN (Karras et al. 2019).
    On 1 pixel the normalised map is 0 and the image is lost: fewer than 4 pixels are rejected.
    """

    min_pixels = 4

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__(channels, channels, eps)

    def forward(self, h: Tensor, mod: "AdaGN.Params", apply_act: bool = False) -> Tensor:
        if h.shape[-2] * h.shape[-1] < self.min_pixels:
            raise InputError(
                f"adain cannot normalise a feature map of {h.shape[-2]}x{h.shape[-1]} pixels: give larger images, or a "
                "network with fewer levels."
            )
        return super().forward(h, mod, apply_act)


class Additive(Norm, ConditioningLayer):
    """Addition:  h <- GroupNorm(h + shift).

    Source: Ho et al. 2020 (DDPM), and ADM with `use_scale_shift_norm` False; EDM's best CIFAR-10 network.
    """

    class Params(NamedTuple):
        """shift: [B, channels]."""

        shift: Tensor

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__(groups, channels, eps)

    def forward(self, h: Tensor, mod: "Additive.Params", apply_act: bool = False) -> Tensor:
        return self.modulate(h + _broadcast(mod.shift), None, None, apply_act)


class Gain(Norm, ConditioningLayer):
    """A gain and no shift:  h <- GroupNorm(h) * (1 + gamma).

    Source: AdaGN without its beta; StyleGAN2 modulates in this way (Karras et al. 2020, section 2.2).
    """

    class Params(NamedTuple):
        """gamma: [B, channels]."""

        gamma: Tensor

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__(groups, channels, eps)

    def forward(self, h: Tensor, mod: "Gain.Params", apply_act: bool = False) -> Tensor:
        return self.modulate(h, mod.gamma, None, apply_act)


class FiLM(nn.Module, ConditioningLayer):
    """Feature-wise linear modulation without a norm before it:  h <- h * (1 + gamma) + beta.

    Source: Perez et al. 2018 (arXiv 1709.07871), equation 2, where nothing is normalised.
    """

    Params = AdaGN.Params

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__()
        self.num_channels = channels

    def forward(self, h: Tensor, mod: "AdaGN.Params", apply_act: bool = False) -> Tensor:
        h = h * (1 + _broadcast(mod.gamma)) + _broadcast(mod.beta)
        return F.silu(h) if apply_act else h


class CrossAttention(Norm, ConditioningLayer):
    """The class as tokens, attended to by the feature map:

        h <- GroupNorm(h + shift);  h <- h + proj(softmax(q(h) keys^T / sqrt(d)) values)

    shift comes from the timestep alone, keys and values from the class tokens alone. proj starts at 0.
    Source: Rombach et al. 2022 (arXiv 2112.10752), section 3.3. Heads are 64 channels wide where that divides, else one.
    """

    class Params(NamedTuple):
        """shift: [B, channels]. keys, values: [B, tokens, channels]."""

        shift: Tensor
        keys: Tensor
        values: Tensor

    class_input = "tokens"
    token_params = ("keys", "values")

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__(groups, channels, eps)
        self.heads = channels // 64 if channels % 64 == 0 else 1
        with torch.random.fork_rng(devices=[]):  # the other layers start the same under every conditioning
            self.query = nn.Linear(channels, channels)
            self.proj = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, h: Tensor, mod: "CrossAttention.Params", apply_act: bool = False) -> Tensor:
        h = self.modulate(h + _broadcast(mod.shift), None, None, apply_act=False)
        rows = h.shape[0]
        q = rearrange(self.query(rearrange(h, "b c h w -> b (h w) c")), "b n (k d) -> b k n d", k=self.heads)
        keys, values = (
            rearrange(part, "b n (k d) -> b k n d", k=self.heads).expand(rows, -1, -1, -1)
            for part in (mod.keys, mod.values)
        )
        attended = rearrange(F.scaled_dot_product_attention(q, keys, values), "b k n d -> b n (k d)")
        h = h + rearrange(self.proj(attended), "b (h w) c -> b c h w", h=h.shape[2])
        return F.silu(h) if apply_act else h


class TimestepOnly(AdaGN):
    """AdaGN with gamma and beta as functions of t alone: the baseline without class conditioning. Labels are accepted and ignored."""

    class_input = None


CONDITIONING: dict[str, type[ConditioningLayer]] = {
    "adagn": AdaGN,
    "adagn_zero": AdaGNZero,
    "adain": AdaIN,
    "additive": Additive,
    "gain": Gain,
    "film": FiLM,
    "cross_attention": CrossAttention,
    "none": TimestepOnly,
}


def _broadcast(values: Tensor) -> Tensor:
    """[B, channels] -> [B, channels, 1, 1], to multiply a feature map."""
    return values[..., None, None]
