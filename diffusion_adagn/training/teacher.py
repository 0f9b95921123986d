"""The teacher of a network that reads the guidance scale: a frozen model and its guided prediction."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from ..config import RunConfig
from ..diffusion.schedule import ModelEval, make_process
from ..errors import InputError, named, reject_first
from ..runs.layout import label_space
from ..sampling.guidance import apply_cfg
from ..sampling.load import open_pipeline
from ..sampling.pipeline import ClassConditionalPipeline
from ..sampling.pretrained import model_hash
from ..sampling.rules import Evaluation, Memory, Rule
from .loader import Batch

OF_SAMPLING = ("momentum", "steps")  # parameters of rules that refer to the sampler's earlier steps


class Teacher:
    """A model whose guided prediction another network learns.

    Args:
        pipe: with a null class. A network that reads the guidance scale is called at scale 1.
        rule: how its two predictions are combined.

    Attributes:
        hash: of the network.
        autocast: creates the context of the network's calls.
    """

    def __init__(self, pipe: ClassConditionalPipeline, rule: Rule):
        self.unet, self.process, self.rule = pipe.unet.eval().requires_grad_(False), pipe.process, rule
        self.hash = model_hash(pipe.unet)
        self.autocast: Callable = nullcontext

    @torch.no_grad()
    def __call__(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The conditional and the guided prediction at the batch's scales, float32 [B, C, H, W] each.

        Args:
            x: noisy images [B, C, H, W].
            batch: their labels, levels and scales.
        """
        augment = batch.augment if self.unet.embedding.augment is not None else None
        null = torch.full_like(batch.labels, self.unet.config.num_classes)
        with self.autocast():
            cond, uncond = (
                self.unet(x, batch.level.time, labels, augment=augment).sample[:, : x.shape[1]].float()
                for labels in (batch.labels, null)
            )
        guided = apply_cfg(cond, uncond, batch.scale)
        applies = torch.as_tensor(self.rule.applies(self.process, batch.level), device=x.device).reshape(-1, 1, 1, 1)
        if applies.any():
            call = ModelEval(0, 0, math.nan, math.nan, math.nan, batch.level)  # rules read its level alone
            at = Evaluation(x, self.process, call, Memory())
            guided = torch.where(applies, self.rule.combine(cond, uncond, batch.scale, at), guided)
        return cond, guided


def open_teacher(config: RunConfig) -> Teacher | None:
    """The teacher of a run, on the CPU; None if it has none. config: resolved.

    Raises:
        InputError: there is no such model or rule, or it does not fit the run.
    """
    if config.teacher is None:
        return None
    with named("training.teacher_rule"):
        rule = Rule.parse(config.training.teacher_rule)
        if at_steps := [f"{name}={value:g}" for name, value in rule.parameters if name in OF_SAMPLING and value]:
            raise InputError(
                f"{rule} has {at_steps[0]}, which refers to earlier steps of a sampler; training has none: leave it out."
            )
    with named("training.teacher"):
        pipe, _ = open_pipeline(config.teacher)
        rule.check(pipe.process)
        _check_fits(pipe, config)
    return Teacher(pipe, rule)


def _check_fits(pipe: ClassConditionalPipeline, config: RunConfig) -> None:
    """Raises InputError unless the teacher predicts the same kind of value for the same images and classes."""
    ours, theirs, labels = make_process(config.diffusion), pipe.process, label_space(config)
    shape, network = (config.data.image_size, config.data.channels), pipe.unet.config
    faults = {
        "has no null class to guide against": pipe.labels.null_id is None or not pipe.labels.K,
        f"has other classes ({', '.join(pipe.labels.names[:4])}, ...)": pipe.labels.names != labels.names,
        f"has images of {network.sample_size} pixels and {network.in_channels} channels, not {shape[0]} and {shape[1]}": (
            shape != (network.sample_size, network.in_channels)
        ),
        f"predicts {theirs.prediction} under process {theirs.name} with other noise levels, or another prediction, than this run "
        f"({ours.prediction}, {ours.name})": not ours.same_levels(theirs) or ours.prediction != theirs.prediction,
    }
    remedy = "name one that fits, or none: then the network learns from the images"
    reject_first(faults, f"the teacher {config.teacher} ", f": {remedy}.")
