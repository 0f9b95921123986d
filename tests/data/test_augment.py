"""Augmentation: draws and transforms against scalar NumPy, exact cases, and independence of batches."""

import math

import numpy as np
import pytest
import torch

from diffusion_adagn import open_dataset
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.data.augment import Augmentations, augment_images, draw_augmentations
from diffusion_adagn.data.rng import STREAMS, normal, words
from diffusion_adagn.diffusion.schedule import make_process
from diffusion_adagn.training.loader import BatchLoader

CPU = torch.device("cpu")


def images(count, channels=3, side=8):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1


def turn(angle):
    return np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])


def drawn_by_hand(seed, position, p):
    """The 9 parameters, and the matrix of image -> result in units of half a side, as the paper's table has them."""
    u = [w / 2**32 for w in words(seed, "augment", torch.tensor([position]), 12)[0].tolist()]
    n = normal(seed, "augment_normal", torch.tensor([position]), (4,))[0].tolist()
    a = [0.0] * 9
    a[0], a[1] = float(u[0] < 0.5), float(u[1] < p and u[2] < 0.5)
    matrix = np.eye(3)
    if u[3] < p:
        a[2] = n[0]
        matrix = np.diag([2 ** (0.2 * n[0]), 2 ** (0.2 * n[0]), 1]) @ matrix
    if u[4] < p:
        angle = math.pi * (2 * u[5] - 1)
        a[3], a[4] = math.cos(angle) - 1, math.sin(angle)
        matrix = turn(angle) @ matrix
    if u[6] < p:
        angle = math.pi * (2 * u[7] - 1)
        a[5], a[6] = n[1] * math.cos(angle), n[1] * math.sin(angle)
        matrix = turn(angle) @ np.diag([2 ** (0.2 * n[1]), 2 ** (-0.2 * n[1]), 1]) @ turn(-angle) @ matrix
    if u[8] < p:
        a[7], a[8] = n[2], n[3]
        matrix = np.array([[1, 0, 2 * n[2] / 8], [0, 1, 2 * n[3] / 8], [0, 0, 1]]) @ matrix
    return a, matrix


def cubic(x):
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def mirrored(index, side):
    index %= 2 * side
    return index if index < side else 2 * side - 1 - index


def warped_by_hand(image, inverse):
    """One image [H, H]: each pixel is the mean of four bicubic samples at the places that the inverse matrix gives."""
    side = len(image)
    out = np.zeros((side, side))
    for row in range(side):
        for column in range(side):
            for dy in (-0.25, 0.25):
                for dx in (-0.25, 0.25):
                    place = [(2 * (column + dx) + 1) / side - 1, (2 * (row + dy) + 1) / side - 1, 1]
                    x, y = (((inverse @ place)[:2] + 1) * side - 1) / 2
                    # a place beyond the edge is reflected first, then its neighbours are
                    x, y = ((v + 0.5) % (2 * side) for v in (x, y))
                    x, y = ((v if v < side else 2 * side - v) - 0.5 for v in (x, y))
                    for j in range(math.floor(y) - 1, math.floor(y) + 3):
                        for i in range(math.floor(x) - 1, math.floor(x) + 3):
                            weight = cubic(x - i) * cubic(y - j)
                            out[row, column] += weight * image[mirrored(j, side), mirrored(i, side)] / 4
    return out.clip(-1, 1)


@pytest.mark.parametrize("p", [0.12, 1.0])
def test_draws_and_matrices_by_hand(p):
    positions = torch.tensor([0, 3, 2**33 + 1, *range(100, 140)])
    drawn = draw_augmentations(7, positions, p)
    assert drawn.parameters.dtype == drawn.inverse.dtype == torch.float32
    for i, position in enumerate(positions.tolist()):
        parameters, matrix = drawn_by_hand(7, position, p)
        np.testing.assert_allclose(drawn.parameters[i], parameters, atol=1e-6)
        np.testing.assert_allclose(drawn.inverse[i], np.linalg.inv(matrix)[:2], atol=1e-5)
        assert (i in drawn.moved.tolist()) == (not np.array_equal(matrix, np.eye(3)))
        assert (i in drawn.moved.tolist()) == bool(np.any(parameters[2:]))  # such an image has parameters


def test_images_by_hand():
    x, drawn = images(10, channels=1), draw_augmentations(3, torch.arange(10), 0.3)
    assert 0 < len(drawn.moved) < 10
    got = augment_images(x, drawn)
    for i in range(10):
        image = x[i, 0].numpy()
        image = image[:, ::-1] if drawn.parameters[i, 0] else image
        image = image[::-1] if drawn.parameters[i, 1] else image
        if i in drawn.moved.tolist():
            np.testing.assert_allclose(got[i, 0], warped_by_hand(image, drawn.inverse[i].double().numpy()), atol=2e-4)
        else:
            assert np.array_equal(got[i, 0], image)


def moved_by(matrix):
    """An augmentation of one image by a matrix of image -> result, without flips."""
    inverse = torch.from_numpy(np.linalg.inv(matrix)[:2]).float()[None]
    return Augmentations(torch.zeros(1, 9), inverse, torch.tensor([0]))


def test_directions_of_translation_and_rotation():
    """A ramp keeps its values under bicubic interpolation, except near the mirrored edges."""
    ramp = torch.linspace(-0.5, 0.5, 16).expand(1, 1, 16, 16)  # bright at the right
    right = augment_images(ramp, moved_by(np.array([[1, 0, 3 * 2 / 16], [0, 1, 0], [0, 0, 1]])))
    torch.testing.assert_close(right[..., 6:-3], ramp[..., 3:-6], atol=1e-5, rtol=0)
    down = augment_images(ramp.mT, moved_by(np.array([[1, 0, 0], [0, 1, 3 * 2 / 16], [0, 0, 1]])))
    torch.testing.assert_close(down[..., 6:-3, :], ramp.mT[..., 3:-6, :], atol=1e-5, rtol=0)
    clockwise = augment_images(ramp, moved_by(turn(math.pi / 2)))  # bright at the bottom then
    torch.testing.assert_close(clockwise[..., 3:-3, :], ramp.mT[..., 3:-3, :], atol=1e-5, rtol=0)
    half = augment_images(ramp, moved_by(np.diag([0.5, 0.5, 1])))
    torch.testing.assert_close(half[..., 5:11].diff(dim=-1), torch.full((1, 1, 16, 5), 2 / 15), atol=1e-5, rtol=0)


def test_an_image_does_not_depend_on_its_batch():
    x, positions = images(64), torch.arange(1000, 1064)
    whole = draw_augmentations(5, positions, 0.3)
    out = augment_images(x, whole)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for part in (*order.split(9), torch.arange(32), torch.tensor([63])):
        drawn = draw_augmentations(5, positions[part], 0.3)
        assert torch.equal(drawn.parameters, whole.parameters[part])
        assert torch.equal(drawn.inverse, whole.inverse[part])
        assert torch.equal(augment_images(x[part], drawn), out[part])
    assert not torch.equal(draw_augmentations(6, positions, 0.3).parameters, whole.parameters)


def test_distribution():
    n = 40_000
    drawn = draw_augmentations(0, torch.arange(n), 0.12)
    a = drawn.parameters.double()
    assert a[:, 0].mean().item() == pytest.approx(0.5, abs=0.01)
    assert a[:, 1].mean().item() == pytest.approx(0.06, abs=0.005)
    for column in (2, 4, 5, 7):
        assert (a[:, column] != 0).double().mean().item() == pytest.approx(0.12, abs=0.007)
    assert len(drawn.moved) / n == pytest.approx(1 - 0.88**4, abs=0.01)
    every = draw_augmentations(0, torch.arange(n), 1.0).parameters.double()
    torch.testing.assert_close(every.std(0)[[2, 7, 8]], torch.ones(3).double(), atol=0.02, rtol=0)
    assert every[:, 2:].mean(0)[[0, 2, 3, 4, 5, 6]].abs().max() < 0.02
    pairs = torch.corrcoef(every.T)
    assert (pairs - torch.eye(9)).abs().max() < 0.03  # drawn independently


def test_streams_are_appended():
    """The numbers are part of every recorded run."""
    old = ("order", "noise", "timestep", "label_drop", "flip", "heldout", "wrong_label", "balance", "balance_order")
    assert [STREAMS[name] for name in old] == list(range(9))


PROCESS = make_process(DiffusionConfig())


def test_batches():
    digits = open_dataset("digits", "train", progress=False)
    positions = torch.arange(50, 90)
    off = BatchLoader(digits, 4, PROCESS, CPU, label_dropout=0.2).batch(positions)
    on = BatchLoader(digits, 4, PROCESS, CPU, label_dropout=0.2, augment=0.5).batch(positions)
    assert off.augment is None and on.augment.shape == (40, 9)
    drawn = draw_augmentations(4, positions, 0.5)
    assert torch.equal(on.augment, drawn.parameters)
    assert torch.equal(on.x0, augment_images(off.x0, drawn)) and not torch.equal(on.x0, off.x0)
    for name in ("noise", "quantile", "labels", "indices"):
        assert torch.equal(getattr(on, name), getattr(off, name))
    both = BatchLoader(digits, 4, PROCESS, CPU, flip=True, augment=0.5).batch(positions)
    flipped = BatchLoader(digits, 4, PROCESS, CPU, flip=True).batch(positions)
    assert torch.equal(both.x0, augment_images(flipped.x0, drawn))  # data.flip comes first and is no input
    assert torch.equal(both.augment, on.augment)
