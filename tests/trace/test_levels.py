"""Noise levels of each process: their numbers, words and axes."""

import math

import numpy as np
import pytest
import torch

from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_process
from diffusion_adagn.trace.levels import NoiseLevels, evenly_spread, short, training_bins

DDPM, FLOW = make_process(DiffusionConfig()), make_process(DiffusionConfig(process="flow"))
EDM = make_process(DiffusionConfig(process="edm", sigma_data=0.4))


def test_levels_equal_formulas():
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    assert NoiseLevels.of(DDPM, [0, 500, 999]).sigmas == pytest.approx(np.sqrt(1 / bar - 1)[[0, 500, 999]], rel=1e-3)
    assert NoiseLevels.of(EDM, [math.log(s) / 4 for s in (0.002, 1, 80)]).sigmas == pytest.approx([0.002, 1, 80])
    assert NoiseLevels.of(FLOW, [250, 500, 1000]).sigmas == pytest.approx([1 / 3, 1, math.inf])


@pytest.mark.parametrize("count", [1, 2, 3, 10, 50])
def test_levels_are_evenly_spread(count):
    assert evenly_spread(DDPM, count) == np.linspace(0, 999, count).round().tolist()
    for process in (EDM, FLOW):
        times = torch.tensor(evenly_spread(process, count))
        gaps = process.share(times).diff()
        assert len(times) == count and torch.allclose(gaps, gaps.mean().expand_as(gaps), atol=1e-6)
        if count > 1:
            assert [times[0].item(), times[-1].item()] == pytest.approx(list(process.times))


def test_few_timesteps_are_not_repeated():
    assert evenly_spread(make_process(DiffusionConfig(num_train_timesteps=4)), 10) == [0, 1, 2, 3]


def test_levels_in_words():
    assert NoiseLevels.of(DDPM, [0, 500]).words(1) == "sigma = 3.44, t = 500"
    assert NoiseLevels.of(FLOW, [200.0, 500.0]).span(0, 1) == "sigma = 0.25 to 1 (t = 200 to 500)"
    levels = NoiseLevels.of(EDM, [math.log(s) / 4 for s in (0.1, 2.5)])
    assert (levels.words(0), levels.span(0, 1)) == ("sigma = 0.1", "sigma = 0.1 to 2.5")
    unknown = NoiseLevels([0.0, 20.0], None)
    assert (unknown.words(1), unknown.span(0, 1)) == ("t = 20", "t = 0 to 20")
    assert [short(v) for v in (0.0123456, 20213.7, 157.4, math.inf, 0, 999)] == [
        "0.0123",
        "20200",
        "157",
        "inf",
        "0",
        "999",
    ]


@pytest.mark.parametrize("process", [DDPM, EDM, FLOW], ids=lambda p: p.name)
def test_axis_is_logarithmic_and_finite(process):
    levels = NoiseLevels.of(process, evenly_spread(process, 30))
    places = levels.places
    assert np.isfinite(places).all() and (np.diff(places) > 0).all()
    finite = np.isfinite(levels.sigmas)
    assert np.allclose(places[finite], np.log(np.array(levels.sigmas)[finite]))


def test_bins_are_equally_frequent_in_training():
    bins = training_bins(DDPM, 8)
    assert [b.t for b in bins] == [f"{i} to {i + 124}" for i in range(0, 1000, 125)]
    assert bins[0].words == "sigma = 0.01 to 0.426 (t = 0 to 124)"
    # the quartiles of the normal distribution are 0.6745 standard deviations from its middle
    mean = -1.2 + math.log(0.4 / 0.5)
    edges = [math.exp(mean + 1.2 * z) for z in (-0.67449, 0, 0.67449)]
    low, second, _, high = training_bins(EDM, 4)
    assert (low.sigma, high.sigma) == (f"below {short(edges[0])}", f"above {short(edges[2])}")
    assert second.words == f"sigma = {short(edges[0])} to {short(edges[1])}" and second.t == ""
    assert high.words == f"sigma above {short(edges[2])}"
    assert training_bins(FLOW, 2)[0].words == "sigma below 1 (t below 500)"
    normal = make_process(DiffusionConfig(noise="log_normal", noise_mean=0.0, noise_std=1.0))
    assert training_bins(normal, 2)[1].sigma.startswith("above 1")
