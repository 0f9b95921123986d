"""The settings of `adagn trace`. Nothing heavy is imported."""

from typing import Annotated, Literal

from annotated_types import Ge, Le

from ..config import DataConfig, Device
from ..sampling.settings import Ema
from ..schema import AS_GIVEN, NO_OPTION, Option, settings


@settings(frozen=True)
class TraceRequest:
    """What `adagn trace` measures."""

    ema: Ema = "run"
    timesteps: Annotated[int, Ge(1), Le(1000)] = 50
    """noise levels of the atlas, evenly spread from image to noise"""
    images: Annotated[int, Ge(1)] = 32
    """images that the probes use"""
    data: Annotated[DataConfig | None, NO_OPTION] = None
    """source of the held-out images; None: the run's own data"""
    compare: Annotated[str | None, Option(metavar="OTHER")] = None
    """an earlier checkpoint or another run: how far each site moved since"""
    classes: Annotated[str | None, AS_GIVEN, Option(metavar="FILE,...")] = None
    """files of learned classes to trace too: which sites moved, nearest classes, use of the label, copies"""
    by: Annotated[
        Literal["site", "resolution"] | None, Option(default="site if there are at most 60, else resolution")
    ] = None
    """what the probes edit at a time"""
    device: Device = "auto"
