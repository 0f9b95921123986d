"""The extractors that are trained on the user's labelled images, and cached: a small residual network, and scikit-learn's.

Their class probabilities measure class accuracy. Their features measure the differences between the user's images. A trained
network for CIFAR-10 comes with the package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...atomic import atomic_write, cache_root, one_at_a_time
from ...errors import InputError
from ...runtime.precision import use_precision
from ..features import Extractor, FeatureSet
from .base import ANTIALIASED, NetworkExtractor, check_pixels, described, resized, to_planes, weights_hash

if TYPE_CHECKING:
    from ...data import ImageDataset

    E = TypeVar("E", bound="Classifier | SklearnExtractor")

SHIPPED = Path(__file__).parents[2] / "pretrained" / "judges"  # for CIFAR-10; CONTRIBUTING.md says how it was made
RECIPE_VERSION = 3  # of everything that determines the weights: increase it with any change below
SEED = 0
MAX_SIDE = 64  # pixels; larger images are resized
HELD_OUT, MAX_HELD_OUT = 0.05, 2000
MIN_PASSES, MAX_PASSES, EPOCHS, MAX_EPOCHS = 16_000, 500_000, 10, 40
MIN_MIRRORED = 17  # pixels: smaller images, and gray ones, may be digits or letters
TEST_BATCH = 250  # images

MAX_FLAT_SIDE = 16  # pixels
HIDDEN = 64
FLAT_RECIPE_VERSION = 1  # of everything that determines scikit-learn's weights


# ---------------------------------------------------------------------- shipped, or trained once and read from the cache


def cached_or_trained(
    dataset: ImageDataset,
    recipe: tuple[str, int],
    build: Callable[[Mapping[str, np.ndarray], dict], E],
    train: Callable[[], E],
    announced: bool = False,
) -> E:
    """The extractor of these images: shipped with the package, read from the cache, or trained and saved in it.

    A shipped one comes first, so that its numbers are the same on all machines. The cache is next to the decoded images, in
    DIFFUSION_ADAGN_CACHE or ~/.cache/diffusion_adagn. The same images in another place have the same folder.

    Args:
        dataset: The labelled images.
        recipe: The kind of extractor, and the version of its training.
        build: Takes its weights and facts; ValueError, KeyError, TypeError or RuntimeError if they are corrupted.
        train: Called by one process at a time.
        announced: Whether a process that waits, or has trained, says so.

    Raises:
        InputError: The shipped one is corrupted, or the trained one cannot be saved.
    """
    key_parts = [dataset.fingerprint, dataset.label_space.names, dataset.image_size, dataset.channels, *recipe]
    key = hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()[:16]
    folder = cache_root() / "judges" / key
    if (shipped := SHIPPED / key).is_dir():
        if (extractor := _read(shipped, build)) is None:
            raise InputError(f"the classifier in {shipped} is corrupted: install diffusion-adagn again.")
        return extractor
    if (cached := _read(folder, build)) is not None:
        return cached
    with one_at_a_time(folder, f"it trains the classifier of {dataset.name}" if announced else ""):
        if (cached := _read(folder, build)) is not None:  # by the process that held the lock
            return cached
        extractor = train()
        _save(folder, extractor)
    if announced:
        facts = extractor.facts
        right = (
            f"{facts['heldout_accuracy']:.1%} of {facts['heldout_images']:,} held-out images are classified correctly"
        )
        print(f"The classifier of {dataset.name} is trained ({right}) and cached in {folder}.")
    return extractor


def _save(folder: Path, extractor: Classifier | SklearnExtractor) -> None:
    """Write the weights, then the facts, which contain their hash. If two processes finish at once, the last one wins."""
    from safetensors.numpy import save_file

    facts = json.dumps(extractor.facts | {"hash": extractor.hash}, indent=2) + "\n"
    try:
        atomic_write(folder / "weights.safetensors", lambda tmp: save_file(extractor.weights, tmp))
        atomic_write(folder / "judge.json", lambda tmp: tmp.write_text(facts, encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the classifier cannot be saved in {folder}: {error}. Set DIFFUSION_ADAGN_CACHE.") from None


def _read(folder: Path, build: Callable[[Mapping[str, np.ndarray], dict], E]) -> E | None:
    """The extractor of `folder`; None if it is missing or corrupted."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        facts = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
        extractor = build(load_file(folder / "weights.safetensors"), facts)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
        return None
    return extractor if facts.get("hash") in (None, extractor.hash) else None


def _split(dataset: ImageDataset, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The indices of images to learn from, and of held-out ones. Raises InputError if fewer than two classes have images."""
    from ...data.store import split_off

    learned, heldout = split_off(dataset.labels, fraction, SEED)
    classes = len(np.unique(dataset.labels[learned]))
    if classes < 2 or not len(heldout):
        raise InputError(
            f"{dataset.name} has {len(dataset)} images, of {classes} class(es) to learn from: too few. Expected images of two or more "
            "to learn from and to be tested on. Use an extractor that needs no labels: efficientnet:PATH.safetensors, inception or "
            "dinov2:FOLDER."
        )
    return learned, heldout


def _accuracy(extractor: Extractor, dataset: ImageDataset, rows: np.ndarray) -> float:
    """The fraction of these images whose most probable class is theirs."""
    correct = 0
    for batch in np.array_split(rows, -(-len(rows) // TEST_BATCH)):
        pixels, labels = dataset.gather(batch)
        correct += int((extractor(pixels).probabilities.argmax(1) == labels).sum())
    return correct / len(rows)


# ---------------------------------------------------------------------- a residual network


class Residual(nn.Module):
    """relu(skip(x) + norm(conv(relu(norm(conv(x)))))), halved in size if stride is 2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        nn.init.zeros_(self.norm2.weight)
        self.stride = stride
        changed = stride != 1 or in_channels != out_channels
        self.skip = nn.Conv2d(in_channels, out_channels, stride, stride, bias=False) if changed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        odd = [-side % self.stride for side in x.shape[2:]]  # the convolutions of both paths round up
        return F.relu(self.skip(F.pad(x, (0, odd[1], 0, odd[0]))) + self.norm2(self.conv2(h)))


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

    @classmethod
    def of(cls, weights: Mapping[str, np.ndarray], facts: dict, device: str | torch.device = "cpu") -> Classifier:
        """The extractor with these weights. Raises KeyError, TypeError or RuntimeError if they do not fit the facts."""
        network = ClassifierNetwork(facts["resolution"], facts["channels"], len(facts["class_names"]))
        network.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        return cls(network, facts, device)

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """By name, as they are saved."""
        return {name: w.detach().cpu().contiguous().numpy() for name, w in self.network.state_dict().items()}

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
    """The classifier of these images, trained at first use if it is not shipped. progress: show a bar, and print where it is cached."""
    return cached_or_trained(
        dataset,
        ("judge", RECIPE_VERSION),
        build=lambda weights, facts: Classifier.of(weights, facts, device),
        train=lambda: train_classifier(dataset, device, progress),
        announced=progress,
    )


def train_classifier(dataset: ImageDataset, device: str | torch.device = "cpu", progress: bool = False) -> Classifier:
    """Train a classifier. For 50,000 images of 32 pixels this takes about 40 minutes of one CPU core.

    Training takes 10 epochs, but at least 16,000 and at most 500,000 images, and at most 40 epochs. Images are shifted by up
    to an eighth of their size. Colour images of more than 16 pixels are mirrored at random; others are not, since a
    mirrored digit is another shape. The result is deterministic on one machine's CPU. The caller's random state does not change.

    Args:
        dataset: The labelled images.
        device: The device that trains.
        progress: Show a progress bar.

    Raises:
        InputError: Fewer than two classes have images.
    """
    device = torch.device(device)
    learned, heldout = _split(dataset, min(HELD_OUT, MAX_HELD_OUT / len(dataset)))
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
    }
    classifier = Classifier(network, facts, device)
    facts["heldout_accuracy"] = _accuracy(classifier, dataset, heldout)
    return classifier


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


# ---------------------------------------------------------------------- scikit-learn's network


class SklearnExtractor:
    """One hidden layer on pixels / 255, for small images. Its 64 activations are the features.

    The probabilities are over the data's classes, and 0 for a class without images.
    """

    name = "sklearn"
    resize = "none"
    is_fid = False

    def __init__(self, weights: dict[str, np.ndarray], facts: dict):
        """weights: float32 w0 [H*W*C, 64], b0 [64], w1 [64, K'] ([64, 1] for two classes), b1.

        facts: JSON values: shape (H, W, C of an image), classes (ids of the K' trained ones, ascending), class_names,
        and others for the record.
        """
        if set(weights) != {"w0", "b0", "w1", "b1"}:
            raise ValueError(f"no weights of the extractor sklearn: {', '.join(weights)}")
        self.weights, self.facts = weights, facts
        self.class_names = tuple(facts["class_names"])
        self.dimension = HIDDEN
        self.resolution = facts["shape"][0]
        settings = {key: facts[key] for key in ("shape", "classes", "class_names")}
        self.hash = weights_hash(weights, {"name": self.name, "version": FLAT_RECIPE_VERSION, **settings})

    def __call__(self, pixels: np.ndarray) -> FeatureSet:
        shape = list(check_pixels(pixels).shape[1:])
        if shape != self.facts["shape"]:
            raise InputError(
                f"the extractor sklearn was trained on images {self.facts['shape']} [H, W, C], not {shape}."
            )
        x = pixels.reshape(len(pixels), -1).astype(np.float32) / 255
        pooled = np.maximum(x @ self.weights["w0"] + self.weights["b0"], 0)
        logits = pooled @ self.weights["w1"] + self.weights["b1"]
        if logits.shape[1] == 1:  # two classes: one logit, for the second
            logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = np.zeros((len(pixels), len(self.class_names)), np.float32)
        probabilities[:, self.facts["classes"]] = odds / odds.sum(axis=1, keepdims=True)
        return FeatureSet(pooled, probabilities)

    def to_dict(self) -> dict:
        return described(self) | self.facts


def open_sklearn(dataset: ImageDataset) -> SklearnExtractor:
    """The extractor of these images: trained in seconds at first use, and cached.

    Raises InputError for large images.
    """
    if dataset.image_size > MAX_FLAT_SIDE:
        raise InputError(
            f"the extractor sklearn is for images of at most {MAX_FLAT_SIDE} pixels, and those of {dataset.name} have "
            f"{dataset.image_size}: type classifier."
        )
    recipe = ("sklearn", FLAT_RECIPE_VERSION)
    return cached_or_trained(dataset, recipe, SklearnExtractor, lambda: train_sklearn(dataset))


def train_sklearn(dataset: ImageDataset) -> SklearnExtractor:
    """Train the extractor; 5 % of the images are held out for the accuracy."""
    learned, heldout = _split(dataset, HELD_OUT)
    pixels, labels = dataset.gather(learned)
    facts = {
        "shape": list(pixels.shape[1:]),
        "classes": np.unique(labels).tolist(),
        "class_names": list(dataset.label_space.names),
        "data": dataset.name,
        "fingerprint": dataset.fingerprint,
        "trained_pictures": len(learned),
        "heldout_images": len(heldout),
    }
    extractor = SklearnExtractor(_fit(pixels, labels), facts)
    facts["heldout_accuracy"] = _accuracy(extractor, dataset, heldout)
    return extractor


def _fit(pixels: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    network = MLPClassifier((HIDDEN,), random_state=0, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(pixels.reshape(len(pixels), -1).astype(np.float32) / 255, labels)
    (w0, w1), (b0, b1) = network.coefs_, network.intercepts_
    return {name: np.asarray(w, np.float32) for name, w in {"w0": w0, "b0": b0, "w1": w1, "b1": b1}.items()}
