"""The fused operator on CUDA, in Triton; without a GPU, TRITON_INTERPRET=1 runs it on CPU tensors, number by number.

A program has whole groups of one image: a tile [pixels, channels] that fits the registers is read once, a larger one
twice, the second time from its end, which the L2 cache still holds. Sums and all between load and store are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 16384  # numbers of a tile
SECTOR = 32  # bytes: what memory hands out at once


@triton.jit
def _over_group(v, of, D: tl.constexpr, ALONE: tl.constexpr):
    """v [CB] summed over the channels of each one's group, [CB]. of: 0, 1, ... CB. ALONE: they are all of one."""
    if ALONE:
        total = tl.sum(v, 0) + tl.zeros_like(v)
    else:
        same = (of[:, None] // D) == (of[None, :] // D)
        total = tl.sum(tl.where(same, v[None, :], 0.0), 1)
    return total


@triton.jit
def _forward(
    x, y, gain, shift, mean, rstd, C, P, G, row, eps, pixel, channel,
    D: tl.constexpr, GB: tl.constexpr, CB: tl.constexpr, BP: tl.constexpr, WHOLE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    # an image's programs run side by side: in channels_last they share the lines of the cache
    parts = tl.cdiv(G, GB)
    n = (tl.program_id(0) // parts).to(tl.int64)
    of = tl.arange(0, CB)
    c = tl.program_id(0) % parts * (GB * D) + of
    mine = (of < GB * D) & (c < C)
    x += n * C * P
    y += n * C * P
    # deviations from a typical pixel, the median of three: squares of a far-off mean would swallow the variance
    one = tl.load(x + 3 * P // 7 * pixel + c * channel, mask=mine, other=0.0).to(tl.float32)
    two = tl.load(x + 5 * P // 11 * pixel + c * channel, mask=mine, other=0.0).to(tl.float32)
    three = tl.load(x + 8 * P // 13 * pixel + c * channel, mask=mine, other=0.0).to(tl.float32)
    origin = tl.maximum(tl.minimum(one, two), tl.minimum(tl.maximum(one, two), three))
    s = tl.zeros([CB], tl.float32)
    q = tl.zeros([CB], tl.float32)
    p = tl.arange(0, BP)
    v = tl.zeros([BP, CB], tl.float32)
    for start in range(0, P, BP):
        there = (start + p < P)[:, None] & mine[None, :]
        at = (start + p)[:, None] * pixel + (c * channel)[None, :]
        v = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        u = tl.where(there, v - origin[None, :], 0.0)
        s += tl.sum(u, 0)
        q += tl.sum(u * u, 0)
    own = s / P
    middle = _over_group(tl.where(mine, origin + own, 0.0), of, D, GB == 1) / D
    apart = origin + own - middle
    squares = _over_group(tl.where(mine, q - s * own + P * apart * apart, 0.0), of, D, GB == 1)
    # not maximum(): it would swallow a NaN
    variance = squares / (D * P)
    r = 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)
    first = mine & (of % D == 0)
    tl.store(mean + n * G + c // D, middle, mask=first)
    tl.store(rstd + n * G + c // D, r, mask=first)
    scale = r * tl.load(gain + n * row + c, mask=mine, other=0.0)
    move = tl.load(shift + n * row + c, mask=mine, other=0.0)
    for back in range(0, P, BP):
        start = (P - 1) // BP * BP - back
        there = (start + p < P)[:, None] & mine[None, :]
        at = (start + p)[:, None] * pixel + (c * channel)[None, :]
        if not WHOLE:
            v = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        z = (v - middle[None, :]) * scale[None, :] + move[None, :]
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(y + at, z.to(y.dtype.element_ty), mask=there)


@triton.jit
def _backward(
    dy, x, gain, shift, mean, rstd, dx, dgain, dshift, C, P, G, row, pixel, channel,
    D: tl.constexpr, GB: tl.constexpr, CB: tl.constexpr, BP: tl.constexpr, WHOLE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    # an image's programs run side by side: in channels_last they share the lines of the cache
    parts = tl.cdiv(G, GB)
    n = (tl.program_id(0) // parts).to(tl.int64)
    of = tl.arange(0, CB)
    c = tl.program_id(0) % parts * (GB * D) + of
    mine = (of < GB * D) & (c < C)
    dy += n * C * P
    x += n * C * P
    dx += n * C * P
    middle = tl.load(mean + n * G + c // D, mask=mine, other=0.0)
    r = tl.load(rstd + n * G + c // D, mask=mine, other=0.0)
    times = tl.load(gain + n * row + c, mask=mine, other=0.0)
    move = tl.load(shift + n * row + c, mask=mine, other=0.0)
    a = tl.zeros([CB], tl.float32)
    b = tl.zeros([CB], tl.float32)
    p = tl.arange(0, BP)
    xhat = tl.zeros([BP, CB], tl.float32)
    dz = tl.zeros([BP, CB], tl.float32)
    for start in range(0, P, BP):
        there = (start + p < P)[:, None] & mine[None, :]
        at = (start + p)[:, None] * pixel + (c * channel)[None, :]
        dz = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
        xhat = (tl.load(x + at, mask=there, other=0.0).to(tl.float32) - middle[None, :]) * r[None, :]
        if SILU:
            z = xhat * times[None, :] + move[None, :]
            sig = tl.sigmoid(z)
            dz = dz * sig * (1.0 + z * (1.0 - sig))
        a += tl.sum(dz * xhat, 0)
        b += tl.sum(dz, 0)
    tl.store(dgain + n * C + c, a, mask=mine)
    tl.store(dshift + n * C + c, b, mask=mine)
    # dx = rstd (gain dz - mean(gain dz) - xhat mean(gain dz xhat)), means over the group
    slope = _over_group(tl.where(mine, times * a, 0.0), of, D, GB == 1) / (D * P) * r
    level = _over_group(tl.where(mine, times * b, 0.0), of, D, GB == 1) / (D * P) * r
    steep = times * r
    for back in range(0, P, BP):
        start = (P - 1) // BP * BP - back
        there = (start + p < P)[:, None] & mine[None, :]
        at = (start + p)[:, None] * pixel + (c * channel)[None, :]
        if not WHOLE:
            dz = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
            xhat = (tl.load(x + at, mask=there, other=0.0).to(tl.float32) - middle[None, :]) * r[None, :]
            if SILU:
                z = xhat * times[None, :] + move[None, :]
                sig = tl.sigmoid(z)
                dz = dz * sig * (1.0 + z * (1.0 - sig))
        out = dz * steep[None, :] - level[None, :] - xhat * slope[None, :]
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=there)


def forward(
    x: Tensor, gain: Tensor, shift: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cpu.forward`; x float32, bfloat16 or float16."""
    y = torch.empty_like(x)
    mean = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel():
        grid, sizes, tile, warps = _plan(x, groups, MOST)
        row = x.shape[1] if len(gain) > 1 else 0
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _forward[grid](
                x, y, gain, shift, mean, rstd, *sizes[:3], row, eps, *sizes[3:], **tile, SILU=silu, num_warps=warps
            )
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cpu.backward`."""
    dx = torch.empty_like(x)
    dgain = x.new_zeros(x.shape[:2], dtype=torch.float32)
    dshift = torch.zeros_like(dgain)
    if x.numel():
        grid, sizes, tile, warps = _plan(x, groups, MOST // 2)  # two tiles are in registers
        row = x.shape[1] if len(gain) > 1 else 0
        with torch.cuda.device_of(x):
            _backward[grid](
                dy, x, gain, shift, mean, rstd, dx, dgain, dshift, *sizes[:3], row, *sizes[3:], **tile, SILU=silu,
                num_warps=warps,
            )  # fmt: skip
    return dx, dgain, dshift


def _plan(x: Tensor, groups: int, most: int) -> tuple[tuple[int], tuple[int, ...], dict[str, int], int]:
    """The grid; C, P, G and the strides of a pixel and of a channel; the tile; the warps of a program."""
    n, c = x.shape[:2]
    pixels, width = x.numel() // (n * c), c // groups
    last = not x.is_contiguous()
    together = 1  # groups of a program: enough for whole sectors where channels lie together
    while last and together < groups and together * width * x.element_size() < SECTOR:
        together *= 2
    side = triton.next_power_of_2(pixels)
    while (  # and more where images are small, while there is work for every multiprocessor
        together < groups
        and 2 * together * width <= 64
        and side * triton.next_power_of_2(2 * together * width) <= most // 2
        and n * -(-groups // (2 * together)) >= 512
    ):
        together *= 2
    together = min(together, groups)
    channels = triton.next_power_of_2(together * width)
    block = min(side, max(1, most // channels))
    tile = {"D": width, "GB": together, "CB": channels, "BP": block, "WHOLE": block >= pixels}
    warps = 4 if block * channels <= 4096 else 8 if block * channels <= 8192 else 16
    sizes = (c, pixels, groups, *((c, 1) if last else (1, pixels)))
    return (n * -(-groups // together),), sizes, tile, warps
