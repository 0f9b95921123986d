"""Exported folders, sampled by stock diffusers in a process that cannot import this package, and their import."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_command, tiny_unet
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    KDPM2DiscreteScheduler,
    UNet2DModel,
)
from PIL import Image

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.cli import export as export_command
from diffusion_adagn.cli import import_diffusers as import_command
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import SAMPLERS, make_scheduler
from diffusion_adagn.errors import InputError, UsageError
from diffusion_adagn.interop.adagn_label_pipeline import LabelPipeline
from diffusion_adagn.interop.export import changed_settings, export_diffusers, import_diffusers, open_diffusers

LABELS = LabelSpace(("cat", "Dog", "tench, Tinca tinca"), original_ids=(3, 5, 7), wnids=("n1", "n2", "n3"))
SHORT_CALL = {"num_inference_steps": 5, "output_type": "np"}


def ours(labels=LABELS, clip_x0=True, diffusion=None, sampler="ddim", **unet):
    unet = tiny_unet(**unet)
    unet.conv_out.weight.data *= 0.2  # small outputs, as of trained networks: sampling does not amplify rounding
    scheduler = make_scheduler(DiffusionConfig(**(diffusion or {})), sampler, unet.config.learned_variance)
    pipe = ClassConditionalPipeline(unet, scheduler, labels, clip_x0, ema_decay=0.99, trained_steps=7)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def exported(pipe, folder, **kw):
    pipe.save_pretrained(folder / "ours")
    return export_diffusers(folder / "ours", folder / "theirs", **kw)


def stock(pipe=None, **kw):
    """The exported pipeline, built in this process without a folder."""
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                       layers_per_block=1, norm_num_groups=4, num_class_embeds=4)  # fmt: skip
    labels = {"id2label": dict(enumerate(LABELS.names)), "null_id": 3}
    pipe = LabelPipeline(unet, make_scheduler(DiffusionConfig()), **(labels | kw))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------------- equal images

MODELS = {
    "adagn": {},
    "v": {"diffusion": {"prediction": "v", "zero_snr": True}},
    "x0": {"diffusion": {"prediction": "x0", "schedule": "cosine"}, "clip_x0": False},
    "variance": {"sampler": "ddpm", "learned_variance": True, "in_channels": 3},
    "additive": {"conditioning": "additive", "resblock_updown": True, "diffusion": {"schedule": "sigmoid"}},
    "unconditional": {"num_classes": None, "labels": LabelSpace(())},
    "patches": {"patch_size": 2, "sample_size": 16, "in_channels": 3, "learned_variance": True, "sampler": "ddpm"},
    "no null": {"null_class": False, "labels": LabelSpace(LABELS.names, has_null=False)},
}
ODE_MODELS = {
    "edm": {"diffusion": {"process": "edm", "sigma_data": 0.37}, "sampler": None},
    "flow": {"diffusion": {"process": "flow"}, "sampler": None},
}
CALLS = [
    ("adagn", "ddim", {"classes": ["cat", 1, "null", "Tinca tinca"], "guidance_scale": 1.0, "seeds": 3}),
    ("adagn", "ddim", {"classes": "all", "guidance_scale": 2.0, "seeds": [5, 0, 9]}),
    ("adagn", "ddim", {"classes": "tench", "guidance_scale": [1.0, 0.0, 4.5], "seeds": [1, 2, 2], "eta": 0.7}),
    *(("adagn", sampler, {"classes": "all", "guidance_scale": 2.0, "seeds": 0}) for sampler in SAMPLERS),
    ("v", "ddim", {"classes": "all", "guidance_scale": 2.0, "seeds": 0}),
    ("v", "dpm++", {"classes": "all", "guidance_scale": 2.0, "seeds": 0}),
    ("x0", "ddim", {"classes": "all", "guidance_scale": 2.0, "seeds": 0}),
    ("variance", "ddpm", {"classes": "all", "guidance_scale": [1.0, 2.0, 3.0], "seeds": 0}),
    ("variance", "dpm++", {"classes": "all", "guidance_scale": 2.0, "seeds": 0}),
    ("additive", "ddim", {"classes": "all", "guidance_scale": 2.0, "seeds": 0}),
    ("unconditional", "ddim", {"seeds": [4]}),
    ("unconditional", "dpm++", {"classes": "null", "seeds": [4, 5]}),
    ("patches", "ddpm", {"classes": "all", "guidance_scale": 2.0, "seeds": 0}),
    ("patches", "dpm++", {"classes": ["cat", "null"], "seeds": 3}),
    ("no null", "ddim", {"classes": "all", "seeds": 0}),
    ("edm", "dpm++", {"classes": "all", "guidance_scale": [1.0, 2.0, 3.0], "seeds": 0}),
    ("edm", "euler", {"classes": "all", "seeds": 0, "spacing": "exponential"}),
    ("flow", "heun", {"classes": "all", "guidance_scale": [1.0, 2.0, 3.0], "seeds": 0}),
    ("flow", "dpm++", {"classes": "all", "seeds": 0, "spacing": "linear"}),
]
STOCK = """
import json, sys
sys.modules["diffusion_adagn"] = None
import numpy as np
import diffusers
from diffusers import DiffusionPipeline, UNet2DModel

opened = {}
for folder, scheduler, call, out in json.load(sys.stdin):
    if folder not in opened:
        opened[folder] = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        opened[folder].set_progress_bar_config(disable=True)
    pipe = opened[folder]
    if scheduler and type(pipe.scheduler).__name__ != scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    np.save(out, pipe(**call).images)

pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.save_pretrained("again")
again = DiffusionPipeline.from_pretrained("again", trust_remote_code=True)
again.set_progress_bar_config(disable=True)
np.save(out.replace(".npy", "-again.npy"), again(**call).images)
UNet2DModel.from_pretrained("again", subfolder="unet")
assert not any(name.startswith("diffusion_adagn.") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def stock_samples(tmp_path_factory):
    """All models exported, and all calls sampled by stock diffusers in one separate process; images are in root/N.npy."""
    root = tmp_path_factory.mktemp("stock")
    pipes = {name: ours(**settings) for name, settings in (MODELS | ODE_MODELS).items()}
    folders = {name: exported(pipe, root / name.replace(" ", "-")) for name, pipe in pipes.items()}
    jobs = []
    for i, (name, sampler, call) in enumerate(CALLS):
        ode = name in ODE_MODELS
        scheduler, chosen = (None, {"sampler": sampler}) if ode else (SAMPLERS[sampler].__name__, {})
        jobs.append((str(folders[name]), scheduler, SHORT_CALL | call | chosen, str(root / f"{i}.npy")))
    other_folder = root / "elsewhere"
    other_folder.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", STOCK], input=json.dumps(jobs), capture_output=True, text=True, cwd=other_folder, check=False,
        env=os.environ | {"HF_HOME": str(root / "hf"), "HF_MODULES_CACHE": str(root / "hf/modules"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "ignored" not in result.stderr, result.stderr
    return SimpleNamespace(root=root, pipes=pipes, folders=folders)


@pytest.mark.parametrize("i", range(len(CALLS)), ids=lambda i: f"{CALLS[i][0]}-{CALLS[i][1]}-{i}")
def test_stock_diffusers_samples_equal_images(stock_samples, i):
    name, sampler, call = CALLS[i]
    theirs = np.load(stock_samples.root / f"{i}.npy")
    ours_images = stock_samples.pipes[name].use_sampler(sampler)(**(SHORT_CALL | call)).images
    assert theirs.shape == ours_images.shape
    assert np.abs(theirs - ours_images).max() < 1e-4
    assert theirs.std() > 0.05


def test_stock_save_loads_again(stock_samples):
    last = len(CALLS) - 1
    a, b = (np.load(stock_samples.root / f"{last}{end}.npy") for end in ("", "-again"))
    assert np.array_equal(a, b)
    assert {p.name for p in (stock_samples.root / "elsewhere/again").iterdir()} == {
        "model_index.json", "adagn_label_pipeline.py", "unet", "scheduler"
    }  # fmt: skip


def test_exported_files_and_card(stock_samples):
    folder = stock_samples.folders["adagn"]
    assert {p.name for p in folder.iterdir()} == {
        "model_index.json", "adagn_label_pipeline.py", "unet", "scheduler", "README.md"
    }  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["adagn_label_pipeline", "LabelPipeline"]
    assert (index["unet"], index["scheduler"]) == (["diffusers", "UNet2DModel"], ["diffusers", "DDIMScheduler"])
    assert index["id2label"] == {"0": "cat", "1": "Dog", "2": "tench, Tinca tinca"}
    assert (index["null_id"], index["clip_x0"]) == (3, True)
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "import-diffusers" in card
    assert "cond - null" in card
    code = (folder / "adagn_label_pipeline.py").read_text()
    assert index["patch_size"] == 1 and "pixel_unshuffle" not in card
    assert "diffusion_adagn" not in code
    assert "from ." not in code


@pytest.mark.parametrize("name", MODELS)
def test_export_round_trip(stock_samples, name):
    pipe, again = ours(**MODELS[name]), open_diffusers(stock_samples.folders[name])
    again.set_progress_bar_config(disable=True)
    assert again.labels == pipe.labels
    assert dict(again.config)["clip_x0"] == pipe.config.clip_x0
    assert (again.config.ema_decay, again.config.trained_steps) == (0.99, 7)
    assert torch.equal(again.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    call = {
        "classes": "all" if pipe.labels.K else "null",
        "seeds": 0,
        "guidance_scale": 2.0 if name == "adagn" else 1.0,
    }
    assert np.abs(again(**(SHORT_CALL | call)).images - pipe(**(SHORT_CALL | call)).images).max() < 1e-5
    assert changed_settings(stock_samples.folders[name], again) == []
    assert again.unet.config.patch_size == pipe.unet.config.patch_size


def test_exported_patches(stock_samples):
    folder = stock_samples.folders["patches"]
    index, unet = (json.loads((folder / f).read_text()) for f in ("model_index.json", "unet/config.json"))
    assert (index["patch_size"], unet["sample_size"], unet["in_channels"], unet["out_channels"]) == (2, 8, 12, 24)
    card = (folder / "README.md").read_text()
    assert "16x16 images" in card and "pixel_unshuffle(images, 2)" in card


# ---------------------------------------------------------------------- the copied pipeline


def test_label_ids():
    ids = stock().get_label_ids
    assert ids("cat") == ids("CAT") == ids(0) == ids(np.int64(0)) == [0]
    assert ids(["tench", "tinca  tinca", "tench,Tinca tinca", 2, "dog", "null", 3]) == [2, 2, 2, 2, 1, 3, 3]
    assert ids(None) == ids("all") == ids(torch.arange(3)) == [0, 1, 2]
    assert stock(id2label={i: str(9 - i) for i in range(10)}, null_id=None).get_label_ids(["9", "0"]) == [0, 9]
    assert stock(id2label=dict.fromkeys(range(12), "x") | {0: "all", 1: "null"}).get_label_ids(["all", "null"]) == [
        0,
        1,
    ]
    assert list(stock(id2label={str(i): f"c{i}" for i in range(12)}).labels) == list(range(12))
    assert stock(id2label={}, null_id=None).get_label_ids(None) == [None]


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"classes": "tensh"}, "Nearest: 'tench'"),
        ({"classes": 4}, r"0\.\.2, and 3 or 'null'"),
        ({"classes": -1}, "-1 is not a class"),
        ({"classes": True}, "True is not a class"),
        ({"classes": 1.0}, "1.0 is not a class"),
        ({"classes": [[0, 1]]}, "is not a class"),
        ({"classes": ["cat", "cat"], "seeds": [1]}, "2 classes and 1 seeds"),
        ({"seeds": [-1, 2, 3]}, "seed"),
        ({"guidance_scale": [1.0, 2.0]}, "3 images"),
        ({"guidance_scale": float("nan")}, "nan"),
        ({"guidance_scale": -1.0}, "at least 0"),
        ({"output_type": "jpg"}, "pil, pt or np"),
        ({"num_inference_steps": 600}, "DDIM cannot take 600 trailing steps.*divides 1000"),
        ({"seeds": "12"}, "whole numbers"),
        ({"seeds": [0.5, 1.5, 2.5]}, "whole numbers"),
        ({"seeds": 0.5}, "whole numbers"),
        ({"num_inference_steps": 0}, "1 to 1000"),
        ({"num_inference_steps": 1001}, "1 to 1000"),
        ({"seeds": 2**63 - 1}, "whole numbers"),
    ],
)
def test_invalid_calls_are_rejected(kw, message):
    pipe = stock()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match=message):
        pipe(**({"num_inference_steps": 2} | kw))


def test_patches_that_do_not_divide_the_channels_are_rejected():
    with pytest.raises(ValueError, match="1 input and 1 output channels has no patches of 2x2"):
        stock(patch_size=2)


@pytest.mark.filterwarnings("ignore:__array_wrap__")
def test_calls_the_model_cannot_serve():
    with pytest.raises(ValueError, match="no null class"):
        stock(null_id=None)(guidance_scale=2.0)
    with pytest.raises(ValueError, match="there is no class 'null'"):
        stock(null_id=None)("null")
    with pytest.raises(ValueError, match="There are no classes: give 'null'"):
        stock(id2label={}, null_id=None)("cat")
    with pytest.raises(ValueError, match="is ambiguous"):
        stock(id2label={0: "crane, bird", 1: "crane, machine"}).get_label_ids("crane")
    pipe = stock()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="eta"):
        pipe("cat", eta=0.5)
    pipe.scheduler = KDPM2DiscreteScheduler(num_train_timesteps=10)
    with pytest.raises(ValueError, match="between its timesteps"):
        pipe("cat")


def test_scale_1_needs_one_pass():
    pipe, calls = stock(), []
    torch.manual_seed(0)
    for p in pipe.unet.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    forward = pipe.unet.forward
    pipe.unet.forward = lambda x, t, class_labels: calls.append(class_labels.tolist()) or forward(x, t, class_labels)
    pipe("all", num_inference_steps=2, seeds=0)
    assert calls == [[0, 1, 2]] * 2
    calls.clear()
    pipe("all", guidance_scale=[1.0, 2.0, 1.0], num_inference_steps=2)
    assert calls == [[0, 1, 2, 3, 3, 3]] * 2
    mixed = pipe("all", guidance_scale=[1.0, 0.0, 1.0], num_inference_steps=2, seeds=0, output_type="np").images
    assert np.allclose(mixed[1], pipe("null", num_inference_steps=2, seeds=[1], output_type="np").images[0], atol=1e-5)


def test_output_types_and_defaults():
    pipe = stock(sample_defaults={"num_inference_steps": 2, "guidance_scale": 2.0})
    image = pipe("cat", seeds=0).images[0]
    assert isinstance(image, Image.Image)
    assert (image.size, image.mode) == ((8, 8), "L")
    array = pipe("cat", seeds=0, output_type="np").images
    assert np.array_equal(np.asarray(image), (array[0, ..., 0] * 255).round().astype("uint8"))
    assert pipe("cat", seeds=0, output_type="pt", return_dict=False)[0].shape == (1, 1, 8, 8)
    assert np.array_equal(array, pipe("cat", 2.0, 2, seeds=[0], output_type="np").images)


def test_half_precision_runs():
    pipe = stock()
    pipe.unet.to(torch.bfloat16)
    assert np.isfinite(pipe("cat", num_inference_steps=2, guidance_scale=2.0, output_type="np").images).all()


# ---------------------------------------------------------------------- writing


def test_card_says_that_augmentation_weights_are_dropped(tmp_path):
    folder = exported(ours(augment_dim=9), tmp_path)
    assert "trained on augmented images" in (folder / "README.md").read_text()
    assert open_diffusers(folder).unet.config.augment_dim == 0


@pytest.mark.parametrize(
    "changes", [{"modulate_both_norms": True}, {"conditioning": "film"}, {"channel_mult": (2, 2)}], ids=str
)
def test_failed_export_writes_nothing(tmp_path, changes):
    ours(**changes).save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match="cannot express"):
        export_diffusers(tmp_path / "ours", tmp_path / "deep/theirs")
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_existing_folders_are_protected(tmp_path):
    out = exported(ours(), tmp_path)
    with pytest.raises(InputError, match="--overwrite"):
        export_diffusers(tmp_path / "ours", out)
    (out / "unet/config.json").unlink()
    export_diffusers(tmp_path / "ours", out, overwrite=True)
    assert (out / "unet/config.json").is_file()
    (out / "thesis.txt").write_text("the only copy")
    with pytest.raises(InputError, match="is not an export"):
        export_diffusers(tmp_path / "ours", out, overwrite=True)
    assert (out / "thesis.txt").is_file()
    with pytest.raises(InputError, match="is not an export"):
        export_diffusers(tmp_path / "ours", tmp_path / "ours", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not an export"):
        export_diffusers(tmp_path / "ours", tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    assert (export_diffusers(tmp_path / "ours", tmp_path / "empty") / "model_index.json").is_file()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_failed_write_leaves_old_export(tmp_path, monkeypatch):
    out = exported(ours(), tmp_path)
    before = (out / "README.md").read_text()
    monkeypatch.setattr(UNet2DModel, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export_diffusers(tmp_path / "ours", out, overwrite=True)
    assert (out / "README.md").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]


# ---------------------------------------------------------------------- stock folders


@pytest.fixture
def export_copy(stock_samples, tmp_path):
    return Path(shutil.copytree(stock_samples.folders["adagn"], tmp_path / "theirs"))


def stock_folder(folder, scheduler, classes=4, out_channels=1, **index):
    """A stock pipeline folder as diffusers writes it."""
    torch.manual_seed(0)
    unet = UNet2DModel(8, 1, out_channels, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4,
                       attention_head_dim=8, num_class_embeds=classes)  # fmt: skip
    for p in unet.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | index))
    return unet


def test_stock_ddim_folder_with_clipping(tmp_path):
    theirs = stock_folder(
        tmp_path,
        DDIMScheduler(beta_schedule="scaled_linear", clip_sample=True, steps_offset=1, num_train_timesteps=400),
    )
    pipe = open_diffusers(tmp_path)
    assert pipe.labels == LabelSpace(tuple("0123"), has_null=False)
    assert pipe.config.clip_x0
    assert not pipe.scheduler.config.clip_sample
    assert torch.equal(pipe.scheduler.alphas_cumprod, DDIMScheduler(400, beta_schedule="scaled_linear").alphas_cumprod)
    assert changed_settings(tmp_path, pipe) == ["steps_offset: 1 -> 0"]
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([7]), torch.tensor([0, 3])
    assert torch.allclose(pipe.unet(x, t, y).sample, theirs.eval()(x, t, y).sample, atol=1e-4)
    images = pipe(num_inference_steps=4, seeds=0, output_type="np").images
    assert images.shape == (4, 8, 8, 1)
    with_null = open_diffusers(tmp_path, null_class=True, class_names=["a", "b", "c"])
    assert with_null.labels.names == ("a", "b", "c")
    assert with_null.labels.null_id == 3
    assert np.isfinite(with_null(guidance_scale=2.0, num_inference_steps=4, output_type="np").images).all()


def test_stock_names_and_process(tmp_path):
    names = {"id2label": {"3": "d", "1": "b, bee", "0": "a", "2": "c"}}
    scheduler = DDPMScheduler(beta_schedule="sigmoid", clip_sample=False, prediction_type="v_prediction")
    stock_folder(tmp_path, scheduler, **names)
    pipe = open_diffusers(tmp_path)
    assert pipe.labels.names == ("a", "b, bee", "c", "d")
    assert not pipe.config.clip_x0
    assert torch.allclose(pipe.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    assert torch.allclose(pipe.use_sampler("ddim").scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    assert "beta_schedule" not in " ".join(changed_settings(tmp_path, pipe))
    with pytest.raises(InputError, match="4 names"):
        open_diffusers(tmp_path, null_class=True)
    with pytest.raises(InputError, match=r"3 names were given.*--null_class"):
        open_diffusers(tmp_path, class_names=["a", "b", "c"])


def test_unconditional_stock_folder(tmp_path):
    stock_folder(tmp_path, DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"), classes=None)
    pipe = open_diffusers(tmp_path)
    assert pipe.labels.K == 0
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert pipe("null", num_inference_steps=2).images


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, DDPMScheduler])
def test_stock_learned_variance(tmp_path, scheduler):
    stock_folder(tmp_path, scheduler(), out_channels=2)
    pipe = open_diffusers(tmp_path)
    assert pipe.unet.config.learned_variance
    assert pipe.config.clip_x0 == (scheduler is DDPMScheduler)  # the stock solver does not clip
    assert np.isfinite(pipe("0", num_inference_steps=2, seeds=0, output_type="np").images).all()
    stock_folder(tmp_path, DDPMScheduler(variance_type="learned"), out_channels=2)
    with pytest.raises(InputError, match="learned_range"):
        open_diffusers(tmp_path)
    stock_folder(tmp_path, DDPMScheduler(), out_channels=3)
    with pytest.raises(InputError, match="1 input and 3 output channels"):
        open_diffusers(tmp_path)


def test_code_in_folders_is_not_run(export_copy, tmp_path):
    out = export_copy
    marker = tmp_path / "ran"
    bad = f"open({str(marker)!r}, 'w')\n"
    for code_file in (
        "adagn_label_pipeline.py",
        "pipeline.py",
        "unet/unet.py",
        "unet/__init__.py",
        "scheduler/scheduler.py",
    ):
        (out / code_file).write_text(bad)
    open_diffusers(out)
    import_diffusers(out, tmp_path / "imported")
    index = json.loads((out / "model_index.json").read_text())
    for change in (
        {"unet": ["unet", "AdaGNUNet"]},
        {"unet": ["pipeline", "UNet2DModel"]},
        {"scheduler": ["scheduler", "DDIMScheduler"]},
    ):
        (out / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(InputError, match=next(iter(change.values()))[0]):
            open_diffusers(out)
    assert not marker.exists()


def test_pickled_weights_are_not_read(export_copy):
    out = export_copy
    weights = out / "unet/diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(InputError, match="safetensors only"):
        open_diffusers(out)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"scheduler": ["diffusers", "PNDMScheduler"]}, "PNDMScheduler.*DDIMScheduler"),
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "only diffusers' UNet2DModel"),
        ("model_index.json", {"id2label": {"1": "a", "2": "b", "3": "c"}}, "without gaps"),
        ("model_index.json", {"id2label": {"0": "a"}}, "3 classes, but 1 names"),
        ("model_index.json", {"patch_size": 3}, "patch_size: expected 1, 2, 4, got 3"),
        ("model_index.json", {"patch_size": 2}, "1 input and 1 output channels are no images in patches of 2x2"),
        ("unet/config.json", {"act_fn": "gelu"}, "silu"),
        ("unet/config.json", {"layers_per_block": 2}, "cannot be loaded.*size mismatch"),
        ("unet/config.json", {"class_embed_type": "identity"}, "class_embedding"),
        ("unet/config.json", {"sample_size": None}, "sample_size"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "flow"),
        ("scheduler/scheduler_config.json", {"clip_sample": True, "clip_sample_range": 2.0}, "2.0"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "odd"}, "scheduler"),
    ],
)
def test_invalid_folders_are_rejected(export_copy, file, change, message):
    file = export_copy / file
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        open_diffusers(export_copy)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_corrupted_and_missing_json(export_copy, file):
    out = export_copy
    for text in ("{", "[]"):
        (out / file).write_text(text)
        with pytest.raises(InputError, match=file):
            open_diffusers(out)
    (out / file).unlink()
    with pytest.raises(InputError):
        open_diffusers(out)


# ---------------------------------------------------------------------- commands


def test_export_and_import_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = ours()
    pipe.save_pretrained("ours")
    assert run_command(export_command, ["ours", "--to", "diffusers", "theirs"]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "theirs") in printed
    line = next(line for line in printed.splitlines() if "python -c" in line)
    code = shlex.split(line)[2]
    compile(code, "printed", "exec")
    assert "trust_remote_code=True" in code
    assert '"cat"' in code
    assert "'\"'" not in line
    with pytest.raises(InputError, match="--overwrite"):
        run_command(export_command, ["ours", "theirs"])
    assert run_command(export_command, ["ours", "theirs", "--overwrite"]) == 0
    capsys.readouterr()
    assert run_command(import_command, ["theirs"]) == 0
    printed = capsys.readouterr().out
    assert "adagn sample imported/theirs --classes all --guidance" in printed
    again = ClassConditionalPipeline.from_pretrained("imported/theirs")
    again.set_progress_bar_config(disable=True)
    assert again.labels == pipe.labels
    assert np.allclose(again(seeds=0, **SHORT_CALL).images, pipe(seeds=0, **SHORT_CALL).images, atol=1e-5)
    with pytest.raises(InputError, match="--overwrite"):
        run_command(import_command, ["theirs"])
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert run_command(import_command, ["theirs", "--class-names", "names.txt", "--null-class", "--overwrite"]) == 0
    assert ClassConditionalPipeline.from_pretrained("imported/theirs").labels.names == ("a", "b", "c")


@pytest.mark.parametrize("argv", [["ours"], ["ours", "--to", "onnx", "x"], ["ours", "x", "--overwrit"]])
def test_invalid_command_lines(argv):
    with pytest.raises(UsageError):
        run_command(export_command, argv)


def test_exported_folder_error_names_import(export_copy):
    with pytest.raises(InputError, match="adagn import-diffusers"):
        ClassConditionalPipeline.from_pretrained(export_copy)
