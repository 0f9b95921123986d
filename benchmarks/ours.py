"""This package's side: everything that the benchmarks ask of it, in one place."""

import torch
from torch import nn

from diffusion_adagn import AdaGNUNet
from diffusion_adagn.ops import unsupported_reason
from diffusion_adagn.runtime.speed import compile_blocks

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


def operators(device: torch.device) -> tuple[list[str], str]:
    """The operators that the network can be set to on this device, and why the fused one is not among them ("" if it is)."""
    why = unsupported_reason(device)
    return (["eager"] if why else ["fused", "eager"]), why


def prepare(unet: AdaGNUNet, operator: str, layout: torch.memory_format) -> None:
    unet.set_operator(operator)
    unet.set_memory_format("channels_last" if layout == torch.channels_last else "contiguous")


def compile_network(unet: AdaGNUNet) -> AdaGNUNet:
    """Its repeated blocks compiled, as the package itself does."""
    compile_blocks(unet)
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
    from diffusion_adagn.data import ImageDataset
    from diffusion_adagn.labels import LabelSpace

    return ImageDataset("benchmark", images, labels, LabelSpace(tuple(map(str, range(classes)))), fingerprint="")
