"""Old names that files and users still hold, and what they are called now. One table for all of them.

Old settings are read from YAML files, recorded runs and the command line. Old Python names raise a DeprecationWarning.
"""

CONFIG_KEYS = {
    "training.precision": "speed.precision",
    "training.most_faults": "training.max_nonfinite_steps",
    "training.signals_every": "training.diagnostics_every",
    "training.warn_unused_after": "training.warn_label_unused_after",
    "speed.layout": "speed.memory_format",
}
OPTIONS = {"layout": "memory_format"}  # of commands, without --
NAMES = {"Mix": "ClassMix", "Between": "ClassInterpolation"}  # exported by the package
