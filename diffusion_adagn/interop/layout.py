"""Which layers of another library's U-Net are which of ours, and weights carried over by that.

A correspondence is a dictionary {our layer: their layers}: the rows of our weight (and bias) are theirs, one below the
other. Most layers have one counterpart; `projection` has every site's, and a qkv may have three.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.blocks import ResBlock, SelfAttention
from ..models.unet import AdaGNUNet

Correspondence = dict[str, tuple[str, ...]]


def correspondence(unet: AdaGNUNet, places: Mapping[str, str], words: Mapping[str, tuple[str, ...]]) -> Correspondence:
    """{our layer: their layers} of a whole network.

    places: {our module: theirs} for every residual block, attention and layer outside them.
    words: {our layer inside a block or attention: theirs}, and {"told": the layer that tells a block's site}.
    """
    found: Correspondence = {}
    for ours, theirs in places.items():
        module = unet.get_submodule(ours)
        if not isinstance(module, ResBlock | SelfAttention):
            found[ours] = (theirs,)
            continue
        for name, layer in module.named_children():
            if next(layer.parameters(), None) is not None:
                found[f"{ours}.{name}"] = tuple(f"{theirs}.{word}" for word in words[name])
    blocks = (places[site.name.removesuffix(".norm2")] for site in unet.sites())
    found["projection"] = tuple(f"{block}.{word}" for block in blocks for word in words["told"])
    return found


def gather(names: Correspondence, unet: AdaGNUNet, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights as our state dict, copied. `unet` gives the shapes alone and may be on the meta device.

    Raises InputError naming the keys that are missing, left over, or of another shape.
    """
    pairs = {key: parts for key, _, parts in _tensors(names, unet)}
    wanted = dict.fromkeys(part for parts in pairs.values() for part in parts)
    faults = [
        f"{what}: {', '.join(keys[:6])}" + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
        for what, keys in (
            ("missing", [k for k in wanted if k not in theirs]),
            ("left over", [k for k in theirs if k not in wanted]),
        )
        if keys
    ]
    if faults:
        raise InputError(f"the weights do not fit the network that is described ({'; '.join(faults)}).")
    return {
        key: _joined(key, [theirs[p] for p in parts], unet.get_parameter(key), parts) for key, parts in pairs.items()
    }


def scatter(names: Correspondence, unet: AdaGNUNet, theirs: nn.Module) -> dict[str, Tensor]:
    """Our weights as their state dict, copied. `theirs` gives the shapes alone and may be on the meta device."""
    state = {}
    for _, ours, parts in _tensors(names, unet):
        shapes = [theirs.get_parameter(part).shape for part in parts]
        for part, shape, rows in zip(parts, shapes, ours.detach().split([s[0] for s in shapes])):
            state[part] = rows.reshape(shape).clone()
    return state


def _tensors(names: Correspondence, unet: AdaGNUNet) -> Iterator[tuple[str, nn.Parameter, tuple[str, ...]]]:
    """(our key, our parameter, their keys) of every weight and bias."""
    for ours, theirs in names.items():
        for kind, parameter in unet.get_submodule(ours).named_parameters():
            yield f"{ours}.{kind}", parameter, tuple(f"{name}.{kind}" for name in theirs)


def _joined(key: str, tensors: list[Tensor], ours: nn.Parameter, parts: tuple[str, ...]) -> Tensor:
    """One below the other, in our shape: a 1x1 convolution over a sequence [rows, columns, 1] is a matrix."""
    shapes = {tuple(t.shape[1:]) for t in tensors}
    rows = sum(len(t) if t.ndim else 1 for t in tensors)
    expected = tuple(ours.shape[1:])
    if rows != len(ours) or not shapes <= {expected, (*expected, 1)}:
        raise InputError(
            f"{parts[0]}{' and the like' if len(parts) > 1 else ''} should make {list(ours.shape)} for our {key}; "
            f"given {', '.join(str(list(t.shape)) for t in tensors[:3])}{', ...' if len(tensors) > 3 else ''}."
        )
    return torch.cat(tensors).reshape(ours.shape)
