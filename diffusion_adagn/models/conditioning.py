"""Conditioning kinds: what a site is told, and how it applies it to the feature map.

A kind is a layer of one site, made by `(channels, groups, eps)`. `Params` names what modulation(t, y) hands it;
`forward(h, told, silu)` applies it to h [B, channels, H, W], with the SiLU after it if asked. A new kind is one class and one line in KINDS; what differs from
AdaGN in where the class enters, or in how it starts, is said in the class attributes of `ConditioningLayer`.

With one channel a group GroupNorm is instance norm, and `adagn` and `adain` are one: compare kinds at 4 channels a group
or more.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .norm import Norm


class ConditioningLayer:
    """What the network asks a kind; the values here are AdaGN's.

    Told: the fields, [B, channels] each unless named in token_fields.
    label_in: where the class enters: with the timestep in one vector, as tokens of its own, or nowhere.
    token_fields: the last fields of Told, [B, tokens, channels] each, projected from the class tokens.
    gated: Told has a `gate` [B, channels], which multiplies the residual branch at its end.
    zero_init: all that a site is told starts at 0, whatever `model.zero_init_modulation` says.
    min_pixels: fewer in the feature map are refused.
    first: the kind of a block's first norm where both are modulated; None: the same.
    """

    Params: ClassVar[type[tuple]]
    class_input: ClassVar[Literal["vector", "tokens"] | None] = "vector"
    token_params: ClassVar[tuple[str, ...]] = ()
    gated: ClassVar[bool] = False
    zero_init: ClassVar[bool] = False
    min_pixels: ClassVar[int] = 1
    first: "ClassVar[type[ConditioningLayer] | None]" = None


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

    def forward(self, h: Tensor, told: "AdaGN.Told", silu: bool = False) -> Tensor:
        return self.modulate(h, told.gamma, told.beta, silu)


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
    first = AdaGN


class AdaIN(AdaGN):
    """Adaptive instance normalisation:  h <- InstanceNorm(h) * (1 + gamma) + beta.

    Each channel of each picture is normalised by itself, so the mean and contrast of a channel are told, never measured.
    Source: Huang & Belongie 2017 (arXiv 1703.06868), equation 8, gamma and beta predicted as in StyleGAN (Karras et al. 2019).
    On 1 pixel the normalised map is 0 and the picture lost: fewer than 4 pixels are refused.
    """

    min_pixels = 4

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__(channels, channels, eps)

    def forward(self, h: Tensor, told: "AdaGN.Told", silu: bool = False) -> Tensor:
        if h.shape[-2] * h.shape[-1] < self.min_pixels:
            raise InputError(
                f"adain cannot normalise a feature map of {h.shape[-2]}x{h.shape[-1]} pixels: give larger pictures, or a "
                "network with fewer levels."
            )
        return super().forward(h, told, silu)


class Additive(Norm, ConditioningLayer):
    """Addition:  h <- GroupNorm(h + shift).

    Source: Ho et al. 2020 (DDPM), and ADM with `use_scale_shift_norm` False; EDM's best CIFAR-10 network.
    """

    class Params(NamedTuple):
        """shift: [B, channels]."""

        shift: Tensor

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__(groups, channels, eps)

    def forward(self, h: Tensor, told: "Additive.Told", silu: bool = False) -> Tensor:
        return self.modulate(h + _map(told.shift), None, None, silu)


class Gain(Norm, ConditioningLayer):
    """A gain and no shift:  h <- GroupNorm(h) * (1 + gamma).

    Source: AdaGN without its beta; the modulation of StyleGAN2 (Karras et al. 2020, section 2.2) is of this kind.
    """

    class Params(NamedTuple):
        """gamma: [B, channels]."""

        gamma: Tensor

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__(groups, channels, eps)

    def forward(self, h: Tensor, told: "Gain.Told", silu: bool = False) -> Tensor:
        return self.modulate(h, told.gamma, None, silu)


class FiLM(nn.Module, ConditioningLayer):
    """Feature-wise linear modulation without a norm before it:  h <- h * (1 + gamma) + beta.

    Source: Perez et al. 2018 (arXiv 1709.07871), equation 2, at a place where nothing is normalised.
    """

    Params = AdaGN.Params

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__()
        self.num_channels = channels

    def forward(self, h: Tensor, told: "AdaGN.Told", silu: bool = False) -> Tensor:
        h = h * (1 + _map(told.gamma)) + _map(told.beta)
        return F.silu(h) if silu else h


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
        with torch.random.fork_rng(devices=[]):  # the other layers start as they do under every kind
            self.query = nn.Linear(channels, channels)
            self.proj = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, h: Tensor, told: "CrossAttention.Told", silu: bool = False) -> Tensor:
        h = self.modulate(h + _map(told.shift), None, None, silu=False)
        rows = h.shape[0]
        q = rearrange(self.query(rearrange(h, "b c h w -> b (h w) c")), "b n (k d) -> b k n d", k=self.heads)
        keys, values = (
            rearrange(part, "b n (k d) -> b k n d", k=self.heads).expand(rows, -1, -1, -1)
            for part in (told.keys, told.values)
        )
        heard = rearrange(F.scaled_dot_product_attention(q, keys, values), "b k n d -> b n (k d)")
        h = h + rearrange(self.proj(heard), "b (h w) c -> b c h w", h=h.shape[2])
        return F.silu(h) if silu else h


class TimestepOnly(AdaGN):
    """AdaGN told by the timestep alone:  gamma and beta are functions of t. The class is not heard: what any other kind is
    compared with. Labels are accepted, and change nothing."""

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


def _map(values: Tensor) -> Tensor:
    """[B, channels] -> [B, channels, 1, 1], to meet a feature map."""
    return values[..., None, None]
