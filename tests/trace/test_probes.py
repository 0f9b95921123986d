"""Probes and the verdict on the label: nothing where nothing is changed, planted truths found."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import AdaGNUNet, open_dataset
from diffusion_adagn.config import DataConfig, DiffusionConfig
from diffusion_adagn.diffusion.loss import DiffusionLoss
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.models.conditioning import CONDITIONING
from diffusion_adagn.trace.label_check import label_check
from diffusion_adagn.trace.probes import label_sensitivity, probe, swap, zero

EVERY_KIND = pytest.mark.parametrize("kind", CONDITIONING)
OBJECTIVE = DiffusionLoss(make_scheduler(DiffusionConfig()).alphas_cumprod, "eps")
G = torch.Generator().manual_seed(1)
X0 = torch.rand(4, 1, 8, 8, generator=G) * 2 - 1
Y = torch.tensor([0, 1, 2, 0])
GRID = [50, 500, 900]


@EVERY_KIND
def test_swapping_to_the_same_class_changes_nothing_bit_for_bit(kind):
    unet = tiny_unet(conditioning=kind)
    t = torch.full((4,), 500.0)
    m, same = unet.modulation(t, Y), unet.modulation(t, Y.clone())
    plain = unet.denoise(X0, m)
    for site in unet.sites():
        assert torch.equal(unet.denoise(X0, swap(m, same, [site.name])), plain)


@EVERY_KIND
@pytest.mark.parametrize("intervention", ["swap", "null", "zero", "freeze"])
def test_an_influence_is_the_change_of_x0_done_by_hand(kind, intervention):
    unet = tiny_unet(conditioning=kind)
    got = probe(unet, OBJECTIVE, X0, Y, GRID, intervention)
    assert got.groups == [s.name for s in unet.sites()] and got.change.shape == (len(got.groups), 3)
    deaf = CONDITIONING[kind].class_input is None and intervention in ("swap", "null")
    assert (got.whole == 0).all() if deaf else (got.whole > 0).any()
    if intervention == "freeze":
        assert got.whole[1] == 0 and (got.change[:, 1] == 0).all()  # it is the middle of the grid
    if intervention == "null":
        from diffusion_adagn.data.rng import normal

        noise = normal(0, "heldout", torch.arange(4), (1, 8, 8))
        t = torch.tensor([500] * 4)
        x_t = OBJECTIVE.add_noise(X0, noise, t)
        m, null = unet.modulation(t, Y), unet.modulation(t, torch.tensor([3] * 4))
        name = got.groups[2]
        a, s = OBJECTIVE.alpha[500], OBJECTIVE.sigma[500]
        x0 = [((x_t - s * unet.denoise(x_t, d)) / a).clamp(-1, 1) for d in (m, {**m, name: null[name]})]
        assert got.change[2, 1] == pytest.approx((x0[1] - x0[0]).square().mean().sqrt().item(), rel=1e-4, abs=1e-7)


def test_probes_by_resolution_join_the_sites_of_one_side():
    unet = tiny_unet()
    got = probe(unet, OBJECTIVE, X0, Y, GRID, "zero", by="resolution")
    assert got.groups == ["8x8", "4x4"]
    assert (zero(unet.modulation(5, 1))[unet.sites()[0].name].gamma == 0).all()


def test_a_class_that_enters_at_one_site_is_found_there():
    unet = tiny_unet()
    kept = unet.sites()[3].name
    with torch.no_grad():
        for name, rows in unet.projection_slices().items():
            if name != kept:
                unet.projection.weight[rows] = 0
    got = probe(unet, OBJECTIVE, X0, Y, GRID, "swap")
    moved = [g for g, row in zip(got.groups, got.change) if row.any()]
    assert moved == [kept]
    assert np.allclose(got.change[3], got.whole)


def test_sensitivity_is_what_guidance_multiplies_and_its_band_holds_the_most():
    unet = tiny_unet()
    got = label_sensitivity(unet, OBJECTIVE, X0, Y, GRID)
    assert got.against == "null" and (got.prediction > 0).all()
    low, high = got.band()
    assert low <= GRID[int(got.x0.argmax())] <= high
    assert label_sensitivity(tiny_unet(null_class=False), OBJECTIVE, X0, Y, GRID).against == "another class"
    deaf = label_sensitivity(tiny_unet(conditioning="none"), OBJECTIVE, X0, Y, GRID)
    assert not deaf.x0.any() and not deaf.prediction.any()


def test_probes_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="no null label"):
        probe(tiny_unet(null_class=False), OBJECTIVE, X0, Y, GRID, "null")
    with pytest.raises(InputError, match="no other class"):
        probe(tiny_unet(num_classes=1), OBJECTIVE, X0, Y * 0, GRID, "swap")
    with pytest.raises(InputError, match="an intervention is"):
        probe(tiny_unet(), OBJECTIVE, X0, Y, GRID, "swop")


# ---------------------------------------------------------------------- is the label used?


@pytest.fixture(scope="module")
def digits():
    return open_dataset(DataConfig(), "heldout")


class Knows:
    """Answers the true noise where it is told the true class of a picture, and a worse one elsewhere, by `worse`."""

    device = torch.device("cpu")

    def __init__(self, pictures, worse):
        self.config, self.worse = SimpleNamespace(num_classes=10, null_class=True), worse
        pixels, self.labels = pictures.gather(np.arange(len(pictures)))
        self.x0 = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1

    def __call__(self, x, t, y):
        a, s = (v[t][:, None, None, None] for v in (OBJECTIVE.alpha, OBJECTIVE.sigma))
        n = len(x) // 3
        here = torch.arange(n) % len(self.x0)
        eps = (x - a * self.x0[here].repeat(3, 1, 1, 1)) / s
        wrong = (y != torch.from_numpy(self.labels)[here].repeat(3)).float()[:, None, None, None]
        return SimpleNamespace(sample=eps + 0.5 + self.worse * wrong)


def test_a_label_that_is_used_is_said_to_be_and_one_that_harms_is_not(digits):
    used = label_check(Knows(digits, 0.1), OBJECTIVE, digits, evaluations=90)
    assert used.used is True and "is used" in used.sentence
    harms = label_check(Knows(digits, -0.1), OBJECTIVE, digits, evaluations=90)
    assert harms.used is False and "MISLEADS" in harms.sentence


def test_pictures_of_one_class_cannot_tell(digits):
    import dataclasses

    one = dataclasses.replace(digits, labels=digits.labels * 0)
    got = label_check(tiny_unet(num_classes=10), OBJECTIVE, one, evaluations=90)
    assert got.used is None and "of one class" in got.sentence


def test_a_net_that_ignores_the_label_and_an_untrained_one_that_only_responds_fail(digits):
    deaf = label_check(tiny_unet(num_classes=10, conditioning="none"), OBJECTIVE, digits, evaluations=90)
    assert deaf.used is False and "changes nothing" in deaf.sentence
    torch.manual_seed(0)
    fresh = AdaGNUNet(sample_size=8, in_channels=1, num_classes=10, model_channels=16, channel_mult=(1, 2), num_res_blocks=1,
                      attention_resolutions=(4,), num_head_channels=16, norm_groups=4)  # fmt: skip
    assert label_check(fresh, OBJECTIVE, digits, evaluations=90).used is False
    for block in (m for m in fresh.modules() if hasattr(m, "conv2")):  # now its outputs do depend on the label
        torch.nn.init.normal_(block.conv2.weight, std=0.05)
    torch.nn.init.normal_(fresh.conv_out.weight, std=0.05)
    x = torch.randn(2, 1, 8, 8)
    assert (fresh(x, 500, torch.tensor([0, 0])).sample - fresh(x, 500, torch.tensor([1, 1])).sample).abs().max() > 0
    assert label_check(fresh, OBJECTIVE, digits, evaluations=900).used is False


def test_without_pictures_it_may_only_say_responds():
    responds = label_check(tiny_unet(), OBJECTIVE, None)
    assert responds.used is None and "responds" in responds.sentence and "--against" in responds.sentence
    assert label_check(tiny_unet(conditioning="none"), OBJECTIVE, None).used is False
    assert label_check(tiny_unet(num_classes=None), OBJECTIVE, None).used is None
