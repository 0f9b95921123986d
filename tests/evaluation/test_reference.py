import json

import numpy as np
import pytest

from diffusion_adagn.data import ImageDataset
from diffusion_adagn.data.npz import write_npz
from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation.diagnostics import image_values
from diffusion_adagn.evaluation.features import FeatureSet
from diffusion_adagn.evaluation.reference import (
    published,
    reference_of,
    reference_of_images,
    references_folder,
    some_of,
)
from diffusion_adagn.labels import LabelSpace


class Quarters:
    """The means of an image's four quarters, counted."""

    name, hash, dimension, resolution, resize, class_names = "quarters", "0123456789abcdef", 4, 8, "none", None

    def __init__(self, is_fid=False, hash=hash):
        self.is_fid, self.hash, self.seen = is_fid, hash, 0

    def __call__(self, pixels):
        self.seen += len(pixels)
        n, h, w, _ = pixels.shape
        quarters = pixels.reshape(n, 2, h // 2, 2, w // 2, -1).mean((2, 4, 5)).reshape(n, 4)
        return FeatureSet((quarters / 255).astype(np.float32))

    def to_dict(self):
        return {"source": "a test"}


@pytest.fixture
def dataset(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "cache"))
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    labels = np.repeat([0, 1, 2], [150, 90, 60])[rng.permutation(300)]
    return ImageDataset(
        "noise:train", images, labels, LabelSpace(("a", "b", "c")), "f" * 64, resized="300 left at 8 px"
    )


def test_subset_has_class_fractions(dataset):
    some = some_of(dataset.labels, 100, 0)
    assert (np.diff(some) > 0).all()
    assert np.bincount(dataset.labels[some]).tolist() == [50, 30, 20]
    assert np.array_equal(some, some_of(dataset.labels, 100, 0))
    assert not np.array_equal(some, some_of(dataset.labels, 100, 1))
    assert np.array_equal(some_of(dataset.labels, 1000, 0), np.arange(300))
    for count in (1, 7, 299):
        shares = np.bincount(dataset.labels[some_of(dataset.labels, count, 3)], minlength=3)
        assert shares.sum() == count
        assert (np.abs(shares - count * np.array([0.5, 0.3, 0.2])) < 1).all()


def test_what_it_holds(dataset):
    extractor = Quarters()
    found = reference_of(dataset, extractor, 100, progress=False)
    pixels, labels = dataset.gather(found.indices)
    assert np.array_equal(found.pooled, extractor(pixels).pooled)
    assert np.array_equal(found.labels, labels)
    assert found.values == pytest.approx(image_values(pixels).mean(0))
    assert found.class_names == ("a", "b", "c")
    assert found.about["count"] == 100 and found.about["of"] == 300 and found.about["seed"] == 0
    assert found.about["extractor"] | {"hash": extractor.hash, "source": "a test"} == found.about["extractor"]
    assert found.radii(3) is found.radii(3)
    assert found.gaussian.mean == pytest.approx(found.pooled.mean(0), abs=1e-6)


def test_reference_is_cached_and_verified(dataset):
    extractor = Quarters()
    first = reference_of(dataset, extractor, 100, progress=False)
    again = reference_of(dataset, extractor, 100, progress=False)
    assert extractor.seen == 104  # a few of them once more: it may have changed with the same hash
    assert np.array_equal(first.pooled, again.pooled) and first.about == again.about
    (file,) = references_folder().iterdir()
    file.write_bytes(file.read_bytes()[:200])
    assert np.array_equal(reference_of(dataset, extractor, 100, progress=False).pooled, first.pooled)
    assert extractor.seen == 204
    for other in ({"count": 99}, {"count": 100, "seed": 1}):
        reference_of(dataset, extractor, **other, progress=False)
    reference_of(dataset, Quarters(hash="f" * 16), 100, progress=False)
    assert len(list(references_folder().iterdir())) == 4
    reference_of(dataset, extractor, 300, progress=False)
    seen = extractor.seen
    reference_of(dataset, extractor, 10_000, progress=False)  # all of them, either way
    assert extractor.seen == seen + 4


def test_no_extractor_gives_values_only(dataset):
    found = reference_of(dataset, None, 100, progress=False)
    assert found.pooled is None
    assert found.values == pytest.approx(image_values(dataset.gather(found.indices)[0]).mean(0))
    assert np.array_equal(reference_of(dataset, None, 100, progress=False).values, found.values)
    with pytest.raises(InputError, match="no features"):
        found.dimension  # noqa: B018


def test_save_and_load(dataset, tmp_path):
    found = reference_of(dataset, Quarters(), 100, progress=False)
    read = FeatureSet.load(found.save(tmp_path / "r.npz"))
    for name in ("pooled", "labels", "values", "indices"):
        assert np.array_equal(getattr(read, name), getattr(found, name))
        assert getattr(read, name).dtype == getattr(found, name).dtype
    assert (read.class_names, read.about) == (found.class_names, found.about)
    with np.load(tmp_path / "r.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)


def test_other_extractors_reference_is_rejected(dataset):
    found = reference_of(dataset, Quarters(), 100, progress=False)
    found.check(Quarters())
    other = Quarters(hash="f" * 16)
    other.name = "eighths"
    with pytest.raises(InputError) as error:
        found.check(other)
    for word in ("quarters", "0123456789abcdef", "eighths", "ffffffffffffffff", "--extractor"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"features": np.zeros((100, 4))},
        {"features": np.zeros((0, 4), np.float32)},
        {"labels": np.full(100, 3)},
        {"labels": np.zeros(5, np.int64)},
        {"head": np.array("{}")},
        {"head": np.array([{}], dtype=object)},
    ],
    ids=str,
)
def test_files_that_are_no_reference(dataset, tmp_path, change):
    file = reference_of(dataset, Quarters(), 100, progress=False).save(tmp_path / "r.npz")
    with np.load(file, allow_pickle=False) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    np.savez(file, **(held | change))
    with pytest.raises(InputError, match=r"r\.npz is no reference"):
        FeatureSet.load(file)


def test_images_without_labels(dataset):
    found = reference_of_images(dataset.images, None, (), "images", Quarters(), progress=False)
    assert found.labels is None and found.class_names == ()
    assert (found.about["count"], found.about["image_size"], found.about["channels"]) == (300, 8, 1)
    json.dumps(found.about)
    with pytest.raises(InputError, match="squares"):
        reference_of_images(dataset.images[:, :4], None, (), "oblong", Quarters(), progress=False)


def test_published_statistics(dataset, tmp_path):
    """Alone they serve the FID; with images beside them everything else too; another extractor takes the images."""
    statistics = {"mu": np.full(4, 0.5), "sigma": np.eye(4)}
    np.savez(tmp_path / "mu.npz", **statistics)
    alone = published(tmp_path / "mu.npz", Quarters(is_fid=True))
    assert alone.pooled is None
    assert np.array_equal(alone.gaussian.mean, statistics["mu"])
    with pytest.raises(InputError, match="--extractor inception"):
        published(tmp_path / "mu.npz", Quarters())
    np.savez(tmp_path / "mu.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(InputError, match="5 features"):
        published(tmp_path / "mu.npz", Quarters(is_fid=True))

    np.savez(tmp_path / "both.npz", arr_0=np.repeat(dataset.images, 3, axis=3), **statistics)
    both = published(tmp_path / "both.npz", Quarters(is_fid=True), progress=False)
    assert both.pooled.shape == (300, 4)
    assert np.array_equal(both.gaussian.covariance, statistics["sigma"])
    assert FeatureSet.load(both.save(tmp_path / "r.npz")).gaussian.mean.tolist() == [0.5] * 4
    foreign = published(tmp_path / "both.npz", Quarters(), progress=False)
    assert foreign.gaussian.mean == pytest.approx(foreign.pooled.mean(0), abs=1e-6)
    with pytest.raises(InputError, match="Expected mu"):
        published(write_npz(tmp_path / "images.npz", dataset.images), Quarters())


def test_changed_extractor_is_detected(dataset):
    class Halved(Quarters):
        def __call__(self, pixels):
            return FeatureSet(super().__call__(pixels).pooled / 2)

    first = reference_of(dataset, Quarters(), 100, progress=False)
    second = reference_of(dataset, Halved(), 100, progress=False)
    assert np.allclose(second.pooled * 2, first.pooled)
