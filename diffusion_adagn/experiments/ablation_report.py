"""The report of an ablation: one table as Markdown and CSV, and one image."""

import csv
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ..config import RunConfig
from ..data import ImageDataset
from ..render.grids import labelled_grid


def write_report(
    out: Path,
    config: RunConfig,
    dataset: ImageDataset,
    heldout: ImageDataset,
    results: Sequence[dict],
    images: dict[str, np.ndarray],
) -> tuple[Path, Path, Path]:
    """Write ablation.md, ablation.csv and ablation.png into `out`, and return their paths.

    Args:
        out: The output folder.
        config: The run that the members share.
        dataset: The training data.
        heldout: The held-out data.
        results: The members' result.json.
        images: By member name, uint8 [classes, H, W, C].
    """
    files = out / "ablation.md", out / "ablation.csv", out / "ablation.png"
    files[0].write_text(_markdown(config, dataset, heldout, results), encoding="utf-8")
    with open(files[1], "w", newline="", encoding="utf-8") as file:
        rows = [_flat(r) for r in results]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    names = [dataset.label_space.name(c) for c in range(len(next(iter(images.values()))))]
    training = config.training
    ordered = sorted(results, key=lambda r: _order(results, r))
    labels = [f"{r['kind']}, seed {r['seed']}" for r in ordered]
    keys = [f"{r['kind']}-seed{r['seed']}" for r in ordered]
    scale = training.preview_guidance if config.model.null_class else 1.0
    title = f"after {training.max_steps} steps; guidance {scale:g}, {training.preview_steps} steps; each column shares one initial noise"
    labelled_grid([list(images[k]) for k in keys], labels, names, title).save(files[2])
    return files


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


def _markdown(config: RunConfig, dataset: ImageDataset, heldout: ImageDataset, results: Sequence[dict]) -> str:
    members_of: dict[str, list[dict]] = {}
    for r in results:
        members_of.setdefault(r["kind"], []).append(r)
    seeds, days = sorted({r["seed"] for r in results}), sorted({r["date"] for r in results})
    t, d = config.training, config.diffusion
    T = d.num_train_timesteps if d.process == "ddpm" else 100  # edm and flow: percent of the training noise
    axis = (
        f"timestep (t of 0..{T - 1})" if d.process == "ddpm" else "percent of the training noise, from image to noise"
    )
    process = f"schedule {d.schedule}, prediction {d.prediction}" if d.process == "ddpm" else f"process {d.process}"

    head = [
        "conditioning",
        "seeds",
        "parameters",
        "GFLOPs per image",
        "images/s",
        "train loss",
        "held-out loss",
        "wrong - true",
        "null - true",
    ]
    rows = [
        [
            f"`{name}`",
            ", ".join(str(r["seed"]) for r in members),
            f"{members[0]['parameters']:,}",
            f"{members[0]['flops'] / 1e9:.4f}",
            _over_seeds(members, lambda r: r["images_per_s"], "{:.0f}"),
            _over_seeds(members, lambda r: r["train_loss"], "{:.4f}"),
            _over_seeds(members, lambda r: r["heldout_loss"], "{:.4f}"),
            _over_seeds(members, lambda r: r["wrong_gap"] and r["wrong_gap"][0], "{:+.4f}"),
            _over_seeds(members, lambda r: r["null_gap"] and r["null_gap"][0], "{:+.4f}"),
        ]
        for name, members in members_of.items()
    ]
    bins = len(results[0]["wrong_gap_by_t"])
    edges = [round(T * i / bins) for i in range(bins + 1)]

    def by_noise(label: str) -> list[str]:
        head = ["conditioning", *(f"{a}-{b - 1}" for a, b in pairwise(edges))]
        gaps = [[_gap(members, label, i) for i in range(bins)] for members in members_of.values()]
        return _table(head, [[f"`{name}`", *row] for name, row in zip(members_of, gaps)])

    halves = [r["wrong_gap"][1] for r in results if r["wrong_gap"]]
    interval = (
        f" Half-width of the 95% interval of one run's wrong - true, over images: at most {max(halves):.4f}."
        if halves
        else ""
    )
    return "\n".join(
        [
            f"# Conditioning on {dataset.name}",
            "",
            f"{t.max_steps} steps of {t.batch_size} images ({len(dataset):,} in all), {config.speed.precision}, seeds {', '.join(map(str, seeds))}; "
            f"{process}, label dropout {t.label_dropout:g}. "
            "Data, order, noise, timesteps, label dropout and the initial weights of the image path are the same; only the conditioning differs. "
            f"{', '.join(sorted({r['device'] for r in results}))}, torch {torch.__version__}, {' to '.join(days[:1] + days[1:][-1:])}.",
            "",
            *_table(head, rows),
            "",
            f"Mean over the seeds, and (lowest to highest). Losses and gaps: EMA weights, {len(heldout):,} held-out images, each at "
            "several timesteps and noises, the same for every run; train loss: mean of the last tenth of the logged losses. *wrong - true*: "
            "loss with another image's class minus loss with the true class; above 0, the network uses the label. *null - true*: the same "
            "with the null label in place of another class (a null embedding that is trained less adds to it)."
            + interval,
            "",
            f"*wrong - true* by {axis}:",
            "",
            *by_noise("wrong"),
            "",
            f"*null - true* by {axis}:",
            "",
            *by_noise("null"),
            "",
            "A difference within the range over seeds is not significant. Losses do not measure image quality: see "
            "`ablation.png`. Speeds depend on this machine and its other load.",
            "",
        ]
    )


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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
