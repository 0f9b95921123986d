"""How much a network uses its label: its loss on held-out images with the true class, a wrong one, or null.

The output of an untrained network already depends on the label. The label is used only if the loss is lower with the
true one.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..data import ImageDataset
from ..data.rng import uniform
from ..diffusion.loss import DiffusionLoss
from ..models.unet import AdaGNUNet
from .heldout import HeldOut

GOLDEN = (math.sqrt(5) - 1) / 2
VERDICTS = {
    "used": "The label is used",
    "misleads": "The label MISLEADS",
    "unused": "The label is NOT measurably used",
}
UNUSED, OPEN = 3, 4  # exit statuses: not measurably used; cannot be decided


def gap_verdict(mean: float, half: float) -> Literal["used", "misleads", "unused", "open"]:
    """Verdict on the loss gap of a wrong label, with the 95% interval mean +- half.

    "used" if the interval is above 0, "misleads" if it is below 0, "unused" if it contains 0, "open" for nan.
    """
    if not (math.isfinite(mean) and math.isfinite(half)):
        return "open"
    return "used" if mean - half > 0 else "misleads" if mean + half < 0 else "unused"


@dataclass(frozen=True)
class LabelUse:
    """Unweighted losses of the same x_t under each label, float64 [N].

    Args:
        quantile: [N], the fraction of the training noise below; t / T for uniform timesteps.
        image: [N], indices of the held-out images.
        true: The loss with the image's class.
        wrong: The loss with the class of another image, nan if that is the same class; None if it is the same for all.
        null: The loss with the null label; None for a network without one.
    """

    quantile: Tensor
    image: Tensor
    true: Tensor
    wrong: Tensor | None
    null: Tensor | None

    def gap(self, against: Literal["wrong", "null"], low: float = 0.0, high: float = 1.0) -> tuple[float, float] | None:
        """Mean of loss(against) - loss(true) over low <= quantile < high, and the half-width of its 95% interval.

        The difference is paired: same image, noise level and noise. The interval is over images, and repeated
        measurements of one image are one cluster. The result is None without such a label. The half-width is nan for
        fewer than two images. Only the gap to a *wrong* label shows that the label is used, since the null embedding
        may be trained less.
        """
        other = getattr(self, against)
        if other is None:
            return None
        inside = (self.quantile >= low) & (self.quantile < high) & ~other.isnan()
        images, place = self.image[inside].unique(return_inverse=True)
        if not len(images):
            return math.nan, math.nan
        difference, groups = (other - self.true)[inside], len(images)
        mean = difference.mean()
        sums = torch.zeros(groups, dtype=torch.float64).index_add_(0, place, difference - mean)
        variance = sums.square().sum() / len(difference) ** 2 * groups / max(groups - 1, 1)
        return mean.item(), 1.96 * variance.sqrt().item() if groups > 1 else math.nan

    def losses(self, against: Literal["wrong", "null"]) -> tuple[float, float, int]:
        """(mean loss with the true label, mean loss with the other, number of images), where both were measured."""
        other = getattr(self, against)
        both = ~other.isnan()
        return self.true[both].mean().item(), other[both].mean().item(), len(self.image[both].unique())


@torch.no_grad()
def label_use(
    unet: AdaGNUNet,
    dataset: ImageDataset,
    objective: DiffusionLoss,
    evaluations: int = 2048,
    batch_size: int = 128,
    autocast: Callable = nullcontext,
    progress: bool = False,
    max_rows: int | None = None,
) -> LabelUse:
    """Measure the losses under each label on held-out images.

    Each evaluation has an image, a noise level and a noise, and is repeated for the true, the wrong and the null label.
    The draws depend on the data set only, so they are the same for all networks: noise and wrong labels have seed 0.
    In each round over the images the noise levels are evenly spread over the training noise, and each round pairs them
    differently with the images.

    Args:
        unet: The network.
        dataset: Held-out images. At most `evaluations` of them are used, evenly spread.
        objective: The loss.
        evaluations: The approximate number of evaluations.
        batch_size: Evaluations per batch, each with up to three rows.
        autocast: Creates the context of the network's calls.
        progress: Show a progress bar.
        max_rows: Rows per call of the network, to limit memory; None: three times batch_size.
    """
    device, n, k = unet.device, min(len(dataset), evaluations), unet.config.num_classes
    rounds = max(1, round(evaluations / n))
    positions = torch.arange(n * rounds)
    image = positions % n * len(dataset) // n
    spread = (positions % n / n + positions // n * GOLDEN) % 1
    level, quantile = objective.process.draw(spread, cell=1 / n)
    true = torch.from_numpy(dataset.labels[image.numpy()])
    labels_by_kind = {"true": true}
    wrong = torch.cat([other_labels(true[:n], r) for r in range(rounds)])
    if (wrong != true).any():
        labels_by_kind["wrong"] = wrong
    if unet.config.null_class:
        labels_by_kind["null"] = torch.full_like(true, k)
    losses: dict[str, list[Tensor]] = {label: [] for label in labels_by_kind}
    if max_rows is not None:
        batch_size = min(batch_size, max(1, max_rows // len(labels_by_kind)))
    for batch in HeldOut(dataset, image, level).batches(batch_size, device, "label use" if progress else None):
        labels = torch.cat([ids[batch.places] for ids in labels_by_kind.values()]).to(device)
        times = batch.level.time.repeat(len(labels_by_kind))
        rows = batch.noisy(objective.process).repeat(len(labels_by_kind), 1, 1, 1), times, labels
        calls = zip(*(tensor.split(max_rows or len(labels)) for tensor in rows))
        with autocast():
            output = torch.cat([unet(*call).sample for call in calls])
        for label, output_rows in zip(labels_by_kind, output.chunk(len(labels_by_kind))):
            losses[label].append(objective.mse(output_rows, batch.x0, batch.noise, batch.level).cpu().double())
    joined = {label: torch.cat(parts) for label, parts in losses.items()}
    if "wrong" in joined:
        joined["wrong"][wrong == true] = math.nan
    return LabelUse(quantile, image, *(joined.get(label) for label in ("true", "wrong", "null")))


def other_labels(labels: Tensor, round: int) -> Tensor:
    """A permutation of the labels [n] that gives as few images as possible a label of their own class.

    Every label is used as often as it is true. So uneven classes do not bias the mean: if a label is unrelated to its
    image but better trained than another, the loss falls for one image and rises for another by the same amount.
    """
    n = len(labels)
    order = torch.argsort(uniform(0, "wrong_label", torch.arange(n) + round * n))
    permuted = labels[order]
    same = (permuted == labels).nonzero().flatten()
    if len(same):
        # sort by class and shift by the size of the largest: the classes then differ, unless one has over half of them
        by_class = same[torch.argsort(labels[same], stable=True)]
        largest = int(torch.bincount(labels[same]).max())
        permuted[by_class] = permuted[by_class].roll(largest)
    return permuted


# ---------------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Verdict:
    """Whether the label is used.

    Args:
        used: None where it cannot be decided.
        sentence: The verdict in one line.
        use: The losses behind it; None without held-out images.
    """

    used: bool | None
    sentence: str
    use: LabelUse | None = None


def verdict_from_losses(use: LabelUse) -> Verdict:
    """The label is used if the 95% interval of loss(wrong label) - loss(true label), paired by image, is above 0.

    If the interval is below 0, the label misleads.
    """
    if use.wrong is None:
        return Verdict(
            None,
            "Whether the label is used cannot be decided: all held-out images are of one class, so there is no wrong "
            "label.",
            use,
        )
    mean, half = use.gap("wrong")
    true, _, images = use.losses("wrong")
    state = gap_verdict(mean, half)
    if state == "open":
        return Verdict(
            None,
            "Whether the label is used cannot be decided from one held-out image: give more by --against DATA.",
            use,
        )
    numbers = (
        f"under a wrong class the loss on {images} held-out images is {mean:+.4f} ({mean / true:+.1%}) against the "
        f"true class, 95% interval {mean - half:+.4f} to {mean + half:+.4f}"
    )
    if mean == 0 == half:
        return Verdict(False, f"The label is NOT used: it changes nothing ({numbers}).", use)
    meaning = {
        "used": ".",
        "misleads": ", all below 0. Are the classes in another order than in training?",
        "unused": ", which contains 0.",
    }
    return Verdict(state == "used", f"{VERDICTS[state]}: {numbers}{meaning[state]}", use)


@torch.no_grad()
def label_check(
    unet: AdaGNUNet,
    objective: DiffusionLoss,
    heldout: ImageDataset | None,
    evaluations: int = 2048,
    progress: bool = False,
) -> Verdict:
    """Measure the losses and return the verdict.

    Args:
        unet: The network.
        objective: Its process.
        heldout: Labelled images that the network was not trained on. None: the verdict can only be that the output does
            not depend on the label, or that it cannot be decided.
        evaluations: Number of (image, noise level, noise) that are measured.
        progress: Show a progress bar.
    """
    k = unet.config.num_classes or 0
    if not k:
        return Verdict(None, "The network has no classes.")
    if heldout is not None:
        return verdict_from_losses(label_use(unet, heldout, objective, evaluations, progress=progress))
    # an untrained network responds too, so a response gives no verdict
    labels = torch.arange(min(k, 16), device=unet.device)
    m = unet.modulation(objective.process.quantile(torch.tensor([0.5]))[0].float(), labels)
    responds = any((part != part[:1]).any() for params in m.values() for part in params)
    if not responds:
        return Verdict(False, "The label is NOT used: the modulation does not depend on it.")
    return Verdict(
        None,
        "The network responds to its label. Only labelled images can show whether it uses it: give --against DATA.",
    )
