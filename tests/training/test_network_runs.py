"""Runs of networks on patches."""

import pytest
from tiny_run import run

from diffusion_adagn import ClassConditionalPipeline
from diffusion_adagn.cli.main import main
from diffusion_adagn.errors import InputError

PATCHES = {"model__patch_size": 2, "model__attention_resolutions": 2, "diffusion__learned_variance": "true"}


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
