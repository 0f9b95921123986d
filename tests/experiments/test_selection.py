"""The best point of a sweep, the points that are not distinguishable from it, and the sentences about them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation.metrics import METRICS
from diffusion_adagn.experiments import overguidance, point_results, selection, verdicts
from diffusion_adagn.experiments.point_results import PointResult

SETTINGS = {"schedule": "constant", "rescale": 0.0, "threshold": None, "guide": None, "sampler": "ddim", "steps": 20, "eta": 0.0,
            "spacing": "leading", "interval": "none", "nfe": 40}  # fmt: skip


def point(scale, scores=None, class_scores=None, diagnostics=None, shown=None, **more):
    """A point whose metrics are means of scores, one per image: {metric: [N]}, {metric: [[N_c], ...]}."""
    row = SETTINGS | {"scale": float(scale)} | more
    row.setdefault("id", "_".join(f"{k}{row[k]}" for k in ("scale", "interval", "sampler", "steps")))
    scores = {m: np.asarray(x, float) for m, x in (scores or {}).items()}
    class_scores = {
        m: [None if x is None else np.asarray(x, float) for x in rows] for m, rows in (class_scores or {}).items()
    }
    row |= {
        "count": len(next(iter(scores.values()), [])),
        "metrics": {m: mean_of(scores.get(m)) for m in METRICS},
        "per_class": {m: [mean_of(x) for x in rows] for m, rows in class_scores.items()},
        "diagnostics": diagnostics or {},
    }
    influence = {m: x - x.mean() for m, x in scores.items()}
    by_class = {m: [None if x is None else x - x.mean() for x in rows] for m, rows in class_scores.items()}
    return PointResult(row, influence, by_class, shown)


def mean_of(scores):
    if scores is None:
        return {"value": None, "standard_error": None, "why": "no reference was given"}
    return {
        "value": scores.mean(),
        "standard_error": scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else None,
        "why": "",
    }


def scores_of(mean, n=400, spread=0.1, seed=0):
    """Scores with exactly that mean; the same seed gives the same scores up to a shift."""
    x = np.random.default_rng(seed).normal(0, spread, n)
    return x - x.mean() + mean


# ---------------------------------------------------------------------- the best set


def test_equal_points_differ_in_one_of_twenty_seeds():
    distinguished = 0
    for seed in range(200):
        r = np.random.default_rng(seed)
        points = [point(1, {"kid": r.normal(size=200)}), point(2, {"kid": r.normal(size=200)})]
        distinguished += len(selection.best_set(points, "kid", draws=400).members) == 1
    assert 2 <= distinguished <= 22  # 10 expected; outside less than once in a thousand


def test_best_follows_the_direction_of_the_metric():
    points = [point(s, {"kid": scores_of(s, seed=s), "accuracy": scores_of(s, seed=s)}) for s in (1, 2, 3)]
    low, high = selection.best_set(points, "kid"), selection.best_set(points, "accuracy")
    assert low.members == (low.best,) == (points[0].id,) and high.members == (high.best,) == (points[2].id,)
    assert low.intervals[points[1].id] == pytest.approx((1, 1), abs=0.03) and low.best not in low.intervals
    assert high.intervals[points[1].id] == pytest.approx((-1, -1), abs=0.03)
    assert low.is_decisive and low == selection.best_set(points[::-1], "kid")  # independent of the order, deterministic


def test_interval_has_the_theoretical_width():
    a, b = scores_of(0, 1000, seed=1), scores_of(1, 1000, seed=2)
    low, high = selection.best_set([point(1, {"kid": a}), point(2, {"kid": b})], "kid", draws=4000).intervals[
        point(2).id
    ]
    assert high - low == pytest.approx(2 * 1.96 * (b - a).std() / 1000**0.5, rel=0.05)


def test_shared_noise_distinguishes_smaller_differences():
    same, own = scores_of(0, spread=1.0, seed=0), np.random.default_rng(1).normal(0, 0.02, 400)
    paired = [point(1, {"kid": same}), point(2, {"kid": same + 0.02 + own - own.mean()})]
    error = paired[0].row["metrics"]["kid"]["standard_error"]
    assert 0.5 * error > 0.02  # too small for an unpaired test
    assert selection.best_set(paired, "kid").members == (paired[0].id,)
    unpaired = [paired[0], point(2, {"kid": scores_of(0.02, spread=1.0, seed=7)})]
    assert len(selection.best_set(unpaired, "kid").members) == 2


def test_members_are_sorted_by_value_then_guidance():
    points = [
        point(s, {"kid": scores_of(m, spread=1, seed=s)}) for s, m in ((1, 0.002), (2, 0.001), (3, 0.0), (4, 9.0))
    ]
    assert selection.best_set(points, "kid").members == (points[2].id, points[1].id, points[0].id)
    equal = [point(s, {"kid": scores_of(0)}) for s in (3, 1, 2)]
    assert selection.best_set(equal, "kid").members == (equal[1].id, equal[2].id, equal[0].id)


def hits(wrong, n=100):
    """1 for every correct image, 0 for `wrong` of them."""
    return [0.0] * wrong + [1.0] * (n - wrong)


@pytest.mark.parametrize("offset", [0, 1e-3, 7.3])
def test_one_image_distinguishes_no_points(offset):
    for n in (10, 50, 100, 500):
        for wrong in (1, 2, 3):
            a, b = (np.array(hits(w, n)) + offset for w in (wrong - 1, wrong))
            points = [point(1, {"accuracy": a}), point(2, {"accuracy": b})]
            found = selection.best_set(points, "accuracy")
            assert len(found.members) == 2 and found.intervals[points[1].id][1] == 0, (n, wrong)
    points = [point(1, {"accuracy": hits(0)}), point(2, {"accuracy": hits(8)})]
    assert selection.best_set(points, "accuracy").members == (points[0].id,)  # none of 8 drawn: once in 3,000


def test_one_image_distinguishes_no_class():
    points = [point(s, class_scores={"accuracy": [hits(w, 20)]}) for s, w in ((1, 1), (2, 0), (3, 15))]
    assert selection.class_best_sets(points)["accuracy"][0].members == (points[1].id, points[0].id)


def test_rounding_differences_count_as_equal():
    points = [point(s, {"precision": hits(10)}) for s in (1, 2)]
    points[1].row["metrics"]["precision"]["value"] += 1e-16
    points[0].row["metrics"]["precision"]["value"] -= 1e-15
    found = selection.best_set(points, "precision")
    assert found.members == (points[0].id, points[1].id) and found.intervals[points[1].id] == (0, 0)


def test_points_without_metric_are_skipped():
    a, blank = point(1, {"kid": scores_of(1)}), point(2)
    alone = selection.best_set([a, blank], "kid")
    assert alone.members == (a.id,) and alone.intervals == {} and not alone.is_decisive
    assert selection.best_set([blank], "kid") is None is selection.best_set([], "kid")
    assert selection.best_sets([a, blank]) == {"kid": alone}
    with pytest.raises(InputError, match=r"unequal numbers of images.*--count"):
        selection.best_set([a, point(3, {"kid": scores_of(1, 7)})], "kid")


def test_block_size_changes_nothing(monkeypatch):
    points = [point(s, {"kid": scores_of(s / 100, seed=s)}) for s in (1, 2)]
    whole = selection.best_set(points, "kid", draws=101)
    monkeypatch.setattr(selection, "MAX_BLOCK_COUNTS", 1000)
    assert selection.best_set(points, "kid", draws=101).members == whole.members
    assert sum(len(w) for w in selection._bootstrap_draws(400, 101, 0)) == 101
    assert all((w.sum(1) == 400).all() for w in selection._bootstrap_draws(400, 101, 0))


def test_best_sets_within_classes():
    scores = [scores_of(0, 50), scores_of(1, 50), None]
    shifted = [scores_of(1, 50), scores_of(0, 50), None]
    points = [point(1, class_scores={"accuracy": scores}), point(2, class_scores={"accuracy": shifted})]
    found = selection.class_best_sets(points)
    assert list(found) == ["accuracy"]
    assert [c and c.best for c in found["accuracy"]] == [points[1].id, points[0].id, None]
    assert selection.class_best_sets([point(1)]) == {}


values = st.one_of(st.none(), st.integers(0, 4).map(float))


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(values, values), max_size=12), st.sampled_from(["precision", "kid"]))
def test_pareto_front_matches_its_definition(pairs, fidelity):
    points = [point(i) for i in range(len(pairs))]
    for p, (a, b) in zip(points, pairs):
        p.row["metrics"] |= {fidelity: {"value": a}, "recall": {"value": b}}
    sign = -1 if fidelity == "kid" else 1
    values_of = {p.id: (sign * a, b) for p, (a, b) in zip(points, pairs) if a is not None and b is not None}
    front = {
        i
        for i, (a, b) in values_of.items()
        if not any((c >= a and d > b) or (c > a and d >= b) for c, d in values_of.values())
    }
    found = selection.pareto(points, fidelity, "recall")
    assert set(found) == front and len(found) == len(front)
    assert [values_of[i][0] for i in found] == sorted((values_of[i][0] for i in found), reverse=True)


# ---------------------------------------------------------------------- sentences


def sentence_of(means, seed=0, spread=0.01, **more):
    """The sentence on points with these means, {metric: [one mean per scale]}; scales 1, 2, ..."""
    count = len(next(iter(means.values())))
    points = [
        point(
            s + 1,
            {m: scores_of(values[s], seed=seed, spread=spread) for m, values in means.items() if values[s] is not None},
        )
        for s in range(count)
    ]
    for i, p in enumerate(points):  # different influence shapes, so that equal means are equal only within chance
        for m in p.influence:
            p.influence[m] = p.influence[m] * (1 + 0.5 * i)
    return verdicts.disagreement(selection.best_sets(points), points, **more)


def test_disagreement_names_its_cost():
    text = sentence_of(
        {"kid": [3, 1, 3, 4], "coverage": [0.5, 0.81, 0.7, 0.55], "accuracy": [0.5, 0.6, 0.7, 0.9]}, spread=0.05
    )
    assert text.startswith(
        "No point is in the best set of every metric: kernel distance and coverage are best at scale 2;"
    )
    assert "accuracy is best at scale 4." in text
    assert "What gains accuracy costs coverage, fidelity against diversity: from scale 2 to scale 4" in text
    assert text.endswith("accuracy goes from 0.6000 to 0.9000 and coverage from 0.8100 to 0.5500.")


def test_few_images_do_not_agree():
    points = [point(s, {m: scores_of(abs(s - 2), 40, seed=s) for m in ("kid", "frechet")}) for s in (1, 2, 3)]
    text = verdicts.disagreement(selection.best_sets(points), points)
    assert text == (
        "Frechet distance and kernel distance are best at scale 2; 40 images per point are too few to say that the metrics agree."
    )


def test_shared_point_is_no_disagreement():
    text = sentence_of({"kid": [1, 1.0001, 3], "accuracy": [0.1, 0.9, 0.1]})
    assert "disagree" not in text and "costs" not in text and "No point" not in text
    assert (
        text == "The metrics can be had together: scale 2 is in the best set of each of kernel distance and accuracy."
    )


def test_agreement_and_no_difference_are_reported():
    assert (
        sentence_of({"kid": [3, 1, 3], "accuracy": [0, 1, 0]})
        == "The metrics agree: kernel distance and accuracy are best at scale 2."
    )
    text = sentence_of({"kid": [1, 1.001, 1.002, 7]}, spread=0.1)
    assert text == "Kernel distance is best at scale 1 (1 to 3 cannot be distinguished)."
    text = sentence_of({"kid": [1, 1.001, 7]}, spread=0.1)
    assert text == "Kernel distance is best at scale 1, not distinguished from scale 2."
    assert sentence_of({"kid": [1.0, 1.0, 1.0]}, spread=1).startswith(
        "No points can be distinguished: by kernel distance no point"
    )
    assert sentence_of({"kid": [3, 1, 3], "recall": [0, 0, 0]}, spread=0.5).endswith(
        "Recall distinguishes no point from the best."
    )
    assert "one point" in sentence_of({"kid": [1]}) and "No metric" in sentence_of({"kid": [None, None]})
    assert sentence_of({"frechet": [1, 2]}, titles={"frechet": "FID"}) == "FID is best at scale 1."


def test_tradeoff_names_what_each_metric_counts():
    text = sentence_of({"recall": [0.9, 0.1], "coverage": [0.1, 0.9]})
    assert "What gains coverage costs recall; coverage and recall are both of diversity" in text
    text = sentence_of({"kid": [1, 2], "accuracy": [0.1, 0.9]})
    assert (
        "What gains accuracy costs kernel distance; accuracy counts fidelity alone, kernel distance diversity too"
        in text
    )
    text = sentence_of({"kid": [1, 2], "recall": [0.1, 0.9]})
    assert (
        "What gains kernel distance costs recall; recall counts diversity alone, kernel distance fidelity too" in text
    )


def test_metrics_at_different_points_are_not_compared():
    text = sentence_of({"kid": [2, 1, None, None], "accuracy": [None, None, 0.1, 0.9]})
    assert "whether they agree cannot be said" in text and "No point" not in text and "costs" not in text
    assert "kernel distance is best at scale 2" in text.lower() and "accuracy is best at scale 4" in text


def test_points_are_named_by_what_differs():
    points = [
        point(1, interval="t:200-800"),
        point(1),
        point(2, steps=1),
        point(2, threshold=0.995, guide="runs/small"),
    ]
    settings = point_results.differing(points)
    assert settings[0] == "scale" and {"interval", "steps", "threshold", "guide"} == set(settings[1:])
    assert point_results.format_point(points[0].row, ["scale", "interval"]) == "scale 1 (interval t:200-800)"
    assert point_results.format_point(points[2].row, ["steps", "interval", "eta"]) == "1 step (all timesteps, eta 0)"
    assert point_results.format_point(points[3].row, ["threshold", "guide"]) == "threshold 0.995 (guide runs/small)"
    assert (
        point_results.format_point(points[0].row, ["threshold", "guide", "sampler"])
        == "no threshold (guide null, sampler ddim)"
    )
    assert point_results.format_point(points[0].row, []) == "scale 1"
    assert point_results.format_point(points[0].row | {"guide": "guide"}, ["scale", "guide"]) == "scale 1 (guide)"
    scales = [point(s) for s in (10, 1, 1.5, 2)]
    assert [p.row["scale"] for p in point_results.in_order(scales)] == [1, 1.5, 2, 10]
    assert point_results.format_points([p.id for p in scales[1:]], scales) == "scale 1 to 2"
    assert point_results.format_points([scales[0].id, scales[1].id], scales) == "scale 1 and 10"


def test_fresh_seeds_are_compared():
    before = point(2, {"kid": scores_of(1.0)})
    error = before.row["metrics"]["kid"]["standard_error"]
    worse = point(2, {"kid": scores_of(1 + 5 * error)})
    assert selection.worse_by(before, worse, "kid") == pytest.approx(5 / 2**0.5, rel=1e-6)
    up, down = (point(2, {"accuracy": scores_of(x)}) for x in (1, 0.5))
    assert selection.worse_by(up, down, "accuracy") > 0 > selection.worse_by(down, up, "accuracy")
    assert selection.worse_by(before, point(2), "kid") is None
    single, same = point(2, {"kid": [1.0]}), point(2, {"kid": [1.0, 1.0]})
    assert selection.worse_by(before, point(2, {"kid": scores_of(1 - 5 * error)}), "kid") == pytest.approx(
        -5 / 2**0.5, rel=1e-6
    )
    assert selection.worse_by(same, point(2, {"kid": [2.0, 2.0]}), "kid") == float("inf")
    assert selection.worse_by(single, single, "kid") is None


def statistics(contrast, saturation, extremes, clipped, shift=None):
    values = {"contrast_ratio": contrast, "saturation_ratio": saturation, "extremes": extremes}
    return values | {"clipped": [clipped, clipped]} | ({} if shift is None else {"extremes_shift": shift})


def test_overguidance_is_detected_from_image_statistics():
    values = (
        (1, statistics(1.0, None, 0.02, 0.0)),
        (4, statistics(1.14, None, 0.03, 0.01)),
        (6, statistics(1.31, None, 0.02, 0.09)),
    )
    points = [point(s, diagnostics=d) for s, d in values]
    assert overguidance.overguidance_notes(points) == [
        "At scale 6 contrast is 1.31 of the data's: more guidance than the data bears; scale 4 is the first to stand out.",
        "At scale 6 9% of the predicted images' values lie beyond black and white and are clipped (none at scale 1). That alone is "
        "no fault: data with black or white backgrounds clip too.",
    ]
    assert overguidance.overguidance_notes(points[:1]) == [
        "Nothing stands out in the images: contrast is 1.00 of the data's and none of the predicted images' values are clipped."
    ]
    pale = [point(s, diagnostics=statistics(c, None, 0, 0)) for s, c in ((1, 1), (4, 0.7))]
    assert "contrast is 0.70 of the data's: guidance takes away" in overguidance.overguidance_notes(pale)[0]
    off = [point(s, diagnostics=statistics(1.3, 1.3, 0, 0)) for s in (1, 2)]
    assert overguidance.overguidance_notes(off) == [
        "Already at scale 1 contrast is 1.30 of the data's and saturation is 1.30 of the data's: guidance is not the cause."
    ]
    assert "cannot be said" in overguidance.overguidance_notes([point(1), point(2)])[0]
    two = [
        point(s, diagnostics=statistics(c, None, 0, 0), interval=i)
        for s in (1, 4)
        for i, c in (("none", s), ("t:0-9", 1))
    ]
    (text,) = overguidance.overguidance_notes(two)
    assert text.startswith("At scale 4 (all timesteps) contrast is 4.00 of the data's: more")
    many = [point(s, diagnostics=statistics(s, None, 0, 0), steps=n) for s in (1, 2) for n in range(1, 8)]
    assert (
        len(overguidance.overguidance_notes(many)) == 5
        and overguidance.overguidance_notes(many)[-1] == "3 more stand out at other settings."
    )


def test_clipping_alone_is_no_verdict():
    towards = [
        point(s, diagnostics=statistics(c, None, e, x)) for s, c, e, x in ((1, 0.93, 0.1, 0.18), (4, 0.98, 0.18, 0.4))
    ]
    verdict, fact = overguidance.overguidance_notes(towards)
    assert verdict == "Nothing stands out in the images: contrast is 0.93 to 0.98 of the data's."
    assert fact.startswith(
        "At scale 4 40% of the predicted images' values lie beyond black and white and are clipped (18% at scale 1)"
    )
    assert "and 18% of the finished images' values are at 0 or 255 (10% at scale 1). That alone is no fault" in fact
    as_data = [point(s, diagnostics=statistics(1, None, e, 0, e - 0.5)) for s, e in ((1, 0.4), (4, 0.52))]
    assert (
        "Nothing stands out" in overguidance.overguidance_notes(as_data)[0]
        and len(overguidance.overguidance_notes(as_data)) == 1
    )
    beyond = [point(s, diagnostics=statistics(1, None, e, 0, e - 0.5)) for s, e in ((1, 0.4), (4, 0.62))]
    assert overguidance.overguidance_notes(beyond) == [
        "At scale 4 62% of the values are at 0 or 255 (of the data's 50%): more guidance than the data bears."
    ]


def test_every_group_is_compared_with_scale_1():
    """Scale 1 is one point for all intervals; an interval that begins at 2 is not compared with 2."""
    points = [point(1, diagnostics=statistics(1.0, None, 0, 0))]
    points += [
        point(s, diagnostics=statistics(c, None, 0, 0), interval=i)
        for i in ("none", "t:0-9") for s, c in ((2, 1.2), (3, 1.22))
    ]  # fmt: skip
    notes = overguidance.overguidance_notes(points)
    assert len(notes) == 2 and all("scale 2 is the first to stand out" in line for line in notes)
    assert overguidance.overguidance_notes([p for p in points if p.row["scale"] > 1])[0].startswith(
        "Already at scale 2"
    )


def test_best_at_largest_scale_is_reported():
    choices = {
        "accuracy": selection.BestSet("accuracy", "b", ("b",), {"a": (-0.3, -0.1)}),
        "kid": selection.BestSet("kid", "a", ("a",), {"b": (0.1, 0.3)}),
    }
    points = [point_results.PointResult({"id": i, "scale": s}) for i, s in (("a", 1.0), ("b", 4.0))]
    note = verdicts.at_the_edge(choices, points)
    assert note.startswith("Accuracy is best at the largest scale that was swept, 4")
    assert verdicts.at_the_edge({"kid": choices["kid"]}, points) == ""
    assert verdicts.at_the_edge(choices, points[:1]) == ""
