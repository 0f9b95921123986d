"""The report of an ablation: tables as Markdown, HTML and CSV, and one image."""

import csv
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ..config import RunConfig
from ..data import ImageDataset
from ..render.grids import labelled_grid
from ..render.report import Code, Report, Section, Shown, Table

MEANINGS = (
    "Losses and gaps: EMA weights, each held-out image at several timesteps and noises, the same for every run; train "
    "loss: mean of the last tenth of the logged losses. wrong - true: loss with another image's class minus loss with the "
    "true class; above 0, the network uses the label. null - true: the same with the null label in place of another class "
    "(a null embedding that is trained less adds to it)."
)
SAME = (
    "Data, order, noise, timesteps, label dropout and the initial weights of the image path are the same; only the "
    "conditioning differs. Losses do not measure image quality: look at the images. Speeds depend on this machine and its "
    "other load."
)


def write_report(
    out: Path,
    config: RunConfig,
    dataset: ImageDataset,
    heldout: ImageDataset,
    results: Sequence[dict],
    images: dict[str, np.ndarray],
) -> tuple[Path, Path, Path]:
    """Write ablation.md, ablation.csv, ablation.png and report.html into `out`, and return the first three.

    Args:
        out: The output folder.
        config: The run that the members share.
        dataset: The training data.
        heldout: The held-out data.
        results: The members' result.json.
        images: By member name, uint8 [classes, H, W, C].
    """
    with open(out / "ablation.csv", "w", newline="", encoding="utf-8") as file:
        rows = [_flat(r) for r in results]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    grid = Section(
        "Images", [Shown("ablation", partial(_grid, config, dataset, results, images), "images by conditioning")]
    )
    sections = [*_tables(config, results, len(heldout)), grid, _made(config, dataset, results)]
    Report(f"Conditioning on {dataset.name}", sections).save(out, text="ablation.md")
    return out / "ablation.md", out / "ablation.csv", out / "ablation.png"


def _grid(config: RunConfig, dataset: ImageDataset, results: Sequence[dict], images: dict[str, np.ndarray]):
    names = [dataset.label_space.name(c) for c in range(len(next(iter(images.values()))))]
    training = config.training
    ordered = sorted(results, key=lambda r: _order(results, r))
    labels = [f"{r['kind']}, seed {r['seed']}" for r in ordered]
    keys = [f"{r['kind']}-seed{r['seed']}" for r in ordered]
    scale = training.preview_guidance if config.model.null_class else 1.0
    title = f"after {training.max_steps} steps; guidance {scale:g}, {training.preview_steps} steps; each column shares one initial noise"
    return labelled_grid([list(images[k]) for k in keys], labels, names, title)


def _order(results: Sequence[dict], result: dict) -> tuple[int, int]:
    """By conditioning, in the order of the results, then by seed."""
    return list(dict.fromkeys(r["kind"] for r in results)).index(result["kind"]), result["seed"]


def _flat(result: dict) -> dict:
    """One row: gaps as mean and half-width of the 95% interval, and one column for each timestep bin."""
    row = {k: v for k, v in result.items() if "gap" not in k}
    for label in ("wrong", "null"):
        mean, half = result[f"{label}_gap"] or (None, None)
        row |= {f"{label}_gap": mean, f"{label}_gap_ci95": half}
        bins = result[f"{label}_gap_by_t"]
        row |= {f"{label}_gap_t{i}of{len(bins)}": b[0] if b else None for i, b in enumerate(bins, start=1)}
    return row


def _tables(config: RunConfig, results: Sequence[dict], heldout: int) -> list[Section]:
    members_of: dict[str, list[dict]] = {}
    for r in results:
        members_of.setdefault(r["kind"], []).append(r)
    columns: dict[str, Callable[[list[dict]], str]] = {
        "seeds": lambda members: ", ".join(str(r["seed"]) for r in members),
        "parameters": lambda members: f"{members[0]['parameters']:,}",
        "GFLOPs per image": lambda members: f"{members[0]['flops'] / 1e9:.4f}",
        "images/s": lambda members: _over_seeds(members, lambda r: r["images_per_s"], "{:.0f}"),
        "train loss": lambda members: _over_seeds(members, lambda r: r["train_loss"], "{:.4f}"),
        "held-out loss": lambda members: _over_seeds(members, lambda r: r["heldout_loss"], "{:.4f}"),
        "wrong - true": lambda members: _over_seeds(members, lambda r: r["wrong_gap"] and r["wrong_gap"][0], "{:+.4f}"),
        "null - true": lambda members: _over_seeds(members, lambda r: r["null_gap"] and r["null_gap"][0], "{:+.4f}"),
    }
    rows = [[Code(name), *(cell(members) for cell in columns.values())] for name, members in members_of.items()]
    halves = [r["wrong_gap"][1] for r in results if r["wrong_gap"]]
    interval = f" Half of the 95% interval of one run's wrong - true: at most {max(halves):.4f}." if halves else ""
    caption = (
        f"Mean over the seeds, and (lowest to highest); a difference within that range is not significant. {MEANINGS} "
        f"Held-out images: {heldout:,}.{interval}"
    )
    overall = Section("Losses", [Table(["conditioning", *columns], rows, caption)])
    return [overall, *(_by_noise(config, members_of, label) for label in ("wrong", "null"))]


def _by_noise(config: RunConfig, members_of: dict[str, list[dict]], label: str) -> Section:
    ddpm = config.diffusion.process == "ddpm"
    total = config.diffusion.num_train_timesteps if ddpm else 100  # edm and flow: percent of the training noise
    axis = f"timestep (t of 0..{total - 1})" if ddpm else "percent of the training noise, from image to noise"
    bins = len(next(iter(members_of.values()))[0]["wrong_gap_by_t"])
    edges = [round(total * i / bins) for i in range(bins + 1)]
    head = ["conditioning", *(f"{a}-{b - 1}" for a, b in pairwise(edges))]
    rows = [[Code(name), *(_gap(members, label, i) for i in range(bins))] for name, members in members_of.items()]
    return Section(f"{label} - true by {axis}", [Table(head, rows)])


def _made(config: RunConfig, dataset: ImageDataset, results: Sequence[dict]) -> Section:
    t, d = config.training, config.diffusion
    days = sorted({r["date"] for r in results})
    process = f"schedule {d.schedule}, prediction {d.prediction}" if d.process == "ddpm" else f"process {d.process}"
    rows = [
        [
            "training",
            f"{t.max_steps} steps of {t.batch_size} images ({len(dataset):,} in all), {config.speed.precision}",
        ],
        ["seeds", ", ".join(map(str, sorted({r["seed"] for r in results})))],
        ["process", f"{process}, label dropout {t.label_dropout:g}"],
        ["machine", f"{', '.join(sorted({r['device'] for r in results}))}, torch {torch.__version__}"],
        ["date", " to ".join(days[:1] + days[1:][-1:])],
    ]
    return Section("How it was made", [Table(["what", "value"], rows, SAME)])


def _gap(members: Sequence[dict], label: str, i: int) -> str:
    """The gap in timestep bin i, over the seeds."""
    return _over_seeds(members, lambda r: r[f"{label}_gap_by_t"][i] and r[f"{label}_gap_by_t"][i][0], "{:+.4f}")


def _over_seeds(members: Sequence[dict], value: Callable[[dict], float | None], form: str) -> str:
    """Mean (lowest to highest) of a value; "-" if no member has it."""
    values = [v for v in map(value, members) if v is not None]
    if not values:
        return "-"
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"
