"""A class that was learned after training: what it changes in the network, for the rows that are conditioned on it.

A batch row of another class takes the same path as without it, so its result is bit-equal.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANGED_LAYERS = ("block.conv1", "block.conv2", "attention.qkv", "attention.proj")  # of a stage, where it has them


class LowRank(NamedTuple):
    """A change of a layer's weight by a product: W + up down.

    Attributes:
        down: [rank, inputs] of a linear layer, [rank, inputs, 3, 3] of a convolution.
        up: [outputs, rank].
    """

    down: Tensor
    up: Tensor

    def output(self, x: Tensor) -> Tensor:
        """What the change adds to the layer's output at x: features last, or [B, inputs, H, W] of a convolution."""
        if self.down.ndim == 2:
            return F.linear(F.linear(x, self.down), self.up)
        return F.conv2d(F.conv2d(x, self.down, padding=1), self.up[:, :, None, None])


class Strength(NamedTuple):
    """The entry of a stage in a modulation: how much of each learned class's change of its layers a row receives.

    Attributes:
        rows: [B, learned classes]; 0 for none, 1 for all of it.
    """

    rows: Tensor


LayerChanges = Sequence[tuple[Tensor, Mapping[str, LowRank]]]  # (strength [B], {layer of the stage: change})


@dataclass(eq=False)
class LearnedClass:
    """A class as tensors.

    Args:
        name: of the class.
        vectors: [1, class_dim], the class vector; or [sites, class_dim], one for each site, in the order of `unet.sites()`.
        layers: {layer name: its change}; the layers are those of `changeable_layers`.
        file: that it was loaded from.
    """

    name: str
    vectors: Tensor
    layers: dict[str, LowRank] = field(default_factory=dict)
    file: str = ""

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, as `nn.Module._apply` does."""
        self.vectors = function(self.vectors)
        self.layers = {name: LowRank(*map(function, change)) for name, change in self.layers.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as `from_tensors` takes them."""
        parts = {f"{name}.{part}": t for name, change in self.layers.items() for part, t in change._asdict().items()}
        return {"vectors": self.vectors} | parts

    def sha256(self) -> str:
        """Of the tensors, by name."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Tensor], file: str = "") -> "LearnedClass":
        """The inverse of `tensors`."""
        layers = dict.fromkeys(key.rpartition(".")[0] for key in tensors if key != "vectors")
        parts = {layer: LowRank(tensors[f"{layer}.down"], tensors[f"{layer}.up"]) for layer in layers}
        return cls(name, tensors["vectors"], parts, file)


class ClassVectors(NamedTuple):
    """The class vectors of a batch.

    Attributes:
        shared: [B, class_dim], one for all sites.
        by_site: [B, sites, class_dim]; None if no row has one for each site.
        rows: bool [B or 1, 1], the rows that have one for each site; None where by_site is.
    """

    shared: Tensor
    by_site: Tensor | None = None
    rows: Tensor | None = None


def vectors_of_labels(
    learned: Sequence[LearnedClass], labels: Tensor, shared: Tensor, first: int, sites: int
) -> ClassVectors:
    """The class vectors of labels [B]. shared: [B, class_dim], of all rows but those of learned classes, which have the ids
    first, first + 1, ..."""
    by_site, rows = None, None
    for label, one in enumerate(learned, first):
        row = (labels == label)[:, None]
        if len(one.vectors) == 1:
            shared = torch.where(row, one.vectors, shared)
            continue
        if by_site is None:
            by_site, rows = shared[:, None].expand(-1, sites, -1), torch.zeros_like(row)
        by_site, rows = torch.where(row[..., None], one.vectors, by_site), rows | row
    return ClassVectors(shared, by_site, rows)


def stage_of(site: str) -> str:
    """The name of the stage that a site is in: "up.1.stages.0" of "up.1.stages.0.block.norm2"."""
    return site.rpartition(".block.")[0]


def changeable_layers(stages: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers that a learned class may change, by name, in the order in which an image passes them."""
    inside = {f"{path}.{name}": (stage, name) for path, stage in stages.items() for name in CHANGED_LAYERS}
    return {
        path: stage.get_submodule(name)
        for path, (stage, name) in inside.items()
        if name.startswith("block.") or stage.attention is not None
    }


def changed(layer: nn.Module, x: Tensor, name: str, changes: LayerChanges) -> Tensor:
    """The layer's output at x, with its changes added in the rows that receive them.

    Args:
        layer: a convolution or a linear layer.
        x: its input.
        name: of the layer in its stage.
        changes: of the stage.
    """
    out = layer(x)
    for strength, parts in changes:
        if name in parts:
            row = strength.to(out.dtype).reshape(-1, *[1] * (out.ndim - 1))
            seen = layer.resampled(x) if hasattr(layer, "resampled") else x
            out = torch.where(row != 0, out + row * parts[name].output(seen), out)
    return out
