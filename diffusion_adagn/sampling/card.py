"""The model card: the README.md of a pipeline folder and of a hub repository."""

from collections.abc import Mapping

from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..commands import command
from ..diffusion.ode_scheduler import OdeScheduler
from ..diffusion.schedule import process_of
from .pretrained import model_hash

SCHEDULES = {"squaredcos_cap_v2": "cosine"}  # diffusers' names that are not ours


def _process(scheduler: SchedulerMixin) -> str:
    """The process of a scheduler, in a line."""
    c = scheduler.config
    if isinstance(scheduler, OdeScheduler):
        return f"{c.process}, sigma_data {c.sigma_data:g}" if c.process == "edm" else c.process
    schedule = "given" if c.get("trained_betas") is not None else SCHEDULES.get(c.beta_schedule, c.beta_schedule)
    zero_snr = ", zero terminal SNR" if c.get("rescale_betas_zero_snr") else ""
    prediction = process_of(scheduler).prediction
    return f"{schedule} schedule, T = {c.num_train_timesteps}, prediction {prediction}{zero_snr}"


def model_card(
    pipe: DiffusionPipeline, name: str, rows: Mapping[str, str] | None = None, where: str = "THIS_FOLDER"
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        pipe: a ClassConditionalPipeline.
        name: the title.
        rows: what else is known, such as the data: a line of the table each.
        where: what opens the model: its folder or repository.
    """
    labels, c, side = pipe.labels, pipe.unet.config, pipe.unet.config.sample_size
    names = ", ".join(labels.names[:50]) + (f", ... ({labels.K} in all)" if labels.K > 50 else "")
    call = '"all", guidance_scale=2.0' if labels.K and labels.has_null else '"all"' if labels.K else '"null"'
    weights = describe_average(pipe.config.ema_decay, pipe.config.ema_length)
    table = {
        "classes": names or "none (unconditional)",
        "null label": labels.null_id if labels.has_null and labels.K else "none",
        **(rows or {"trained": f"{pipe.config.trained_steps or 'an unknown number of'} steps"}),
        "weights": f"{weights}; hash `{model_hash(pipe.unet)}`",
        "process": _process(pipe.scheduler),
        "guidance": pipe.config.guidance_convention,
    }
    guidance = "1,2,4" if labels.K and labels.has_null else None
    sample = command("sample", where, classes="all" if labels.K else "null", guidance=guidance, count=8)
    lines = "\n".join(f"| {key} | {value} |" for key, value in table.items())
    return f"""---
library_name: diffusion_adagn
pipeline_tag: unconditional-image-generation
tags: [diffusion, class-conditional, image-generation]
---

# {name}

A class-conditional diffusion model ({c.conditioning}) of {side}x{side} images, trained with diffusion_adagn.

| | |
|---|---|
{lines}

```bash
{sample}
```

```python
from diffusion_adagn import ClassConditionalPipeline
pipe = ClassConditionalPipeline.from_pretrained("{where}")
images = pipe({call}, seeds=0).images
```

No quality figure was measured when this card was written.
"""


def describe_average(ema_decay: float | None, ema_length: float | None) -> str:
    """Which average of the weights a model has."""
    if ema_length is not None:
        return f"EMA, length {ema_length:g}"
    return "raw" if ema_decay is None else f"EMA, rate {ema_decay:g}"
