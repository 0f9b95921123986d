"""Learned classes from their files into a network, checked against it."""

import os
import warnings

from ..errors import Note, reject_first
from ..labels import LabelSpace
from ..models.unet import AdaGNUNet
from ..runs.class_file import ClassRecord, read_class
from .pretrained import model_hash


def load_class(unet: AdaGNUNet, labels: LabelSpace, run_id: str | None, file: str | os.PathLike) -> str:
    """Add the class in a file to a network.

    Args:
        unet: The network.
        labels: Its classes.
        run_id: Of the run that its weights are of; None: not recorded.
        file: Of the class.

    Returns:
        The name of the class; one that the network has already is not added again.

    Raises:
        InputError: See `ClassConditionalPipeline.load_class`.
    """
    record, learned = read_class(os.fspath(file))
    same = next((one for one in unet.learned if one.name == learned.name), None)
    if same is not None and same.sha256() == learned.sha256():
        return same.name
    labels.with_learned(learned.name, learned.file)  # raises if there is a class of its name
    _check_shape(unet, record, learned.file)
    _check_run(unet, run_id, record, learned.file)
    unet.add_class(learned)
    return learned.name


def _check_shape(unet: AdaGNUNet, record: ClassRecord, file: str) -> None:
    size, channels = unet.config.sample_size, unet.config.in_channels
    faults = {
        f"images of {record.image_size} pixels, and this model's have {size}": record.image_size != size,
        f"images of {record.channels} channels, and this model's have {channels}": record.channels != channels,
    }
    remedy = f". It was learned with {record.run.name}: load it there, or learn the class with this model."
    reject_first(faults, f"{file} is a class of ", remedy)


def _check_run(unet: AdaGNUNet, run_id: str | None, record: ClassRecord, file: str) -> None:
    """A class has a meaning in the network that it was learned with, and little in another."""
    if record.run.model_hash == model_hash(unet, learned=False):
        return
    same_run = record.run.id is not None and record.run.id == run_id
    unknown = "" if run_id or not record.run.id else " (the run of these weights is not recorded)"
    reject_first(
        {
            f"{file} was learned with another run, {record.run.name}{unknown}: its class vector means nothing in this network. "
            "Learn the class with this model by adagn learn-class.": not same_run
        }
    )
    warnings.warn(
        f"{file} was learned with other weights of the same run (another checkpoint, EMA length or precision): compare its images with "
        "those of the weights that it was learned with.",
        Note,
        stacklevel=4,
    )
