"""Convert a checkpoint of OpenAI's guided-diffusion (ADM) to a pipeline folder."""

import argparse
from pathlib import Path

from ..commands import with_commands
from ..errors import InputError
from ..interop.adm import import_adm, next_command
from ..interop.adm_flags import FLAGS, IGNORED, PRESETS, AdmFlags
from .options import Parser


def parser() -> Parser:
    p = Parser("import-adm", __doc__)
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="the file of a diffusion network: .pt or .safetensors")
    help = "the flags of a published checkpoint; flags below override them"
    p.add_argument("--preset", choices=list(PRESETS), help=help)
    p.add_out("the pipeline folder [models/NAME]")
    help = "a text file, one class per line [ImageNet's for 1000 classes, else ids]"
    p.add_argument("--class_names", metavar="FILE", help=help)
    p.add_options(AdmFlags, flags=False)
    for name in IGNORED:
        p.add_argument(f"--{name}", default=argparse.SUPPRESS, nargs="?", metavar="VALUE", help="accepted, ignored")
    return p


def run(args: argparse.Namespace) -> int | None:
    checkpoint = Path(args.checkpoint)
    if not checkpoint.is_file():
        raise InputError(f"there is no checkpoint {checkpoint}.")
    out = Path(args.out or Path("models") / checkpoint.stem)
    given = {name: value for name, value in vars(args).items() if name in FLAGS}
    folder = import_adm(checkpoint, out, preset=args.preset, class_names=args.class_names, **given)

    from ..sampling.pipeline import ClassConditionalPipeline

    pipe = ClassConditionalPipeline.from_pretrained(folder)
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    classes = f"{pipe.labels.K} classes" if pipe.labels.K else "no classes"
    print(f"{folder}: {parameters / 1e6:.1f} M parameters, {classes}")
    if pipe.labels.K:
        print("no null class: sample at guidance 1, or fine-tune with adagn train --init_from to get one")
    print(with_commands("Next:", next_command(folder, pipe.labels)))
