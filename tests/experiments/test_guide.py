"""adagn guide: a smaller network and an eighth of the steps, on the data and process of the run."""

from dataclasses import replace

import pytest

from diffusion_adagn.cli.main import main
from diffusion_adagn.config import as_config, read_config
from diffusion_adagn.errors import InputError
from diffusion_adagn.experiments.guide import guide_config


def resolved(recipe, **overrides):
    config = read_config(recipe, {"training.max_steps": "4000", **overrides})
    sized = replace(config.data, image_size=32, channels=3)
    return replace(config, data=sized, labels={"names": ["a", "b"], "has_null": True})


@pytest.mark.parametrize(("recipe", "width"), [("digits", 16), ("cifar10", 96), ("cifar10_small", None)])
def test_guide_is_one_size_down(recipe, width):
    config = resolved(recipe)
    guide = guide_config(config, "runs/g")
    own = config.model.model_channels
    assert (
        guide.model.model_channels == (width or guide.model.model_channels)
        and own / 2 <= guide.model.model_channels < own
    )
    assert replace(guide.model, model_channels=own) == config.model
    assert (guide.data, guide.diffusion, guide.labels) == (config.data, config.diffusion, config.labels)
    assert guide.training.max_steps == 500 and guide.training.checkpoint_every == guide.training.keep_every == 125
    assert guide.training.warmup_steps == round(config.training.warmup_steps / 8)
    assert guide.output_dir == "runs/g" and guide.init_from is None


def test_guide_reads_no_guidance_scale():
    more = {"model.max_guidance_scale": "4", "training.teacher": "runs/t", "training.teacher_rule": "tcfg"}
    guide = guide_config(resolved("digits", **more), "runs/g")
    assert guide.model.max_guidance_scale is None and guide.teacher is None


def test_groups_and_heads_are_halved_where_no_smaller_width_fits():
    """cifar10_cpu has 32 channels in 32 groups."""
    guide = guide_config(resolved("cifar10_cpu"), "g").model
    assert (guide.model_channels, guide.norm_groups, guide.num_head_channels) == (16, 16, 16)
    config = resolved("cifar10_cpu")
    by_number = replace(config, model=replace(config.model, num_head_channels=None, num_heads=4))
    guide = guide_config(by_number, "g").model
    assert (guide.model_channels, guide.norm_groups, guide.num_head_channels) == (16, 16, None)


def test_network_of_a_guide_can_be_chosen():
    chosen = {"model.model_channels": "8", "model.norm_groups": "8", "model.num_head_channels": "4"}
    guide = guide_config(resolved("cifar10_cpu"), "g", chosen).model
    assert (guide.model_channels, guide.norm_groups, guide.num_head_channels) == (8, 8, 4)
    guide = guide_config(resolved("cifar10_cpu"), "g", {"model.norm_groups": "8", "model.num_head_channels": "8"}).model
    assert (guide.model_channels, guide.norm_groups, guide.num_head_channels) == (24, 8, 8)


def test_guide_needs_a_smaller_network():
    least = {"model.model_channels": "1", "model.norm_groups": "1", "model.num_head_channels": "1"}
    with pytest.raises(InputError, match="smaller than 1 channels"):
        guide_config(resolved("digits", **least), "g")


def test_guide_needs_a_run(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["guide", str(tmp_path / "empty")]) == 1
    assert "is not a run, so that the data and the process" in capsys.readouterr().err


@pytest.mark.slow
def test_guide_is_trained_and_guides(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = [
        "--data.classes", "0,1,2", "--model.model_channels", "16", "--model.num_head_channels", "8", "--model.norm_groups", "4",
        "--training.batch_size", "4", "--training.preview_every", "0", "--training.diagnostics_every", "0",
        "--training.heldout_every", "0",
    ]  # fmt: skip
    assert main(["train", "--config", "digits", *tiny, "--training.max_steps", "64", "--output_dir", "runs/a"]) == 0
    assert main(["guide", "runs/a"]) == 0
    printed = capsys.readouterr().out
    assert "adagn sweep runs/a --guidance 1:3:0.5 --guide 'none,runs/a-guide@*' --guide_ema 0.05,0.1,run" in printed
    config = as_config("runs/a-guide/config.yaml")
    assert config.training.max_steps == 8 and config.model.model_channels == 12
    assert len(list((tmp_path / "runs/a-guide/checkpoints").glob("step-*"))) == 4
    assert (
        main(["sample", "runs/a", "--guide", "runs/a-guide@4:0.1", "--guidance", "2", "--count", "1", "--steps", "2"])
        == 0
    )
    assert main(["guide", "runs/a"]) == 0  # finished already
    before = sorted((tmp_path / "runs").rglob("*"))
    assert main(["guide", "digits", "--output_dir", "runs/a-guide"]) == 1  # of another run
    assert "runs/a-guide is there already, and is not this guide" in capsys.readouterr().err
    assert sorted((tmp_path / "runs").rglob("*")) == before
