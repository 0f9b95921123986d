"""An ablation in one table (Markdown and CSV) and one picture."""

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
    pictures: dict[str, np.ndarray],
) -> tuple[Path, Path, Path]:
    """results: the members' result.json. pictures: by member name, uint8 [classes, H, W, C]. Returns the three files."""
    files = out / "ablation.md", out / "ablation.csv", out / "ablation.png"
    files[0].write_text(_markdown(config, dataset, heldout, results), encoding="utf-8")
    with open(files[1], "w", newline="", encoding="utf-8") as file:
        rows = [_flat(r) for r in results]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    names = [dataset.label_space.name(c) for c in range(len(next(iter(pictures.values()))))]
    training = config.training
    labels = [f"{r['kind']}, seed {r['seed']}" for r in sorted(results, key=lambda r: _order(results, r))]
    keys = [f"{r['kind']}-seed{r['seed']}" for r in sorted(results, key=lambda r: _order(results, r))]
    scale = training.preview_guidance if config.model.null_class else 1.0
    title = f"after {training.max_steps} steps; guidance {scale:g}, {training.preview_steps} steps; a column starts from one noise"
    labelled_grid([list(pictures[k]) for k in keys], labels, names, title).save(files[2])
    return files


def _order(results: Sequence[dict], result: dict) -> tuple[int, int]:
    """Kind by kind in the order in which they were asked for, then by seed."""
    return list(dict.fromkeys(r["kind"] for r in results)).index(result["kind"]), result["seed"]


def _flat(result: dict) -> dict:
    """One row: gaps as mean and half-width of the 95% interval, and one column for each timestep bin."""
    row = {k: v for k, v in result.items() if "gap" not in k}
    for what in ("wrong", "null"):
        mean, half = result[f"{what}_gap"] or (None, None)
        row |= {f"{what}_gap": mean, f"{what}_gap_ci95": half}
        bins = result[f"{what}_gap_by_t"]
        row |= {f"{what}_gap_t{i}of{len(bins)}": b[0] if b else None for i, b in enumerate(bins, start=1)}
    return row


def _markdown(config: RunConfig, dataset: ImageDataset, heldout: ImageDataset, results: Sequence[dict]) -> str:
    by_kind: dict[str, list[dict]] = {}
    for r in results:
        by_kind.setdefault(r["kind"], []).append(r)
    seeds, days = sorted({r["seed"] for r in results}), sorted({r["date"] for r in results})
    t, T = config.training, config.diffusion.num_train_timesteps

    head = [
        "kind",
        "seeds",
        "parameters",
        "GFLOPs a picture",
        "images/s",
        "train loss",
        "held-out loss",
        "wrong - true",
        "null - true",
    ]
    rows = [
        [
            f"`{kind}`",
            ", ".join(str(r["seed"]) for r in some),
            f"{some[0]['parameters']:,}",
            f"{some[0]['flops'] / 1e9:.4f}",
            _over(some, lambda r: r["images_per_s"], "{:.0f}"),
            _over(some, lambda r: r["train_loss"], "{:.4f}"),
            _over(some, lambda r: r["heldout_loss"], "{:.4f}"),
            _over(some, lambda r: r["wrong_gap"] and r["wrong_gap"][0], "{:+.4f}"),
            _over(some, lambda r: r["null_gap"] and r["null_gap"][0], "{:+.4f}"),
        ]
        for kind, some in by_kind.items()
    ]
    bins = len(results[0]["wrong_gap_by_t"])
    edges = [round(T * i / bins) for i in range(bins + 1)]

    def by_t(against: str) -> list[str]:
        head = ["kind", *(f"{a}-{b - 1}" for a, b in pairwise(edges))]
        gaps = [[_gap(some, against, i) for i in range(bins)] for some in by_kind.values()]
        return _table(head, [[f"`{kind}`", *row] for kind, row in zip(by_kind, gaps)])

    halves = [r["wrong_gap"][1] for r in results if r["wrong_gap"]]
    interval = (
        f" Half-width of the 95% interval of one run's wrong - true, over pictures: at most {max(halves):.4f}."
        if halves
        else ""
    )
    return "\n".join(
        [
            f"# Conditioning kinds on {dataset.name}",
            "",
            f"{t.max_steps} steps of {t.batch_size} pictures ({len(dataset):,} in all), {config.speed.precision}, seeds {', '.join(map(str, seeds))}; "
            f"schedule {config.diffusion.schedule}, prediction {config.diffusion.prediction}, label dropout {t.label_dropout:g}. "
            "Data, order, noise, timesteps, drops and the start of the image path are the same; the kind is the only change. "
            f"{', '.join(sorted({r['device'] for r in results}))}, torch {torch.__version__}, {' to '.join(days[:1] + days[1:][-1:])}.",
            "",
            *_table(head, rows),
            "",
            f"Mean over the seeds, and (lowest to highest). Losses and gaps: EMA weights, {len(heldout):,} held-out pictures, each at "
            "several timesteps and noises, the same for every run; train loss: the last tenth of the logged ones. *wrong - true*: loss "
            "when told another picture's class, less the loss when told the true one: above 0 the label is used. *null - true* "
            "likewise: what the label is worth against none (a null row that is trained less adds to it)." + interval,
            "",
            f"*wrong - true* by timestep (t of 0..{T - 1}):",
            "",
            *by_t("wrong"),
            "",
            "*null - true* by timestep:",
            "",
            *by_t("null"),
            "",
            "A difference no larger than the range over seeds is none. Losses say nothing of how pictures look: see "
            "`ablation.png`. Speeds are of this machine and of what else it was doing.",
            "",
        ]
    )


def _gap(some: Sequence[dict], against: str, i: int) -> str:
    """The gap in timestep bin i over the seeds."""
    return _over(some, lambda r: r[f"{against}_gap_by_t"][i] and r[f"{against}_gap_by_t"][i][0], "{:+.4f}")


def _over(some: Sequence[dict], value: Callable[[dict], float | None], form: str) -> str:
    values = [v for v in map(value, some) if v is not None]
    if not values:
        return "-"
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
