"""The report of a sweep: its files and sentences, for ordinary and unusual points."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_selection import point, scores_of

from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation import report as evaluation_report
from diffusion_adagn.evaluation.metrics import METRICS
from diffusion_adagn.experiments import sweep_plots, sweep_report
from diffusion_adagn.experiments.selection import best_sets
from diffusion_adagn.experiments.sweep_report import FIGURES, Sweep, SweepReport, write_report

DRAWN = [name for name in FIGURES if name != "heat_map.png"]  # where one setting varies
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


def text_of(files):
    return files[0].read_text(encoding="utf-8")


def test_report_writes_exactly_its_files(written):
    _, _, files = written
    assert [f.name for f in files] == ["sweep.md", "sweep.csv", "sweep.json", *DRAWN]
    assert sorted(f.name for f in files[0].parent.iterdir()) == sorted(f.name for f in files)
    for file in files[3:]:
        with Image.open(file) as image:
            assert image.width == 1280 or file.name == "grid.png"
            assert len(image.convert("RGB").getcolors(1 << 24)) > 4


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
    points, _, files = written
    text = text_of(files)
    assert "# Guidance sweep of runs/a,b" in text and "trained for 20,000 steps, EMA decay 0.999" in text
    assert "What gains precision costs recall, fidelity against diversity: from scale 1 to scale 4" in text
    assert "At scale 4 contrast is 1.30 of the data's: more guidance than the data bears" in text
    assert "| Kernel distance (efficientnet\\_lite0) | lower | scale 1.5 | 0.0100 ± 0.0097 | none |" in text
    assert "**0.0100 ± 0.0097**" in text
    assert (
        "Kernel distance was 0.0100 ± 0.0097 where it was chosen and is 1.0100 ± 0.0097 with fresh seeds, worse by"
        in text
    )
    assert "Precision was" not in text  # scale 1.5 was not chosen by it
    assert (
        "no value: no reference was given" in text
        and "Frechet distance (efficientnet\\_lite0)" in text
        and "FID |" not in text
    )
    assert "dog, $5\\|\\`x\\` \\<b\\>" in text and "adagn sweep runs/a,b --scales 1,1.5,2,4" in text
    assert all(f"({name})" in text for name in DRAWN)
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
        assert [again.page(DRAWN), again.csv(), again.json()] == [f.read_bytes() for f in files[:3]]
    grids = [SweepReport(SWEEP, ordered, ())._grid().tobytes() for ordered in (points, points[::-1])]
    assert grids[0] == grids[1]


def with_(**changes):
    return replace(SWEEP, **changes)


def page_of(sweep, points, confirmed=(), **more):
    return SweepReport(sweep, points, confirmed).page([], **more).decode()


def test_metric_titles_name_their_extractor():
    titles_with = lambda **more: sweep_report._titles(with_(**more))  # noqa: E731
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


def test_page_reports_provenance(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_plots, "available", lambda: False)
    sweep = with_(classifier=JUDGE, guide_hash="9a9a", k=3, versions={"torch": "2.11"}, date="2026-01-02")
    points = judged()
    points[1].row["guide"] = "runs/b/checkpoints/step-00000100"
    files = write_report(sweep, points, tmp_path)
    text = text_of(files)
    assert (
        "Accuracy is by the class probabilities of judge, hash `1dea`: the classifier gets 74% of held-out images right."
        in text
    )
    assert "- Recall: k = 3 nearest neighbours." in text and "- Made with torch 2.11 on 2026-01-02." in text
    assert "Guide: `runs/b/checkpoints/step-00000100`, hash `9a9a`." in text
    assert text.count("step-00000100") == 1 and "scale 2 (guide)" in text
    rows = list(csv.DictReader(files[1].open(encoding="utf-8")))
    assert [rows[1][c] for c in ("judge", "judge_hash", "k", "guide_hash")] == ["judge", "1dea", "3", "9a9a"]
    assert rows[1]["guide"] == "runs/b/checkpoints/step-00000100" and rows[0]["guide"] == ""
    found = json.loads(files[2].read_text(encoding="utf-8"))
    assert found["sweep"]["versions"] == {"torch": "2.11"} and found["sweep"]["date"] == "2026-01-02"
    assert found["rows"][1]["guide"] == "runs/b/checkpoints/step-00000100"
    later = SweepReport(replace(sweep, date="2027-01-01", versions={}), points, ()).csv()
    assert later == files[1].read_bytes()
    assert "right on" not in text and "right on 36% of held-out" in page_of(
        with_(classifier=JUDGE | {"heldout_accuracy": 0.36}), judged()
    )
    both = [p for g in ("runs/b", "runs/c") for p in judged(guide=g, id=g)[1:]]
    assert "Guide 1: `runs/b` and guide 2: `runs/c`" in page_of(SWEEP, both) and "scale 2" in page_of(SWEEP, both)


def test_own_extractor_records_may_lack_fields():
    text = page_of(with_(extractor={"is_fid": False, "note": "mine"}, classifier={"note": "mine"}), judged())
    assert "Features: an extractor without a name. It is not" in text
    assert "class probabilities of the same network." in text and "()" not in text
    assert "Features:" not in page_of(with_(extractor={}), judged())


def test_images_of_extractor_size_are_not_resized():
    assert "efficientnet\\_lite0 (images resized to 224 px by bicubic)" in page_of(SWEEP, judged())
    small = with_(extractor=JUDGE | {"resize": "bilinear"}, reference={"image_size": 8})
    assert "Features: judge (images 8 px as they are)" in page_of(small, judged())
    shown = np.zeros((1, 1, 16, 16, 1), np.uint8)
    assert "resized to 8 px by bilinear" in page_of(small, judged(shown=shown))


def test_zero_errors_and_few_images_get_cautions():
    text = page_of(with_(classifier=JUDGE), judged((0, 3), n=12))
    assert "± 0 " not in text and "| **1** |" in text and "That is not certainty" in text
    assert "12 images per point are too few" in text and "Recall and coverage grow with" in text
    text = page_of(with_(classifier=JUDGE), judged((1, 30)))
    assert "certainty" not in text and "tell little" not in text


def test_points_not_requested_are_counted():
    assert "in points/" not in page_of(SWEEP, judged())
    assert "- 6 more finished points are in points/, not requested this time." in page_of(
        SWEEP, judged(), other_points=6
    )
    assert "- 1 more finished point is in points/" in page_of(SWEEP, judged(), other_points=1)
    one = page_of(with_(count=1), judged()[:1])
    assert "- 1 point, 1 image each" in one


def test_fresh_seeds_table_lists_best_sets(written):
    points, _, _ = written
    fresh = measured_points([1, 1.5, 4])
    fresh[1].row["metrics"]["kid"]["value"] += 1  # the best by kid was luck
    text = page_of(SWEEP, points, fresh).partition("## With fresh seeds")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| scale")]
    assert rows == [
        "| scale 1 |  |  | **0.8000 ± 0.0097 → 0.8000 ± 0.0097** |",
        "| scale 1.5 | **0.0100 ± 0.0097 → 1.0100 ± 0.0097** |  |  |",
        "| scale 4 |  | **0.9000 ± 0.0097 → 0.9000 ± 0.0097** |  |",
    ]
    assert "Of 3 best values, 1 is worse with fresh seeds by more than 2 standard errors (about one in twenty" in text
    assert "is still in the best set of 2 of 3 metrics; not by kernel distance (now best at scale 1)." in text
    sentences = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(sentences) == 3 and sum("flattered" in line for line in sentences) == 1
    same = page_of(SWEEP, points, points)
    assert "Of 3 best values, none is worse" in same
    assert "The best sets hold up: among the 4 points measured again" in same


def test_unchosen_confirmed_point_is_not_listed(written):
    points, _, _ = written
    text = page_of(SWEEP, points, [points[2]]).partition("## With fresh seeds")[2].partition("\n## ")[0]
    assert text.split() == [
        "None",
        "of",
        "the",
        "points",
        "that",
        "were",
        "measured",
        "again",
        "was",
        "chosen",
        "by",
        "a",
        "metric.",
    ]


def test_class_with_few_images_is_marked():
    text = page_of(SWEEP, measured_points())
    assert "| cat | scale 1.5 |" in text and "† fewer than 50 images of the class." in text
    line = next(line for line in text.splitlines() if line.startswith("| cat | scale"))
    assert line.split(" | ")[2].endswith(" †")


def test_report_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_plots, "available", lambda: False)
    for name in ("curves.png", "tradeoff.png"):
        (tmp_path / name).write_text("of an earlier report")
    files = write_report(SWEEP, measured_points(), tmp_path)
    assert [f.name for f in files] == ["sweep.md", "sweep.csv", "sweep.json", "grid.png"]
    text = text_of(files)
    assert "Plots need matplotlib: `pip install 'diffusion-adagn[plots]'`." in text
    assert "curves.png and tradeoff.png here are of an earlier report" in text
    assert (tmp_path / "curves.png").read_text() == "of an earlier report"
    write_report(SWEEP, [bare(1), bare(2)], tmp_path)  # without metrics there are no curves
    assert not (tmp_path / "curves.png").exists() and not (tmp_path / "grid.png").exists()


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
            {"diagnostics.png"},
        ),
        ([point(1)], {"swept": {}, "trained_steps": None, "ema_decay": None}, "cannot be said", set()),
        pytest.param(
            forty(), {"class_names": ()}, "scale 1.5 (20 steps, interval t:0-500)", set(FIGURES), marks=pytest.mark.slow
        ),
    ],
    ids=["one point, one class", "diagnostics only", "nothing", "forty points"],
)
def test_unusual_sweeps_are_reported(tmp_path, points, changes, says, figures):
    files = write_report(Sweep(**(SWEEP.__dict__ | changes)), points, tmp_path)
    assert says in text_of(files) and {f.name for f in files[3:]} == figures
    assert len(list(csv.DictReader(files[1].open(encoding="utf-8")))) == len(points)
    if len(points) == 40:
        with Image.open(tmp_path / "grid.png") as grid:
            assert grid.width < 25 * 140
        assert "The first 30 of 32 classes" in text_of(files) and "16 points are not shown" not in text_of(files)


@pytest.mark.parametrize("setting", ["steps", "interval", "threshold"])
def test_swept_setting_is_on_the_x_axis(setting):
    values = {"steps": [5, 10], "interval": ["none", "t:200-800"], "threshold": [None, 0.995]}[setting]
    points = [p for v in values for p in measured_points([2.0], **{setting: v, "id": str(v)})]
    figure = sweep_plots.curves(points, [setting], best_sets(points, draws=50))
    axes = figure.subfigs[0].axes
    assert [ax.get_xlabel() for ax in axes if ax.get_visible()] == [setting] * 3
    assert [ax.get_ylabel() for ax in axes if ax.get_visible()] == [
        "lower is better",
        "higher is better",
        "higher is better",
    ]
    assert [ax.get_title() for ax in axes if ax.get_visible()] == ["Kernel distance", "Precision", "Recall"]


def test_nonfinite_numbers_are_blank(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_plots, "available", lambda: False)
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


def titles_of(figure):
    return [ax.get_title() for ax in figure.subfigs[0].axes if ax.get_visible()]


def test_panel_without_values_is_skipped():
    titles = titles_of(sweep_plots.diagnostics([bare(1), bare(2)]))
    assert "Contrast against the data" in titles and "Saturation against the data" not in titles and len(titles) == 5
    assert "Saturation against the data" in titles_of(sweep_plots.diagnostics(measured_points()))


def test_equal_lines_are_offset():
    points = [p for i in ("none", "t:0-9") for p in measured_points([2, 4], interval=i)]
    ax = sweep_plots.curves(points, ["scale", "interval"], {}).subfigs[0].axes[0]
    one, two = (c.lines[0] for c in ax.containers)
    assert one.get_ydata() == pytest.approx(two.get_ydata()) and one.get_linestyle() != two.get_linestyle()
    apart = two.get_xdata()[0] - one.get_xdata()[0]
    assert 0 < apart < 0.05 and (one.get_xdata()[0] + two.get_xdata()[0]) / 2 == pytest.approx(2)


@pytest.mark.parametrize(("scales", "joined"), [((1, 4), True), ((1,), False)])
def test_legend_contains_the_pareto_front(scales, joined):
    figure = sweep_plots.tradeoff(measured_points(scales), "precision", "recall")
    keys = [t.get_text() for legend in figure.subfigs[1].legends for t in legend.get_texts()]
    assert any("Pareto" in key for key in keys) is joined


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


def test_evaluation_page_contains_cautions():
    text = evaluation_report.markdown(evaluation(classifier=JUDGE | {"heldout_accuracy": 0.36}))
    assert "± 0" not in text and "That is not certainty" in text
    assert "60 images are too few" in text and "Recall and coverage grow with" in text
    assert "of held-out real images: 0.36" in text and "its accuracy says little" in text
    assert "64 features of images 8 px as they are" in text and "right on 36.0% of held-out images" in text
    assert "| a     | 30      | 1 †" in text and "† fewer than 50 sampled images." in text
    assert "(2.0% of the real images' are)" in text
    text = evaluation_report.markdown(evaluation(sampled=80, error=0.1))
    assert "1 ± 0.1" in text and "certainty" not in text and "†" not in text and "tell little" not in text
    assert "says little" not in text and "of held-out real images: 0.74" in text
    text = evaluation_report.markdown(evaluation(classifier=None, sampled=80, error=0.1, why="doubtful"))
    assert "held-out" not in text and "† Accuracy (classifier): doubtful." in text
