"""This package's side of the benchmarks."""

import torch
from torch import nn

from diffusion_adagn import AdaGNUNet
from diffusion_adagn.ops import unsupported_reason
from diffusion_adagn.runtime.speed import compile_blocks

SIDE = "ours"


def network(seed: int = 0, **config) -> AdaGNUNet:
    """AdaGNUNet(**config), seeded. Parameters that start at zero get small random values, so that every path affects the output."""
    torch.manual_seed(seed)
    unet = AdaGNUNet(**config)
    with torch.no_grad():
        for p in unet.parameters():
            if not p.any():
                nn.init.normal_(p, 0, 0.5 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.02)
    return unet


def operators(device: torch.device) -> tuple[list[str], str]:
    """The operators available on this device, and the reason why the fused one is not ("" if it is)."""
    reason = unsupported_reason(device)
    return (["eager"] if reason else ["fused", "eager"]), reason


def prepare(unet: AdaGNUNet, operator: str, memory_format: torch.memory_format) -> None:
    """Set the operator and the memory format."""
    unet.set_operator(operator)
    unet.set_memory_format("channels_last" if memory_format == torch.channels_last else "contiguous")


def compile_network(unet: AdaGNUNet) -> AdaGNUNet:
    """Compile the repeated blocks, as the package does."""
    compile_blocks(unet)
    return unet


def pipeline(unet: AdaGNUNet):
    """(a pipeline with DDIM on the linear schedule, without clipping or progress bar; a copy of its scheduler)."""
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
