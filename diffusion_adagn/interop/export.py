"""To diffusers and back: a folder that stock diffusers loads and samples without this package, and such folders opened.

DIR/model_index.json            class names, null id, clipping; "_class_name": ["adagn_label_pipeline", "LabelPipeline"]
DIR/adagn_label_pipeline.py     a copy of the file beside this one
DIR/unet/                       UNet2DModel
DIR/scheduler/                  the model's own scheduler
DIR/README.md
"""

import inspect
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..atomic import atomic_dir
from ..diffusion.schedule import PREDICTIONS, SAMPLERS, set_timesteps, with_sampler
from ..errors import InputError, errors_as_input_error
from ..labels import LabelSpace
from ..models.config import MAX_LEVELS
from ..models.unet import AdaGNUNet
from ..runs.layout import pipeline_folder
from ..sampling.load import open_pipeline
from ..sampling.pipeline import ClassConditionalPipeline
from ..sampling.pretrained import fill, load_scheduler, model_hash
from ..schema import read_json, short_repr
from .adagn_label_pipeline import LabelPipeline
from .unet2d import from_unet2d, to_unet2d

CODE = Path(inspect.getsourcefile(LabelPipeline)).name
CLASS_NAME = [Path(CODE).stem, LabelPipeline.__name__]  # in model_index.json
MAX_LAYERS = 64  # in a level
PIPELINE_FILES = {"model_index.json", "unet", "scheduler", "README.md", CODE}

# ---------------------------------------------------------------------- there


def export_diffusers(source: str | Path, out: str | Path, weights: str = "ema", overwrite: bool = False) -> Path:
    """Write the model that `source` means (see `loading.open_pipeline`) as a folder for stock diffusers; returns it.

    Raises InputError, before anything is written, for a network that UNet2DModel cannot express and for a folder in the way.
    """
    out = _free(out, overwrite, "an export", lambda index: index.get("_class_name") == CLASS_NAME)
    pipe, _ = open_pipeline(source, weights)
    unet = to_unet2d(pipe.unet).eval()
    _check_same(pipe.unet, unet)
    stock = LabelPipeline(
        unet,
        pipe.scheduler,
        id2label=dict(enumerate(pipe.labels.names)),
        null_id=pipe.labels.null_id if pipe.labels.K else None,
        clip_x0=pipe.config.clip_x0,
        sample_defaults={"num_inference_steps": _default_steps(pipe.scheduler), "guidance_scale": 1.0},
        guidance_convention=pipe.config.guidance_convention,
        record={
            "hash": model_hash(pipe.unet),
            "ema_decay": pipe.config.ema_decay,
            "trained_steps": pipe.config.trained_steps,
            "original_ids": list(pipe.labels.original_ids),
            "wnids": list(pipe.labels.wnids),
        },
    )

    def write(folder: Path) -> None:
        stock.save_pretrained(folder)
        (folder / "README.md").write_text(_card(out, stock), encoding="utf-8")

    return atomic_dir(out, write)


def sample_line(folder: str | Path) -> str:
    """What to type to sample an exported folder with stock diffusers."""
    names = read_json(Path(folder) / "model_index.json")["id2label"]
    path, name = (json.dumps(text, ensure_ascii=False) for text in (str(folder), names.get("0")))
    code = (
        "from diffusers import DiffusionPipeline; "
        f"pipe = DiffusionPipeline.from_pretrained({path}, trust_remote_code=True); "
        f'pipe({name + ", " if names else ""}seeds=0).images[0].save("picture.png")'
    )
    return f"python -c {shlex.quote(code)}"


def _default_steps(scheduler: SchedulerMixin, most: int = 50) -> int:
    """The largest number of steps up to 50 that this scheduler walks as scheduled."""
    for steps in range(min(most, scheduler.config.num_train_timesteps), 1, -1):
        try:
            set_timesteps(scheduler, steps)
            return steps
        except InputError:
            continue
    return 1


@torch.no_grad()
def _check_same(ours: AdaGNUNet, theirs: UNet2DModel) -> None:
    """Raises RuntimeError unless both networks answer the same, once, at a random picture."""
    c = ours.config
    x = torch.randn(1, c.in_channels, c.sample_size, c.sample_size, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([500.0]), torch.tensor([0]) if c.num_classes else None
    a, b = ours.eval()(x, t, y).sample, theirs(x, t, y).sample
    if not (a - b).abs().max() <= 1e-3 * a.abs().max():
        raise RuntimeError(
            f"the exported network differs from the model by {(a - b).abs().max():.2g}: please report this."
        )


def _card(out: Path, pipe: LabelPipeline) -> str:
    c, names = pipe.config, list(pipe.labels.values())
    shown = ", ".join(name.split(", ")[0] for name in names[:50])
    shown += f", ... ({len(names)} in all)" if len(names) > 50 else ""
    guided = c.null_id is not None
    call = f"[{names[0]!r}, {len(names) - 1}], " if names else ""
    call += "guidance_scale=2.0, seeds=0" if guided else "seeds=0"
    labels = f"0..{len(names) - 1}" + (f", and {c.null_id} for null" if guided else "") if names else "none"
    side, decay = pipe.unet.config.sample_size, c.record["ema_decay"]
    weights = "raw" if decay is None else f"EMA, rate {decay:g}"
    weights += f"; {c.record['trained_steps'] or 'an unknown number of'} steps; hash `{c.record['hash']}`"
    return f"""---
library_name: diffusers
tags: [diffusion, class-conditional, image-generation]
---

# {out.name}

A class-conditional diffusion model of {side}x{side} pictures, for stock diffusers: `unet/` is a `UNet2DModel`, `scheduler/` a
`{type(pipe.scheduler).__name__}`. Trained and exported with diffusion_adagn, which is not needed to use it.

| | |
|---|---|
| classes | {shown or "none (unconditional)"} |
| null label | {c.null_id if guided else "none: guidance is not possible"} |
| weights | {weights} |
| prediction | {pipe.scheduler.config.prediction_type}, T = {pipe.scheduler.config.num_train_timesteps} |
| guidance | {c.guidance_convention} |
| x0 | {"clipped to [-1, 1], after guidance" if c.clip_x0 else "not clipped"} |

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", trust_remote_code=True)
images = pipe({call}).images
```

`trust_remote_code=True` runs `{CODE}`, which lies beside this card and imports torch, numpy, PIL and
diffusers alone. Read it, or do without: `UNet2DModel.from_pretrained("THIS_FOLDER", subfolder="unet")` loads the network alone,
whose `class_labels` are {labels}.

Back into diffusion_adagn: `adagn import-diffusers THIS_FOLDER --out DIR` (reads json and safetensors, runs no code).
"""


# ---------------------------------------------------------------------- and back


def open_diffusers(
    folder: str | Path, null_class: bool | None = None, class_names: Sequence[str] | None = None
) -> ClassConditionalPipeline:
    """The model of an exported folder, or of any pipeline folder or hub id with a UNet2DModel and one of our schedulers.

    null_class: whether the last row of the class table means "no class"; None: as the folder says, else not.
    class_names: names in the order of the ids; None: the folder's, else the ids.
    Only json and safetensors are read; no code in the folder is run. The scheduler keeps its process (betas, T, prediction,
    spacing); what only belongs to its sampler follows our rules, `changed_settings` tells what differs.
    Raises InputError for a folder that holds something else.
    """
    folder = pipeline_folder(folder)
    with errors_as_input_error(folder):
        return _open(folder, null_class, class_names)


def _open(folder: Path, null_class: bool | None, class_names: Sequence[str] | None) -> ClassConditionalPipeline:
    index = read_json(folder / "model_index.json")
    exported = index.get("_class_name") == CLASS_NAME
    if exported:
        _check_index(index)
    if null_class is None:
        null_class = exported and index.get("null_id") is not None
    theirs = _stock_scheduler(folder, index)
    unet = from_unet2d(_stock_unet(folder, index), null_class=null_class).eval()
    record = index.get("record", {}) if exported else {}
    labels = _labels(unet, class_names, index.get("id2label"), record)
    if exported and null_class and index.get("null_id", labels.K) != labels.K:
        raise InputError(f"null_id in model_index.json is {index['null_id']}; expected {labels.K}, the last row.")
    return ClassConditionalPipeline(
        unet,
        _our_scheduler(theirs, unet.config.learned_variance),
        labels,
        clip_x0=index["clip_x0"] if exported and "clip_x0" in index else _clips(theirs),
        ema_decay=record.get("ema_decay"),
        trained_steps=record.get("trained_steps"),
    )


def import_diffusers(
    folder: str | Path,
    out: str | Path,
    null_class: bool | None = None,
    class_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """`open_diffusers`, written as a pipeline folder of ours; returns it. Raises InputError before anything is written."""
    out = _free(out, overwrite, "a pipeline folder", lambda index: "labels" in index)
    return atomic_dir(out, open_diffusers(folder, null_class, class_names).save_pretrained)


def changed_settings(folder: str | Path, pipe: ClassConditionalPipeline) -> list[str]:
    """What the scheduler in the folder says otherwise than the opened pipeline's: "steps_offset: 1 -> 0"."""
    theirs = read_json(pipeline_folder(folder) / "scheduler" / "scheduler_config.json")
    ours = pipe.scheduler.config
    kept = {"clip_sample"} if pipe.config.clip_x0 else set()  # the pipeline clips instead
    if ours.get("trained_betas") is not None:
        kept |= {"trained_betas", "beta_schedule", "beta_start", "beta_end"}
    accepted = inspect.signature(type(pipe.scheduler).__init__).parameters
    return [f"{k}: {v} -> {ours[k]}" for k, v in theirs.items() if k in accepted and k not in kept and ours.get(k) != v]


def _check_index(index: dict) -> None:
    """Raises InputError for entries of a model_index.json that an export does not write."""
    names, null_id, record = index.get("id2label", {}), index.get("null_id"), index.get("record", {})
    whole, numbers = (int, type(None)), (float, int, type(None))
    checks = {
        "id2label": isinstance(names, dict) and all(isinstance(name, str) for name in names.values()),
        "null_id": type(null_id) in whole,
        "clip_x0": isinstance(index.get("clip_x0", True), bool),
        "record": isinstance(record, dict)
        and type(record.get("trained_steps")) in whole
        and type(record.get("ema_decay")) in numbers,
    }
    wrong = [key for key, right in checks.items() if not right]
    if wrong:
        raise InputError(f"{wrong[0]} in model_index.json cannot be {short_repr(index[wrong[0]])}.")


def _component(index: dict, name: str) -> str | None:
    """The class of a component, only if it is one of diffusers' own."""
    value = index.get(name)
    return value[1] if isinstance(value, list) and len(value) == 2 and value[0] == "diffusers" else None


def _stock_unet(folder: Path, index: dict) -> UNet2DModel:
    named = [_component(index, "unet"), read_json(folder / "unet" / "config.json").get("_class_name")]
    if named != ["UNet2DModel"] * 2:
        raise InputError(
            f"{folder} holds the network {index.get('unet')}; only diffusers' UNet2DModel can be imported."
        )
    unet = _empty_unet(folder / "unet" / "config.json")
    fill(unet, folder / "unet")
    if unet.config.out_channels not in (unet.config.in_channels, 2 * unet.config.in_channels):
        raise InputError(
            f"{folder / 'unet'} has {unet.config.in_channels} input and {unet.config.out_channels} output channels; expected "
            "as many, or twice as many for a learned variance."
        )
    return unet.eval()


def _empty_unet(file: Path) -> UNet2DModel:
    """The network that a config.json describes, on the meta device. Raises InputError for what can be none."""
    config = read_json(file)
    levels, layers = config.get("block_out_channels", ()), config.get("layers_per_block", 2)
    if (
        not isinstance(levels, list | tuple)
        or len(levels) > MAX_LEVELS
        or type(layers) is not int
        or layers > MAX_LAYERS
    ):
        raise InputError(
            f"{file} describes no network: expected block_out_channels of {MAX_LEVELS} levels at most and layers_per_block of "
            f"{MAX_LAYERS} at most, not {short_repr(levels)} and {short_repr(layers)}."
        )
    try:
        with torch.device("meta"):
            return UNet2DModel.from_config(config)
    except Exception as error:  # diffusers does not look at what it is given
        raise InputError(f"{file} describes no network: {' '.join(str(error).split())[:300]}") from error


def _stock_scheduler(folder: Path, index: dict) -> SchedulerMixin:
    known = {cls.__name__: cls for cls in SAMPLERS.values()}
    name = _component(index, "scheduler")
    if name not in known:
        raise InputError(
            f"{folder} has the scheduler {short_repr(index.get('scheduler'))}; expected one of {', '.join(known)}."
        )
    return load_scheduler(folder / "scheduler", known[name])


def _our_scheduler(theirs: SchedulerMixin, learned_variance: bool) -> SchedulerMixin:
    """The same process by our rules (see `schedule.with_sampler`)."""
    c = theirs.config
    if c.prediction_type not in PREDICTIONS.values():
        raise InputError(f"prediction_type {c.prediction_type!r} is not one of {', '.join(PREDICTIONS.values())}.")
    if learned_variance and c.get("variance_type") == "learned":
        raise InputError("variance_type 'learned' is not known here: only 'learned_range' (Nichol & Dhariwal 2021).")
    if c.get("clip_sample_range", 1.0) != 1.0 and _clips(theirs):
        raise InputError(f"the scheduler clips to {c.clip_sample_range}; here x0 is clipped to [-1, 1] or not at all.")
    if c.beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2") and c.trained_betas is None:
        theirs = type(theirs).from_config(c, trained_betas=theirs.betas.tolist())  # a schedule that other samplers lack
    return with_sampler(
        theirs, spacing="trailing" if c.get("rescale_betas_zero_snr") else None, learned_variance=learned_variance
    )


def _clips(scheduler: SchedulerMixin) -> bool:
    """Whether a stock scheduler clips x0; a leftover entry of another one's config does nothing."""
    accepted = inspect.signature(type(scheduler).__init__).parameters
    return "clip_sample" in accepted and bool(scheduler.config.clip_sample)


def _labels(unet: AdaGNUNet, class_names: Sequence[str] | None, id2label: dict | None, record: dict) -> LabelSpace:
    count = unet.config.num_classes or 0
    names = [str(i) for i in range(count)] if class_names is None else list(class_names)
    if class_names is None and id2label:
        try:
            by_id = {int(i): str(name) for i, name in id2label.items()}
            names = [by_id[i] for i in range(len(by_id))]
        except (KeyError, ValueError, AttributeError):
            raise InputError("id2label in model_index.json must name the classes 0, 1, 2, ... without gaps.") from None
    if len(names) != count:
        missing_null = len(names) == count - 1 and not unet.config.null_class
        hint = " If the last row of its table means no class, give --null_class." if missing_null else ""
        raise InputError(f"the network has {count} classes, but {len(names)} names were given.{hint}")
    kept = {k: record.get(k) for k in ("original_ids", "wnids")} if class_names is None else {}
    return LabelSpace.from_dict({"names": names, "has_null": unet.config.null_class or not count, **kept})


# ---------------------------------------------------------------------- folders


def _free(out: str | Path, overwrite: bool, kind: str, is_kind: Callable[[dict], bool]) -> Path:
    """The folder to write, resolved. Raises InputError if something is there that may not be replaced."""
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        try:
            ours = is_kind(read_json(out / "model_index.json")) and {p.name for p in out.iterdir()} <= PIPELINE_FILES
        except InputError:
            ours = False
        if not ours:
            raise InputError(f"{out} is in the way and holds something else than {kind}: name another folder.")
        if not overwrite:
            raise InputError(f"{out} exists: name another folder, or give --overwrite to replace it.")
    return out
