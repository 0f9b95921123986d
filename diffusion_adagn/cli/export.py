"""Write a model as a folder that other software loads: adagn export RUN --to diffusers DIR."""

import argparse

from ..commands import with_commands
from ..errors import UsageError
from ..runs.weights import parse_ema
from ..sampling.settings import EMA_HELP
from .options import Parser


def parser() -> Parser:
    p = Parser("export", __doc__)
    p.add_model()
    p.add_argument("--ema", default="run", metavar="LENGTH|raw|run", help=f"{EMA_HELP} [run]")
    help = "diffusers: UNet2DModel, scheduler and pipeline [diffusers]"
    p.add_argument("--to", choices=["diffusers"], default="diffusers", help=help)
    p.add_argument("dir", metavar="DIR", help="the folder to write")
    p.add_argument(
        "--scale", type=float, metavar="NUMBER",
        help="the guidance scale to fix, of a network that reads it (model.max_guidance_scale); guided in one pass",
    )  # fmt: skip
    p.add_argument("--overwrite", action="store_true", help="replace an earlier export in DIR")
    return p


def run(args: argparse.Namespace) -> int | None:
    try:
        ema = parse_ema(args.ema)
    except ValueError as error:
        raise UsageError(f"--ema: {error}.") from None

    from ..runs.layout import check_model_path

    check_model_path(args.run)
    from ..interop.export import export_diffusers, sampler_note, stock_sample_command

    out = export_diffusers(args.run, args.dir, ema, args.overwrite, args.scale)
    note = sampler_note(out)
    text = f"{out}\n" + f"{note}\n" * bool(note)
    text += "A stock diffusers pipeline: unet/ (UNet2DModel), scheduler/ and adagn_label_pipeline.py, which\n"
    text += "trust_remote_code=True runs. This package is not needed to sample it:"
    print(with_commands(text, stock_sample_command(out)))
