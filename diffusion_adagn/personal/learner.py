"""Learning a class: the optimizer's steps, the loss on fixed draws, and the best tensors. The network does not change."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..data.rng import SampleOrder, normal, uniforms
from ..diffusion.loss import DiffusionLoss
from ..diffusion.process import Level
from ..evaluation.heldout import Batch, HeldOut, losses_under
from ..models.learned import LearnedClass, LowRank
from ..models.unet import AdaGNUNet
from .settings import LearnRequest

PAIRS = 256  # (noise level, noise) pairs of a measurement of the loss
MAX_ROWS = 64  # per call of the network where nothing is learned
START_EVALUATIONS = 4096  # of the network, to choose the nearest class
AVERAGE = 0.97  # decay of the average of the tensors over the steps
WARM_UP = 10  # steps
TOLERANCE = 0.2  # part of the fall of the held-out loss that may be lost again


class Learner:
    """The state of learning one class of a network.

    Args:
        unet: the network, which has the new class afterwards. Its weights are frozen.
        loss: of its run.
        images: to learn from, [N, C, H, W] in [-1, 1], on the network's device.
        heldout: of the same class, [M, C, H, W]; M may be 0.
        request: how to learn.
        start: the class vector to start from, [class_dim].

    Attributes:
        label: of the new class.
        step: steps so far.
        losses: {step: mean loss on the fixed pairs}; on images that are learned from if none is held out.
        best_step: the last step with a loss near the lowest; without held-out images the last one. A few images show the
            loss of their class with an error, and theirs rises while that of the class does not: it is near up to
            TOLERANCE of the fall since step 0.
    """

    def __init__(
        self,
        unet: AdaGNUNet,
        loss: DiffusionLoss,
        images: Tensor,
        heldout: Tensor,
        request: LearnRequest,
        start: Tensor,
    ):
        self.unet, self.loss, self.images, self.request, self.start = (
            unet.requires_grad_(False),
            loss,
            images,
            request,
            start,
        )
        self.has_heldout, self.step, self.best_step = bool(len(heldout)), 0, 0
        self.pairs = _pairs(heldout if self.has_heldout else images, PAIRS, loss, request.seed)
        table = unet.embedding.classes.weight
        rows = 1 if request.depth == "vector" else len(unet.sites())
        layers = new_changes(unet, request) if request.depth == "layers" else {}
        learned = LearnedClass(request.name, start[None].repeat(rows, 1), layers)
        self.label = unet.add_class(learned)
        learned.apply(lambda tensor: tensor.requires_grad_(True))
        self.learned, self.average, self.best = learned, _copy(learned), _copy(learned)
        self.rates = {"vectors": request.lr * table.square().mean().sqrt().item(), "layers": request.layers_lr}
        changes = [part for change in learned.layers.values() for part in change]
        groups = [{"params": [learned.vectors], "name": "vectors"}, {"params": changes, "name": "layers"}]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.99))
        self.order = SampleOrder(len(images), request.seed)
        self.losses = {0: self.measure()}

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or the loss on held-out images has risen for too long."""
        waited = (self.step - self.best_step) // self.request.check_every
        return self.step >= self.request.steps or (self.has_heldout and waited >= self.request.patience)

    def train_step(self) -> float:
        """One step of the optimizer; its mean loss."""
        request, device = self.request, self.images.device
        positions = torch.arange(self.step * request.batch_size, (self.step + 1) * request.batch_size)
        x0, noise, level = self._batch(positions)
        labels = torch.full((len(x0),), self.label, device=device)
        output = self.unet(self.loss.process.add_noise(x0, noise, level), level.time, labels).sample
        loss = self.loss.loss(output, x0, noise, level).mean()
        loss.backward()
        scale = rate_at(self.step, request.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = scale * self.rates[group["name"]]
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.learned.vectors.lerp_(self.start, scale * request.decay)
            decay = min(AVERAGE, (1 + self.step) / (10 + self.step))
            for average, value in zip(self.average.tensors().values(), self.learned.tensors().values()):
                average.lerp_(value, 1 - decay)
        self.step += 1
        if self.step % request.check_every == 0 or self.step == request.steps:
            self._check()
        return loss.item()

    def measure(self) -> float:
        """The mean loss of the averaged tensors on the fixed pairs."""
        with self.using(self.average):
            loss = self.loss
            return losses_under(self.unet, self.pairs, loss.process, loss.loss, self.label).mean().item()

    @contextmanager
    def using(self, learned: LearnedClass) -> Iterator[None]:
        """The network with other tensors for the class, such as `average` and `best`."""
        place = self.unet.learned.index(self.learned)
        self.unet.learned[place] = learned
        try:
            yield
        finally:
            self.unet.learned[place] = self.learned

    def finish(self) -> LearnedClass:
        """Give the network the best tensors, and return them."""
        self.unet.learned[self.unet.learned.index(self.learned)] = self.best
        return self.best

    def _check(self) -> None:
        self.losses[self.step] = self.measure()
        lowest = min(self.losses.values())
        near = lowest + TOLERANCE * (self.losses[0] - lowest)
        if not self.has_heldout or self.losses[self.step] <= near:
            self.best, self.best_step = _copy(self.average), self.step

    def _batch(self, positions: Tensor) -> tuple[Tensor, Tensor, Level]:
        """Images, noise and levels as functions of (seed, position); the levels of a batch are evenly spread."""
        seed, count, device = self.request.seed, len(positions), self.images.device
        flip, shift = uniforms(seed, ("flip", "timestep"), positions)
        u = (positions % count + shift) / count
        level = self.loss.process.draw(u, cell=2**-32)[0].to(device)
        x0 = self.images[self.order(positions).to(device)]
        if self.request.flip:
            x0 = torch.where((flip < 0.5).to(device)[:, None, None, None], x0.flip(-1), x0)
        return x0, normal(seed, "noise", positions, tuple(x0.shape[1:])).to(device), level


def rate_at(step: int, steps: int) -> float:
    """The learning rate in units of the highest: a linear warm-up, then half a cosine to 0."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def new_changes(unet: AdaGNUNet, request: LearnRequest) -> dict[str, LowRank]:
    """Changes of all layers that may be changed: `down` random, `up` 0, so that nothing changes yet."""
    generator, changes = torch.Generator().manual_seed(request.seed), {}
    for name, layer in unet.changeable_layers().items():
        outputs, *inputs = layer.weight.shape
        rank = min(request.rank, outputs, inputs[0])
        down = torch.randn(rank, *inputs, generator=generator) / math.sqrt(math.prod(inputs))
        changes[name] = LowRank(down, torch.zeros(outputs, rank))
    return changes


def class_losses(
    unet: AdaGNUNet, loss: DiffusionLoss, images: Tensor, classes: int, seed: int, on_class: Callable[[], None]
) -> Tensor:
    """The mean loss of the images [N, C, H, W] under each of the classes, float32 [classes]: the same noises for all."""
    count = max(8, min(PAIRS, START_EVALUATIONS // classes))
    pairs, means = _pairs(images, count, loss, seed), []
    for label in range(classes):
        means.append(losses_under(unet, pairs, loss.process, loss.loss, label).mean())
        on_class()
    return torch.stack(means)


def _pairs(images: Tensor, count: int, loss: DiffusionLoss, seed: int) -> list[Batch]:
    """Images [N, C, H, W] in turn, at fixed noise levels and noises."""
    return list(HeldOut.of(images, count, loss.process, seed).batches(MAX_ROWS, images.device))


def start_vector(unet: AdaGNUNet, label: int | None) -> Tensor:
    """The class vector of a label; None: the mean over all classes, without null."""
    table = unet.embedding.classes.weight.detach()[: unet.config.num_classes]
    return table.mean(0) if label is None else table[label].clone()


def _copy(learned: LearnedClass) -> LearnedClass:
    copied = copy.copy(learned)
    copied.apply(lambda tensor: tensor.detach().clone())
    return copied
