"""What the main process does alone, beside training, holds no more rows of the network than one pass of training."""

import json

import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import LabelSpace
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import DiffusionConfig, TrainingConfig
from diffusion_adagn.data import ImageDataset
from diffusion_adagn.diffusion.loss import DiffusionLoss
from diffusion_adagn.diffusion.schedule import make_process
from diffusion_adagn.evaluation.label_usage import label_use
from diffusion_adagn.models.unet import AdaGNUNet
from diffusion_adagn.training.validation import heldout_loss

TINY = {
    "model.model_channels": 16, "model.channel_mult": "1", "model.num_res_blocks": 1, "model.attention_resolutions": 4,
    "model.num_head_channels": 16, "model.norm_groups": 4, "training.batch_size": 16, "training.max_steps": 1,
    "training.diagnostics_every": 1, "training.heldout_every": 1, "training.preview_every": 1, "training.preview_steps": 2,
}  # fmt: skip
OBJECTIVE = DiffusionLoss(make_process(DiffusionConfig()))


@pytest.fixture
def rows(monkeypatch):
    """Gives a list: the rows of each call of a network."""
    counted, denoise = [], AdaGNUNet.denoise

    def counting(unet, x, m):
        if x.device.type != "meta":
            counted.append(len(x))
        return denoise(unet, x, m)

    monkeypatch.setattr(AdaGNUNet, "denoise", counting)
    return counted


def train(out, **changes):
    settings = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    assert main(["train", "--output_dir", str(out), *(f"--{k}={v}" for k, v in settings.items()), "--debug"]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {key: value for line in lines for key, value in line.items()}, (
        out / "previews/step-00000001.png"
    ).read_bytes()


def images(count, classes=3):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 8, 8, 1), generator=generator, dtype=torch.uint8).numpy()
    labels = (torch.arange(count) * classes // count).numpy()  # sorted, as class folders are
    return ImageDataset("some", pixels, labels, LabelSpace(tuple(f"c{i}" for i in range(classes))), "x")


def test_diagnostics_stay_within_pass_size(tmp_path, rows):
    whole, preview = train(tmp_path / "whole", training__batch_size=96)
    assert max(rows) == 96  # 32 images under 3 labels: nothing is cut
    rows.clear()
    cut, same = train(tmp_path / "cut", training__batch_size=96, training__gradient_accumulation=16)
    assert max(rows) == 6
    assert cut["heldout_loss"] == pytest.approx(whole["heldout_loss"], rel=1e-5)
    assert cut["label_gap_wrong"] == pytest.approx(whole["label_gap_wrong"], abs=1e-6)
    assert same == preview


def test_one_row_passes_split_labels(rows):
    unet, data = tiny_unet(), images(6)
    whole = label_use(unet, data, OBJECTIVE, evaluations=6)
    assert rows == [18]
    rows.clear()
    parted = label_use(unet, data, OBJECTIVE, evaluations=6, max_rows=1)
    assert rows == [1] * 18
    for label in ("true", "wrong", "null"):
        assert torch.allclose(getattr(whole, label), getattr(parted, label), rtol=1e-5, atol=0, equal_nan=True)


def test_heldout_loss_covers_every_class(monkeypatch):
    data, seen = images(5000, classes=1000), []
    gather = ImageDataset.gather

    def gathering(dataset, indices, out=None):
        pixels, labels = gather(dataset, indices, out)
        seen.extend(labels.tolist())
        return pixels, labels

    monkeypatch.setattr(ImageDataset, "gather", gathering)
    monkeypatch.setattr(AdaGNUNet, "forward", lambda unet, x, t, y: type("Out", (), {"sample": torch.zeros_like(x)}))
    training = TrainingConfig(batch_size=128)
    heldout_loss(tiny_unet(num_classes=1000), data, OBJECTIVE, training, torch.no_grad, torch.device("cpu"))
    assert len(seen) == 512 and len(set(seen)) == 512  # each of another class
    assert all(abs(label - 1000 * i / 512) < 2 for i, label in enumerate(seen))


def test_small_heldout_sets_are_taken_whole(monkeypatch):
    data = images(90)
    loss = heldout_loss(tiny_unet(), data, OBJECTIVE, TrainingConfig(batch_size=32), torch.no_grad, torch.device("cpu"))
    gathered = []
    monkeypatch.setattr(ImageDataset, "gather", lambda d, i, out=None: gathered.extend(i) or (d.images[i], d.labels[i]))
    heldout_loss(tiny_unet(), data, OBJECTIVE, TrainingConfig(batch_size=32), torch.no_grad, torch.device("cpu"))
    assert gathered == list(range(90)) and loss > 0
