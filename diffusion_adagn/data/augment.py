"""Non-leaking augmentation of training images (Karras et al. 2022, EDM, arXiv 2206.00364, appendix F.2, table 6).

Each image is flipped, scaled, turned, stretched and moved at random, and the network receives how, as AUGMENT_DIM
numbers. At zeros, which is what it receives when sampling, it generates images that are not augmented.

|              | drawn                         | transform                                      | parameters          |
|---|---|---|---|
| x-flip       | a0 of {0, 1}                  | mirrored left to right if 1                    | a0                  |
| y-flip       | a1 of {0, 1}                  | mirrored top to bottom if 1                    | a1                  |
| scale        | a2 ~ N(0, 1)                  | times 2^(0.2 a2)                               | a2                  |
| rotation     | a3 ~ U(-pi, pi)               | by a3, clockwise as displayed                  | cos a3 - 1, sin a3  |
| anisotropy   | a4 ~ U(-pi, pi), a5 ~ N(0, 1) | times 2^(0.2 a5) along a4, 2^(-0.2 a5) across  | a5 cos a4, a5 sin a4 |
| translation  | a6, a7 ~ N(0, 1)              | by a6 / 8 and a7 / 8 of the side, right, down  | a6, a7              |

Each line is applied with probability p, independently, in this order; x-flip always (a0 = 1 for half of the images).
What is not applied has parameters 0. As in the paper, the parameters of an anisotropy do not tell (a4, a5) from
(a4 + pi, -a5), its inverse.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .rng import normal, words

OCTAVES = 0.2  # log2 of the scale at one standard deviation, and of the anisotropy
SHIFT = 1 / 8  # translation at one standard deviation, of the side
_UNIFORMS = 9  # drawn per image: a0; whether and a1; whether; whether and a3; whether and a4; whether


@dataclass(frozen=True)
class Augmentations:
    """What happens to each of B images.

    Attributes:
        parameters: float32 [B, AUGMENT_DIM], the network's input, in the order of the table above.
        inverse: float32 [B, 2, 3], without the flips: the place (x, y, 1) in the result -> the place in the image. x is to
            the right, y down, the centre is 0 and the edges -1 and 1.
        moved: int64 [M], the images whose `inverse` is not the identity, in increasing order.
    """

    parameters: Tensor
    inverse: Tensor
    moved: Tensor


def draw_augmentations(seed: int, positions: Tensor, probability: float) -> Augmentations:
    """The augmentations at these positions of a run: a function of (seed, position).

    Args:
        seed: Of the run.
        positions: int64 [B], on the CPU.
        probability: Of each line of the table except x-flip, 0..1.

    Returns:
        On the CPU.
    """
    uniform = (words(seed, "augment", positions, _UNIFORMS)[:, :_UNIFORMS].double() / 2**32).unbind(1)
    a2, a5, a6, a7 = normal(seed, "augment_normal", positions, (4,)).double().unbind(1)
    applied = [uniform[i] < probability for i in (1, 3, 4, 6, 8)]
    a0, a1 = (uniform[0] < 0.5).double(), (applied[0] & (uniform[2] < 0.5)).double()
    a3, a4 = (math.pi * (2 * uniform[i] - 1) for i in (5, 7))
    a2, a3, a5, a6, a7 = (
        torch.where(on, a, 0.0) for a, on in zip((a2, a3, a5, a6, a7), (*applied[1:], applied[4]), strict=True)
    )
    parameters = [a0, a1, a2, a3.cos() - 1, a3.sin(), a5 * a4.cos(), a5 * a4.sin(), a6, a7]
    # translation(anisotropy(rotation(scale(x)))), inverted
    shrunk = _diagonal(-OCTAVES * a2, -OCTAVES * a2)
    stretched = _product(_rotation(a4), _product(_diagonal(-OCTAVES * a5, OCTAVES * a5), _rotation(-a4)))
    linear = _product(shrunk, _product(_rotation(-a3), stretched))
    shift = -(linear * (2 * SHIFT * torch.stack([a6, a7], -1))[:, None]).sum(-1, keepdim=True)
    moved = torch.stack(applied[1:]).any(0).nonzero().flatten()
    return Augmentations(torch.stack(parameters, -1).float(), torch.cat([linear, shift], -1).float(), moved)


def augment_images(images: Tensor, augmentations: Augmentations) -> Tensor:
    """The augmented images. Those that are only flipped, or not at all, keep their pixels exactly.

    Outside an image is its mirror image. Pixels are the mean of four bicubic samples, so that a smaller image has no
    aliasing.

    Args:
        images: float32 [B, C, H, H] in [-1, 1].
        augmentations: Of these images, on their device.

    Returns:
        float32 [B, C, H, H] in [-1, 1].
    """
    for dim, flip in ((-1, augmentations.parameters[:, 0]), (-2, augmentations.parameters[:, 1])):
        images = torch.where(flip.bool()[:, None, None, None], images.flip(dim), images)
    moved = augmentations.moved
    if not len(moved):
        return images
    return images.index_copy(0, moved, _warp(images[moved], augmentations.inverse[moved]))


def _warp(images: Tensor, inverse: Tensor) -> Tensor:
    side = images.shape[-1]
    # places of the samples, two per pixel and axis; elementwise, since a matrix product may be TF32
    places = (torch.arange(2 * side, device=images.device, dtype=torch.float32) + 0.5) / side - 1
    x, y = places[None, None, :], places[None, :, None]
    grid = torch.stack([row[:, 0, None, None] * x + row[:, 1, None, None] * y + row[:, 2, None, None]
                        for row in inverse.unbind(1)], dim=-1)  # fmt: skip
    samples = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(samples, 2).clamp(-1, 1)


def _rotation(angle: Tensor) -> Tensor:
    """[B] -> [B, 2, 2], from x towards y."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))


def _diagonal(x_octaves: Tensor, y_octaves: Tensor) -> Tensor:
    """[B] each -> [B, 2, 2], scaling x and y by 2 to these powers."""
    return torch.diag_embed(torch.stack([x_octaves, y_octaves], -1).exp2())


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix products [B, 2, 2]; elementwise, so that an image's does not depend on its batch."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)
