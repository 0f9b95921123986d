"""Export to a folder that stock diffusers loads and samples without this package, and import of such folders.

DIR/model_index.json            class names, null id, clipping; "_class_name": ["adagn_label_pipeline", "LabelPipeline"]
DIR/adagn_label_pipeline.py     a copy of the file in this folder
DIR/unet/                       UNet2DModel
DIR/scheduler/                  the model's own scheduler; of edm and flow diffusers' (see stock_process.py)
DIR/README.md
"""

import dataclasses
import inspect
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le, MaxLen
from diffusers import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from pydantic import Strict, StrictBool, StrictInt, StrictStr
from torch.nn import functional as F

from ..atomic import atomic_dir
from ..diffusion.ode_scheduler import OdeScheduler
from ..diffusion.schedule import SAMPLERS, set_timesteps, with_sampler
from ..errors import InputError, errors_as_input_error
from ..labels import LabelSpace
from ..models.config import MAX_LEVELS, PatchSize
from ..models.unet import AdaGNUNet
from ..runs.layout import pipeline_folder
from ..sampling.card import describe_average
from ..sampling.fixed_scale import fix_scale, fixed_convention
from ..sampling.load import ema_record, open_pipeline
from ..sampling.pipeline import ClassConditionalPipeline
from ..sampling.pretrained import fill, load_scheduler, model_hash
from ..schema import as_document, document, read_document, short_repr
from .adagn_label_pipeline import LabelPipeline
from .stock_process import (
    ODE_CLASSES,
    changed_ode_settings,
    open_stock_ode,
    process_line,
    replaced_sampler,
    sampler_line,
    stock_ode_class,
    stock_process,
    stock_scheduler,
)
from .unet2d import from_unet2d, to_unet2d

PIPELINE_CODE = Path(inspect.getsourcefile(LabelPipeline)).name
CLASS_NAME = [Path(PIPELINE_CODE).stem, LabelPipeline.__name__]  # in model_index.json
PIPELINE_FILES = {"model_index.json", "unet", "scheduler", "README.md", PIPELINE_CODE}


@document
class ExportRecord:
    """The origin of an exported network."""

    ema_decay: Annotated[float | None, Strict()] = None
    ema_length: Annotated[float | None, Strict()] = None
    trained_steps: StrictInt | None = None
    original_ids: tuple[StrictInt, ...] = ()
    wnids: tuple[StrictStr, ...] = ()
    sampler: StrictStr | None = None
    """in place of which the scheduler was written"""
    scale: Annotated[float | None, Gt(0)] = None
    """the guidance scale that is part of the weights"""


@document
class ExportIndex:
    """The settings in an export's model_index.json."""

    id2label: dict[str, StrictStr] = dataclasses.field(default_factory=dict)
    null_id: StrictInt | None = None
    clip_x0: StrictBool | None = None
    patch_size: PatchSize = 1
    record: ExportRecord = ExportRecord()
    process: dict[str, Any] | None = None
    """None: ddpm"""


@document
class UNetSize:
    """The sizes in the config.json of a UNet2DModel, whose layers diffusers would build without a limit."""

    block_out_channels: Annotated[tuple[StrictInt, ...], MaxLen(MAX_LEVELS)] = ()
    layers_per_block: Annotated[StrictInt, Le(64)] = 2


# ---------------------------------------------------------------------- export


def export_diffusers(
    source: str | Path,
    out: str | Path,
    ema: float | str = "run",
    overwrite: bool = False,
    scale: float | None = None,
) -> Path:
    """Write a model as a folder for stock diffusers.

    Args:
        source: A run, checkpoint, pipeline folder or hub id; see `sampling.load.open_pipeline`.
        out: The folder to write.
        ema: Which weights, as `ClassConditionalPipeline.from_pretrained` takes it.
        overwrite: Replace an earlier export.
        scale: The guidance scale to fix, of a network that reads it: UNet2DModel has no such input. None: there is none.

    Returns:
        The folder.

    Raises:
        InputError: For a network that UNet2DModel cannot express, and if the folder exists; nothing is written then.
    """
    out = _free(out, overwrite, "an export", lambda index: index.get("_class_name") == CLASS_NAME)
    pipe, _ = open_pipeline(source, ema)
    source_hash = model_hash(pipe.unet)
    pipe = pipe if scale is None else fix_scale(pipe, scale)
    unet = to_unet2d(pipe.unet).eval()
    _check_same(pipe.unet, unet)
    augmented = pipe.unet.embedding.augment is not None
    stock = LabelPipeline(
        unet,
        stock_scheduler(pipe.scheduler),
        id2label=dict(enumerate(pipe.labels.names)),
        null_id=pipe.labels.null_id if pipe.labels.K else None,
        clip_x0=pipe.config.clip_x0,
        patch_size=pipe.unet.config.patch_size,
        sample_defaults={"num_inference_steps": _default_steps(pipe.scheduler), "guidance_scale": 1.0},
        guidance_convention=pipe.config.guidance_convention,
        record={
            "hash": source_hash,
            "ema_decay": pipe.config.ema_decay,
            **ema_record(pipe),
            "trained_steps": pipe.config.trained_steps,
            "original_ids": list(pipe.labels.original_ids),
            "wnids": list(pipe.labels.wnids),
            "sampler": replaced_sampler(pipe.scheduler)[0],
            **({} if scale is None else {"scale": scale}),
        },
        process=stock_process(pipe.scheduler),
    )

    def write(folder: Path) -> None:
        stock.save_pretrained(folder)
        (folder / "README.md").write_text(_card(out, stock, augmented), encoding="utf-8")

    return atomic_dir(out, write)


def sampler_note(folder: str | Path) -> str:
    """The sampler of an exported folder, and the one that it replaces; "" where none was replaced."""
    index = read_document(Path(folder) / "model_index.json")
    replaced = as_document(index, ExportIndex, Path(folder) / "model_index.json").record.sampler
    if replaced is None:
        return ""
    written = ODE_CLASSES[_component(index, "scheduler")][1]
    name = index["process"]["name"]
    return (
        f"diffusers has no {replaced} for {name}: the folder samples with {written} ({index['scheduler'][1]}) instead."
    )


def stock_sample_command(folder: str | Path) -> str:
    """The command that samples an exported folder with stock diffusers."""
    names = read_document(Path(folder) / "model_index.json")["id2label"]
    path, name = (json.dumps(text, ensure_ascii=False) for text in (str(folder), names.get("0")))
    code = (
        f"from diffusers import DiffusionPipeline; pipe = DiffusionPipeline.from_pretrained({path}, "
        "trust_remote_code=True); "
        f'pipe({name + ", " if names else ""}seeds=0).images[0].save("image.png")'
    )
    return f"python -c {shlex.quote(code)}"


def _default_steps(scheduler: SchedulerMixin, max_steps: int = 50) -> int:
    """The largest number of steps up to `max_steps` for which the scheduler follows its timesteps exactly."""
    if isinstance(scheduler, OdeScheduler):
        return max_steps
    for steps in range(min(max_steps, scheduler.config.num_train_timesteps), 1, -1):
        try:
            set_timesteps(scheduler, steps)
            return steps
        except InputError:
            continue
    return 1


@torch.no_grad()
def _check_same(ours: AdaGNUNet, theirs: UNet2DModel) -> None:
    """Raises RuntimeError unless both networks have the same output for a random image."""
    c = ours.config
    x = torch.randn(1, c.in_channels, c.sample_size, c.sample_size, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([500.0]), torch.tensor([0]) if c.num_classes else None
    ours_out = ours.eval()(x, t, y).sample
    theirs_out = F.pixel_shuffle(theirs(F.pixel_unshuffle(x, c.patch_size), t, y).sample, c.patch_size)
    if not (ours_out - theirs_out).abs().max() <= 1e-3 * ours_out.abs().max():
        raise RuntimeError(
            f"the exported network differs from the model by {(ours_out - theirs_out).abs().max():.2g}: please "
            "report this."
        )


def _card(out: Path, pipe: LabelPipeline, augmented: bool) -> str:
    """augmented: whether the model was trained with augmentation parameters, which the export lacks."""
    c, names = pipe.config, list(pipe.labels.values())
    shown = ", ".join(name.split(", ")[0] for name in names[:50])
    shown += f", ... ({len(names)} in all)" if len(names) > 50 else ""
    guided = c.null_id is not None
    call = f"[{names[0]!r}, {len(names) - 1}], " if names else ""
    call += "guidance_scale=2.0, seeds=0" if guided else "seeds=0"
    labels = f"0..{len(names) - 1}" + (f", and {c.null_id} for null" if guided else "") if names else "none"
    side, patch = pipe.unet.config.sample_size * c.patch_size, c.patch_size
    inputs = ""
    if patch > 1:
        inputs = (
            f"\n`unet/` works on patches of {patch}x{patch} pixels: its input is `torch.nn.functional.pixel_unshuffle(images, "
            f"{patch})`, and `pixel_shuffle`\nof its output is the prediction. The pipeline does both.\n"
        )
    scale = c.record.get("scale")
    no_null = (
        "none: guidance is not possible" if scale is None else f"none: guidance scale {scale:g} is part of the weights"
    )
    weights = describe_average(c.record["ema_decay"], c.record.get("ema_length"))
    weights += f"; {c.record['trained_steps'] or 'an unknown number of'} steps; hash `{c.record['hash']}`"
    if augmented:
        inputs += (
            "\nThe network was trained on augmented images and received the parameters. Its weights for these parameters, which are 0 when "
            "sampling, are\nnot in this folder; to train on with augmentation, use the original model.\n"
        )
    return f"""---
library_name: diffusers
tags: [diffusion, class-conditional, image-generation]
---

# {out.name}

A class-conditional diffusion model of {side}x{side} images, for stock diffusers: `unet/` is a `UNet2DModel`,
`scheduler/` a `{type(pipe.scheduler).__name__}`. Trained and exported with diffusion_adagn, which is not needed for
sampling.
{inputs}
| | |
|---|---|
| classes | {shown or "none (unconditional)"} |
| null label | {c.null_id if guided else no_null} |
| weights | {weights} |
| process | {process_line(pipe)} |
| sampler | {sampler_line(pipe.scheduler, c.process, c.record["sampler"])} |
| guidance | {c.guidance_convention} |
| x0 | {"clipped to [-1, 1], after guidance" if c.clip_x0 else "not clipped"} |

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", trust_remote_code=True)
images = pipe({call}).images
```

`trust_remote_code=True` runs `{PIPELINE_CODE}`, which is in this folder and imports only torch, numpy, PIL and
diffusers. Read it first, or do without: `UNet2DModel.from_pretrained("THIS_FOLDER", subfolder="unet")` loads only the
network, whose `class_labels` are {labels}.

To import it into diffusion_adagn: `adagn import-diffusers THIS_FOLDER --out DIR` (reads json and safetensors, runs no
code).
"""


# ---------------------------------------------------------------------- import


def open_diffusers(
    folder: str | Path, null_class: bool | None = None, class_names: Sequence[str] | None = None
) -> ClassConditionalPipeline:
    """Open an exported folder, or any pipeline folder or hub id with a UNet2DModel and one of our schedulers.

    Only json and safetensors are read; no code in the folder is run. The scheduler's process (betas, T, prediction,
    spacing; of edm and flow sigma_data and the noise levels) stays; settings of its sampler follow our rules. A sampler
    that an export had to replace comes back. `changed_settings` lists the differences.

    Args:
        folder: The folder or hub id.
        null_class: Whether the last row of the class table means "no class"; None: as the folder says, else False.
        class_names: Names in the order of the ids; None: those of the folder, else the ids.

    Returns:
        The pipeline.

    Raises:
        InputError: For a folder with other contents.
    """
    folder = pipeline_folder(folder)
    with errors_as_input_error(folder):
        return _open(folder, null_class, class_names)


def _open(folder: Path, null_class: bool | None, class_names: Sequence[str] | None) -> ClassConditionalPipeline:
    index = read_document(folder / "model_index.json")
    file = folder / "model_index.json"
    exported = as_document(index, ExportIndex, file) if index.get("_class_name") == CLASS_NAME else None
    if null_class is None:
        null_class = exported is not None and exported.null_id is not None
    theirs = _stock_scheduler(folder, index, exported)
    patch_size = 1 if exported is None else exported.patch_size
    unet = from_unet2d(_stock_unet(folder, index), null_class=null_class, patch_size=patch_size).eval()
    record = exported.record if exported is not None else ExportRecord()
    labels = _labels(unet, class_names, index.get("id2label"), record)
    if exported is not None and null_class and exported.null_id not in (None, labels.K):
        raise InputError(f"null_id in {file} is {exported.null_id}; expected {labels.K}, the last row.")
    return ClassConditionalPipeline(
        unet,
        theirs if isinstance(theirs, OdeScheduler) else _our_scheduler(theirs, unet.config.learned_variance),
        labels,
        clip_x0=_clips(theirs) if exported is None or exported.clip_x0 is None else exported.clip_x0,
        ema_decay=record.ema_decay,
        ema_length=record.ema_length,
        trained_steps=record.trained_steps,
        **({} if record.scale in (None, 1) else {"guidance_convention": fixed_convention(record.scale)}),
    )


def import_diffusers(
    folder: str | Path,
    out: str | Path,
    null_class: bool | None = None,
    class_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the result of `open_diffusers` as a pipeline folder, and return it. On an InputError nothing is written."""
    out = _free(out, overwrite, "a pipeline folder", lambda index: "labels" in index)
    return atomic_dir(out, open_diffusers(folder, null_class, class_names).save_pretrained)


def changed_settings(folder: str | Path, pipe: ClassConditionalPipeline) -> list[str]:
    """Scheduler settings of the folder that differ in the opened pipeline, such as "steps_offset: 1 -> 0"."""
    folder = pipeline_folder(folder)
    theirs = read_document(folder / "scheduler" / "scheduler_config.json")
    if isinstance(pipe.scheduler, OdeScheduler):
        name = _component(read_document(folder / "model_index.json"), "scheduler")
        return changed_ode_settings(name, theirs, pipe.scheduler)
    ours = pipe.scheduler.config
    ignored = {"clip_sample"} if pipe.config.clip_x0 else set()  # the pipeline clips instead
    if ours.get("trained_betas") is not None:
        ignored |= {"trained_betas", "beta_schedule", "beta_start", "beta_end"}
    accepted = inspect.signature(type(pipe.scheduler).__init__).parameters
    return [
        f"{k}: {v} -> {ours[k]}" for k, v in theirs.items() if k in accepted and k not in ignored and ours.get(k) != v
    ]


def _component(index: dict, name: str) -> str | None:
    """The class of a component; None unless it is one of diffusers."""
    value = index.get(name)
    return value[1] if isinstance(value, list) and len(value) == 2 and value[0] == "diffusers" else None


def _stock_unet(folder: Path, index: dict) -> UNet2DModel:
    named = [_component(index, "unet"), read_document(folder / "unet" / "config.json").get("_class_name")]
    if named != ["UNet2DModel"] * 2:
        raise InputError(
            f"{folder} contains the network {index.get('unet')}; only diffusers' UNet2DModel can be imported."
        )
    unet = _empty_unet(folder / "unet" / "config.json")
    fill(unet, folder / "unet")
    if unet.config.out_channels not in (unet.config.in_channels, 2 * unet.config.in_channels):
        raise InputError(
            f"{folder / 'unet'} has {unet.config.in_channels} input and {unet.config.out_channels} output channels; "
            "expected as many, or twice as many for a learned variance."
        )
    return unet.eval()


def _empty_unet(file: Path) -> UNet2DModel:
    """The network that a config.json describes, on the meta device. Raises InputError for an invalid one."""
    config = read_document(file)
    as_document(config, UNetSize, file)
    with torch.device("meta"):
        return UNet2DModel.from_config(config)


def _stock_scheduler(folder: Path, index: dict, exported: ExportIndex | None) -> SchedulerMixin:
    """The folder's scheduler; of edm and flow ours for it."""
    known = {cls.__name__: cls for cls in SAMPLERS.values()}
    name, file = _component(index, "scheduler"), folder / "scheduler" / "scheduler_config.json"
    if name not in known | ODE_CLASSES:
        raise InputError(
            f"{folder} has the scheduler {short_repr(index.get('scheduler'))}; expected one of "
            f"{', '.join(known | ODE_CLASSES)}."
        )
    process = None if exported is None else exported.process
    if stock_ode_class(name, read_document(file)):
        return open_stock_ode(file, name, process, None if exported is None else exported.record.sampler)
    if process is not None:
        raise InputError(f"{file} is a scheduler of ddpm, and model_index.json says process {process.get('name')!r}.")
    return load_scheduler(folder / "scheduler", known[name])


def _our_scheduler(theirs: SchedulerMixin, learned_variance: bool) -> SchedulerMixin:
    """A scheduler of the same process with our settings (see `schedule.with_sampler`)."""
    c = theirs.config
    fault = ""
    if learned_variance and c.get("variance_type") == "learned":
        fault = "has variance_type 'learned'; only 'learned_range' is supported (Nichol & Dhariwal 2021)"
    elif c.get("clip_sample_range", 1.0) != 1.0 and _clips(theirs):
        fault = f"clips to {c.clip_sample_range}; here x0 is clipped to [-1, 1] or not at all"
    if fault:
        raise InputError(f"the scheduler {fault}.")
    if c.beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2") and c.trained_betas is None:
        theirs = type(theirs).from_config(c, trained_betas=theirs.betas.tolist())  # other samplers lack this schedule
    return with_sampler(
        theirs, spacing="trailing" if c.get("rescale_betas_zero_snr") else None, learned_variance=learned_variance
    )


def _clips(scheduler: SchedulerMixin) -> bool:
    """Whether a stock scheduler clips x0; an entry left from another scheduler's config has no effect."""
    accepted = inspect.signature(type(scheduler).__init__).parameters
    return "clip_sample" in accepted and bool(scheduler.config.clip_sample)


def _labels(
    unet: AdaGNUNet, class_names: Sequence[str] | None, id2label: dict | None, record: ExportRecord
) -> LabelSpace:
    count = unet.config.num_classes or 0
    names = [str(i) for i in range(count)] if class_names is None else list(class_names)
    if class_names is None and id2label:
        by_id = {int(i): str(name) for i, name in id2label.items()}
        names = [by_id.get(i) for i in range(len(by_id))]
    if len(names) != count or None in names:
        missing_null = len(names) == count - 1 and not unet.config.null_class
        hint = " If the last row of its class table means no class, give --null_class." if missing_null else ""
        raise InputError(
            f"the network has {count} classes, but {len(names)} names were given; expected one for each of 0, 1, 2, ... without gaps.{hint}"
        )
    ids = record if class_names is None else ExportRecord()
    return LabelSpace(tuple(names), ids.original_ids, ids.wnids, has_null=unet.config.null_class or not count)


# ---------------------------------------------------------------------- folders


def _free(out: str | Path, overwrite: bool, content: str, is_content: Callable[[dict], bool]) -> Path:
    """The folder to write, resolved. Raises InputError if it exists and may not be replaced."""
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        try:
            ours = (
                is_content(read_document(out / "model_index.json"))
                and {p.name for p in out.iterdir()} <= PIPELINE_FILES
            )
        except InputError:
            ours = False
        if not ours or not overwrite:
            fault = (
                ": give another folder, or --overwrite to replace it"
                if ours
                else f" and is not {content}: give another folder"
            )
            raise InputError(f"{out} exists{fault}.")
    return out
