"""The learning rate of each step: warm-up, then constant or decayed."""

import math

from ..config import TrainingConfig


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then constant, decayed to 0 at max_steps, or inverse_sqrt.

        inverse_sqrt:  lr / sqrt(max(images / lr_decay_images, 1)), times the warm-up's factor

    images are those trained on before the step. It reads no max_steps, so a run may be extended without another rate.
    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), section 3.1; the decay is that of Vaswani et al. 2017 (arXiv
    1706.03762), section 5.3.

    Args:
        training: With at most one of warmup_steps and warmup_images.
        step: Optimizer steps before this one.

    Returns:
        The rate, 0..training.lr.
    """
    # steps of warm-up, a fraction where warmup_images is no multiple of the batch
    warmup = training.warmup_steps or training.warmup_images / training.batch_size
    lr = training.lr
    if training.lr_decay == "inverse_sqrt":
        lr /= math.sqrt(max(step * training.batch_size / training.lr_decay_images, 1))
    if step < warmup:
        return lr * min(step + 1, warmup) / warmup
    if training.lr_decay in ("none", "inverse_sqrt"):
        return lr
    done = (step - warmup) / max(1, training.max_steps - warmup)
    return lr * (1 - done if training.lr_decay == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
