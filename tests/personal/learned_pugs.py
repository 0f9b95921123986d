"""A tiny model, images, and a class of each depth learned from them."""

from contextlib import contextmanager

import numpy as np
import pytest
from conftest import tiny_unet
from PIL import Image

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.personal.learn import learn_class
from diffusion_adagn.personal.settings import LearnRequest

DEPTHS = ("vector", "sites", "layers")
QUICK = {"steps": 6, "batch_size": 2, "check_every": 2, "preview_every": 0}
LABELS = LabelSpace(("cat", "dog", "bird"))


def pipeline(process="ddpm", **network):
    unet = tiny_unet(**network)
    diffusion = DiffusionConfig(process=process, sigma_data=0.5 if process == "edm" else None)
    scheduler = make_scheduler(diffusion, learned_variance=unet.config.learned_variance)
    pipe = ClassConditionalPipeline(unet, scheduler, LABELS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_images(folder, count=6, side=11, mode="L"):
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        shape = (side, side) if mode == "L" else (side, side, len(mode))
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8), mode).save(folder / f"image{i}.png")
    return folder


@contextmanager
def few_measurements():
    """Fewer draws than users get: the tests are about what is done with them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PAIRS": 16, "START_EVALUATIONS": 16}.items():
            patch.setattr(f"diffusion_adagn.personal.learner.{name}", value)
        for name, value in {"PAIRS": 16, "SAMPLES": 8, "SAMPLER_STEPS": 3}.items():
            patch.setattr(f"diffusion_adagn.trace.learned.{name}", value)
        for name, value in {"PREVIEW_STEPS": 2, "PREVIEW_IMAGES": 2}.items():
            patch.setattr(f"diffusion_adagn.personal.learn.{name}", value)
        yield


def make_model(root):
    """model/, a pipeline; pugs/, images; and a file of each depth, whose class has its name."""
    pipeline().save_pretrained(root / "model")
    images = write_images(root / "pugs")
    with few_measurements():
        for depth in DEPTHS:
            request = LearnRequest(images=str(images), name=depth, depth=depth, **QUICK)
            learn_class(root / "model", request, root / f"{depth}.safetensors")


def load(model, *depths):
    pipe = ClassConditionalPipeline.from_pretrained(model / "model")
    pipe.set_progress_bar_config(disable=True)
    for depth in depths:
        assert pipe.load_class(model / f"{depth}.safetensors") == depth
    return pipe


def sample(pipe, classes, **arguments):
    return pipe(classes, seeds=0, num_inference_steps=4, output_type="np", **arguments).images
