"""What is computed on a device is cached by device."""

import datetime

import numpy as np

from diffusion_adagn.evaluation.memorisation import memorisation
from diffusion_adagn.evaluation.metrics import measure
from diffusion_adagn.evaluation.reference import Reference


def reference():
    features = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    about = {
        "name": "some",
        "count": 12,
        "of": 12,
        "extractor": {"name": "means"},
        "date": datetime.date.today().isoformat(),
    }
    return Reference(features, None, (), None, about)


def test_targets_are_cached_by_device():
    real = reference()
    here, there = real.target(5, "cpu"), real.target(5, "meta")
    assert (here.device, there.device) == ("cpu", "meta")
    assert real.target(5, "cpu") is here and real.target(5, "meta") is there


def test_memorisation_measures_on_its_device(monkeypatch):
    seen = []
    radii = measure.Target.radii
    monkeypatch.setattr(measure.Target, "radii", lambda self, *a: seen.append(self.device) or radii(self, *a))
    pixels = np.zeros((2, 8, 8, 1), np.uint8)
    found = memorisation(np.zeros((2, 3), np.float32), pixels, reference(), None, device="cpu:0")
    assert seen == ["cpu:0"]
    same = memorisation(np.zeros((2, 3), np.float32), pixels, reference(), None)
    assert np.array_equal(found.distances, same.distances)
