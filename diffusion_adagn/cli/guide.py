"""Train a small guide for a run: one size down, an eighth of the steps, the same data and process; print how to use it.

Guidance then moves away from this weaker network in place of the null label (autoguidance). The same command resumes it.
"""

import argparse
from pathlib import Path

from ..commands import command, with_commands
from ..config import read_config
from ..errors import InputError
from .options import Parser, config_overrides


def parser() -> Parser:
    p = Parser("guide", __doc__, "RUN [--output_dir DIR] [--dry_run] [--section.key VALUE ...]")
    p.add_model()
    p.add_argument("--dry_run", action="store_true", help="print the cost of the guide, and stop")
    p.add_config_sections("output_dir", "data", "model", "diffusion", "training", "speed")
    return p


def run(args: argparse.Namespace) -> int:
    from ..runs.layout import RunFolder, check_model_path
    from ..runs.recorded import recorded_config, run_of
    from ..runs.shipped import shipped_folder

    check_model_path(args.run)
    recorded = recorded_config(args.run)
    if recorded is None:
        raise InputError(
            f"{args.run} is not a run, so that the data and the process of a guide are not known: name a run folder."
        )
    overrides, path = config_overrides(args), Path(args.run)
    name = f"runs/{args.run}-guide" if shipped_folder(args.run) else f"{_shown(run_of(path))}-guide"
    folder = Path(overrides.get("output_dir") or name)

    from ..experiments.guide import guide_config

    file = RunFolder(folder).config_file
    resumed = file.is_file()
    config = guide_config(recorded, folder, overrides)
    if resumed:
        planned, config = config, read_config(file, overrides)
        if (config.model, config.diffusion, config.data) != (planned.model, planned.diffusion, planned.data):
            text = f"{folder} is there already, and is not this guide: its data, process or network differ"
            raise InputError(f"{text}. Repeat its command, or write elsewhere by --output_dir.")
    if args.dry_run:
        from ..training.dry_run import dry_run

        dry_run(config, is_guide=True)
        print(f"Without --dry_run the guide is trained into {folder}.")
        return 0
    from ..training.train import train

    print(f"guide for {args.run}: {config.model.model_channels} channels in place of {recorded.model.model_channels}, "
          f"{config.training.max_steps:,} steps in place of {recorded.training.max_steps:,}")  # fmt: skip
    status = train(config, resume=resumed)
    if status == 0:
        text = "\nGuide the run with it, and find its best scale, checkpoint and EMA length:"
        sample = command("sample", args.run, guide=folder, guidance=2)
        sweep = command("sweep", args.run, guidance="1:3:0.5", guide=f"none,{folder}@*", guide_ema="0.05,0.1,run")
        print(with_commands(text, sample, sweep))
    return status


def _shown(path: Path) -> Path:
    """The path relative to the working directory where it is in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
