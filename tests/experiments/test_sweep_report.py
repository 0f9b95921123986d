"""The report of a sweep: its files, whatever the points are like."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from test_choice import at, point

from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation.metrics import METRICS
from diffusion_adagn.experiments import sweep_plots, sweep_report
from diffusion_adagn.experiments.choice import best_sets
from diffusion_adagn.experiments.sweep_report import FIGURES, Reading, Sweep, write_report

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


def looks(scale, colour=True):
    t = list(range(900, -1, -100))
    return {
        "timesteps": t,
        "difference": None if scale == 1 else [None if x > 700 else 0.1 * scale for x in t],
        "clipped": [0.01 * scale] * len(t),
        "brightness": 0.5, "contrast": 0.2, "saturation": 0.1, "extremes": 0.01,
        "contrast_ratio": 0.9 + 0.1 * scale, "saturation_ratio": 1.0 if colour else None, "brightness_shift": -0.01 * scale,
    }  # fmt: skip


def measured_points(scales=(1, 1.5, 2, 4), classes=4, count=100, **more):
    """kid and recall, best at 1.5 and 1, and precision, best at 4; the scores of 100 pictures."""
    found = []
    for s in scales:
        scores = {
            "kid": at(0.01 + abs(s - 1.5), count),
            "precision": at(0.5 + s / 10, count),
            "recall": at(0.9 - s / 10, count),
        }
        by_class = {"kid": [at(abs(s - 1.5 - c / 2), 25, seed=c) for c in range(classes)]}
        shown = np.full((max(classes, 1), 2, 8, 8, 3), int(40 * s), np.uint8)
        found.append(point(s, scores, by_class, looks(s), shown, **more))
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


def test_every_file_is_there_and_nothing_beside(written):
    _, _, files = written
    assert [f.name for f in files] == ["sweep.md", "sweep.csv", "sweep.json", *FIGURES]
    assert sorted(f.name for f in files[0].parent.iterdir()) == sorted(f.name for f in files)
    for file in files[3:]:
        with Image.open(file) as picture:
            assert picture.width == 1280 or file.name == "grid.png"
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 4


def test_the_table_reads_back_to_the_values_and_to_what_made_them(written):
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
    assert len(rows[0]) == len(files[1].read_text().splitlines()[0].split(","))  # no column twice


def test_the_page_says_what_was_found(written):
    points, _, files = written
    text = text_of(files)
    assert "# Guidance sweep of runs/a,b" in text and "trained for 20,000 steps, EMA decay 0.999" in text
    assert "What gains precision costs recall, fidelity against diversity: from scale 1 to scale 4" in text
    assert "At scale 4 contrast is 1.30 of the data's: more guidance than the data bears" in text
    assert "| Kernel distance | lower | scale 1.5 | 0.0100 ± 0.0097 | none |" in text
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
    assert all(f"({name})" in text for name in FIGURES)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") >= 5 for line in tables)
    found = json.loads(files[2].read_text(encoding="utf-8"))
    assert found["choices"]["kid"]["best"] == points[1].id and len(found["rows"]) == 4
    assert found["pareto"] == {"precision and recall": [p.id for p in points[::-1]]}
    assert [c["best"] for c in found["class_choices"]["kid"]] == [points[i].id for i in (1, 2, 2, 2)]


def test_the_order_of_the_points_changes_no_byte(written):
    points, fresh, files = written
    for some in (points, points[::-1]):
        again = Reading(SWEEP, some, [fresh])
        assert [again.page(FIGURES), again.csv(), again.json()] == [f.read_bytes() for f in files[:3]]
    sheets = [Reading(SWEEP, some, ())._sheet().tobytes() for some in (points, points[::-1])]
    assert sheets[0] == sheets[1]


def test_an_fid_is_called_so_only_by_its_own_network():
    assert sweep_report.titles(EXTRACTOR | {"is_fid": True})["frechet"] == "FID"
    assert sweep_report.titles(EXTRACTOR)["frechet"] == "Frechet distance (efficientnet_lite0)"
    assert sweep_report.titles({})["frechet"] == "Frechet distance"


def test_without_matplotlib_the_page_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_plots, "available", lambda: False)
    (tmp_path / "curves.png").write_text("of an earlier report")
    files = write_report(SWEEP, measured_points(), tmp_path)
    assert [f.name for f in files] == ["sweep.md", "sweep.csv", "sweep.json", "grid.png"]
    assert "Plots need matplotlib: pip install 'diffusion-adagn\\[plots\\]'" in text_of(files)
    assert not (tmp_path / "curves.png").exists()


def bare(scale):
    return point(scale, diagnostics=looks(scale, colour=False))


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
        (measured_points([2.0], classes=1), {"class_names": ("one",)}, "There is one point", set(FIGURES)),
        (
            [bare(1), bare(2)],
            {"class_names": (), "extractor": {}, "reference": {}},
            "No metric has a value",
            {"diagnostics.png"},
        ),
        ([point(1)], {"swept": {}, "trained_steps": None, "ema_decay": None}, "cannot be said", set()),
        (forty(), {"class_names": ()}, "scale 1.5 (20 steps, interval t:0-500)", set(FIGURES)),
    ],
    ids=["one point, one class", "diagnostics only", "nothing", "forty points"],
)
def test_odd_sweeps_are_reported_too(tmp_path, points, changes, says, figures):
    files = write_report(Sweep(**(SWEEP.__dict__ | changes)), points, tmp_path)
    assert says in text_of(files) and {f.name for f in files[3:]} == figures
    assert len(list(csv.DictReader(files[1].open(encoding="utf-8")))) == len(points)
    if len(points) == 40:
        with Image.open(tmp_path / "grid.png") as sheet:
            assert sheet.width < 25 * 140
        assert "The first 30 of 32 classes" in text_of(files) and "16 points are not shown" not in text_of(files)


@pytest.mark.parametrize("setting", ["steps", "interval", "threshold"])
def test_what_was_swept_is_on_the_x_axis(setting):
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


def test_numbers_that_json_has_no_word_for_are_blank(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_plots, "available", lambda: False)
    points = measured_points()
    points[0].row["metrics"]["kid"]["value"] = float("nan")
    points[0].row["diagnostics"]["contrast_ratio"] = float("inf")
    files = write_report(SWEEP, points, tmp_path)
    row = next(csv.DictReader(files[1].open(encoding="utf-8")))
    assert row["kid"] == row["kid_standard_error"] == row["contrast_ratio"] == ""
    assert json.loads(files[2].read_text(encoding="utf-8"))["rows"][0]["metrics"]["kid"]["value"] is None


def test_no_point_and_one_id_twice_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one point"):
        write_report(SWEEP, [], tmp_path)
    with pytest.raises(InputError, match="two points of the sweep have the id"):
        write_report(SWEEP, [point(1), point(1)], tmp_path)


def test_a_panel_without_values_says_so():
    axes = sweep_plots.diagnostics([bare(1), bare(2)]).subfigs[0].axes
    empty = [ax.get_title() for ax in axes if any(t.get_text() == "no values" for t in ax.texts)]
    assert empty == ["Saturation against the data"]
