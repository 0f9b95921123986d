"""The settings of `adagn learn-class`. Nothing heavy is imported."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BeforeValidator, model_validator

from ..config import Device
from ..errors import InputError
from ..labels import MAX_NAME_CHARS
from ..runs.class_file import SUFFIX, Depth
from ..sampling.settings import Ema
from ..schema import AS_GIVEN, Option, settings

NEAREST, MEAN = "nearest", "mean"
RANK, LAYERS_LR = 4, 0.003
RESERVED = ("null", "all", "random")  # words that --classes and --negative read in another way


def _reserved(name: str) -> bool:
    return name in RESERVED or name.endswith(SUFFIX) or "," in name or "@" in name


def _box(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else (value,)
    given = ",".join(map(str, words))
    try:
        box = tuple(int(word) for word in words)
    except (TypeError, ValueError):
        box = ()
    if len(box) != 4:
        raise ValueError(f"expected left,top,width,height in pixels, such as 0,0,64,64, got {given}")
    if min(box[:2]) < 0 or min(box[2:]) < 1:
        raise ValueError(f"expected left and top of at least 0, width and height of at least 1, got {given}")
    return box


@settings(frozen=True, kw_only=True)
class LearnRequest:
    """What is learned, from which images, and how."""

    images: Annotated[str, Option(metavar="FOLDER")]
    """folder of 1 to 200 images of the new class, of any size and format; its subfolders are not read"""
    name: Annotated[str, AS_GIVEN, MinLen(1)]
    """name of the new class"""
    start: Annotated[str, AS_GIVEN, Option("from", "CLASS|nearest|mean")] = NEAREST
    """class whose vector it starts from; nearest: the one with the lowest loss on the images; mean: of all classes"""
    depth: Depth = "layers"
    """vector: the class vector alone. sites: a class vector for each site. layers: sites, and low-rank changes of
    convolutions and attention"""
    rank: Annotated[int, Ge(1), Le(256)] = RANK
    """rank of the changes of layers"""
    steps: Annotated[int, Ge(1)] = 200
    """steps of the optimizer; fewer if a held-out image stops it early"""
    batch_size: Annotated[int, Ge(1)] = 32
    """images per step, each with its own noise level and noise"""
    lr: Annotated[float, Gt(0), Le(10)] = 0.2
    """learning rate of the vectors, in units of the root mean square of the class vectors"""
    layers_lr: Annotated[float, Gt(0), Le(10)] = LAYERS_LR
    """learning rate of the changes of layers"""
    decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """fraction by which each step draws the vectors back to where they started, at the first rate"""
    flip: bool = False
    """mirror images at random, for classes that look the same mirrored"""
    crop: Annotated[tuple[int, ...] | None, BeforeValidator(_box), Option(metavar="LEFT,TOP,WIDTH,HEIGHT")] = None
    """box of every image that is used, in its own pixels: left,top,width,height. Default: the largest square in its middle"""
    heldout: Annotated[int | None, Ge(0), Option(default="an eighth from 4 images on, else 0")] = None
    """images that are not learned from, whose loss ends learning and chooses the best step"""
    check_every: Annotated[int, Ge(1)] = 20
    """steps between two measurements of the loss"""
    patience: Annotated[int, Ge(1)] = 4
    """measurements in a row, far above the lowest, after which learning ends"""
    preview_every: Annotated[int, Ge(0)] = 100
    """steps between two previews; 0: none"""
    seed: Annotated[int, Ge(0)] = 0
    """of noise, noise levels and the order of images"""
    ema: Ema = "run"
    device: Device = "auto"
    overwrite: bool = False
    """replace the file"""

    @model_validator(mode="after")
    def _check(self) -> LearnRequest:
        name = " ".join(self.name.split())
        object.__setattr__(self, "name", name)
        if _reserved(name) or not 0 < len(name) <= MAX_NAME_CHARS:
            raise InputError(
                f"--name {name[:60]}: expected a name that is none of {', '.join(RESERVED)}, without commas and @, and "
                f"that does not end in {SUFFIX}."
            )
        if self.depth != "layers" and (self.rank, self.layers_lr) != (RANK, LAYERS_LR):
            raise InputError(
                f"--rank and --layers_lr are of the changes of layers, and --depth {self.depth} has none: leave them out, "
                "or give --depth layers."
            )
        return self

    def heldout_of(self, count: int) -> int:
        """How many of `count` images are held out. Raises InputError if none would be left to learn from."""
        heldout = (max(1, count // 8) if count >= 4 else 0) if self.heldout is None else self.heldout
        if heldout >= count:
            raise InputError(
                f"--heldout {heldout} leaves none of the {count} images to learn from: give a smaller number."
            )
        return heldout
