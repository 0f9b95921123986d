"""What a finished run leaves for its users: the pipeline folder and its card."""

from pathlib import Path

from ..commands import command
from ..config import RunConfig
from ..data import ImageDataset
from ..folders import into_place
from ..labels import LabelSpace
from ..loading import make_pipeline, model_hash
from ..models.unet import AdaGNUNet
from ..run import RunFolder


def write_pipeline(run: RunFolder, config: RunConfig, unet: AdaGNUNet, dataset: ImageDataset, step: int) -> None:
    """pipeline/: safetensors, json and a model card."""
    pipe = make_pipeline(config, unet, config.training.ema_decay, step)

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder)
        (folder / "README.md").write_text(_card(config, pipe, dataset, step), encoding="utf-8")

    into_place(run.pipeline, write)


def sample_command(path: str, labels: LabelSpace) -> str:
    """What to type to sample a model with these classes."""
    guidance = "1,2,4" if labels.K and labels.has_null else None
    classes = "all" if labels.K else "null"
    return command("sample", path, classes=classes, guidance=guidance, count=8)


def _card(config: RunConfig, pipe, dataset: ImageDataset, step: int) -> str:
    labels, d, t = pipe.labels, config.diffusion, config.training
    names = ", ".join(labels.names[:50]) + (f", ... ({labels.K} in all)" if labels.K > 50 else "")
    call = '"all", guidance_scale=2.0' if labels.K and labels.has_null else '"all"' if labels.K else '"null"'
    return f"""---
library_name: diffusion_adagn
tags: [diffusion, class-conditional, image-generation]
---

# {run_name(config)}

A class-conditional diffusion model ({config.model.conditioning}) of {dataset.image_size}x{dataset.image_size} pictures, trained with diffusion_adagn.

| | |
|---|---|
| classes | {names or "none (unconditional)"} |
| null label | {labels.null_id if labels.has_null and labels.K else "none"} |
| data | {dataset.name}, {len(dataset)} pictures, fingerprint `{dataset.fingerprint[:16]}` |
| trained | {step} steps of {t.batch_size} pictures, {config.speed.precision}, label dropout {t.label_dropout:g}, seed {t.seed} |
| weights | EMA, rate {t.ema_decay:g}; hash `{model_hash(pipe.unet)}` |
| process | {d.schedule} schedule, T = {d.num_train_timesteps}, prediction {d.prediction}{", zero terminal SNR" if d.zero_snr else ""} |
| guidance | {pipe.config.guidance_convention} |

```bash
{sample_command("THIS_FOLDER", labels)}
```

```python
from diffusion_adagn import ClassConditionalPipeline
pipe = ClassConditionalPipeline.from_pretrained("THIS_FOLDER")
images = pipe({call}, seeds=0).images
```

No quality figure was measured when this card was written.
"""


def run_name(config: RunConfig) -> str:
    return config.output_dir.rstrip("/").split("/")[-1]
