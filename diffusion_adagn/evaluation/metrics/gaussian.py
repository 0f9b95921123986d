"""The Frechet distance between the Gaussians of two sets of features, in float64. The device must support float64."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from .measured import MetricValue, blocks, checked, same_extractor

PER_FEATURE = 10  # with fewer images per feature, a Frechet distance has a warning


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of the features of a set of images.

    Args:
        mean: float64 [D].
        covariance: float64 [D, D], normalized by count - 1.
        count: The number of images.

    Raises:
        InputError: A shape is wrong, or a value is not finite.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    def __post_init__(self) -> None:
        for name in ("mean", "covariance"):
            object.__setattr__(self, name, np.require(getattr(self, name), np.float64, ["C", "W"]))
        d = self.mean.size
        if self.mean.shape != (d,) or self.covariance.shape != (d, d) or not np.isfinite(self.covariance).all():
            raise InputError(
                f"a mean of shape {list(self.mean.shape)} and a covariance of shape {list(self.covariance.shape)} are no "
                "Gaussian; expected [D] and [D, D], all finite."
            )

    @classmethod
    def of(cls, features: np.ndarray, device: str = "cpu") -> "Gaussian":
        """Mean and covariance of features [N, D]. Raises InputError for fewer than two images."""
        features, moments = checked(features), Moments(device)
        for rows in blocks(len(features)):
            moments.add(features[rows])
        return moments.gaussian()

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance, [D, D] float64."""
        values, vectors = torch.linalg.eigh(torch.from_numpy(self.covariance))
        return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).numpy()


class Moments:
    """Accumulates a Gaussian from blocks of features, by merging means and scatter matrices.

    Source: Chan, Golub & LeVeque 1979.
    """

    def __init__(self, device: str = "cpu"):
        self.device, self.count, self.mean, self.scatter = device, 0, None, None

    def add(self, features: np.ndarray) -> None:
        """features: [n, D] of the next images."""
        x = torch.from_numpy(checked(features)).to(self.device).double()
        mean = x.mean(0)
        x = x - mean
        if self.mean is None:
            self.count, self.mean, self.scatter = len(x), mean, x.T @ x
            return
        same_extractor(x.shape[1], len(self.mean))
        gap, total = mean - self.mean, self.count + len(x)
        self.scatter += x.T @ x + torch.outer(gap, gap) * (self.count * len(x) / total)
        self.mean = self.mean + gap * (len(x) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        if self.count < 2:
            raise InputError(f"a covariance needs two images or more; there are {self.count}.")
        return Gaussian(self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy(), self.count)


def _cross(a: Gaussian, b: Gaussian, device: str) -> tuple[Tensor, Tensor]:
    """b's root, and root(b) cov(a) root(b), whose eigenvalues are those of cov(a) cov(b)."""
    same_extractor(len(a.mean), len(b.mean))
    root = torch.from_numpy(b.root).to(device)
    product = root @ torch.from_numpy(a.covariance).to(device) @ root
    return root, (product + product.T) / 2


def _distance(a: Gaussian, b: Gaussian, eigenvalues: Tensor) -> float:
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    distance = np.square(a.mean - b.mean).sum() + traces - 2 * eigenvalues.clamp(min=0).sqrt().sum().item()
    return max(float(distance), 0.0)


def frechet_distance(a: Gaussian, b: Gaussian, device: str = "cpu") -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6)."""
    return _distance(a, b, torch.linalg.eigvalsh(_cross(a, b, device)[1]))


def singular(n: int, d: int, reference: int) -> str:
    """Why the Frechet distance of n images with d features to `reference` images is undefined; "" if it is defined."""
    if min(n, reference) > d:
        return ""
    count, of, more = (n, "", "sample more") if n <= d else (reference, " of the reference", "take a larger reference")
    return (
        f"{count:,} images{of} for {d:,} features: the covariance is singular and the distance means nothing below "
        f"{d + 1:,} images; {more}, or read kid, which has no such limit"
    )


def frechet(features: np.ndarray, reference: Gaussian, device: str = "cpu") -> MetricValue:
    """The Frechet distance of images to a reference. The cost is O(N D^2 + D^3).

    There is no value if either side has at most as many images as features, since its covariance is then singular.
    The value has a positive bias of order 1 / N (Chong & Forsyth 2020), so compare at equal N. Below 10 images per
    feature `why` contains a warning. The influence is the derivative 2 (m - m_r).(x - m) + (x - m)' (I - T) (x - m).
    T is the optimal transport map from the images' Gaussian to that of the reference (Gelbrich 1990).

    Args:
        features: [N, D].
        reference: The Gaussian of the reference.
        device: The device that computes it.
    """
    features = checked(features)
    n, d = features.shape
    if not isinstance(reference, Gaussian):
        raise InputError(
            f"the reference of a Frechet distance is a Gaussian: Gaussian.of(features), not {type(reference).__name__}."
        )
    same_extractor(d, len(reference.mean))
    if why := singular(n, d, reference.count):
        return MetricValue.unavailable(why)
    own = Gaussian.of(features, device)
    root, product = _cross(own, reference, device)
    values, vectors = torch.linalg.eigh(product)
    positive = values > values[-1] * d * torch.finfo(torch.float64).eps
    side = root @ vectors[:, positive]
    change = torch.eye(d, dtype=torch.float64, device=device) - (side / values[positive].sqrt()) @ side.T
    mean = torch.from_numpy(own.mean).to(device)
    shift = 2 * (mean - torch.from_numpy(reference.mean).to(device))
    influence = []
    for rows in blocks(n):
        x = torch.from_numpy(features[rows]).to(device).double() - mean
        influence.append((x @ shift + ((x @ change) * x).sum(1)).cpu())
    why = ""
    if n < PER_FEATURE * d:
        why = f"{n:,} images for {d:,} features: with so few the distance comes out too high; compare it at equal numbers only"
    return MetricValue.of(_distance(own, reference, values), torch.cat(influence).numpy(), why)
