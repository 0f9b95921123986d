"""The pipeline folder of a finished run, with its model card."""

from pathlib import Path

from ..atomic import atomic_dir
from ..commands import command
from ..config import RunConfig
from ..data import ImageDataset
from ..labels import LabelSpace
from ..models.unet import AdaGNUNet
from ..runs.layout import RunFolder
from ..sampling.card import model_card
from ..sampling.guidance import example_scales
from ..sampling.load import make_pipeline


def write_pipeline(run: RunFolder, config: RunConfig, unet: AdaGNUNet, dataset: ImageDataset, step: int) -> None:
    """Write pipeline/: safetensors, json and a model card."""
    t, pipe = config.training, make_pipeline(config, unet, config.training.ema_decay, step)
    trained = f"{step} steps of {t.batch_size} images, {config.speed.precision}, label dropout {t.label_dropout:g}, seed {t.seed}"
    data = f"{dataset.name}, {len(dataset)} images, fingerprint `{dataset.fingerprint[:16]}`"
    card = model_card(pipe, config.output_dir.rstrip("/").split("/")[-1], {"data": data, "trained": trained})

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    atomic_dir(run.pipeline, write)


def sample_command(path: str, labels: LabelSpace, max_scale: float | None = None) -> str:
    """The command that samples a model with these classes. max_scale: the largest guidance scale that its network reads."""
    guidance, classes = example_scales(labels, max_scale), "all" if labels.K else "null"
    return command("sample", path, classes=classes, guidance=guidance, count=8)
