"""adagn doctor"""

from collections.abc import Sequence

from .options import Parser, add_device_option


def parser() -> Parser:
    p = Parser(
        prog="adagn doctor",
        description="Look at this installation: versions, device, precision, the fused operator's self-check, memory, caches. Status 1 where "
        "something is wrong, with what to do.",
    )
    add_device_option(p)
    return p


def run(argv: Sequence[str]) -> int:
    args = parser().parse(argv)

    from ..runtime.doctor import examine

    wrong = examine(args.device)
    for problem in wrong:
        print(f"wrong     {problem}")
    if not wrong:
        print("all is well")
    return 1 if wrong else 0
