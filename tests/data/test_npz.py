import numpy as np
import pytest

from diffusion_adagn.data.npz import read_npz, write_npz
from diffusion_adagn.errors import InputError

PIXELS = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)


@pytest.mark.parametrize(
    "labels", [None, np.array([2, 0, 1, 1], dtype=np.int32)], ids=["without labels", "with labels"]
)
def test_round_trip(tmp_path, labels):
    contents = read_npz(write_npz(tmp_path / "s.npz", PIXELS, labels))
    assert np.array_equal(contents.pixels, PIXELS)
    assert (contents.labels is None) == (labels is None)
    if labels is not None:
        assert contents.labels.dtype == np.int64
        assert np.array_equal(contents.labels, labels)


def test_gray_is_written_as_rgb(tmp_path):
    write_npz(tmp_path / "s.npz", PIXELS[..., :1], [0, 1, 2, 3])
    with np.load(tmp_path / "s.npz") as arrays:
        assert sorted(arrays.files) == ["arr_0", "arr_1"]
        assert arrays["arr_0"].shape == (4, 2, 2, 3)
        assert np.array_equal(arrays["arr_0"], np.repeat(PIXELS[..., :1], 3, axis=3))


class FailsWhenUnpickled:
    """Fails the test if its pickle is loaded."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": PIXELS}, "contains images: expected arr_0"),
        ({"arr_0": PIXELS.astype(np.float32)}, "float32"),
        ({"arr_0": PIXELS[0]}, "[2, 2, 3]"),
        ({"arr_0": PIXELS[:0]}, "[0, 2, 2, 3]"),
        ({"arr_0": PIXELS, "arr_1": np.arange(3)}, "each of 4 images"),
        ({"arr_0": PIXELS, "arr_1": np.zeros(4)}, "float64"),
        ({"arr_0": np.array([FailsWhenUnpickled()], dtype=object)}, "allow_pickle"),
        ({"arr_0": PIXELS, "arr_1": np.array([FailsWhenUnpickled()] * 4, dtype=object)}, "allow_pickle"),
    ],
)
def test_invalid_arrays_are_rejected(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(InputError) as error:
        read_npz(tmp_path / "s.npz")
    assert message in str(error.value)
    assert "s.npz" in str(error.value)


def test_other_files_are_rejected(tmp_path):
    (tmp_path / "text.npz").write_text("not a zip")
    whole = write_npz(tmp_path / "whole.npz", PIXELS).read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("text.npz", "half.npz", "none.npz"):
        with pytest.raises(InputError, match=name):
            read_npz(tmp_path / name)
