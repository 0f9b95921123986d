"""The settings of a small guide for a run: one size down, an eighth of the steps, the same data and process.

Autoguidance (Karras et al. 2024, arXiv 2406.02507) moves away from a weaker network; their guides have a smaller width and
1/8 (EDM2-S: 1/16) of the training. Widths there differ by 1.5 from one size to the next.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..config import ModelConfig, RunConfig, TrainingConfig, with_overrides
from ..errors import InputError
from ..models.cost import estimate_cost
from ..runs.layout import network_config

WIDTH, STEPS = 2 / 3, 1 / 8  # of the run's
CHECKPOINTS = 4  # which `--guide RUN@*` compares


def guide_config(config: RunConfig, output_dir: str | Path, overrides: Mapping[str, object] | None = None) -> RunConfig:
    """The settings of a guide.

    Args:
        config: The run's settings, resolved.
        output_dir: The guide's run folder.
        overrides: Settings of the user, by dotted key. With model.model_channels the network is the user's choice.

    Raises:
        InputError: There is no smaller network, or an override is invalid.
    """
    training = config.training
    steps = max(1, round(training.max_steps * STEPS))
    every = math.ceil(steps / CHECKPOINTS)
    scaled = {name: round(getattr(training, name) * STEPS) for name in ("warmup_steps", "warmup_images")}
    if training.lr_decay_images is not None:
        scaled["lr_decay_images"] = max(1, round(training.lr_decay_images * STEPS))
    default = TrainingConfig()  # a guide has no teacher, since it is not guided itself
    no_teacher = {"teacher": default.teacher, "teacher_rule": default.teacher_rule}
    values = {"max_steps": steps, "checkpoint_every": every, "keep_every": every, **scaled, **no_teacher}
    for name in ("heldout_every", "preview_every", "diagnostics_every", "log_every"):
        values[name] = min(getattr(training, name), steps)
    config = replace(
        config,
        output_dir=str(output_dir),
        init_from=None,
        model=replace(config.model, max_guidance_scale=None),
        training=replace(training, **values),
    )
    config = with_overrides(config, dict(overrides or {}))
    if "model.model_channels" in (overrides or {}):
        return config
    return with_overrides(replace(config, model=_smaller(config)), {})


def _smaller(config: RunConfig) -> ModelConfig:
    """The width nearest to WIDTH times the run's with which the network can be built.

    If there is none, the number of normalization groups and the channels per attention head are halved until there is.
    """
    own, model = config.model.model_channels, config.model
    while True:
        for width in sorted(range(1, own), key=lambda width: (abs(width - WIDTH * own), width)):
            smaller = replace(model, model_channels=width)
            try:
                estimate_cost(network_config(replace(config, model=smaller)))
            except InputError:
                continue
            return smaller
        if model.norm_groups == 1 and model.num_head_channels in (None, 1):
            raise InputError(f"there is no network that is smaller than {own} channels: give --model.model_channels.")
        heads = model.num_head_channels and max(1, model.num_head_channels // 2)
        model = replace(model, norm_groups=max(1, model.norm_groups // 2), num_head_channels=heads)
