"""`adagn ema`: the held-out loss of a run's weights over the length of their EMA."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from ..atomic import atomic_write
from ..commands import command, unused_path, with_commands
from ..config import read_config
from ..data import open_dataset
from ..errors import InputError, writing
from ..evaluation.points import choose_precision, set_up
from ..render.figures import COLOURS, FAINT, chart, new_figure, save
from ..render.report import Table, table_lines
from ..runs.ema_snapshots import saved_averages
from ..runs.layout import checkpoint_of
from ..runs.power_ema import MAX_ERROR, fit, possible_lengths
from ..runs.recorded import default_folder
from ..runs.shipped import shipped_folder
from ..runtime.distributed import process_state
from ..runtime.precision import use_precision
from ..sampling.load import open_pipeline
from ..sampling.pretrained import model_hash
from ..training.trainer import make_loss
from ..training.validation import heldout_loss
from .settings import EmaRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    if shipped_folder(source):
        raise InputError(f"the shipped model {source} has one EMA length only: there are no others to compare it with.")
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
        save(curve(measured, best, saved.tracked), out / "ema.png")
    print(
        f"{checkpoint}: loss on images held out of {heldout.name}\n{_table(measured, best, config.training.ema_decay)}"
    )
    if best.ema in (min(lengths), max(lengths)):
        print(f"The best length, {best.ema:g}, is at the end of those compared: others may be better (--lengths).")
    lowest = min(measured, key=lambda m: m.loss)
    choice, chosen = "the best length", f"{best.ema:g}"
    if lowest.loss < best.loss:
        choice, chosen = f"the weights '{lowest.ema}'", str(lowest.ema)
        print(f"No length has a lower loss than {choice}.")
    print(f"\nLook at  {out / 'ema.png'}")
    print(with_commands(f"Next, sample {choice}:", command("sample", source, ema=chosen)))
    return out


def _lengths(request: EmaRequest, tracked: Sequence[float], possible: tuple[float, float]) -> list[float]:
    """The lengths to compare, in order."""
    if request.lengths is not None:
        return sorted(set(request.lengths))
    spread = np.geomspace(max(SHORTEST, possible[0]), possible[1], COUNT)
    return sorted({*tracked, *(float(f"{x:.2g}") for x in spread[1:-1]), max(SHORTEST, possible[0]), possible[1]})


def _table(measured: Sequence[MeasuredEma], best: MeasuredEma, ema_decay: float) -> str:
    names = {"run": f"run (rate {ema_decay:g})", "raw": "raw"}
    rows = [
        [names.get(m.ema) or f"{m.ema:g}", f"{m.loss:.5f}", f"{m.loss / best.loss - 1:+.2%}", "best" * (m is best)]
        for m in measured
    ]
    return "\n".join(table_lines(Table(["EMA length", "loss", "against the best", ""], rows)))


@chart
def curve(measured: Sequence[MeasuredEma], best: MeasuredEma, tracked: Sequence[float]) -> Figure:
    """The loss over the length; "run" and "raw" as horizontal lines. Values far above the others are cut off and written."""
    lengths = [m for m in measured if not isinstance(m.ema, str)]
    low = min(m.loss for m in measured)
    limit = low + 6 * float(np.median([m.loss - low for m in measured]))
    shown = [m.loss for m in measured if m.loss <= limit]
    figure = new_figure(4.4, 8)
    ax = figure.subplots()
    x = [m.ema for m in lengths]
    ax.plot(x, [m.loss for m in lengths], color=COLOURS[0], marker="o", label="EMA length")
    ax.plot(
        best.ema, best.loss, color=COLOURS[1], marker="D", markersize=9, linestyle="none", label=f"best: {best.ema:g}"
    )
    for m, style in zip((m for m in measured if isinstance(m.ema, str)), ("--", ":")):
        ax.axhline(m.loss, color=FAINT, linestyle=style, label=f"{m.ema}: {m.loss:.5f}")
    pad = 0.06 * (max(shown) - low) or 1e-6
    ax.set(xscale="log", ylim=(low - pad, max(shown) + pad), ylabel="loss on held-out images")
    for m in lengths:
        if m.loss > limit:
            ax.annotate(
                f"{m.loss:.5f}", (m.ema, 1), xycoords=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=8
            )
    ticks = sorted({*(length for length in x if length in tracked), best.ema, x[0], x[-1]})
    ax.set_xticks(ticks, [f"{length:g}" for length in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("length of the EMA (a fraction of the run)")
    figure.legend(loc="outside upper left", ncols=4)
    return figure
