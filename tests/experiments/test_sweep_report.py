"""The report of a sweep: its files and sentences, for ordinary and unusual points."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image
from test_selection import point, scores_of

from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation import report as evaluation_report
from diffusion_adagn.evaluation.metrics import METRICS
from diffusion_adagn.experiments import sweep_plots, sweep_results, sweep_sections
from diffusion_adagn.experiments.selection import best_sets
from diffusion_adagn.experiments.sweep_report import IMAGES, Sweep, SweepReport, write_report
from diffusion_adagn.render.report import Table

DRAWN = [name for name in IMAGES if name != "heat_map"]  # where one setting varies
NAMES = ("cat", "dog, $5|`x`\n<b>", "a name that goes on and on, " * 9, "\udce6rn")
EXTRACTOR = {
    "name": "efficientnet_lite0",
    "hash": "0f1e",
    "resolution": 224,
    "resize": "bicubic",
    "dimension": 1280,
    "is_fid": False,
}
SWEEP = Sweep("runs/a,b", "EMA weights", "abc123", 20_000, 0.999, NAMES, {"scale": [1.0, 1.5, 2.0, 4.0]},
              {"name": "digits", "count": 1797, "fingerprint": "77aa"}, EXTRACTOR, 3, 100, "fp32", 64,
              "adagn sweep runs/a,b --scales 1,1.5,2,4")  # fmt: skip
JUDGE = {"name": "judge", "hash": "1dea", "resolution": 8, "resize": "none", "is_fid": False, "heldout_accuracy": 0.74}


def statistics(scale, colour=True):
    t = list(range(900, -1, -100))
    return {
        "timesteps": t,
        "difference": None if scale == 1 else [None if x > 700 else 0.1 * scale for x in t],
        "clipped": [0.01 * scale] * len(t),
        "brightness": 0.5, "contrast": 0.2, "saturation": 0.1, "extremes": 0.01,
        "contrast_ratio": 0.9 + 0.1 * scale, "saturation_ratio": 1.0 if colour else None, "brightness_shift": -0.01 * scale,
    }  # fmt: skip


def measured_points(scales=(1, 1.5, 2, 4), classes=4, count=100, **more):
    """kid and recall, best at 1.5 and 1, and precision, best at 4; the scores of 100 images."""
    found = []
    for s in scales:
        scores = {
            "kid": scores_of(0.01 + abs(s - 1.5), count),
            "precision": scores_of(0.5 + s / 10, count),
            "recall": scores_of(0.9 - s / 10, count),
        }
        by_class = {"kid": [scores_of(abs(s - 1.5 - c / 2), 25, seed=c) for c in range(classes)]}
        shown = np.full((max(classes, 1), 2, 8, 8, 3), int(40 * s), np.uint8)
        found.append(point(s, scores, by_class, statistics(s), shown, **more))
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    points = measured_points()
    fresh = measured_points(scales=[1.5])[0]
    fresh.row["id"] = "fresh"
    fresh.row["metrics"]["kid"]["value"] += 1
    out = tmp_path_factory.mktemp("sweep") / "new"
    return points, fresh, write_report(SWEEP, points, out, [fresh])


@pytest.fixture
def without_charts(monkeypatch):
    monkeypatch.setattr(sweep_sections, "charts", lambda report: [])


def text_of(files):
    return files[0].read_text(encoding="utf-8")


def tables_of(sweep, points, heading, confirmed=(), **more):
    """The tables below a heading, each {first cells of a row: {head: cell}}."""
    sections = SweepReport(sweep, points, confirmed).report(**more).sections
    parts = [part for section in sections if section.heading == heading for part in section.parts]
    return [{row[0]: dict(zip(t.head, row)) for row in t.rows} for t in parts if isinstance(t, Table)]


def origin_of(sweep, points, **more):
    (table,) = tables_of(sweep, points, "How it was made", **more)
    return {what: row["value"] for what, row in table.items()}


def test_report_writes_exactly_its_files(written):
    _, _, files = written
    images = [f"{name}.{kind}" for name in DRAWN for kind in ("png", "svg") if (name, kind) != ("grid", "svg")]
    assert {f.name for f in files} == {"sweep.md", "sweep.csv", "sweep.json", "report.html", *images}
    assert sorted(f.name for f in files[0].parent.iterdir()) == sorted(f.name for f in files)
    for file in (f for f in files if f.suffix == ".png"):
        with Image.open(file) as image:
            assert image.width == round(11.6 * 130) or file.name == "grid.png"
            assert len(image.convert("RGB").getcolors(1 << 24)) > 4
    page = files[3].read_text(encoding="utf-8")
    assert page.count("data:image/") == len(DRAWN) and not any(word in page for word in ("https:", "<script", "<link"))
    assert "dog, $5|`x` &lt;b&gt;" in page and "0.0100 ± 0.0097" in page


def test_images_that_no_longer_apply_are_removed(tmp_path):
    write_report(SWEEP, measured_points([2.0], classes=1), tmp_path)
    files = write_report(SWEEP, [bare(1), bare(2)], tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in files}
    assert not list(tmp_path.glob("curves.*")) and not list(tmp_path.glob("grid.*"))


def test_table_contains_values_and_provenance(written):
    points, _, files = written
    with open(files[1], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [r["id"] for r in rows] == [p.id for p in points]
    for p, r in zip(points, rows):
        for m in METRICS:
            value, error = p.row["metrics"][m]["value"], p.row["metrics"][m]["standard_error"]
            assert [r[m], r[f"{m}_standard_error"]] == (
                ["", ""] if value is None else [str(float(value)), str(float(error))]
            )
        assert float(r["clipped"]) == pytest.approx(0.01 * p.row["scale"])
        assert (
            r["difference"] == ""
            if p.row["scale"] == 1
            else float(r["difference"]) == pytest.approx(0.1 * p.row["scale"])
        )
        assert (r["extractor"], r["extractor_hash"], r["extractor_resolution"], r["extractor_is_fid"]) == (
            "efficientnet_lite0", "0f1e", "224", "False")  # fmt: skip
        assert (r["reference"], r["reference_count"], r["seed"], r["sampling_precision"], r["source"], r["count"]) == (
            "digits", "1797", "3", "fp32", "runs/a,b", "100")  # fmt: skip
    assert len(rows[0]) == len(files[1].read_text().splitlines()[0].split(","))  # no duplicate column


def test_page_contains_the_results(written):
    points, fresh, files = written
    text = text_of(files)
    assert "# Guidance sweep of runs/a,b" in text and "trained for 20,000 steps, EMA decay 0.999" in text
    assert "What gains precision costs recall, fidelity against diversity: from scale 1 to scale 4" in text
    assert "At scale 4 contrast is 1.30 of the data's: more guidance than the data bears" in text
    (best,) = tables_of(SWEEP, points, "Best by each metric")
    assert list(best["Kernel distance (efficientnet_lite0)"].values())[1:] == [
        "lower", "scale 1.5", "0.0100 ± 0.0097", "none"
    ]  # fmt: skip
    assert "**0.0100 ± 0.0097**" in text and "Luck" not in text
    (again,) = tables_of(SWEEP, points, "With fresh seeds", [fresh])
    assert list(again) == ["Kernel distance (efficientnet_lite0)"]  # scale 1.5 was not chosen by the others
    (missing,) = tables_of(SWEEP, points, "Notes")
    assert missing["Frechet distance (efficientnet_lite0)"] == {
        "metric": "Frechet distance (efficientnet_lite0)", "at": "every point",
        "no value, or with a caution": "no reference was given",
    }  # fmt: skip
    assert "dog, $5\\|\\`x\\` \\<b\\>" in text and "adagn sweep runs/a,b --scales 1,1.5,2,4" in text
    assert all(f"({name}.png)" in text for name in DRAWN)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") >= 3 for line in tables)
    found = json.loads(files[2].read_text(encoding="utf-8"))
    assert found["choices"]["kid"]["best"] == points[1].id and len(found["rows"]) == 4
    assert found["pareto"] == {"precision and recall": [p.id for p in points[::-1]]}
    assert [c["best"] for c in found["class_choices"]["kid"]] == [points[i].id for i in (1, 2, 2, 2)]


def test_order_of_points_changes_nothing(written):
    points, fresh, files = written
    for ordered in (points, points[::-1]):
        again = SweepReport(SWEEP, ordered, [fresh])
        page = again.report()
        assert [page.markdown().encode(), again.csv(), again.json()] == [f.read_bytes() for f in files[:3]]
    grids = [page_images(ordered)["grid"].tobytes() for ordered in (points, points[::-1])]
    assert grids[0] == grids[1]


def page_images(points):
    return {shown.name: shown.drawn for shown in SweepReport(SWEEP, points, ()).report().images if shown.name == "grid"}


def with_(**changes):
    return replace(SWEEP, **changes)


def page_of(sweep, points, confirmed=(), **more):
    return SweepReport(sweep, points, confirmed).report(**more).markdown()


def test_metric_titles_name_their_extractor():
    titles_with = lambda **more: sweep_results._titles(with_(**more))  # noqa: E731
    fid = EXTRACTOR | {"name": "inception", "is_fid": True}
    assert titles_with(extractor=fid)["frechet"] == "FID" and titles_with(extractor=fid)["kid"] == "Kernel distance"
    with_judge = titles_with(classifier=JUDGE)
    assert with_judge["frechet"] == "Frechet distance (efficientnet_lite0)"
    assert (
        with_judge["kid"] == "Kernel distance (efficientnet_lite0)"
        and with_judge["accuracy"] == "Accuracy (classifier)"
    )
    assert with_judge["inception_score"] == "Inception score (efficientnet_lite0)"
    assert titles_with(extractor=JUDGE, classifier=JUDGE)["inception_score"] == "Inception score (classifier)"
    assert (
        titles_with(extractor=EXTRACTOR | {"name": "dinov2"}, classifier=JUDGE)["inception_score"]
        == "Inception score (classifier)"
    )
    own = titles_with(extractor={"name": "mine\n\udce6"}, classifier=JUDGE)
    assert own["inception_score"] == "Inception score" and own["kid"] == "Kernel distance (mine ?)"
    nothing = titles_with(extractor={})
    assert nothing["frechet"] == "Frechet distance" and nothing["accuracy"] == "Accuracy"


def judged(wrong=(10, 20), n=100, **more):
    return [point(s, {"accuracy": [0.0] * w + [1.0] * (n - w), "recall": scores_of(0.5, n, seed=s)}, diagnostics=statistics(s), **more)
            for s, w in zip((1, 2), wrong)]  # fmt: skip


@pytest.mark.usefixtures("without_charts")
def test_page_reports_provenance(tmp_path):
    sweep = with_(classifier=JUDGE, guide_hash="9a9a", k=3, versions={"torch": "2.11"}, date="2026-01-02")
    points = judged()
    points[1].row["guide"] = "runs/b/checkpoints/step-00000100"
    files = write_report(sweep, points, tmp_path)
    made = origin_of(sweep, points)
    assert made["accuracy: class probabilities of"] == "classifier, which gets 74% of held-out images right"
    assert made["hash of the classifier"] == "1dea" and made["hash of the model"] == "abc123"
    assert made["nearest neighbours of recall"] == "3" and (made["versions"], made["date"]) == (
        "torch 2.11",
        "2026-01-02",
    )
    assert (made["guide"], made["hash of the guide"]) == ("runs/b/checkpoints/step-00000100", "9a9a")
    assert (
        made["weights"] == "EMA weights, trained for 20,000 steps, EMA decay 0.999"
        and made["swept: scale"] == "1, 1.5, 2, 4"
    )
    text = text_of(files)
    assert text.count("step-00000100") == 1 and "scale 2 (guide)" in text
    rows = list(csv.DictReader(files[1].open(encoding="utf-8")))
    assert [rows[1][c] for c in ("judge", "judge_hash", "k", "guide_hash")] == ["judge", "1dea", "3", "9a9a"]
    assert rows[1]["guide"] == "runs/b/checkpoints/step-00000100" and rows[0]["guide"] == ""
    found = json.loads(files[2].read_text(encoding="utf-8"))
    assert found["sweep"]["versions"] == {"torch": "2.11"} and found["sweep"]["date"] == "2026-01-02"
    assert found["rows"][1]["guide"] == "runs/b/checkpoints/step-00000100"
    later = SweepReport(replace(sweep, date="2027-01-01", versions={}), points, ()).csv()
    assert later == files[1].read_bytes()
    assert "right on" not in text
    weak = with_(classifier=JUDGE | {"heldout_accuracy": 0.36})
    assert "right on 36% of held-out" in page_of(weak, judged())
    both = origin_of(SWEEP, [p for g in ("runs/b", "runs/c") for p in judged(guide=g, id=g)[1:]])
    assert (both["guide 1"], both["guide 2"]) == ("runs/b", "runs/c")


def test_own_extractor_records_may_lack_fields():
    made = origin_of(with_(extractor={"is_fid": False, "note": "mine"}, classifier={"note": "mine"}), judged())
    assert made["features"] == "an extractor without a name" and "FID" in made
    assert made["accuracy: class probabilities of"] == "the same network"
    assert "features" not in origin_of(with_(extractor={}), judged())


def test_images_of_extractor_size_are_not_resized():
    assert origin_of(SWEEP, judged())["features"] == "efficientnet_lite0 (images resized to 224 px by bicubic)"
    small = with_(extractor=JUDGE | {"resize": "bilinear"}, reference={"image_size": 8})
    assert origin_of(small, judged())["features"] == "classifier (images 8 px as they are)"
    shown = np.zeros((1, 1, 16, 16, 1), np.uint8)
    assert "resized to 8 px by bilinear" in origin_of(small, judged(shown=shown))["features"]


def test_zero_errors_and_few_images_get_cautions():
    text = page_of(with_(classifier=JUDGE), judged((0, 3), n=12))
    assert "± 0 " not in text and "| **1** " in text and "That is not certainty" in text
    assert "12 images per point are too few" in text and "Recall and coverage grow with" in text
    text = page_of(with_(classifier=JUDGE), judged((1, 30)))
    assert "certainty" not in text and "tell little" not in text


def test_points_not_requested_are_counted():
    key = "finished points that were not requested this time"
    assert key not in origin_of(SWEEP, judged())
    assert origin_of(SWEEP, judged(), other_points=6)[key] == "6 in points/"
    assert [origin_of(with_(count=1), judged()[:1])[key] for key in ("points", "images per point")] == ["1", "1"]


def rows_again(points, fresh):
    """(metric, point): what it was, is now, by how much worse, whether best again."""
    sections = SweepReport(SWEEP, points, fresh).report().sections
    (section,) = [s for s in sections if s.heading == "With fresh seeds"]
    rows = {tuple(row[:2]): list(row[2:]) for t in section.parts if isinstance(t, Table) for row in t.rows}
    return rows, [part for part in section.parts if isinstance(part, str)]


def test_fresh_seeds_table_lists_best_sets(written):
    points, _, _ = written
    fresh = measured_points([1, 1.5, 4])
    fresh[1].row["metrics"]["kid"]["value"] += 1  # the best by kid was luck
    rows, sentences = rows_again(points, fresh)
    kid = "Kernel distance (efficientnet_lite0)"
    assert list(rows) == [(kid, "scale 1.5"), ("Precision", "scale 4"), ("Recall", "scale 1")]
    assert rows["Recall", "scale 1"] == ["0.8000 ± 0.0097", "0.8000 ± 0.0097", "+0.0", "yes"]
    assert rows[kid, "scale 1.5"][:2] == ["0.0100 ± 0.0097", "1.0100 ± 0.0097"]
    assert float(rows[kid, "scale 1.5"][2]) == pytest.approx(1 / (0.0097 * 2**0.5), rel=0.01)
    assert rows[kid, "scale 1.5"][3] == "no"
    assert sentences == [
        "The value of the best was luck by Kernel distance.", "With fresh seeds another point is best by Kernel distance."
    ]  # fmt: skip
    assert rows_again(points, points)[1] == ["The best points hold up with fresh seeds."]


def test_unchosen_confirmed_point_is_not_listed(written):
    points, _, _ = written
    none = "None of the points that were measured again was chosen by a metric."
    assert rows_again(points, [points[2]]) == ({}, [none])


def test_class_with_few_images_is_marked():
    text = page_of(SWEEP, measured_points())
    assert "† fewer than 50 images of the class." in text
    (table,) = tables_of(SWEEP, measured_points(), "Best by class")
    assert table["cat"]["best at"] == "scale 1.5" and table["cat"]["value"].endswith(" †")


def bare(scale):
    return point(scale, diagnostics=statistics(scale, colour=False))


def forty():
    return [
        p
        for steps in (10, 20)
        for n in range(1, 6)
        for p in measured_points(classes=32, steps=steps, interval=f"t:0-{n}00")
    ]


@pytest.mark.parametrize(
    ("points", "changes", "says", "figures"),
    [
        (measured_points([2.0], classes=1), {"class_names": ("one",)}, "There is one point", set(DRAWN)),
        (
            [bare(1), bare(2)],
            {"class_names": (), "extractor": {}, "reference": {}},
            "No metric has a value",
            {"diagnostics"},
        ),
        ([point(1)], {"swept": {}, "trained_steps": None, "ema_decay": None}, "cannot be said", set()),
        pytest.param(
            forty(), {"class_names": ()}, "scale 1.5 (20 steps, interval t:0-500)", set(IMAGES), marks=pytest.mark.slow
        ),
    ],
    ids=["one point, one class", "diagnostics only", "nothing", "forty points"],
)
def test_unusual_sweeps_are_reported(tmp_path, points, changes, says, figures):
    files = write_report(Sweep(**(SWEEP.__dict__ | changes)), points, tmp_path)
    assert says in text_of(files) and {f.stem for f in files[4:]} == figures
    assert len(list(csv.DictReader(files[1].open(encoding="utf-8")))) == len(points)
    if len(points) == 40:
        with Image.open(tmp_path / "grid.png") as grid:
            assert grid.width < 25 * 140
        assert "The first 30 of 32 classes" in text_of(files) and "Points that are not shown: 16" in text_of(files)


@pytest.mark.parametrize("setting", ["steps", "interval", "threshold"])
def test_swept_setting_is_on_the_x_axis(setting):
    values = {"steps": [5, 10], "interval": ["none", "t:200-800"], "threshold": [None, 0.995]}[setting]
    points = [p for v in values for p in measured_points([2.0], **{setting: v, "id": str(v)})]
    axes = shown_axes(sweep_plots.curves(points, [setting], best_sets(points, draws=50)))
    assert [ax.get_xlabel() for ax in axes] == [setting] * 3
    assert [ax.get_title(loc="left") for ax in axes] == [
        "Kernel distance\nlower is better", "Precision\nhigher is better", "Recall\nhigher is better"
    ]  # fmt: skip


def shown_axes(figure):
    return [ax for ax in figure.axes if ax.get_visible()]


def test_curves_show_values_errors_and_the_best():
    points = measured_points()
    for ax, metric in zip(
        shown_axes(sweep_plots.curves(points, ["scale"], best_sets(points))), ("kid", "precision", "recall")
    ):
        line, _, (bars,) = ax.containers[0]
        values = [p.row["metrics"][metric] for p in points]
        assert line.get_xdata() == pytest.approx([1, 1.5, 2, 4]) and line.get_ydata() == pytest.approx(
            [v["value"] for v in values]
        )
        assert [np.ptp(s[:, 1]) / 2 for s in bars.get_segments()] == pytest.approx(
            [v["standard_error"] for v in values]
        )
        best = {"kid": 1.5, "precision": 4, "recall": 1}[metric]
        assert [one.get_xdata()[0] for one in ax.lines if one.get_markersize() == 12] == [best]


def test_classes_show_their_values():
    points = measured_points()
    ax = sweep_plots.per_class(points, "kid", ["a", "b"], {}).axes[0]
    expected = [[p.row["per_class"]["kid"][c]["value"] for p in points] for c in range(4)]
    assert np.allclose(ax.images[0].get_array(), expected)
    assert [line.get_xdata()[0] for line in ax.lines] == list(np.argmin(expected, 1))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "class 2", "class 3"]


@pytest.mark.usefixtures("without_charts")
def test_nonfinite_numbers_are_blank(tmp_path):
    points = measured_points()
    points[0].row["metrics"]["kid"]["value"] = float("nan")
    points[0].row["diagnostics"]["contrast_ratio"] = float("inf")
    files = write_report(SWEEP, points, tmp_path)
    row = next(csv.DictReader(files[1].open(encoding="utf-8")))
    assert row["kid"] == row["kid_standard_error"] == row["contrast_ratio"] == ""
    assert json.loads(files[2].read_text(encoding="utf-8"))["rows"][0]["metrics"]["kid"]["value"] is None


def test_report_rejects_missing_and_duplicate_points(tmp_path):
    with pytest.raises(InputError, match="at least one point"):
        write_report(SWEEP, [], tmp_path)
    with pytest.raises(InputError, match="two points of the sweep have the id"):
        write_report(SWEEP, [point(1), point(1)], tmp_path)


def test_panel_without_values_is_skipped():
    titles = [ax.get_title(loc="left") for ax in shown_axes(sweep_plots.diagnostics([bare(1), bare(2)]))]
    assert (
        "Contrast against the data\nratio" in titles
        and "Saturation against the data\nratio" not in titles
        and len(titles) == 5
    )
    axes = {
        ax.get_title(loc="left").split("\n")[0]: ax for ax in shown_axes(sweep_plots.diagnostics(measured_points()))
    }
    assert axes["Contrast against the data"].lines[0].get_ydata() == pytest.approx([1.0, 1.05, 1.1, 1.3])
    assert axes["Saturation against the data"].lines[1].get_ydata() == [1, 1]  # the data
    shown = [line.get_ydata() for line in axes["Clipped values of the predicted image"].lines]
    assert [list(y) for y in shown] == [[0.01 * s] * 10 for s in (1, 1.5, 2, 4)]


def test_equal_lines_are_offset():
    points = [p for i in ("none", "t:0-9") for p in measured_points([2, 4], interval=i)]
    ax = sweep_plots.curves(points, ["scale", "interval"], {}).axes[0]
    one, two = (c.lines[0] for c in ax.containers)
    assert one.get_ydata() == pytest.approx(two.get_ydata()) and one.get_linestyle() != two.get_linestyle()
    apart = two.get_xdata()[0] - one.get_xdata()[0]
    assert 0 < apart < 0.05 and (one.get_xdata()[0] + two.get_xdata()[0]) / 2 == pytest.approx(2)


@pytest.mark.parametrize(("scales", "joined"), [((1, 4), True), ((1,), False)])
def test_legend_contains_the_pareto_front(scales, joined):
    figure = sweep_plots.tradeoff(measured_points(scales), "precision", "recall")
    keys = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    assert any("Pareto" in key for key in keys) is joined


def test_labels_of_the_tradeoff_do_not_lie_on_lines():
    points = [p for i in ("none", "t:0-9", "t:5-9") for p in measured_points([1, 1.5, 2, 2.5, 3, 4], interval=i)]
    ax = sweep_plots.tradeoff(points, "precision", "recall").axes[0]
    ax.figure.draw_without_rendering()
    taken, boxes = sweep_plots._drawn_pixels(ax), [Text.get_window_extent(text) for text in ax.texts]
    assert len(boxes) == 6 and len(taken) > 500  # equal points share a label
    assert not any(box.contains(*xy) for box in boxes for xy in taken)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# ---------------------------------------------------------------------- an evaluation's page


def evaluation(classifier=JUDGE, sampled=30, error=0.0, why=""):
    metric_value = {"value": 1.0, "standard_error": error, "why": why}
    row = {
        "metrics": {"accuracy": metric_value, "recall": metric_value},
        "per_class": {"accuracy": [metric_value, metric_value]},
    }
    titled = {
        m: {"title": t, "better": "higher", **metric_value}
        for m, t in (("accuracy", "Accuracy (classifier)"), ("recall", "Recall"))
    }
    extractor = JUDGE | {"resize": "bilinear", "dimension": 64}
    return {
        "source": "runs/a", "count": 2 * sampled, "against": "digits", "metrics": titled, "per_class": row["per_class"],
        "class_names": ["a", "b"], "class_counts": {"sampled": [sampled] * 2, "reference": None},
        "diagnostics": statistics(1) | {"extremes_shift": -0.01}, "memorisation": None, "model": None, "settings": {}, "k": 5,
        "notes": evaluation_report._cautions(row, 2 * sampled, classifier), "extractor": extractor, "judge": classifier,
        "reference": {"name": "digits", "count": 10, "of": 10, "fingerprint": "77"}, "versions": {}, "date": "", "command": "",
        "pictures": {"height": 8, "width": 8, "channels": 1},
    }  # fmt: skip


def page_of_evaluation(**changes):
    return evaluation_report.report_of(evaluation(**changes))


def test_evaluation_page_contains_cautions():
    report = page_of_evaluation(classifier=JUDGE | {"heldout_accuracy": 0.36})
    text = report.markdown()
    assert "± 0" not in text and "That is not certainty" in text
    assert "60 images are too few" in text and "Recall and coverage grow with" in text
    assert "of held-out real images: 0.36" in text and "its accuracy says little" in text
    assert "64 features of images 8 px as they are" in text and "right on 36.0% of held-out images" in text
    tables = {section.heading: section.parts[0] for section in report.sections}
    assert tables["Each class"].rows[0] == ["a", "30", "1 †"] and "† fewer than 50 sampled images." in text
    assert tables["Looks"].rows[-1] == ["values at 0 or 255", "1.0%", "2.0%"]
    assert tables["Looks"].rows[1] == ["contrast (0 to 1)", "0.200", "x 1.000"]
    text = page_of_evaluation(sampled=80, error=0.1).markdown()
    assert "1 ± 0.1" in text and "certainty" not in text and "†" not in text and "tell little" not in text
    assert "says little" not in text and "of held-out real images: 0.74" in text
    text = page_of_evaluation(classifier=None, sampled=80, error=0.1, why="doubtful").markdown()
    assert "held-out" not in text and "† Accuracy (classifier): doubtful." in text


def test_evaluation_is_written_with_its_sheet(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "neighbours.png")
    evaluation_report.write_report(evaluation() | {"memorisation": {"sentence": "Far from copies."}}, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Far from copies." in page and page.count("data:image/png") == 1
    assert "![sampled images and the nearest real ones](neighbours.png)" in (tmp_path / "evaluation.md").read_text()
    assert Image.open(tmp_path / "neighbours.png").size == (20, 10)
