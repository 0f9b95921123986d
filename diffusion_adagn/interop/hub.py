"""Upload a model to the Hugging Face hub: weights, card, an image and what `adagn evaluate` measured."""

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError
from ..evaluation.output import EvaluationRecord
from ..evaluation.report import JSON
from ..runs.layout import RunFolder
from ..runs.recorded import recorded_data
from ..sampling.card import CardFacts, Measured, model_card
from ..sampling.load import open_pipeline
from ..sampling.pipeline import ClassConditionalPipeline
from ..sampling.pretrained import model_hash
from ..schema import as_document, read_document

IMAGE = "samples.png"


def push(
    source: str | Path, repo_id: str, *, ema: float | str = "run", evaluation: str | Path | None = None,
    image: str | Path | None = None, license: str | None = None, private: bool | None = None, token: str | None = None,
    create_pr: bool = False,
) -> str:  # fmt: skip
    """Upload a model with its card.

    Args:
        source: a run, a checkpoint or a pipeline folder.
        repo_id: "owner/name"; made if it is not there.
        ema: which weights, as `from_pretrained` takes it.
        evaluation: folder of `adagn evaluate` of these weights, whose numbers the card shows.
        image: a PNG file for the card. None: the run's newest preview.
        license: such as "mit"; None: the card names none.
        private: whether a new repository is private. None: the owner's default.
        token: access token. None: the one of `hf auth login`.
        create_pr: open a pull request instead of a commit.

    Returns:
        The commit's address.

    Raises:
        InputError: there is no such model, evaluation or image, or the evaluation is of other weights.
    """
    from huggingface_hub import create_repo, upload_folder

    pipe, _ = open_pipeline(source, ema)
    image = _newest_preview(source) if image is None else Path(image)
    if image is not None and not image.is_file():
        raise InputError(f"there is no image {image}.")
    facts = CardFacts(
        license=license,
        datasets=_datasets(source),
        image=None if image is None else IMAGE,
        measured=None if evaluation is None else _measured(Path(evaluation), pipe),
    )
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        if image is not None:
            shutil.copyfile(image, Path(folder, IMAGE))
        card = model_card(pipe, repo_id.split("/")[-1], where=repo_id, facts=facts)
        Path(folder, "README.md").write_text(card, encoding="utf-8")
        repo = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        message = "Upload a diffusion_adagn pipeline"
        return upload_folder(repo_id=repo, folder_path=folder, token=token, commit_message=message, create_pr=create_pr)


def _datasets(source: str | Path) -> tuple[str, ...]:
    """The training data, if it has a name that others know; a local path is not published."""
    data = recorded_data(source)
    name = "" if data is None or data.source is None else data.source.partition(":")[0]
    known = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and name.strip(".") and not Path(name).exists()
    return (name,) if known else ()


def _newest_preview(source: str | Path) -> Path | None:
    folder = RunFolder(source).previews
    return max(folder.glob("step-*.png"), default=None) if folder.is_dir() else None


def _measured(folder: Path, pipe: ClassConditionalPipeline) -> Measured:
    """The numbers of an evaluation of this pipeline. Raises InputError if they are of other weights."""
    file = folder / JSON
    if not file.is_file():
        raise InputError(
            f"{folder} has no {JSON}: --evaluation is a folder that adagn evaluate wrote for these weights."
        )
    record = read_document(file)
    metrics = as_document(record, EvaluationRecord, file).metrics
    model = record.get("model")
    measured_hash = model.get("hash") if isinstance(model, Mapping) else None
    if measured_hash != model_hash(pipe.unet):
        raise InputError(
            f"{file} measures other weights (hash {measured_hash}, these have {model_hash(pipe.unet)}): evaluate this model, "
            "or choose its weights with --ema."
        )
    values = {
        str(metric.get("title", name)): (metric["value"], metric.get("standard_error"))
        for name, metric in metrics.items()
        if isinstance(metric.get("value"), int | float)
    }
    reference = record.get("reference")
    against = reference.get("name", "") if isinstance(reference, Mapping) else ""
    return Measured(values, str(against), int(record.get("count", 0)), str(record.get("command", "")))
