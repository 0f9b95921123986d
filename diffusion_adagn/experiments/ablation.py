"""The same run under several conditioning kinds: same data, seeds, steps and noise; the kind is the only change.

Each member is an ordinary run folder, OUT/adagn-seed0 and so on, with its measurements in result.json. A finished member is
never run again, a stopped one goes on, and kinds and seeds may be added later.
"""

import contextlib
import dataclasses
import datetime
import gc
import io
import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..atomic import atomic_write, exclusive_lock
from ..commands import resume_hint, with_commands, with_options
from ..config import RunConfig, differences, read_config, to_yaml
from ..data import ImageDataset, open_dataset
from ..diffusion.loss import DiffusionLoss
from ..diffusion.schedule import make_scheduler
from ..errors import InputError
from ..evaluation.label_usage import label_use
from ..models.conditioning import CONDITIONING
from ..models.cost import Cost, estimate_cost
from ..models.unet import AdaGNUNet
from ..runs.layout import RunFolder, label_space, network_config
from ..runtime.distributed import process_state
from ..runtime.precision import tf32
from ..runtime.speed import choose
from ..sampling.load import open_pipeline
from ..sampling.pipeline import to_pixels
from ..training.export import sample_command
from ..training.train import STOPPED, resolve, train
from .ablation_report import write_report

RESULT = {
    *("kind", "seed", "parameters", "flops", "images_per_s", "train_loss", "heldout_loss", "device", "date"),
    *("wrong_gap", "null_gap", "wrong_gap_by_t", "null_gap_by_t"),
}
NAME = re.compile(r"(\w+)-seed(\d+)")
LOSS_BINS = 5  # of the timestep, evenly wide
EVALUATIONS = 4096


@dataclass(frozen=True)
class Member:
    """One kind under one seed, and where it lies."""

    kind: str
    seed: int
    run: RunFolder

    @property
    def name(self) -> str:
        return self.run.path.name

    @property
    def result(self) -> dict | None:
        """What was measured, once it is finished."""
        file = self.run.path / "result.json"
        if not file.is_file() or not (self.run.path / "samples.npy").is_file():
            return None
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            if (result["kind"], result["seed"]) != (self.kind, self.seed) or not result.keys() >= RESULT:
                raise ValueError("it is not this run's")
            if not all(math.isfinite(result[k]) for k in ("parameters", "flops", "train_loss", "heldout_loss")):
                raise ValueError("a loss is not a number")
            return result
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is damaged ({error}): remove it to measure {self.name} again.") from None

    @property
    def pictures(self) -> np.ndarray:
        """uint8 [classes, H, W, C]."""
        file = self.run.path / "samples.npy"
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is damaged ({error}): remove it to sample {self.name} again.") from None


def ablate(
    config: RunConfig,
    kinds: list[str],
    seeds: list[int],
    out: Path,
    dry_run: bool = False,
    typed: str = "",
    member: str = "",
) -> int:
    """Train and measure every kind under every seed, and write ablation.md, ablation.csv and ablation.png into `out`.

    config: the run that they share; its conditioning, seed, output_dir, previews and held-out losses are set here.
    typed: this command, and member: the `adagn train` of the run that they share, for what is printed; empty: not printed.
    Returns 0 when done, 75 when a signal came and everything was saved: the same command goes on.
    Raises InputError before anything is trained for whatever would fail later.
    """
    kinds, seeds = _unique(kinds), _unique(seeds)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        torchrun = f"torchrun --nproc_per_node {processes} -m diffusion_adagn {member.removeprefix('adagn ')}"
        settings = [
            {"model.conditioning": kind, "training.seed": seed, "output_dir": out / f"{kind}-seed{seed}"}
            for seed in seeds
            for kind in kinds
        ]
        raise InputError(
            with_commands(
                "adagn ablate runs in one process. Its members are ordinary runs, which several processes may train first; "
                "adagn ablate then goes on from there, measures and compares.",
                *([with_options(torchrun, **some) for some in settings] if member else []),
                *([typed] if typed else []),
            )
        )
    config, dataset, costs = _check(config, kinds)
    heldout = open_dataset(config.data, "heldout")
    members = [Member(kind, seed, RunFolder(out / f"{kind}-seed{seed}")) for seed in seeds for kind in kinds]
    _open_run_dir(out, config, dry_run)
    waiting = [m for m in members if m.result is None]
    print(
        f"{len(kinds)} kinds x {len(seeds)} seeds = {len(members)} runs of {config.training.max_steps} steps on {dataset.name} "
        f"({len(dataset):,} pictures, {len(heldout):,} held out); {len(members) - len(waiting)} finished, in {out}"
    )
    for kind, cost in costs.items():
        print(f"  {kind:16}{cost.parameters / 1e6:8.3f} M parameters {cost.flops / 1e9:9.4f} GFLOPs a picture")
    if dry_run:
        print("\n".join(f"  {'finished' if m.result else 'waiting ':8} {m.run.path}" for m in members))
        return 0

    with exclusive_lock(out):
        return _run(config, members, heldout, costs, out, dataset, typed)


def _run(
    config: RunConfig,
    members: list[Member],
    heldout: ImageDataset,
    costs: dict[str, Cost],
    out: Path,
    dataset: ImageDataset,
    typed: str,
) -> int:
    """`ablate`, once `out` is locked. What is waiting is asked again: another process may have finished some meanwhile."""
    waiting = [m for m in members if m.result is None]
    started = time.perf_counter()
    for done, member in enumerate(waiting):
        left = (time.perf_counter() - started) / done * (len(waiting) - done) if done else None
        about = "" if left is None else f", about {left / 60:.0f} min left" if left > 90 else ", about a minute left"
        print(f"[{len(members) - len(waiting) + done + 1}/{len(members)}] {member.kind}, seed {member.seed}{about}")
        if _train(member, config) == STOPPED:
            print(resume_hint(f"Stopped in {member.name}; saved.", typed))
            return STOPPED
        gc.collect()  # accelerate leaves a cycle round the network, which would stay on the device
        _measure(member, config, heldout, costs[member.kind])
        gc.collect()

    shown = _finished(out, members)
    files = write_report(out, config, dataset, heldout, [m.result for m in shown], {m.name: m.pictures for m in shown})
    print("\n" + files[0].read_text(encoding="utf-8"))
    print("\n".join(f"{what:9} {file}" for what, file in zip(("table", "as CSV", "pictures"), files)))
    print(with_commands("One of them, closer:", sample_command(str(members[0].run.path), label_space(config))))
    return 0


def _finished(out: Path, members: list[Member]) -> list[Member]:
    """These members, and those that earlier calls finished in the same folder; what cannot be read of the latter is left out, and said."""
    names, found = {m.name for m in members}, []
    for file in sorted(out.glob("*/config.yaml")):
        match = NAME.fullmatch(file.parent.name)
        if match is None or match[1] not in CONDITIONING or file.parent.name in names:
            continue
        member = Member(match[1], int(match[2]), RunFolder(file.parent))
        try:
            if member.result is None:
                print(f"left out: {member.name}, which is not finished (ask for it by --kinds and --seeds)")
            else:
                member.pictures  # noqa: B018 - whether they can be read
                found.append(member)
        except InputError as error:
            print(f"left out: {error}")
    return sorted(members + found, key=lambda m: (m.seed, list(CONDITIONING).index(m.kind)))


def member_config(config: RunConfig, member: Member) -> RunConfig:
    """The shared config with the member's kind and seed."""
    return dataclasses.replace(
        config,
        output_dir=str(member.run.path),
        model=dataclasses.replace(config.model, conditioning=member.kind),
        training=dataclasses.replace(config.training, seed=member.seed),
    )


# ---------------------------------------------------------------------- before the first step


def _unique(values: list) -> list:
    return list(dict.fromkeys(values))


def _check(config: RunConfig, kinds: list[str]) -> tuple[RunConfig, ImageDataset, dict[str, Cost]]:
    """The config with what the data decides, the training data, and what each kind's network costs."""
    unknown = [k for k in kinds if k not in CONDITIONING]
    if unknown or not kinds:
        raise InputError(f"there is no conditioning kind '{', '.join(unknown)}'. Kinds: {', '.join(CONDITIONING)}.")
    if config.training.max_steps is None:
        raise InputError("how long should each run train? Give training.max_steps, such as --training.max_steps 300.")
    if not config.model.class_conditional:
        raise InputError("an ablation compares ways to hear the class: set model.class_conditional to true.")
    quiet = dataclasses.replace(config.training, preview_every=0, heldout_every=0, seed=0)
    config = dataclasses.replace(config, output_dir=None, training=quiet)
    config, dataset = resolve(config)
    costs = {}
    for kind in kinds:
        network = network_config(config) | {"conditioning": kind}
        with torch.device("meta"):
            narrowest = min(site.channels for site in AdaGNUNet(**network).sites())
        if narrowest < 4 * config.model.norm_groups:
            raise InputError(
                f"model.norm_groups {config.model.norm_groups} leaves {narrowest // config.model.norm_groups} channel(s) a group in a layer "
                f"of {narrowest}; with one, GroupNorm is instance norm. To compare kinds give {narrowest // 4} groups or fewer."
            )
        costs[kind] = estimate_cost(network)
    speed = choose(
        config.speed, process_state(config.speed.device).device, max(cost.flops for cost in costs.values())
    )  # one for all kinds
    config = dataclasses.replace(config, speed=dataclasses.replace(config.speed, precision=speed.precision))
    return config, dataset, costs


def _open_run_dir(out: Path, config: RunConfig, dry_run: bool) -> None:
    """Make `out` this ablation's, or check that it is."""
    file = out / "ablation.yaml"
    if file.is_file():
        old = read_config(file)
        changed = differences(old, config)
        if old.training.max_steps != config.training.max_steps:
            changed.append(f"training.max_steps: {old.training.max_steps} -> {config.training.max_steps}")
        if changed:
            raise InputError(
                f"{out} holds an ablation with other settings: {'; '.join(changed)}. Put them back, or give another --output_dir."
            )
    elif out.exists() and (not out.is_dir() or not all(NAME.fullmatch(p.name) for p in out.iterdir())):
        raise InputError(f"{out} exists and is not an ablation (no ablation.yaml in it): give another --output_dir.")
    elif not dry_run:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(file, lambda tmp: tmp.write_text(to_yaml(config), encoding="utf-8"))


# ---------------------------------------------------------------------- a member


def _train(member: Member, config: RunConfig) -> int:
    """Train it, or go on with it; only the progress bar is shown."""
    with contextlib.redirect_stdout(io.StringIO()):
        return train(member_config(config, member), resume=True)


@tf32(False)
def _measure(member: Member, config: RunConfig, heldout: ImageDataset, cost: Cost) -> None:
    """samples.npy (uint8 [classes, H, W, C]) and then result.json, which says that the member is finished."""
    pipe, _ = open_pipeline(member.run.path)
    pipe.to(process_state(config.speed.device).device)
    pipe.set_progress_bar_config(disable=True)
    d, training, labels = config.diffusion, config.training, pipe.labels
    objective = DiffusionLoss(make_scheduler(d).alphas_cumprod, d.prediction, d.loss_weight, d.min_snr_gamma).to(
        pipe.device
    )
    batch = max(1, training.batch_size // training.gradient_accumulation)
    use = label_use(pipe.unet, heldout, objective, EVALUATIONS, batch, progress=True)
    edges = np.linspace(0, 1, LOSS_BINS + 1)
    bins = list(zip(edges[:-1].tolist(), edges[1:].tolist()))

    shown = list(range(labels.K))[:10]
    scale = training.preview_guidance if labels.has_null else 1.0
    images = pipe(shown, guidance_scale=scale, num_inference_steps=training.preview_steps, seeds=0, output_type="np")
    np.save(member.run.path / "samples.npy", to_pixels(images.images))

    lines = [json.loads(line) for line in member.run.metrics_file.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    speeds = [line["images_per_s"] for line in lines if "images_per_s" in line][1:]
    result = {
        "kind": member.kind,
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
    text = json.dumps(result, indent=1) + "\n"
    atomic_write(member.run.path / "result.json", lambda tmp: tmp.write_text(text, encoding="utf-8"))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else "an Apple GPU"
