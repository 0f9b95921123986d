"""The page of benchmarks.quality, from rows as its sweeps give them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.peers import PeerMissing, flops
from benchmarks.quality import Run
from benchmarks.quality_peers import PEERS, gflops
from benchmarks.quality_report import at_all_times, best_rows, by_method, comparison, quality_report, spread_of_seeds
from diffusion_adagn import AdaGNUNet
from diffusion_adagn.config import as_config
from diffusion_adagn.data.npz import write_npz
from diffusion_adagn.labels import LabelSpace
from diffusion_adagn.runs.layout import network_config

CLASSES = ["cat", "dog"]


def row(run: str, scale: float, frechet: float, accuracy: float = 0.5, **more) -> dict:
    values = {"frechet": frechet, "accuracy": accuracy, "precision": 0.6, "recall": None}
    return {
        "run": run, "scale": scale, "images": 80_000, "samples": f"{run}.npz",
        "metrics": {name: {"value": v} for name, v in values.items()},
        "diagnostics": {"saturation_ratio": 1.0, "contrast_ratio": 0.9}, **more,
    }  # fmt: skip


ROWS = [
    row("eps-small-0", 1, 4.5), row("eps-small-0", 2, 3.4), row("eps-small-1", 2, 3.0),
    row("edm-small-0", 1, 1.4), row("edm-small-0", 2, 1.6), row("edm-small-1", 1, 1.2), row("flow-small-0", 1, 1.5),
]  # fmt: skip


def test_best_scale_of_each_run():
    best = best_rows(ROWS)
    assert {run: r["scale"] for run, r in best.items()} == {
        "edm-small-1": 1, "edm-small-0": 1, "flow-small-0": 1, "eps-small-1": 2, "eps-small-0": 2
    }  # fmt: skip
    assert next(iter(best)) == "edm-small-1"


def test_spread_is_within_one_method():
    values = by_method(best_rows(ROWS), "frechet")
    assert values["eps-small"] == [3.0, 3.4] and values["flow-small"] == [1.5]
    assert spread_of_seeds(values, "frechet") == pytest.approx(1.4 / 1.2)  # a ratio: 3.4 / 3.0 is less
    assert spread_of_seeds(values, "accuracy") == pytest.approx(0.4)
    assert spread_of_seeds({"a": [1.0], "b": [2.0]}, "accuracy") is None


def test_difference_below_the_spread_is_none():
    lines = {method: verdict for method, _, _, verdict in comparison(best_rows(ROWS), "frechet").rows}
    assert lines["edm-small"] == "best"
    assert lines["flow-small"] == "no difference"  # 1.15 times, seeds differ by a factor of 1.17
    assert lines["eps-small"] == "2.46 times"


def test_higher_accuracy_is_better():
    rows = [row("eps-small-0", 1, 2.0, 0.2), row("edm-small-0", 1, 2.1, 0.7)]
    assert [line[0] for line in comparison(best_rows(rows), "accuracy").rows] == ["edm-small", "eps-small"]
    rows += [row("edm-small-1", 1, 2.1, 0.6)]
    lines = {method: verdict for method, _, _, verdict in comparison(best_rows(rows), "accuracy").rows}
    assert lines == {"edm-small": "best", "eps-small": "0.45 less; the best has 3.25 times as much"}


def test_page_has_sheet_curve_and_points(tmp_path):
    rows = [row(run, 1, 5 - m / 20, minutes=m) for run in ("eps-small-long", "diffusers") for m in (10, 20, 40)]
    for run in ("eps-small-long", "diffusers"):
        write_npz(tmp_path / f"{run}.npz", np.zeros((8, 32, 32, 3), np.uint8), np.arange(8) % 2)
    page = quality_report(rows, CLASSES, tmp_path, "command", {"small": 39.8}).save(
        tmp_path / "page", text="quality.md"
    )[0]
    assert {"curve.png", "curve.svg", "sheet.png", "quality.md"} <= {file.name for file in page.parent.iterdir()}
    text = (page.parent / "quality.md").read_text()
    assert text.count("| eps-small-long") == 6  # two comparisons at the best scale, one at scale 1; three points
    assert "39.8" in text and "40" in text and "80,000" in text and "Each run at scale 1" in text


def test_curve_compares_the_same_scales():
    """A larger scale at the end alone would look like progress."""
    rows = [
        row("flow-small-long", scale, 3, minutes=m) for m in (10, 40) for scale in (1, 2, 3) if (m, scale) != (10, 3)
    ]
    assert {r["scale"] for r in at_all_times(rows)} == {1, 2} and len(at_all_times(rows)) == 4


@pytest.mark.parametrize("peer", PEERS)
def test_ema_of_a_peer_forgets_its_first_weights(peer):
    """Without a warm-up 0.3 of the random first weights would remain after 2,400 steps, and the images would be noise."""
    decays = [PEERS[peer].ema_decay(None, step) for step in range(1, 2401)]
    remains, age = 1.0, 0.0
    for decay in decays:
        remains, age = remains * decay, decay * (age + 1)
    assert remains < 1e-6 and min(decays) >= 0 and max(decays) <= 1
    assert 100 < age < 2000  # the mean age of the averaged weights, in steps


@pytest.mark.parametrize("peer", PEERS)
def test_networks_of_the_peers_cost_what_ours_does(peer):
    settings = Run("flow", "small", 0).settings("cifar10", 1) | {"data.image_size": 32, "data.channels": 3}
    config = replace(as_config(settings), labels=LabelSpace(tuple("0123456789")).to_dict())
    one = torch.zeros(1, dtype=torch.long)
    ours = flops(AdaGNUNet(**network_config(config)), torch.zeros(1, 3, 32, 32), one, one) / 1e9
    try:
        assert 0.9 < gflops(peer) / ours < 1.1
    except PeerMissing as error:
        pytest.skip(str(error))
