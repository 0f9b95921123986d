"""What a network costs, by formula or counted on the meta device: nothing is allocated, nor imported to check its size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import NetworkConfig
from ..errors import InputError

if TYPE_CHECKING:
    import torch

MOST_LEVELS = 14


def machine_memory() -> int:
    """Bytes; a terabyte where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**40


def check_size(network: Mapping[str, Any]) -> None:
    """Raises InputError if this machine cannot hold AdaGNUNet(**network), or if counting its layers would take minutes.

    What is told is a lower bound: weights of the residual blocks, class table and class tokens, and one feature map, in fp32.
    """
    network = vars(NetworkConfig()) | dict(network)
    levels, width = len(network["channel_mult"]), network["model_channels"]
    if levels > MOST_LEVELS:
        raise InputError(
            f"model.channel_mult has {levels:,} numbers, one a level: {MOST_LEVELS} at most are expected, such as 1,2,2."
        )
    widths = [float(width) * mult for mult in network["channel_mult"]]
    table = 4.0 * width * (network["num_classes"] or 0)
    tokens = 4.0 * width * width * network["class_tokens"] * (network["conditioning"] == "cross_attention")
    weights = 18 * (2.0 * network["num_res_blocks"] + 1) * sum(w * w for w in widths) + table + tokens
    pixels = float(network["sample_size"]) * network["sample_size"] * max([network["in_channels"], *widths[:1]])
    if 4 * (weights + pixels) > machine_memory():
        raise InputError(
            f"the network takes {4 * (weights + pixels) / 2**30:,.0f} GiB or more ({weights:.3g} weights, and {pixels:.3g} numbers in a "
            f"feature map of one picture), and this machine has {machine_memory() / 2**30:,.0f}: choose a smaller model.model_channels "
            f"(now {width:,}), model.channel_mult, model.num_res_blocks, model.class_tokens, data.image_size, or fewer classes."
        )


@dataclass(frozen=True)
class Cost:
    """parameters; forward FLOPs of one picture (a multiply-add counts as 2; training is about 3 times that);
    activation_bytes: what one picture keeps for the backward pass, in fp32, with the fused operator (eager keeps about 1.4 times)."""

    parameters: int
    flops: int
    activation_bytes: int

    def training_bytes(self, pictures: int, half_precision: bool, checkpointing: bool) -> int:
        """Estimate for one process holding that many pictures at once: fp32 weights, gradients, two Adam moments and
        the EMA, and the activations (about 0.6 of them under bf16/fp16; about a third with gradient checkpointing)."""
        activations = (
            self.activation_bytes * pictures * (0.6 if half_precision else 1) * (1 / 3 if checkpointing else 1)
        )
        return int(5 * 4 * self.parameters + activations)


def count_cost(config: dict) -> Cost:
    """Cost of AdaGNUNet(**config). Raises InputError for what `check_size` refuses."""
    check_size(config)
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from .unet import AdaGNUNet

    with torch.device("meta"):
        unet = AdaGNUNet(**config).train()
        x = torch.empty(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        y = torch.zeros(1, dtype=torch.long) if unet.config.num_classes else None
        t = torch.zeros(1)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # so that no storage's address is used twice
        return tensor

    alive: list[torch.Tensor] = []
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        unet(x, t, y)
    parameters = {p.untyped_storage()._cdata for p in unet.parameters()}
    return Cost(
        parameters=sum(p.numel() for p in unet.parameters()),
        flops=counter.get_total_flops(),
        activation_bytes=sum(size for storage, size in kept.items() if storage not in parameters),
    )
