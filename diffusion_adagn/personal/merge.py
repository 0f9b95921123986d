"""`adagn merge-classes`: a pipeline whose class table has learned classes as further rows."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..atomic import atomic_dir
from ..commands import command, overwrite_hint, with_commands
from ..errors import InputError
from ..labels import LabelSpace
from ..models.unet import AdaGNUNet
from ..runs.class_file import read_record
from ..sampling.card import model_card
from ..sampling.load import open_pipeline
from ..sampling.pipeline import ClassConditionalPipeline


def merge_classes(
    source: str | Path,
    files: Sequence[str],
    out: Path,
    ema: float | str = "run",
    overwrite: bool = False,
    typed: str = "",
) -> ClassConditionalPipeline:
    """Write a pipeline folder of a model with more classes.

    The new classes get the ids K, K + 1, ...; the null label moves from K to K + n, so numbers that were stored before
    are to be mapped by name.

    Args:
        source: The model.
        files: Of learned classes of depth vector.
        out: The folder.
        ema: Which weights of the model.
        overwrite: Replace the folder, if it is a pipeline.
        typed: The command line, for messages.

    Returns:
        The pipeline.

    Raises:
        InputError: A class is of another depth or does not fit the model, or the folder is in use.
    """
    if out.exists() and not overwrite:
        raise InputError(overwrite_hint(f"{out} is there already", typed, out))
    if out.exists() and not (out / "model_index.json").is_file():
        raise InputError(f"{out} is no pipeline, so that it is not replaced: give another --out.")
    for file in files:
        depth = read_record(file).depth
        if depth != "vector":
            why = "has a class vector for each site" + " and changes layers" * (depth == "layers")
            raise InputError(
                f"{file} cannot be merged: its class is of depth {depth}, which {why}, and the class table has one vector per "
                "class. It stays a file, which --classes takes; or learn the class again with --depth vector."
            )
    pipe, what = open_pipeline(source, ema, files)
    merged = merged_pipeline(pipe)
    card = model_card(merged, out.name, {"merged": f"{', '.join(pipe.labels.learned)} into {what}"})

    def write(folder: Path) -> None:
        merged.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    atomic_dir(out, write)
    old, new = pipe.labels, merged.labels
    null = f" The null label moved from {old.null_id} to {new.null_id}: map stored ids by name." if old.has_null else ""
    print(
        f"{out}\n{new.K} classes, of which new: {', '.join(f'{n} ({new.names.index(n)})' for n in old.learned)}.{null}"
    )
    print(with_commands("Next, sample it:", command("sample", out, classes=",".join(old.learned))))
    return merged


def merged_pipeline(pipe: ClassConditionalPipeline) -> ClassConditionalPipeline:
    """A pipeline whose table has the learned classes of this one, all of depth vector, after the K classes and before null."""
    unet, labels = pipe.unet, pipe.labels
    count, k = len(labels.learned), labels.K
    settings = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    merged = AdaGNUNet(**settings | {"num_classes": k + count}).to(unet.device, unet.dtype)
    state, key = unet.state_dict(), "embedding.classes.weight"
    rows = [one.vectors.detach() for one in unet.learned]
    merged.load_state_dict(state | {key: torch.cat([state[key][:k], *rows, state[key][k:]])})
    first = max(labels.original_ids, default=-1) + 1
    space = LabelSpace(
        (*labels.names, *labels.learned),
        (*labels.original_ids, *range(first, first + count)),
        (*labels.wnids, *labels.learned) if labels.wnids else (),
        labels.has_null,
    )
    config = pipe.config
    return ClassConditionalPipeline(
        merged.eval(), pipe.scheduler, space, config.clip_x0, config.ema_decay, config.trained_steps,
        config.guidance_convention, config.ema_length,
    )  # fmt: skip
