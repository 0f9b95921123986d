import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, one_line, tiny_unet
from PIL import Image

from diffusion_adagn import ClassConditionalPipeline, InputError, LabelSpace
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import DataConfig, DiffusionConfig
from diffusion_adagn.data import open_dataset
from diffusion_adagn.data.npz import read_npz, write_npz
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.evaluation import points
from diffusion_adagn.evaluation.features import FeatureSet
from diffusion_adagn.evaluation.metrics import METRICS
from diffusion_adagn.evaluation.report import titles

NAMES = ("cat", "dog", "owl")


class Quarters:
    """The means of an image's four quarters."""

    name, hash, dimension, resolution, resize = "quarters", "0" * 16, 4, 8, "none"
    class_names, is_fid = None, False

    def __call__(self, pixels):
        n, h, w, _ = pixels.shape
        quarters = pixels.reshape(n, 2, h // 2, 2, w // 2, -1).mean((2, 4, 5)).reshape(n, 4)
        return FeatureSet((quarters / 255).astype(np.float32))

    def to_dict(self):
        return {}


class Rows(Quarters):
    """Its means of eight rows."""

    name, hash, dimension = "rows", "1" * 16, 8

    def __call__(self, pixels):
        return FeatureSet((pixels.mean((2, 3)) / 255).astype(np.float32))


class Fid(Quarters):
    name, hash, is_fid = "inception", "2" * 16, True


quarters, rows, fid = Quarters(), Rows(), Fid()
CHEAP = ["--extractor", f"{__name__}:quarters", "--judge", "none"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline folder with an untrained network whose classes differ."""
    folder = tmp_path_factory.mktemp("model") / "pipe"
    ClassConditionalPipeline(tiny_unet(), make_scheduler(DiffusionConfig()), LabelSpace(NAMES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders, 20 gray images a class."""
    root, rng = tmp_path_factory.mktemp("data") / "animals", np.random.RandomState(0)
    for c, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        for i in range(20):
            save(root / name / f"{i}.png", rng.randint(0, 200 + 25 * c, (8, 8), dtype=np.uint8))
    return root


@pytest.fixture
def real(tmp_path, data):
    """The same images in one folder."""
    images = [(p, tmp_path / "real" / f"{p.parent.name}-{p.name}") for p in sorted(data.rglob("*.png"))]
    (tmp_path / "real").mkdir()
    for old, new in images:
        new.write_bytes(old.read_bytes())
    return tmp_path / "real"


def save(file, array):
    Image.fromarray(array).save(file)


def evaluate(what, out, *argv, debug=True):
    return main(["evaluate", str(what), "--out", str(out), *map(str, argv), *["--debug"] * debug])


def record(out):
    return json.loads((out / "evaluation.json").read_text())


def values(out):
    return {name: m["value"] for name, m in record(out)["metrics"].items()}


def said(capsys):
    return one_line(capsys.readouterr().err)


def test_what_is_written_of_a_model(model, data, tmp_path, capsys):
    argv = ["--against", data, *CHEAP, "--count", 24, "--steps", 3, "--seed", 5, "--guidance", 2]
    assert evaluate(model, tmp_path / "e", *argv, "--keep", "--interval", "0.2-0.8") == 0
    files = {p.name for p in (tmp_path / "e").iterdir()}
    assert files == {
        "evaluation.json",
        "evaluation.md",
        "report.html",
        "per_class.csv",
        "neighbours.png",
        "samples.npz",
    }
    found = record(tmp_path / "e")
    assert found["metrics"]["frechet"]["title"] == f"{METRICS['frechet'].title} (quarters)"
    for name in ("frechet", "kid", "precision", "recall", "density", "coverage"):
        assert found["metrics"][name]["value"] is not None, name
        assert found["metrics"][name]["standard_error"] is not None, name
    for name in ("inception_score", "accuracy"):
        assert found["metrics"][name]["value"] is None and found["metrics"][name]["why"]
    settings = found["settings"]
    assert (settings["scale"], settings["interval"], settings["sampler"], settings["steps"]) == (
        2,
        "0.2-0.8",
        "ddim",
        3,
    )
    assert (settings["seeds"], settings["network_evaluations"], settings["classes"]) == ([5, 28], 5, list(NAMES))
    assert len(found["model"]["hash"]) == 16 and "weights of" in found["model"]["weights"]
    assert found["reference"]["name"] == f"{data}:train" and found["reference"]["count"] == 57  # 3 are held out
    assert found["reference"]["fingerprint"] and found["extractor"]["hash"] == "0" * 16
    assert found["count"] == 24 and found["pictures"] == {"height": 8, "width": 8, "channels": 1}
    assert found["command"].startswith("adagn evaluate ") and found["versions"]["torch"] and found["date"]
    assert any("not comparable with published" in note for note in found["notes"])
    assert len(found["diagnostics"]["difference"]) == 3
    table = list(csv.DictReader((tmp_path / "e/per_class.csv").open(encoding="utf-8")))
    assert [row["class_name"] for row in table] == list(NAMES)
    assert [row["sampled"] for row in table] == ["8"] * 3
    assert float(table[1]["kid"]) == found["per_class"]["kid"][1]["value"]
    cached = read_npz(tmp_path / "e/samples.npz")
    assert cached.labels.tolist() == [0, 1, 2] * 8
    assert Image.open(tmp_path / "e/neighbours.png").height > 8 * 64
    printed, text = capsys.readouterr().out, (tmp_path / "e/evaluation.md").read_text()
    assert "adagn sweep" in printed and str(tmp_path / "e/report.html") in printed
    for line in ("Kernel distance (quarters)", "lower", "## Each class", "## Copies"):
        assert line in text


@pytest.mark.parametrize("form", ["folder", "npz"])
def test_images_measure_like_their_model(model, data, tmp_path, form):
    common = ["--classes", "dog", "--count", "30", "--steps", "3", "--seed", "7", "--guidance", "2"]
    against = ["--against", data, *CHEAP]
    assert evaluate(model, tmp_path / "model", *common, *against) == 0
    same = ["--memory_format", "contiguous"]  # as evaluate does: another may change a pixel by one level
    assert main(["sample", str(model), "--out", str(tmp_path / "s"), *common, *same, "--npz", "--debug"]) == 0
    images = tmp_path / "s" if form == "folder" else tmp_path / "s/samples.npz"
    assert evaluate(images, tmp_path / "images_only", *against, "--data.channels", 1) == 0
    assert values(tmp_path / "images_only") == values(tmp_path / "model")
    one, two = record(tmp_path / "model"), record(tmp_path / "images_only")
    assert one["per_class"] == two["per_class"] and one["memorisation"] == two["memorisation"]
    if form == "folder":
        assert two["settings"]["seeds"] == [7, 36] and two["model"]["hash"] == one["model"]["hash"]
    else:
        assert any("written as colour" in note for note in two["notes"])


def test_real_digits_with_class_accuracy(tmp_path):
    unet = tiny_unet(num_classes=10)
    labels = LabelSpace(tuple(map(str, range(10))))
    ClassConditionalPipeline(unet, make_scheduler(DiffusionConfig()), labels).save_pretrained(tmp_path / "model")
    argv = ["--against", "digits", "--extractor", "sklearn", "--steps", 2, "--count", 20, "--reference_count", 200]
    assert evaluate(tmp_path / "model", tmp_path / "e", *argv) == 0
    found = record(tmp_path / "e")
    assert 0 <= found["metrics"]["accuracy"]["value"] <= 1
    assert found["metrics"]["accuracy"]["title"] == "Accuracy (sklearn)"
    assert (found["reference"]["count"], found["reference"]["of"]) == (200, 1707)
    assert (
        found["metrics"]["frechet"]["value"] is None
        and "20 images for 64 features" in found["metrics"]["frechet"]["why"]
    )
    assert found["metrics"]["kid"]["value"] is not None
    assert "200 images drawn from 1,707" in found["memorisation"]["sentence"]
    # real digits are of their classes, and nearer to real ones
    file = tmp_path / "digits.npz"
    assert main(["evaluate", "reference", "digits", "--extractor", "sklearn", "--out", str(file)]) == 0
    pixels, ids = open_dataset(DataConfig("digits:heldout")).gather(range(90))
    write_npz(tmp_path / "heldout.npz", pixels, ids)
    argv = ["--against", file, "--extractor", "sklearn"]
    assert evaluate(tmp_path / "heldout.npz", tmp_path / "e3", *argv) == 0
    good = record(tmp_path / "e3")
    assert good["metrics"]["accuracy"]["value"] > 0.9
    assert good["metrics"]["kid"]["value"] < found["metrics"]["kid"]["value"]
    assert good["reference"]["count"] == 1707 and (tmp_path / "e3/neighbours.png").is_file()


def test_a_model_without_classes(data, tmp_path):
    unet = tiny_unet(num_classes=None)
    ClassConditionalPipeline(unet, make_scheduler(DiffusionConfig()), LabelSpace(())).save_pretrained(tmp_path / "m")
    argv = ["--against", data, "--extractor", f"{__name__}:quarters", "--count", 12, "--steps", 2, "--keep"]
    assert evaluate(tmp_path / "m", tmp_path / "e", *argv) == 0
    found = record(tmp_path / "e")
    assert found["metrics"]["kid"]["value"] is not None and found["metrics"]["accuracy"]["value"] is None
    assert found["per_class"] == {} and not (tmp_path / "e/per_class.csv").exists()
    assert read_npz(tmp_path / "e/samples.npz").labels is None


def test_metric_titles_name_the_network():
    ours, classifier, theirs = ({"name": n, "is_fid": n == "inception"} for n in ("quarters", "judge", "inception"))
    reported = titles(ours, classifier, classifier)
    assert reported["frechet"].endswith("distance (quarters)") and reported["kid"].endswith("(quarters)")
    assert (reported["inception_score"], reported["accuracy"]) == (
        "Inception score (classifier)",
        "Accuracy (classifier)",
    )
    reported = titles(theirs, classifier, theirs)
    assert (reported["frechet"], reported["inception_score"]) == ("FID", "Inception score")
    assert titles(theirs, None, None)["accuracy"] == "Accuracy"


def test_copies_are_said_outright(data, real, tmp_path):
    assert evaluate(real, tmp_path / "e", "--against", data, "--data.channels", 1, *CHEAP) == 0
    found = record(tmp_path / "e")["memorisation"]
    assert len(found["copies"]) == 57  # all that are not held out
    assert "57 sampled images equal a real one in every pixel" in found["sentence"]
    assert "much nearer to real ones" in found["sentence"]
    assert found["nearest"][0]["distances"][0] == 0
    assert found["median_distance_real"] > 0 == found["median_distance_sampled"]


def test_one_of_several_scales_is_chosen(model, data, tmp_path, capsys):
    sample = ["--count", "4", "--steps", "2", "--guidance", "1,2", "--classes", "cat"]
    assert main(["sample", str(model), "--out", str(tmp_path / "s"), *sample]) == 0
    argv = ["--against", data, "--data.channels", 1, *CHEAP]
    assert evaluate(tmp_path / "s", tmp_path / "e", *argv, debug=False) == 1
    assert "guidance scales 1, 2: choose one" in said(capsys)
    assert evaluate(tmp_path / "s", tmp_path / "e", *argv, "--guidance", 3, debug=False) == 1
    assert "it has 1, 2" in said(capsys)
    assert evaluate(tmp_path / "s", tmp_path / "e", *argv, "--guidance", 2) == 0
    assert record(tmp_path / "e")["settings"]["guidance"] == 2


def test_empty_class_folder_is_measured(data, tmp_path):
    for name in ("owl", "cat"):
        (tmp_path / "s" / name).mkdir(parents=True)
        for i in range(6):
            save(tmp_path / "s" / name / f"{i}.png", np.asarray(Image.open(data / name / f"{i}.png")))
    assert evaluate(tmp_path / "s", tmp_path / "e", "--against", data, "--data.channels", 1, *CHEAP) == 0
    found = record(tmp_path / "e")
    assert found["class_names"] == list(NAMES) and found["class_counts"]["sampled"] == [6, 0, 6]
    assert [m["value"] is None for m in found["per_class"]["kid"]] == [False, True, False]
    assert "no image of the class dog" in found["per_class"]["kid"][1]["why"]
    assert any("dog (0)" in note for note in found["notes"])


def test_stopped_evaluation_resumes_same_settings(model, data, tmp_path, capsys, monkeypatch):
    argv = ["--against", data, *CHEAP, "--count", 12, "--steps", 2, "--batch_size", 4]
    assert evaluate(model, tmp_path / "whole", *argv) == 0
    batch, made = points.PointSampler._batch, []

    def stops(*args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args)
        return batch(*args)

    monkeypatch.setattr(points.PointSampler, "_batch", stops)
    assert evaluate(model, tmp_path / "e", *argv, debug=False) == 130
    assert {p.name for p in (tmp_path / "e").iterdir()} == {"batches"}
    assert "Stopped" in capsys.readouterr().out
    made[:] = made[:1]  # one more may be made
    assert evaluate(model, tmp_path / "e", *argv) == 0
    assert "going on with 2 finished batches" in capsys.readouterr().out
    assert values(tmp_path / "e") == values(tmp_path / "whole")
    assert not (tmp_path / "e/batches").exists()
    made.clear()
    assert evaluate(model, tmp_path / "e2", *argv, debug=False) == 130
    monkeypatch.setattr(points.PointSampler, "_batch", batch)
    assert evaluate(model, tmp_path / "e2", *argv, "--guidance", 2) == 0
    assert "going on" not in capsys.readouterr().out
    assert values(tmp_path / "e2") != values(tmp_path / "whole")


def test_finished_evaluation_is_shown_again(model, data, tmp_path, capsys, monkeypatch):
    out, argv = tmp_path / "e", ["--against", data, *CHEAP, "--count", 12, "--steps", 2]
    assert evaluate(model, out, *argv) == 0
    first, made = (out / "evaluation.json").read_text(), []
    capsys.readouterr()
    monkeypatch.setattr(points.PointSampler, "_batch", lambda *args: made.append(args))
    assert evaluate(model, out, *argv) == 0
    text = capsys.readouterr().out
    assert "holds this evaluation already" in text and "Accuracy" in text and not made
    assert (out / "evaluation.json").read_text() == first
    monkeypatch.undo()
    assert evaluate(model, out, *argv, "--seed", 5, debug=False) == 1
    assert "--overwrite" in said(capsys)
    assert evaluate(model, out, *argv, "--seed", 5, "--overwrite") == 0
    assert (out / "evaluation.json").read_text() != first


def test_evaluation_overwrites_only_if_asked(real, data, tmp_path, capsys):
    out, argv = tmp_path / "e", ["--against", data, "--data.channels", 1, *CHEAP]
    assert evaluate(real, out, *argv) == 0
    first = (out / "evaluation.json").read_text()
    assert evaluate(real, out, *argv, debug=False) == 1
    assert "--overwrite" in said(capsys)
    assert (out / "evaluation.json").read_text() == first
    (out / "notes.txt").write_text("mine")
    assert evaluate(real, out, *argv, "--overwrite", "--neighbours", 0) == 0
    assert not (out / "neighbours.png").exists() and record(out)["memorisation"] is None
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x").write_text("")
    assert evaluate(real, tmp_path / "other", *argv, "--overwrite", debug=False) == 1
    assert "not an evaluation" in said(capsys)


def test_published_statistics_serve_the_fid_alone(model, tmp_path, monkeypatch):
    # a stand-in for torch-fidelity's network: an extractor of one's own may not say that it is the FID's
    monkeypatch.setattr("diffusion_adagn.evaluation.setup.open_extractor", lambda *a, **k: fid)
    np.savez(tmp_path / "r.npz", mu=np.full(4, 0.5), sigma=np.eye(4))
    argv = ["--against", tmp_path / "r.npz", "--extractor", "inception", "--judge", "none"]
    assert evaluate(model, tmp_path / "e", *argv, "--count", 6, "--steps", 2) == 0
    found = record(tmp_path / "e")
    assert found["metrics"]["frechet"]["title"] == "FID" and found["metrics"]["frechet"]["value"] > 0
    assert all(found["metrics"][name]["value"] is None for name in ("kid", "precision", "coverage"))
    assert not any("not comparable" in note for note in found["notes"])
    assert any("50,000" in note for note in found["notes"])
    assert not (tmp_path / "e/neighbours.png").exists()


def test_few_images_give_no_frechet(real, tmp_path):
    for count in (6, 1):
        some = tmp_path / str(count)
        some.mkdir()
        for file in sorted(real.iterdir())[:count]:
            (some / file.name).write_bytes(file.read_bytes())
        argv = ["--against", real, "--extractor", f"{__name__}:rows", "--judge", "none"]
        assert evaluate(some, tmp_path / f"e{count}", *argv) == 0
    found = record(tmp_path / "e6")["metrics"]
    assert found["frechet"]["value"] is None and "6 images for 8 features" in found["frechet"]["why"]
    assert found["kid"]["value"] is not None
    one = record(tmp_path / "e1")
    assert all(m["value"] is None and m["why"] for m in one["metrics"].values())
    assert "1 sampled image equals a real one" in one["memorisation"]["sentence"]
    assert evaluate(tmp_path / "6", tmp_path / "against1", "--against", tmp_path / "1", *CHEAP) == 0
    assert record(tmp_path / "against1")["memorisation"]["median_distance_real"] is None


def spoil(what, real, tmp_path):
    """Images (or a reference) with one thing wrong: (what is evaluated, its --against, more options)."""
    first = sorted(real.iterdir())[0]
    array = np.asarray(Image.open(first))
    bad = tmp_path / "bad"
    bad.mkdir()
    save(bad / "a.png", array)
    if what == "size":
        save(bad / "a.png", np.zeros((16, 16), np.uint8))
    elif what == "oblong":
        save(bad / "a.png", np.zeros((8, 16), np.uint8))
    elif what == "sizes":
        save(bad / "b.png", np.zeros((16, 16), np.uint8))
    elif what == "channels":
        save(bad / "a.png", np.random.RandomState(0).randint(0, 255, (8, 8, 3), dtype=np.uint8))
    elif what == "empty":
        (bad / "a.png").unlink()
    elif what == "broken":
        (bad / "b.png").write_bytes(first.read_bytes()[:60])
    elif what == "mixed":
        (bad / "cat").mkdir()
        save(bad / "cat/b.png", array)
    return bad


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("size", "16x16 pixels, the real ones"),
        ("size", "--data.image_size 16"),
        ("oblong", "16x8 pixels"),
        ("sizes", "b.png is 16x16"),
        ("channels", "3 channels (colour)"),
        ("channels", "--data.channels 3"),
        ("empty", "holds no image"),
        ("broken", "broken image"),
        ("broken", "b.png"),
        ("mixed", "images and folders of images (cat)"),
    ],
)
def test_unmeasurable_images_are_rejected(real, tmp_path, capsys, what, message):
    bad = spoil(what, real, tmp_path)
    assert evaluate(bad, tmp_path / "e", "--against", real, *CHEAP, debug=False) == 1
    assert message in said(capsys)
    assert not (tmp_path / "e").exists()


def test_wrong_labels_and_classes_are_rejected(data, real, tmp_path, capsys):
    pixels = np.stack([np.asarray(Image.open(f))[..., None] for f in sorted(real.iterdir())[:5]])
    argv = ["--against", data, "--data.channels", 1, *CHEAP]
    write_npz(tmp_path / "s.npz", pixels, [0, 1, 2, 3, 3])
    assert evaluate(tmp_path / "s.npz", tmp_path / "e", *argv, debug=False) == 1
    assert "2 of the labels (arr_1) are outside 0..2" in said(capsys)
    write_npz(tmp_path / "null.npz", pixels, [3] * 5)  # sampled as null
    assert evaluate(tmp_path / "null.npz", tmp_path / "e", *argv) == 0
    capsys.readouterr()
    (tmp_path / "f/fish").mkdir(parents=True)
    save(tmp_path / "f/fish/1.png", pixels[0, ..., 0])
    assert evaluate(tmp_path / "f", tmp_path / "e2", *argv, debug=False) == 1
    assert "reference does not have: fish" in said(capsys)


def test_a_reference_in_a_file(model, data, real, tmp_path, capsys):
    file, more = tmp_path / "r.npz", ["--data.channels", "1"]
    extractor = ["--extractor", f"{__name__}:quarters"]
    assert main(["evaluate", "reference", str(data), "--out", str(file), *extractor, *more, "--debug"]) == 0
    assert main(["evaluate", "reference", str(data), "--out", str(file), *extractor, *more]) == 1
    assert "--overwrite" in said(capsys)
    argv = ["--count", 12, "--steps", 2]
    assert evaluate(model, tmp_path / "e", "--against", file, *CHEAP, *argv) == 0
    assert evaluate(model, tmp_path / "e2", "--against", data, *CHEAP, *argv) == 0
    assert values(tmp_path / "e") == values(tmp_path / "e2")
    assert any("not available" in note for note in record(tmp_path / "e")["notes"])
    capsys.readouterr()
    other = ["--extractor", f"{__name__}:rows", "--judge", "none"]
    assert evaluate(model, tmp_path / "e3", "--against", file, *other, *argv, debug=False) == 1
    error = said(capsys)
    assert all(word in error for word in ("quarters", "0" * 16, "rows", "1" * 16, "--extractor"))
    assert not (tmp_path / "e3").exists()


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--guidance", "1,2"], 2, "adagn sweep"),
        (["--count", "0"], 2, "at least 1"),
        (["--neighbours", "-1"], 2, "at least 0"),
        (["--extractor", "none"], 2, "adagn sweep --extractor none"),
        (["--extractor", "inceptoin"], 1, "Did you mean inception"),
        (["--extractor", "efficientnet:nowhere.safetensors"], 1, "nowhere.safetensors cannot be read: No such file"),
        (["--classes", "fish"], 1, "no class 'fish'"),
        (["--against", "nowhere.npz"], 1, "no file nowhere.npz"),
        (["--against", "digits"], 1, "--data.classes"),
        (["--data.image_size", "16"], 1, "16x16"),
        (["--data.image_size", "much"], 2, "image_size"),
        (["--seed", str(2**63 - 1)], 1, "seeds"),
        (["--steps", "2000"], 1, "1 to 1000"),
    ],
    ids=str,
)
def test_bad_requests_write_nothing(model, data, tmp_path, capsys, argv, status, message):
    against = [] if "--against" in argv else ["--against", data]
    assert evaluate(model, tmp_path / "e", *against, *CHEAP, *argv, debug=False) == status
    assert message in said(capsys)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["evaluate"], 2, "RUN_OR_IMAGES"),
        (["evaluate", "runs/nowhere"], 1, "no folder runs/nowhere"),
        (["evaluate", "{model}"], 1, "nothing to measure"),
        (["evaluate", "{real}"], 1, "nothing to measure"),
        (["evaluate", "{real}", "--against", "{real}", "--steps", "3"], 2, "--steps"),
        (["evaluate", "{real}", "--against", "{real}", "--guidance", "3"], 1, "samples.json"),
        (["evaluate", "{real}", "{real}"], 2, "--against"),
        (["evaluate", "nowhere.npz", "--against", "{real}"], 2, "no file nowhere.npz"),
        (["evaluate", "reference"], 2, "adagn evaluate reference digits --out references/digits.npz"),
        (["evaluate", "reference", "{real}", "--out", "r"], 1, "--out r.npz"),
        (["evaluate", "reference", "{real}", "--out", "r.npz", "--count", "3"], 2, "--count"),
    ],
    ids=str,
)
def test_bad_command_lines(model, real, capsys, argv, status, message):
    assert main([word.format(model=model, real=real) for word in argv]) == status
    assert message in said(capsys)


@pytest.mark.serial
@pytest.mark.slow
def test_two_processes_give_the_same_numbers(model, data, tmp_path):
    argv = ["--against", data, *CHEAP, "--count", "12", "--steps", "2", "--batch_size", "4", "--guidance", "2"]
    assert evaluate(model, tmp_path / "one", *argv) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        "-m",
        "diffusion_adagn",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(__file__).parent}:{ROOT / 'tests'}"}
    words = ["evaluate", str(model), "--out", str(tmp_path / "two"), *map(str, argv)]
    result = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
    assert (tmp_path / "two/evaluation.json").is_file(), result.stderr[-2000:]
    assert values(tmp_path / "two") == values(tmp_path / "one")


def test_data_set_against_its_other_part(tmp_path):
    argv = ["--against", "digits", "--extractor", "sklearn", "--neighbours", "2", "--debug"]
    assert main(["evaluate", "digits:heldout", "--out", str(tmp_path / "e"), *argv]) == 0
    record = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert record["metrics"]["accuracy"]["value"] > 0.9 and record["metrics"]["precision"]["value"] > 0.6
    assert record["source"] == "digits:heldout"
    with pytest.raises(InputError, match="leave it out"):
        main(["evaluate", "digits:heldout", "--guidance", "2", "--out", str(tmp_path / "f"), *argv])
    with pytest.raises(InputError, match="no split"):
        main(["evaluate", "digits:soon", "--out", str(tmp_path / "f"), *argv])


def test_npz_labels_may_be_null(model, data, tmp_path):
    where = tmp_path / "s"
    argv = ["sample", str(model), "--classes", "cat,null", "--steps", "2", "--count", "3", "--npz", "--out", str(where)]
    assert main([*argv, "--debug"]) == 0
    arrays = np.load(where / "samples.npz")
    assert int(arrays["null_id"]) == 3 and arrays["arr_1"].tolist() == [0] * 3 + [3] * 3
    against = ["--against", str(data), "--extractor", f"{__name__}:quarters", "--judge", "none", "--debug"]
    assert main(["evaluate", str(where / "samples.npz"), "--out", str(tmp_path / "e"), *against]) == 0
    np.savez(tmp_path / "unsaid.npz", arr_0=arrays["arr_0"], arr_1=arrays["arr_1"])  # labels counted from 1, perhaps
    with pytest.raises(InputError, match="outside"):
        main(["evaluate", str(tmp_path / "unsaid.npz"), "--out", str(tmp_path / "f"), *against])
