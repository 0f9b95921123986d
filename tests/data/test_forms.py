"""Labelled images in several forms: a torch DataLoader, tables of labels, CIFAR's own files, lists of classes."""

import collections
import io
import json
import os
import pickle
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from diffusion_adagn import open_dataset
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import DataConfig, RunConfig, as_config
from diffusion_adagn.data import ImageDataset, decode, sources, tables
from diffusion_adagn.data.cifar_pickles import load_plain
from diffusion_adagn.data.class_lists import NAMES, class_list, imagenet_classes
from diffusion_adagn.data.classes import class_ids
from diffusion_adagn.data.find import find_source
from diffusion_adagn.data.inspect import inspect_dataset
from diffusion_adagn.data.rng import BalancedOrder
from diffusion_adagn.data.store import NothingHeldOut, split_off
from diffusion_adagn.errors import InputError
from diffusion_adagn.labels import LabelSpace
from diffusion_adagn.training.train import train


@pytest.fixture(autouse=True)
def _working_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)


def png(seed: int, size: int = 8, gray: bool = False) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., :1].repeat(3, 2) if gray else pixels).save(file, "PNG")
    return file.getvalue()


def folders(root: str, counts: dict[str, int], **options) -> Path:
    for class_id, (name, count) in enumerate(counts.items()):
        Path(root, name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Path(root, name, f"{i:03}.png").write_bytes(png(100 * class_id + i, **options))
    return Path(root)


def opened(source, part=None, **settings):
    return open_dataset({"source": source, **settings}, part, progress=False)


# ---------------------------------------------------------------------- torch


def test_items_are_network_inputs_and_labels():
    data = opened("digits")
    image, label = data[5]
    pixels, labels = data.gather([5])
    assert (image.dtype, image.shape, type(label)) == (torch.float32, (1, 8, 8), int)
    assert torch.equal(image[0], torch.from_numpy(pixels[0, :, :, 0]).float() / 127.5 - 1) and label == labels[0]
    assert torch.equal(data[-1][0], data[len(data) - 1][0]) and torch.equal(data[torch.tensor(5)][0], image)
    for wrong in (len(data), -len(data) - 1):
        with pytest.raises(IndexError):
            data[wrong]
    with pytest.raises(TypeError):
        data[0:3]


def test_pickled_data_set_contains_no_pixels(tmp_path):
    data = opened(folders("own", {"ant": 30, "bee": 10}, size=64))
    content = pickle.dumps(data)
    assert len(content) < 4000 < data.images.nbytes
    again = pickle.loads(content)
    assert isinstance(again.images.base, np.memmap)
    assert torch.equal(again[7][0], data[7][0]) and again.counts().tolist() == data.counts().tolist()


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_with_two_workers(start):
    data = opened("digits")
    batches = list(DataLoader(data, batch_size=100, num_workers=2, multiprocessing_context=start))
    assert sum(len(labels) for _, labels in batches) == len(data)
    images, labels = batches[3]
    assert (images.shape, images.dtype, labels.dtype) == ((100, 1, 8, 8), torch.float32, torch.int64)
    assert torch.equal(images[2], data[302][0]) and labels[2] == data.labels[302]


def test_data_sets_can_be_concatenated():
    data = opened("digits")
    assert isinstance(data, Dataset) and len(data + data) == 2 * len(data)
    assert torch.equal((data + data)[len(data) + 3][0], data[3][0])


def test_data_loader_without_workers():
    images, labels = next(iter(DataLoader(opened("digits"), batch_size=7, shuffle=True)))
    assert images.shape == (7, 1, 8, 8) and labels.shape == (7,)


# ---------------------------------------------------------------------- arguments


def test_open_dataset_arguments(tmp_path):
    root = folders("own", {"ant": 4, "bee": 4})
    Path("my.yaml").write_text("data:\n  source: own\n  classes: bee\n")
    run = RunConfig(data=DataConfig(source="own"))
    for config_like in (
        "own",
        root,
        {"source": root},
        {"data": {"source": "own"}},
        {"data.source": "own"},
        run,
        run.data,
    ):
        assert open_dataset(config_like, progress=False).label_space.names == ("ant", "bee")
    assert open_dataset("my.yaml", progress=False).label_space.names == ("bee",)
    assert len(open_dataset("digits", progress=False)) == 1707
    with pytest.raises(InputError, match=r"there is no setting 'data.sauce' .*data.source"):
        open_dataset({"sauce": "own"})
    with pytest.raises(InputError, match=r"data.image_size: expected a whole number, got 'big'"):
        open_dataset({"source": "own", "image_size": "big"})


def test_train_arguments(tmp_path):
    assert as_config("digits").output_dir == as_config(Path("digits")).output_dir == "runs/digits"
    settings = {"data": {"source": "x"}, "training.max_steps": 3, "model": {"channel_mult": (1, 2)}}
    config = as_config(settings)
    assert (config.data.source, config.training.max_steps, config.model.channel_mult) == ("x", 3, (1, 2))
    assert as_config(config) is config
    for given in (5, ["digits"]):
        with pytest.raises(InputError, match="a config is a YAML file or the name of a recipe"):
            as_config(given)
    with pytest.raises(InputError, match="where should the run go"):
        train({"data": {"source": "digits"}})
    with pytest.raises(InputError, match="no recipe of that name"):
        train("digitz")


def test_label_space_from_plain_list():
    assert LabelSpace.from_dict(["cat", "dog"]) == LabelSpace(("cat", "dog"))
    with pytest.raises(InputError, match="must be unique"):
        LabelSpace.from_dict(["a"] * 10)


# ---------------------------------------------------------------------- held out


def test_random_hold_out_is_unchanged():
    """The images held out before the setting `heldout_split` existed: older runs must resume."""
    assert split_off(np.arange(40) % 7, 0.1)[1].tolist() == [4, 11, 15, 18]


def test_single_image_classes_remain_in_training(capsys):
    pair = folders("pair", {"a": 1, "b": 1})
    data = open_dataset(pair, "train")
    assert data.counts().tolist() == [1, 1] and "nothing is held out" in capsys.readouterr().err
    with pytest.raises(NothingHeldOut, match="one image per class"):
        open_dataset(pair, "heldout")
    assert "held out     none, since every class" in inspect_dataset(DataConfig("pair"), Path("sheet.png"))


def test_stratified_fraction_of_each_class():
    labels = np.repeat([0, 1, 2, 3, 4], [100, 40, 10, 9, 1])
    train, heldout = split_off(labels, 0.05, stratified=True)
    assert np.bincount(labels[heldout], minlength=5).tolist() == [5, 2, 1, 0, 0]
    assert sorted([*train, *heldout]) == list(range(160))
    assert np.array_equal(heldout, split_off(labels, 0.05, stratified=True)[1])
    half = split_off(np.array([0, 0, 1]), 0.5, stratified=True)[1]
    assert len(half) == 1 and half[0] < 2  # one image of each class remains in training
    assert opened(folders("own", {"a": 60, "b": 10}), "heldout", heldout_split="stratified").counts().tolist() == [3, 1]


def test_empty_class_stops_training_not_inspect(capsys):
    folders("own", {"ant": 4, "bee": 0})
    with pytest.raises(InputError, match=r"no image of 1 of its 2 classes: bee\. Add images .*data\.classes"):
        open_dataset("own", "train", progress=False)
    assert not list(Path("store").iterdir())  # nothing was decoded
    assert main(["data", "inspect", "own"]) == 0
    message = capsys.readouterr().out
    assert "some are empty" in message and "but these have none: bee" in message and "--dry_run" not in message
    assert opened("own", classes="ant").label_space.names == ("ant",)


def test_validation_copy_is_held_out():
    for part in ("train", "val"):
        folders(f"own/{part}", {"ant": 3})
    assert "held out     own:val, 3 images" in inspect_dataset(DataConfig("own"), Path("sheet.png"))


# ---------------------------------------------------------------------- balanced drawing


def test_balanced_order_draws_classes_equally_often():
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    order = BalancedOrder(labels, seed=3)
    drawn = order(torch.arange(9000))
    counts = np.bincount(labels[drawn], minlength=3)
    assert np.abs(counts - 3000).max() < 200
    for k, size in enumerate((900, 90, 10)):  # each class goes through permutations of its images
        draws = drawn[torch.from_numpy(labels[drawn] == k)]
        epochs = draws[: len(draws) // size * size].reshape(-1, size)
        assert all(len(set(row.tolist())) == size for row in epochs) and not torch.equal(epochs[0], epochs[1])


def test_balanced_order_is_a_function_of_position(monkeypatch):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [50, 9, 1]))
    monkeypatch.setattr(BalancedOrder, "BLOCK", 64)
    whole = BalancedOrder(labels, seed=1)(torch.arange(1000))
    monkeypatch.setattr(BalancedOrder, "BLOCK", 128)  # affects only the counting
    for positions in (torch.arange(700, 760), torch.tensor([900, 3, 513, 3]), torch.arange(999, -1, -1)):
        assert torch.equal(BalancedOrder(labels, seed=1)(positions), whole[positions])
    order = BalancedOrder(labels, seed=1)
    assert torch.equal(
        torch.cat([order(torch.arange(p, 1000, 2)) for p in (0, 1)]), torch.cat([whole[::2], whole[1::2]])
    )
    assert not torch.equal(BalancedOrder(labels, seed=2)(torch.arange(1000)), whole)


def test_resume_rejects_changed_balance(tmp_path):
    folders("own", {"ant": 12, "bee": 2})
    settings = {
        "data": {"source": "own", "balance": True}, "output_dir": "run",
        "model": {"model_channels": 8, "channel_mult": [1], "num_res_blocks": 1, "num_head_channels": 8, "norm_groups": 4},
        "training": {"max_steps": 2, "batch_size": 4, "log_every": 1, "preview_every": 0, "diagnostics_every": 0},
    }  # fmt: skip
    assert train(settings) == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["epoch"] == 8 / 13
    settings["data"]["balance"] = False
    settings["training"]["max_steps"] = 3
    with pytest.raises(InputError, match=r"data\.balance: true -> false"):
        train(settings, resume=True)


# ---------------------------------------------------------------------- tables of labels


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl", "labels.csv"])
def test_labels_in_a_table(table):
    rows = [("images/0.png", "cow"), ("images/1.png", "ant"), ("images/2.png", "cow")]
    Path("own/images").mkdir(parents=True)
    for i, (name, _) in enumerate(rows):
        Path("own", name).write_bytes(png(i))
    Path("own/images/unlisted.png").write_bytes(png(9))
    if table.endswith(".csv"):
        Path("own", table).write_text("file_name,label\n" + "".join(f"{n},{c}\n" for n, c in rows))
    else:
        Path("own", table).write_text("".join(json.dumps({"file_name": n, "class": c}) + "\n" for n, c in rows))
    data = opened("own" if table.startswith("metadata") else f"own/{table}", heldout_fraction=0)
    assert data.label_space.names == ("ant", "cow") and data.labels.tolist() == [1, 0, 1]
    with Image.open("own/images/1.png") as image:
        assert np.array_equal(data.gather([1])[0][0], np.asarray(image))


def test_label_tables_with_splits_and_numbers():
    for part, rows in (("train", [("a", 10), ("b", 9), ("c", 10)]), ("test", [("a", 9)])):
        Path("own", part).mkdir(parents=True)
        for i, (name, _) in enumerate(rows):
            Path("own", part, f"{name}.png").write_bytes(png(i))
        Path("own", part, "metadata.csv").write_text("file_name,label\n" + "".join(f"{n}.png,{c}\n" for n, c in rows))
    assert opened("own").label_space.names == ("9", "10") and opened("own").labels.tolist() == [1, 0, 1]
    assert opened("own", "heldout").labels.tolist() == [0]
    Path("own/test/metadata.csv").write_text("file_name,label\na.png,11\n")
    with pytest.raises(InputError, match=r"the class '11' is not in train, which has 9, 10"):
        opened("own", "heldout")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("0.png,ant\n1.png,bee\n", r"no file name column .*Its columns: 0\.png, ant"),
        ("file_name,kind\n0.png,ant\n", r"no label column \(expected one of label, labels, .*Set data\.label_column"),
        ("file_name,label,class\n0.png,ant,1\n", r"several columns that may be the label"),
        ("file_name,label\n0.png,\n", r"line 2: 0\.png has no class"),
        ("file_name,label\n0.png\n", r"line 2: expected 2 values"),
        ("file_name,label\n0.png,ant\n0.png,bee\n", r"line 3: 0\.png is listed twice"),
        ("file_name,label\n../0.png,ant\n", r"broken image \.\./0\.png .*outside"),
        ("file_name,label\nno.png,ant\n", r"broken image no\.png .*No such file"),
        ("file_name,label\n", "lists no image"),
    ],
)
def test_invalid_label_tables(table, message):
    Path("own").mkdir()
    Path("own/0.png").write_bytes(png(0))
    Path("own/labels.csv").write_text(table)
    with pytest.raises(InputError, match=message):
        opened("own/labels.csv")


@pytest.mark.parametrize(
    ("name", "table", "column"),
    [
        ("metadata.csv", "file_name,lable\nant/000.png,red\n", "lable"),
        ("metadata.csv", "file_nam,label\nant/000.png,red\n", "file_nam"),
        ("metadata.jsonl", '{"file_name": "ant/000.png", "Labels": "red"}\n', "Labels"),
    ],
)
def test_misspelt_columns_are_rejected(name, table, column):
    folders("own", {"ant": 2, "bee": 2})
    Path("own", name).write_text(table)
    with pytest.raises(InputError, match=f"has a column '{column}'. Did you mean"):
        opened("own")


def test_first_line_without_label_is_an_error():
    folders("own", {"ant": 2})
    Path("own/metadata.jsonl").write_text(
        '{"file_name": "ant/000.png", "caption": "a"}\n{"file_name": "ant/001.png", "label": "red"}\n'
    )
    with pytest.raises(InputError, match="line 1"):
        opened("own")


def test_missing_named_column_is_rejected():
    folders("own", {"ant": 2})
    Path("own/metadata.csv").write_text("file_name,kind\nant/000.png,red\n")
    with pytest.raises(InputError, match=r"no label column .*Its columns: file_name, kind"):
        opened("own", label_column="colour")


def test_metadata_without_labels_is_ignored(capsys):
    folders("own", {"ant": 2, "bee": 2})
    Path("own/metadata.csv").write_text("file_name,kind\nant/000.png,red\nbee/001.png,blue\n")
    assert opened("own", heldout_fraction=0).label_space.names == ("ant", "bee")  # the table has no label column
    assert open_dataset({"source": "own", "heldout_fraction": 0}).label_space.names == ("ant", "bee")
    assert "metadata.csv has no class column (its columns: file_name, kind)" in capsys.readouterr().err
    assert opened("own", label_column="kind", heldout_fraction=0).label_space.names == ("blue", "red")


# ---------------------------------------------------------------------- CIFAR's own files


def cifar(root: Path, protocol: int) -> list[np.ndarray]:
    root.mkdir()
    batches = [np.random.default_rng(i).integers(0, 256, (4, 3072), dtype=np.uint8) for i in range(3)]
    for name, data in zip(("data_batch_1", "data_batch_2", "test_batch"), batches):
        contents = {b"data": data, b"labels": [3, 1, 0, 2], b"batch_label": b"x", b"filenames": [b"a.png"] * 4}
        Path(root, name).write_bytes(pickle.dumps(contents, protocol))
    meta = {b"label_names": [b"plane", b"car", b"bird", b"cat"], b"num_vis": 3072}
    Path(root, "batches.meta").write_bytes(pickle.dumps(meta, protocol))
    return batches


def test_missing_cifar_batch_is_named():
    cifar(Path("cifar-10-batches-py"), 2)
    Path("cifar-10-batches-py/data_batch_1").unlink()
    with pytest.raises(InputError, match="data_batch_1 missing; copy or unpack it again"):
        opened("cifar-10-batches-py")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cifar_files_and_archive(protocol):
    batches = cifar(Path("cifar-10-batches-py"), protocol)
    with tarfile.open("cifar.tar.gz", "w:gz") as archive:
        archive.add("cifar-10-batches-py")
    for source in ("cifar-10-batches-py", "cifar.tar.gz"):
        data = opened(source)
        assert data.label_space.names == ("plane", "car", "bird", "cat") and data.labels.tolist() == [3, 1, 0, 2] * 2
        assert np.array_equal(data.gather([5])[0][0], batches[1][1].reshape(3, 32, 32).transpose(1, 2, 0))
        assert np.array_equal(opened(source, "heldout").images[0, 0, 0], batches[2][0][[0, 1024, 2048]])


def test_cifar_100_uses_fine_labels():
    Path("c").mkdir()
    data = np.zeros((2, 3072), np.uint8)
    for part in ("train", "test"):
        contents = {b"data": data, b"fine_labels": [1, 0], b"coarse_labels": [0, 0]}
        Path("c", part).write_bytes(pickle.dumps(contents, 2))
    Path("c/meta").write_bytes(
        pickle.dumps({b"fine_label_names": [b"apple", b"bear"], b"coarse_label_names": [b"x"]}, 2)
    )
    assert opened("c").label_space.names == ("apple", "bear") and opened("c", "heldout").labels.tolist() == [1, 0]


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"data": _RunsCode()}, "mkdir, but only plain values"),
        ({"data": collections.OrderedDict()}, "OrderedDict, but only plain"),
        ({"data": np.zeros(3)}, "only uint8"),
        ({"data": np.array([{}], dtype=object)}, "only uint8"),
        ([1], "expected a dict"),
        (None, "expected a dict"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_of_other_objects_are_rejected(contents, message, protocol):
    with pytest.raises(InputError, match=message):
        load_plain(pickle.dumps(contents, protocol), "x")
    assert not Path("was-run").exists()


def test_corrupted_cifar_is_named():
    cifar(Path("c"), 2)
    whole = Path("c/data_batch_2").read_bytes()
    other = pickle.dumps({b"data": np.zeros((4, 3), np.uint8), b"labels": [0] * 4}, 2)
    for content in (
        whole[:-9000],
        b"",
        other,
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [4]}, 2),
    ):
        Path("c/data_batch_2").write_bytes(content)
        with pytest.raises(InputError, match=r"data_batch_2 .*CIFAR"):
            opened("c")
    Path("x.tar.gz").write_bytes(b"-")
    with pytest.raises(InputError, match="cannot be read as a tar archive"):
        opened("x.tar.gz")


# ---------------------------------------------------------------------- lists of classes


def test_named_lists_are_imagenet_classes():
    table = imagenet_classes()
    space = LabelSpace(tuple(table.values()), wnids=tuple(table))
    sizes = {name: len(set(class_list(name)) & set(table)) for name in NAMES}
    assert list(sizes.values()) == [10, 10, 100, 100, 9]
    assert class_ids(space, "imagenette") == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    assert class_ids(space, "imagenet_first100") == list(range(100))
    assert [space.names[i].split(",")[0] for i in class_ids(space, "imagewoof")][:2] == [
        "Shih-Tzu",
        "Rhodesian ridgeback",
    ]
    with pytest.raises(InputError, match=r"list of 10 ImageNet classes, and the data lacks 10"):
        class_ids(LabelSpace(("a", "b")), "imagewoof")
    assert class_ids(LabelSpace(("imagewoof", "b")), "imagewoof") == [0]  # a class of that name takes precedence


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["owm", "no-one/none"])
def test_missing_name_fails_quickly(name, monkeypatch):
    """A network that does not answer: no retries, and similar local folders are suggested."""
    import huggingface_hub.constants

    folders("own", {"ant": 1})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(tables, "HUB_SECONDS", 0.2)
    monkeypatch.setattr(tables, "BARE_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: time.sleep(30))
    start = time.monotonic()
    with pytest.raises(InputError, match=f"^there is no folder {name}.*no answer in 0.2 s") as error:
        opened(name)
    assert time.monotonic() - start < 3
    assert ("Did you mean own?" in str(error.value)) == (name == "owm")


def test_unreachable_cifar10_suggests_local_files(monkeypatch):
    import huggingface_hub.constants

    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(InputError) as error:
        opened("cifar10")
    message = str(error.value)
    assert "--data.source PATH_TO_PARQUET" in message and "cifar-10-batches-py" in message and "Built in" not in message


def test_hub_fetches_one_split_only(monkeypatch):
    """A folder replaces the hub: `datasets` handles both the same way."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache").absolute())
    Path("pets").mkdir()
    for split, count in (("train", 6), ("test", 4)):
        columns = {
            "image": [{"bytes": png(i), "path": None} for i in range(count)],
            "label": [i % 2 for i in range(count)],
        }
        pq.write_table(pa.table(columns), f"pets/{split}.parquet")
    names = "{class_label: {names: {'0': cat, '1': dog}}}"
    features = f"[{{name: image, dtype: image}}, {{name: label, dtype: {names}}}]"
    splits = "[{name: train, num_examples: 6}, {name: test, num_examples: 4}]"
    Path("pets/README.md").write_text(f"---\ndataset_info: {{features: {features}, splits: {splits}}}\n---\n")
    hub = tables.HubTable("./pets", None, None)
    split = hub.load("train")
    assert split.label_space.names == ("cat", "dog") and len(split.labels) == 6
    prepared = {p.name for p in Path("cache").rglob("*.arrow")}
    assert len(prepared) == 1 and "train" in prepared.pop()
    assert len(hub.load("test").labels) == 4


# ---------------------------------------------------------------------- many files, broken images


def test_two_parts_list_files_once(monkeypatch):
    folders("own", {"ant": 30, "bee": 30})
    stated, listed = [], []
    size_and_mtime, image_files = sources.size_and_mtime, sources.image_files
    monkeypatch.setattr(sources, "size_and_mtime", lambda path: stated.append(path) or size_and_mtime(path))
    monkeypatch.setattr(sources, "image_files", lambda *a, **k: listed.append(a) or image_files(*a, **k))
    config = DataConfig("own")
    resolved = find_source(config)
    data, heldout = (open_dataset(config, part, progress=False, resolved=resolved) for part in ("train", "heldout"))
    assert len(stated) == 60 and len(listed) == 2
    assert len(data) + len(heldout) == 60


def test_no_path_object_per_file():
    """For a million files: no Path object and no search among the classes per file."""
    folders("own", {f"c{i:02}": 100 for i in range(10)})
    source = find_source(DataConfig("own"))[0]
    calls = collections.Counter()
    sys.setprofile(lambda frame, event, _: calls.update([event == "call" and "pathlib" in frame.f_code.co_filename]))
    try:
        source.facts("train"), source.load("train")
    finally:
        sys.setprofile(None)
    # some calls for each of 10 folders (more on Python 3.12); four for each of 1,000 files would be 4,000
    assert calls[True] < 1000


def test_files_sort_by_path_components():
    for name in ("a/b.png", "a-b.png", "a.png", "B.png", "a/.x/h.png", "ab/c/d.png"):
        Path("own/ant", name).parent.mkdir(parents=True, exist_ok=True)
        Path("own/ant", name).write_bytes(png(0))
    expected = sorted(p for p in Path("own/ant").rglob("*.png") if ".x" not in p.parts)
    files = find_source(DataConfig("./own/"))[0]._files("train")["ant"]
    assert files == [str(p.relative_to("own")) for p in expected]


def test_pending_images_do_not_change_store(monkeypatch):
    folders("own", {"ant": 9, "bee": 8})
    many = opened("own")
    monkeypatch.setattr(decode, "MAX_PENDING", 3)
    monkeypatch.setattr(decode, "MAX_THREADS", 2)
    few = opened("own", store_dir="other")
    assert few.folder != many.folder and few.fingerprint == many.fingerprint


def test_all_broken_images_are_counted():
    root = folders("own", {"ant": 5, "bee": 5})
    for name in ("ant/001.png", "ant/003.png", "bee/004.png"):
        (root / name).write_bytes(b"?")
    with pytest.raises(InputError) as error:
        opened("own")
    message = str(error.value)
    assert message.startswith(
        "broken image ant/001.png of own:train: it is not an image that Pillow can read. 2 more of 10"
    )
    assert "ant/003.png, bee/004.png. Replace" in message and ".." not in message


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_large_image_is_not_called_broken(monkeypatch):
    folders("own", {"ant": 2})
    for limit in (40, 20):  # Pillow warns above its limit, and raises above twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError) as error:
            opened("own")
        message = str(error.value)
        assert message.startswith("image too large: ant/000.png of own:train: it has 64 pixels, more than the limit of")
        assert "Make it smaller" in message and ".." not in message


# ---------------------------------------------------------------------- inspect


def test_inspect_hints_at_gray_and_unbalanced_data(monkeypatch):
    folders("own", {"ant": 12, "bee": 2}, gray=True)
    titles = []
    from diffusion_adagn.data import inspect

    grid = inspect.labelled_grid
    monkeypatch.setattr(inspect, "labelled_grid", lambda *a, title: titles.append(title) or grid(*a, title=title))
    message = inspect_dataset(DataConfig("./own/", heldout_fraction=0), Path("sheet.png"))
    assert "all are gray: --data.channels 1" in message and "--data.balance true" in message
    assert titles == ["own:train: 14 images"]
    folders("colour", {"ant": 2})
    Path("colour/labels.csv").write_text("file_name,label\n")
    assert "not used     colour/labels.csv; give it as --data.source" in inspect_dataset(
        DataConfig("colour"), Path("sheet.png")
    )
    assert "are gray" not in inspect_dataset(DataConfig("colour"), Path("sheet.png"))


def test_data_set_without_folder_pickles_pixels():
    images = np.zeros((2, 4, 4, 1), np.uint8)
    data = ImageDataset("x", images, np.array([0, 0]), LabelSpace(("a",)), "f")
    assert np.array_equal(pickle.loads(pickle.dumps(data)).images, images)
