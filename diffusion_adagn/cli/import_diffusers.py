"""Convert a diffusers folder (an `adagn export`, or any with a UNet2DModel and one of our schedulers) to a pipeline folder.

Reads JSON and safetensors only; no code of the folder is run.
"""

import argparse
from pathlib import Path

from ..commands import with_commands
from .options import Parser


def parser() -> Parser:
    p = Parser("import-diffusers", __doc__)
    p.add_argument("folder", metavar="FOLDER", help="a folder with model_index.json, or owner/name on the hub")
    p.add_out("the folder to write [imported/NAME]")
    help = "the last row of the class table means 'no class', as in training with label dropout [as an export says, else no]"
    p.add_argument("--null_class", action="store_true", default=None, help=help)
    help = "a text file, one class name per line [those of the folder, else ids]"
    p.add_argument("--class_names", metavar="FILE", help=help)
    p.add_argument("--overwrite", action="store_true", help="replace an earlier import in DIR")
    return p


def run(args: argparse.Namespace) -> int | None:
    names = None
    if args.class_names:
        from ..data.classes import class_lines

        names = [line for _, line in class_lines(args.class_names, "--class_names")]

    from ..runs.layout import check_model_path

    check_model_path(args.folder)
    from ..interop.export import changed_settings, import_diffusers
    from ..sampling.pipeline import ClassConditionalPipeline
    from ..training.export import sample_command

    out = Path(args.out or Path("imported") / Path(args.folder).resolve().name)
    import_diffusers(args.folder, out, args.null_class, names, args.overwrite)
    pipe = ClassConditionalPipeline.from_pretrained(out)
    changes = changed_settings(args.folder, pipe)
    if changes:
        print(f"sampler settings changed to this package's: {'; '.join(changes)}")
    print(with_commands(f"{out}\n{pipe.labels.K or 'no'} classes. Next:", sample_command(str(out), pipe.labels)))
