"""DINOv2 through transformers: features of a network trained without classes.

Source: Oquab et al. 2023; as a measure of generated images, Stein et al. 2023.
"""

import torch
from torch import Tensor, nn

from ...commands import with_commands
from ...errors import InputError
from .base import ANTIALIASED, NetworkExtractor, resized, to_colour

RESOLUTION = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained


class Dinov2Extractor(NetworkExtractor):
    """DINOv2 on images of any size; gray images are repeated to RGB. pooled: the class token after the last norm."""

    name = "dinov2"
    resize = ANTIALIASED["bicubic"]

    def __init__(self, network: nn.Module, source: str, device: str | torch.device = "cpu"):
        """network: transformers' Dinov2Model. source: its folder or hub id, for the record."""
        super().__init__(
            network, network.config.hidden_size, RESOLUTION, device, {"version": 1, "mean": MEAN, "std": STD}
        )
        self.source = source

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = resized(to_colour(x).float(), self.resolution, "bicubic") / 255
        mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        return self.network(pixel_values=(x - mean) / std).pooler_output, None

    def to_dict(self) -> dict:
        return super().to_dict() | {"source": self.source}


def open_dinov2(source: str, device: str | torch.device = "cpu") -> Dinov2Extractor:
    """The extractor over a folder that transformers wrote, or a hub id such as facebook/dinov2-base."""
    if not source:
        raise InputError("which DINOv2? Type dinov2:FOLDER_OR_HUB_ID, for example dinov2:facebook/dinov2-base.")
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise InputError(
            with_commands(
                f"the extractor dinov2 needs transformers, which the extra eval brings ({error}):",
                "pip install 'diffusion-adagn[eval]'",
            )
        ) from None
    try:
        config = AutoConfig.from_pretrained(source)
        if not config.model_type.startswith("dinov2"):
            raise ValueError(f"{source} is a {config.model_type}, not a DINOv2: try dinov2:facebook/dinov2-base.")
        network = AutoModel.from_pretrained(source, config=config, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"no DINOv2 can be opened from {source}: {reason} Expected a folder with config.json and model.safetensors, or a hub id "
            "that can be reached."
        ) from None
    return Dinov2Extractor(network, source, device)
