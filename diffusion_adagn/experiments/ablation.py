"""The same run with several kinds of conditioning: same data, seeds, steps and noise; only the conditioning differs.

Each member is an ordinary run folder, OUT/adagn-seed0 and so on, with its measurements in result.json. A finished member is
skipped, a stopped one is resumed, and kinds of conditioning and seeds may be added later.
"""

import contextlib
import dataclasses
import datetime
import gc
import io
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import StrictInt, StrictStr

from ..atomic import atomic_json, atomic_write, exclusive_lock
from ..commands import resume_hint, with_commands, with_options
from ..config import RunConfig, decisive, differences, read_config, to_yaml
from ..data import ImageDataset, open_dataset
from ..diffusion.loss import DiffusionLoss
from ..diffusion.schedule import make_process
from ..errors import InputError, reject_first
from ..evaluation.label_usage import label_use
from ..models.conditioning import CONDITIONING
from ..models.cost import Cost, estimate_cost
from ..models.unet import AdaGNUNet
from ..runs.layout import RunFolder, label_space, network_config
from ..runtime.distributed import process_state
from ..runtime.precision import use_tf32
from ..runtime.speed import resolve_speed
from ..sampling.load import open_pipeline
from ..sampling.pipeline import to_pixels
from ..schema import as_document, document, read_document
from ..training.export import sample_command
from ..training.setup import resolve
from ..training.train import STOPPED, train
from .ablation_report import write_report

NAME = re.compile(r"(\w+)-seed(\d+)")
LOSS_BINS = 5  # timestep bins of equal width
EVALUATIONS = 4096  # losses per label, over all held-out images


@document
class MemberResult:
    """The content of a member's result.json. A gap is its mean and the half-width of its interval, which may be nan."""

    kind: StrictStr
    seed: StrictInt
    parameters: float
    flops: float
    images_per_s: float | None
    train_loss: float
    heldout_loss: float
    wrong_gap: tuple[Any, Any] | None
    null_gap: tuple[Any, Any] | None
    wrong_gap_by_t: list[tuple[Any, Any] | None]
    null_gap_by_t: list[tuple[Any, Any] | None]
    device: StrictStr
    date: StrictStr


@dataclass(frozen=True)
class Member:
    """The run of one kind of conditioning with one seed."""

    conditioning: str
    seed: int
    run: RunFolder

    @property
    def name(self) -> str:
        return self.run.path.name

    @property
    def result(self) -> dict | None:
        """The contents of result.json; None while the member is unfinished. Raises InputError for a corrupted file."""
        file = self.run.path / "result.json"
        if not file.is_file() or not (self.run.path / "samples.npy").is_file():
            return None
        with self._reading(file, "measure"):
            result = read_document(file)
            checked = as_document(result, MemberResult, file)
            if (checked.kind, checked.seed) != (self.conditioning, self.seed):
                raise ValueError("it is another run's")
            return result

    @property
    def images(self) -> np.ndarray:
        """The preview images: uint8 [classes, H, W, C]. Raises InputError for a corrupted file."""
        file = self.run.path / "samples.npy"
        with self._reading(file, "sample"):
            return np.load(file, allow_pickle=False)

    @contextlib.contextmanager
    def _reading(self, file: Path, verb: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is corrupted ({error}): remove it to {verb} {self.name} again.") from None


def ablate(
    config: RunConfig,
    conditionings: list[str],
    seeds: list[int],
    out: Path,
    dry_run: bool = False,
    command: str = "",
    train_command: str = "",
) -> int:
    """Train and measure every kind of conditioning with every seed, and write ablation.md, ablation.csv and ablation.png.

    Args:
        config: The run that the members share. Its conditioning, seed, output_dir, previews and held-out losses are set here.
        conditionings: Names of CONDITIONING.
        seeds: Training seeds.
        out: The output folder.
        dry_run: Print the runs and their costs, and train nothing.
        command: The command that repeats this ablation, for messages; empty: not printed.
        train_command: The `adagn train` command of the shared run, for messages; empty: not printed.

    Returns:
        0 when done; 75 when a signal stopped it and everything was saved, so that the same command resumes.

    Raises:
        InputError: Before anything is trained, for whatever would fail later.
    """
    conditionings, seeds = _unique(conditionings), _unique(seeds)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        torchrun = f"torchrun --nproc_per_node {processes} -m diffusion_adagn {train_command.removeprefix('adagn ')}"
        settings = [
            {"model.conditioning": name, "training.seed": seed, "output_dir": out / f"{name}-seed{seed}"}
            for seed in seeds
            for name in conditionings
        ]
        raise InputError(
            with_commands(
                "adagn ablate runs in one process. To use several, train its members first, which are ordinary runs; "
                "adagn ablate then measures and compares them.",
                *([with_options(torchrun, **options) for options in settings] if train_command else []),
                *([command] if command else []),
            )
        )
    config, dataset, costs = _check(config, conditionings)
    heldout = open_dataset(config.data, "heldout")
    members = [Member(name, seed, RunFolder(out / f"{name}-seed{seed}")) for seed in seeds for name in conditionings]
    _open_output_dir(out, config, dry_run)
    finished = sum(m.result is not None for m in members)
    print(
        f"{len(conditionings)} kinds of conditioning x {len(seeds)} seeds = {len(members)} runs of {config.training.max_steps} "
        f"steps on {dataset.name} ({len(dataset):,} images, {len(heldout):,} held out); {finished} finished, in {out}"
    )
    for name, cost in costs.items():
        print(f"  {name:16}{cost.parameters / 1e6:8.3f} M parameters {cost.flops / 1e9:9.4f} GFLOPs per image")
    if dry_run:
        print("\n".join(f"  {'finished' if m.result else 'to do':8} {m.run.path}" for m in members))
        return 0

    with exclusive_lock(out):
        return _run(config, members, heldout, costs, out, dataset, command)


def _run(
    config: RunConfig,
    members: list[Member],
    heldout: ImageDataset,
    costs: dict[str, Cost],
    out: Path,
    dataset: ImageDataset,
    command: str,
) -> int:
    """Run `ablate` with `out` locked. It checks again which members are finished: another process may have run some."""
    unfinished = [m for m in members if m.result is None]
    started = time.perf_counter()
    for done, member in enumerate(unfinished):
        left = (time.perf_counter() - started) / done * (len(unfinished) - done) if done else None
        note = "" if left is None else f", about {left / 60:.0f} min left" if left > 90 else ", about a minute left"
        index = len(members) - len(unfinished) + done + 1
        print(f"[{index}/{len(members)}] {member.conditioning}, seed {member.seed}{note}")
        if _train(member, config) == STOPPED:
            print(resume_hint(f"Stopped in {member.name}; saved.", command))
            return STOPPED
        gc.collect()  # accelerate leaves the network in a reference cycle, which would stay on the device
        _measure(member, config, heldout, costs[member.conditioning])
        gc.collect()

    reported = _with_earlier_members(out, members)
    images = {m.name: m.images for m in reported}
    files = write_report(out, config, dataset, heldout, [m.result for m in reported], images)
    print("\n" + files[0].read_text(encoding="utf-8"))
    print("\n".join(f"{title:9} {file}" for title, file in zip(("table", "CSV", "images"), files)))
    print(
        with_commands(
            "Sample more images from one of them:", sample_command(str(members[0].run.path), label_space(config))
        )
    )
    return 0


def _with_earlier_members(out: Path, members: list[Member]) -> list[Member]:
    """These members, and those that earlier calls finished in the same folder. Skips unreadable ones of the latter, with a message."""
    names, earlier = {m.name for m in members}, []
    for file in sorted(out.glob("*/config.yaml")):
        match = NAME.fullmatch(file.parent.name)
        if match is None or match[1] not in CONDITIONING or file.parent.name in names:
            continue
        member = Member(match[1], int(match[2]), RunFolder(file.parent))
        try:
            if member.result is None:
                print(f"skipped: {member.name}, which is not finished (select it with --kinds and --seeds)")
            else:
                member.images  # noqa: B018 - raises if they cannot be read
                earlier.append(member)
        except InputError as error:
            print(f"skipped: {error}")
    return sorted(members + earlier, key=lambda m: (m.seed, list(CONDITIONING).index(m.conditioning)))


def member_config(config: RunConfig, member: Member) -> RunConfig:
    """The shared config with the member's conditioning and seed."""
    return dataclasses.replace(
        config,
        output_dir=str(member.run.path),
        model=dataclasses.replace(config.model, conditioning=member.conditioning),
        training=dataclasses.replace(config.training, seed=member.seed),
    )


# ---------------------------------------------------------------------- before the first step


def _unique(values: list) -> list:
    return list(dict.fromkeys(values))


def _check(config: RunConfig, conditionings: list[str]) -> tuple[RunConfig, ImageDataset, dict[str, Cost]]:
    """The config with the values that the data determines, the training data, and each network's cost by conditioning."""
    unknown = [name for name in conditionings if name not in CONDITIONING]
    faults = {
        f"unknown conditioning '{', '.join(unknown)}' in --kinds: choose from {', '.join(CONDITIONING)}": unknown
        or not conditionings,
        "training.max_steps is required, e.g. --training.max_steps 300": config.training.max_steps is None,
        "an ablation compares class conditioning: set model.class_conditional to true": not config.model.class_conditional,
    }
    reject_first(faults, "", ".")
    quiet = dataclasses.replace(config.training, preview_every=0, heldout_every=0, seed=0)
    config = dataclasses.replace(config, output_dir=None, training=quiet)
    config, dataset = resolve(config)
    costs = {}
    for name in conditionings:
        network = network_config(config) | {"conditioning": name}
        with torch.device("meta"):
            narrowest = min(site.channels for site in AdaGNUNet(**network).sites())
        if narrowest < 4 * config.model.norm_groups:
            raise InputError(
                f"model.norm_groups {config.model.norm_groups} gives {narrowest // config.model.norm_groups} channel(s) per group in a layer "
                f"of {narrowest}; with one, GroupNorm is instance norm. For an ablation use {narrowest // 4} groups or fewer."
            )
        costs[name] = estimate_cost(network)
    largest = max(cost.flops for cost in costs.values())  # one precision for all members
    speed = resolve_speed(config.speed, process_state(config.speed.device).device, largest)
    config = dataclasses.replace(config, speed=dataclasses.replace(config.speed, precision=speed.precision))
    return config, dataset, costs


def _open_output_dir(out: Path, config: RunConfig, dry_run: bool) -> None:
    """Write ablation.yaml into `out`, or check that an existing one has these settings."""
    file = out / "ablation.yaml"
    if file.is_file():
        old = read_config(file)
        changed = differences(decisive(old), config)
        if old.training.max_steps != config.training.max_steps:
            changed.append(f"training.max_steps: {old.training.max_steps} -> {config.training.max_steps}")
        if changed:
            raise InputError(
                f"{out} contains an ablation with other settings: {'; '.join(changed)}. Restore them, or give another --output_dir."
            )
    elif out.exists() and (not out.is_dir() or not all(NAME.fullmatch(p.name) for p in out.iterdir())):
        raise InputError(f"{out} exists and is not an ablation (it has no ablation.yaml): give another --output_dir.")
    elif not dry_run:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(file, lambda tmp: tmp.write_text(to_yaml(config), encoding="utf-8"))


# ---------------------------------------------------------------------- a member


def _train(member: Member, config: RunConfig) -> int:
    """Train it, or resume it; only the progress bar is shown."""
    with contextlib.redirect_stdout(io.StringIO()):
        return train(member_config(config, member), resume=True)


@use_tf32(False)
def _measure(member: Member, config: RunConfig, heldout: ImageDataset, cost: Cost) -> None:
    """Write samples.npy (uint8 [classes, H, W, C]), then result.json, which marks the member as finished."""
    pipe, _ = open_pipeline(member.run.path)
    pipe.to(process_state(config.speed.device).device)
    pipe.set_progress_bar_config(disable=True)
    d, training, labels = config.diffusion, config.training, pipe.labels
    loss = DiffusionLoss(make_process(d), d.loss_weight, d.min_snr_gamma).to(pipe.device)
    batch = max(1, training.batch_size // training.gradient_accumulation)
    use = label_use(pipe.unet, heldout, loss, EVALUATIONS, batch, progress=True)
    edges = np.linspace(0, 1, LOSS_BINS + 1)
    bins = list(zip(edges[:-1].tolist(), edges[1:].tolist()))

    classes = list(range(labels.K))[:10]
    scale = training.preview_guidance if labels.has_null else 1.0
    images = pipe(classes, guidance_scale=scale, num_inference_steps=training.preview_steps, seeds=0, output_type="np")
    np.save(member.run.path / "samples.npy", to_pixels(images.images))

    lines = [json.loads(line) for line in member.run.metrics_file.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    speeds = [line["images_per_s"] for line in lines if "images_per_s" in line][1:]
    result = {
        "kind": member.conditioning,
        "seed": member.seed,
        "parameters": cost.parameters,
        "flops": cost.flops,
        "images_per_s": float(np.median(speeds)) if speeds else None,
        "train_loss": float(np.mean(losses[-max(1, len(losses) // 10) :])),
        "heldout_loss": use.true.mean().item(),
        "wrong_gap": use.gap("wrong"),
        "null_gap": use.gap("null"),
        "wrong_gap_by_t": [use.gap("wrong", *b) for b in bins],
        "null_gap_by_t": [use.gap("null", *b) for b in bins],
        "device": _device_name(pipe.device),
        "date": datetime.date.today().isoformat(),
    }
    atomic_json(member.run.path / "result.json", result)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else "an Apple GPU"
