"""Runs of networks on patches, and runs with augmentation."""

import subprocess

import pytest
from tiny_run import assert_same_run, environment, launch, losses, run, weights

from diffusion_adagn import ClassConditionalPipeline
from diffusion_adagn.cli.main import main
from diffusion_adagn.errors import InputError

PATCHES = {"model__patch_size": 2, "model__attention_resolutions": 2, "diffusion__learned_variance": "true"}
AUGMENT = {"training__diagnostics_every": 0}


@pytest.mark.slow
def test_run_on_patches_previews_samples_and_traces(tmp_path):
    out = tmp_path / "run"
    assert run(out, training__preview_every=6, training__preview_steps=2, training__heldout_every=6, **PATCHES) == 0
    pipe = ClassConditionalPipeline.from_pretrained(out)
    assert pipe.unet.config.patch_size == 2 and pipe.unet.config.in_channels == 1
    assert pipe("all", seeds=0, num_inference_steps=2, output_type="np").images.shape == (10, 8, 8, 1)
    with pytest.raises(InputError, match=r"model.patch_size: 2 -> 1"):
        run(out, "--resume", "auto", training__max_steps=7, **PATCHES | {"model__patch_size": 1})
    assert main(["trace", str(out), "--out", str(tmp_path / "trace"), "--debug"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"data__augment": 0.3}, {"data__augment": 0.3, "model__conditioning": "cross_attention"}]
)
def test_augmented_run_resumes_and_is_the_same_on_two_processes(tmp_path, changes):
    changes = AUGMENT | changes
    assert run(tmp_path / "whole", **changes) == 0
    assert run(tmp_path / "parts", training__checkpoint_every=3, **changes | {"training__max_steps": 3}) == 0
    assert run(tmp_path / "parts", "--resume", "auto", training__checkpoint_every=3, **changes) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert weights(tmp_path / "whole")["embedding.augment.weight"].abs().max() > 0  # it learns
    command = launch(tmp_path / "two", processes=2, **changes)
    subprocess.run(command, check=True, capture_output=True, env=environment())
    one, two = losses(tmp_path / "whole"), losses(tmp_path / "two")
    assert [two[step] for step in one] == pytest.approx(list(one.values()), rel=1e-4)
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path / "whole")
    assert pipe.unet.config.augment_dim == 9
    assert pipe("all", seeds=0, num_inference_steps=2, output_type="np").images.shape == (10, 8, 8, 1)


@pytest.mark.slow
def test_runs_with_and_without_augmentation_differ_in_the_images_alone(tmp_path):
    """The first step's loss of a new network, whose output is 0, is that of the noise: the same draws in both."""
    for name, augment in (("off", 0), ("on", 0.3)):
        assert run(tmp_path / name, data__augment=augment, **AUGMENT | {"training__max_steps": 2}) == 0
    off, on = losses(tmp_path / "off"), losses(tmp_path / "on")
    assert off[1] == on[1] and off[2] != on[2]
    assert weights(tmp_path / "on").keys() - weights(tmp_path / "off").keys() == {"embedding.augment.weight"}
