"""diffusion_adagn: class-conditional diffusion models that show what the condition does.

Names are imported when first used, so that `adagn --help` does not wait for torch.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "AdaGNUNet": ".models.unet",
    "ClassConditionalPipeline": ".diffusion.pipeline",
    "Guidance": ".diffusion.guidance",
    "Interval": ".diffusion.guidance",
    "LabelSpace": ".labels",
    "Mix": ".diffusion.mixing",
    "Between": ".diffusion.mixing",
    "Atlas": ".trace.atlas",
    "RunConfig": ".config",
    "read_config": ".config",
    "open_dataset": ".data",
    "train": ".training.loop",
    "InputError": ".errors",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
