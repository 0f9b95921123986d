"""The Inception network of the FID, with TensorFlow's weights of 2015, from torch-fidelity."""

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ...commands import with_commands
from ...errors import InputError
from .base import NetworkExtractor, to_colour

FEATURES = ["2048", "logits_unbiased"]
RESOLUTION = 299
WEIGHTS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SOURCE = f"The weights are at {WEIGHTS}; fetch them and type inception:PATH."


class InceptionExtractor(NetworkExtractor):
    """The Inception network on images of any size; gray images are repeated to RGB.

    2048 features, and probabilities over the 1008 classes of the Inception Score.
    """

    name = "inception"
    resize = "bilinear as in TensorFlow 1, without antialiasing"
    is_fid = True

    def __init__(self, network: torch.nn.Module, device: str | torch.device = "cpu"):
        super().__init__(network, 2048, RESOLUTION, device, {"version": 1, "features": FEATURES})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(to_colour(x))


def open_inception(weights: str | Path | None = None, device: str | torch.device = "cpu") -> InceptionExtractor:
    """Open the extractor with a .pth file of torch-fidelity; None: the weights that torch-fidelity downloads.

    Raises InputError if torch-fidelity or the weights are missing or invalid.
    """
    path = Path(weights).expanduser() if weights else None
    if path is not None and not path.is_file():
        raise InputError(f"the Inception weights {path} are not there. {SOURCE}")
    return InceptionExtractor(_network(_torch_fidelity(), path), device)


def _torch_fidelity() -> ModuleType:
    try:
        from torch_fidelity import feature_extractor_inceptionv3
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        raise InputError(
            with_commands(
                f"the extractor inception needs torch-fidelity, which cannot be imported ({error}). Its torchvision must be the one "
                "made for the installed torch. Install both:",
                "pip install 'diffusion-adagn[eval]'",
            )
        ) from None
    return feature_extractor_inceptionv3


def _network(module: ModuleType, path: Path | None) -> torch.nn.Module:
    arguments = {}
    try:
        if path is not None:
            torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would execute code in a pickle
            arguments["feature_extractor_weights_path"] = str(path)
        return module.FeatureExtractorInceptionV3("inception-v3-compat", FEATURES, **arguments)
    except Exception as error:  # no network, a full disk, a corrupted file, other weights
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        what = "the Inception weights cannot be had" if path is None else f"{path} does not hold the Inception weights"
        raise InputError(f"{what}: {reason} {SOURCE}") from None
