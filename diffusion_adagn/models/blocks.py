"""The U-Net's building blocks, in ADM's shapes: residual block, self-attention, up, down."""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .learned import LayerChanges, changed


def zero_init(layer: nn.Module) -> nn.Module:
    """Set weights and biases to 0, so that a residual branch starts as zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def down2(h: Tensor) -> Tensor:
    return F.avg_pool2d(h, 2)


def up2(h: Tensor) -> Tensor:
    return F.interpolate(h, scale_factor=2.0, mode="nearest")


class Conv3(nn.Conv2d):
    """3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1)


class Downsample(Conv3):
    """3x3 convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, stride=2)


class Upsample(Conv3):
    """Nearest neighbour x2, then a 3x3 convolution.

    Only four of the nine pixels under the kernel differ. With their weights summed, this is a transposed convolution of the
    small map: 4/9 of the multiplications and half the time, forward and backward. Used on a CPU in fp32; not measured elsewhere.
    """

    def resampled(self, h: Tensor) -> Tensor:
        """What the convolution sees, [B, C, 2H, 2W]."""
        return up2(h)

    def forward(self, h: Tensor) -> Tensor:
        if h.device.type != "cpu" or h.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
            return super().forward(self.resampled(h))
        weight = _sum_pairs(_sum_pairs(self.weight, 2), 3).transpose(0, 1)
        return F.conv_transpose2d(h, weight, self.bias, stride=2, padding=1)


def _sum_pairs(weight: Tensor, dim: int) -> Tensor:
    """Three weights along dim, for repeated pixels -> the four of a transposed convolution of stride 2.

    The output is twice as long as h: even positions are w0 h[i-1] + (w1 + w2) h[i], odd ones (w0 + w1) h[i] + w2 h[i+1].
    """
    w0, w1, w2 = weight.unbind(dim)
    return torch.stack((w2, w1 + w2, w0 + w1, w0), dim)


class ResBlock(nn.Module):
    """x + conv(dropout(silu(norm2(conv(resample(silu(norm1(x))))))), the skip resampled and widened as needed.

    norm2 is a site (a conditioning layer); norm1 is a plain Norm unless both norms are modulated.
    The last convolution starts at 0, except under gated conditioning, where the gate does.
    Source: Dhariwal & Nichol 2021, appendix; BigGAN's residual up/down blocks.

    Args:
        norm1: channels -> the first norm.
        norm2: channels -> the second norm.
        resample: None, `down2` or `up2`, applied before the first convolution and on the skip.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm1: Callable[[int], nn.Module],
        norm2: Callable[[int], nn.Module],
        dropout: float = 0.0,
        resample: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.sites: tuple[str, ...] = ()  # names, set by the network
        self.resample = resample
        self.norm1 = norm1(in_channels)
        self.conv1 = (Upsample if resample is up2 else Conv3)(in_channels, out_channels)
        self.norm2 = norm2(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3(out_channels, out_channels)
        self.gated = self.norm2.gated
        if not self.gated:
            zero_init(self.conv2)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, mod: Sequence[tuple[Tensor, ...]], changes: LayerChanges = ()) -> Tensor:
        """x [B, in_channels, H, W]; mod: one entry per site of this block, in order; changes: of a learned class.

        Returns: [B, out_channels, H', W'].
        """
        h = self.norm1(x, mod[0], apply_act=True) if len(mod) == 2 else self.norm1(x, apply_act=True)
        if self.resample is not None:
            x = self.resample(x)
        h = down2(h) if self.resample is down2 else h  # conv1 itself does up2
        h = changed(self.conv1, h, "block.conv1", changes)
        h = self.dropout(self.norm2(h, mod[-1], apply_act=True))
        h = changed(self.conv2, h, "block.conv2", changes)
        if self.gated:
            h = h * mod[-1].gate[..., None, None]
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """x + proj(attention(norm(x))) over the H*W positions, the projection zero-initialised."""

    def __init__(self, channels: int, heads: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, changes: LayerChanges = ()) -> Tensor:
        """[B, channels, H, W] -> the same shape. changes: of a learned class."""
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        qkv = changed(self.qkv, h, "attention.qkv", changes)
        q, k, v = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")
        h = changed(self.proj, h, "attention.proj", changes)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Stage(nn.Module):
    """One residual block and, at chosen resolutions, self-attention after it."""

    def __init__(self, block: ResBlock, attention: SelfAttention | None = None):
        super().__init__()
        self.path = ""  # its name in the network, which sets it
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, mod: Sequence[tuple[Tensor, ...]], changes: LayerChanges = ()) -> Tensor:
        h = self.block(x, mod, changes)
        return h if self.attention is None else self.attention(h, changes)


class Level(nn.Module):
    """The stages at one resolution and the step to the next one (a Stage that resamples, a convolution, or nothing)."""

    def __init__(self, stages: Sequence[Stage], resample: nn.Module | None):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.resample = resample
