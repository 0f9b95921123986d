"""Old names that files and users still hold, and what they are called now. One table for all of them.

Old settings are read from YAML files, recorded runs and the command line. Old Python names raise a DeprecationWarning.
"""

import functools
import warnings
from collections.abc import Callable

CONFIG_KEYS = {
    "training.precision": "speed.precision",
    "training.most_faults": "training.max_nonfinite_steps",
    "training.signals_every": "training.diagnostics_every",
    "training.warn_unused_after": "training.warn_label_unused_after",
    "speed.layout": "speed.memory_format",
}
OPTIONS = {
    "layout": "memory_format",
    "judge": "classifier",
    "pictures": "images",
    "weights": "ema",
}  # of commands, without --
ALIASES = {"num_inference_steps": "steps", "guidance_scale": "guidance"}  # the names in diffusers
FOREIGN_OPTIONS = {  # option of other software -> candidates here; the first that the command has is suggested
    **dict.fromkeys(("cfg", "cfg_scale", "cfg_weight", "guidance_scale"), ("guidance", "training.preview_guidance")),
    **dict.fromkeys(("num_inference_steps", "num_steps", "sampling_steps"), ("steps", "training.preview_steps")),
    **dict.fromkeys(("num_images", "num_samples", "n_samples"), ("count",)),
    **dict.fromkeys(("num_images_per_class", "num_images_per_prompt"), ("count",)),
    **dict.fromkeys(("class", "class_labels", "label", "labels"), ("classes",)),
    **dict.fromkeys(("output", "output_dir", "outdir"), ("out",)),
    "scheduler": ("sampler",),
}
EXTRACTORS = {"judge": "classifier"}  # of --extractor
EMA = {"ema": "run"}  # of --ema, which was --weights ema|raw
CALL_ARGUMENTS = {"told": "class_plan", "watch": "callback"}  # of a pipeline call
NAMES = {"Mix": "ClassMix", "Between": "ClassInterpolation"}  # exported by the package


def extractor_name(name: str | None) -> str | None:
    """What users call an extractor: its name as files record it, or typed, in today's words."""
    return EXTRACTORS.get(name, name)


def renamed_arguments(**names: str) -> Callable[[Callable], Callable]:
    """A decorator that accepts old names of keyword arguments, with a DeprecationWarning.

    Args:
        names: old name -> new name.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            for old in names.keys() & kwargs.keys():
                new = names[old]
                warnings.warn(f"the argument {old} is called {new} now.", DeprecationWarning, stacklevel=2)
                if new in kwargs:
                    raise TypeError(f"{old} and {new} are the same argument: give one of them.")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
