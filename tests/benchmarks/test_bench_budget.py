"""The simulation of budgets from the features of a full sweep."""

import numpy as np
import pytest

from benchmarks.budget import Distances, balanced_order, report, simulate
from diffusion_adagn.evaluation.features import FeatureSet
from diffusion_adagn.evaluation.metrics import frechet, kid


@pytest.fixture(scope="module")
def reference():
    features = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    return FeatureSet(features, about={"name": "x", "extractor": {"name": "e"}})


def sampled(shift, seed=1, count=60):
    return (np.random.default_rng(seed).normal(size=(count, 4)) + shift).astype(np.float32)


def test_distances_of_a_part_are_those_of_its_images(reference):
    one, other = (Distances.of(sampled(shift), reference) for shift in (0.0, 0.5))
    images = np.array([3, 50, 7, 20, 33, 41, 9, 12])
    difference = one.kid(images) - other.kid(images)
    expected = [kid(x.pooled[images], reference.pooled).value for x in (one, other)]
    assert difference == pytest.approx(expected[0] - expected[1], rel=1e-4)
    expected = frechet(one.pooled[images], reference.gaussian).value
    assert one.frechet(images) == pytest.approx(expected, rel=1e-6) and one.frechet(images[:4]) is None


def test_orders_are_balanced():
    labels = np.arange(60) % 3
    order = balanced_order(labels, np.random.default_rng(0))
    assert sorted(order) == list(range(60)) and list(order) != sorted(order)
    assert all(sorted(labels[order[i : i + 3]]) == [0, 1, 2] for i in range(0, 60, 3))


def test_clearly_best_point_wins(reference):
    points = {
        f"p{i}": Distances.of(sampled(shift, seed=i), reference)
        for i, shift in enumerate((3, 2, 1, 0, 4, 5, 2.5, 1.5, 3.5))
    }
    costs = dict.fromkeys(points, 10.0)
    order = balanced_order(np.arange(60) % 3, np.random.default_rng(0))
    assert simulate(points, costs, order, 60 * 90 / 3, 4) == ("p3", "frechet")


def test_result_is_void_if_the_set_is_large():
    chosen = [("a", "kid")] * 3 + [("b", "kid")]
    assert report(chosen, ("a",), "kid", 8, 1 / 3)["sentence"].startswith(
        "75.0% of 4 budgets of 0.333 of the evaluations"
    )
    assert not report(chosen, ("a",), "kid", 8, 1 / 3)["void"]
    assert report(chosen, ("a", "b", "c"), "kid", 8, 1 / 3)["void"]
