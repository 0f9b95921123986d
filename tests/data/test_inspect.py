import numpy as np
import pytest
from PIL import Image

from diffusion_adagn.config import DataConfig
from diffusion_adagn.data.inspect import inspect_dataset
from diffusion_adagn.errors import InputError


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_ADAGN_CACHE", str(tmp_path / "store"))


def make_folders(root, counts: dict[str, int], size: int = 8):
    for class_id, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (size, size), (class_id, i, 99)).save(root / name / f"{i:03}.png")
    return root


def row_of(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.endswith(f"  {name}")).split()


def test_digits(tmp_path):
    text = inspect_dataset(DataConfig(), tmp_path / "deep" / "er" / "sheet.png")
    assert "digits:train, 1,707 images" in text
    assert "digits:heldout, 90 images" in text
    assert "8x8, gray (1 channel)" in text
    assert row_of(text, "7")[:3] == ["7", "168", "11"]
    assert f"Examples: {tmp_path}/deep/er/sheet.png" in text
    assert text.endswith("\n  adagn train --config digits --dry_run")
    with Image.open(tmp_path / "deep" / "er" / "sheet.png") as sheet:
        assert sheet.width > 8 * 64 and sheet.height > 10 * 64


def test_counts_original_ids_and_skipped(tmp_path):
    root = make_folders(tmp_path / "d" / "train", {"ant": 2, "bee": 6, "cow": 3}).parent
    make_folders(root / "test", {"ant": 1, "cow": 2})
    (root / "train" / "bee" / "000.png").write_bytes(b"?")
    config = DataConfig(source=str(root), classes="cow,bee,ant", skip_broken=True)
    text = inspect_dataset(config, tmp_path / "sheet.png", per_class=3)
    assert row_of(text, "cow") == ["0", "2", "3", "2", "cow"]
    assert row_of(text, "bee") == ["1", "1", "5", "0", "bee"]
    assert "2 to 5 images each, the largest is 2.5 times the smallest" in text
    assert "1 broken image\n  train/bee/000.png: it is not an image" in text
    assert "--data.classes cow,bee,ant" in text and "--data.skip_broken True" in text


def test_sheet_shows_images_by_class(tmp_path):
    root = make_folders(tmp_path / "d", {"ant": 3, "bee": 1})
    inspect_dataset(DataConfig(source=str(root), heldout_fraction=0.0), tmp_path / "sheet.png", per_class=3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet).reshape(-1, 3)
    for colour in ((0, 0, 99), (0, 1, 99), (0, 2, 99), (1, 0, 99)):
        assert (pixels == colour).all(1).sum() == 64 * 64
    assert not (pixels == (1, 1, 99)).all(1).any()


def test_sheet_limits_the_classes(tmp_path):
    root = make_folders(tmp_path / "d", {f"c{i:02}": 1 for i in range(53)})
    text = inspect_dataset(DataConfig(source=str(root), heldout_fraction=0.0), tmp_path / "sheet.png", per_class=1)
    assert "(the first 50 of 53 classes)" in text
    assert row_of(text, "c52")[0] == "52"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert 50 * 68 < sheet.height < 51 * 68 + 60


def test_invalid_arguments_are_rejected(tmp_path):
    with pytest.raises(InputError, match="at least 1"):
        inspect_dataset(DataConfig(), tmp_path / "sheet.png", per_class=0)
    (tmp_path / "file").write_text("-")
    with pytest.raises(InputError, match=r"file cannot be written to .*name another folder"):
        inspect_dataset(DataConfig(), tmp_path / "file" / "sheet.png")


def test_held_out_part_can_be_inspected(tmp_path):
    text = inspect_dataset(DataConfig(source="digits:heldout"), tmp_path / "sheet.png")
    assert "digits:heldout, 90 images" in text
    assert "Next" not in text
