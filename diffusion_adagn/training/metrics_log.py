"""Logging of metrics: metrics.jsonl always, a tracker if set."""

import importlib.util
import json
import math
from pathlib import Path

from ..commands import with_commands
from ..errors import InputError

LR_CHANGE = "lr_changed_from"  # in the line that a resume with another learning rate writes


class Metrics:
    """Appends one JSON object a line to metrics.jsonl, each with its `step`; only where `path` is given.

    On resume the file is cut back to the lines up to `last_step`, so that no step stands in it twice; a change of the learning
    rate at that very step belongs to an earlier resume from there, and is cut too.
    """

    def __init__(self, path: Path | None, last_step: int = 0):
        self.path = path
        if path is not None and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            remaining = [
                line
                for line in lines
                if (step := _step(line)) < last_step or (step == last_step and LR_CHANGE not in line)
            ]
            if remaining != lines:
                tmp = path.with_suffix(".tmp")
                tmp.write_text("".join(remaining), encoding="utf-8")
                tmp.replace(path)

    def write(self, **values: float) -> None:
        """What is not finite is null: JSON has no Infinity and no NaN."""
        if self.path is not None:
            known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(known, allow_nan=False) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut in half by a kill


def check_tracker(name: str) -> None:
    """Raises InputError if a tracker's package is missing."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(
            with_commands(
                f"training.tracker {name} needs the package {name}. Set it to none (metrics.jsonl is written in any case), or:",
                f"pip install 'diffusion-adagn[{name}]'",
            )
        )
