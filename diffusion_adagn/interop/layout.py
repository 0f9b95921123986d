"""The correspondence between the layers of another library's U-Net and ours, and the conversion of weights.

A correspondence is a dictionary {our layer: their layers}: the rows of our weight (and bias) are theirs, concatenated.
Most layers have one counterpart; `projection` has one for every site, and a qkv may have three.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.blocks import ResBlock, SelfAttention
from ..models.unet import AdaGNUNet

Correspondence = dict[str, tuple[str, ...]]


def correspondence(
    unet: AdaGNUNet, module_names: Mapping[str, str], layer_names: Mapping[str, tuple[str, ...]]
) -> Correspondence:
    """{our layer: their layers} of a whole network.

    Args:
        unet: Our network.
        module_names: {our module: theirs} for every residual block, attention and layer outside them.
        layer_names: {our layer inside a block or attention: theirs}, and {"projection": the layer that projects the
            condition for a block's site}.
    """
    layers: Correspondence = {}
    for ours, theirs in module_names.items():
        module = unet.get_submodule(ours)
        if not isinstance(module, ResBlock | SelfAttention):
            layers[ours] = (theirs,)
            continue
        for name, layer in module.named_children():
            if next(layer.parameters(), None) is not None:
                layers[f"{ours}.{name}"] = tuple(f"{theirs}.{layer}" for layer in layer_names[name])
    blocks = (module_names[site.name.removesuffix(".norm2")] for site in unet.sites())
    layers["projection"] = tuple(f"{block}.{layer}" for block in blocks for layer in layer_names["projection"])
    return layers


def gather(names: Correspondence, unet: AdaGNUNet, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights as our state dict, copied. `unet` only gives the shapes and may be on the meta device.

    Raises InputError that names the keys that are missing, unexpected, or of another shape.
    """
    pairs = {key: parts for key, _, parts in _tensors(names, unet)}
    expected_keys = dict.fromkeys(part for parts in pairs.values() for part in parts)
    problems = [
        f"{problem}: {', '.join(keys[:6])}" + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
        for problem, keys in (
            ("missing", [k for k in expected_keys if k not in theirs]),
            ("unexpected", [k for k in theirs if k not in expected_keys]),
        )
        if keys
    ]
    if problems:
        raise InputError(f"the weights do not match the described network ({'; '.join(problems)}).")
    return {
        key: _concatenate(key, [theirs[p] for p in parts], unet.get_parameter(key), parts)
        for key, parts in pairs.items()
    }


def scatter(names: Correspondence, unet: AdaGNUNet, theirs: nn.Module) -> dict[str, Tensor]:
    """Our weights as their state dict, copied. `theirs` only gives the shapes and may be on the meta device."""
    state = {}
    for _, ours, parts in _tensors(names, unet):
        shapes = [theirs.get_parameter(part).shape for part in parts]
        for part, shape, rows in zip(parts, shapes, ours.detach().split([s[0] for s in shapes])):
            state[part] = rows.reshape(shape).clone()
    return state


def _tensors(names: Correspondence, unet: AdaGNUNet) -> Iterator[tuple[str, nn.Parameter, tuple[str, ...]]]:
    """(our key, our parameter, their keys) of every weight and bias."""
    for ours, theirs in names.items():
        for tensor_name, parameter in unet.get_submodule(ours).named_parameters():
            yield f"{ours}.{tensor_name}", parameter, tuple(f"{name}.{tensor_name}" for name in theirs)


def _concatenate(key: str, tensors: list[Tensor], ours: nn.Parameter, parts: tuple[str, ...]) -> Tensor:
    """Their tensors concatenated, in our shape: a 1x1 convolution over a sequence [rows, columns, 1] is a matrix."""
    shapes = {tuple(t.shape[1:]) for t in tensors}
    rows = sum(len(t) if t.ndim else 1 for t in tensors)
    expected = tuple(ours.shape[1:])
    if rows != len(ours) or not shapes <= {expected, (*expected, 1)}:
        raise InputError(
            f"{parts[0]}{' and the others' if len(parts) > 1 else ''} should have shape {list(ours.shape)} for our "
            f"{key}; got {', '.join(str(list(t.shape)) for t in tensors[:3])}{', ...' if len(tensors) > 3 else ''}."
        )
    return torch.cat(tensors).reshape(ours.shape)
