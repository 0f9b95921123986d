"""What a training pass minimizes: the loss of the network's output, or of a network that reads the guidance scale."""

import torch
from torch import Tensor, nn

from ..config import RunConfig
from ..diffusion.loss import DiffusionLoss
from ..models.unet import AdaGNUNet, frozen
from .loader import Batch
from .teacher import Teacher


class Objective:
    """The loss of each sample of a batch.

    A network F that reads the guidance scale s is trained through an estimate of the conditional prediction (Tang et al.
    2025, "Visual generation without guidance", arXiv 2501.15420, whose beta is 1 / s):

        estimate = F(x, t, y, s) / s + (1 - 1 / s) F(x, t, null, 1)      the second term without gradient and dropout

    Where it equals the conditional prediction, F(x, t, y, s) = null + s (cond - null), guidance in one pass. The target of the
    estimate is that of the process. With a teacher it is the teacher's conditional prediction, and

        estimate = F(x, t, y, s) - (guided - cond)      guided, cond: the teacher's, by any rule

    so the loss is the distance of F to the guided prediction. A learned variance comes from F(x, t, y, s); its bound
    takes the estimate as the mean.

    Args:
        loss: of a prediction.
        unet: the network, for its null prediction.
        teacher: whose guided prediction is learned; None: the images are.
    """

    def __init__(self, loss: DiffusionLoss, unet: AdaGNUNet, teacher: Teacher | None = None):
        self.loss, self.unet, self.teacher = loss, unet, teacher

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """float32 [B].

        Args:
            model: the network, or what wraps it to train it in several processes.
            batch: with scales, if the network reads them.
        """
        x = self.loss.process.add_noise(batch.x0, batch.noise, batch.level)
        output = model(x, batch.level.time, batch.labels, augment=batch.augment, guidance_scale=batch.scale).sample
        target = None
        if batch.scale is not None:
            mean, variance = output.float().split([x.shape[1], output.shape[1] - x.shape[1]], dim=1)
            if self.teacher is None:
                estimate = self._null(x, batch).lerp(
                    mean, (1 / batch.scale)[:, None, None, None]
                )  # exactly F at scale 1
            else:
                target, guided = self.teacher(x, batch)
                estimate = mean - (guided - target)
            output = torch.cat([estimate, variance], dim=1)
        return self.loss.loss(output, batch.x0, batch.noise, batch.level, target)

    def _null(self, x: Tensor, batch: Batch) -> Tensor:
        labels = torch.full_like(batch.labels, self.unet.config.num_classes)
        with frozen(self.unet):
            output = self.unet(x, batch.level.time, labels, augment=batch.augment).sample
        return output[:, : x.shape[1]].float()


def forward_passes(config: RunConfig) -> int:
    """The cost of a training pass in forward passes: forward, backward (2), the null pass or a teacher's two."""
    return 3 + (0 if config.model.max_guidance_scale is None else 1 if config.teacher is None else 2)
