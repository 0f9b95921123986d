"""Rules and other settings each at their own best point, models ranked, and the heat map of two settings."""

import numpy as np
import pytest
from test_selection import point, scores_of

from diffusion_adagn.errors import InputError
from diffusion_adagn.experiments.comparison import own_best, own_bests, ranking
from diffusion_adagn.experiments.heat_map import axes_of, cells, heat_map
from diffusion_adagn.experiments.selection import best_sets
from diffusion_adagn.experiments.sweep_report import Sweep, SweepReport

# kid by rule and scale: apg needs another scale than cfg, and is the best there
KID = {("cfg", 2): 2.0, ("cfg", 4): 3.0, ("apg", 2): 2.5, ("apg", 4): 1.0, ("tcfg", 2): 2.0001, ("tcfg", 4): 5.0}


def rules():
    found = [point(1, {"kid": scores_of(4.0)}, id="unguided")]
    for (rule, scale), value in KID.items():
        given = {} if rule == "cfg" else {"rule": rule}
        found.append(point(scale, {"kid": scores_of(value)}, id=f"{rule}{scale}", **given))
    return found


def models(swapped):
    """Two runs; guidance swaps them or not."""
    kid = {("a", 1): 2.0, ("b", 1): 3.0, ("a", 2): 1.5, ("b", 2): 1.0 if swapped else 2.0, ("a", 4): 9.0, ("b", 4): 9.0}
    return [point(s, {"kid": scores_of(v)}, id=f"{run}{s}", run=f"runs/{run}") for (run, s), v in kid.items()]


def test_rules_are_compared_at_their_own_best_scale():
    one = own_best(rules(), "rule", "kid")
    assert one.best == {"rule cfg": "cfg2", "rule apg": "apg4", "rule tcfg": "tcfg2"}
    assert one.choice.best == "apg4" and one.choice.members == ("apg4",)
    assert one.sentence({}) == "By kernel distance rule apg is best, distinguishably."


def test_values_are_not_compared_where_nothing_else_varies():
    assert own_bests([p for p in rules() if p.row["scale"] == 2], "kid") == []
    assert [one.setting for one in own_bests(rules(), "kid")] == ["rule"]


def test_equal_bests_are_reported():
    points = [p for p in rules() if p.row.get("rule") != "apg"]
    points[1] = point(2, {"kid": scores_of(2.0, seed=1)}, id="cfg2")
    text = own_best(points, "rule", "kid").sentence({})
    assert text == "By kernel distance no two of them can be distinguished."


@pytest.mark.parametrize("swapped", [False, True])
def test_models_are_ranked_unguided_and_guided(swapped):
    one = ranking(models(swapped), "kid")
    assert one.unguided == {"run runs/a": "a1", "run runs/b": "b1"}
    assert list(one.guided.items()) == sorted([("run runs/a", "a2"), ("run runs/b", "b2")], reverse=swapped)
    assert ("the order changes" if swapped else "the order is the same") in one.sentence({})


def test_one_model_is_not_ranked():
    assert ranking(rules(), "kid") is None
    page = SweepReport(Sweep("a", "w", "h", 1, None, rank=True), rules(), []).report().markdown()
    assert "none are ranked" in page


def test_report_has_both_tables():
    sweep = Sweep("a, b", "w", "h", 1, None, rank=True)
    page = SweepReport(sweep, models(True), []).report().markdown()
    assert "## Each run at its own best" in page and "## Models unguided and at their best guidance" in page
    assert "the order changes" in page


# ---------------------------------------------------------------------- the heat map


def test_cells_have_the_best_point_of_each_pair():
    across, down, found = cells(
        [*rules(), point(2, {"kid": scores_of(1.9)}, id="fewer", steps=10)], ("scale", "rule"), "kid"
    )
    assert across == [1, 2, 4] and down == ["cfg", "apg", "tcfg"]
    assert {at: group[0].id for at, group in found.items()} == {
        (1, "cfg"): "unguided", (1, "apg"): "unguided", (1, "tcfg"): "unguided", (2, "cfg"): "fewer", (4, "cfg"): "cfg4",
        (2, "apg"): "apg2", (4, "apg"): "apg4", (2, "tcfg"): "tcfg2", (4, "tcfg"): "tcfg4",
    }  # fmt: skip
    assert [p.id for p in found[2, "cfg"]] == ["fewer", "cfg2"]


def test_axes_of_the_heat_map():
    assert axes_of(rules()) == ("scale", "rule") and axes_of(rules(), ["rule", "scale"]) == ("rule", "scale")
    assert axes_of([p for p in rules() if p.row.get("rule") is None]) is None
    with pytest.raises(InputError, match="'ema' does not vary; the settings that vary here are scale, rule"):
        axes_of(rules(), ["scale", "ema"])


def test_best_set_is_outlined():
    figure = heat_map(rules(), ("scale", "rule"), best_sets(rules()), {"kid": "Kernel distance (x)"})
    (ax, *_) = figure.axes
    assert [(p.get_x(), p.get_y(), p.get_linewidth()) for p in ax.patches] == [(1.54, 0.54, 3)]  # scale 4, apg
    assert np.allclose(ax.images[0].get_array(), [[4, 2, 3], [4, 2.5, 1], [4, 2.0001, 5]])
    assert ax.get_title(loc="left") == "Kernel distance (x) (lower is better)"
