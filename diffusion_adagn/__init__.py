"""diffusion_adagn: class-conditional diffusion models that show what the condition does.

Names are imported when first used, so that `adagn --help` does not wait for torch.
"""

import importlib
import warnings
from typing import TYPE_CHECKING

from .renamed import NAMES
from .version import __version__

if TYPE_CHECKING:  # what editors and type checkers see; `_HOME` says the same to Python
    from .config import RunConfig, read_config
    from .data import open_dataset
    from .diffusion.churn import Churn
    from .diffusion.ode_scheduler import OdeScheduler
    from .errors import InputError
    from .labels import LabelSpace
    from .models.unet import AdaGNUNet
    from .personal.learn import learn_class
    from .personal.settings import LearnRequest
    from .sampling.class_mix import ClassInterpolation, ClassMix
    from .sampling.guidance import Guidance, Interval
    from .sampling.pipeline import ClassConditionalPipeline
    from .trace.atlas import Atlas
    from .training.train import train

_HOME = {
    "AdaGNUNet": ".models.unet",
    "ClassConditionalPipeline": ".sampling.pipeline",
    "Guidance": ".sampling.guidance",
    "Interval": ".sampling.guidance",
    "LabelSpace": ".labels",
    "ClassMix": ".sampling.class_mix",
    "ClassInterpolation": ".sampling.class_mix",
    "Atlas": ".trace.atlas",
    "OdeScheduler": ".diffusion.ode_scheduler",
    "Churn": ".diffusion.churn",
    "RunConfig": ".config",
    "LearnRequest": ".personal.settings",
    "learn_class": ".personal.learn",
    "read_config": ".config",
    "open_dataset": ".data",
    "train": ".training.train",
    "InputError": ".errors",
}
__all__ = [
    "AdaGNUNet",
    "Atlas",
    "Churn",
    "ClassConditionalPipeline",
    "ClassInterpolation",
    "ClassMix",
    "Guidance",
    "InputError",
    "Interval",
    "LabelSpace",
    "LearnRequest",
    "OdeScheduler",
    "RunConfig",
    "__version__",
    "learn_class",
    "open_dataset",
    "read_config",
    "train",
]


def __getattr__(name: str):
    if name in NAMES:
        warnings.warn(f"diffusion_adagn.{name} is called {NAMES[name]} now.", DeprecationWarning, stacklevel=2)
        name = NAMES[name]
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
