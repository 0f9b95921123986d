"""Which weights of a model a text means: RUN, RUN@STEP, RUN@* or any of them with :EMA. This module imports without torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import MAX_EMA_LENGTH
from ..errors import InputError
from ..renamed import EMA
from ..schema import short_repr
from .layout import RunFolder, checkpoints, similar_runs
from .shipped import model_folder, shipped_folder

SUFFIX = re.compile(r"(?P<path>.*?)(?:@(?P<step>[0-9]{1,12}|\*))?(?::(?P<ema>[^:@/\\]+))?", re.DOTALL)


def parse_ema(value: Any) -> Any:
    """A length as a number, "raw" or "run", from what a command line or Python gives. Raises ValueError for anything else."""
    value = EMA.get(value, value) if isinstance(value, str) else value
    if value in ("raw", "run") and isinstance(value, str):
        return value
    try:
        length = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        length = math.nan
    if not 0 < length <= MAX_EMA_LENGTH:
        expected = f"a length above 0 and at most {MAX_EMA_LENGTH:g} (such as 0.1: a tenth of the run), raw or run"
        raise ValueError(f"expected {expected}, got {short_repr(value)}")
    return length


@dataclass(frozen=True)
class Weights:
    """The weights of a model.

        runs/digits            what `path` holds: of a run the EMA of training.ema_decay
        runs/digits@400        at step 400: the checkpoint runs/digits/checkpoints/step-00000400
        runs/digits@400:0.1    there, the EMA of length 0.1; raw: the unaveraged weights; run: those of training.ema_decay
        runs/digits@*:0.1      the same at every checkpoint, for `parse_all`

    Attributes:
        path: a run, a checkpoint, a pipeline folder, a hub id or the name of a shipped model.
        ema: a length as a fraction of the run, "raw" or "run"; None: not given.
    """

    path: str
    ema: float | str | None = None

    @classmethod
    def parse(cls, text: str | Path) -> Weights:
        """The weights that a text means. Raises InputError for a checkpoint that does not exist, and for RUN@*."""
        if _split(str(text))[1] == "*":
            raise InputError(
                f"'{text}' means all checkpoints of a run, and one is expected here: name its step, such as @400."
            )
        return cls.parse_all(text)[0]

    @classmethod
    def of(cls, text: str | Path, ema: float | str) -> Weights:
        """The weights that a text means, with the EMA length `ema` if it names none. Raises InputError as `parse`, and for another `ema`."""
        try:
            ema = parse_ema(ema)
        except ValueError as error:
            raise InputError(f"ema: {error}.") from None
        return cls.parse(text).with_ema(ema)

    @classmethod
    def parse_all(cls, text: str | Path) -> list[Weights]:
        """The weights that a text means: several, in the order of their steps, for RUN@*.

        Raises:
            InputError: The run has no such checkpoint, or the EMA length is invalid.
        """
        path, step, ema = _split(str(text))
        return [cls(one, ema) for one in ([path] if step is None else _checkpoints(path, step))]

    def __str__(self) -> str:
        if self.ema is None:
            return self.path
        return f"{self.path}:{self.ema if isinstance(self.ema, str) else format(self.ema, '.12g')}"

    def with_ema(self, ema: float | str) -> Weights:
        """The same weights with this EMA length, unless one was given."""
        return replace(self, ema=ema) if self.ema is None else self

    @property
    def run(self) -> str:
        """The path without that of a checkpoint in it."""
        return self.path if self.step is None else str(Path(self.path).parent.parent)

    @property
    def step(self) -> int | None:
        """The step of a checkpoint folder; None for anything else."""
        match = re.fullmatch(r"step-([0-9]{8,12})", Path(self.path).name)
        return None if match is None else int(match[1])


def at_steps(weights: Weights, steps: Sequence[str]) -> list[Weights]:
    """The weights at checkpoints of their run.

    Args:
        weights: Those of a run.
        steps: Steps as text, or "*", which is all.

    Raises:
        InputError: `weights` are not those of a run, or it has no such checkpoint.
    """
    found = [Weights(path, weights.ema) for step in steps for path in _checkpoints(weights.path, step)]
    return list(dict.fromkeys(found))


def _split(text: str) -> tuple[str, str | None, float | str | None]:
    """The path, the step and the EMA length in a text. A path that exists is taken as it is."""
    match = SUFFIX.fullmatch(text)
    path, step, ema = match["path"], match["step"], match["ema"]
    if os.path.exists(text):  # False for a text that is no path
        return text, None, None
    if ema is not None:
        try:
            ema = parse_ema(ema)
        except ValueError as error:
            if step is None and not re.fullmatch(r"[-+.0-9e]+", ema):  # a colon in a path
                return text, None, None
            raise InputError(f"'{text}': {error}.") from None
    return path, step, ema


def _checkpoints(run: str, step: str) -> list[str]:
    """The checkpoint folder of a step, or all for "*"."""
    folder = RunFolder(model_folder(run))
    if not folder.config_file.is_file():
        raise InputError(f"{run}@{step} means a checkpoint of a run, and {run} is not a run folder.{similar_runs(run)}")
    if shipped_folder(run):
        raise InputError(f"the shipped model {run} has no checkpoints: name it without @{step}.")
    paths = {int(path.name.split("-")[1]): path for path in checkpoints(folder.checkpoints)}
    if step != "*":
        paths = {key: path for key, path in paths.items() if key == int(step)} or _absent(run, step, list(paths))
    if not paths:
        raise InputError(f"the run {run} has no checkpoint yet.")
    return list(map(str, paths.values()))


def _absent(run: str, step: str, steps: Sequence[int]) -> dict:
    text = f"its checkpoints are of the steps {', '.join(map(str, steps))}" if steps else "it has none yet"
    raise InputError(f"the run {run} has no checkpoint of step {step}: {text}.")
