"""Learned classes in evaluate, sweep, trace, serve and merge-classes."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from learned_pugs import few_measurements, load, make_model, pipeline, sample

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.cli.main import main
from diffusion_adagn.errors import InputError
from diffusion_adagn.experiments import sweep_report
from diffusion_adagn.models.learned import LearnedClass
from diffusion_adagn.personal.merge import merge_classes, merged_pipeline
from diffusion_adagn.render.grids import labelled_grid
from diffusion_adagn.sampling.pretrained import model_hash
from diffusion_adagn.serving import actions
from diffusion_adagn.serving.metrics import Metrics
from diffusion_adagn.serving.models import open_models
from diffusion_adagn.serving.page.choices import class_choices, class_text
from diffusion_adagn.serving.settings import ClassQuery, MixQuery, ModelQuery, ModelSettings, SampleQuery
from diffusion_adagn.trace import tracing

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0.0, 749.2, 999.0, 20.0])


@pytest.fixture(autouse=True)
def _few():
    with few_measurements():
        yield


@pytest.fixture
def model(made_once):
    return made_once("personal", make_model)


def test_style_of_a_run_with_one_class(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ClassConditionalPipeline(tiny_unet(num_classes=1), load(model).scheduler, LabelSpace(("cat",))).save_pretrained(
        "one"
    )
    style = ["style", "one", "--steps", "2", "--count", "1", "--device", "cpu"]
    assert main([*style, "--psi", "0.5", "--out", "a"]) == 0 and (tmp_path / "a/truncation.png").is_file()
    assert json.loads((tmp_path / "a/style.json").read_text())["directions"] == []
    assert main([*style, "--out", "b"]) == 1 and "two or more classes" in capsys.readouterr().err


def test_style_takes_a_file(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, style = (
        model / "sites.safetensors",
        ["style", str(model / "model"), "--steps", "2", "--count", "1", "--device", "cpu"],
    )
    assert main([*style, "--style", f"0.5*{file} + 0.5*dog", "--out", "a"]) == 0
    assert main([*style, "--classes", f"{file},dog", "--psi", "0.5", "--out", "b"]) == 0
    assert (tmp_path / "a/styles.png").is_file() and (tmp_path / "b/truncation.png").is_file()


@pytest.mark.slow
def test_evaluate_measures_a_learned_class(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = ["evaluate", str(model / "model"), "--classes", f"{model / 'layers.safetensors'},dog", "--count", "12"]
    typed += [
        "--steps",
        "3",
        "--against",
        str(model / "eights"),
        "--extractor",
        "sklearn",
        "--data.source",
        "digits",
        "--out",
        "numbers",
        "--neighbours",
        "2",
    ]
    _resized(model)
    assert main(typed) == 0
    record = json.loads((tmp_path / "numbers/evaluation.json").read_text())
    assert record["settings"]["classes"] == ["layers", "dog"] and record["count"] == 12
    assert record["model"]["hash"] != model_hash(load(model).unet)


def _resized(model):
    """The images at the network's size."""
    from PIL import Image

    (model / "eights").mkdir(exist_ok=True)
    for file in (model / "pugs").iterdir():
        Image.open(file).resize((8, 8)).save(model / "eights" / file.name)


@pytest.mark.slow
def test_sweep_names_its_rows(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(
        sweep_report, "labelled_grid", lambda rows, labels, *a, **k: drawn.append(labels) or grid(rows, labels)
    )
    file, grid = str(model / "sites.safetensors"), labelled_grid
    typed = [
        "sweep",
        str(model / "model"),
        "--classes",
        f"bird,{file}",
        "--count",
        "4",
        "--steps",
        "3",
        "--guidance",
        "2",
    ]
    assert main([*typed, "--extractor", "none", "--negative", f"null,{file}", "--out", "swept"]) == 0
    assert [label for label in drawn[-1] if label] == ["bird", "sites"]


@pytest.mark.slow
def test_trace_has_a_section_for_each_class(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tracing, "NUM_PROBED_TIMESTEPS", 2)
    monkeypatch.setattr(tracing, "SAMPLER_STEPS", 3)
    files = ",".join(str(model / f"{depth}.safetensors") for depth in ("vector", "layers"))
    assert (
        main(
            [
                "trace",
                str(model / "model"),
                "--classes",
                files,
                "--timesteps",
                "4",
                "--images",
                "2",
                "--out",
                str(tmp_path / "t"),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    page = (tmp_path / "t/report.html").read_text()
    for name in ("vector", "layers"):
        assert f"Learned class {name}" in said and f"Learned class {name}" in page
    assert "The nearest classes by modulation are" in said and "layers are changed" in said
    assert "differs from the nearest of the images" in said  # the images are still there
    assert (tmp_path / "t/learned_1_nearest.png").is_file()


@pytest.fixture
def served(model):
    settings = ModelSettings(learned=tuple(str(model / f"{depth}.safetensors") for depth in ("vector", "layers")))
    models = open_models([str(model / "model")], settings, Metrics())
    yield models
    for one in models.values():
        one.worker.close()


def test_serve_offers_learned_classes(served, model):
    answer = actions.list_classes(served, ModelQuery())
    assert [one["name"] for one in answer["classes"]] == ["cat", "dog", "bird", "vector", "layers"]
    assert [one["id"] for one in answer["classes"]] == [0, 1, 2, 4, 5] and answer["null_id"] == 3
    sampler = {"steps": 3}
    query = SampleQuery(classes="cat,layers", scales=(1.0, 2.0), sampler=sampler)
    images = actions.images(served, query).wait()
    alone = load(model, "layers")
    expected = alone(["cat", "layers"], seeds=[0, 1], num_inference_steps=3, output_type="np").images
    assert np.abs(images.pixels[1] / 255 - expected[1]).max() < 0.01
    assert f"{model / 'layers.safetensors'}" in images.record["command"]
    mixed = actions.images(served, MixQuery(mixes=("vector@coarse,layers@fine",), sampler=sampler)).wait()
    assert len(mixed.pixels) == 1 and "vector.safetensors@coarse" in mixed.record["command"]
    one = next(iter(served.values()))
    assert ("layers", "5") in class_choices(one) and class_text(one.pipe.labels, ["5", "0"]) == "layers,cat"


def test_serve_explains_a_learned_class(served):
    answer = actions.modulation(served, ClassQuery(class_name="vector")).wait()
    assert answer["class_name"] == "vector" and answer["nearest_classes"]


def test_clients_cannot_open_files(served, model):
    with pytest.raises(InputError, match="there is no class"):
        actions.images(served, SampleQuery(classes=str(model / "sites.safetensors")))


def test_serve_rejects_a_class_of_no_model(model, tmp_path):
    other = pipeline()
    other.unet.conv_in.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    settings = ModelSettings(learned=(str(model / "vector.safetensors"),))
    with pytest.raises(InputError, match=r"no model of this server takes the class: .* another run"):
        open_models([str(tmp_path / "other")], settings, Metrics())
    models = open_models([str(tmp_path / "other"), str(model / "model")], settings, Metrics())
    assert [one.pipe.labels.learned for one in models.values()] == [(), ("vector",)]
    for one in models.values():
        one.worker.close()


def test_guide_needs_the_same_class(model):
    pipe, guide = load(model, "layers"), load(model)
    arguments = {"seeds": 0, "num_inference_steps": 3, "output_type": "np", "guide": guide, "guidance_scale": 2.0}
    with pytest.raises(InputError, match="the guide does not have the learned class layers"):
        pipe("layers", **arguments)
    pipe("dog", **arguments)
    guide.load_class(model / "layers.safetensors")
    same = pipe("layers", **arguments).images  # a guide that is the model itself changes nothing
    assert np.allclose(same, sample_3(pipe), atol=1e-4)


def test_guide_without_classes_serves_a_learned_class(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ClassConditionalPipeline(tiny_unet(num_classes=None), load(model).scheduler, LabelSpace(())).save_pretrained(
        "guide"
    )
    words = ["sample", str(model / "model"), "--classes", f"{model / 'layers.safetensors'},dog", "--guide", "guide"]
    assert main([*words, "--guidance", "2", "--steps", "2", "--count", "1", "--device", "cpu", "--out", "a"]) == 0
    assert len(list((tmp_path / "a").glob("0*.png"))) == 2


def test_named_by_its_file(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes/vector.safetensors").write_bytes((model / "vector.safetensors").read_bytes())
    assert main(["sample", str(model / "model"), "--classes", "vector,dog"]) == 1
    assert "is named by its file: classes/vector.safetensors" in " ".join(capsys.readouterr().err.split())


def sample_3(pipe):
    return pipe("layers", seeds=0, num_inference_steps=3, output_type="np").images


# ---------------------------------------------------------------------- merge-classes


def test_merged_table_gives_the_same_images(model, tmp_path, capsys):
    assert (
        main(["merge-classes", str(model / "model"), str(model / "vector.safetensors"), "--out", str(tmp_path / "all")])
        == 0
    )
    said = capsys.readouterr().out
    assert "4 classes, of which new: vector (3)" in said and "moved from 3 to 4" in said
    merged, pipe = ClassConditionalPipeline.from_pretrained(tmp_path / "all"), load(model, "vector")
    merged.set_progress_bar_config(disable=True)
    assert merged.labels == LabelSpace(("cat", "dog", "bird", "vector")) and merged.labels.null_id == 4
    a, b = (p.unet(X, T, torch.tensor(y)).sample for p, y in ((pipe, [0, 2, 4, 3]), (merged, [0, 2, 3, 4])))
    assert torch.equal(a, b)
    images = [sample(p, ["dog", "vector", "null"], guidance_scale=2.0) for p in (pipe, merged)]
    assert np.array_equal(*images)
    assert model_hash(merged.unet) != model_hash(pipe.unet)


def test_merged_pipeline_is_exported(model, tmp_path, capsys):
    merge_classes(model / "model", [str(model / "vector.safetensors")], tmp_path / "all")
    assert main(["export", str(tmp_path / "all"), "--to", "diffusers", str(tmp_path / "stock")]) == 0
    index = json.loads((tmp_path / "stock/model_index.json").read_text())
    assert index["id2label"]["3"] == "vector" and index["null_id"] == 4


@pytest.mark.parametrize("depth", ["sites", "layers"])
def test_other_depths_stay_files(model, tmp_path, depth):
    with pytest.raises(InputError, match=f"its class is of depth {depth}, which has a class vector for each site"):
        merge_classes(model / "model", [str(model / f"{depth}.safetensors")], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_merge_replaces_only_pipelines(model, tmp_path):
    files = [str(model / "vector.safetensors")]
    merge_classes(model / "model", files, tmp_path / "all")
    with pytest.raises(InputError, match="is there already"):
        merge_classes(model / "model", files, tmp_path / "all")
    merge_classes(model / "model", files, tmp_path / "all", overwrite=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="is no pipeline, so that it is not replaced"):
        merge_classes(model / "model", files, tmp_path / "other", overwrite=True)


def test_class_without_null_can_be_merged():
    pipe = ClassConditionalPipeline(
        tiny_unet(null_class=False), pipeline().scheduler, LabelSpace(("a", "b", "c"), has_null=False)
    )
    pipe.unet.add_class(LearnedClass("pug", torch.randn(1, pipe.unet.embedding.class_dim)))
    assert pipe.labels.parse("pug") == [3]
    merged = merged_pipeline(pipe)
    y = torch.tensor([0, 3, 2, 1])
    assert torch.equal(pipe.unet(X, T, y).sample, merged.unet(X, T, y).sample)
