"""`adagn ema`: the held-out loss of a run's weights over the length of their EMA."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..atomic import atomic_write
from ..commands import command, unused_path, with_commands
from ..config import read_config
from ..data import open_dataset
from ..errors import InputError, writing
from ..evaluation.points import choose_precision, set_up
from ..render.grids import FAINT, INK
from ..runs.ema_snapshots import saved_averages
from ..runs.layout import checkpoint_of
from ..runs.power_ema import MAX_ERROR, fit, possible_lengths
from ..runs.recorded import default_folder
from ..runtime.distributed import process_state
from ..runtime.precision import use_precision
from ..sampling.load import open_pipeline
from ..sampling.pretrained import model_hash
from ..trace.drawing import LABEL, TIME, Drawing
from ..trace.plots import RULE
from ..training.trainer import make_loss
from ..training.validation import heldout_loss
from .settings import EmaRequest

COUNT = 12  # lengths that are compared by default, besides those tracked
SHORTEST = 0.01  # of these
BATCH = 64  # images per call of the network


@dataclass(frozen=True)
class MeasuredEma:
    """The held-out loss of one average. ema: its length, "raw" or "run". error: the relative L2 error of its weights to expect."""

    ema: float | str
    loss: float
    error: float
    hash: str


def compare_lengths(source: str | Path, request: EmaRequest, out: Path | None = None) -> Path:
    """Measure the held-out loss of each length, and of the weights "run" and "raw"; write ema.png and ema.json, print a table.

    Every length is measured with the same images, timesteps and noise.

    Args:
        source: A run folder or one of its checkpoints.
        request: Which lengths, and where they are computed.
        out: The output folder; None: ema/RUN/step-STEP, with a number if it exists.

    Returns:
        The folder.

    Raises:
        InputError: The run has no checkpoint, tracks no lengths or has no held-out images, or a length cannot be made.
    """
    checkpoint = checkpoint_of(source, SHORTEST)
    if checkpoint is None:
        raise InputError(
            f"{source} is not a run or a checkpoint: other models have no saved averages to choose a length from."
        )
    saved, config = saved_averages(checkpoint), read_config(checkpoint.parent.parent / "config.yaml")
    lengths = _lengths(request, saved.tracked, possible_lengths(saved.averages, saved.step))
    errors = dict(zip(lengths, fit(saved.averages, saved.step, lengths)[1].tolist()))
    if wrong := [length for length in lengths if errors[length] > MAX_ERROR]:
        raise InputError(
            f"--lengths: {wrong[0]:g} has an error of {errors[wrong[0]]:.1%}, more than {MAX_ERROR:.0%}. {saved.possible()}"
        )
    state = process_state(request.device)
    precision = choose_precision(request.precision, state)
    heldout, loss = open_dataset(config.data, "heldout"), make_loss(config.diffusion).to(state.device)
    out = out or Path(unused_path(str(default_folder("ema", checkpoint))))
    measured, autocast = [], partial(use_precision, precision, state.device)
    for ema in tqdm([*lengths, "run", "raw"], desc="lengths", unit="length", leave=False):
        pipe, _ = open_pipeline(checkpoint, ema)
        set_up([pipe, None], precision, state.device)
        value = heldout_loss(pipe.unet, heldout, loss, config.training, autocast, state.device, max_rows=BATCH)
        measured.append(MeasuredEma(ema, value, errors.get(ema, 0.0), model_hash(pipe.unet)))
    best = min((m for m in measured if m.ema in errors), key=lambda m: m.loss)
    record = {
        "checkpoint": str(checkpoint),
        "step": saved.step,
        "data": heldout.name,
        "heldout_images": len(heldout),
        "precision": precision,
        "best": best.ema,
        "measured": [asdict(m) for m in measured],
    }
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(
            out / "ema.json", lambda tmp: tmp.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        )
        atomic_write(out / "ema.png", lambda tmp: _curve(measured, best, saved.tracked).save(tmp))
    print(
        f"{checkpoint}: loss on images held out of {heldout.name}\n{_table(measured, best, config.training.ema_decay)}"
    )
    if best.ema in (min(lengths), max(lengths)):
        print(f"The best length, {best.ema:g}, is at the end of those compared: others may be better (--lengths).")
    print(f"\nLook at  {out / 'ema.png'}")
    print(with_commands("Next, sample the best length:", command("sample", source, ema=f"{best.ema:g}")))
    return out


def _lengths(request: EmaRequest, tracked: Sequence[float], possible: tuple[float, float]) -> list[float]:
    """The lengths to compare, in order."""
    if request.lengths is not None:
        return sorted(set(request.lengths))
    spread = np.geomspace(max(SHORTEST, possible[0]), possible[1], COUNT)
    return sorted({*tracked, *(float(f"{x:.2g}") for x in spread[1:-1]), max(SHORTEST, possible[0]), possible[1]})


def _table(measured: Sequence[MeasuredEma], best: MeasuredEma, ema_decay: float) -> str:
    names = {"run": f"run (rate {ema_decay:g})", "raw": "raw"}
    rows = [(names.get(m.ema) or f"{m.ema:g}", f"{m.loss:.5f}", f"{m.loss / best.loss - 1:+.2%}") for m in measured]
    marks = ["best" * (m is best) for m in measured]
    return "\n".join(
        f"  {name:18}{loss:>9}{more:>9}  {mark}".rstrip()
        for (name, loss, more), mark in zip([("EMA length", "loss", ""), *rows], ["", *marks])
    )


def _curve(measured: Sequence[MeasuredEma], best: MeasuredEma, tracked: Sequence[float]) -> Drawing:
    """The loss over the length; "run" and "raw" as horizontal lines. What is far above the others is at the upper edge."""
    curve, flat = [m for m in measured if not isinstance(m.ema, str)], [m for m in measured if isinstance(m.ema, str)]
    low = min(m.loss for m in measured)
    limit = low + 6 * float(np.median([m.loss - low for m in measured]))
    high = max(m.loss for m in measured if m.loss <= limit)
    left, top, width, height = 90, 50, 640, 300
    d = Drawing(left + width + 30, top + height + 60)

    def at(length: float, loss: float) -> tuple[float, float]:
        first, last = np.log(curve[0].ema), np.log(curve[-1].ema)
        across = (np.log(length) - first) / (last - first) if last > first else 0.5
        up = min(1.0, (loss - low) / (high - low)) if high > low else 0.5
        return left + width * float(across), top + height * (1 - up)

    d.text(left, 24, "loss on held-out images over the length of the EMA (a fraction of the run)", 14)
    d.rect(left, top, width, height, None, RULE)
    for loss in (low, high):
        d.text(left - 8, at(best.ema, loss)[1] + 4, f"{loss:.5f}", 12, FAINT, "end")
    for m in flat:
        if m.loss <= high:
            y = at(best.ema, m.loss)[1]
            d.line([(left, y), (left + width, y)], LABEL, 1)
            d.text(left + width - (6 if m.ema == "run" else 46), y - 4, m.ema, 12, LABEL, "end")
    d.line([at(m.ema, m.loss) for m in curve], TIME, 2)
    beyond = left - 40
    for m in curve:
        x, y = at(m.ema, m.loss)
        size = 5 if m is best else 3
        d.rect(x - size, y - size, 2 * size, 2 * size, LABEL if m is best else TIME)
        if m.loss > high:
            d.text(x, top - 8, f"{m.loss:.5f}", 12, FAINT, "end")
        if x - beyond >= 38:
            beyond = x
            d.text(x, top + height + 20, f"{m.ema:g}", 12, INK if m.ema in tracked or m is best else FAINT, "middle")
    d.text(left, top + height + 44, f"best: {best.ema:g}, loss {best.loss:.5f}", 12, LABEL)
    return d
