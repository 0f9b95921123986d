"""Is the label used? A verdict in one line, from the loss on held-out pictures."""

from dataclasses import dataclass

import torch

from ..data import ImageDataset
from ..diffusion.loss import DiffusionLoss
from ..evaluation.label_usage import LabelUse, judge, label_use
from ..models.unet import AdaGNUNet

UNUSED, OPEN = 3, 4  # exit statuses: not seen to be used; it cannot be said


@dataclass(frozen=True)
class Verdict:
    """used: True or False; None where no pictures could tell. sentence: one line. use: what it was read from."""

    used: bool | None
    sentence: str
    use: LabelUse | None = None


def read_verdict(use: LabelUse) -> Verdict:
    """The label is used if told the true one the loss is lower than told another picture's, by more than chance: the 95% interval
    of the paired difference lies above 0. It misleads if that lies below 0."""
    if use.wrong is None:
        return Verdict(
            None,
            "Whether the label is used cannot be said: all held-out pictures are of one class, so none can be told wrong.",
            use,
        )
    mean, half = use.gap("wrong")
    true, _, pictures = use.losses("wrong")
    verdict = judge(mean, half)
    if verdict == "open":
        return Verdict(None, "One held-out picture cannot tell chance from use: give more by --against DATA.", use)
    share = mean / true
    numbers = (
        f"told a wrong class the loss on {pictures} held-out pictures is {mean:+.4f} ({share:+.1%}) against the true one's, 95% interval "
        f"{mean - half:+.4f} to {mean + half:+.4f}"
    )
    if verdict == "used":
        return Verdict(True, f"The label is used: {numbers}.", use)
    if verdict == "misleads":
        return Verdict(
            False,
            f"The label MISLEADS: {numbers}, all below 0. Are the classes in another order than in training?",
            use,
        )
    if mean == 0 == half:
        return Verdict(False, f"The label is NOT used: it changes nothing ({numbers}).", use)
    return Verdict(False, f"The label is NOT seen to be used: {numbers}, which holds 0 or less.", use)


@torch.no_grad()
def label_check(
    unet: AdaGNUNet,
    objective: DiffusionLoss,
    heldout: ImageDataset | None,
    evaluations: int = 2048,
    progress: bool = False,
) -> Verdict:
    """Measure and judge. heldout: labelled pictures the network was not trained on; None: it may only be said whether it responds."""
    k = unet.config.num_classes or 0
    if not k:
        return Verdict(None, "The network has no classes.")
    if heldout is not None:
        return read_verdict(label_use(unet, heldout, objective, evaluations, progress=progress))
    # an untrained network responds too: no verdict can come of this
    labels = torch.arange(min(k, 16), device=unet.device)
    m = unet.modulation(torch.tensor(float(objective.num_timesteps // 2)), labels)
    responds = any((part != part[:1]).any() for told in m.values() for part in told)
    if not responds:
        return Verdict(False, "The label is NOT used: what the sites are told does not depend on it.")
    return Verdict(
        None,
        "The network responds to its label; whether it uses it, only labelled pictures can tell: give --against DATA.",
    )
