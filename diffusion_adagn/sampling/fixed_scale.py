"""A network that reads the guidance scale, at one scale: a network without that input."""

from dataclasses import replace

import torch

from ..errors import InputError
from ..models.unet import AdaGNUNet, check_guidance_scales
from .pipeline import ClassConditionalPipeline


@torch.no_grad()
def fix_scale(pipe: ClassConditionalPipeline, scale: float) -> ClassConditionalPipeline:
    """The pipeline with its network at one guidance scale, whose vector the last bias of the timestep's layers then holds.

    At scale 1 the null label stays, so that the result can be guided in two passes. At another scale it is removed: the
    network was trained with the null label at scale 1 only.

    Args:
        pipe: whose network reads the guidance scale; it does not change.
        scale: from 1 to the network's max_guidance_scale.

    Raises:
        InputError: the network does not read the scale, or was not trained for it.
    """
    if not pipe.one_pass:
        raise InputError("the network does not read the guidance scale, so none can be fixed: leave the scale out.")
    check_guidance_scales([scale], pipe.unet.config.max_guidance_scale)
    has_null = scale == 1
    state, table, bias = dict(pipe.unet.state_dict()), "embedding.classes.weight", "embedding.time.2.bias"
    added = pipe.unet.embedding.scale_vectors(torch.tensor([float(scale)], device=state[bias].device))[0]
    state[bias] = state[bias] + added
    state[table] = state[table] if has_null else state[table][:-1]
    del state["embedding.scale.weight"]
    arguments = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    with torch.device("meta"):
        unet = AdaGNUNet(**arguments | {"max_guidance_scale": None, "null_class": has_null})
    unet.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    c = pipe.config
    return ClassConditionalPipeline(
        unet.requires_grad_(True).train(pipe.unet.training), pipe.scheduler, replace(pipe.labels, has_null=has_null),
        c.clip_x0, c.ema_decay, c.trained_steps, c.guidance_convention if has_null else fixed_convention(scale), c.ema_length,
    )  # fmt: skip


def fixed_convention(scale: float) -> str:
    """What the guidance scale of a call means for the result of `fix_scale`."""
    return f"guidance scale {scale:g} is part of the weights, in one pass; a call has scale 1"
