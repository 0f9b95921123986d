"""ADM's checkpoints. None is downloaded: state dicts in ADM's layout are made from stock UNet2DModels by a separate mapping,
and load_adm must give the outputs of that model."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import run_command
from diffusers import UNet2DModel
from safetensors.torch import save_file

from diffusion_adagn import ClassConditionalPipeline, InputError
from diffusion_adagn.cli import import_adm as command
from diffusion_adagn.interop.adm import import_adm, load_adm
from diffusion_adagn.interop.adm_flags import FLAGS, PRESETS, network_config, read_flags
from diffusion_adagn.models.cost import estimate_cost

T = torch.tensor([0.0, 500.0, 999.0])

# ---------------------------------------------------------------------- a checkpoint in ADM's layout


def stock(mult=(1, 2), attend=(False, True), blocks=1, head=32, updown=False, scale_shift=True, classes=5, sigma=False):
    """A random UNet2DModel of ADM's shape: 32 channels, 32 groups, 8x8 images."""
    step = "Resnet{}sampleBlock2D" if updown else "{}Block2D"
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=6 if sigma else 3,
        block_out_channels=[int(32 * m) for m in mult],
        layers_per_block=blocks,
        down_block_types=["AttnDownBlock2D" if a else step.format("Down") for a in attend],
        up_block_types=["AttnUpBlock2D" if a else step.format("Up") for a in reversed(attend)],
        downsample_type="resnet" if updown else "conv",
        upsample_type="resnet" if updown else "conv",
        attention_head_dim=head,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        num_class_embeds=classes,
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return model


def adm_state_dict(model, new_order=True):
    """Its state dict with ADM's keys. Heads have the model's width; the older order is [head][q, k, v][dim]."""
    state = {}

    def put(key, layer):
        state.update({f"{key}.{name}": p.detach().clone() for name, p in layer.named_parameters()})

    def block(key, resnet):
        put(f"{key}.in_layers.0", resnet.norm1)
        put(f"{key}.in_layers.2", resnet.conv1)
        put(f"{key}.emb_layers.1", resnet.time_emb_proj)
        put(f"{key}.out_layers.0", resnet.norm2)
        put(f"{key}.out_layers.3", resnet.conv2)
        if resnet.conv_shortcut is not None:
            put(f"{key}.skip_connection", resnet.conv_shortcut)

    def attention(key, attn):
        put(f"{key}.norm", attn.group_norm)
        for name in ("weight", "bias"):
            q, k, v = (getattr(layer, name).detach() for layer in (attn.to_q, attn.to_k, attn.to_v))
            if new_order:
                rows = torch.cat([q, k, v])
            else:
                heads = zip(q.chunk(attn.heads), k.chunk(attn.heads), v.chunk(attn.heads))
                rows = torch.cat([part for head in heads for part in head])
            state[f"{key}.qkv.{name}"] = rows[..., None] if name == "weight" else rows
        state[f"{key}.proj_out.weight"] = attn.to_out[0].weight.detach().clone()[..., None]
        state[f"{key}.proj_out.bias"] = attn.to_out[0].bias.detach().clone()

    put("time_embed.0", model.time_embedding.linear_1)
    put("time_embed.2", model.time_embedding.linear_2)
    if model.class_embedding is not None:
        put("label_emb", model.class_embedding)
    put("input_blocks.0.0", model.conv_in)
    number = 1
    for down in model.down_blocks:
        for j, resnet in enumerate(down.resnets):
            block(f"input_blocks.{number}.0", resnet)
            if hasattr(down, "attentions"):
                attention(f"input_blocks.{number}.1", down.attentions[j])
            number += 1
        for step in down.downsamplers or []:
            if hasattr(step, "conv1"):
                block(f"input_blocks.{number}.0", step)
            else:
                put(f"input_blocks.{number}.0.op", step.conv)
            number += 1
    block("middle_block.0", model.mid_block.resnets[0])
    attention("middle_block.1", model.mid_block.attentions[0])
    block("middle_block.2", model.mid_block.resnets[1])
    number = 0
    for up in model.up_blocks:
        for j, resnet in enumerate(up.resnets):
            block(f"output_blocks.{number}.0", resnet)
            if hasattr(up, "attentions"):
                attention(f"output_blocks.{number}.1", up.attentions[j])
            number += 1
        for step in up.upsamplers or []:
            key = f"output_blocks.{number - 1}.{2 if hasattr(up, 'attentions') else 1}"
            if hasattr(step, "conv1"):
                block(key, step)
            else:
                put(f"{key}.conv", step.conv)
    put("out.0", model.conv_norm_out)
    put("out.2", model.conv_out)
    return state


# the flags of stock()
TINY = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4",
        "num_head_channels": 32, "class_cond": True, "use_new_attention_order": True}  # fmt: skip


def max_relative_error(unet, model):
    """The largest difference of outputs, relative to the largest output."""
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 2, 4]) if model.class_embedding is not None else None
    with torch.no_grad():
        ours, other = unet(x, T, y).sample, model(x, T, y).sample
    return ((ours - other).abs().max() / other.abs().max()).item()


# ---------------------------------------------------------------------- weights -> network


@pytest.mark.parametrize(
    ("shape", "flags"),
    [
        ({}, {}),
        ({"updown": True}, {"resblock_updown": True}),
        ({"scale_shift": False}, {"use_scale_shift_norm": False}),
        ({"scale_shift": False, "updown": True}, {"use_scale_shift_norm": "False", "resblock_updown": "yes"}),
        ({"classes": None}, {"class_cond": False}),
        ({"sigma": True}, {"learn_sigma": True}),
        ({"mult": (1, 2, 3), "attend": (True, False, True), "blocks": 2, "head": 16, "updown": True, "sigma": True},
         {"channel_mult": (1, 2, 3), "attention_resolutions": (8, 2), "num_res_blocks": "2", "num_head_channels": "16",
          "resblock_updown": True, "learn_sigma": 1}),
        ({"mult": (1, 2, 2), "attend": (False, True, True), "head": 32, "updown": True},
         {"channel_mult": "1,2,2", "attention_resolutions": "4,2", "num_head_channels": -1, "num_heads": 2, "resblock_updown": "true"}),
        ({"head": None}, {"num_head_channels": -1, "num_heads": 1}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("new_order", [True, False], ids=["new", "legacy"])
def test_loaded_network_equals_the_checkpoint(shape, flags, new_order):
    model = stock(**shape)
    unet = load_adm(adm_state_dict(model, new_order), **(TINY | flags | {"use_new_attention_order": new_order}))
    assert max_relative_error(unet, model) < 1e-4
    assert not unet.training and unet.dtype == torch.float32
    assert unet.config.num_classes == model.config.num_class_embeds and not unet.config.null_class


def test_wrong_attention_order_changes_outputs():
    model = stock(head=16)
    state = adm_state_dict(model, new_order=False)
    assert max_relative_error(load_adm(state, **(TINY | {"num_head_channels": 16})), model) > 1e-2


def test_decoder_heads_may_differ():
    flags = TINY | {"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4}
    unet = load_adm(adm_state_dict(stock()), **flags)
    assert (unet.down[1].stages[0].attention.heads, unet.up[0].stages[0].attention.heads) == (2, 4)


def test_flags_as_strings_and_values():
    strings = {
        "channel_mult": "1,2,2",
        "attention_resolutions": "4,2",
        "class_cond": "True",
        "num_head_channels": "-1",
        "dropout": "0.1",
    }
    values = {
        "channel_mult": (1, 2, 2),
        "attention_resolutions": [4, 2],
        "class_cond": True,
        "num_head_channels": -1,
        "dropout": 0.1,
    }
    assert read_flags({"image_size": "8"} | strings) == read_flags({"image_size": 8} | values)
    assert read_flags({})["channel_mult"] == (1, 2, 3, 4)
    ignored = {
        "use_fp16": "True",
        "use_checkpoint": False,
        "timestep_respacing": "250",
        "use_kl": False,
        "rescale_learned_sigmas": 0,
    }
    assert read_flags(ignored) == read_flags({})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_chanels": 64}, "no flag 'num_chanels'. Did you mean num_channels"),
        ({"patch_size": 2}, "no flag 'patch_size': its networks take whole images"),
        ({"num_channels": "wide"}, "num_channels: expected a whole number, got 'wide'"),
        ({"class_cond": "maybe"}, "class_cond: expected true or false, got 'maybe'"),
        ({"num_res_blocks": 0}, "num_res_blocks: must be at least 1"),
        ({"attention_resolutions": "0"}, "attention_resolutions"),
        ({"dropout": 1.5}, "dropout: must be below 1, got 1.5"),
        ({"image_size": 32}, "default channel_mult for 64,128,256,512 pixels, not for 32"),
    ],
)
def test_invalid_flags_are_rejected(flags, message):
    with pytest.raises(InputError, match=message):
        read_flags(flags)


def test_attention_levels_as_in_adm():
    flags = read_flags({"image_size": 64, "attention_resolutions": "33,16"})  # 64 // 33 is 1, 64 // 16 is 4
    assert network_config(flags)["attention_resolutions"] == (64, 16)


# ---------------------------------------------------------------------- mismatches


@pytest.mark.parametrize(
    ("name", "flag", "weights"),
    [
        ("num_channels", 64, "32"),
        ("channel_mult", "1,3", "1,2"),
        ("channel_mult", "1,2,2", "1,2"),
        ("num_res_blocks", 2, "1"),
        ("attention_resolutions", "8,4", "4"),
        ("attention_resolutions", "", "4"),
        ("class_cond", False, "True"),
        ("learn_sigma", True, "False"),
        ("use_scale_shift_norm", False, "True"),
        ("resblock_updown", True, "False"),
        ("in_channels", 1, "3"),
    ],
)
def test_mismatched_flag_is_named(name, flag, weights):
    with pytest.raises(InputError) as error:
        load_adm(adm_state_dict(stock()), **(TINY | {name: flag}))
    assert f"{name}: the flags give {flag or 'none' if name[0] == 'a' else flag}, the weights {weights}" in str(
        error.value
    )
    assert str(error.value).count("the flags give") == 1


def test_all_mismatched_flags_are_named():
    with pytest.raises(InputError) as error:
        load_adm(
            adm_state_dict(stock(updown=True, scale_shift=False, sigma=True, classes=None)),
            image_size=8,
            channel_mult="1,2",
        )
    named = {part.split(":")[0] for part in str(error.value).split("weights: ", 1)[1].split("; ")}
    assert named == {
        "num_channels",
        "num_res_blocks",
        "attention_resolutions",
        "learn_sigma",
        "use_scale_shift_norm",
        "resblock_updown",
    }


def test_missing_image_size_is_suggested():
    state = adm_state_dict(stock(mult=(1, 1, 2, 3, 4), attend=(False,) * 5, classes=None))
    with pytest.raises(InputError, match=r"the weights 1,1,2,3,4.*channel_mult is ADM's for image_size 128"):
        load_adm(state, num_channels=32, attention_resolutions="", num_res_blocks=1)


@pytest.mark.parametrize(
    "key", ["output_blocks.1.0.out_layers.3.weight", "middle_block.0.emb_layers.1.weight", "out.2.weight", "time_embed.2.bias",
            "output_blocks.0.0.out_layers.0.weight", "output_blocks.1.2.conv.weight", "input_blocks.3.1.qkv.bias"]
)  # fmt: skip
def test_missing_key_is_named(key):
    state = adm_state_dict(stock())
    del state[key]
    with pytest.raises(InputError, match=f"missing: {key}"):
        load_adm(state, **TINY)


@pytest.mark.parametrize("key", ["extra", "input_blocks.9.0.op.weight", "output_blocks.9.1.norm.weight"])
def test_unexpected_key_is_named(key):
    with pytest.raises(InputError, match=f"unexpected: {key}"):
        load_adm(adm_state_dict(stock()) | {key: torch.zeros(1)}, **TINY)


def test_wrong_shape_is_named():
    state = adm_state_dict(stock())
    state["input_blocks.1.0.in_layers.2.weight"] = torch.zeros(32, 32, 1, 1)
    with pytest.raises(
        InputError, match=r"input_blocks.1.0.in_layers.2.weight should have shape \[32, 32, 3, 3\].*\[32, 32, 1, 1\]"
    ):
        load_adm(state, **TINY)


def test_other_networks_are_rejected():
    state = adm_state_dict(stock())
    upsampler = state | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}
    classifier = {k: v for k, v in state.items() if not k.startswith("output_blocks")}
    for weights, message in (
        (upsampler, "upsampler"),
        (classifier, "classifier"),
        ({"conv.weight": torch.zeros(1)}, "not the weights of an ADM network"),
        ({"model": state}, "not a plain state dict"),
        ({"step": torch.tensor(3)}, "not a plain state dict"),
        ({}, "no state dict"),
    ):
        with pytest.raises(InputError, match=message):
            load_adm(weights, **TINY)


# ---------------------------------------------------------------------- files


def test_files_and_half_precision(tmp_path):
    model = stock()
    state = adm_state_dict(model)
    torch.save(state, tmp_path / "net.pt")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "net.safetensors")
    for name in ("net.pt", "net.safetensors"):
        assert max_relative_error(load_adm(tmp_path / name, **TINY), model) < 1e-4
        assert max_relative_error(load_adm(str(tmp_path / name), **TINY), model) < 1e-4
    half = load_adm({k: v.half() for k, v in state.items()}, **TINY)
    assert half.dtype == torch.float32 and max_relative_error(half, model) < 2e-2


def test_weights_are_copied():
    state = adm_state_dict(stock())
    unet = load_adm(state, **TINY)
    before = unet.conv_in.weight.clone()
    state["input_blocks.0.0.weight"].zero_()
    assert torch.equal(unet.conv_in.weight, before) and unet.conv_in.weight.requires_grad


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))], ids=["torch", "pickle"])
def test_code_in_files_is_not_run(tmp_path, save):
    trace = tmp_path / "ran"
    save({"weight": Malicious(str(trace))}, tmp_path / "net.pt")
    with pytest.raises(InputError, match="run code"):
        load_adm(tmp_path / "net.pt", **TINY)
    assert not trace.exists()


def test_invalid_files_are_rejected(tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        load_adm(tmp_path / "none.pt")
    for name in ("bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"\x00\x01 not weights")
        with pytest.raises(InputError, match=name):
            load_adm(tmp_path / name)


# ---------------------------------------------------------------------- the published networks


@pytest.mark.parametrize(
    ("preset", "millions"),  # Dhariwal & Nichol 2021, table 4 and appendix
    [("imagenet64", 296), ("imagenet128", 422), ("imagenet256", 554), ("imagenet512", 559)],
)
def test_published_parameter_counts(preset, millions):
    """Counted on the meta device, not allocated."""
    config = network_config(read_flags(PRESETS[preset]))
    if preset == "imagenet64":
        assert round(estimate_cost(config).parameters / 1e6) == millions
    else:
        from diffusion_adagn import AdaGNUNet

        with torch.device("meta"):
            unet = AdaGNUNet(**config)
        assert abs(sum(p.numel() for p in unet.parameters()) / 1e6 - millions) < 1


def test_presets_have_known_flags():
    for name, flags in PRESETS.items():
        read = read_flags(flags)
        assert read["use_scale_shift_norm"] and read["resblock_updown"] and read["learn_sigma"], name
    assert read_flags(PRESETS["imagenet512"])["channel_mult"] == (0.5, 1, 1, 2, 2, 4, 4)
    assert network_config(read_flags(PRESETS["lsun"]))["num_classes"] is None


def test_fractional_widths_load():
    model = stock(mult=(1, 1, 2), attend=(False, False, True))
    state = adm_state_dict(model)
    # as in ADM's 512x512 network the first level is half as wide as the sinusoidal embedding: 64 channels and 0.5
    state["time_embed.0.weight"] = torch.zeros(256, 64)
    state["time_embed.0.bias"] = torch.zeros(256)
    state["time_embed.2.weight"], state["time_embed.2.bias"] = torch.zeros(256, 256), torch.zeros(256)
    state["label_emb.weight"] = torch.zeros(5, 256)
    for key in [k for k in state if k.endswith("emb_layers.1.weight")]:
        state[key] = torch.zeros(len(state[key]), 256)
    flags = TINY | {"num_channels": 64, "channel_mult": "0.5,0.5,1", "attention_resolutions": "2"}
    unet = load_adm(state, **flags)
    assert unet.conv_in.out_channels == 32
    # time and class have no effect except through the biases, which the stock model has too
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "time_emb_proj"):
                module.time_emb_proj.weight.zero_()
    assert max_relative_error(unet, model) < 1e-4


# ---------------------------------------------------------------------- a pipeline folder


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(adm_state_dict(stock(sigma=True)), tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


SIGMA = TINY | {"learn_sigma": True}


def test_import_with_imagenet_names(tmp_path):
    torch.save(adm_state_dict(stock(classes=1000, sigma=True)), tmp_path / "tiny.pt")
    folder = import_adm(tmp_path / "tiny.pt", tmp_path / "out", preset="imagenet64", resblock_updown=False, **(
        SIGMA | {"noise_schedule": "cosine"}))  # fmt: skip
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    labels = pipe.labels
    assert (labels.K, labels.has_null, labels.null_id) == (1000, False, None)
    assert labels.parse(["goldfish", "wnid:n01440764", 999]) == [1, 0, 999]
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2" and pipe.unet.config.dropout == 0.1
    with pytest.raises(InputError, match=r"null class.*init_from"):
        pipe("goldfish", guidance_scale=2.0)
    pipe.set_progress_bar_config(disable=True)
    images = pipe.use_sampler("ddpm")("goldfish", num_inference_steps=2, seeds=0, output_type="pt").images
    assert images.shape == (1, 3, 8, 8) and images.isfinite().all()
    card = (folder / "README.md").read_text()
    assert "tiny.pt" in card and "--sampler ddpm --steps 250" in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny.pt"]
    with pytest.raises(InputError, match="is not overwritten"):
        import_adm(tmp_path / "tiny.pt", folder, **SIGMA)


def test_import_with_other_names(tmp_path, checkpoint):
    pipe = ClassConditionalPipeline.from_pretrained(import_adm(checkpoint, tmp_path / "ids", **SIGMA))
    assert pipe.labels.names == tuple("01234") and not pipe.labels.has_null
    assert pipe.scheduler.config.beta_schedule == "linear" and pipe.scheduler.config.prediction_type == "epsilon"
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\ndog\neel\n")
    pipe = ClassConditionalPipeline.from_pretrained(
        import_adm(checkpoint, tmp_path / "named", class_names=names, predict_xstart=True, **SIGMA)
    )
    assert pipe.labels.names == ("ant", "bee", "cat", "dog", "eel")
    assert pipe.scheduler.config.prediction_type == "sample"
    names.write_text("ant\nbee\n")
    with pytest.raises(InputError, match=r"names\.txt has 2 classes, the network 5"):
        import_adm(checkpoint, tmp_path / "few", class_names=names, **SIGMA)
    with pytest.raises(InputError, match="cannot be read as text"):
        import_adm(checkpoint, tmp_path / "few", class_names=tmp_path / "none.txt", **SIGMA)
    assert not (tmp_path / "few").exists()


def test_import_without_classes(tmp_path):
    torch.save(adm_state_dict(stock(classes=None)), tmp_path / "tiny.pt")
    pipe = ClassConditionalPipeline.from_pretrained(
        import_adm(tmp_path / "tiny.pt", tmp_path / "out", **(TINY | {"class_cond": False}))
    )
    assert pipe.labels.K == 0
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe("null", num_inference_steps=2, seeds=0).images) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"diffusion_steps": 4000}, "multiplies the betas by 1000"),
        ({"diffusion_steps": 4000, "noise_schedule": "cosine", "rescale_timesteps": True}, "rescale_timesteps"),
        ({"noise_schedule": "squared"}, "linear or cosine, not 'squared'"),
        ({"preset": "imagenet65"}, "no preset 'imagenet65'. Did you mean imagenet64"),
        ({"num_chanels": 3}, "num_chanels"),
    ],
)
def test_unsupported_diffusion_is_rejected(tmp_path, checkpoint, flags, message):
    with pytest.raises(InputError, match=message):
        import_adm(checkpoint, tmp_path / "out", **(SIGMA | flags))
    assert not (tmp_path / "out").exists()


def test_cosine_schedule_with_4000_steps(tmp_path, checkpoint):
    flags = SIGMA | {"diffusion_steps": "4000", "noise_schedule": "cosine"}
    folder = import_adm(checkpoint, tmp_path / "out", **flags)
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["num_train_timesteps"] == 4000


def test_import_adm_command(tmp_path, checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [f"--{name}={value}" for name, value in SIGMA.items()]
    preset = ["--preset", "imagenet64", "--resblock-updown", "False", "--use_fp16", "True"]
    assert run_command(command, [str(checkpoint), *preset, *options]) == 0
    printed = capsys.readouterr().out
    assert "models/tiny" in printed and "5 classes" in printed and "guidance 1" in printed and "--init_from" in printed
    assert "adagn sample models/tiny --classes 0 --sampler ddpm --steps 250" in printed
    assert ClassConditionalPipeline.from_pretrained("models/tiny").scheduler.config.beta_schedule == "squaredcos_cap_v2"
    with pytest.raises(InputError, match="is not overwritten"):
        run_command(command, [str(checkpoint), *preset, *options])
    with pytest.raises(InputError, match="no checkpoint"):
        run_command(command, ["none.pt"])
    with pytest.raises(InputError, match="--num_channels"):
        run_command(command, [str(checkpoint), "--num_chanels", "3"])
    assert all(f"--{name}" in command.parser().format_help() for name in FLAGS)


def test_help_does_not_import_torch():
    code = "import sys; from diffusion_adagn.cli.import_adm import parser; parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_corrupted_weights_are_named(tmp_path):
    state = adm_state_dict(stock())
    state["time_embed.0.weight"] = state["time_embed.0.weight"] * float("nan")
    with pytest.raises(InputError, match=r"time_embed\.0\.weight contains nan"):
        load_adm(state, **TINY)
    state = adm_state_dict(stock())
    state["out.2.weight"], state["out.2.bias"] = torch.zeros(4, 32, 3, 3), torch.zeros(4)
    with pytest.raises(InputError, match=r"out\.2\.weight should have shape \[3,.*got \[4,"):
        load_adm(state, **TINY)
    torch.save(adm_state_dict(stock()), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:5000])
    with pytest.raises(InputError, match="truncated or corrupted"):
        load_adm(tmp_path / "cut.pt", **TINY)


def test_attention_mismatch_names_image_size():
    with pytest.raises(InputError, match="computed for image_size 16, which the weights do not show"):
        load_adm(adm_state_dict(stock()), **(TINY | {"image_size": 16}))
