"""The peers: diffusers' UNet2DModel with our weights, and denoising-diffusion-pytorch's classifier-free Unet with its own."""

import contextlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_adagn import AdaGNUNet
from diffusion_adagn.interop.unet2d import to_unet2d

from .sizes import Size

DIFFUSERS = "diffusers"
LUCIDRAINS = "denoising-diffusion-pytorch"
PEERS = (DIFFUSERS, LUCIDRAINS)


class PeerMissing(Exception):
    """A peer that cannot be measured here; the message gives the reason and the command to install it."""


def diffusers_twin(unet: AdaGNUNet) -> nn.Module:
    """The same network as diffusers' UNet2DModel, by the exporter. Raises ValueError if the parameter counts differ."""
    twin = to_unet2d(unet)
    ours, theirs = (sum(p.numel() for p in net.parameters()) for net in (unet, twin))
    if ours != theirs:
        raise ValueError(f"diffusers' network has {theirs:,} parameters, ours {ours:,}: they are not the same network")
    return twin


class LucidrainsUnet(nn.Module):
    """denoising-diffusion-pytorch's Unet with our signature (sample, timestep, labels) -> (prediction,).

    Its timestep embedding is always float32, so bf16 and fp16 need autocast.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False):
        half = sample.dtype != torch.float32
        with torch.autocast(sample.device.type, sample.dtype) if half else contextlib.nullcontext():
            return (self.unet(sample, timestep, class_labels, cond_drop_prob=0.0),)


def lucidrains_module():
    """The file of denoising-diffusion-pytorch that has the classifier-free guidance network and process.

    Only this file is loaded: the package's __init__ imports torchvision and others, which the network does not need and which
    often do not match a CPU build of torch. Raises PeerMissing if it is not installed.
    """
    package = importlib.util.find_spec(LUCIDRAINS.replace("-", "_"))
    if package is None or not package.submodule_search_locations:
        raise PeerMissing(f"{LUCIDRAINS} is not installed: pip install --no-deps {LUCIDRAINS}")
    file = Path(package.submodule_search_locations[0]) / "classifier_free_guidance.py"
    try:
        spec = importlib.util.spec_from_file_location("lucidrains_classifier_free_guidance", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError, AttributeError) as error:
        raise PeerMissing(f"{LUCIDRAINS} is installed but cannot be used ({error})") from None
    return module


def lucidrains(size: Size, seed: int = 0) -> nn.Module:
    """Its most similar network: same width and levels; its 2 blocks per level, linear attention and RMSNorm are fixed."""
    module = lucidrains_module()
    torch.manual_seed(seed)
    try:
        return LucidrainsUnet(module.Unet(dim=size.channels, num_classes=size.classes, dim_mults=size.mult, channels=3))
    except TypeError as error:
        raise PeerMissing(f"{LUCIDRAINS} is installed but cannot be used ({error})") from None


def flops(net: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> int:
    """Forward FLOPs of one image (a multiply-add counts as 2); x, t, y: one row each.

    Counted on the meta device, without computing anything; every attention is counted. Moves the network there.
    """
    from torch.utils.flop_counter import FlopCounterMode

    net = net.to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*(v.to("meta") for v in (x, t, y)), return_dict=False)
    return counter.get_total_flops()
