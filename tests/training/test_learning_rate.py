"""The learning rate: against formulas written out, and in a run."""

import json
import math

import pytest
from tiny_run import assert_same_run, run

from diffusion_adagn.config import TrainingConfig, read_config, to_yaml
from diffusion_adagn.errors import InputError
from diffusion_adagn.training.learning_rate import learning_rate

DECAY = {"training__lr_decay": "inverse_sqrt", "training__lr_decay_images": 48, "training__warmup_images": 40}


def rates(steps, **settings):
    training = TrainingConfig(lr=0.3, **settings)
    return [learning_rate(training, step) for step in steps]


def before(training, step):
    """The rate as it was before warm-up in images and inverse_sqrt existed."""
    if step < training.warmup_steps:
        return training.lr * (step + 1) / training.warmup_steps
    if training.lr_decay == "none":
        return training.lr
    done = (step - training.warmup_steps) / max(1, training.max_steps - training.warmup_steps)
    return training.lr * (1 - done if training.lr_decay == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 49])
def test_rates_of_old_settings_are_unchanged(decay, warmup):
    training = TrainingConfig(lr=0.3, max_steps=100, warmup_steps=warmup, lr_decay=decay)
    assert [learning_rate(training, s) for s in range(100)] == [before(training, s) for s in range(100)]


def test_inverse_sqrt_by_hand():
    """lr 0.3, 10 images a step, decay from image 40 on: steps 0..4 have seen at most 40."""
    got = rates((0, 4, 8, 16, 36), batch_size=10, lr_decay="inverse_sqrt", lr_decay_images=40)
    assert got == pytest.approx([0.3, 0.3, 0.3 / math.sqrt(2), 0.3 / 2, 0.3 / 3], rel=1e-12)


def test_rate_depends_on_images_and_not_on_the_batch():
    settings = {"lr_decay": "inverse_sqrt", "lr_decay_images": 500, "warmup_images": 400}
    small = rates(range(0, 400, 4), batch_size=10, **settings)  # image 0, 40, 80, ...
    large = rates(range(100), batch_size=40, **settings)
    assert small[10:] == pytest.approx(large[10:], rel=1e-12)  # after the warm-up, which counts the step's own images


def test_warmup_in_images():
    steps = range(40)
    whole = rates(steps, batch_size=10, warmup_images=200, max_steps=40, lr_decay="cosine")
    assert whole == rates(steps, batch_size=10, warmup_steps=20, max_steps=40, lr_decay="cosine")
    part = rates(steps, batch_size=10, warmup_images=25)  # no multiple of the batch: never above lr
    assert part[:4] == pytest.approx([0.3 * 10 / 25, 0.3 * 20 / 25, 0.3, 0.3], rel=1e-12)
    assert rates((0, 1), batch_size=100, warmup_images=3) == [0.3, 0.3]
    both = rates((1,), batch_size=10, warmup_images=40, lr_decay="inverse_sqrt", lr_decay_images=5)
    assert both == pytest.approx([0.3 * (20 / 40) / math.sqrt(10 / 5)], rel=1e-12)


def test_contradictions_are_rejected():
    with pytest.raises(InputError, match=r"warmup_steps 5 and training.warmup_images 7 .* set one of them to 0"):
        TrainingConfig(warmup_steps=5, warmup_images=7)
    with pytest.raises(InputError, match=r"needs training.lr_decay_images.*training.lr_decay_images 200000"):
        TrainingConfig(lr_decay="inverse_sqrt")


def test_config_files_without_the_new_settings(tmp_path):
    (tmp_path / "old.yaml").write_text("training: {warmup_steps: 3, lr_decay: cosine}")
    training = read_config(tmp_path / "old.yaml").training
    assert (training.warmup_steps, training.warmup_images, training.lr_decay_images) == (3, 0, None)
    (tmp_path / "new.yaml").write_text(to_yaml(read_config(tmp_path / "old.yaml")))
    assert read_config(tmp_path / "new.yaml") == read_config(tmp_path / "old.yaml")


@pytest.mark.slow
def test_resumed_run_has_the_rates_of_an_uninterrupted_one(tmp_path):
    """inverse_sqrt reads no max_steps: a run of 4 steps that is extended to 6 equals one of 6."""
    changes = DECAY | {"training__diagnostics_every": 0}
    assert run(tmp_path / "whole", **changes) == 0
    assert run(tmp_path / "parts", **changes | {"training__max_steps": 4}) == 0
    assert run(tmp_path / "parts", "--resume", "auto", **changes) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    lines = map(json.loads, (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
    logged = [line["lr"] for line in lines if "lr" in line]
    ramp = [min((s + 1) * 16 / 40, 1) for s in range(6)]
    assert logged == pytest.approx([1e-3 * r / math.sqrt(max(16 * s / 48, 1)) for s, r in enumerate(ramp)], rel=1e-4)
