"""The figures of benchmarks/guidance_input.py and random_class.py on networks with known answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from benchmarks import guidance_input, random_class
from diffusion_adagn import ClassConditionalPipeline, Guidance, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler


def pipeline(**changes):
    unet = tiny_unet(num_classes=10, **changes)
    pipe = ClassConditionalPipeline(unet, make_scheduler(DiffusionConfig()), LabelSpace(tuple("0123456789")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_share_is_1_for_the_exact_student_and_0_without_guidance():
    teacher, student = pipeline(), pipeline(max_guidance_scale=4.0)
    student.unet.load_state_dict(teacher.unet.state_dict() | {"embedding.scale.weight": torch.zeros(64, 16)})
    assert guidance_input.share_explained(student, teacher, 2.0) == pytest.approx(0, abs=1e-4)

    def exact(x, time, labels, guidance_scale):
        cond, null = (teacher.unet(x, time, y).sample for y in (labels, torch.full_like(labels, 10)))
        return SimpleNamespace(sample=null + guidance_scale * (cond - null))

    perfect = SimpleNamespace(unet=exact, process=teacher.process)
    assert guidance_input.share_explained(perfect, teacher, 4.0) == pytest.approx(1, abs=1e-6)


def test_image_of_the_random_class_bench_is_that_of_its_seed(monkeypatch):
    monkeypatch.setattr(random_class, "STEPS", 2)
    pipe, seen = pipeline(null_class=True), []
    judge = SimpleNamespace(classes=lambda images: seen.extend(images) or np.arange(len(images)) % 10)
    right = random_class.is_right(pipe, judge, 110, Guidance(2.0, negative="random"))
    assert right.all() and len(right) == 110
    one = pipe("5", guidance=Guidance(2.0, negative="random"), num_inference_steps=2, sampler="dpm++",
               output_type="np", seeds=105).images  # fmt: skip
    assert np.abs(seen[105] - one[0]).max() < 1e-4
