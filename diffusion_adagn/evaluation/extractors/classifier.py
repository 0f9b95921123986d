"""The classifier: a small residual network that is trained on the user's classes, and cached.

Its class probabilities measure class accuracy. Its features measure the differences between the user's images.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...atomic import one_at_a_time
from ...errors import InputError
from ...runtime.precision import use_precision
from . import cache
from .base import ANTIALIASED, NetworkExtractor, resized, to_planes

if TYPE_CHECKING:
    from ...data import ImageDataset

RECIPE_VERSION = 3  # of everything that determines the weights: increase it with any change below
SEED = 0
MAX_SIDE = 64  # pixels; larger images are resized
HELD_OUT, MAX_HELD_OUT = 0.05, 2000
MIN_PASSES, MAX_PASSES, EPOCHS, MAX_EPOCHS = 16_000, 500_000, 10, 40
MIN_MIRRORED = 17  # pixels: smaller images, and gray ones, may be digits or letters


class Residual(nn.Module):
    """relu(skip(x) + norm(conv(relu(norm(conv(x)))))), halved in size if stride is 2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        nn.init.zeros_(self.norm2.weight)
        changed = stride != 1 or in_channels != out_channels
        self.skip = nn.Conv2d(in_channels, out_channels, stride, stride, bias=False) if changed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.skip(x) + self.norm2(self.conv2(h)))


class ClassifierNetwork(nn.Module):
    """A convolution and two or three residual blocks, then the mean over the image and a linear layer.

    Features: 64 for images of at most 16 pixels, 128 above. Above 32 pixels the first convolution halves the size.
    """

    def __init__(self, resolution: int, channels: int, classes: int):
        super().__init__()
        widths = (32, 64) if resolution <= 16 else (32, 64, 128, 128)
        self.dimension = widths[-1]
        self.stem = nn.Conv2d(channels, 32, 3, 2 if resolution > 32 else 1, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        first = [Residual(32, 32, 1)] if resolution <= 16 else []
        self.blocks = nn.Sequential(*first, *(Residual(a, b, 2) for a, b in pairwise(widths)))
        self.head = nn.Linear(self.dimension, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float [N, C, H, W] of 0..255 -> (features [N, D] before the classifier, logits [N, K])."""
        x = (x / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        pooled = self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3))
        return pooled, self.head(pooled)


class Classifier(NetworkExtractor):
    """The extractor over a classifier. Its probabilities are over the data's classes.

    Images need the number of channels of the training images.
    """

    name = "judge"
    resize = ANTIALIASED["bilinear"]

    def __init__(self, network: ClassifierNetwork, facts: dict, device: str | torch.device = "cpu"):
        """facts: JSON values of `train_classifier`: resolution, class_names and the report of its training."""
        super().__init__(network, network.dimension, facts["resolution"], device, {"version": RECIPE_VERSION})
        self.class_names = tuple(facts["class_names"])
        self.facts = facts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.network.stem.in_channels
        if x.shape[1] != channels:
            raise InputError(
                f"the classifier was trained on images with {channels} channels and was given {x.shape[1]}."
            )
        return self.network(resized(x.float(), self.resolution, "bilinear"))

    def to_dict(self) -> dict:
        return super().to_dict() | self.facts


def open_classifier(dataset: ImageDataset, device: str | torch.device = "cpu", progress: bool = True) -> Classifier:
    """The classifier of these images, trained at first use. progress: show a bar, and print where it is cached."""
    folder = cache.folder_for(dataset, "judge", RECIPE_VERSION)
    cached = _opened(folder, device)
    if cached is not None:
        return cached
    with one_at_a_time(folder, f"it trains the classifier of {dataset.name}" if progress else ""):
        cached = _opened(folder, device)  # by the process that held the lock
        if cached is not None:
            return cached
        network, facts = train_classifier(dataset, device, progress)
        classifier = Classifier(network, facts, device)
        weights = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in network.state_dict().items()}
        cache.save(folder, weights, facts | {"hash": classifier.hash})
    if progress:
        seen = (
            f"{facts['heldout_accuracy']:.1%} of {facts['heldout_images']:,} held-out images are classified correctly"
        )
        print(f"The classifier of {dataset.name} is trained ({seen}) and cached in {folder}.")
    return classifier


def _opened(folder: Path, device: str | torch.device) -> Classifier | None:
    """The classifier cached in `folder`; None if it is missing or corrupted."""
    cached = cache.read(folder)
    if cached is None:
        return None
    weights, facts = cached
    try:
        network = ClassifierNetwork(facts["resolution"], facts["channels"], len(facts["class_names"]))
        network.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        classifier = Classifier(network, facts, device)
    except (KeyError, TypeError, RuntimeError):
        return None
    return classifier if classifier.hash == facts.get("hash") else None


def train_classifier(
    dataset: ImageDataset, device: str | torch.device = "cpu", progress: bool = False
) -> tuple[ClassifierNetwork, dict]:
    """Train a classifier. For 50,000 images of 32 pixels this takes up to 40 minutes on a CPU core, and a minute on a GPU.

    Training takes 10 epochs, but at least 16,000 and at most 500,000 images, and at most 40 epochs. Images are shifted by up
    to an eighth of their size. Colour images of more than 16 pixels are mirrored at random; others are not, since a
    mirrored digit is another shape. The result is deterministic on one machine's CPU. The caller's random state does not change.

    Args:
        dataset: The labelled images.
        device: The device that trains.
        progress: Show a progress bar.

    Returns:
        The network and its facts, JSON values.

    Raises:
        InputError: Fewer than two classes have images.
    """
    from ...data.store import split_off

    device, n = torch.device(device), len(dataset)
    learned, heldout = split_off(dataset.labels, min(HELD_OUT, MAX_HELD_OUT / n), SEED)
    classes = len(np.unique(dataset.labels[learned]))
    if classes < 2 or not len(heldout):
        raise InputError(
            f"{dataset.name} has {n} images, of {classes} class(es) to learn from: too few. Expected images of two or more to learn from "
            "and to be tested on. Use an extractor that needs no labels: efficientnet:PATH.safetensors, inception or dinov2:FOLDER."
        )
    if progress:
        print(f"Training a classifier on {dataset.name}: once, since the result is cached.")
    resolution = min(dataset.image_size, MAX_SIDE)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(SEED)
        network = ClassifierNetwork(resolution, dataset.channels, dataset.label_space.K)
    network.to(device, memory_format=torch.channels_last)
    with use_precision("fp32", device):
        passes = _train(network, dataset, learned, resolution, device, progress)
    facts = {
        "resolution": resolution,
        "channels": dataset.channels,
        "class_names": list(dataset.label_space.names),
        "data": dataset.name,
        "fingerprint": dataset.fingerprint,
        "trained_pictures": len(learned),
        "passes": passes,
        "heldout_images": len(heldout),
        "heldout_accuracy": _accuracy(network, dataset, heldout, resolution, device),
    }
    return network, facts


# ---------------------------------------------------------------------- training


def _train(
    network: ClassifierNetwork,
    dataset: ImageDataset,
    learned: np.ndarray,
    resolution: int,
    device: torch.device,
    progress: bool,
) -> int:
    """Train on the images with indices `learned`; returns the number of images seen."""
    n = len(learned)
    size = min(64 if resolution <= 16 else 128, n)
    passes = min(MAX_EPOCHS * n, max(MIN_PASSES, min(MAX_PASSES, EPOCHS * n)))
    steps = max(1, passes // size)
    mirrored = dataset.channels == 3 and resolution >= MIN_MIRRORED
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps + 1, pct_start=0.25)
    generator = torch.Generator().manual_seed(SEED)
    network.train()
    with tqdm(total=steps, desc="training the classifier", unit="step", disable=not progress, leave=False) as bar:
        for rows in _batches(n, size, steps, generator):
            pixels, labels = dataset.gather(learned[rows])
            x = _shifted(resized(to_planes(pixels).to(device).float(), resolution, "bilinear"), generator)
            if mirrored:
                x = _mirrored(x, generator)
            _, logits = network(x)
            loss = F.cross_entropy(logits, torch.from_numpy(labels).to(device), label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate.step()
            if bar.n % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    network.eval()
    return steps * size


def _batches(n: int, size: int, steps: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    """`steps` batches of `size` indices 0..n-1, from consecutive random permutations."""
    waiting = np.empty(0, np.int64)
    for _ in range(steps):
        while len(waiting) < size:
            waiting = np.concatenate([waiting, torch.randperm(n, generator=generator).numpy()])
        yield waiting[:size]
        waiting = waiting[size:]


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, C, S, S], each shifted by up to S / 8 pixels along both axes; the edge is repeated."""
    n, _, side, _ = x.shape
    max_shift = max(1, side // 8)
    move = torch.randint(-max_shift, max_shift + 1, (2, n, 1), generator=generator)
    row, column = (torch.arange(side) + move).clamp(0, side - 1).to(x.device)
    image = torch.arange(n, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[image, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)


def _mirrored(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, C, S, S], each mirrored or not."""
    chosen = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
    return x.flip(3).where(chosen[:, None, None, None], x)


@torch.inference_mode()
def _accuracy(
    network: ClassifierNetwork, dataset: ImageDataset, rows: np.ndarray, resolution: int, device: torch.device
) -> float:
    correct = 0
    for batch in np.array_split(rows, -(-len(rows) // 250)):
        pixels, labels = dataset.gather(batch)
        _, logits = network(resized(to_planes(pixels).to(device).float(), resolution, "bilinear"))
        correct += int((logits.argmax(1).cpu().numpy() == labels).sum())
    return correct / len(rows)
