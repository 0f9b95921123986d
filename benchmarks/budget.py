"""How often does a sweep with a budget find a setting of the full grid's best set? Simulated from the features of a full sweep.

    adagn sweep RUN --guidance ... --features --out SWEEP
    python -m benchmarks.budget SWEEP [--share 0.333] [--repeats 200]

Each repeat draws an order of the images, the same for all points and balanced over the classes, and runs the rounds of
`adagn sweep --budget` on its first images. The budget is a share of the network evaluations of the full sweep. A repeat
succeeds if the best point of its last round is in the best set of all images, by the same metric. Beside it: the share of
points in that set, which a random choice reaches. Where the set holds over a third of the points, the result is void.
Results: SWEEP/budget.json.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from diffusion_adagn.evaluation.features import FeatureSet
from diffusion_adagn.evaluation.metrics.gaussian import Gaussian, frechet_distance, singular
from diffusion_adagn.evaluation.metrics.kernel import _kernel, _mutual
from diffusion_adagn.experiments.budget import next_count, ranked, rounds_for, survivors_of
from diffusion_adagn.experiments.runner import FEATURES, REFERENCE, load_point
from diffusion_adagn.experiments.selection import best_set, best_sets, primary_metric
from diffusion_adagn.schema import read_document

MAX_SET = 1 / 3  # of the points, in the best set


@dataclass(frozen=True)
class Distances:
    """The distances of a point's images to the reference, for any part of the images.

    pooled: [N, D]. gaussian: of the reference. kernels: [N, N] float32, between images. mutual: [N], each with the reference.
    """

    pooled: np.ndarray
    gaussian: Gaussian
    kernels: np.ndarray
    mutual: np.ndarray

    @classmethod
    def of(cls, pooled: np.ndarray, reference: FeatureSet) -> "Distances":
        import torch

        x = torch.from_numpy(pooled)
        kernels = _kernel(x, x).fill_diagonal_(0).float().numpy()
        return cls(pooled, reference.gaussian, kernels, _mutual(x, reference.kernel.features, 1000, False).numpy())

    def frechet(self, images: np.ndarray) -> float | None:
        """None for too few images."""
        if singular(len(images), self.pooled.shape[1], self.gaussian.count):
            return None
        return frechet_distance(Gaussian.of(self.pooled[images]), self.gaussian)

    def kid(self, images: np.ndarray) -> float:
        """Up to a constant, which is the same for all points."""
        n = len(images)
        within = self.kernels[np.ix_(images, images)].sum(dtype=np.float64) / (n * (n - 1))
        return within - 2 * self.mutual[images].mean()


def balanced_order(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A random order of the images in which every class comes once before any comes again."""
    turn = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = random.permutation(len(members))
    return np.argsort(turn + 0.99 * random.random(len(labels)))


def simulate(
    points: dict[str, Distances], costs: dict[str, float], order: np.ndarray, budget: float, batch: int
) -> tuple[str, str]:
    """The rounds of one budget: the best point of the last round, and the metric that chose it."""
    names, before = list(points), 0
    while True:
        count = next_count(before, budget, [costs[n] for n in names], rounds_for(len(names)), batch, len(order))
        budget -= (count - before) * sum(costs[n] for n in names)
        images = order[:count]
        values, metric = {n: points[n].frechet(images) for n in names}, "frechet"
        if None in values.values():
            values, metric = {n: points[n].kid(images) for n in names}, "kid"
        best = ranked(values, metric)
        if survivors_of(len(names)) == len(names) or count == len(order):
            return best[0], metric
        names, before = best[: survivors_of(len(names))], count


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.budget", description=__doc__.partition("\n")[0])
    parser.add_argument("sweep", type=Path, help="folder of a full sweep with --features")
    parser.add_argument("--share", type=float, default=1 / 3, help="of the full sweep's network evaluations [1/3]")
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    reference = FeatureSet.load(args.sweep / REFERENCE)
    name = f"pooled.{reference.about['extractor']['name']}"
    folders = sorted(file.parent for file in args.sweep.glob(f"points/*/{FEATURES}"))
    found, labels, points = [load_point(folder) for folder in folders], None, {}
    for folder in tqdm(folders, desc="kernels", unit="point"):
        with np.load(folder / FEATURES, allow_pickle=False) as arrays:
            labels, points[folder.name] = arrays["labels"], Distances.of(arrays[name], reference)
    costs = {p.id: float(p.row["nfe"]) for p in found}
    budget = args.share * len(labels) * sum(costs.values())
    batch = read_document(args.sweep / "plan.json")["draw"]["batch_size"]
    metric = primary_metric(best_sets(found))
    members = best_set(found, metric).members
    chosen = []
    for seed in tqdm(range(args.repeats), desc="budgets", unit="budget"):
        order = balanced_order(labels, np.random.default_rng(seed))
        chosen.append(simulate(points, costs, order, budget, batch))
    result = report(chosen, members, metric, len(points), args.share)
    (args.sweep / "budget.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(result["sentence"])


def report(chosen: list[tuple[str, str]], members: tuple[str, ...], metric: str, points: int, share: float) -> dict:
    """What is written. chosen: the point and the metric of each repeat. members: the best set."""
    hits, random = sum(point in members for point, _ in chosen) / len(chosen), len(members) / points
    void = random > MAX_SET
    sentence = (
        f"{hits:.1%} of {len(chosen)} budgets of {share:.3g} of the evaluations end in the best set by {metric} "
        f"({len(members)} of {points} points; a random choice: {random:.1%})"
    )
    sentence += f"; void, since the set holds over {MAX_SET:.0%} of the points." if void else "."
    winners = {point: sum(p == point for p, _ in chosen) for point in dict.fromkeys(p for p, _ in chosen)}
    return {
        "sentence": sentence, "hits": hits, "random": random, "void": void, "metric": metric, "best_set": list(members),
        "winners": winners, "chosen_by": sorted({m for _, m in chosen}), "share": share, "points": points,
    }  # fmt: skip


if __name__ == "__main__":
    main()
