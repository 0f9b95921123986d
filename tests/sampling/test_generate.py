import json

import numpy as np
import pytest
from conftest import one_line, tiny_unet
from PIL import Image
from processes import ranks

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.atomic import exclusive_lock
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation.image_set import read_image_set
from diffusion_adagn.models.cost import estimate_cost
from diffusion_adagn.sampling import generate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline folder with an untrained network whose classes differ."""
    folder = tmp_path_factory.mktemp("model") / "pipe"
    labels = LabelSpace(("cat", "tench, Tinca tinca", "größe/2"))
    ClassConditionalPipeline(tiny_unet(), make_scheduler(DiffusionConfig()), labels).save_pretrained(folder)
    return folder


def sample(model, out, *argv):
    return main(["sample", str(model), "--out", str(out), "--steps", "3", "--count", "2", "--debug", *argv])


def pixels(folder, entry):
    return np.asarray(Image.open(folder / entry["file"]))


def test_what_is_written(model, tmp_path, capsys):
    assert sample(model, tmp_path / "s", "--guidance", "1,2,4", "--seed", "10", "--classes", "tench,cat") == 0
    record = json.loads((tmp_path / "s/samples.json").read_text())
    images = record["images"]
    assert len(images) == 2 * 2 * 3
    assert {"file", "class_id", "class_name", "seed", "guidance", "sampler", "steps", "model_hash"} <= set(images[0])
    for scale in (1.0, 2.0, 4.0):
        at = [i for i in images if i["guidance"] == scale]
        assert [i["class_id"] for i in at] == [1, 1, 0, 0]  # class-major, in the order asked for
        assert [i["seed"] for i in at] == [10, 11, 12, 13]  # the same at every scale
    assert images[0]["class_name"] == "tench, Tinca tinca"
    assert (images[0]["sampler"], images[0]["steps"]) == ("ddim", 3)
    assert len(record["model"]["hash"]) == 16
    names = {p.name for p in (tmp_path / "s").iterdir()}
    assert names == {i["file"] for i in images} | {"grid.png", "samples.json"}
    assert all(Image.open(tmp_path / "s" / i["file"]).size == (8, 8) for i in images)
    assert min(Image.open(tmp_path / "s/grid.png").size) > 2 * 8 * 4
    printed = capsys.readouterr().out
    assert str(tmp_path / "s/grid.png") in printed
    assert "weights of" in printed


def test_files_equal_pipeline_images(model, tmp_path):
    sample(model, tmp_path / "s", "--guidance", "1,3", "--batch_size", "5")
    pipe = ClassConditionalPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for entry in json.loads((tmp_path / "s/samples.json").read_text())["images"]:
        alone = pipe(
            entry["class_id"], guidance_scale=entry["guidance"], seeds=[entry["seed"]], num_inference_steps=3
        ).images[0]
        difference = np.abs(np.asarray(alone).astype(int) - pixels(tmp_path / "s", entry)).max()
        assert difference <= 1  # a grey value may round the other way in another batch


MIXED = ["--classes", "all", "--mix", "cat@coarse,tench@fine"]


@pytest.mark.serial
def test_batch_and_processes_change_nothing(model, tmp_path):
    sample(model, tmp_path / "one", "--guidance", "2", "--batch_size", "2", *MIXED)
    argv = ["--out", tmp_path / "two", "--steps", "3", "--count", "2", "--guidance", "2", "--batch_size", "2"]
    assert "on 2 process(es)" in ranks(2, ["sample", model, *argv, *MIXED], tmp_path)
    one, two = (json.loads((tmp_path / n / "samples.json").read_text()) for n in ("one", "two"))
    assert one == two
    for entry in one["images"]:
        assert np.array_equal(pixels(tmp_path / "one", entry), pixels(tmp_path / "two", entry))
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "one/grid.png")), np.asarray(Image.open(tmp_path / "two/grid.png"))
    )


def test_samples_are_overwritten_only_if_asked(model, tmp_path, capsys):
    out = tmp_path / "s"
    sample(model, out, "--classes", "cat")
    saved = (out / "samples.json").read_text()
    assert main(["sample", str(model), "--out", str(out), "--steps", "3"]) == 1
    assert "--overwrite" in one_line(capsys.readouterr().err)
    assert (out / "samples.json").read_text() == saved
    (out / "notes.txt").write_text("mine")
    assert sample(model, out, "--classes", "null", "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"
    files = {i["file"] for i in json.loads((out / "samples.json").read_text())["images"]}
    assert {p.name for p in out.glob("0*.png")} == files
    assert all("null" in f for f in files)
    other = tmp_path / "other"
    other.mkdir()
    (other / "x").write_text("")
    assert main(["sample", str(model), "--out", str(other), "--overwrite"]) == 1


def test_interrupted_samples_can_be_replaced(model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "s"
    with monkeypatch.context() as m:

        def broken_off(*args):
            raise KeyboardInterrupt

        m.setattr(generate, "to_pil", broken_off)
        with pytest.raises(KeyboardInterrupt):
            generate.sample_to_folder(str(model), generate.SampleRequest("cat", count=1, sampler={"steps": 2}), out)
    with pytest.raises(InputError, match="not finished"):
        read_image_set(out)
    assert main(["sample", str(model), "--out", str(out), "--steps", "3"]) == 1
    assert "--overwrite" in one_line(capsys.readouterr().err)
    assert sample(model, out, "--classes", "cat", "--overwrite") == 0
    assert "unfinished" not in json.loads((out / "samples.json").read_text())
    assert len(read_image_set(out).pixels) == 2


def test_unsuitable_guide_keeps_old_samples(model, tmp_path, capsys):
    labels = LabelSpace(("cat", "tench, Tinca tinca", "größe/2"))
    guide = ClassConditionalPipeline(tiny_unet(num_res_blocks=2), make_scheduler(DiffusionConfig()), labels)
    guide.save_pretrained(tmp_path / "guide")
    out = tmp_path / "s"
    sample(model, out, "--classes", "cat")
    before = sorted(out.iterdir())
    argv = ["sample", str(model), "--out", str(out), "--steps", "3", "--overwrite", "--guidance", "2"]
    assert main([*argv, "--mix", "cat@coarse,größe/2@fine", "--guide", str(tmp_path / "guide")]) == 1
    assert "belongs to another network" in one_line(capsys.readouterr().err)
    assert sorted(out.iterdir()) == before


def test_partial_writes_count_as_samples(model, tmp_path):
    out = tmp_path / "s"
    out.mkdir()
    (out / ".0123abcd.samples.json").write_text("{")
    (out / ".0123abcd.samples-g2.npz").write_text("PK")
    assert sample(model, out, "--classes", "cat") == 0
    assert not list(out.glob(".*"))


def test_sampling_locks_its_folder(model, tmp_path, capsys):
    pytest.importorskip("fcntl")
    out = tmp_path / "s"
    sample(model, out, "--classes", "cat")
    saved = (out / "samples.json").read_text()
    with exclusive_lock(out):
        assert main(["sample", str(model), "--out", str(out), "--steps", "3", "--overwrite"]) == 1
    assert "another process is using" in one_line(capsys.readouterr().err)
    assert (out / "samples.json").read_text() == saved


def test_batch_size_takes_auto(capsys):
    assert main(["sample", "runs/none", "--batch_size", "1.5"]) == 2
    assert "--batch_size: expected a whole number, got '1.5'" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--classes", "dog"], "no class 'dog'"),
        (["--classes", "7"], "class id 7"),
        (["--guidance", "nan"], "nan"),
        (["--steps", "2000"], "1 to 1000"),
        (["--sampler", "dpm++", "--eta", "1"], "ddim"),
        (["--spacing", "trailing", "--steps", "30"], "leading"),
        (["--ema", "raw"], "EMA weights only"),
        (["--weights", "raw"], "EMA weights only"),
        (["--ema", "0.1"], "name a run or checkpoint folder for --ema 0.1"),
        (["--eta", "nan"], "eta"),
        (["--seed", str(2**63 - 1)], "seeds"),
        (["--mix", "cat@coarse"], "no rule covers"),
        (["--mix", "cat@corse,tench"], "'corse' is not a place in the network"),
        (["--interpolate", "cat"], "two different classes"),
    ],
)
def test_bad_requests_write_nothing(model, tmp_path, capsys, argv, message):
    assert main(["sample", str(model), "--out", str(tmp_path / "s"), *argv]) == (2 if "nan" in argv else 1)
    assert message in one_line(capsys.readouterr().err)
    assert not (tmp_path / "s").exists()


def test_similar_scales_get_own_files(model, tmp_path):
    sample(model, tmp_path / "s", "--classes", "cat", "--guidance", "2,2.0000001,2")
    images = json.loads((tmp_path / "s/samples.json").read_text())["images"]
    assert len(images) == 4 == len({i["file"] for i in images})
    assert {i["guidance"] for i in images} == {2.0, 2.0000001}


def test_grid_size_is_bounded(model, tmp_path, capsys):
    assert (
        main(["sample", str(model), "--out", str(tmp_path / "s"), "--steps", "2", "--count", "30", "--classes", "cat"])
        == 0
    )
    assert "24 images each" in capsys.readouterr().out


def test_mixes_share_the_noise_of_classes(model, tmp_path, capsys):
    mixes = ["tench, Tinca tinca@coarse,cat@fine", "cat@t>600,null@t<=600"]
    argv = ["--classes", "cat", "--mix", mixes[0], "--mix", mixes[1], "--guidance", "1,2", "--seed", "5"]
    assert sample(model, tmp_path / "s", *argv) == 0
    record = json.loads((tmp_path / "s/samples.json").read_text())
    images = record["images"]
    assert len(images) == 3 * 2 * 2 == len({i["file"] for i in images})
    for scale in (1.0, 2.0):
        at = [i for i in images if i["guidance"] == scale]
        assert [i["seed"] for i in at] == [5, 6] * 3
        assert [i["class_id"] for i in at] == [0, 0, None, None, None, None]
        assert [i["class_name"] for i in at[::2]] == ["cat", *mixes]
    assert all(set(i["file"]) <= set("abcdefghijklmnopqrstuvwxyzT0123456789-.") for i in images)
    assert [p["part"] for p in record["plans"][mixes[0]]] == ["tench, Tinca tinca@coarse", "cat@fine"]
    assert "middle.0.block.norm2" in record["plans"][mixes[0]][0]["sites"]
    names = {p.name for p in (tmp_path / "s").iterdir()}
    assert names == {i["file"] for i in images} | {"grid.png", "samples.json"}
    printed = capsys.readouterr().out
    assert "tench, Tinca tinca@coarse: " in printed
    assert "sites, at 4x4: " in printed

    pipe = ClassConditionalPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for entry in images:
        plans = {"class_plan": entry["class_name"], "guidance_scale": entry["guidance"], "seeds": [entry["seed"]]}
        alone = np.asarray(pipe(**plans, num_inference_steps=3).images[0]).astype(int)
        assert np.abs(alone - pixels(tmp_path / "s", entry)).max() <= 1
    plain = [i for i in images if i["class_id"] == 0]
    assert sample(model, tmp_path / "plain", "--classes", "cat", "--guidance", "1,2", "--seed", "5") == 0
    for entry, other in zip(plain, json.loads((tmp_path / "plain/samples.json").read_text())["images"]):
        assert np.abs(pixels(tmp_path / "s", entry).astype(int) - pixels(tmp_path / "plain", other)).max() <= 1


def test_from_one_class_to_another(model, tmp_path, capsys):
    assert sample(model, tmp_path / "s", "--interpolate", "cat,2", "--steps-between", "3", "--guidance", "2") == 0
    record = json.loads((tmp_path / "s/samples.json").read_text())
    images = record["images"]
    assert [i["seed"] for i in images] == [0, 1] * 5
    assert [i["class_id"] for i in images[::2]] == [0, None, None, None, 2]
    assert images[2]["class_name"] == "cat 0.75 größe/2 0.25"
    assert record["plans"][images[2]["class_name"]] == {"classes": [0, 2], "share": 0.25}
    sheet = Image.open(tmp_path / "s/grid.png")
    assert sheet.width > 5 * 64
    assert 2 * 64 < sheet.height < 4 * 64  # a row a seed
    # the ends are the plain classes
    assert sample(model, tmp_path / "cat", "--classes", "cat", "--guidance", "2") == 0
    for entry, other in zip(images, json.loads((tmp_path / "cat/samples.json").read_text())["images"]):
        assert np.abs(pixels(tmp_path / "s", entry).astype(int) - pixels(tmp_path / "cat", other)).max() <= 1
    argv = ["--interpolate", "cat,2", "--steps-between", "30", "--count", "1", "--steps", "2"]
    assert sample(model, tmp_path / "many", *argv) == 0
    assert "24 of 32 columns" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--interpolate", "cat,2", "--classes", "cat"], "leave out --classes, --mix and --style"),
        (["--interpolate", "cat,2", "--mix", "cat"], "leave out --classes, --mix and --style"),
        (["--steps-between", "3"], "belongs to --interpolate"),
        (["--interpolate", "cat,2", "--steps-between", "-1"], "at least 0"),
        (["--interpolate", "cat,2", "--steps-between", "few"], "steps_between"),
    ],
)
def test_contradicting_options_are_rejected(model, tmp_path, capsys, argv, message):
    assert main(["sample", str(model), "--out", str(tmp_path / "s"), *argv]) == 2
    assert message in one_line(capsys.readouterr().err)


def test_failed_interpolation_writes_nothing(tmp_path, capsys):
    unet = tiny_unet(conditioning="none")
    labels = LabelSpace(("a", "b", "c"))
    ClassConditionalPipeline(unet, make_scheduler(DiffusionConfig()), labels).save_pretrained(tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), "--out", str(tmp_path / "s"), "--interpolate", "a,b"]) == 1
    assert "conditioning none ignores the class" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "s").exists()


def test_batch_size_fits_memory(monkeypatch):
    unet, guide = tiny_unet(), tiny_unet(model_channels=32)
    one, large = (estimate_cost(network.config).activation_bytes for network in (unet, guide))
    assert large > 1.5 * one
    monkeypatch.setattr(generate, "machine_memory", lambda: 80 * one)
    assert generate.batch_that_fits([(unet, 1)], 100) == 20
    assert generate.batch_that_fits([(unet, 2)], 100) == 10
    assert generate.batch_that_fits([(unet, 2)], 4) == 4
    assert generate.batch_that_fits([(unet, 1), (guide, 1)], 100) == 20 * one // large
    monkeypatch.setattr(generate, "machine_memory", lambda: 1)
    assert generate.batch_that_fits([(unet, 2)], 100) == 1


def test_speed_is_automatic_or_forced(model, tmp_path, capsys):
    assert sample(model, tmp_path / "a", "--guidance", "2", "--batch_size", "auto") == 0
    out = capsys.readouterr().out
    assert (
        "batch size 6 (fits in memory)" in out and "chosen for this machine: precision, memory_format, operator" in out
    )
    forced = "--precision", "fp32", "--layout", "contiguous", "--operator", "eager"
    assert sample(model, tmp_path / "b", "--guidance", "2", *forced) == 0
    assert "fp32, contiguous, eager operator\n" in capsys.readouterr().out
    for one, other in zip(*(json.loads((tmp_path / x / "samples.json").read_text())["images"] for x in "ab")):
        assert (one["operator"], other["operator"], other["layout"]) == ("fused", "eager", "contiguous")
        a, b = pixels(tmp_path / "a", one), pixels(tmp_path / "b", other)
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
    with pytest.raises(InputError, match="CUDA graphs need a CUDA GPU"):
        sample(model, tmp_path / "c", "--graph")
    assert not (tmp_path / "c").exists()
