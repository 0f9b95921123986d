"""OpenAI's guided-diffusion ("ADM", Dhariwal & Nichol 2021) checkpoints in.

    unet = load_adm("64x64_diffusion.pt", **PRESETS["imagenet64"])
    import_adm("64x64_diffusion.pt", "models/imagenet64", preset="imagenet64")

The flags are those of ADM's scripts. What the weights show is compared with them, and a flag that does not fit is named.
Nothing heavy is imported before weights are read, so that the command line can list the flags at once.
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
from ..errors import InputError
from ..schema import short_repr
from .adm_flags import (
    CHANNEL_MULT,
    attending_levels,
    in_words,
    network_config,
    plain_number,
    preset_flags,
    read_flags,
    sides_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..labels import LabelSpace
    from ..models.unet import AdaGNUNet

# ---------------------------------------------------------------------- weights -> network

BLOCK_LAYERS = {  # our layer inside a block or attention -> ADM's
    "norm1": ("in_layers.0",),
    "conv1": ("in_layers.2",),
    "told": ("emb_layers.1",),
    "norm2": ("out_layers.0",),
    "conv2": ("out_layers.3",),
    "skip": ("skip_connection",),
    "norm": ("norm",),
    "qkv": ("qkv",),
    "proj": ("proj_out",),
}


def load_adm(state_dict_or_path: Mapping[str, Tensor] | str | Path, **adm_flags: Any) -> AdaGNUNet:
    """The network of an ADM checkpoint, in eval mode, float32: a file (.pt, .safetensors) or a state dict, and ADM's flags.

    adm_flags: as ADM's `create_model` and scripts name them, with the scripts' defaults; strings ("32,16,8", "True") or Python
      values. Those of the diffusion and of the machine (use_fp16, use_checkpoint) are accepted and change nothing here.
    The number of classes is the class table's; there is never a null class.

    Weights cannot show image_size, num_heads, num_head_channels, num_heads_upsample, use_new_attention_order and dropout:
    these are taken at their word, and a wrong one gives wrong pictures. All others are compared with the weights.

    Raises InputError for an unknown flag, for flags that do not fit the weights (each named, with both values), for missing
    and left-over weights, for files that would run code, and for ADM's upsamplers and classifiers.
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
    state = gather(correspondence(unet, _places(unet), BLOCK_LAYERS), unet, weights)
    if not flags["use_new_attention_order"]:
        state |= {key: _by_part(rows, unet, key) for key, rows in state.items() if ".qkv." in key}
    unet.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
    return unet.eval()


def _by_part(rows: Tensor, unet: AdaGNUNet, key: str) -> Tensor:
    """Rows [head][q, k, v][dim], ADM's older order, as [q, k, v][head][dim], ours."""
    heads = unet.get_submodule(key.partition(".qkv.")[0]).heads
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _places(unet: AdaGNUNet) -> dict[str, str]:
    """{our module: ADM's}. ADM numbers its blocks through, and puts a level's step up behind its last block."""
    places = {"conv_in": "input_blocks.0.0", "embedding.time.0": "time_embed.0", "embedding.time.2": "time_embed.2"}
    places |= {"middle.0.block": "middle_block.0", "middle.0.attention": "middle_block.1"}
    places |= {"middle.1.block": "middle_block.2", "norm_out": "out.0", "conv_out": "out.2"}
    if unet.embedding.classes is not None:
        places["embedding.classes"] = "label_emb"
    updown = unet.config.resblock_updown

    number = 1
    for i, level in enumerate(unet.down):
        for j, stage in enumerate(level.stages):
            places |= _stage(f"down.{i}.stages.{j}", f"input_blocks.{number}", stage)
            number += 1
        if level.resample is not None:
            step = (".block", "") if updown else ("", ".op")
            places[f"down.{i}.resample{step[0]}"] = f"input_blocks.{number}.0{step[1]}"
            number += 1

    number = 0
    for i, level in enumerate(unet.up):
        for j, stage in enumerate(level.stages):
            places |= _stage(f"up.{i}.stages.{j}", f"output_blocks.{number}", stage)
            number += 1
        if level.resample is not None:
            step = (".block", "") if updown else ("", ".conv")
            last = 1 if stage.attention is None else 2
            places[f"up.{i}.resample{step[0]}"] = f"output_blocks.{number - 1}.{last}{step[1]}"
    return places


def _stage(ours: str, theirs: str, stage) -> dict[str, str]:
    attention = {f"{ours}.attention": f"{theirs}.1"} if stage.attention is not None else {}
    return {f"{ours}.block": f"{theirs}.0"} | attention


# ---------------------------------------------------------------------- what the weights show


def _check_network(weights: Mapping[str, Tensor], flags: Mapping[str, Any]) -> None:
    """Raises InputError unless these are the weights of ADM's diffusion network."""
    first = {"time_embed.0.weight": 2, "input_blocks.0.0.weight": 4}  # their dimensions
    if any(name not in weights or weights[name].ndim != dimensions for name, dimensions in first.items()):
        raise InputError(
            "these are not the weights of an ADM network: time_embed.0.weight and input_blocks.0.0.weight are expected; "
            f"there are {', '.join(list(weights)[:4]) or 'none'}. If the names begin with module. or the like, take that off first."
        )
    if not any(key.startswith("output_blocks.") for key in weights):
        raise InputError(
            "this is an ADM classifier (it has no output_blocks), which guides a diffusion network and makes no pictures: "
            "give the diffusion checkpoint, such as 64x64_diffusion.pt."
        )
    channels = weights["input_blocks.0.0.weight"].shape[1]
    if channels == 6 and flags["in_channels"] != 6:
        raise InputError(
            "this is an ADM upsampler: its 6 input channels are the noisy picture and a small one. Upsamplers are not "
            "imported; give a plain diffusion checkpoint, such as 256x256_diffusion.pt."
        )


def _check_flags(flags: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Raises one InputError that names every flag which the weights contradict, with both values."""
    declared = flags | {"attention_resolutions": sides_of(flags, attending_levels(flags))}
    seen = _seen(weights, flags)
    wrong = [
        f"{name}: the flags say {in_words(declared[name])}, the weights {in_words(value)}"
        for name, value in seen.items()
        if declared[name] != value
    ]
    if wrong:
        seen_mult = seen.get("channel_mult")
        size = [s for s, mult in CHANNEL_MULT.items() if mult == seen_mult != flags["channel_mult"]]
        hint = f" The weights' channel_mult is ADM's for image_size {size[0]}." if size else ""
        if any(w.startswith("attention_resolutions") for w in wrong):
            hint += (
                f" The sides are read for image_size {flags['image_size']}, which weights cannot show: at another size they are "
                "others."
            )
        raise InputError(f"flags that do not fit the weights: {'; '.join(wrong)}.{hint}")


def _seen(weights: Mapping[str, Tensor], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that the weights show. The way up shows them all: its levels end where something resamples."""
    channels, width = weights["input_blocks.0.0.weight"].shape[1], weights["time_embed.0.weight"].shape[1]
    seen: dict[str, Any] = {"in_channels": channels, "num_channels": width, "class_cond": "label_emb.weight" in weights}
    if "out.2.weight" in weights:
        rows = len(weights["out.2.weight"])
        if rows not in (channels, 2 * channels):
            raise InputError(
                f"out.2.weight has {rows} rows: a network of {channels} channels has {channels}, or {2 * channels} with learn_sigma."
            )
        seen["learn_sigma"] = rows == 2 * channels
    told, norm = (weights.get(f"middle_block.0.{name}.weight") for name in ("emb_layers.1", "out_layers.0"))
    if told is not None and norm is not None:
        seen["use_scale_shift_norm"] = len(told) == 2 * len(norm)

    levels = _levels_up(weights)[::-1]
    if len(levels) > 1:
        seen["resblock_updown"] = not any(re.fullmatch(r"output_blocks\.\d+\.[12]\.conv\..*", key) for key in weights)
    blocks = {len(level) - 1 for level in levels}
    seen["num_res_blocks"] = blocks.pop() if len(blocks) == 1 else tuple(len(level) - 1 for level in levels)
    widths = [weights.get(f"output_blocks.{level[0]}.0.out_layers.0.weight") for level in levels]
    if all(w is not None for w in widths):
        seen["channel_mult"] = tuple(plain_number(len(w) / width) for w in widths)
    attending = {i for i, level in enumerate(levels) if f"output_blocks.{level[0]}.1.qkv.weight" in weights}
    seen["attention_resolutions"] = sides_of(flags, attending)
    return seen


def _levels_up(weights: Mapping[str, Tensor]) -> list[list[int]]:
    """Numbers of the output blocks of each level, lowest resolution first."""
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
    """The tensors of a state dict or file, by name. Raises InputError for what is none; no code in a file is run."""
    import torch

    where = "the state dict" if isinstance(source, Mapping) else str(source)
    state = source if isinstance(source, Mapping) else _read(Path(source))
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{where} holds no state dict (names and tensors), but {type(state).__name__}.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise InputError(
                f"{where} is not a plain state dict, as ADM saves it: {short_repr(key)} is "
                f"{value.dtype if isinstance(value, torch.Tensor) else type(value).__name__}, not a tensor of numbers. If the weights "
                "lie deeper in it, give that part alone."
            )
        if (
            value.layout != torch.strided
            or value.is_meta
            or value.numel() * value.itemsize > value.untyped_storage().nbytes()
        ):
            raise InputError(
                f"{where} is damaged: {key} claims {list(value.shape)}, more numbers than the file holds for it."
            )
        if not value.isfinite().all():
            raise InputError(f"{where} is damaged: {key} holds nan or infinity.")
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
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds more than tensors, and opening it would run code that came with it: give ADM's plain state dict, "
            "or save it as .safetensors."
        ) from None
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(
            f"{path} cannot be read as weights; it may be cut short or damaged ({type(error).__name__}{f': {why}' if why else ''})."
        ) from error


# ---------------------------------------------------------------------- a pipeline folder


def import_adm(
    checkpoint: str | Path,
    out: str | Path,
    preset: str | None = None,
    class_names: str | Path | None = None,
    **flags: Any,
) -> Path:
    """Write an ADM checkpoint as a pipeline folder, for `adagn sample` and `ClassConditionalPipeline.from_pretrained`.

    preset: a name of PRESETS, the flags of a published checkpoint; `flags` win over it. class_names: a text file, one class a
    line. Without it 1000 classes are ImageNet's, and others are named by their ids.
    A network without a learned variance is sampled by ddpm with the smaller fixed one (beta tilde); ADM's scripts take beta.

    Returns the folder. Raises InputError as `load_adm` does, for a diffusion that has no counterpart here, for class names
    that are not as many as the classes, and for a folder that is there already.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already and is not overwritten: give another --out, or remove it.")
    chosen = preset_flags(preset) | flags
    read = read_flags(chosen)
    process = _process(read)
    unet = load_adm(checkpoint, **chosen)

    from ..config import DiffusionConfig
    from ..diffusion.schedule import make_scheduler
    from ..sampling.pipeline import ClassConditionalPipeline

    labels = _labels(unet.config.num_classes or 0, class_names)
    scheduler = make_scheduler(DiffusionConfig(**process), learned_variance=unet.config.learned_variance)
    pipe = ClassConditionalPipeline(unet, scheduler, labels)

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder)
        (folder / "README.md").write_text(_card(Path(checkpoint).name, chosen, process, pipe), encoding="utf-8")

    return atomic_dir(out, write)


def _process(flags: Mapping[str, Any]) -> dict[str, Any]:
    """DiffusionConfig's fields for ADM's flags."""
    steps, schedule = flags["diffusion_steps"], flags["noise_schedule"]
    if schedule not in ("linear", "cosine"):
        raise InputError(f"noise_schedule is linear or cosine, not '{schedule}'.")
    if schedule == "linear" and steps != 1000:
        raise InputError(
            f"diffusion_steps {steps} with noise_schedule linear: ADM multiplies the betas by 1000 / diffusion_steps, and the "
            "linear schedule here does not. Only 1000 steps can be imported with it."
        )
    if flags["rescale_timesteps"] and steps != 1000:
        raise InputError(
            f"rescale_timesteps with diffusion_steps {steps}: ADM then tells the network t * 1000 / {steps}, and samplers "
            "here tell it t. Only 1000 steps can be imported with it."
        )
    prediction = "x0" if flags["predict_xstart"] else "eps"
    return {"schedule": schedule, "num_train_timesteps": steps, "prediction": prediction}


def _labels(classes: int, class_names: str | Path | None) -> LabelSpace | None:
    """The label space of a network with this many classes and no null class; None: named by their ids."""
    from ..data.class_lists import imagenet_classes
    from ..data.classes import class_lines
    from ..labels import LabelSpace

    if class_names is not None:
        names = tuple(line for _, line in class_lines(class_names, "class_names"))
        if len(names) != classes:
            raise InputError(f"{class_names} names {len(names)} classes, the network has {classes}: give one a line.")
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

OpenAI's guided-diffusion checkpoint `{name}` ({size}x{size} pictures, {parameters / 1e6:.1f} M parameters), as a network of
diffusion_adagn. Its training, its data and its licence are its authors' own.

| | |
|---|---|
| classes | {names or "none (unconditional)"} |
| null label | {NO_NULL if labels.K else "none"} |
| process | {process["schedule"]} schedule, T = {process["num_train_timesteps"]}, prediction {process["prediction"]} |
| flags | `{json.dumps(dict(flags))}` |

```bash
{next_command("THIS_FOLDER", pipe.labels)}
```

No quality figure was measured when this card was written.
"""


def next_command(folder: str | Path, labels: LabelSpace) -> str:
    """What to type to sample an imported model."""
    classes = labels.names[0].split(",")[0] if labels.K else "null"
    try:
        classes = classes if not labels.K or labels.parse(classes) == [0] else "id:0"
    except InputError:  # a name that could mean two classes
        classes = "id:0"
    return command("sample", folder, classes=classes, sampler="ddpm", steps=250)
