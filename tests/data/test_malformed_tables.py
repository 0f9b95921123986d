"""Invalid Parquet files of labelled images: an error that names the fault, or a counted skip, and no partial files."""

import re
from types import SimpleNamespace

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pytest

from malformed_data import image_rows, make_folders, make_special, make_table, message, opened  # isort: skip
from malformed_data import pixels, png, rejection  # isort: skip

from diffusion_adagn.data.tables import ParquetTable
from diffusion_adagn.errors import InputError


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


def test_misspelt_columns_get_suggestions(tmp_path):
    file = make_table(tmp_path / "p.parquet", [0, 1])
    text = rejection(file, image_column="imgae")
    assert "no column 'imgae' (data.image_column). Nearest: image. Its columns: image, label." in text
    assert "(data.label_column). Nearest: label." in rejection(file, label_column="Label")
    text = rejection(file, label_column="zzz")
    assert "Its columns" in text and "Nearest" not in text
    make_table(file, [0], image=[{"path": "a.png"}])  # a struct without bytes
    assert "no known image column" in rejection(file)
    assert "column 'image'" in rejection(file, image_column="image")


NAMES = ["ant", "bee"]
LABELS = [
    ([0.0, float("nan")], "column 'label' of .* contains float64"), ([float("nan")] * 2, "contains float64"),
    ([None, None], "contains null"), (["a", None], "row 1: label None"), (["a", ""], "an empty name"),
    (["red ant", "red  ant"], r"class names of .* \(column 'label'\).*'red ant'"), ([b"a", b"b"], "contains binary"),
    ([{"x": 1}, {"x": 2}], "contains several values"), ([-3, -4], "row 0: label -3"),
]  # fmt: skip
NAMED_LABELS = [
    ([0, 5], r":train.*row 1: label 5 in column 'label' is not among the 2 classes \(ant, bee\)"),
    ([0, -7], ":train.*row 1: label -7 in column 'label'"), ([0, 2**40], ":train.*row 1: label 1099511627776"),
    (pa.array([None, 1], pa.int64()), ":train.*row 0: label None in column 'label'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "words", "names"),  # the names are in the metadata; only whole numbers can have names
    [(*case, None) for case in LABELS] + [(*case, NAMES) for case in LABELS + NAMED_LABELS],
)
def test_invalid_labels_are_rejected(tmp_path, labels, words, names):
    file = make_table(tmp_path / "p.parquet", labels, names)
    assert re.search(words.replace(":train", f"{file}:train"), rejection(file))


def test_names_in_tables_are_checked(tmp_path):
    file = tmp_path / "p.parquet"
    text = rejection(make_table(file, [0, 1], ["ant", "ant"]))
    assert str(file) in text and "duplicated" in text
    assert "p.parquet" in rejection(make_table(file, pa.array([b"ok", b"\xff\xfe"]).view(pa.string())))  # not UTF-8
    for values, names in ((["bee", "ant", "bee"], ("ant", "bee")), ([1, 0, 1], ("0", "1"))):  # categories of pandas
        data = opened(make_table(tmp_path / f"{names[0]}.parquet", pa.array(values).dictionary_encode()))
        assert (data.label_space.names, data.labels.tolist()) == (names, [1, 0, 1])


@pytest.mark.parametrize(("image", "reason"), [
    (None, "it is empty"), ((None, None), "it is empty"), ((b"", ""), "it is empty"), ((None, "loop.png"), "loop"),
    ((b"no image", None), "not an image"), ((None, "absent.png"), "No such file"), ((None, "."), "not a file"),
    ((None, "../secret.png"), "outside"), ((None, "sub/../../secret.png"), "outside"), ((None, "ABSOLUTE"), "outside"),
    ((None, "link.png"), "outside"), ((None, "a\0b"), "null"), ((None, "https://example.com/x.png"), "No such file"),
])  # fmt: skip
def test_rows_with_invalid_images_or_paths(tmp_path, image, reason):
    """secret.png is a valid image: it would be read if its path were followed. image: its bytes and path."""
    (tmp_path / "secret.png").write_bytes(png())
    if image:
        content, path = image
        image = {"bytes": content, "path": str(tmp_path / "secret.png") if path == "ABSOLUTE" else path}
    rows = [*image_rows(1), image, *image_rows(1)]
    file = make_table(tmp_path / "p" / "train.parquet", [0, 1, 1], image=rows)
    (tmp_path / "p" / "link.png").symlink_to("../secret.png")
    (tmp_path / "p" / "loop.png").symlink_to("loop.png")
    assert re.search(f"broken image train.parquet, row 1 .*{reason}", rejection(file.parent))
    data = opened(file, skip_broken=True)
    assert (len(data), len(data.skipped)) == (2, 1) and reason in data.skipped[0]


def test_paths_inside_the_parquet_folder_work(tmp_path, monkeypatch):
    make_folders(tmp_path / "p" / "files")
    rows = [{"bytes": None, "path": f"files/ant/{i:03}.png"} for i in range(2)]
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    make_table(tmp_path / "p" / "train.parquet", [0, 1], image=image)
    monkeypatch.chdir("/")
    assert np.array_equal(opened(tmp_path / "p").gather([1])[0][0], pixels(1))


def test_hub_paths_outside_cache_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "secret.png").write_bytes(png())
    paths = [make_folders(tmp_path / "hub", ("ant",)) / "ant" / "001.png", tmp_path / "secret.png"]
    rows = {"image": [{"bytes": None, "path": str(p)} for p in paths], "label": [0, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict(rows, features=features)
    builder = SimpleNamespace(config=SimpleNamespace(data_files=None), info=SimpleNamespace(features=table.features))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train"])
    text = rejection("some/one")
    assert "secret.png" in text and "outside" in text
    data = opened("some/one", skip_broken=True)
    assert len(data.skipped) == 1 and np.array_equal(data.gather([0])[0][0], pixels(1))


@pytest.mark.parametrize("kind", ["empty", "pipe", "folder", "dangling", "text"])
def test_files_that_are_not_parquet(tmp_path, kind):
    (tmp_path / "p").mkdir()
    if kind in ("empty", "text"):
        (tmp_path / "p" / "train.parquet").write_text("image,label\n" if kind == "text" else "")
    else:
        make_special(tmp_path / "p" / "train.parquet", kind)
    assert re.search(rf"train\.parquet|data\.source {tmp_path / 'p'} cannot be read", rejection(tmp_path / "p"))


def test_corrupted_parquet_bytes_are_handled(tmp_path):
    """Each corrupted copy is read, or rejected with a message of one line."""
    raw = make_table(tmp_path / "good.parquet", ["ä", "b", "c"]).read_bytes()
    path, random = tmp_path / "p.parquet", np.random.default_rng(0)
    for position in random.integers(0, len(raw), 60):
        corrupted = bytearray(raw)
        corrupted[position] ^= int(random.integers(1, 256))
        path.write_bytes(corrupted)
        try:
            assert opened(path, skip_broken=True).labels.shape[0] <= 3
        except InputError as error:
            assert "\n" not in str(error)
    for cut in range(0, len(raw), max(1, len(raw) // 15)):
        path.write_bytes(raw[:cut])
        assert "p.parquet" in message(path)


def test_missing_images_never_shift_labels(tmp_path, monkeypatch):
    """As in a corrupted file: images after a gap would get the labels of others."""
    for i in range(2):
        make_table(tmp_path / "p" / f"train-{i}.parquet", [0, 1, 2], image=image_rows(3, 3 * i))
    batches = ParquetTable.batches
    short = lambda *a: ((file, rows[1:] if "-0" in file else rows) for file, rows in batches(*a))  # noqa: E731
    monkeypatch.setattr(ParquetTable, "batches", short)
    for skip in (False, True):
        assert "6 rows in column 'label', but 5 in column 'image'" in rejection(tmp_path / "p", skip_broken=skip)


def test_invalid_column_descriptions(tmp_path):
    for text in ("{no json", '{"info": {"features": {"label": {"_type": "Nothing"}}}}', "[]", '{"info": 3}'):
        file = make_table(tmp_path / "p.parquet", [0, 1], metadata={"huggingface": text})
        try:
            assert opened(file).labels.tolist() == [0, 1]
        except InputError as error:
            assert "p.parquet" in str(error)


def test_files_and_splits_must_match(tmp_path):
    first, second = (tmp_path / "p" / f"train-{i}.parquet" for i in (0, 1))
    make_table(first, [0, 1], ["ant", "bee"])
    make_table(second, [0, 1], image=None, photo=image_rows(2))
    assert f"{second} has the columns label, photo, but train-0.parquet image, label" in rejection(tmp_path / "p")
    make_table(second, ["ant", "bee"])
    assert re.search(f"{second} has.*in column 'label'", rejection(tmp_path / "p"))
    make_table(second, [0, 1], ["bee", "ant"])  # the same numbers mean other classes
    assert "in column 'label'" in rejection(tmp_path / "p")
    make_table(second, [0, 1], image=[1, 2])
    make_table(first, [0, 1])
    assert re.search(f"{second} has.*in column 'image'", rejection(tmp_path / "p"))
    train, test = (tmp_path / "q" / f"{split}.parquet" for split in ("train", "test"))
    make_table(train, [0, 1], ["ant", "bee"])
    make_table(test, [0, 1], ["bee", "ant"])
    text = rejection(tmp_path / "q", "heldout")
    assert "the classes bee, ant in 'test', but the classes ant, bee in 'train'" in text
    make_table(test, ["ant", "bee"])
    assert "contains names in 'test'" in rejection(tmp_path / "q", "heldout")
    make_table(train, None, image=image_rows(2), other=[0, 1])
    assert re.search(r"q:train has no column 'label'", rejection(tmp_path / "q", "heldout"))
    make_table(train, [0, 1])
    make_table(test, pa.array([], pa.int64()), image=pa.array([], pa.binary()))
    assert re.search("the split 'test'.*no rows", rejection(tmp_path / "q", "heldout"))
