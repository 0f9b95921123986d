"""The mathematics of the power-function EMA: profiles, sums of saved averages, which snapshots remain."""

import numpy as np
import pytest

from diffusion_adagn.runs.power_ema import (
    MAX_ERROR,
    Average,
    decay,
    exponent,
    fit,
    possible_lengths,
    share_after,
    snapshot_steps,
)

LENGTHS = (0.03, 0.04, 0.06, 0.08, 0.13, 0.18, 0.25)


def shares(step, length, steps):
    """The exact share of each of `steps` steps in the average after `step` steps: the profile s^g, integrated over it."""
    g, s = exponent(length), np.arange(1, steps + 1)
    exact = (s ** (g + 1) - (s - 1.0) ** (g + 1)) / step ** (g + 1)
    return np.where(s <= step, exact, 0)


def saved(end, spacing, limit, tracked=(0.05, 0.1)):
    steps = [s for s in snapshot_steps(end, spacing, limit) if s < end]
    halves = [Average(s, length, half=True) for s in steps for length in tracked]
    return [Average(end, 0.0), *(Average(end, length) for length in tracked), *halves]


@pytest.mark.parametrize(("length", "expected"), [(0.05, 16.97), (0.10, 6.94), (1 / np.sqrt(12), 0.0)])
def test_exponents(length, expected):
    """The two that the paper gives, and the mean of all steps."""
    assert exponent(length) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("length", [0.03, 0.1, 0.25])
def test_the_length_is_the_deviation_of_the_profile(length):
    s, p = np.arange(1, 20_001) - 0.5, shares(20_000, length, 20_000)
    mean = (p * s).sum()
    assert p.sum() == pytest.approx(1)
    assert np.sqrt((p * (s - mean) ** 2).sum()) / 20_000 == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_updates_give_the_exact_shares(length):
    total = np.zeros(50)
    for step in range(1, 51):
        d = decay(step, exponent(length))
        total = d * total + (1 - d) * (np.arange(1, 51) == step)
    assert np.allclose(total, shares(50, length, 50), atol=1e-12)
    assert np.allclose(share_after(Average(50, length), np.arange(50)), 1 - np.cumsum(total) + total, atol=1e-12)


def walk(steps, size=300, drift=0.02, seed=0):
    """Weights [steps, size] that start at 1, drift, and are moved by noise."""
    rng = np.random.default_rng(seed)
    return 1 + np.cumsum(0.03 * rng.normal(size=(steps, size)) + drift * rng.normal(size=size), axis=0)


def measured(weights, averages, end, lengths):
    """The relative L2 errors of the sums of averages that were rounded as they are saved, and those predicted."""
    steps = len(weights)
    stored = np.stack(
        [(shares(a.step, a.length, steps) if a.length else np.eye(steps)[a.step - 1]) @ weights for a in averages]
    )
    rounded = np.where([[a.half] for a in averages], stored.astype(np.float16), stored.astype(np.float32)).astype(
        np.float32
    )
    coefficients, predicted = fit(averages, end, lengths)
    exact = np.stack([shares(end, length, steps) @ weights for length in lengths])
    return np.linalg.norm(coefficients.astype(np.float32) @ rounded - exact, axis=1) / np.linalg.norm(
        exact, axis=1
    ), predicted


@pytest.mark.parametrize(
    ("end", "spacing", "limit"),
    [(400, 6, 64), (200, 6, 64), (397, 6, 64), (1000, 6, 64), (650, 6, 64), (400, 50, 8), (30, 6, 64)],
    ids=["whole", "stopped halfway", "between two snapshots", "extended", "half thinned out", "eight", "four"],
)
def test_sums_of_saved_averages_are_the_exact_average(end, spacing, limit):
    averages = saved(end, spacing, limit)
    found, predicted = measured(walk(end), averages, end, LENGTHS)
    assert (found[predicted <= MAX_ERROR] < 0.01).all()
    if limit == 64 and end > 30:
        assert (predicted < 0.001).all()  # so that 0.03 to 0.25 are all possible, with much room
    assert (found < 2 * predicted + 1e-6).all()  # weights that also drift have a larger norm, and relatively less noise


def test_the_prediction_is_that_of_a_random_walk():
    """Calibration: for weights that are a walk from 0 the expected error is the predicted one."""
    rng = np.random.default_rng(0)
    weights = np.cumsum(rng.normal(size=(400, 1000)), axis=0)
    for limit, spacing in ((64, 6), (16, 25), (4, 100)):
        found, predicted = measured(weights, saved(400, spacing, limit), 400, LENGTHS)
        assert found == pytest.approx(predicted, rel=0.2), limit


def test_half_precision_costs_little():
    averages = saved(400, 6, 64)
    exact = [Average(a.step, a.length) for a in averages]
    weights = walk(400)
    with_rounding, without = (measured(weights, a, 400, LENGTHS)[0] for a in (averages, exact))
    assert (without < with_rounding).any() and (with_rounding < 0.0005).all()


def test_few_snapshots_reject_short_lengths():
    assert possible_lengths(saved(400, 6, 64), 400) == (0.005, 0.28)
    shortest, longest = possible_lengths(saved(400, 50, 8), 400)
    assert 0.015 < shortest < 0.03 and 0.25 <= longest < 0.28
    below, above = fit(saved(400, 50, 8), 400, [shortest * 0.9, shortest])[1]
    assert above <= MAX_ERROR < below


def test_a_long_run_is_compared_at_fewer_points():
    short, long = (fit(saved(end, end // 64, 64), end, LENGTHS)[1] for end in (4096, 1_024_000))
    assert short == pytest.approx(long, rel=0.1)


def test_snapshot_count():
    assert snapshot_steps(400, 6, 66) == list(range(6, 397, 6))
    for end in range(0, 1500, 61):
        steps = snapshot_steps(end, 6, 64)
        assert len(steps) == min(64, end // 6) and set(steps) <= set(range(6, end + 1, 6))
        assert not steps or steps[-1] == end - end % 6
    doubled = snapshot_steps(2 * 64 * 6, 6, 64)  # twice as long as planned: every second one
    assert set(np.diff(doubled)) == {12}


def test_what_was_removed_never_comes_back():
    before = set(snapshot_steps(6, 6, 10))
    for end in range(12, 1200, 6):
        now = set(snapshot_steps(end, 6, 10))
        assert now <= before | {end}
        before = now
