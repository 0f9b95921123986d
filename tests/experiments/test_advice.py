"""Which setting a sweep recommends: the cheapest of those that are not distinguishable from the best, and what it costs."""

import pytest
from test_selection import at, point
from test_sweep_report import SWEEP, measured_points

from diffusion_adagn.experiments import selection, sweep_plots
from diffusion_adagn.experiments.sweep_report import SweepReport, summary


def points_of(means, nfe=(20, 40, 40, 40, 40), spread=0.1, **more):
    """A point a scale 1, 2, ...: means of each metric, noise that is not shared, so that equal means stay indistinguishable."""
    count = len(next(iter(means.values())))
    return [
        point(
            i + 1,
            {m: at(some[i], spread=spread, seed=10 * i + len(m)) for m, some in means.items()},
            nfe=nfe[i],
            **more,
        )
        for i in range(count)
    ]


def advice(points):
    choices = selection.best_sets(points)
    found = selection.recommend(points, choices)
    return found, selection.format_advice(found, points, choices)


def test_the_frechet_distance_decides_first():
    found, said = advice(points_of({"kid": [3, 2, 1], "frechet": [3, 1, 3], "recall": [0.9, 0.5, 0.1]}))
    assert (found.point, found.by, set(found.costs)) == (found.equal[0], ("frechet",), {"kid", "recall"})
    assert said.startswith(
        "Use scale 2: Frechet distance 1.0000 ± 0.0051, the lowest. It costs kernel distance 1.0000 (2.0000; "
    )
    assert "recall 0.4000 (0.5000; 0.9000 at scale 1)" in said


def test_of_equal_settings_the_cheapest_wins():
    found, said = advice(points_of({"kid": [1.001, 1.0, 1.002, 3]}))
    assert len(found.equal) == 3 and "the cheapest of 3 such settings (20 network evaluations per image)" in said
    assert said.startswith(
        "Use scale 1: kernel distance 1.0010 ± 0.0050, not distinguishable from the lowest (1.0000 at scale 2)"
    )
    found, _ = advice(points_of({"kid": [1.001, 1.0, 1.002, 3]}, nfe=(40,) * 4))
    assert found.point.startswith("scale1.0")  # of equal cost the least guidance


def test_accuracy_decides_among_equal_distances():
    found, said = advice(points_of({"frechet": [1, 1, 1, 2], "accuracy": [0.3, 0.9, 0.9, 1.0]}, spread=0.2))
    assert found.by == ("frechet", "accuracy") and found.point.startswith("scale2.0")
    assert "; accuracy 0.900, not distinguishable from the highest of those; the cheapest of 2" in said


def test_indistinguishable_settings_are_said_to_be():
    found, said = advice(points_of({"kid": [1, 1, 1], "recall": [0.5, 0.5, 0.5]}, spread=1))
    assert found.point.startswith("scale1.0")
    assert "the cheapest of all 3 settings" in said and "this many images do not distinguish" in said
    assert said.endswith("No other metric is distinguishably better elsewhere.")


def test_the_largest_scale_asks_for_more():
    assert advice(points_of({"kid": [3, 2, 1]}))[1].endswith("It is the largest scale of this sweep: sweep further.")


def test_one_point_gets_no_advice():
    points = points_of({"kid": [1]})
    assert selection.recommend(points, selection.best_sets(points)) is None


def test_reports_begin_with_the_advice(tmp_path):
    report = SweepReport(SWEEP, measured_points(), ())
    (tmp_path / "sweep.json").write_bytes(report.json())
    [use, *looks] = summary([tmp_path / "sweep.json"])
    assert use.startswith("Use scale 1.5: kernel distance 0.0100 ± 0.0097, the lowest") and len(looks) == 1
    assert report.page([]).decode().splitlines()[2] == use
    (tmp_path / "sweep.json").write_bytes(SweepReport(SWEEP, measured_points([2]), ()).json())
    assert summary([tmp_path / "sweep.json"])[0].startswith("There is one point")


@pytest.mark.parametrize(
    ("fidelity", "diversity", "style"), [("precision", "recall", "steps-pre"), ("recall", "kid", "steps-post")]
)
def test_the_front_is_drawn_as_steps(fidelity, diversity, style):
    ax = sweep_plots.tradeoff(measured_points(), fidelity, diversity).subfigs[0].axes[0]
    front = ax.lines[0]
    assert front.get_drawstyle() == style and list(front.get_xdata()) == sorted(front.get_xdata())
    assert ax.containers and all(c.has_xerr and c.has_yerr for c in ax.containers)
