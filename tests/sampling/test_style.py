"""Style vectors: sums, truncation, directions, against plain formulas; images of the shipped model."""

import json

import numpy as np
import pytest
import torch
from conftest import new_class, tiny_unet

from diffusion_adagn.cli.main import main
from diffusion_adagn.diffusion.process import flow
from diffusion_adagn.errors import InputError
from diffusion_adagn.labels import LabelSpace
from diffusion_adagn.sampling.load import open_pipeline
from diffusion_adagn.sampling.style import Style, along, example, find_directions

LABELS = LabelSpace(("cat", "dog", "truck", "semi - truck", "big, red"))


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    unet = tiny_unet(num_classes=5)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return unet


def parse(text, unet):
    return Style.parse(text, LABELS, unet.sites())


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for x, y in zip(a[name], b[name]):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("cat", {0: 1}),
        ("cat - dog + truck", {0: 1, 1: -1, 2: 1}),
        ("0.5*cat + 0.5 * dog", {0: 0.5, 1: 0.5}),
        ("id:3", {3: 1}),
        ("2*id:4 - id:3", {4: 2, 3: -1}),
        ("- cat + 2*dog", {0: -1, 1: 2}),
        ("cat - cat + dog", {0: 0, 1: 1}),
    ],
)
def test_sum_is_that_of_the_class_vectors(unet, text, weights):
    style = parse(text, unet)
    table = unet.embedding.classes.weight.detach()
    expected = sum(w * table[i] for i, w in weights.items())
    same(style.modulation(unet, 300), unet.modulation(300, class_vectors=expected[None]))
    assert style.class_id is None and style.name == " ".join(text.split())


def test_single_class_equals_its_label(unet):
    same(Style.of_class(2, LABELS).modulation(unet, 300), unet.modulation(300, torch.tensor([2])))


def test_expression_by_site(unet):
    m = parse("cat, 0.5*cat + 0.5*dog@fine", unet).modulation(unet, 10)
    table = unet.embedding.classes.weight.detach()
    cat, both = unet.modulation(10, torch.tensor([0])), unet.modulation(10, class_vectors=(table[:1] + table[1:2]) / 2)
    sides = [s.resolution for s in unet.sites()]
    fine = [s.name for s in unet.sites() if s.resolution**2 > min(sides) * max(sides)]
    assert fine and len(fine) < len(sides)
    same(m, {name: both[name] if name in fine else cat[name] for name in cat})


def test_truncation_moves_to_the_mean_class(unet):
    table = unet.embedding.classes.weight.detach()
    mean = table[:5].mean(0)  # without null
    style = parse("cat", unet)
    same(style.truncated(0).modulation(unet, 5), unet.modulation(5, class_vectors=mean[None]))
    same(style.truncated(1).modulation(unet, 5), style.modulation(unet, 5))
    some = unet.modulation(5, class_vectors=(mean + 1.5 * (table[0] - mean))[None])
    same(style.truncated(1.5).modulation(unet, 5), some)
    side = min(s.resolution for s in unet.sites())
    by_side = style.truncated(f"{side}:0,>{side}:1", unet.sites()).modulation(unet, 5)
    zero, one = style.truncated(0).modulation(unet, 5), style.modulation(unet, 5)
    same(by_side, {s.name: (zero if s.resolution == side else one)[s.name] for s in unet.sites()})


@pytest.mark.parametrize("of", ["class", "modulation"])
def test_directions_are_principal_components(unet, of):
    found = find_directions(unet, flow(), of)
    assert found.vectors.shape == (4, unet.embedding.class_dim) and found.scores.shape == (5, 4)
    assert found.share.sum() == pytest.approx(1) and (found.share.diff() <= 0).all()
    torch.testing.assert_close(found.scores.std(0, unbiased=False), torch.ones(4).double())
    table = unet.embedding.classes.weight.detach()[:5].double()
    # all directions together give every class vector
    torch.testing.assert_close(table.mean(0) + found.scores @ found.vectors.double(), table, rtol=1e-4, atol=1e-4)
    if of == "class":
        values, vectors = np.linalg.eigh(np.cov(table.numpy().T, bias=True))
        ours, theirs = found.vectors[0].double().numpy(), vectors[:, -1] * values[-1] ** 0.5
        assert abs(ours @ theirs) == pytest.approx(values[-1], rel=1e-4)
        assert found.share[0] == pytest.approx(values[-1] / values.sum(), rel=1e-6)
    low, high = found.ends(0, LABELS)
    assert len(low) == len(high) == 2 and not set(low) & set(high)


def test_moved_adds_the_direction(unet):
    found = find_directions(unet, flow())
    table = unet.embedding.classes.weight.detach()
    m = parse("cat", unet).moved(found.vectors[0], -2.0, "d1 -2").modulation(unet, 7)
    same(m, unet.modulation(7, class_vectors=(table[0] - 2 * found.vectors[0])[None]))


def test_text_names_directions(unet):
    vectors = find_directions(unet, flow()).vectors
    table = unet.embedding.classes.weight.detach()
    read = lambda text: Style.parse(text, LABELS, unet.sites(), lambda: vectors)  # noqa: E731
    text = along("cat - dog + truck", 2, -1.5)
    assert text == "cat - dog + truck - 1.5*direction:2" and along("cat", 2, 0) == "cat"
    moved = table[0] - table[1] + table[2] - 1.5 * vectors[1]
    same(read(text).modulation(unet, 7), unet.modulation(7, class_vectors=moved[None]))
    # a direction is added after truncation, and only to the sites of its expression
    side = min(s.resolution for s in unet.sites())
    m = read(f"cat, cat + direction:1 + 0.5*direction:3@{side}").truncated(0).modulation(unet, 7)
    mean = table[:5].mean(0)
    zero = unet.modulation(7, class_vectors=mean[None])
    shifted = unet.modulation(7, class_vectors=(mean + vectors[0] + 0.5 * vectors[2])[None])
    same(m, {s.name: (shifted if s.resolution == side else zero)[s.name] for s in unet.sites()})
    assert along("cat,dog@fine", 1, 2) == "cat + 2*direction:1,dog + 2*direction:1@fine"
    for wrong in ("direction:0", "direction:5", "direction:x", "direction:"):
        with pytest.raises(InputError, match="expected direction:1 to direction:4"):
            read(f"cat + {wrong}")


@pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c, d", "e"), ("a-b", "x@y", "1*2")])
def test_example_is_a_style(names):
    torch.manual_seed(0)
    unet, labels = tiny_unet(num_classes=len(names)), LabelSpace(names)
    Style.parse(example(labels), labels, unet.sites()).modulation(unet, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat + dog", "add up to 2. Expected 1"),
        ("cat - ", "class is missing"),
        ("cat - dgo + truck", "dgo"),
        ("cat-dog+truck", r"no class 'cat-dog\+truck'.* spaces around \+ and -"),
        ("cat@fine", "no expression covers"),
        ("cat, dog", "two expressions apply everywhere"),
        ("cat, dog@nowhere", "not a place"),
        ("cat, dog@64", "matches no site"),
        ("", "style"),
    ],
)
def test_wrong_expressions(unet, text, message):
    with pytest.raises(InputError, match=message):
        parse(text, unet)


@pytest.mark.parametrize("psi", ["", "x", "nan", "fine:x", "fine:"])
def test_wrong_truncation(unet, psi):
    with pytest.raises(InputError, match="psi: expected"):
        parse("cat", unet).truncated(psi, unet.sites())


def test_networks_without_class_vectors():
    with pytest.raises(InputError, match="two or more classes"):
        find_directions(tiny_unet(num_classes=None), flow())


def test_images_of_the_shipped_model():
    pipe, _ = open_pipeline("digits", "run")
    sites = pipe.unet.sites()
    pipe.set_progress_bar_config(disable=True)
    given = {"seeds": 3, "num_inference_steps": 4, "output_type": "np"}
    three = pipe("3", **given).images
    as_style = pipe(class_plan=Style.of_class(3, pipe.labels), **given).images
    np.testing.assert_allclose(three, as_style, atol=1e-5)
    all_styles = [Style.parse("0.5*3 + 0.5*8", pipe.labels, sites), Style.of_class(3, pipe.labels).truncated(0.5)]
    mixed = pipe(class_plan=all_styles, guidance_scale=2.0, **given).images
    assert mixed.shape == (2, 8, 8, 1) and not np.allclose(mixed[0], mixed[1], atol=0.01)


@pytest.mark.parametrize("depth", ["vector", "sites", "layers"])
def test_learned_class(depth):
    unet = tiny_unet()
    label = unet.add_class(new_class(unet, depth))
    labels = LabelSpace(("a", "b", "c")).with_learned("pug")
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    alone = unet(x, torch.tensor([300.0]), torch.tensor([label])).sample
    style = Style.parse("pug", labels, unet.sites())
    torch.testing.assert_close(unet.denoise(x, style.modulation(unet, 300.0)), alone, atol=1e-5, rtol=1e-5)
    mixed = Style.parse("pug - a + b, a@<=4", labels, unet.sites()).truncated(0.5)
    assert not torch.allclose(unet.denoise(x, mixed.modulation(unet, 300.0)), alone, atol=1e-4)


def test_sample_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample = ["sample", "digits", "--count", "1", "--steps", "2", "--device", "cpu"]
    assert main([*sample, "--classes", "3", "--style", "3 - 1 + 7", "--psi", "coarse:0.5", "--out", "a"]) == 0
    record = json.loads((tmp_path / "a/samples.json").read_text())
    assert [image["class_name"] for image in record["images"]] == ["3 psi coarse:0.5", "3 - 1 + 7 psi coarse:0.5"]
    assert {image["seed"] for image in record["images"]} == {0}  # from the same noise
    plan = record["plans"]["3 - 1 + 7 psi coarse:0.5"]
    assert plan["rules"] == [{"weights": {"3": 1.0, "1": -1.0, "7": 1.0}, "sites": ["*"]}]
    for wrong, message in (
        (["--psi", "0.5", "--mix", "3@coarse,8@fine"], "--psi truncates"),
        (["--style", "3 + 8"], "add up to 2"),
        (["--style", "3", "--interpolate", "3,8"], "leave out --classes, --mix and --style"),
        (["--psi", "much"], "psi: expected"),
    ):
        assert main([*sample, *wrong, "--out", "b"]) in (1, 2)
        assert message in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_style_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    style = ["style", "digits", "--steps", "1", "--classes", "3,8", "--device", "cpu"]
    assert main([*style, "--direction", "1", "--columns", "3", "--of", "modulation"]) == 0
    folder = tmp_path / "styles/pretrained/digits"
    record = json.loads((folder / "style.json").read_text())
    assert len(record["directions"]) == 9 and set(record["directions"][0]["scores"]) == set("0123456789")
    assert sorted(file.name for file in folder.iterdir()) == ["direction-1.png", "style.json"]
    assert "of the variance" in capsys.readouterr().out
    assert main([*style, "--psi", "0", "--psi", "8:0.5", "--out", "b"]) == 0
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["style.json", "truncation.png"]
    assert main([*style[:4], "--style", "0.5*3 + 0.5*8", "--count", "2", "--device", "cpu", "--out", "c"]) == 0
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == ["style.json", "styles.png"]
    assert main([*style, "--psi", "0.5", "--guidance", "2", "--out", "g"]) == 0
    assert json.loads((tmp_path / "g/style.json").read_text())["settings"]["scale"] == 2
    assert main([*style, "--direction", "10", "--out", "d"]) == 1
    assert "--direction 10 does not exist: 10 classes have 9 directions" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
