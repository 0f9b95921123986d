"""Print a recipe, to save and edit: adagn init own_images > my.yaml. Without a name: list recipes."""

import argparse
import sys

from .. import recipes
from ..commands import with_commands
from .options import Parser


def parser() -> Parser:
    p = Parser("init", __doc__)
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="name of the recipe")
    return p


def run(args: argparse.Namespace) -> int | None:
    if args.recipe is not None:
        sys.stdout.write(recipes.text(args.recipe))
        return 0
    names = recipes.names()
    width = 2 + max(map(len, names))
    print("\n".join(f"{name:{width}}{recipes.headline(name)}" for name in names))
    print(with_commands("\nTrain with a recipe:", "adagn train digits"))
    print(with_commands("Copy a recipe to edit it:", "adagn init own_images > my.yaml"))
    return 0
