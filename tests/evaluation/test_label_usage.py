from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import open_dataset
from diffusion_adagn.config import DataConfig, DiffusionConfig
from diffusion_adagn.diffusion.loss import DiffusionLoss
from diffusion_adagn.diffusion.schedule import make_process
from diffusion_adagn.evaluation.label_usage import label_use, other_labels

OBJECTIVE = DiffusionLoss(make_process(DiffusionConfig(prediction="x0")))
LABELS = np.array([0, 2, 1, 1, 0, 2, 2], dtype=np.int64)
LEVEL = torch.tensor([-1.0, 0.0, 1.0, 0.5])  # what the fake network believes a class looks like; the last: null


class Flat:
    """Images of one gray level a class: 0, 127.5 (as 127 and 128 side by side) and 255."""

    labels = LABELS

    def __len__(self):
        return len(LABELS)

    def gather(self, indices):
        levels = np.array([[0, 0], [127, 128], [255, 255]], dtype=np.uint8)
        return np.tile(levels[LABELS[indices]][:, None, :, None], (1, 2, 1, 1)), LABELS[indices]


class Believer:
    """Answers x0 by the label alone, and remembers what it was asked."""

    device = torch.device("cpu")

    def __init__(self, num_classes=3, null_class=True):
        self.config = SimpleNamespace(num_classes=num_classes, null_class=null_class)
        self.asked = []

    def __call__(self, x, t, y):
        self.asked.append((x, t, y))
        return SimpleNamespace(sample=LEVEL[y][:, None, None, None].expand_as(x))


def test_losses_use_the_given_labels():
    use = label_use(Believer(), Flat(), OBJECTIVE, evaluations=70, batch_size=16)
    assert len(use.true) == 70 and torch.allclose(use.true, torch.zeros(70).double(), atol=1e-4)
    level = LEVEL[torch.from_numpy(LABELS)[use.image]].double()
    assert torch.allclose(use.null, (level - 0.5).square(), atol=1e-4)
    # wrong classes lie 1 or 2 levels away; which one is used is permuted
    known = ~use.wrong.isnan()
    assert known.sum() >= 60 and set(use.wrong[known].round().tolist()) == {1.0, 4.0}
    assert use.losses("wrong") == pytest.approx((0, use.wrong.nanmean().item(), 7), abs=1e-4)


def test_labels_share_image_timestep_noise():
    one, other = Believer(), Believer()
    label_use(one, Flat(), OBJECTIVE, evaluations=21, batch_size=21)
    label_use(other, Flat(), OBJECTIVE, evaluations=21, batch_size=21)
    (x, t, y), (x2, t2, y2) = one.asked[0], other.asked[0]
    assert torch.equal(x, x2) and torch.equal(t, t2) and torch.equal(y, y2)
    true, wrong, null = y.chunk(3)
    assert torch.equal(true, torch.from_numpy(np.tile(LABELS, 3)))
    assert (true != wrong).sum() >= 18 and torch.equal(true.sort().values, wrong.sort().values) and (null == 3).all()
    for part in (x.chunk(3), t.chunk(3)):
        assert torch.equal(part[0], part[1]) and torch.equal(part[0], part[2])


def test_timesteps_are_evenly_spread():
    a = label_use(Believer(), Flat(), OBJECTIVE, evaluations=700, batch_size=700)
    b = label_use(Believer(), Flat(), OBJECTIVE, evaluations=700, batch_size=13)
    assert torch.equal(a.wrong.nan_to_num(9), b.wrong.nan_to_num(9)) and torch.equal(a.quantile, b.quantile)
    assert torch.histc(a.quantile.float(), 5, 0, 1).tolist() == pytest.approx([140] * 5, abs=14)


def test_gap_interval_equals_numpy():
    use = label_use(Believer(), Flat(), OBJECTIVE, evaluations=70, batch_size=16)
    difference, image, t = ((use.wrong - use.true).numpy(), use.image.numpy(), use.quantile.numpy())
    for low, high in ((0, 1), (0.2, 0.4)):
        inside = (t >= low) & (t < high) & ~np.isnan(difference)
        clusters = [difference[inside & (image == p)] for p in range(7) if (inside & (image == p)).any()]
        mean, half = use.gap("wrong", low, high)
        assert mean == pytest.approx(np.concatenate(clusters).mean(), rel=1e-9)
        # the ratio estimator's variance, each image a cluster (Cochran 1977, section 6.3)
        spread = sum((c - mean).sum() ** 2 for c in clusters) * len(clusters) / (len(clusters) - 1)
        assert half == pytest.approx(1.96 * spread**0.5 / sum(map(len, clusters)), rel=1e-9)


def test_gap_needs_other_classes_or_null():
    use = label_use(Believer(null_class=False), Flat(), OBJECTIVE, evaluations=7)
    assert use.gap("null") is None and use.gap("wrong") is not None

    class One(Flat):
        labels = LABELS * 0

    assert label_use(Believer(num_classes=1), One(), OBJECTIVE, evaluations=7).gap("wrong") is None
    assert label_use(Believer(num_classes=3), One(), OBJECTIVE, evaluations=7).gap("wrong") is None  # none to deal out


@pytest.mark.parametrize("counts", [[9, 9], [30, 30, 30], [20, 3, 1], [5] * 10, [1, 1], [40, 39, 1]])
def test_wrong_labels_are_a_permutation(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    reported = []
    for r in range(4):
        dealt = other_labels(labels, r)
        assert torch.equal(dealt.sort().values, labels.sort().values)
        left = int((dealt == labels).sum())
        assert left <= max(0, 2 * max(counts) - len(labels)) + 3
        reported.append(dealt)
    assert len(counts) == 2 or any(not torch.equal(reported[0], other) for other in reported[1:])


def test_uninformative_labels_show_no_use():
    """A net that predicts worse for the rare class, whatever the image: the label is uninformative."""

    class Uneven(Flat):
        labels = np.array([0] * 60 + [1] * 12)

        def __len__(self):
            return 72

        def gather(self, indices):
            return np.full((len(indices), 2, 2, 1), 255, np.uint8), self.labels[indices]

    def believes(x, t, y):
        return SimpleNamespace(sample=torch.where(y == 1, 0.5, 0.9)[:, None, None, None].expand_as(x))

    net = Believer(num_classes=2)
    net.__class__ = type("Prefers", (Believer,), {"__call__": lambda self, x, t, y: believes(x, t, y)})
    mean, half = label_use(net, Uneven(), OBJECTIVE, evaluations=720).gap("wrong")
    assert abs(mean) <= half


def test_label_usage_of_real_networks():
    data = open_dataset(DataConfig(), "heldout")
    eps = DiffusionLoss(make_process(DiffusionConfig()))
    changes = {"num_classes": 10, "learned_variance": True}
    assert label_use(tiny_unet(**changes), data, eps, evaluations=90).gap("wrong")[0] != 0
    deaf = label_use(tiny_unet(conditioning="none", **changes), data, eps, evaluations=90)
    assert deaf.gap("wrong") == deaf.gap("null") == (0.0, 0.0)
