"""How time grows with the batch, the image size, the channels and the number of classes; for our network only."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from diffusion_adagn.render.figures import chart, new_figure, save

from . import ours
from .machine import full_fp32
from .networks import Case, Networks, Variant, Workload, free
from .sizes import Size
from .timing import Clock, Deadline, interleave, summary

# values of the classes axis; the other axes are multiples of the size's own batch, side and channels
CLASSES = (1, 10, 100, 1_000, 10_000, 100_000)
EXPECTED = {"batch": "1", "side": "2, up to 4 where attention dominates", "channels": "2", "classes": "0"}


def axes(size: Size, batch: int, device: str) -> dict[str, list[tuple[int, Size, int]]]:
    """{axis: [(value, the network, its batch)]}, in increasing order."""
    step = size.groups
    sides = [size.side // 2, size.side, 2 * size.side] + ([4 * size.side] if device == "cuda" else [])
    widths = sorted({max(step, size.channels // 2 // step * step), size.channels, 2 * size.channels})
    batches = [1] + [b for b in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if b <= max(2, 2 * batch)]
    small_batch = max(1, batch // 4)
    # attention stays at the same levels: its resolutions grow with the image
    attention = {side: tuple(a * side // size.side for a in size.attention) for side in sides}
    return {
        "batch": [(b, size, b) for b in batches],
        "side": [(s, dataclasses.replace(size, side=s, attention=attention[s]), small_batch) for s in sides],
        "channels": [(w, dataclasses.replace(size, channels=w, head=min(size.head, w)), small_batch) for w in widths],
        "classes": [(k, dataclasses.replace(size, classes=k), small_batch) for k in CLASSES],
    }


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float | None:
    """p of time = c * value^p by least squares of the logarithms; None for fewer than two different values."""
    x, y = [math.log(v) for v in values], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / spread if spread else None


def measure(
    size: Size,
    dtype: str,
    batch: int,
    clock: Clock,
    rounds: int,
    folder: Path,
    resample: str = "residual",
    sample_seconds: float = 0.2,
    deadline: Deadline | None = None,
) -> dict:
    """{"rows", "exponents", "sentences", "plot", ...}: the points of one axis are interleaved."""
    deadline = deadline or Deadline()
    operator, memory_format = ours.operators(clock.device)[0][0], "nhwc"
    result: dict = {"rows": [], "ratios": [], "not_measured": [], "exponents": {}, "sentences": [], "plot": None}
    for what in ("infer", "train"):
        for axis, points in axes(size, batch, clock.device.type).items():
            if deadline.passed:
                result["not_measured"].append(f"growth of {what} with {axis}: the time limit was reached")
                continue
            works = {}
            with full_fp32():
                for value, shape, rows in points:
                    case = Case(what, shape, dtype, rows, clock.device, resample)
                    variant = Variant(ours.SIDE, memory_format, operator)
                    try:
                        works[value] = Workload(case, variant, Networks(case).get(ours.SIDE))
                        works[value].step()
                    except torch.OutOfMemoryError:
                        works.pop(value, None)
                        result["not_measured"].append(f"growth of {what} with {axis}: {value} does not fit into memory")
                calls = {value: work.step for value, work in works.items()}
                taken = interleave(calls, clock, rounds, sample_seconds, deadline, f"grow {what} {axis}")
            del works, calls
            free(clock.device)
            rows = [
                {"axis": axis, "value": v, "pass": what, "not_measured": None} | summary(s) for v, s in taken.items()
            ]
            result["rows"] += rows
            times = [row["median_s"] for row in rows]
            whole, end = exponent(list(taken), times), exponent(list(taken)[-2:], times[-2:])
            if whole is not None:
                result["exponents"][f"{what} {axis}"] = {"all": whole, "last_two": end}
                result["sentences"].append(
                    f"{what}: time grows as {axis}^{whole:.2f} over all points, ^{end:.2f} over the last two; expected {EXPECTED[axis]}"
                    + (
                        " (training: the optimizer updates every row of the class embedding)."
                        if axis == "classes" and what == "train"
                        else "."
                    )
                )
    if result["rows"]:
        file = folder / f"grow-{size.name}-{dtype}.png"
        save(plot(result["rows"]), file)
        result["plot"] = file.name
    return result


@chart
def plot(rows: Sequence[dict]):
    """One panel per axis, on logarithmic axes."""
    names = list(dict.fromkeys(row["axis"] for row in rows))
    figure = new_figure(3.4, 3.6 * len(names))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)
    for panel, axis in zip(panels[0], names):
        for what in ("infer", "train"):
            points = [row for row in rows if row["axis"] == axis and row["pass"] == what]
            if points:
                x, y = [p["value"] for p in points], [p["median_s"] for p in points]
                spread = [[p["median_s"] - p["min_s"] for p in points], [p["max_s"] - p["median_s"] for p in points]]
                panel.errorbar(x, y, yerr=spread, marker="o", label=what)
        panel.set(xscale="log", yscale="log", xlabel=axis)
        ticks = sorted({row["value"] for row in rows if row["axis"] == axis})
        panel.set_xticks(ticks, [f"{v // 1000}k" if v >= 1000 else str(v) for v in ticks])
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
    panels[0][0].set_ylabel("seconds per step (median, min to max)")
    panels[0][0].legend()
    return figure
