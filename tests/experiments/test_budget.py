"""adagn sweep --budget: successive halving over images, at equal numbers, within the time; resumed, killed, on two processes."""

import csv
import json
import shutil
import signal

import pytest
from conftest import tiny_unet
from processes import Process, ranks
from test_sweep import KILLED_AT

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.experiments import budget, models, runner, sweep_sections
from diffusion_adagn.experiments.budget import next_count, ranked, rounds_for, survivors_of
from diffusion_adagn.experiments.settings import parse_time

SETTINGS = [
    "--against", "digits", "--data.classes", "0,1,2", "--extractor", "sklearn", "--guidance", "1,1.5,2,3,4,6", "--steps", "3",
    "--batch_size", "4",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _no_figures_and_no_clock():
    """Every network evaluation takes a second, by the prediction; the clock stands still."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sweep_sections, "charts", lambda report: [])
        m.setattr(models, "seconds_per_image", lambda *a: 1.0)
        m.setattr(budget, "clock", lambda: 0.0)
        m.setattr(budget.BudgetSearch, "_slower", lambda self: 1.0)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, labels = tmp_path_factory.mktemp("model") / "pipe", LabelSpace(("0", "1", "2"))
    ClassConditionalPipeline(tiny_unet(), make_scheduler(DiffusionConfig()), labels).save_pretrained(folder)
    return folder


def sweep(model, out, *more):
    return main(["sweep", str(model), "--out", str(out), "--debug", *SETTINGS, *more])


def rows(out):
    return {r["id"]: r for r in csv.DictReader((out / "sweep.csv").read_text(encoding="utf-8").splitlines())}


@pytest.fixture(scope="module")
def halved(model, tmp_path_factory):
    """6 points: an image of each costs 3 + 5 * 6 = 33 s. Of the 12 min 576 s are planned, a half of which gives 8 images; then 576 s for
    4 points."""
    out = tmp_path_factory.mktemp("budget") / "halved"
    assert sweep(model, out, "--budget", "12m", "--count", "60") == 0
    return out


# ---------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), (" 2 h ", 7200)])
def test_times(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["30", "m", "-1m", "0s", "1d", ""])
def test_wrong_times_are_rejected(text):
    with pytest.raises(ValueError, match="expected a time such as 90s, 30m or 2h"):
        parse_time(text)


def test_half_of_the_points_survive():
    counts = [32]
    while survivors_of(counts[-1]) < counts[-1]:
        counts.append(survivors_of(counts[-1]))
    assert counts == [32, 16, 8, 4] and rounds_for(32) == 4
    assert [survivors_of(n) for n in (1, 4, 5, 7, 9)] == [1, 4, 4, 4, 5] and [rounds_for(n) for n in (1, 4, 5, 9)] == [
        1,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("points", [1, 5, 32, 100])
def test_rounds_spend_no_more_than_the_budget(points):
    budget, spent, before, left = 10_000.0, 0.0, 0, points
    costs = [1.0 + i % 3 for i in range(points)]
    while True:
        count = next_count(before, budget - spent, costs[:left], rounds_for(left), 2, 10**6)
        assert count % 2 == 0 and count > before
        spent, before = spent + (count - before) * sum(costs[:left]), count
        if survivors_of(left) == left:
            break
        left = survivors_of(left)
    assert 0.9 * budget < spent <= budget or (points == 100 and spent <= budget)


def test_next_count_is_limited():
    assert next_count(0, 1e9, [1.0], 1, 64, 500) == 500  # the most
    assert next_count(64, 0.0, [1.0], 1, 64, 500) == 128  # at least a batch more


def test_points_without_a_value_rank_last():
    values = {"a": 2.0, "b": None, "c": 1.0}
    assert ranked(values, "kid") == ["c", "a", "b"] and ranked(values, "accuracy") == ["a", "c", "b"]


# ---------------------------------------------------------------------- sweeps


def test_rounds_compare_at_equal_counts(halved):
    first, last = json.loads((halved / "rounds.json").read_text())["rounds"]
    assert (len(first["points"]), first["count"], len(last["points"]), last["count"]) == (6, 8, 4, 32)
    for number, one in enumerate((first, last), start=1):
        found = {p.parent.name: json.loads(p.read_text()) for p in halved.glob(f"rounds/{number}/*/row.json")}
        assert set(found) == set(one["points"]) and {row["count"] for row in found.values()} == {one["count"]}
        values = {name: row["metrics"][one["metric"]]["value"] for name, row in found.items()}
        assert values == one["values"]
    worst = ranked(first["values"], first["metric"])[4:]
    assert (
        first["dropped"] == worst and set(last["points"]) == set(first["points"]) - set(worst) and last["dropped"] == []
    )
    assert not (halved / "batches").exists()


def test_report_is_of_the_last_round(halved):
    assert len(rows(halved)) == 4 and {r["count"] for r in rows(halved).values()} == {"32"}
    page = (halved / "sweep.md").read_text(encoding="utf-8")
    dropped = json.loads((halved / "rounds.json").read_text())["rounds"][0]["dropped"]
    assert (
        "## Rounds" in page
        and "A budget of 12 min." in page
        and all(name.replace("_", "\\_") in page for name in dropped)
    )


@pytest.mark.slow
def test_last_round_equals_a_sweep_of_as_many_images(model, halved, tmp_path):
    assert sweep(model, tmp_path / "s", "--count", "32") == 0
    full = rows(tmp_path / "s")
    for name, row in rows(halved).items():
        assert {k: v for k, v in row.items() if k != "batch_size"} == {
            k: v for k, v in full[name].items() if k != "batch_size"
        }


def test_finished_budget_is_not_sampled_again(model, halved, tmp_path, monkeypatch):
    out = shutil.copytree(halved, tmp_path / "again")
    monkeypatch.setattr(runner, "PointSampler", lambda *a, **k: pytest.fail("sampled again"))
    assert sweep(model, out, "--budget", "12m", "--count", "60") == 0
    for name in ("sweep.csv", "rounds.json"):
        assert (out / name).read_bytes() == (halved / name).read_bytes()


def test_largest_scale_is_that_of_the_sweep(halved):
    scales = [float(r["scale"]) for r in rows(halved).values()]
    sentence = json.loads((halved / "sweep.json").read_text())["advice"]["sentence"]
    assert ("It is the largest scale" in sentence) == (max(scales) == 6 and "Use scale 6" in sentence)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "20m", "--count", "60"], "sweep with other settings .*budget"),
        (
            ["--budget", "12m", "--count", "60", "--guidance", "1,2"],
            "points of a sweep with --budget cannot be changed",
        ),
    ],
)
def test_budget_cannot_be_changed(model, halved, more, message):
    with pytest.raises(InputError, match=message):
        sweep(model, halved, *more)


def test_short_budget_is_rejected_before_sampling(model, tmp_path):
    with pytest.raises(
        InputError, match="a budget of 60 s is too short: a batch of 4 images of each of 6 points takes about 132 s"
    ):
        sweep(model, tmp_path / "s", "--budget", "60s", "--count", "60")
    assert not list((tmp_path / "s").rglob("*.npz"))


PATCHED = """
from diffusion_adagn.experiments import budget, models
models.seconds_per_image = lambda *a: 1.0
budget.clock = lambda: 0.0
budget.BudgetSearch._slower = lambda self: 1.0
"""


@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.parametrize("at", ["5", "16"])  # a batch of round 1, and one of round 2
def test_killed_budget_resumes_to_the_same_table(model, halved, tmp_path, at):
    out = tmp_path / "killed"
    argv = ["sweep", str(model), "--out", str(out), *SETTINGS, "--budget", "12m", "--count", "60"]
    killed = Process(PATCHED + KILLED_AT, [at, *argv], tmp_path / "log")
    assert killed.wait() == -signal.SIGKILL, killed.printed()[-2000:]
    assert (out / "rounds.json").is_file() and not (out / "sweep.csv").exists()
    assert sweep(model, out, "--budget", "12m", "--count", "60") == 0
    for name in ("sweep.csv", "rounds.json"):
        assert (out / name).read_bytes() == (halved / name).read_bytes()


@pytest.mark.serial
@pytest.mark.slow
def test_two_processes_halve_alike(model, halved, tmp_path):
    code = PATCHED + "import sys; from diffusion_adagn.cli.main import main; sys.exit(main(sys.argv[1:]))"
    argv = ["sweep", model, "--out", tmp_path / "two", *SETTINGS, "--budget", "6m", "--count", "60"]  # each does a half
    ranks(2, argv, tmp_path, code)
    one, two = rows(halved), rows(tmp_path / "two")
    assert list(one) == list(two)
    assert all(float(two[name]["kid"]) == pytest.approx(float(row["kid"]), rel=5e-4) for name, row in one.items())
