"""The zero-shot classifier: levels, stages and drop-out against plain loops, and the shipped model on real digits."""

import math

import numpy as np
import pytest
import torch

from diffusion_adagn.data import open_dataset
from diffusion_adagn.data.rng import normal
from diffusion_adagn.diffusion.process import edm, flow
from diffusion_adagn.evaluation.zero_shot import (
    FIRST,
    MAX_DRAWS,
    LabelLevels,
    _compare,
    _stage_ends,
    classify,
)
from diffusion_adagn.sampling.load import open_pipeline
from diffusion_adagn.trace.tracing import objective_of


@pytest.fixture(scope="module")
def digits():
    pipe, _ = open_pipeline("digits", "run")
    images = open_dataset({"source": "digits"}, "heldout")
    pixels, labels = images.gather(np.arange(8))
    return pipe.unet, objective_of(pipe, "digits").process, torch.from_numpy(pixels), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def found(digits):
    unet, process, pixels, _ = digits
    return classify(unet, process, pixels, draws=8)


def test_shipped_model_finds_the_class(digits, found):
    labels = digits[3]
    curve = found.curve(labels)
    assert curve[-1][1] == 1
    assert [s.draws for s in found.stages] == [1, 2, 4, 8] and found.probing == 16 * 8 * 10
    first, last = found.stages[2].evaluations, found.stages[-1].evaluations
    assert (first == 40).all() and (last >= first).all() and last.float().mean() < 60  # of 80 without drop-out
    assert curve[-1][0] == pytest.approx(last.double().mean().item() + found.probing / 8)


def test_first_stage_equals_a_loop(digits, found):
    """The losses of each class, by the definition, one image, class and draw at a time."""
    unet, process, pixels, _ = digits
    u, weight = found.levels.draw((torch.arange(FIRST).double() * (math.sqrt(5) - 1) / 2 + 0.5) % 1)
    for i in (0, 5, 7):
        sums = np.zeros(10)
        for label in range(10):
            for j in range(FIRST):
                x0 = pixels[i].permute(2, 0, 1).double() / 127.5 - 1
                noise = normal(0, "zero_shot", torch.tensor([i * MAX_DRAWS + j]), (1, 8, 8))[0].double()
                level = process.level(process.quantile(u[j : j + 1])).item()
                x = level.alpha * x0 + level.sigma * noise
                with torch.no_grad():
                    out = unet(x[None].float(), torch.tensor([level.time]).float(), torch.tensor([label])).sample[0]
                target = (x0 - level.skip * x) / level.out
                sums[label] += weight[j].item() * (out.double() - target).square().mean().item()
        assert sums.argmin() == found.stages[2].predicted[i]


def test_result_does_not_depend_on_the_batch_size(digits, found):
    unet, process, pixels, _ = digits
    other = classify(unet, process, pixels, draws=8, batch_size=48)
    assert other.predicted.equal(found.predicted) and other.second.equal(found.second)
    assert other.margin == pytest.approx(found.margin, rel=1e-3)


def test_levels_are_drawn_in_proportion_to_the_influence():
    influence = torch.tensor([0.0, 1.0, 3.0, 0.0], dtype=torch.float64)
    levels = LabelLevels(torch.arange(4.0), influence, torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    u, weight = levels.draw((torch.arange(4000).double() + 0.5) / 4000)
    counts, _ = np.histogram(u.numpy(), bins=4, range=(0, 1))
    assert counts.tolist() == [0, 1000, 3000, 0]
    assert u.diff().min() > 0  # within a cell evenly
    assert weight.tolist() == [levels.weight[int(x * 4)].item() for x in u]


def test_a_class_two_standard_errors_behind_drops_out():
    rng = np.random.default_rng(0)
    common = rng.normal(10, 5, 64)  # all classes have the same noise
    gaps = np.array([0.5, 0.0, 0.05, 2.0])
    losses = torch.from_numpy(common + gaps[:, None] + rng.normal(0, 0.2, (4, 64)) * np.array([1, 0, 1, 1])[:, None])
    remaining = torch.tensor([True, True, True, True])
    best, second, margin = _compare(losses, remaining)
    difference = (losses - losses[1]).numpy()
    behind = difference.mean(1) / (difference.std(1, ddof=1) / 8 + 1e-300)
    assert (best, second) == (1, 2) and margin == pytest.approx(behind[2])
    assert _compare(losses[:, :3], torch.ones(4, dtype=torch.bool))[0] == 1  # too few draws for a class to drop out
    assert remaining.tolist() == [False, True, bool(behind[2] <= 2), False]


@pytest.mark.parametrize(
    ("draws", "ends"), [(4, [1, 2, 4]), (5, [1, 2, 4, 5]), (16, [1, 2, 4, 8, 16]), (50, [1, 2, 4, 8, 16, 32, 50])]
)
def test_stages_double(draws, ends):
    assert _stage_ends(draws) == ends


class Oracle(torch.nn.Module):
    """A network that knows the class means exactly: constant images of the class's gray level."""

    def __init__(self, process, means):
        super().__init__()
        self.process, self.means, self.device = process, means, torch.device("cpu")
        self.config = type("Config", (), {"num_classes": len(means)})

    def forward(self, x, time, label):
        level = self.process.level(time.double())
        wide = [value.float()[:, None, None, None] for value in (level.skip, level.out)]
        x0 = self.means[label][:, None, None, None].expand_as(x)
        return type("Output", (), {"sample": (x0 - wide[0] * x) / wide[1]})


@pytest.mark.parametrize("process", [edm(0.5), flow()])
def test_oracle_is_always_right(process):
    means = torch.linspace(-0.8, 0.8, 12)
    labels = torch.arange(12).repeat(3)
    pixels = ((means[labels] + 1) * 127.5).round().to(torch.uint8)[:, None, None, None].expand(36, 4, 4, 1)
    found = classify(Oracle(process, means), process, pixels.contiguous(), draws=4)
    assert found.predicted.equal(labels)
    assert (found.second - labels).abs().max() == 1


def test_label_that_changes_nothing():
    process = flow()
    found = classify(Oracle(process, torch.zeros(3)), process, torch.zeros(5, 4, 4, 1, dtype=torch.uint8), draws=8)
    assert found.levels.influence.equal(torch.ones(16).double())
    assert (found.stages[-1].evaluations == 24).all()  # no class drops out
