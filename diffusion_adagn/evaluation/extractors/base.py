"""The base class of extractors over a torch network, and what extractors share."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError
from ...runtime.precision import use_precision
from ..features import Extractor, FeatureSet

ANTIALIASED = {"bilinear": "bilinear with antialiasing", "bicubic": "bicubic with antialiasing"}


def described(extractor: Extractor) -> dict:
    """The common part of `to_dict`."""
    return {key: getattr(extractor, key) for key in ("name", "hash", "dimension", "resolution", "resize", "is_fid")}


def record_of(extractor: Extractor | None) -> dict:
    """What is saved of an extractor with its features and results; {} for None."""
    return {} if extractor is None else described(extractor) | extractor.to_dict()


def weights_hash(weights: Mapping[str, Tensor | np.ndarray], recipe: Mapping[str, object]) -> str:
    """16 hex digits of the sha256 over the named weights and the recipe (JSON). It does not depend on the machine."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for name, weight in sorted(weights.items()):
        values = weight.detach().cpu().numpy() if isinstance(weight, Tensor) else np.asarray(weight)
        digest.update(f"\n{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]


def check_pixels(pixels: np.ndarray) -> np.ndarray:
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.ndim != 4
        or pixels.shape[3] not in (1, 3)
    ):
        given = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise InputError(f"an extractor takes a numpy array uint8 [N, H, W, C] with C 1 or 3, not {given}.")
    return pixels


def to_planes(pixels: np.ndarray) -> Tensor:
    """uint8 [N, H, W, C] -> uint8 [N, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(check_pixels(pixels).transpose(0, 3, 1, 2)))


def to_colour(x: Tensor) -> Tensor:
    """[N, 1 or 3, H, W] -> [N, 3, H, W], gray repeated."""
    return x.expand(-1, 3, -1, -1)


def resized(x: Tensor, resolution: int, mode: str) -> Tensor:
    """float32 [N, C, H, W] of 0..255 -> [N, C, resolution, resolution], clipped to 0..255.

    mode: "bilinear", "bicubic".
    """
    if x.shape[2:] == (resolution, resolution):
        return x
    return F.interpolate(x, (resolution, resolution), mode=mode, align_corners=False, antialias=True).clamp(0, 255)


class NetworkExtractor:
    """An extractor over a torch network: eval mode, float32 (no TF32, no autocast), no gradients.

    A subclass defines `name` and `forward`; the rest is as in Extractor.
    """

    name: str
    resize: str
    class_names: tuple[str, ...] | None = None
    is_fid = False

    def __init__(self, network: nn.Module, dimension: int, resolution: int, device: str | torch.device, recipe: dict):
        """recipe: JSON values that, with the weights and the resolution, determine the features."""
        self.network = network.eval().requires_grad_(False).float()
        self.dimension = dimension
        self.resolution = resolution
        self.device = torch.device(device)
        recipe_record = {"name": self.name, "resolution": resolution, "resize": self.resize, **recipe}
        self.hash = weights_hash(self.network.state_dict(), recipe_record)
        self.network.to(self.device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [N, C, H, W] on the device -> (pooled [N, D], logits [N, K] or None)."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> FeatureSet:
        x = to_planes(pixels).to(self.device)
        with use_precision("fp32", self.device):
            pooled, logits = self.forward(x)
        probabilities = None if logits is None else logits.float().softmax(1).cpu().numpy()
        return FeatureSet(pooled.float().cpu().numpy(), probabilities)

    def to_dict(self) -> dict:
        return described(self)
