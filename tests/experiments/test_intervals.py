"""Guidance intervals that are found: proposals from the label's influence, and whether they hold."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from test_selection import point, scores_of

from diffusion_adagn import ClassConditionalPipeline
from diffusion_adagn.cli.main import main
from diffusion_adagn.errors import InputError
from diffusion_adagn.experiments import intervals, sweep_sections
from diffusion_adagn.experiments.intervals import find_intervals, verdict
from diffusion_adagn.experiments.settings import SweepRequest, parse_axes
from diffusion_adagn.trace.levels import NoiseLevels
from diffusion_adagn.trace.probes import Sensitivity

LABELS = {"guidance.interval": "--interval"}


@pytest.fixture(scope="module")
def digits():
    return ClassConditionalPipeline.from_pretrained("digits")


def found_with(monkeypatch, pipe, change):
    """The proposals where the label changes x0 by so much at 20 noise levels."""

    def measured(unet, objective, x0, labels, times):
        change_at = np.asarray(change, float)[: len(times)]
        return Sensitivity(NoiseLevels.of(objective.process, times), change_at, change_at, "null")

    monkeypatch.setattr(intervals, "label_sensitivity", measured)
    return find_intervals(pipe, "digits")


def test_proposals_are_the_bands_around_the_peak(digits, monkeypatch):
    change = [0.0] * 5 + [0.3, 0.3, 0.6, 1.0, 0.6, 0.3] + [0.0] * 9
    found = found_with(monkeypatch, digits, change)
    (narrow, wide), sigmas = (
        (tuple(map(float, i.removeprefix("sigma:").split("-"))) for i in found.intervals),
        found.sigmas,
    )
    assert narrow[0] <= sigmas[7] and sigmas[9] <= narrow[1] and narrow[1] < sigmas[10] and sigmas[6] < narrow[0]
    assert wide[0] <= sigmas[5] < sigmas[10] <= wide[1] and found.fractions == (0.5, 0.25)
    assert "at least 50% of that" in found.sentence() and "RMS 1" in found.sentence()


def test_equal_bands_are_proposed_once(digits, monkeypatch):
    assert len(found_with(monkeypatch, digits, [0.0] * 8 + [1.0] * 4 + [0.0] * 8).intervals) == 1


def test_band_at_the_end_has_no_upper_bound(digits, monkeypatch):
    assert found_with(monkeypatch, digits, [0.0] * 12 + [1.0] * 8).intervals[0].endswith("-inf")


@pytest.mark.parametrize("change", [[1.0] * 20, [0.0] * 20])
def test_no_band_is_rejected(digits, monkeypatch, change):
    with pytest.raises(InputError, match="no interval can be proposed"):
        found_with(monkeypatch, digits, change)


def test_auto_is_none_and_the_proposals():
    request = SweepRequest(axes=parse_axes({"guidance.interval": "auto,0.1-0.5"}, LABELS))
    assert request.finds_intervals
    expanded = request.with_intervals(["sigma:1-2", "sigma:0.5-4"])
    assert (
        expanded.axes["guidance.interval"] == ("none", "sigma:1-2", "sigma:0.5-4", "0.1-0.5")
        and not expanded.finds_intervals
    )
    assert SweepRequest().with_intervals(()) == SweepRequest()


def points(kid):
    """Full guidance and two intervals, each at two scales; the better value at scale 2."""
    made = [point(1, {"kid": scores_of(9.0)}, id="unguided", nfe=20)]
    for interval, value in kid.items():
        nfe = 40 if interval == "none" else 30
        for scale, more in ((2, 0.0), (4, 1.0)):
            given = {"interval": interval, "nfe": nfe, "id": f"{interval}{scale}"}
            made.append(point(scale, {"kid": scores_of(value + more)}, **given))
    return made


@pytest.mark.parametrize(
    ("kid", "words"),
    [
        (
            {"none": 2.0, "sigma:1-2": 1.0, "sigma:0.5-4": 3.0},
            ("The proposal held: sigma:1-2", "sigma:1-2 is better than full"),
        ),
        ({"none": 1.0, "sigma:1-2": 2.0, "sigma:0.5-4": 3.0}, ("The proposal did not hold", "worse than or equal to")),
        ({"sigma:1-2": 2.0, "sigma:0.5-4": 3.0}, ("were not measured beside guidance at every noise level",)),
    ],
)
def test_verdict_compares_best_settings(kid, words):
    text = verdict(points(kid), ["sigma:1-2", "sigma:0.5-4"], "kid", {})
    assert all(word in text for word in words), text


def test_equal_interval_holds_since_it_is_cheaper():
    made = points({"none": 2.0, "sigma:1-2": 2.0})
    assert "not distinguishable from full guidance (30 evaluations per image against 40)" in verdict(
        made, ["sigma:1-2"], "kid", {}
    )


@pytest.mark.slow
def test_sweep_finds_intervals_and_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_sections, "charts", lambda report: [])
    argv = [
        "sweep",
        "digits",
        "--guidance",
        "1,2",
        "--interval",
        "auto",
        "--steps",
        "6",
        "--count",
        "40",
        "--extractor",
        "sklearn",
    ]
    assert main([*argv, "--out", str(tmp_path / "s"), "--debug"]) == 0
    found = json.loads((tmp_path / "s/intervals.json").read_text())
    assert 1 <= len(found["intervals"]) <= 2
    page = (tmp_path / "s/sweep.md").read_text(encoding="utf-8")
    assert "## Proposed intervals" in page and "The proposal " in page
    monkeypatch.setattr(
        "diffusion_adagn.experiments.sweep.find_intervals", lambda *a: SimpleNamespace()
    )  # not found again
    before = (tmp_path / "s/sweep.csv").read_bytes()
    assert main([*argv, "--out", str(tmp_path / "s"), "--debug"]) == 0
    assert (tmp_path / "s/sweep.csv").read_bytes() == before
