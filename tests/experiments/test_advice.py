"""Which setting a sweep recommends: the cheapest that is not distinguishable from the best, and what it costs."""

import pytest
from test_selection import point, scores_of
from test_sweep_report import SWEEP, measured_points

from diffusion_adagn.experiments import selection, sweep_plots, verdicts
from diffusion_adagn.experiments.sweep_report import SweepReport, summary


def points_of(means, nfe=(20, 40, 40, 40, 40), spread=0.1, **more):
    """One point per scale 1, 2, ...: means of each metric, with independent noise, so that equal means are not distinguishable."""
    count = len(next(iter(means.values())))
    return [
        point(
            i + 1,
            {m: scores_of(values[i], spread=spread, seed=10 * i + len(m)) for m, values in means.items()},
            nfe=nfe[i],
            **more,
        )
        for i in range(count)
    ]


def advice_on(points):
    choices = selection.best_sets(points)
    advice = selection.recommend(points, choices)
    return advice, verdicts.format_advice(advice, points, choices)


def test_frechet_distance_decides_first():
    advice, text = advice_on(points_of({"kid": [3, 2, 1], "frechet": [3, 1, 3], "recall": [0.9, 0.5, 0.1]}))
    assert (advice.point, advice.by, set(advice.costs)) == (advice.equal[0], ("frechet",), {"kid", "recall"})
    assert text.startswith(
        "Use scale 2: Frechet distance 1.0000 ± 0.0051, the lowest. It costs kernel distance 1.0000 (2.0000; "
    )
    assert "recall 0.4000 (0.5000; 0.9000 at scale 1)" in text


def test_cheapest_of_equal_settings_wins():
    advice, text = advice_on(points_of({"kid": [1.001, 1.0, 1.002, 3]}))
    assert len(advice.equal) == 3 and "the cheapest of 3 such settings (20 network evaluations per image)" in text
    assert text.startswith(
        "Use scale 1: kernel distance 1.0010 ± 0.0050, not distinguishable from the lowest (1.0000 at scale 2)"
    )
    advice, _ = advice_on(points_of({"kid": [1.001, 1.0, 1.002, 3]}, nfe=(40,) * 4))
    assert advice.point.startswith("scale1.0")  # at equal cost, the least guidance


def test_accuracy_decides_among_equal_distances():
    advice, text = advice_on(points_of({"frechet": [1, 1, 1, 2], "accuracy": [0.3, 0.9, 0.9, 1.0]}, spread=0.2))
    assert advice.by == ("frechet", "accuracy") and advice.point.startswith("scale2.0")
    assert "; accuracy 0.900, not distinguishable from the highest of those; the cheapest of 2" in text


def test_indistinguishable_settings_are_reported():
    advice, text = advice_on(points_of({"kid": [1, 1, 1], "recall": [0.5, 0.5, 0.5]}, spread=1))
    assert advice.point.startswith("scale1.0")
    assert "the cheapest of all 3 settings" in text and "this many images do not distinguish" in text
    assert text.endswith("No other metric is distinguishably better elsewhere.")


def test_largest_scale_suggests_sweeping_further():
    assert advice_on(points_of({"kid": [3, 2, 1]}))[1].endswith("It is the largest scale of this sweep: sweep further.")


def test_one_point_gets_no_advice():
    points = points_of({"kid": [1]})
    assert selection.recommend(points, selection.best_sets(points)) is None


def test_reports_begin_with_the_advice(tmp_path):
    report = SweepReport(SWEEP, measured_points(), ())
    (tmp_path / "sweep.json").write_bytes(report.json())
    [use, *image_notes] = summary([tmp_path / "sweep.json"])
    assert use.startswith("Use scale 1.5: kernel distance 0.0100 ± 0.0097, the lowest") and len(image_notes) == 1
    assert report.report().markdown().splitlines()[2] == use
    (tmp_path / "sweep.json").write_bytes(SweepReport(SWEEP, measured_points([2]), ()).json())
    assert summary([tmp_path / "sweep.json"])[0].startswith("There is one point")


@pytest.mark.parametrize(
    ("fidelity", "diversity", "style"), [("precision", "recall", "steps-pre"), ("recall", "kid", "steps-post")]
)
def test_pareto_front_is_drawn_as_steps(fidelity, diversity, style):
    ax = sweep_plots.tradeoff(measured_points(), fidelity, diversity).axes[0]
    front = ax.lines[0]
    assert front.get_drawstyle() == style and list(front.get_xdata()) == sorted(front.get_xdata())
    assert ax.containers and all(c.has_xerr and c.has_yerr for c in ax.containers)
