"""The networks that are measured, and the parsing of lists of names."""

from collections.abc import Iterable
from dataclasses import dataclass

from diffusion_adagn.errors import UsageError


@dataclass(frozen=True)
class Size:
    """One network's shapes, in ADM's terms, and its batch sizes.

    side: of the images, in pixels. batch: {"cpu" | "cuda": {"infer" | "train" | "sample": images}}.
    """

    name: str
    side: int
    channels: int
    mult: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    batch: dict[str, dict[str, int]]
    groups: int = 32
    head: int = 64
    classes: int = 10

    def network(self, resample: str = "residual", **changes) -> dict:
        """Arguments of AdaGNUNet. resample: between levels, "residual" (blocks, as in ADM) or "conv"; changes: other arguments."""
        return {
            "sample_size": self.side,
            "in_channels": 3,
            "num_classes": self.classes,
            "model_channels": self.channels,
            "channel_mult": self.mult,
            "num_res_blocks": self.blocks,
            "attention_resolutions": self.attention,
            "num_head_channels": self.head,
            "norm_groups": self.groups,
            "resblock_updown": resample == "residual",
        } | changes


def _batches(cpu: tuple[int, int, int], cuda: tuple[int, int, int]) -> dict[str, dict[str, int]]:
    return {
        device: dict(zip(("infer", "train", "sample"), counts)) for device, counts in (("cpu", cpu), ("cuda", cuda))
    }


SIZES = {
    size.name: size
    for size in (
        Size("XS", 8, 16, (1, 2), 1, (4,), _batches((2, 2, 2), (64, 64, 16)), groups=4, head=16),
        Size("S", 32, 64, (1, 2, 2), 2, (16,), _batches((32, 32, 16), (512, 256, 64))),
        Size("M", 32, 128, (1, 2, 2, 2), 3, (16, 8), _batches((32, 16, 8), (256, 128, 32))),
    )
}


def parse_choices(option: str, text: str, known: Iterable[str]) -> list[str]:
    """Names separated by commas, without duplicates, in order. Raises UsageError with the choices for an unknown one."""
    known = list(known)
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        fault = f"has no choice {unknown[0]!r}" if unknown else "is empty"
        raise UsageError(f"{option} {fault}: choose from {', '.join(known)}, separated by commas.")
    return names
