"""The small objects under the loop."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn.config import DataConfig, DiffusionConfig, TrainingConfig
from diffusion_adagn.data import open_dataset
from diffusion_adagn.diffusion.loss import normalize_images
from diffusion_adagn.diffusion.schedule import make_process
from diffusion_adagn.runs.checkpoint import checkpoints, load_checkpoint, remove_old, save_checkpoint
from diffusion_adagn.training.ema import EMA
from diffusion_adagn.training.learning_rate import learning_rate
from diffusion_adagn.training.loader import BatchLoader
from diffusion_adagn.training.logger import Metrics
from diffusion_adagn.training.setup import check_tracker

CPU = torch.device("cpu")
PROCESS = make_process(DiffusionConfig())


@pytest.fixture(scope="module")
def digits():
    return open_dataset(DataConfig(), "train", progress=False)


def test_process_draws_its_own_samples(digits):
    batches = BatchLoader(digits, seed=0, process=PROCESS, device=CPU, label_dropout=0.3, flip=True)
    whole = batches.batch(torch.arange(64, 96))
    for parts in (2, 4):
        dealt = [batches.batch(p) for p in torch.arange(64, 96).chunk(parts)]
        for name in ("x0", "noise", "quantile", "labels", "indices"):
            assert torch.equal(torch.cat([getattr(b, name) for b in dealt]), getattr(whole, name)), name
        for value, *rest in zip(whole.level, *(b.level for b in dealt)):
            assert torch.equal(torch.cat(rest), value)


def test_images_and_labels_match(digits):
    batch = BatchLoader(digits, seed=0, process=PROCESS, device=CPU).batch(torch.arange(50))
    pixels, labels = digits.gather(batch.indices.numpy())
    assert torch.equal(batch.labels, torch.from_numpy(labels))
    assert torch.equal(((batch.x0 + 1) * 127.5).round().byte(), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert batch.x0.min() >= -1
    assert batch.x0.max() <= 1


def test_labels_drop_at_their_rate(digits):
    batches = BatchLoader(digits, seed=0, process=PROCESS, device=CPU, label_dropout=0.2)
    positions = torch.arange(1000)
    dropped = (batches.batch(positions).labels == 10).float()
    assert dropped.mean().item() == pytest.approx(0.2, abs=0.04)
    assert 0 < dropped[:50].mean() < 1  # not a whole batch at once
    saved = batches.batch(positions).labels[dropped == 0]
    true = torch.from_numpy(digits.gather(batches.order(positions).numpy())[1])[dropped == 0]
    assert torch.equal(saved, true)
    assert (BatchLoader(digits, 0, PROCESS, CPU, label_dropout=0.0).batch(positions).labels < 10).all()
    assert BatchLoader(digits, 0, PROCESS, CPU, conditional=False).batch(positions).labels is None


def test_timesteps_uniform_and_flips_half(digits):
    process = make_process(DiffusionConfig(num_train_timesteps=20))
    plain = BatchLoader(digits, 0, process, CPU).batch(torch.arange(1600))
    assert torch.bincount(plain.level.time.long(), minlength=20).tolist() == pytest.approx([80] * 20, abs=40)
    mirrored = BatchLoader(digits, 0, process, CPU, flip=True).batch(torch.arange(1600))
    same = (plain.x0 == mirrored.x0).flatten(1).all(1)
    assert same.float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert torch.equal(plain.x0[~same].flip(-1), mirrored.x0[~same])


def test_to_unit():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 2, 1)
    assert normalize_images(pixels).flatten().tolist() == [-1.0, 1.0]


def test_ema_equals_its_formula():
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(net.weight, 0.0)
    ema, shadow = EMA(net, decay=0.9), 0.0
    for step in range(1, 200):
        torch.nn.init.constant_(net.weight, float(step))
        ema.update(net, step)
        d = min(0.9, (1 + step) / (10 + step))
        shadow = d * shadow + (1 - d) * step
        assert ema.model.weight.item() == pytest.approx(shadow, rel=1e-5)
    assert EMA(net, 0.9999).rate(1) == 2 / 11  # early images are not noise
    assert EMA(net, 0.9999).rate(10**6) == 0.9999


def test_ema_is_float32():
    net = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.constant_(net.weight, 1.0)
    ema = EMA(net, decay=0.9999)
    torch.nn.init.constant_(net.weight, 2.0)
    for _ in range(100):
        ema.update(net, step=10**6)
    assert ema.model.weight.dtype == torch.float32
    assert ema.model.weight.item() == pytest.approx(2 - 0.9999**100, rel=1e-4)


def test_learning_rate():
    t = TrainingConfig(max_steps=110, lr=1.0, warmup_steps=10)
    assert [learning_rate(t, s) for s in (0, 4, 9, 10, 109)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    t.lr_decay = "linear"
    assert learning_rate(t, 60) == pytest.approx(0.5)
    t.lr_decay = "cosine"
    assert learning_rate(t, 35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_metrics_are_truncated_on_resume(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 3}\n{"step": 4, "lo')
    metrics = Metrics(file, last_step=2)
    metrics.write(step=3, loss=30.0)
    assert file.read_text() == '{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 30.0}\n'


def test_missing_tracker_names_its_package():
    from diffusion_adagn.errors import InputError

    with pytest.raises(InputError, match=r"pip install 'diffusion-adagn\[trackio\]'"):
        check_tracker("trackio")


def test_checkpoints_restore_and_prune(tmp_path):
    unet = tiny_unet().train()
    ema, optimizer = EMA(unet, 0.9), torch.optim.AdamW(unet.parameters(), lr=1e-3)

    def step(u, o, e, i):
        u(torch.ones(1, 1, 8, 8), 3, torch.tensor([1])).sample.square().sum().backward()
        o.step()
        o.zero_grad()
        e.update(u, i)

    for i in range(1, 5):
        step(unet, optimizer, ema, i)
        save_checkpoint(tmp_path, {"step": i}, unet, ema.model, optimizer)
        remove_old(tmp_path, keep=2)
    (tmp_path / "step-00000009").mkdir()  # no state.json: never finished
    (tmp_path / ".step-00000010.1").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert {f.name for f in checkpoints(tmp_path)[-1].iterdir()} == {
        "state.json", "manifest.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors"
    }  # fmt: skip

    other = tiny_unet(dropout=0.0).train()
    torch.nn.init.zeros_(other.conv_in.weight)
    other_ema, other_optimizer = EMA(other, 0.9), torch.optim.AdamW(other.parameters(), lr=1e-3)
    load_checkpoint(checkpoints(tmp_path)[-1], other, other_ema.model, other_optimizer)
    step(unet, optimizer, ema, 5)
    step(other, other_optimizer, other_ema, 5)
    for a, b in ((unet, other), (ema.model, other_ema.model)):
        for (name, p), q in zip(a.named_parameters(), b.parameters()):
            assert torch.equal(p, q), name
    assert np.isfinite(sum(p.sum().item() for p in other.parameters()))
