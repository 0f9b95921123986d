"""The texts that name weights: RUN, RUN@STEP, RUN@*, each with :EMA."""

import pytest

from diffusion_adagn.errors import InputError
from diffusion_adagn.runs.weights import Weights, at_steps


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """runs/a with checkpoints of the steps 100 and 200, and runs/empty without."""
    monkeypatch.chdir(tmp_path)
    for name, steps in (("a", (100, 200)), ("empty", ())):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("")
        for step in steps:
            folder = tmp_path / f"runs/{name}/checkpoints/step-{step:08d}"
            folder.mkdir()
            (folder / "state.json").write_text("{}")
    return tmp_path


AT_200 = "runs/a/checkpoints/step-00000200"


@pytest.mark.parametrize(
    ("text", "path", "ema", "step"),
    [
        ("runs/a", "runs/a", None, None),
        ("runs/a:0.1", "runs/a", 0.1, None),
        ("runs/a:raw", "runs/a", "raw", None),
        ("runs/a@200", AT_200, None, 200),
        ("runs/a@200:run", AT_200, "run", 200),
        (f"{AT_200}:0.05", AT_200, 0.05, 200),
        ("digits", "digits", None, None),
        ("owner/name:0.1", "owner/name", 0.1, None),
        ("digits:train", "digits:train", None, None),  # a part of data
        ("C:\\runs\\a", "C:\\runs\\a", None, None),
    ],
)
def test_text_means_weights(runs, text, path, ema, step):
    weights = Weights.parse(text)
    assert (weights.path, weights.ema, weights.step) == (path, ema, step)
    assert Weights.parse(str(weights)) == weights
    assert weights.run == ("runs/a" if step else path)


def test_existing_path_is_taken_as_it_is(runs):
    (runs / "odd@5:0.1").mkdir()
    assert Weights.parse("odd@5:0.1") == Weights("odd@5:0.1")


def test_star_is_every_checkpoint(runs):
    found = Weights.parse_all("runs/a@*:0.1")
    assert [(w.step, w.ema) for w in found] == [(100, 0.1), (200, 0.1)]
    assert at_steps(Weights("runs/a", "raw"), ["200", "*"]) == [
        Weights(AT_200, "raw"), Weights("runs/a/checkpoints/step-00000100", "raw"),
    ]  # fmt: skip


def test_default_ema_replaces_none_only(runs):
    assert Weights("x").with_ema(0.1).ema == 0.1 and Weights("x", "raw").with_ema(0.1).ema == "raw"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runs/a@*", "means all checkpoints of a run, and one is expected"),
        ("runs/a@300", "no checkpoint of step 300: its checkpoints are of the steps 100, 200"),
        ("runs/empty@1", "no checkpoint of step 1: it has none yet"),
        ("runs/missing@1", "is not a run folder. Runs here: runs/"),
        ("digits@1", "the shipped model digits has no checkpoints"),
        ("runs/a:0.5", "above 0 and at most 0.288"),
        ("runs/a@200:often", "above 0 and at most 0.288"),
    ],
)
def test_wrong_texts_are_rejected(runs, text, words):
    with pytest.raises(InputError) as error:
        Weights.parse(text)
    assert words in str(error.value)
