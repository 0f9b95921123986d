import io
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffusion_adagn.config import DataConfig
from diffusion_adagn.data import open_dataset
from diffusion_adagn.data.class_lists import imagenet_classes
from diffusion_adagn.data.classes import to_label_space
from diffusion_adagn.errors import InputError
from diffusion_adagn.labels import LabelSpace

CLASSES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def pixels(seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def make_folders(root, classes=CLASSES, each=4, start=0):
    seeds = itertools.count(start)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i}.png").write_bytes(png(pixels(next(seeds))))
    return root


def make_parquet(path, images, labels, features=None, **columns):
    import datasets

    names = {"image": [{"bytes": p, "path": None} for p in images], "label": labels, **columns}
    default = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    features = default if features is None else features
    table = datasets.Dataset.from_dict(names, features=datasets.Features(features) if features else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)
    return path


def opened(source, part=None, **settings):
    return open_dataset(DataConfig(source=str(source), **settings), part, progress=False)


# ---------------------------------------------------------------------- digits, splits


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits = load_digits()
    parts = [opened("digits"), opened("digits:heldout")]
    assert [len(p) for p in parts] == [1707, 90]
    assert (parts[0].image_size, parts[0].channels, parts[0].label_space.names) == (8, 1, tuple("0123456789"))
    for part in parts:
        images, labels = part.gather(np.arange(len(part)))
        assert np.array_equal(labels, digits.target[part.indices])
        exact = digits.images[part.indices] * 255 / 16
        assert np.abs(images[..., 0] - exact).max() <= 0.5
        assert images.dtype == np.uint8 and labels.dtype == np.int64
    assert sorted(np.concatenate([p.indices for p in parts])) == list(range(1797))


@pytest.mark.parametrize("word", ["heldout", "test", "val", "validation", "valid"])
def test_names_of_the_held_out_part(word):
    assert opened(f"digits:{word}").fingerprint == opened("digits", "heldout").fingerprint
    with pytest.raises(InputError, match="held-out part"):
        opened(f"digits:{word}", "train")


def test_train_and_none_are_the_same_part():
    assert opened("digits").fingerprint == opened("digits", "train").fingerprint == opened("digits:train").fingerprint


def test_unknown_split_lists_what_exists(tmp_path):
    with pytest.raises(InputError, match=r"no split 'tset'.*It has: train"):
        opened("digits:tset")
    make_folders(tmp_path / "d" / "train"), make_folders(tmp_path / "d" / "val")
    with pytest.raises(InputError, match="It has: train, val"):
        opened(tmp_path / "d:tset")


@pytest.mark.parametrize("source", ["", ":train", "digits:"])
def test_empty_source_is_rejected(source):
    with pytest.raises(InputError, match="NAME_OR_PATH"):
        opened(source)


def test_heldout_fraction(tmp_path):
    root = make_folders(tmp_path / "d")
    for fraction, count in [(0.05, 1), (0.25, 3), (0.5, 6)]:
        train, heldout = (opened(root, p, heldout_fraction=fraction) for p in ("train", "heldout"))
        assert (len(train), len(heldout)) == (12 - count, count)
        assert not set(train.indices) & set(heldout.indices)
        assert train.counts().min() > 0
    assert len(opened(root, heldout_fraction=0.0)) == 12
    with pytest.raises(InputError, match=r"heldout_fraction is 0, .*Set data.heldout_fraction"):
        opened(root, "heldout", heldout_fraction=0.0)


def test_test_split_precedes_validation(tmp_path):
    for i, split in enumerate(("train", "val", "test")):
        make_folders(tmp_path / "d" / split, start=100 * i)
    root = tmp_path / "d"
    assert opened(root, "heldout").name.endswith(":test")
    assert opened(f"{root}:validation").name.endswith(":val")
    assert len(opened(root)) == 12  # nothing is held out
    assert len(opened(f"{root}:test")) == 12
    assert opened(f"{root}:test", "heldout").name.endswith(":val")
    assert opened(f"{root}:heldout").fingerprint == opened(f"{root}:test").fingerprint


# ---------------------------------------------------------------------- class folders


def test_nested_folders_and_unusual_names(tmp_path):
    root = make_folders(tmp_path / "my images", classes=("b ü", "a"), each=1)
    (root / "a" / "deep" / "er").mkdir(parents=True)
    (root / "a" / "deep" / "er" / "ж 1.JPeG").write_bytes(png(pixels(7)))  # a PNG under a wrong name
    (root / "a" / "notes.txt").write_text("not an image")
    (root / "a" / ".hidden.png").write_bytes(b"")
    (root / ".git").mkdir()
    (root / "readme.md").write_text("-")
    data = opened(root, heldout_fraction=0.0)
    assert data.label_space.names == ("a", "b ü")
    assert data.counts().tolist() == [2, 1]
    assert np.array_equal(data.gather([1])[0][0], pixels(7))


def test_path_with_a_colon(tmp_path):
    root = make_folders(tmp_path / "run:3")
    assert opened(root).name == f"{root}:train"
    assert opened(f"{root}:heldout").name == f"{root}:heldout"


def test_class_named_train(tmp_path):
    root = make_folders(tmp_path / "d", classes=("bus", "train"))
    assert opened(root).label_space.names == ("bus", "train")


def test_wordnet_folders_get_names(tmp_path):
    root = make_folders(tmp_path / "d", classes=("n01443537", "n01440764", "n99999999"))
    space = opened(root, classes="tench,wnid:n01443537").label_space
    assert space.wnids == ("n01440764", "n01443537")
    assert space.names == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    assert opened(root).label_space.names[2] == "n99999999"
    make_folders(tmp_path / "e", classes=("n01443537", "other"))
    assert opened(tmp_path / "e").label_space.wnids == ()


def test_empty_class_folder_is_rejected(tmp_path):
    root = make_folders(tmp_path / "d")
    (root / "dog").mkdir()
    with pytest.raises(InputError, match=r"no image of 1 of its 4 classes: dog\. Add images"):
        opened(root)


@pytest.mark.parametrize("loose", [True, False])
def test_error_shows_expected_folder_layout(tmp_path, loose):
    (tmp_path / "d").mkdir()
    if loose:
        (tmp_path / "d" / "1.png").write_bytes(png(pixels(0)))
    with pytest.raises(InputError, match=r"CLASS/image\.png"):
        opened(tmp_path / "d")


def test_test_split_may_not_add_classes(tmp_path):
    root = tmp_path / "d"
    make_folders(root / "train"), make_folders(root / "test", classes=("cow",))
    heldout = opened(root, "heldout")
    assert heldout.labels.tolist() == [2] * 4
    assert heldout.counts().tolist() == [0, 0, 4]
    make_folders(root / "test", classes=("yak",))
    with pytest.raises(InputError, match="missing in train/: yak"):
        opened(root, "heldout")


# ---------------------------------------------------------------------- subsets


@pytest.mark.parametrize("classes", ["cow,ant", "2,0", "id:2,name:ant"])
def test_subset_in_given_order(tmp_path, classes):
    root = make_folders(tmp_path / "d")
    whole, subset = opened(root, heldout_fraction=0.0), opened(root, classes=classes, heldout_fraction=0.0)
    assert (subset.label_space.names, subset.label_space.original_ids) == (("cow", "ant"), (2, 0))
    images, labels = subset.gather(np.arange(8))
    assert np.array_equal(images[labels == 0], whole.gather(np.flatnonzero(whole.labels == 2))[0])
    assert np.array_equal(images[labels == 1], whole.gather(np.flatnonzero(whole.labels == 0))[0])


def test_subset_from_a_text_file(tmp_path):
    root = make_folders(tmp_path / "d", classes=("n01443537", "n01440764"))
    names = tmp_path / "classes.txt"
    names.write_text("# fish\n\ngoldfish, Carassius auratus\n  n01440764 \n", encoding="utf-8")
    assert opened(root, classes=str(names)).label_space.wnids == ("n01443537", "n01440764")
    names.write_text("n01440764\n")  # other lines in the same file need another store
    assert opened(root, classes=str(names)).label_space.wnids == ("n01440764",)
    for text, wrong in [("tench\nshark\n", "line 2: there is no class 'shark'"), ("tench, goldfish", "one class per line"),
                        ("# none\n", "lists no class")]:  # fmt: skip
        names.write_text(text)
        with pytest.raises(InputError, match=wrong):
            opened(root, classes=str(names))
    with pytest.raises(InputError, match="cannot be read"):
        opened(root, classes=str(tmp_path / "absent.txt"))


@pytest.mark.parametrize(("classes", "wrong"), [("null", "null"), ("cwo", "Nearest: 'cow'"), ("7", "does not exist"), ("cow,cow", "once")])  # fmt: skip
def test_invalid_subsets(tmp_path, classes, wrong):
    with pytest.raises(InputError, match=wrong):
        opened(make_folders(tmp_path / "d"), classes=classes)


# ---------------------------------------------------------------------- parquet


def test_parquet_equals_class_folders(tmp_path):
    root = make_folders(tmp_path / "d")
    images = [(root / c / f"{i}.png").read_bytes() for c in CLASSES for i in range(4)]
    file = make_parquet(tmp_path / "p" / "train-00000.parquet", images, [i // 4 for i in range(12)])
    assert opened(file.parent).fingerprint == opened(root).fingerprint == opened(file).fingerprint


def test_parquet_splits_come_from_file_names(tmp_path):
    for i, name in enumerate(("data/train-0-of-2", "data/train-1-of-2", "data/validation-0", "data/test-0")):
        make_parquet(tmp_path / "p" / f"{name}.parquet", [png(pixels(9 * i + j)) for j in range(3)], [0, 1, 2])
    data = opened(tmp_path / "p")
    assert len(data) == 6
    assert np.array_equal(data.gather([5])[0][0], pixels(11))
    assert opened(tmp_path / "p", "heldout").name.endswith(":test")
    assert np.array_equal(opened(f"{tmp_path / 'p'}:val").gather([0])[0][0], pixels(18))


def test_unlabelled_test_split_uses_validation(tmp_path):
    for name, labels in (("train", [0, 1, 2]), ("validation", [0, 1, 2]), ("test", [-1, -1, -1])):
        make_parquet(tmp_path / "p" / f"{name}.parquet", [png(pixels(i)) for i in range(3)], labels)
    assert opened(tmp_path / "p", "heldout").name.endswith(":validation")
    with pytest.raises(InputError, match=r"'test' .* has no labels"):
        opened(f"{tmp_path / 'p'}:test")


@pytest.mark.parametrize(
    ("labels", "feature", "names", "ids"),
    [([0, 2, 1], "int64", ("0", "1", "2"), [0, 2, 1]), (["yak", "ant", "yak"], "string", ("ant", "yak"), [1, 0, 1])],
)
def test_labels_without_names(tmp_path, labels, feature, names, ids):
    import datasets

    features = {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
    features["label"] = datasets.Value(feature)
    file = make_parquet(tmp_path / "p.parquet", [png(pixels(i)) for i in range(3)], labels, features)
    data = opened(file, heldout_fraction=0.0)
    assert (data.label_space.names, data.labels.tolist()) == (names, ids)


def test_chosen_columns_and_fine_labels(tmp_path):
    import datasets

    label_features = {
        c: datasets.ClassLabel(names=[f"{c}{i}" for i in range(3)]) for c in ("coarse_label", "fine_label")
    }
    features = {"photo": datasets.Image(), "image": datasets.Image(), **label_features}
    columns = {
        c: [{"bytes": png(pixels(i + start)), "path": None} for i in range(3)]
        for start, c in ((50, "photo"), (0, "image"))
    }
    path = tmp_path / "p.parquet"
    datasets.Dataset.from_dict(
        {**columns, "coarse_label": [0, 1, 2], "fine_label": [2, 1, 0]}, features=datasets.Features(features)
    ).to_parquet(path)
    data = opened(path, heldout_fraction=0.0)
    assert data.label_space.names[0] == "fine_label0"
    assert np.array_equal(data.gather([0])[0][0], pixels(50))
    data = opened(path, heldout_fraction=0.0, image_column="image", label_column="coarse_label")
    assert data.label_space.names[0] == "coarse_label0"
    assert np.array_equal(data.gather([0])[0][0], pixels(0))
    with pytest.raises(InputError, match=r"no column 'img' \(data.image_column\).*photo, image, coarse_label"):
        opened(path, image_column="img")
    with pytest.raises(InputError, match=r"column 'photo'.*labels are whole numbers or names"):
        opened(path, label_column="photo")
    with pytest.raises(InputError, match=r"column 'fine_label' .*contains no images"):
        opened(path, image_column="fine_label")


@pytest.mark.parametrize(("labels", "feature"), [([0.5, 1.0], "float64"), ([0, 10**9], "int64"), ([[0], [1]], "list")])
def test_labels_that_are_not_class_ids(tmp_path, labels, feature):
    import datasets

    label_feature = datasets.List(datasets.Value("int64")) if feature == "list" else datasets.Value(feature)
    features = {"image": datasets.Image(), "label": label_feature}
    file = make_parquet(tmp_path / "p.parquet", [png(pixels(i)) for i in range(2)], labels, features)
    with pytest.raises(InputError, match=r"column 'label' .*Set data\.label_column"):
        opened(file)


def test_missing_columns_list_existing_columns(tmp_path):
    import datasets

    path = tmp_path / "p.parquet"
    datasets.Dataset.from_dict({"text": ["a"], "score": [1]}).to_parquet(path)
    with pytest.raises(InputError, match=r"no known image column.*text, score.*data\.image_column"):
        opened(path)


@pytest.mark.parametrize("bad", [3, -1, None])
def test_labels_out_of_range_name_the_row(tmp_path, bad):
    import datasets

    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    make_parquet(tmp_path / "p" / "train.parquet", [png(pixels(i)) for i in range(3)], [0, 1, 2], features)
    make_parquet(tmp_path / "p" / "test.parquet", [png(pixels(i)) for i in range(3)], [0, bad, 2], features)
    with pytest.raises(InputError, match=rf"row 1: label {bad} in column 'label'"):
        opened(tmp_path / "p", "heldout")


def test_training_rejects_classes_without_images(tmp_path):
    for name in ("train", "test"):
        make_parquet(tmp_path / "p" / f"{name}.parquet", [png(pixels(i)) for i in range(2)], [0, 2])
    with pytest.raises(InputError, match=r"no image of 1 of its 3 classes: bee.*data\.classes"):
        opened(tmp_path / "p")
    assert opened(tmp_path / "p", classes="cow,ant").labels.tolist() == [1, 0]
    assert opened(tmp_path / "p", "heldout").counts().tolist() == [1, 0, 1]


def test_corrupted_parquet_is_named(tmp_path):
    path = make_parquet(tmp_path / "p.parquet", [png(pixels(i, 32)) for i in range(30)], [0, 1, 2] * 10)
    whole = path.read_bytes()
    for raw in (whole[:500], b"PAR1" + b"\0" * 8000 + whole[8004:]):
        path.write_bytes(raw)
        with pytest.raises(InputError, match=r"p\.parquet cannot be read as parquet"):
            opened(path)


# ---------------------------------------------------------------------- the hub


def test_hub_data_sets_through_datasets(tmp_path, monkeypatch):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=list(CLASSES))})
    seen = []

    def load_dataset(name, split):
        seen.append(f"{name}:{split}")
        rows = {"img": [{"bytes": png(pixels(i)), "path": None} for i in range(6)], "fine_label": [0, 1, 2] * 2}
        return datasets.Dataset.from_dict(rows, features=features)

    def builder(name):
        return SimpleNamespace(config=SimpleNamespace(data_files=None), info=SimpleNamespace(features=features))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "test"])
    for source, hub in (
        ("cifar10", "uoft-cs/cifar10:train"),
        ("cifar100:test", "uoft-cs/cifar100:test"),
        ("someone/pets", "someone/pets:train"),
    ):
        data = opened(source)
        assert data.labels.tolist() == [0, 1, 2] * 2
        assert np.array_equal(data.gather([4])[0][0], pixels(4))
        assert seen[-1] == hub
    assert len(seen) == 3  # only the requested split
    count = len(seen)
    assert len(opened("someone/pets")) == 6 and len(opened("cifar10")) == 6
    assert len(seen) == count  # cached: the hub is not asked again, not even for the splits
    with pytest.raises(InputError, match="It has: train, test"):
        opened("someone/pets:extra")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("cifra10", "Did you mean cifar10"),
        ("digit", "Did you mean digits"),
        ("no-one/none", "^there is no folder no-one/none, .* the Hugging Face hub.*path"),
        ("/no/such/folder", "no such path"),
        ("./here", "no such path"),
        ("a.parquet", "no such path"),
    ],
)
def test_unknown_names_and_paths(source, message):
    with pytest.raises(InputError, match=message) as error:
        opened(source)
    assert "\n" not in str(error.value)


def test_misspelt_path_and_plain_file(tmp_path):
    make_folders(tmp_path / "images")
    with pytest.raises(InputError, match=r"Did you mean .*/images\?"):
        opened(tmp_path / "image")
    (tmp_path / "a.txt").write_text("-")
    with pytest.raises(InputError, match=r"a\.txt is a file"):
        opened(tmp_path / "a.txt")


# ---------------------------------------------------------------------- names


def test_imagenet_table():
    table = imagenet_classes()
    assert len(table) == 1000
    assert list(table) == sorted(table)
    space = LabelSpace(tuple(table.values()), wnids=tuple(table))
    known = {
        "tench": 0,
        "goldfish": 1,
        "English springer": 217,
        "cassette player": 482,
        "golf ball": 574,
        "toilet tissue": 999,
    }
    assert {name: space.parse([name])[0] for name in known} == known
    assert space.wnids[217] == "n02102040"


def test_hub_imagenet_gets_wordnet_ids():
    table = imagenet_classes()
    names = list(table.values())
    names[134] = names[517] = "crane"  # as on the hub, which uses one name for both
    space = to_label_space(names)
    assert space.wnids == tuple(table)
    assert space.parse("n01440764,wnid:n01443537") == [0, 1]
    assert to_label_space([f"thing {i}" for i in range(1000)]).wnids == ()


def test_importing_is_light():
    code = "import sys, diffusion_adagn.data; print({'torch', 'datasets', 'pyarrow', 'sklearn'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True)
    assert run.stdout.strip() == "set()"
