"""Old names of settings, options and exported names are still accepted."""

import pytest
import torch
from conftest import tiny_unet

import diffusion_adagn
from diffusion_adagn import ClassConditionalPipeline, Guidance, LabelSpace, renamed
from diffusion_adagn.cli.train import parser
from diffusion_adagn.config import DataConfig, DiffusionConfig, read_config
from diffusion_adagn.data.find import find_source
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.schema import fields_of


def test_old_settings_are_read(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("training: {most_faults: 3, signals_every: 7, warn_unused_after: 9}\nspeed: {layout: contiguous}\n")
    config = read_config(file)
    assert (config.training.max_nonfinite_steps, config.training.diagnostics_every) == (3, 7)
    assert (config.training.warn_label_unused_after, config.speed.memory_format) == (9, "contiguous")


def test_new_settings_exist():
    known = {setting.key for setting in fields_of(diffusion_adagn.RunConfig)}
    assert set(renamed.CONFIG_KEYS.values()) <= known and not set(renamed.CONFIG_KEYS) & known


@pytest.mark.parametrize("old", renamed.CONFIG_KEYS)
def test_old_options_are_read(old):
    new = renamed.CONFIG_KEYS[old]
    for argv in ([f"--{old}", "5"], [f"--{old.replace('_', '-')}=5"]):
        assert getattr(parser().parse(["digits", *argv]), new) == "5"


@pytest.mark.parametrize("old", renamed.NAMES)
def test_old_exports_warn(old):
    with pytest.warns(DeprecationWarning, match=f"{old} is called {renamed.NAMES[old]} now"):
        assert getattr(diffusion_adagn, old) is getattr(diffusion_adagn, renamed.NAMES[old])


def test_old_call_arguments_warn():
    unet = tiny_unet()
    pipe = ClassConditionalPipeline(unet, make_scheduler(DiffusionConfig()), LabelSpace(("a", "b", "c"), has_null=True))
    pipe.set_progress_bar_config(disable=True)
    new = pipe(class_plan="a@coarse,b@fine", seeds=0, num_inference_steps=2, output_type="pt").images
    with pytest.warns(DeprecationWarning, match="told is called class_plan now"):
        old = pipe(told="a@coarse,b@fine", seeds=0, num_inference_steps=2, output_type="pt").images
    assert torch.equal(old, new)
    guide = ClassConditionalPipeline(tiny_unet(), pipe.scheduler, pipe.labels)
    new = pipe("a", guidance=Guidance(2.0), guide=guide, seeds=0, num_inference_steps=2, output_type="pt").images
    with pytest.warns(DeprecationWarning, match="pass guide to the pipeline call"):
        guidance = Guidance(2.0, guide=guide)
    old = pipe("a", guidance=guidance, seeds=0, num_inference_steps=2, output_type="pt").images
    assert torch.equal(old, new)
    with pytest.warns(DeprecationWarning, match="set_memory_format"):
        unet.set_layout("contiguous")


def test_old_argument_of_open_dataset_warns():
    resolved = find_source(DataConfig())
    with pytest.warns(DeprecationWarning, match="found is called resolved now"):
        assert len(diffusion_adagn.open_dataset("digits", found=resolved, progress=False)) > 1000
