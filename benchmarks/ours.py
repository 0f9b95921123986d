"""This package's side: everything that the benchmarks ask of it, in one place.

A fast path that this version of the package does not have is left out, and the reason told.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion_adagn import AdaGNUNet

SIDE = "ours"


def network(seed: int = 0, **config) -> AdaGNUNet:
    """AdaGNUNet(**config), seeded, with what starts at zero drawn small, so that every path shows in its output."""
    torch.manual_seed(seed)
    unet = AdaGNUNet(**config)
    with torch.no_grad():
        for p in unet.parameters():
            if not p.any():
                nn.init.normal_(p, 0, 0.5 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.02)
    return unet


def _ops():
    """diffusion_adagn.ops, or None in a version without it."""
    try:
        return importlib.import_module("diffusion_adagn.ops")
    except ModuleNotFoundError as error:
        if error.name != "diffusion_adagn.ops":
            raise
        return None


def fused_operator(device: torch.device) -> tuple[Callable[..., Tensor] | None, str]:
    """(adagn_silu, "") if the fused operator works on this device, else (None, why not)."""
    ops = _ops()
    if not hasattr(ops, "adagn_silu"):
        return None, "this version of diffusion_adagn has no fused operator (diffusion_adagn.ops)"
    if not ops.available(torch.device(device)):
        return None, f"diffusion_adagn.ops says that its fused operator is not available on {device} here"
    return ops.adagn_silu, ""


def operators(device: torch.device) -> tuple[list[str], str]:
    """The operators that the network can be set to on this device, and why the fused one is not among them ("" if it is)."""
    _, why = fused_operator(device)
    if not why and not hasattr(AdaGNUNet, "set_operator"):
        why = "this version's network has no set_operator"
    return (["eager"] if why else ["fused", "eager"]), why


def set_operator(unet: AdaGNUNet, name: str) -> None:
    if hasattr(unet, "set_operator"):
        unet.set_operator(name)


def compile_network(unet: AdaGNUNet) -> AdaGNUNet:
    """Its repeated blocks compiled, as the package itself does."""
    unet.compile_repeated_blocks()
    return unet


def pipeline(unet: AdaGNUNet):
    """(pipe without clipping or progress bar, DDIM on the linear schedule; the scheduler's copy for another loop)."""
    from diffusion_adagn import ClassConditionalPipeline
    from diffusion_adagn.config import DiffusionConfig
    from diffusion_adagn.diffusion.schedule import make_scheduler

    schedulers = [make_scheduler(DiffusionConfig(schedule="linear"), "ddim") for _ in range(2)]
    pipe = ClassConditionalPipeline(unet, schedulers[0], clip_x0=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, schedulers[1]


def dataset(images, labels, classes: int):
    """An ImageDataset over uint8 [N, H, W, C] and int64 [N]."""
    from diffusion_adagn.data.store import ImageDataset
    from diffusion_adagn.labels import LabelSpace

    return ImageDataset("benchmark", images, labels, LabelSpace(tuple(map(str, range(classes)))), fingerprint="")
