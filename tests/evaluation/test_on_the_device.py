"""What is computed for a reference is computed on its device."""

import datetime

import numpy as np

from diffusion_adagn.evaluation import features
from diffusion_adagn.evaluation.features import FeatureSet
from diffusion_adagn.evaluation.memorisation import memorisation
from diffusion_adagn.evaluation.results import measure


def reference(device="cpu"):
    about = {
        "name": "some",
        "count": 12,
        "of": 12,
        "extractor": {"name": "means"},
        "date": datetime.date.today().isoformat(),
    }
    pooled = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    return FeatureSet(pooled, about=about, device=device)


def devices_of_radii(monkeypatch):
    """The devices of later calls of `radii`."""
    seen, radii = [], features.radii
    monkeypatch.setattr(
        features, "radii", lambda y, k, device, **how: seen.append(device) or radii(y, k, device, **how)
    )
    return seen


def test_metrics_are_computed_on_the_references_device(monkeypatch):
    real, seen = reference("cpu:0"), devices_of_radii(monkeypatch)
    found = measure(FeatureSet(reference().pooled * 1.1), real, None, k=2)
    assert seen == ["cpu:0"]
    same = measure(FeatureSet(reference().pooled * 1.1), reference(), None, k=2)
    assert found.row == same.row
    assert reference("meta").kernel.features.device.type == "meta"
    classes = FeatureSet(real.pooled, labels=np.zeros(12, np.int64), class_names=("a",), device="cpu:0")
    assert classes.of_class(0).device == "cpu:0"


def test_memorisation_measures_on_its_device(monkeypatch):
    seen = devices_of_radii(monkeypatch)
    pixels = np.zeros((2, 8, 8, 1), np.uint8)
    found = memorisation(np.zeros((2, 3), np.float32), pixels, reference("cpu:0"), None)
    assert seen == ["cpu:0"]
    same = memorisation(np.zeros((2, 3), np.float32), pixels, reference(), None)
    assert np.array_equal(found.distances, same.distances)
