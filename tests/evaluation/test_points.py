"""Sampling one setting: batches by index, files that are not made twice, a meter that looks on."""

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import tiny_unet

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.process import ddpm_level
from diffusion_adagn.diffusion.schedule import ModelEval, make_scheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation.diagnostics import GuidanceMeter, compared_with_data, image_values
from diffusion_adagn.evaluation.features import FeatureSet
from diffusion_adagn.evaluation.points import PointSampler, SamplePlan
from diffusion_adagn.sampling.guidance import Guidance
from diffusion_adagn.sampling.pipeline import to_pixels
from diffusion_adagn.sampling.settings import SamplerSettings


class Pixels:
    """An extractor: the images themselves."""

    name, hash, class_names = "pixels", "0" * 16, None

    def __call__(self, pixels):
        flat = pixels.reshape(len(pixels), -1).astype("float32")
        return FeatureSet(flat, None)


@pytest.fixture(scope="module")
def pipe():
    pipe = ClassConditionalPipeline(tiny_unet(), make_scheduler(DiffusionConfig()), LabelSpace(("cat", "dog", "bird")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Process:
    """One of several processes, as `PointSampler` knows them."""

    def __init__(self, index=0, count=1):
        self.process_index, self.num_processes, self.is_main_process = index, count, index == 0

    def wait_for_everyone(self):
        pass


POINT = SamplerSettings(Guidance(2.0, "t:200-800"), sampler="ddim", spacing="leading", steps=4)
DRAW = SamplePlan((0, 1, 2), count=11, seed=5, batch_size=3, shown=2)


def test_sampled_images_equal_the_pipeline(pipe, tmp_path):
    sampled = PointSampler(pipe, POINT, DRAW, [Pixels()], keep_pixels=True).sample(tmp_path, PartialState(cpu=True))
    labels = [i % 3 for i in range(11)]
    assert sampled.labels.tolist() == labels
    whole = pipe(labels, num_inference_steps=4, seeds=5, guidance=POINT.guidance, output_type="np").images
    assert np.abs(sampled.pixels.astype(int) - to_pixels(whole)).max() <= 1
    assert np.array_equal(sampled.features["pixels"].pooled, sampled.pixels.reshape(11, -1))
    assert np.allclose(sampled.values, image_values(sampled.pixels))
    # the grid: one row per class, images 0 1 2 and 3 4 5
    assert sampled.shown.shape == (3, 2, 8, 8, 1)
    for row in range(3):
        assert np.array_equal(sampled.shown[row], sampled.pixels[[row, row + 3]])


def test_finished_batches_are_not_repeated(pipe, tmp_path):
    alone = PointSampler(pipe, POINT, DRAW, [Pixels()]).sample(tmp_path / "one", Process())
    counts = []
    PointSampler(pipe, POINT, DRAW, [Pixels()]).sample(tmp_path / "two", Process(1, 2), on_batch=counts.append)
    assert counts == [3, 2] and len(list((tmp_path / "two").iterdir())) == 2
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "two").iterdir()}
    together = PointSampler(pipe, POINT, DRAW, [Pixels()]).sample(tmp_path / "two", Process())
    assert {f: f.stat().st_mtime_ns for f in before} == before
    for name in ("labels", "values", "difference", "clipped", "shown"):
        assert np.array_equal(getattr(alone, name), getattr(together, name)), name
    assert np.array_equal(alone.features["pixels"].pooled, together.features["pixels"].pooled)


def test_corrupted_batch_is_sampled_again(pipe, tmp_path):
    first = PointSampler(pipe, POINT, DRAW, [Pixels()]).sample(tmp_path, Process())
    files = sorted(tmp_path.glob("*.npz"))
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    files[2].write_bytes(b"")
    (tmp_path / ".123.batch-000003.npz").write_bytes(whole[:100])  # broken off while it was written
    bits = bytearray(files[0].read_bytes())
    bits[len(bits) // 2] ^= 255
    files[0].write_bytes(bytes(bits))
    again = PointSampler(pipe, POINT, DRAW, [Pixels()]).sample(tmp_path, Process())
    assert np.array_equal(first.features["pixels"].pooled, again.features["pixels"].pooled)
    assert np.array_equal(first.values, again.values)


def test_meter_measures_guidance_and_clipping(pipe, tmp_path):
    sampled = PointSampler(pipe, POINT, DRAW, []).sample(tmp_path, Process())
    calls = pipe.prepare(POINT)
    assert [d > 0 for d in sampled.difference] == [200 <= call.t <= 800 for call in calls]
    meter, level = GuidanceMeter(2), ddpm_level(10.0, 0.995, 0.0995, "eps")
    cond, null = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    x0 = torch.tensor([0.5, 1.5, -2.0, 1.0]).repeat(2, 12).reshape(2, 3, 4, 4)
    for rows in (slice(0, 1), slice(1, 2)):  # batches add up
        meter.on_guidance(ModelEval(1, 1, 10.0, 0.01, 0.1, level), cond[rows], null[rows])
        meter.on_pred_x0(ModelEval(0, 0, 10.0, 0.01, 0.1, level), x0[rows])
    by_hand = sum(np.sqrt(np.mean((cond[i] - null[i]).numpy() ** 2)) for i in range(2))
    assert meter.difference == pytest.approx([0, by_hand])
    assert meter.clipped == pytest.approx([2 * 0.5, 0])


def test_colour_and_contrast():
    flat = np.full((1, 4, 4, 3), 128, np.uint8)
    red = flat.copy()
    red[..., 0] = 255
    halves = np.zeros((1, 4, 4, 3), np.uint8)
    halves[:, :2] = 255
    gray, red_, half = (image_values(p)[0] for p in (flat, red, halves))
    assert gray == pytest.approx([128 / 255, 0, 0, 0])
    assert red_ == pytest.approx([(128 * 2 + 255) / 3 / 255, 0, 127 / 255, 1 / 3])
    assert half == pytest.approx([0.5, 0.5, 0, 1])
    found = compared_with_data(half, np.array([0.4, 0.25, 0.0, 0.1]))
    assert found == {
        "contrast_ratio": 2.0,
        "saturation_ratio": None,
        "brightness_shift": pytest.approx(0.1),
        "extremes_shift": 0.9,
    }


def test_scale_1_points_are_one():
    settings = {"interval": "t:1-2", "schedule": "cosine", "rescale": 0.5}
    neutral = SamplerSettings()
    assert SamplerSettings(Guidance(1.0, **settings), guide="x").canonical() == neutral
    # thresholding has an effect without guidance too
    assert SamplerSettings(Guidance(threshold=0.9)).canonical() != neutral
    guided = SamplerSettings(Guidance(2.0, **settings), guide="x")
    assert guided.canonical() == guided


def test_point_names_are_unique():
    points = [
        SamplerSettings(Guidance(scale, interval, schedule, rescale, threshold), guide, sampler, steps, eta, spacing)
        for scale in (1.0, 1.5, 1.5000001, 10.0)
        for interval in ("none", "t:2-8", "sigma:0.2-8", "0.2-0.8")
        for schedule in ("constant", "power:2", "cosine:2")
        for rescale in (0.0, 0.7)
        for threshold in (None, 0.99)
        for guide in (None, "runs/small")
        for sampler in ("dpm++", "ddpm")
        for steps in (10, 100)
        for eta in (0.0, 0.5)
        for spacing in ("leading", "trailing")
    ]
    names = {p.name for p in points}
    assert len(names) == len(points)
    assert all(set(n) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for n in names)


def test_impossible_plans_are_rejected():
    for settings in ({"classes": ()}, {"count": 0}, {"seed": -1}, {"seed": 2**63 - 5}, {"batch_size": 0}):
        with pytest.raises(InputError):
            SamplePlan(**({"classes": (0,), "count": 10} | settings))
    assert SamplePlan((0, 0, 1), 5).classes == (0, 1)
    assert SamplePlan((0, 1, 2), 2).grid.tolist() == [[0], [1]]
