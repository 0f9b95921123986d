"""Is the label used? A verdict in one line, from the loss on held-out images."""

from dataclasses import dataclass

import torch

from ..data import ImageDataset
from ..diffusion.loss import DiffusionLoss
from ..evaluation.label_usage import LabelUse, gap_verdict, label_use
from ..models.unet import AdaGNUNet

UNUSED, OPEN = 3, 4  # exit statuses: not measurably used; cannot be decided


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
    if state == "used":
        return Verdict(True, f"The label is used: {numbers}.", use)
    if state == "misleads":
        return Verdict(
            False,
            f"The label MISLEADS: {numbers}, all below 0. Are the classes in another order than in training?",
            use,
        )
    if mean == 0 == half:
        return Verdict(False, f"The label is NOT used: it changes nothing ({numbers}).", use)
    return Verdict(False, f"The label is NOT measurably used: {numbers}, which contains 0.", use)


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
