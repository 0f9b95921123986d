"""What a network costs, by formula or counted on the meta device: nothing is allocated."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import check_size

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Cost:
    """The cost of a network.

    Attributes:
        parameters: number of weights.
        flops: forward pass of one image; a multiply-add counts as 2. Training takes about 3 times as many.
        activation_bytes: saved for the backward pass of one image, in fp32 with the fused operator (eager: about 1.4 times).
    """

    parameters: int
    flops: int
    activation_bytes: int

    def training_bytes(self, images: int, half_precision: bool, checkpointing: bool, averages: int = 1) -> int:
        """Estimate for one process with that many images per pass: fp32 weights, gradients, two Adam moments and
        that many averages of the weights, and the activations (about 0.6 of them under bf16/fp16; about a third with
        gradient checkpointing)."""
        activations = self.activation_bytes * images * (0.6 if half_precision else 1) * (1 / 3 if checkpointing else 1)
        return int((4 + averages) * 4 * self.parameters + activations)


def estimate_cost(config: dict) -> Cost:
    """Cost of AdaGNUNet(**config). Raises InputError for what `check_size` rejects."""
    check_size(config)
    return _counted(json.dumps(config))


@functools.cache  # runs, sweeps and requests of one network ask again, and counting takes 0.2 s
def _counted(config: str) -> Cost:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from .unet import AdaGNUNet

    with torch.device("meta"):
        unet = AdaGNUNet(**json.loads(config)).train()
        x = torch.empty(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        y = torch.zeros(1, dtype=torch.long) if unet.config.num_classes else None
        t = torch.zeros(1)
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # so that no storage's address is used twice
        return tensor

    alive: list[torch.Tensor] = []
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        unet(x, t, y)
    parameters = {p.untyped_storage()._cdata for p in unet.parameters()}
    return Cost(
        parameters=sum(p.numel() for p in unet.parameters()),
        flops=counter.get_total_flops(),
        activation_bytes=sum(size for storage, size in saved.items() if storage not in parameters),
    )
