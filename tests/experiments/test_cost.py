"""What a sweep costs: network evaluations, and time from timed batches."""

import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.experiments import cost, models
from diffusion_adagn.experiments.models import SweepModels
from diffusion_adagn.experiments.points import grid_of
from diffusion_adagn.experiments.settings import SweepRequest


@pytest.fixture
def model(tmp_path):
    folder, labels = tmp_path / "pipe", LabelSpace(("0", "1", "2"))
    ClassConditionalPipeline(tiny_unet(), make_scheduler(DiffusionConfig()), labels).save_pretrained(folder)
    return folder


def test_points_cost_the_model_and_its_guide(model, monkeypatch):
    timed = []
    monkeypatch.setattr(models, "seconds_per_image", lambda *a: timed.append(a[1:]) or 0.5)
    [weights] = grid_of([str(model)], SweepRequest()).models
    request = SweepRequest(axes={"guidance.scale": (1, 3), "guidance.interval": ("none", "steps:0-1"), "steps": (4,)})
    grid, loaded = grid_of([str(model)], request), SweepModels("fp32", torch.device("cpu"), 8)
    points = grid.points_of(weights, loaded.model(weights).resolved)
    costs = {p.name: loaded.cost(p.sampler, p.model, p.guide) for p in points}
    assert {name: (c.calls, c.guided, c.seconds) for name, c in costs.items()} == {
        "g1_ddim4_leading": (4, 0, 2.0), "g3_ddim4_leading": (4, 4, 4.0), "g3_steps0-1_ddim4_leading": (4, 2, 3.0),
    }  # fmt: skip
    assert timed == [(8, "fp32")]  # one architecture, once
    text = cost.format_cost(costs.values(), 100, 0.01, 2, 8)
    assert text.startswith("cost: 3 points of 100 images, 1,800 network evaluations, about 8 min")


def test_seconds_are_those_of_batches(model):
    seconds = cost.seconds_per_image(ClassConditionalPipeline.from_pretrained(model), 4, "fp32")
    assert 0 < seconds < 5


def test_finished_sweep_costs_nothing():
    assert cost.format_cost([], 100, 0.1, 1, 8) == "cost: nothing is left to sample"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (4800, "80 min"), (9000, "2.5 h")]
)
def test_durations_are_short(seconds, text):
    assert cost.duration(seconds) == text
