"""The model card: the README.md of a pipeline folder and of a hub repository."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..commands import command
from ..diffusion.ode_scheduler import OdeScheduler
from ..diffusion.schedule import process_of
from .guidance import example_scales
from .pretrained import model_hash

SCHEDULES = {"squaredcos_cap_v2": "cosine"}  # diffusers' names that are not ours


TASK = "unconditional-image-generation"  # the hub has no task for images by class


@dataclass(frozen=True)
class Measured:
    """What was measured of a model.

    Attributes:
        values: title of a metric -> its value and standard error (None: unknown).
        against: the reference images.
        count: images that were sampled.
        command: what measured them.
    """

    values: Mapping[str, tuple[float, float | None]]
    against: str
    count: int
    command: str = ""


@dataclass(frozen=True)
class CardFacts:
    """What the card of an upload adds.

    Attributes:
        license: such as "mit".
        datasets: names of the training data.
        image: file beside the card that the hub shows.
        measured: by `adagn evaluate`.
    """

    license: str | None = None
    datasets: tuple[str, ...] = field(default=())
    image: str | None = None
    measured: Measured | None = None


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
    pipe: DiffusionPipeline,
    name: str,
    rows: Mapping[str, str] | None = None,
    where: str = "THIS_FOLDER",
    facts: CardFacts = CardFacts(),
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        pipe: a ClassConditionalPipeline.
        name: the title.
        rows: what else is known, such as the data: a line of the table each.
        where: what opens the model: its folder or repository.
        facts: of an upload.
    """
    labels, c, side = pipe.labels, pipe.unet.config, pipe.unet.config.sample_size
    names = ", ".join(labels.names[:50]) + (f", ... ({labels.K} in all)" if labels.K > 50 else "")
    guidance = example_scales(labels, c.max_guidance_scale)
    call = f'"all", guidance_scale={float(guidance.split(",")[1])}' if guidance else '"all"' if labels.K else '"null"'
    weights = describe_average(pipe.config.ema_decay, pipe.config.ema_length)
    one_pass = (
        f"; the network reads it, from 1 to {c.max_guidance_scale:g}, in one pass" if c.max_guidance_scale else ""
    )
    table = {
        "classes": names or "none (unconditional)",
        "null label": labels.null_id if labels.has_null and labels.K else "none",
        **(rows or {"trained": f"{pipe.config.trained_steps or 'an unknown number of'} steps"}),
        "weights": f"{weights}; hash `{model_hash(pipe.unet, learned=False)}`",
        "process": _process(pipe.scheduler),
        "guidance": pipe.config.guidance_convention + one_pass,
    }
    sample = command("sample", where, classes="all" if labels.K else "null", guidance=guidance, count=8)
    lines = "\n".join(f"| {key} | {value} |" for key, value in table.items())
    image = f"\n![Samples]({facts.image})\n" if facts.image else ""
    return f"""---
{_front_matter(name, facts)}
---

# {name}

A class-conditional diffusion model ({c.conditioning}) of {side}x{side} images, trained with diffusion_adagn.
{image}
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

{_figures(facts.measured)}
"""


def _front_matter(name: str, facts: CardFacts) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    measured = facts.measured
    results = [
        EvalResult(
            task_type=TASK, dataset_type="images", dataset_name=measured.against, metric_type=title.lower(), metric_name=title,
            metric_value=value,
        )
        for title, (value, _) in measured.values.items()
    ] if measured else None  # fmt: skip
    data = ModelCardData(
        library_name="diffusion_adagn", pipeline_tag=TASK, tags=["diffusion", "class-conditional", "image-generation"],
        license=facts.license, datasets=list(facts.datasets) or None, model_name=name if results else None,
        eval_results=results, widget=[{"output": {"url": facts.image}}] if facts.image else None,
    )  # fmt: skip
    return data.to_yaml()


def _figures(measured: Measured | None) -> str:
    """What was measured, as a table."""
    if measured is None:
        return "No quality figure was measured when this card was written."
    rows = "\n".join(
        f"| {title} | {value:.4g} | {'' if error is None else f'{error:.2g}'} |"
        for title, (value, error) in measured.values.items()
    )
    command = f"\n\n```bash\n{measured.command}\n```" if measured.command else ""
    return (
        f"Measured on {measured.count:,} images against {measured.against}:\n\n"
        f"| metric | value | standard error |\n|---|---|---|\n{rows}{command}"
    )


def describe_average(ema_decay: float | None, ema_length: float | None) -> str:
    """Which average of the weights a model has."""
    if ema_length is not None:
        return f"EMA, length {ema_length:g}"
    return "raw" if ema_decay is None else f"EMA, rate {ema_decay:g}"
