"""adagn init"""

import sys
from collections.abc import Sequence

from .. import recipes
from ..commands import with_commands
from .options import Parser


def parser() -> Parser:
    p = Parser(
        prog="adagn init",
        usage="adagn init [RECIPE]",
        description="Print a recipe, to save and edit: adagn init own_images > my.yaml. Without a name: list recipes.",
    )
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="name of the recipe")
    return p


def run(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    if args.recipe is not None:
        sys.stdout.write(recipes.text(args.recipe))
        return 0
    names = recipes.names()
    width = 2 + max(map(len, names))
    print("\n".join(f"{name:{width}}{recipes.headline(name)}" for name in names))
    print(with_commands("\nTrain with a recipe:", "adagn train digits"))
    print(with_commands("Copy a recipe to edit it:", "adagn init own_images > my.yaml"))
    return 0
