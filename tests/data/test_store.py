import contextlib
import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_adagn.atomic import locked
from diffusion_adagn.config import DataConfig
from diffusion_adagn.data import open_dataset
from diffusion_adagn.data.store import split_off
from diffusion_adagn.errors import InputError

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


def make_folders(root: Path, each: int = 4, size: int = 8) -> Path:
    rng = np.random.default_rng(3)
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(root / name / f"{i:03}.png")
    return root


def opened(source, part=None, **settings):
    return open_dataset(DataConfig(source=str(source), heldout_fraction=0.0, **settings), part, progress=False)


def direct(root: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p).convert("RGB")) for p in sorted(root.rglob("*.png"))])


def real(name: str) -> Path:
    if not (REAL_DATA / name).is_dir():
        pytest.skip(f"the real data {REAL_DATA / name} is missing")
    return REAL_DATA / name


# ---------------------------------------------------------------------- what is stored


def test_gather_returns_requested_order(tmp_path):
    root = make_folders(tmp_path / "d")
    data = opened(root)
    images, labels = data.gather([5, 0, 5])
    assert np.array_equal(images, direct(root)[[5, 0, 5]])
    assert labels.tolist() == [1, 0, 1]
    assert (images.dtype, labels.dtype, len(data), data.channels) == (np.uint8, np.int64, 8, 3)
    images[:] = 0  # a copy: the store does not change
    assert np.array_equal(data.gather([5])[0][0], direct(root)[5])


def test_gather_into_given_array(tmp_path):
    whole = opened(make_folders(tmp_path / "d"))
    subset = whole.part(np.array([6, 1, 3]), "subset")
    for data, indices in ((whole, [5, 0, 5]), (subset, [2, 0, 1]), (whole, [-1, 3, 0])):
        out = np.zeros((3, *data.images.shape[1:]), np.uint8)
        images, labels = data.gather(indices, out)
        assert np.shares_memory(images, out)
        assert np.array_equal(out, data.gather(indices)[0]) and labels.tolist() == data.gather(indices)[1].tolist()
        for bad in ([0, len(data)], [-len(data) - 1, 0]):
            with pytest.raises(IndexError):
                data.gather(bad)
    assert np.array_equal(subset.gather([2, 0])[0], whole.gather([3, 6])[0])
    assert np.array_equal(whole.gather([-1])[0], whole.gather([len(whole) - 1])[0])


def test_large_batch_preserves_order(tmp_path):
    root = make_folders(tmp_path / "d", each=150)
    assert np.array_equal(opened(root).gather(np.arange(300))[0], direct(root))


def test_second_opening_decodes_nothing(tmp_path, monkeypatch):
    root = make_folders(tmp_path / "d")
    first = opened(root)
    monkeypatch.setattr("diffusion_adagn.data.store.decode", lambda *a: pytest.fail("decoded again"))
    assert opened(root).fingerprint == first.fingerprint


def test_meta_describes_the_store(tmp_path):
    data = opened(make_folders(tmp_path / "d", size=16), classes="bee", image_size=8)
    meta = json.loads((data.folder / "meta.json").read_text())
    assert meta["label_space"]["names"] == ["bee"]
    assert meta["label_space"]["original_ids"] == [1]
    assert (meta["counts"], meta["shape"], meta["split"]) == ([4], [4, 8, 8, 3], "train")
    assert meta["resized"] == data.resized == "4 shrunk to 8 px by area average (Pillow's BOX) from 16 px"
    assert meta["fingerprint"] == data.fingerprint
    assert data.folder.name.startswith("d-train-")


def test_fingerprint_depends_on_contents_only(tmp_path):
    root = make_folders(tmp_path / "d")
    first = opened(root).fingerprint
    moved = shutil.move(root, tmp_path / "elsewhere")
    assert opened(moved).fingerprint == first
    (moved / "ant").rename(moved / "asp")
    assert opened(moved).fingerprint != first  # another name
    (moved / "asp").rename(moved / "ant")
    assert opened(moved).fingerprint == first
    pixels = np.array(Image.open(moved / "bee" / "000.png"))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(moved / "bee" / "000.png")
    assert opened(moved).fingerprint != first  # one bit of one pixel


def test_pixel_settings_need_another_store(tmp_path, store):
    root = make_folders(tmp_path / "d")
    opened(root)
    for settings in (
        {"image_size": 4},
        {"channels": 1},
        {"background": "black"},
        {"classes": "ant"},
        {"skip_broken": True},
    ):
        before = len(list(store.iterdir()))
        opened(root, **settings), opened(root, **settings)
        assert len(list(store.iterdir())) == before + 1, settings
    opened(root, flip=True)
    assert len(list(store.iterdir())) == 6
    Image.new("RGB", (8, 8)).save(root / "ant" / "new.png")
    assert len(opened(root)) == 9


def test_store_dir_overrides_the_environment(tmp_path):
    data = opened(make_folders(tmp_path / "d"), store_dir=str(tmp_path / "mine"))
    assert data.folder.parent == tmp_path / "mine"


# ---------------------------------------------------------------------- held out


@pytest.mark.parametrize("n", [0, 1, 2, 3, 40, 1797])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.05, 0.5])
def test_split_off_is_a_repeatable_partition(n, fraction):
    labels = np.arange(n) % 7
    train, heldout = split_off(labels, fraction)
    assert sorted([*train, *heldout]) == list(range(n))
    spare = n - len(np.unique(labels))  # one image of each class remains in training
    assert len(heldout) == (min(spare, max(1, round(n * fraction))) if fraction else 0)
    again = split_off(labels, fraction)
    assert np.array_equal(train, again[0]) and np.array_equal(heldout, again[1])
    if n > 7:
        assert len(np.unique(labels[train])) == 7


def test_split_off_leaves_every_class_trained():
    labels = np.array([0] * 50 + [1])
    train, heldout = split_off(labels, 0.5)
    assert 50 in train and len(heldout) == round(25.5)


def test_held_out_fraction_shares_the_store(tmp_path, store):
    root = make_folders(tmp_path / "d", each=20)
    config = DataConfig(source=str(root))
    train, heldout = open_dataset(config, "train", progress=False), open_dataset(config, "heldout", progress=False)
    assert len(list(store.iterdir())) == 1
    assert (len(train), len(heldout)) == (38, 2)
    whole = direct(root)
    assert np.array_equal(heldout.gather([1, 0])[0], whole[heldout.indices[[1, 0]]])
    assert np.array_equal(train.gather(np.arange(38))[0], np.delete(whole, heldout.indices, axis=0))
    assert np.array_equal(train.gather(np.arange(38))[1], train.labels)
    assert len({train.fingerprint, heldout.fingerprint, opened(root).fingerprint}) == 3


# ---------------------------------------------------------------------- broken images, sizes


def test_broken_images_are_named_or_skipped(tmp_path, store):
    root = make_folders(tmp_path / "d")
    whole = (root / "ant" / "001.png").read_bytes()
    (root / "ant" / "001.png").write_bytes(whole[:60])
    (root / "bee" / "000.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"broken image ant/001\.png .*set data\.skip_broken to true"):
        opened(root)
    assert not list(store.iterdir())  # no partial files remain
    for _ in range(2):
        data = opened(root, skip_broken=True)
        assert data.counts().tolist() == [3, 3]
        assert [s.split(":")[0] for s in data.skipped] == ["ant/001.png", "bee/000.png"]
        assert data.skipped[1].endswith("it is empty")
        remaining = [p for p in sorted(root.rglob("*.png")) if p.name[:3] + p.parent.name not in ("001ant", "000bee")]
        assert np.array_equal(data.gather(np.arange(6))[0], np.stack([np.asarray(Image.open(p)) for p in remaining]))


def test_only_broken_images(tmp_path):
    root = make_folders(tmp_path / "d")
    for path in root.rglob("*.png"):
        path.write_bytes(b"?")
    with pytest.raises(InputError, match=r"every image .* is broken"):
        opened(root, skip_broken=True)


def test_class_of_broken_images_is_empty(tmp_path):
    root = make_folders(tmp_path / "d", each=1)
    (root / "bee" / "000.png").write_bytes(b"?")
    with pytest.raises(InputError, match=r"no image of 1 of its 2 classes: bee"):
        opened(root, skip_broken=True)


def test_several_sizes_need_image_size(tmp_path):
    root = make_folders(tmp_path / "d")
    Image.new("RGB", (8, 12)).save(root / "bee" / "odd.png")
    with pytest.raises(InputError, match=r"odd\.png is 8x12, ant/000\.png is 8x8.*Set data\.image_size"):
        opened(root)
    data = opened(root, image_size=8)
    assert data.resized == "1 centre-cropped; 9 left at 8 px"
    Image.new("RGB", (8, 12)).save(root / "ant" / "000.png")
    with pytest.raises(InputError, match=r"ant/000\.png is 8x12\. Set"):
        opened(root)


def test_disk_space_is_checked_first(tmp_path, monkeypatch, store):
    root = make_folders(tmp_path / "d")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100))
    with pytest.raises(InputError, match=r"MiB are free.*data\.store_dir"):
        opened(root)
    assert not list(store.iterdir())


def test_store_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("-")
    with pytest.raises(InputError, match=r"cannot be stored in .*data\.store_dir"):
        opened("digits", store_dir=str(tmp_path / "file" / "below"))


# ---------------------------------------------------------------------- corruption, other processes


@pytest.mark.parametrize(
    "fault", ["short", "no_images", "no_labels", "bad_json", "other_shape", "no_meta", "bad_labels"]
)
def test_corrupted_store_is_decoded_again(tmp_path, store, fault):
    root = make_folders(tmp_path / "d")
    data = opened(root)
    images, labels, meta = (data.folder / n for n in ("images.npy", "labels.npy", "meta.json"))
    if fault == "short":
        os.truncate(images, images.stat().st_size - 1)
    elif fault == "other_shape":
        meta.write_text(meta.read_text().replace('"shape": [\n  8', '"shape": [\n  9'))
    elif fault == "bad_json":
        meta.write_text(meta.read_text()[:-20])
    elif fault == "bad_labels":
        np.save(labels, np.zeros(8, np.int64))
    else:
        {"no_images": images, "no_labels": labels, "no_meta": meta}[fault].unlink()
    again = opened(root)
    assert np.array_equal(again.gather(np.arange(8))[0], direct(root))
    assert again.fingerprint == data.fingerprint
    assert [p.name for p in store.iterdir()] == [data.folder.name]


def test_store_of_faster_process_is_used(tmp_path, store, monkeypatch):
    """Another machine shares the disk, but not the locks."""
    import diffusion_adagn.data.store as module

    root, decode = make_folders(tmp_path / "d"), module.decode

    def slow_decode(*args):
        decode(*args)
        monkeypatch.setattr(module, "decode", decode)
        first.append(opened(root))  # the other process finishes while this one decodes

    first = []
    monkeypatch.setattr(module, "one_at_a_time", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(module, "decode", slow_decode)
    inode = opened(root).folder.stat().st_ino
    assert inode == first[0].folder.stat().st_ino
    assert len(list(store.iterdir())) == 1


def _prepare(root, barrier, results):
    barrier.wait(30)
    data = opened(root)
    results.put((data.fingerprint, int(data.gather(np.arange(len(data)))[0].astype(np.int64).sum())))


@pytest.mark.serial
def test_two_processes_decode_one_store(tmp_path, store):
    root = make_folders(tmp_path / "d", each=60, size=32)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_prepare, args=(root, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    outcomes = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(30)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] == direct(root).astype(np.int64).sum()
    assert len(list(store.iterdir())) == 1


# ---------------------------------------------------------------------- real data


@pytest.mark.parametrize("split", ["train", "test"])
def test_real_cifar_pixels_are_exact(split):
    import datasets
    import pyarrow.parquet

    folder = real("cifar10_tiny")
    table = pyarrow.parquet.read_table(next(folder.glob(f"{split}-*.parquet"))).to_pylist()
    data = open_dataset(DataConfig(source=f"{folder}:{split}"), progress=False)
    assert data.label_space.names[3] == "cat"
    images, labels = data.gather(np.arange(len(data)))
    assert labels.tolist() == [row["label"] for row in table]
    feature = datasets.Image()
    exact = np.stack([np.asarray(feature.decode_example(row["img"]).convert("RGB")) for row in table])
    assert np.array_equal(images, exact)


def test_real_imagenette_is_averaged_over_blocks():
    import io

    import pyarrow.parquet

    folder = real("imagenette64_tiny")
    rows = pyarrow.parquet.read_table(next(folder.glob("train-*.parquet"))).to_pylist()[:40]
    full = np.stack([np.asarray(Image.open(io.BytesIO(r["image"]["bytes"])).convert("RGB")) for r in rows])
    mean = full.astype(np.float64).reshape(40, 32, 2, 32, 2, 3).mean((2, 4))
    data = open_dataset(DataConfig(source=str(folder), image_size=32), progress=False)
    assert np.abs(data.gather(np.arange(40))[0] - mean).max() <= 1
    assert open_dataset(DataConfig(source=str(folder), image_size=32), "heldout", progress=False).name.endswith(
        ":validation"
    )


def test_temporary_folder_waits_for_lock(tmp_path):
    """Another process that removes partial stores may hold the lock briefly."""
    pytest.importorskip("fcntl")
    locked_elsewhere, release = threading.Event(), threading.Event()

    def clear():
        with locked(tmp_path) as acquired:
            assert acquired
            locked_elsewhere.set()
            release.wait(10)

    clearing = threading.Thread(target=clear)
    clearing.start()
    assert locked_elsewhere.wait(10)
    with locked(tmp_path) as acquired:
        assert not acquired
    threading.Timer(0.2, release.set).start()
    with locked(tmp_path, wait=True) as acquired:
        assert acquired
    clearing.join()


def test_moved_store_has_no_open_map(tmp_path, monkeypatch):
    """Windows cannot rename a folder with a mapped file."""
    maps, rename = Path("/proc/self/maps"), Path.rename
    if not maps.exists():
        pytest.skip("only Linux lists mapped files")

    def checked_rename(self, to):
        assert f"{self}/images.npy" not in maps.read_text()
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", checked_rename)
    monkeypatch.setattr("diffusion_adagn.data.store.WINDOWS", True)
    assert opened(make_folders(tmp_path / "d")).folder.is_dir()
