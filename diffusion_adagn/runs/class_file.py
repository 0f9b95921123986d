"""The file of a learned class: its tensors as safetensors, and a record as JSON in their metadata.

The record is read without torch, so that a wrong file is reported at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, MinLen
from pydantic import StrictInt, StrictStr

from ..atomic import atomic_write
from ..config import RunConfig, decisive
from ..errors import InputError, one_line
from ..labels import LabelSpace
from ..schema import as_document, document

if TYPE_CHECKING:
    from ..models.learned import LearnedClass

KEY = "learned_class"  # of the metadata
SUFFIX = ".safetensors"
IN_TEXT = re.compile(r"[^,]+?\.safetensors(?=\s*(?:,|@|$))")

Depth = Literal["vector", "sites", "layers"]


@document
class LearnedWith:
    """The model that a class was learned with."""

    name: StrictStr
    model_hash: StrictStr
    id: StrictStr | None = None
    """`run_id`; None where no run is recorded"""


@document
class LearnedFrom:
    """The images that a class was learned from."""

    source: StrictStr
    count: Annotated[StrictInt, Ge(1)]
    heldout: Annotated[StrictInt, Ge(0)]
    fingerprint: StrictStr


@document
class ClassRecord:
    """What the file of a learned class says about it."""

    name: Annotated[StrictStr, MinLen(1)]
    depth: Depth
    run: LearnedWith
    images: LearnedFrom
    image_size: Annotated[StrictInt, Ge(1)]
    channels: Annotated[StrictInt, Ge(1)]
    tensors_sha256: StrictStr
    settings: dict[str, Any]
    figures: dict[str, Any]
    date: StrictStr = ""
    version: StrictStr = ""


def run_id(config: RunConfig | None) -> str | None:
    """16 hex digits that are the same for all checkpoints of a run: of the settings that decide its results.

    The rate is left out, which a resumed run may change.
    """
    if config is None:
        return None
    settings = {key: value for key, value in decisive(config).items() if key != "training.lr"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def files_in(*texts: str | None) -> list[str]:
    """The files of learned classes that selections and mixes name, such as "classes/pug.safetensors@coarse,cat"."""
    return list(dict.fromkeys(found.strip() for text in texts if text for found in IN_TEXT.findall(text)))


def with_files(labels: LabelSpace, *texts: str | None) -> LabelSpace:
    """The label space with the learned classes whose files the texts name.

    Raises:
        InputError: A file is missing or corrupted, or there is a class of its name.
    """
    for file in files_in(*texts):
        labels = labels.with_learned(read_record(file).name, file)
    return labels


def read_record(file: str | Path) -> ClassRecord:
    """The record of a learned class's file; only its header is read.

    Raises:
        InputError: The file is missing, corrupted, or no learned class.
    """
    from safetensors import safe_open

    path = _existing(file)
    try:
        with safe_open(path, "numpy") as content:
            metadata = content.metadata() or {}
    except Exception as error:  # safetensors raises its own kinds
        raise _corrupted(file, error) from None
    if KEY not in metadata:
        raise InputError(f"{file} is no learned class, but other weights: expected a file of adagn learn-class.")
    try:
        values = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise _corrupted(file, error) from None
    return as_document(values, ClassRecord, file)


def read_class(file: str | Path) -> tuple[ClassRecord, LearnedClass]:
    """A learned class and its record.

    Raises:
        InputError: As `read_record`; or the tensors are not those that were saved.
    """
    from safetensors.torch import load_file

    from ..models.learned import LearnedClass

    record = read_record(file)
    try:
        tensors = load_file(_existing(file))
        learned = LearnedClass.from_tensors(record.name, tensors, str(file))
    except Exception as error:
        raise _corrupted(file, error) from None
    if learned.sha256() != record.tensors_sha256:
        raise _corrupted(file, "its numbers are not those that were saved")
    return record, learned


def write_class(file: Path, learned: LearnedClass, **record: Any) -> ClassRecord:
    """Write a learned class.

    Args:
        file: The file.
        learned: The class.
        record: The fields of its ClassRecord, without name and tensors_sha256.

    Returns:
        The record.
    """
    from safetensors.torch import save_file

    made = ClassRecord(name=learned.name, tensors_sha256=learned.sha256(), **record)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in learned.tensors().items()}
    text = json.dumps(asdict(made), ensure_ascii=False)
    atomic_write(file, lambda tmp: save_file(tensors, tmp, {KEY: text}))
    return made


def _existing(file: str | Path) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {file}: expected a learned class, which adagn learn-class writes.")
    return path


def _corrupted(file: str | Path, error: object) -> InputError:
    text = one_line(error) if isinstance(error, Exception) else str(error)
    return InputError(f"{file} is no learned class, or is corrupted ({text}): copy it again, or learn the class again.")
