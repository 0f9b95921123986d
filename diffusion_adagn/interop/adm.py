"""Import of OpenAI's guided-diffusion ("ADM", Dhariwal & Nichol 2021) checkpoints.

    unet = load_adm("64x64_diffusion.pt", **PRESETS["imagenet64"])
    import_adm("64x64_diffusion.pt", "models/imagenet64", preset="imagenet64")

The flags are those of ADM's scripts. They are compared with the weights where possible; a flag that does not match is
named. torch is imported only when weights are read, so that the command line can list the flags at once.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import atomic_dir
from ..commands import command
from ..errors import InputError, reject_first
from ..schema import short_repr
from .adm_flags import (
    CHANNEL_MULT,
    attention_levels,
    attention_sides,
    format_value,
    network_config,
    preset_flags,
    read_flags,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..labels import LabelSpace
    from ..models.unet import AdaGNUNet

# ---------------------------------------------------------------------- weights -> network

LAYER_NAMES = {  # our layer inside a block or attention -> ADM's; see `layout.correspondence`
    "norm1": ("in_layers.0",),
    "conv1": ("in_layers.2",),
    "projection": ("emb_layers.1",),
    "norm2": ("out_layers.0",),
    "conv2": ("out_layers.3",),
    "skip": ("skip_connection",),
    "norm": ("norm",),
    "qkv": ("qkv",),
    "proj": ("proj_out",),
}


def load_adm(state_dict_or_path: Mapping[str, Tensor] | str | Path, **adm_flags: Any) -> AdaGNUNet:
    """The network of an ADM checkpoint, in eval mode, float32.

    The number of classes is that of the class table; there is never a null class.

    Args:
        state_dict_or_path: A state dict, or a file (.pt, .safetensors).
        adm_flags: ADM's flags, named as in its `create_model` and scripts, with the scripts' defaults; strings such as
            "32,16,8" and "True", or Python values. Flags of the diffusion and of the machine (use_fp16,
            use_checkpoint) are accepted and ignored. The weights do not show image_size, num_heads, num_head_channels, num_heads_upsample,
            use_new_attention_order and dropout: a wrong value of these gives wrong images. All others are compared with
            the weights.

    Returns:
        The network.

    Raises:
        InputError: For an unknown flag, flags that do not match the weights (each named, with both values), missing and
            unexpected weights, files that would run code, and ADM's upsamplers and classifiers.
    """
    flags = read_flags(adm_flags)
    weights = _weights(state_dict_or_path)
    _check_network(weights, flags)
    _check_flags(flags, weights)

    import torch

    from ..models.config import check_size
    from ..models.unet import AdaGNUNet
    from .layout import correspondence, gather

    classes = len(weights["label_emb.weight"]) if flags["class_cond"] else None
    check_size(network_config(flags, classes))
    with torch.device("meta"):
        unet = AdaGNUNet(**network_config(flags, classes))
    state = gather(correspondence(unet, _module_names(unet), LAYER_NAMES), unet, weights)
    if not flags["use_new_attention_order"]:
        state |= {key: _reorder_qkv(rows, unet, key) for key, rows in state.items() if ".qkv." in key}
    unet.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
    return unet.eval()


def _reorder_qkv(rows: Tensor, unet: AdaGNUNet, key: str) -> Tensor:
    """Rows in ADM's older order, [head][q, k, v][dim], in our order, [q, k, v][head][dim]."""
    heads = unet.get_submodule(key.partition(".qkv.")[0]).heads
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _module_names(unet: AdaGNUNet) -> dict[str, str]:
    """{our module: ADM's}. ADM numbers all blocks, and appends the upsampling of a level to its last block."""
    names = {"conv_in": "input_blocks.0.0", "embedding.time.0": "time_embed.0", "embedding.time.2": "time_embed.2"}
    names |= {"middle.0.block": "middle_block.0", "middle.0.attention": "middle_block.1"}
    names |= {"middle.1.block": "middle_block.2", "norm_out": "out.0", "conv_out": "out.2"}
    if unet.embedding.classes is not None:
        names["embedding.classes"] = "label_emb"
    updown = unet.config.resblock_updown

    number = 1
    for i, level in enumerate(unet.down):
        for j, stage in enumerate(level.stages):
            names |= _stage(f"down.{i}.stages.{j}", f"input_blocks.{number}", stage)
            number += 1
        if level.resample is not None:
            step = (".block", "") if updown else ("", ".op")
            names[f"down.{i}.resample{step[0]}"] = f"input_blocks.{number}.0{step[1]}"
            number += 1

    number = 0
    for i, level in enumerate(unet.up):
        for j, stage in enumerate(level.stages):
            names |= _stage(f"up.{i}.stages.{j}", f"output_blocks.{number}", stage)
            number += 1
        if level.resample is not None:
            step = (".block", "") if updown else ("", ".conv")
            last = 1 if stage.attention is None else 2
            names[f"up.{i}.resample{step[0]}"] = f"output_blocks.{number - 1}.{last}{step[1]}"
    return names


def _stage(ours: str, theirs: str, stage) -> dict[str, str]:
    attention = {f"{ours}.attention": f"{theirs}.1"} if stage.attention is not None else {}
    return {f"{ours}.block": f"{theirs}.0"} | attention


# ---------------------------------------------------------------------- flags and weights


def _check_network(weights: Mapping[str, Tensor], flags: Mapping[str, Any]) -> None:
    """Raises InputError unless these are the weights of ADM's diffusion network."""
    dimensions_of = {"time_embed.0.weight": 2, "input_blocks.0.0.weight": 4}  # key -> number of dimensions
    faults = {
        "these are not the weights of an ADM network: time_embed.0.weight and input_blocks.0.0.weight are expected; there are "
        f"{', '.join(list(weights)[:4])}. If the names have a prefix such as module., remove it first.": any(
            name not in weights or weights[name].ndim != dimensions for name, dimensions in dimensions_of.items()
        ),
        "this is an ADM classifier (it has no output_blocks), which guides a diffusion network and does not generate images: give the "
        "diffusion checkpoint, such as 64x64_diffusion.pt.": not any(
            key.startswith("output_blocks.") for key in weights
        ),
        "this is an ADM upsampler: its 6 input channels are the noisy image and a small one. Upsamplers are not supported; give a "
        "plain diffusion checkpoint, such as 256x256_diffusion.pt.": (
            flags["in_channels"] != 6 and [*getattr(weights.get("input_blocks.0.0.weight"), "shape", ())][1:2] == [6]
        ),
    }
    reject_first(faults)


def _check_flags(flags: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Raises one InputError that names every flag that does not match the weights, with both values."""
    declared = flags | {"attention_resolutions": attention_sides(flags, attention_levels(flags))}
    shown = _flags_of_weights(weights, flags)
    wrong = [
        f"{name}: the flags give {format_value(declared[name])}, the weights {format_value(value)}"
        for name, value in shown.items()
        if declared[name] != value
    ]
    if wrong:
        seen_mult = shown.get("channel_mult")
        size = [s for s, mult in CHANNEL_MULT.items() if mult == seen_mult != flags["channel_mult"]]
        hint = f" The weights' channel_mult is ADM's for image_size {size[0]}." if size else ""
        if any(w.startswith("attention_resolutions") for w in wrong):
            hint += f" The sides are computed for image_size {flags['image_size']}, which the weights do not show."
        raise InputError(f"flags that do not match the weights: {'; '.join(wrong)}.{hint}")


def _flags_of_weights(weights: Mapping[str, Tensor], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that the weights show. Levels are read from the decoder, where each ends with an upsampling layer."""
    channels, width = weights["input_blocks.0.0.weight"].shape[1], weights["time_embed.0.weight"].shape[1]
    shown: dict[str, Any] = {
        "in_channels": channels,
        "num_channels": width,
        "class_cond": "label_emb.weight" in weights,
    }
    if "out.2.weight" in weights:
        shown["learn_sigma"] = len(weights["out.2.weight"]) == 2 * channels
    projection, norm = (weights.get(f"middle_block.0.{name}.weight") for name in ("emb_layers.1", "out_layers.0"))
    if projection is not None and norm is not None:
        shown["use_scale_shift_norm"] = len(projection) == 2 * len(norm)

    levels = _decoder_levels(weights)[::-1]
    if len(levels) > 1:
        shown["resblock_updown"] = not any(re.fullmatch(r"output_blocks\.\d+\.[12]\.conv\..*", key) for key in weights)
    blocks = {len(level) - 1 for level in levels}
    shown["num_res_blocks"] = blocks.pop() if len(blocks) == 1 else tuple(len(level) - 1 for level in levels)
    widths = [weights.get(f"output_blocks.{level[0]}.0.out_layers.0.weight") for level in levels]
    if all(w is not None for w in widths):
        shown["channel_mult"] = tuple(len(w) / width if len(w) % width else len(w) // width for w in widths)
    attending = {i for i, level in enumerate(levels) if f"output_blocks.{level[0]}.1.qkv.weight" in weights}
    shown["attention_resolutions"] = attention_sides(flags, attending)
    return shown


def _decoder_levels(weights: Mapping[str, Tensor]) -> list[list[int]]:
    """Numbers of the output blocks of each level of the decoder, lowest resolution first."""
    numbers = sorted({int(key.split(".")[1]) for key in weights if re.match(r"output_blocks\.\d+\.0\.", key)})
    ends = {
        int(m[1])
        for m in (re.match(r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers\.0)\.", key) for key in weights)
        if m
    }
    levels: list[list[int]] = [[]]
    for number in numbers:
        levels[-1].append(number)
        if number in ends:
            levels.append([])
    return levels if levels[-1] else levels[:-1]


def _weights(source: Mapping[str, Tensor] | str | Path) -> dict[str, Tensor]:
    """The tensors of a state dict or file, by name. Raises InputError for anything else; no code in a file is run."""
    import torch

    source_name = "the state dict" if isinstance(source, Mapping) else str(source)
    state = source if isinstance(source, Mapping) else _read(Path(source))
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{source_name} contains no state dict (names and tensors), but {type(state).__name__}.")
    for key, value in state.items():
        fault = ""
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            fault = (
                f"is not a plain state dict as ADM saves it: {short_repr(key)} is {kind}, not a tensor of numbers. If it contains "
                "the weights as a part, give only that part"
            )
        elif (
            value.layout != torch.strided
            or value.is_meta
            or value.numel() * value.itemsize > value.untyped_storage().nbytes()
        ):
            fault = f"is corrupted: {key} has shape {list(value.shape)}, but the file has fewer numbers for it"
        elif not value.isfinite().all():
            fault = f"is corrupted: {key} contains nan or infinity"
        if fault:
            raise InputError(f"{source_name} {fault}.")
    return {key: value.detach() for key, value in state.items()}


def _read(path: Path) -> Any:
    import torch

    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError):
            why = "contains more than tensors, and opening it would run code in it: give ADM's plain state dict, or save it as .safetensors"
        else:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            why = f"cannot be read as weights; it may be truncated or corrupted ({reason})"
        raise InputError(f"{path} {why}.") from None


# ---------------------------------------------------------------------- a pipeline folder


def import_adm(
    checkpoint: str | Path,
    out: str | Path,
    preset: str | None = None,
    class_names: str | Path | None = None,
    **flags: Any,
) -> Path:
    """Write an ADM checkpoint as a pipeline folder, for `adagn sample` and `ClassConditionalPipeline.from_pretrained`.

    A network without a learned variance is sampled by ddpm with the smaller fixed one (beta tilde); ADM's scripts use
    beta.

    Args:
        checkpoint: The file of weights.
        out: The folder to write.
        preset: A name of PRESETS: the flags of a published checkpoint.
        class_names: A text file, one class per line. None: 1000 classes have ImageNet's names, others their ids.
        flags: ADM's flags; they override the preset.

    Returns:
        The folder.

    Raises:
        InputError: As `load_adm`, for a diffusion process without counterpart here, for a wrong number of class names,
            and if the folder exists.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not overwritten: give another --out, or remove it.")
    all_flags = preset_flags(preset) | flags
    read = read_flags(all_flags)
    process = _process(read)
    unet = load_adm(checkpoint, **all_flags)

    from ..config import DiffusionConfig
    from ..diffusion.schedule import make_scheduler
    from ..sampling.pipeline import ClassConditionalPipeline

    labels = _labels(unet.config.num_classes or 0, class_names)
    scheduler = make_scheduler(DiffusionConfig(**process), learned_variance=unet.config.learned_variance)
    pipe = ClassConditionalPipeline(unet, scheduler, labels)

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder)
        (folder / "README.md").write_text(_card(Path(checkpoint).name, all_flags, process, pipe), encoding="utf-8")

    return atomic_dir(out, write)


def _process(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of DiffusionConfig for ADM's flags."""
    steps, schedule = flags["diffusion_steps"], flags["noise_schedule"]
    faults = {
        f"noise_schedule must be linear or cosine, not '{schedule}'": schedule not in ("linear", "cosine"),
        f"diffusion_steps {steps} with noise_schedule linear: ADM multiplies the betas by 1000 / diffusion_steps, and the linear "
        "schedule here does not. Only 1000 steps can be imported with it": schedule == "linear" and steps != 1000,
        f"rescale_timesteps with diffusion_steps {steps}: ADM's network then receives t * 1000 / {steps}, but here it receives t. "
        "Only 1000 steps can be imported with it": flags["rescale_timesteps"] and steps != 1000,
    }
    reject_first(faults, "", ".")
    prediction = "x0" if flags["predict_xstart"] else "eps"
    return {"schedule": schedule, "num_train_timesteps": steps, "prediction": prediction}


def _labels(classes: int, class_names: str | Path | None) -> LabelSpace | None:
    """The label space of a network with this many classes and no null class; None: classes are named by their ids."""
    from ..data.class_lists import imagenet_classes
    from ..data.classes import class_lines
    from ..labels import LabelSpace

    if class_names is not None:
        names = tuple(line for _, line in class_lines(class_names, "class_names"))
        if len(names) != classes:
            raise InputError(
                f"{class_names} has {len(names)} classes, the network {classes}: expected one class per line."
            )
        return LabelSpace(names, has_null=not classes)
    table = imagenet_classes()
    if classes == len(table):
        return LabelSpace(tuple(table.values()), wnids=tuple(table), has_null=False)
    return None


NO_NULL = "none: sample at guidance scale 1, or fine-tune with `--init_from THIS_FOLDER` to get one"


def _card(name: str, flags: Mapping[str, Any], process: Mapping[str, Any], pipe) -> str:
    labels = pipe.labels
    names = ", ".join(name.split(",")[0] for name in labels.names[:20]) + (
        f", ... ({labels.K} in all)" if labels.K > 20 else ""
    )
    size, parameters = pipe.unet.config.sample_size, sum(p.numel() for p in pipe.unet.parameters())
    return f"""---
library_name: diffusion_adagn
tags: [diffusion, image-generation]
---

# {name}, imported

OpenAI's guided-diffusion checkpoint `{name}` ({size}x{size} images, {parameters / 1e6:.1f} M parameters), as a network
of diffusion_adagn. Training, data and licence are those of its authors.

| | |
|---|---|
| classes | {names or "none (unconditional)"} |
| null label | {NO_NULL if labels.K else "none"} |
| process | {process["schedule"]} schedule, T = {process["num_train_timesteps"]}, prediction {process["prediction"]} |
| flags | `{json.dumps(dict(flags))}` |

```bash
{next_command("THIS_FOLDER", pipe.labels)}
```

No quality metric was measured when this card was written.
"""


def next_command(folder: str | Path, labels: LabelSpace) -> str:
    """The command that samples an imported model."""
    classes = labels.names[0].split(",")[0] if labels.K else "null"
    try:
        classes = classes if not labels.K or labels.parse(classes) == [0] else "id:0"
    except InputError:  # an ambiguous name
        classes = "id:0"
    return command("sample", folder, classes=classes, sampler="ddpm", steps=250)
