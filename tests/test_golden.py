"""The numbers of this tree against the recorded ones: no refactoring may change what is computed."""

import golden
import numpy as np
import pytest


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    return golden.compute(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def record():
    return golden.recorded()


def limits(key):
    """(relative, absolute) tolerance between machines."""
    kind = key.split("/")[0]
    if kind == "images":
        return 0, 2  # of 255 levels
    if kind == "sweep":
        return 1e-2, 0.05  # counts of images: one of 40 may fall on the other side
    return 1e-3, 1e-3 if "losses" not in key else 0


def test_numbers_equal_recorded_numbers(computed, record):
    _, recorded = record
    assert computed.keys() == recorded.keys()
    for key, array in computed.items():
        relative, absolute = limits(key)
        now = golden.reduced(array).ravel().astype(np.float64)
        np.testing.assert_allclose(now, recorded[key].astype(np.float64), relative, absolute, err_msg=key)


def test_numbers_equal_bit_for_bit(computed, record):
    about, _ = record
    here = golden.machine()
    if here != about["machine"]:
        pytest.skip("recorded on another processor, or with another torch, numpy, scipy, scikit-learn or compiler")
    assert {key: golden.digest(array) for key, array in computed.items()} == about["digests"]


def test_comparison_sees_one_changed_bit(computed, record, tmp_path, capsys, monkeypatch):
    """`--against` fails for one weight that differs in its last bit."""
    changed = dict(computed)
    key = next(k for k in computed if k.startswith("run/digits/model/"))
    changed[key] = np.nextafter(computed[key], np.float32(np.inf))
    written = iter((computed, changed, computed, computed))

    def run(argv, **_):
        np.savez(argv[-1], **next(written))

    monkeypatch.setattr(golden.subprocess, "run", run)
    with pytest.raises(SystemExit, match="is no checkout"):
        golden.compare(tmp_path)
    (tmp_path / "diffusion_adagn").mkdir()
    assert golden.compare(tmp_path) == 1
    assert f"{key}: {computed[key].size} of {computed[key].size} numbers differ" in capsys.readouterr().out
    assert golden.compare(tmp_path) == 0
    assert "equal bit for bit" in capsys.readouterr().out
