"""Exports of edm and flow: images equal to ours under every sampler that diffusers has, and the way back."""

import json

import numpy as np
import pytest
from conftest import run_command, tiny_unet
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.cli import export as export_command
from diffusion_adagn.cli import import_diffusers as import_command
from diffusion_adagn.diffusion.ode_scheduler import OdeScheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.interop.adagn_label_pipeline import ODE_SAMPLERS, ODE_SPACINGS, LabelPipeline
from diffusion_adagn.interop.export import changed_settings, export_diffusers, open_diffusers, sampler_note
from diffusion_adagn.interop.stock_process import stock_process, stock_scheduler
from diffusion_adagn.interop.unet2d import to_unet2d
from diffusion_adagn.sampling.pretrained import model_hash

SAME = {"num_inference_steps": 4, "seeds": 0, "output_type": "np"}
COMBINATIONS = [
    (process, sampler, spacing)
    for process, samplers in ODE_SAMPLERS.items()
    for sampler in samplers
    for spacing in ODE_SPACINGS[process]
]


@pytest.fixture(scope="module")
def unets():
    """The same network twice: ours, and UNet2DModel."""
    unet = tiny_unet(channel_mult=(1,), attention_resolutions=())  # a third of the layers
    unet.conv_out.weight.data *= 2  # some x0 lie outside [-1, 1]
    return unet, to_unet2d(unet)


def ours(unets, scheduler, clip_x0=True):
    pipe = ClassConditionalPipeline(unets[0], scheduler, LabelSpace(("cat", "dog", "tench")), clip_x0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(unets, scheduler, clip_x0=True):
    """The exported pipeline of a scheduler, without a folder."""
    names, process = {0: "cat", 1: "dog", 2: "tench"}, stock_process(scheduler)
    pipe = LabelPipeline(unets[1], stock_scheduler(scheduler), names, 3, clip_x0, process=process)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("process", "sampler", "spacing"), COMBINATIONS, ids=str)
def test_images_equal_ours(unets, process, sampler, spacing):
    scheduler, images = OdeScheduler(process, sigma_data=0.37), []
    call = SAME | {"sampler": sampler, "spacing": spacing}
    every = [(1.0, True), ([2.0, 1.0], True), ([2.0, 1.0], False)]
    for scale, clip_x0 in every if spacing == "karras" else every[1:2]:
        pipes = ours(unets, scheduler, clip_x0), theirs(unets, scheduler, clip_x0)
        a, b = (pipe([0, 2], guidance_scale=scale, **call).images for pipe in pipes)
        assert np.abs(a - b).max() < 1e-4
        assert b.std() > 0.05
        images.append(b)
    if len(images) == 3:
        assert np.abs(images[1] - images[2]).max() > 1e-3  # clipping had an effect


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("process", ["edm", "flow"])
def test_numbers_of_steps(unets, process, steps):
    scheduler = OdeScheduler(process, "dpm++")
    images = [
        p("cat", **SAME | {"num_inference_steps": steps}).images
        for p in (ours(unets, scheduler), theirs(unets, scheduler))
    ]
    assert np.abs(images[0] - images[1]).max() < 1e-4
    with pytest.raises(ValueError, match="1 to 10000"):
        theirs(unets, scheduler)("cat", num_inference_steps=0)


@pytest.mark.parametrize("process", ["edm", "flow"])
def test_network_receives_the_time_of_the_process(unets, process):
    pipe, seen, levels = theirs(unets, OdeScheduler(process, "dpm++", "exponential")), [], np.array([80, 0.4, 0.002])
    pipe("cat", seeds=0, num_inference_steps=3, callback_on_step_end=lambda p, i, t, kw: seen.append(t.item()))
    assert np.allclose(seen, np.log(levels) / 4 if process == "edm" else 1000 / (1 + 1 / levels), rtol=1e-5)


# ---------------------------------------------------------------------- other schedulers and calls


def test_swapped_schedulers_have_their_own_noise_levels(unets):
    pipe = theirs(unets, OdeScheduler("edm"))
    wanted = pipe("cat", sampler="euler", spacing="exponential", **SAME).images
    pipe.scheduler = EDMEulerScheduler.from_config(pipe.scheduler.config, sigma_schedule="exponential")
    assert np.array_equal(pipe("cat", **SAME).images, wanted)
    assert np.array_equal(pipe("cat", spacing="lu", **SAME).images, wanted)


@pytest.mark.parametrize(
    ("process", "change", "message"),
    [
        ("edm", DPMSolverMultistepScheduler(), "samples another one.*dpm\\+\\+, euler"),
        ("edm", EDMEulerScheduler(sigma_data=0.4), "samples another one"),
        ("edm", EDMEulerScheduler(prediction_type="v_prediction"), "samples another one"),
        ("edm", {"sampler": "heun"}, "edm must be one of dpm\\+\\+, euler"),
        ("edm", {"spacing": "linear"}, "karras, exponential"),
        ("flow", UniPCMultistepScheduler(prediction_type="flow_prediction"), "samples another one"),
        ("flow", DDIMScheduler(), "samples another one"),
        ("flow", {"sampler": "ddim"}, "heun, euler, dpm\\+\\+, unipc"),
        ("flow", {"spacing": "leading"}, "linear, shifted"),
        ("flow", {"eta": 0.5}, "eta"),
    ],
    ids=str,
)
def test_invalid_schedulers_and_calls(unets, process, change, message):
    pipe = theirs(unets, OdeScheduler(process))
    call = change if isinstance(change, dict) else {}
    pipe.scheduler = pipe.scheduler if call else change
    with pytest.raises(ValueError, match=message):
        pipe("cat", **call)


# ---------------------------------------------------------------------- folders


def exported(pipe, folder):
    pipe.save_pretrained(folder / "ours")
    return export_diffusers(folder / "ours", folder / "theirs")


@pytest.mark.parametrize(
    ("scheduler", "written"),
    [
        (OdeScheduler("edm", "heun", sigma_data=0.37, sigma_max=50.0), EDMDPMSolverMultistepScheduler),
        (OdeScheduler("edm", "euler", "exponential", rho=5.0), EDMEulerScheduler),
        (OdeScheduler("flow", "heun", "shifted"), FlowMatchHeunDiscreteScheduler),
        (OdeScheduler("flow", "euler", "karras", sigma_min=0.01), FlowMatchEulerDiscreteScheduler),
        (OdeScheduler("flow", "unipc", "linear"), UniPCMultistepScheduler),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value.config.process,
)
def test_round_trip(tmp_path, unets, scheduler, written):
    pipe = ours(unets, scheduler, clip_x0=False)
    out = exported(pipe, tmp_path)
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", written.__name__]
    again = open_diffusers(out)
    again.set_progress_bar_config(disable=True)
    assert model_hash(again.unet) == model_hash(pipe.unet) == index["record"]["hash"]
    keys = ("process", "sampler", "spacing", "sigma_data", "sigma_min", "sigma_max", "rho")
    assert {k: again.scheduler.config[k] for k in keys} == {k: scheduler.config[k] for k in keys}
    assert not again.config.clip_x0
    assert np.array_equal(again("all", **SAME).images, pipe("all", **SAME).images)
    heun = scheduler.config.sampler == "heun" and scheduler.config.process == "edm"
    assert changed_settings(out, again) == (["sampler: dpm++ -> heun"] if heun else [])
    card = (out / "README.md").read_text()
    assert f"`{written.__name__}`" in card
    assert ("in place of heun" in card) == heun == ("no heun for edm" in sampler_note(out))


def test_commands_name_the_replaced_sampler(tmp_path, unets, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours(unets, OdeScheduler("edm", "heun")).save_pretrained("ours")
    assert run_command(export_command, ["ours", "theirs"]) == 0
    assert "diffusers has no heun for edm: the folder samples with dpm++" in capsys.readouterr().out
    assert run_command(import_command, ["theirs"]) == 0
    assert "sampler: dpm++ -> heun" in capsys.readouterr().out
    assert ClassConditionalPipeline.from_pretrained("imported/theirs").process.name == "edm"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("scheduler/scheduler_config.json", {"sigma_data": 0.4}, "sigma_data is 0.4.*0.5 in model_index"),
        ("scheduler/scheduler_config.json", {"sigma_min": -1.0}, "sigma_min"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "v_prediction.*expected 'epsilon'"),
        ("model_index.json", {"process": {"name": "flow"}}, "scheduler of edm.*'flow'"),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "scheduler of ddpm.*'edm'"),
        ("model_index.json", {"record": {"sampler": "odd"}}, "odd"),
    ],
    ids=str,
)
def test_contradictory_folders(tmp_path, unets, file, change, message):
    out = exported(ours(unets, OdeScheduler("edm")), tmp_path)
    (out / file).write_text(json.dumps(json.loads((out / file).read_text()) | change))
    with pytest.raises(InputError, match=message):
        open_diffusers(out)


@pytest.mark.parametrize(
    ("scheduler", "settings", "changes"),
    [
        (EDMEulerScheduler(sigma_data=1.0, sigma_max=20.0), ("edm", "euler", "karras", 1.0, 20.0), []),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), ("flow", "euler", "shifted", 0.5, 80.0), []),
        (FlowMatchHeunDiscreteScheduler(shift=5.0), ("flow", "heun", "shifted", 0.5, 80.0), ["shift: 5.0 -> 3.0"]),
        (
            DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            ("flow", "dpm++", "linear", 0.5, 80.0),
            [],
        ),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=500), "num_train_timesteps", None),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas", None),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "expected .*'flow_prediction'", None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_stock_folders(tmp_path, unets, scheduler, settings, changes):
    pipe = DDPMPipeline(unets[1], DDIMScheduler())
    pipe.register_modules(scheduler=scheduler)
    pipe.save_pretrained(tmp_path)
    if isinstance(settings, str):
        with pytest.raises(InputError, match=settings):
            open_diffusers(tmp_path)
        return
    pipe = open_diffusers(tmp_path)
    config = pipe.scheduler.config
    assert tuple(config[k] for k in ("process", "sampler", "spacing", "sigma_data", "sigma_max")) == settings
    assert changed_settings(tmp_path, pipe) == changes
    assert np.isfinite(pipe("0", num_inference_steps=2, seeds=0, output_type="np").images).all()
    assert not pipe.config.clip_x0
