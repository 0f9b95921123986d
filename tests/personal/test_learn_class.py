"""`adagn learn-class`: from images to a file, and from the file to images."""

import json
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_line, tiny_unet
from learned_pugs import DEPTHS, QUICK, few_measurements, load, make_model, pipeline, sample, write_images
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion_adagn import ClassConditionalPipeline, ClassInterpolation, Guidance
from diffusion_adagn.cli.main import main
from diffusion_adagn.data.few_images import ClassImages, read_images
from diffusion_adagn.errors import InputError
from diffusion_adagn.personal import learn
from diffusion_adagn.personal.learn import learn_class, loss_of
from diffusion_adagn.personal.learner import TOLERANCE, Learner, start_vector
from diffusion_adagn.personal.settings import LearnRequest
from diffusion_adagn.runs.class_file import KEY, files_in, read_class, read_record
from diffusion_adagn.sampling.load import open_pipeline
from diffusion_adagn.trace.learned import Moved, Neighbours, Used


@pytest.fixture(autouse=True)
def _few():
    with few_measurements():
        yield


@pytest.fixture
def model(made_once):
    return made_once("personal", make_model)


@pytest.mark.parametrize("depth", DEPTHS)
def test_file_has_record_and_tensors(model, depth):
    record, learned = read_class(model / f"{depth}.safetensors")
    assert (record.name, record.depth, record.images.count, record.images.heldout) == (depth, depth, 6, 1)
    assert (record.image_size, record.channels, record.run.name) == (8, 1, "model")
    assert len(learned.vectors) == (1 if depth == "vector" else len(tiny_unet().sites()))
    assert bool(learned.layers) == (depth == "layers")
    assert record.figures["parameters"] == sum(t.numel() for t in learned.tensors().values())
    assert record.figures["loss"] <= record.figures["loss_before"] and record.settings["steps"] == 6
    assert (model / f"{depth}-previews" / "nearest.png").is_file()


def test_a_vector_takes_kilobytes(model):
    assert (model / "vector.safetensors").stat().st_size < 4000


def test_class_is_one_like_the_others(model):
    pipe = load(model, "vector", "sites", "layers")
    assert pipe.labels.learned == ("vector", "sites", "layers") and pipe.labels.K == 3
    for index, depth in enumerate(pipe.labels.learned):
        by_name, by_file = sample(pipe, depth), sample(pipe, str(model / f"{depth}.safetensors"))
        assert np.array_equal(by_name, by_file) and np.array_equal(by_name, sample(pipe, 4 + index))
        assert np.abs(by_name - sample(pipe, "dog")).max() > 1e-4
    assert pipe("all", num_inference_steps=2, seeds=0).class_names == ["cat", "dog", "bird"]


def test_old_images_do_not_change(model):
    before = sample(load(model), ["cat", "dog", "bird", "null"], guidance_scale=2.0)
    pipe = load(model, "vector", "sites", "layers")
    assert np.array_equal(before, sample(pipe, ["cat", "dog", "bird", "null"], guidance_scale=2.0))
    mixed = sample(pipe, ["cat", "dog", "layers", "null"], guidance_scale=2.0)
    assert np.array_equal(before[[0, 1, 3]], mixed[[0, 1, 3]])


@pytest.mark.parametrize("depth", DEPTHS)
def test_mixes_interpolations_and_negatives(model, depth):
    pipe = load(model, depth)
    plan = f"{model / f'{depth}.safetensors'}@coarse,dog@fine"
    mixed = pipe(class_plan=plan, seeds=[0], num_inference_steps=4, output_type="np").images
    assert np.abs(mixed - sample(pipe, depth)).max() > 1e-5 and np.abs(mixed - sample(pipe, "dog")).max() > 1e-5
    whole = pipe(class_plan=f"{depth}@coarse,{depth}@fine", seeds=[0], num_inference_steps=4, output_type="np").images
    assert np.allclose(whole, sample(pipe, depth), atol=1e-5)
    for share, end in ((0.999999, depth), (0.000001, "dog")):
        between = ClassInterpolation.parse(f"dog,{depth}", pipe.labels, share)
        images = pipe(class_plan=between, seeds=[0], num_inference_steps=4, output_type="np").images
        assert np.allclose(images, sample(pipe, end), atol=1e-3)
    guided = sample(pipe, "dog", guidance=Guidance(2.0, negative=depth))
    assert np.isfinite(guided).all() and np.abs(guided - sample(pipe, "dog", guidance_scale=2.0)).max() > 1e-5


NETWORKS = [("ddpm", {"learned_variance": True}), ("edm", {}), ("flow", {"conditioning": "cross_attention"})]


@pytest.mark.parametrize(("process", "network"), NETWORKS, ids=str)
def test_learning_lowers_the_loss(process, network):
    pipe = pipeline(process, **network)
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    request = LearnRequest(images="-", name="pug", steps=20, batch_size=4, check_every=10, layers_lr=0.01)
    learner = Learner(pipe.unet, loss_of(pipe, "nowhere"), images, images[:0], request, start_vector(pipe.unet, None))
    before = {name: p.clone() for name, p in pipe.unet.state_dict().items()}
    while not learner.ended:
        learner.train_step()
    best = learner.finish()
    assert learner.best_step == learner.step == 20 and learner.losses[20] < learner.losses[0]
    assert all(torch.equal(p, before[name]) for name, p in pipe.unet.state_dict().items())
    assert pipe.unet.learned == [best] and not best.vectors.requires_grad


@pytest.mark.slow
def test_best_step_is_the_one_saved():
    """With held-out images: the last tensors with a loss near the lowest, and an end after `patience` measurements."""
    pipe = pipeline()
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    settings = {"steps": 60, "batch_size": 2, "check_every": 2, "patience": 3, "lr": 10.0, "layers_lr": 5.0}
    request = LearnRequest(images="-", name="pug", **settings)
    learner = Learner(pipe.unet, loss_of(pipe, "-"), images[:2], images[2:], request, start_vector(pipe.unet, 0))
    while not learner.ended:
        learner.train_step()
    assert learner.step < 60 and learner.step - learner.best_step == 6
    lowest = min(learner.losses.values())
    near = lowest + TOLERANCE * (learner.losses[0] - lowest)
    assert learner.best_step == max(step for step, value in learner.losses.items() if value <= near)
    best = learner.finish()
    learner.learned = learner.average = best
    assert learner.measure() == learner.losses[learner.best_step]


def test_draws_depend_on_the_position_alone():
    pipe = pipeline()
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    request = LearnRequest(images="-", name="pug", batch_size=4, flip=True)
    learner = Learner(pipe.unet, loss_of(pipe, "-"), images, images[:0], request, start_vector(pipe.unet, 0))
    first = learner._batch(torch.arange(4, 8))
    learner._batch(torch.arange(100))
    again = learner._batch(torch.arange(4, 8))
    assert all(torch.equal(a, b) for a, b in zip((*first[:2], *first[2]), (*again[:2], *again[2])))


def test_repeated_learning_is_bit_equal(model, tmp_path):
    request = LearnRequest(images=str(model / "pugs"), name="sites", depth="sites", **QUICK)
    record = learn_class(model / "model", request, tmp_path / "again.safetensors")
    assert record.tensors_sha256 == read_record(model / "sites.safetensors").tensors_sha256


@pytest.mark.parametrize(("count", "heldout"), [(1, 0), (3, 0), (4, 1), (16, 2), (200, 25)])
def test_images_are_held_out_from_four_on(count, heldout):
    assert LearnRequest(images="-", name="pug").heldout_of(count) == heldout
    images = ClassImages(np.zeros((count, 2, 2, 1), np.uint8), heldout, "-")
    assert images.is_heldout.sum() == heldout and len(images.x0(False)) == count - heldout


def test_one_image_is_enough(model, tmp_path, capsys):
    write_images(tmp_path / "one", 1)
    request = LearnRequest(images=str(tmp_path / "one"), name="only", depth="vector", **QUICK)
    record = learn_class(model / "model", request, tmp_path / "only.safetensors")
    assert record.figures["best_step"] == record.figures["steps"] == 6
    said = capsys.readouterr().out
    assert "From one image nothing can be said about variety" in said and "show little of what may vary" in said


def test_images_of_any_kind(tmp_path):
    folder = write_images(tmp_path / "mixed", 2, 30, "RGBA")
    Image.fromarray(np.zeros((20, 40), np.uint8)).save(folder / "wide.jpg")
    assert read_images(str(folder), 8, 3).shape == (3, 8, 8, 3) and read_images(str(folder), 8, 1).shape == (3, 8, 8, 1)
    half = np.zeros((20, 40), np.uint8)
    half[:, 30:] = 255
    (tmp_path / "half").mkdir()
    Image.fromarray(half).save(tmp_path / "half" / "a.png")
    assert (read_images(str(tmp_path / "half"), 4, 1, crop=(30, 5, 10, 10)) == 255).all()


def test_unusable_images_are_named(tmp_path):
    folder = write_images(tmp_path / "some", 3)
    (folder / "torn.png").write_bytes((folder / "image0.png").read_bytes()[:60])
    (folder / "empty.jpg").touch()
    with pytest.raises(InputError, match=r"2 of 5 images .* cannot be used: empty.jpg .*, torn.png"):
        read_images(str(folder), 8, 1)
    with pytest.raises(InputError, match=r"--crop 0,0,12,12 lies outside.*Give a --crop inside of all images"):
        read_images(str(write_images(tmp_path / "small", 1)), 8, 1, crop=(0, 0, 12, 12))
    with pytest.raises(InputError, match="has 0 images: expected a folder with 1 to 200"):
        (tmp_path / "none").mkdir()
        read_images(str(tmp_path / "none"), 8, 1)
    with pytest.raises(InputError, match="is no folder"):
        read_images(str(tmp_path / "missing"), 8, 1)


@pytest.mark.parametrize("name", ["null", "all", "random", "a,b", "a@b", "x.safetensors", "  "])
def test_names_that_selections_cannot_hold_are_rejected(name):
    with pytest.raises(InputError, match="--name"):
        LearnRequest(images="-", name=name)


# ---------------------------------------------------------------------- files that do not fit


def test_another_run_is_rejected_with_the_reason(model, tmp_path):
    pipe = pipeline()
    pipe.unet.conv_in.weight.data += 1
    with pytest.raises(InputError, match="was learned with another run, model"):
        pipe.load_class(model / "vector.safetensors")
    with pytest.raises(InputError, match="images of 8 pixels, and this model's have 16"):
        pipeline(sample_size=16).load_class(model / "vector.safetensors")
    with pytest.raises(InputError, match="images of 1 channels, and this model's have 3"):
        pipeline(in_channels=3).load_class(model / "vector.safetensors")


def test_other_weights_of_the_run_warn(model, tmp_path, monkeypatch):
    monkeypatch.setattr(ClassConditionalPipeline, "run_id", "0123")
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "model")
    request = LearnRequest(images=str(model / "pugs"), name="pug", depth="vector", **QUICK)
    monkeypatch.setattr("diffusion_adagn.sampling.pipeline.run_id", lambda config: "0123")
    learn_class(tmp_path / "model", request, tmp_path / "pug.safetensors")
    pipe.unet.conv_in.weight.data += 0.01
    with pytest.warns(UserWarning, match="other weights of the same run"):
        pipe.load_class(tmp_path / "pug.safetensors")
    other = pipeline()
    other.unet.conv_in.weight.data += 0.01
    other.run_id = "4567"
    with pytest.raises(InputError, match="another run"):
        other.load_class(tmp_path / "pug.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline().load_class(tmp_path / "pug.safetensors")


def test_two_classes_of_one_name_are_rejected(model, tmp_path):
    pipe = load(model, "vector", "vector")  # the same file twice is no second class
    assert pipe.labels.learned == ("vector",)
    record = json.loads(_metadata(model / "sites.safetensors")[KEY]) | {"name": "vector"}
    save_file(load_file(model / "sites.safetensors"), tmp_path / "twin.safetensors", {KEY: json.dumps(record)})
    with pytest.raises(InputError, match="has the name of another class"):
        pipe.load_class(tmp_path / "twin.safetensors")
    with pytest.raises(InputError, match="--name: the learned class 'dog' has the name"):
        request = LearnRequest(images=str(model / "pugs"), name="dog", **QUICK)
        learn_class(model / "model", request, tmp_path / "dog.safetensors")


def test_corrupted_files_are_reported(model, tmp_path):
    good = model / "sites.safetensors"
    file = tmp_path / "bad.safetensors"
    content = bytearray(good.read_bytes())
    pipe = load(model)
    for damage in (content[:100], content[:-8], b"", b"not a file of tensors"):
        file.write_bytes(damage)
        with pytest.raises(InputError, match="is corrupted"):
            pipe.load_class(file)
    content[-3] ^= 64
    file.write_bytes(content)
    with pytest.raises(InputError, match="its numbers are not those that were saved"):
        pipe.load_class(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="is no learned class, but other weights"):
        pipe.load_class(file)
    record = json.loads(_metadata(good)[KEY])
    for wrong in ("[]", "{", json.dumps(record | {"depth": "deep"}), json.dumps({"name": "x"})):
        save_file(load_file(good), file, {KEY: wrong})
        with pytest.raises(InputError, match="corrupted"):
            pipe.load_class(file)
    with pytest.raises(InputError, match="there is no file"):
        pipe.load_class(tmp_path / "missing.safetensors")
    assert not pipe.unet.learned


def _metadata(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        return content.metadata()


def test_files_are_found_in_selections():
    text = "classes/pug.safetensors@coarse, b c.safetensors,cat"
    assert files_in(text, None, "b c.safetensors@8&sigma>2", "x.safetensors2") == [
        "classes/pug.safetensors",
        "b c.safetensors",
    ]


def test_models_without_class_vectors_are_rejected(model, tmp_path):
    for name, network in (("ignores the class", {"conditioning": "none"}),):
        pipeline(**network).save_pretrained(tmp_path / "none")
        request = LearnRequest(images=str(model / "pugs"), name="pug", **QUICK)
        with pytest.raises(InputError, match=name):
            learn_class(tmp_path / "none", request, tmp_path / "pug.safetensors")


# ---------------------------------------------------------------------- the command line


def test_command_line_learns_and_samples(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = ["learn-class", str(model / "model"), "--images", str(model / "pugs"), "--name", "pug", "--from", "dog"]
    typed += ["--depth", "sites", "--steps", "4", "--batch_size", "2", "--check_every", "2", "--preview_every", "2"]
    assert main(typed) == 0
    said = capsys.readouterr().out
    assert "classes/pug.safetensors" in said and "from dog" in said and "adagn sample" in said
    assert sorted(p.name for p in (tmp_path / "classes/pug-previews").iterdir()) == [
        "nearest.png",
        "step-00000002.png",
        "step-00000004.png",
    ]
    assert main(typed) == 1
    said = capsys.readouterr().err
    assert "is there already" in said and "--out classes/pug-2.safetensors" in said
    sample = ["sample", str(model / "model"), "--classes", "classes/pug.safetensors,cat", "--mix"]
    sample += [
        "classes/pug.safetensors@coarse,dog",
        "--count",
        "2",
        "--steps",
        "3",
        "--guidance",
        "1,2",
        "--out",
        "images",
    ]
    assert main(sample) == 0
    images = json.loads((tmp_path / "images/samples.json").read_text())
    assert images["labels"]["learned"] == ["pug"]
    assert {i["class_name"] for i in images["images"]} >= {"pug", "cat"}
    assert {i["class_id"] for i in images["images"]} == {4, 0, None}
    plain = open_pipeline(model / "model")[0]
    assert images["model"]["hash"] != _hash(plain)
    assert main(["sample", str(model / "model"), "--classes", "classes/none.safetensors"]) == 1
    assert "there is no file" in capsys.readouterr().err


def _hash(pipe):
    from diffusion_adagn.sampling.pretrained import model_hash

    return model_hash(pipe.unet)


def test_missing_options_are_named(capsys):
    assert main(["learn-class", "digits", "--name", "pug"]) == 2
    assert "give --images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--crop", "0,0,0,0"], "--crop: .*width and height of at least 1, got 0,0,0,0"),
        (["--crop", "0,0,4"], "--crop: expected left,top,width,height in pixels, such as 0,0,64,64, got 0,0,4"),
        (["--crop", "0,0,4,x"], "got 0,0,4,x"),
        (["--depth", "vector", "--rank", "8"], "--rank and --layers_lr are of the changes of layers"),
        (["--out", "a,b.safetensors"], "could not name this file"),
    ],
)
def test_wrong_options_are_rejected(model, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    words = ["learn-class", str(model / "model"), "--images", str(model / "pugs"), "--name", "pug"]
    assert main([*words, *options]) in (1, 2)
    assert re.search(message, one_line(capsys.readouterr().err)) and not list(tmp_path.iterdir())


def test_crop_is_read(model):
    assert LearnRequest(images="-", name="pug", crop="1, 2,3,4").crop == (1, 2, 3, 4)


def test_samples_far_from_the_images_are_reported():
    def sentence(distance):
        return Neighbours(np.zeros(0), np.zeros(0), distance, 0.2).sentence

    assert "WARNING" not in sentence(0.3) and "WARNING: it copies" in sentence(0.09)
    assert "WARNING: the sampled images are much farther" in sentence(0.5)


def test_images_are_counted():
    def sentence(images, heldout):
        return Used("cat", 0.5, 0.1, 0.05, images, heldout).sentence

    assert "on 5 held-out images the loss under cat" in sentence(5, True)
    assert "on 1 image of the folder" in sentence(1, False) and "on 3 images of the folder" in sentence(3, False)


def test_run_of_one_class_has_no_unit():
    text = Moved({}, {"cat": 0.1}, {}).sentence
    assert "has no unit" in text and "farthest" not in text


def test_earlier_previews_are_removed(model, tmp_path):
    (tmp_path / "pug-previews").mkdir()
    (tmp_path / "pug-previews/step-00000900.png").touch()
    request = LearnRequest(images=str(model / "pugs"), name="pug", depth="vector", **QUICK)
    learn_class(model / "model", request, tmp_path / "pug.safetensors")
    assert [file.name for file in (tmp_path / "pug-previews").iterdir()] == ["nearest.png"]


@pytest.mark.parametrize(
    ("best", "said"),
    [(0, "was lowest before the first of 4 steps, 0.5000"), (3, "fell from 0.5000 to 0.4000 (-20.0%)")],
)
def test_nothing_learned_is_reported(best, said):
    figures = {
        "steps": 4,
        "best_step": best,
        "loss_before": 0.5,
        "loss": 0.4 if best else 0.5,
        "loss_on": "held-out images",
    }
    figures |= {"parameters": 64, "seconds": 1.0}
    text = learn._summary(figures, SimpleNamespace(sentences=[]), SimpleNamespace(pixels=range(5)))
    assert said in text and ("Give a lower --lr" in text) == (best == 0)
