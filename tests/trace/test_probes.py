"""Probes and the label check: no change without an intervention, and networks with known properties."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import AdaGNUNet, open_dataset
from diffusion_adagn.config import DataConfig, DiffusionConfig
from diffusion_adagn.diffusion.loss import DiffusionLoss
from diffusion_adagn.diffusion.schedule import make_process
from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation.label_usage import label_check
from diffusion_adagn.models.conditioning import CONDITIONING
from diffusion_adagn.trace.probes import label_sensitivity, probe, swap, zero

EACH_CONDITIONING = pytest.mark.parametrize("conditioning", CONDITIONING)
OBJECTIVE = DiffusionLoss(make_process(DiffusionConfig()))
G = torch.Generator().manual_seed(1)
X0 = torch.rand(4, 1, 8, 8, generator=G) * 2 - 1
Y = torch.tensor([0, 1, 2, 0])
GRID = [50, 500, 900]


@EACH_CONDITIONING
def test_swap_to_same_class_changes_nothing(conditioning):
    unet = tiny_unet(conditioning=conditioning)
    t = torch.full((4,), 500.0)
    m, same = unet.modulation(t, Y), unet.modulation(t, Y.clone())
    plain = unet.denoise(X0, m)
    for site in unet.sites():
        assert torch.equal(unet.denoise(X0, swap(m, same, [site.name])), plain)


@EACH_CONDITIONING
@pytest.mark.parametrize("intervention", ["swap", "null", "zero", "freeze"])
def test_influence_equals_change_of_x0(conditioning, intervention):
    unet = tiny_unet(conditioning=conditioning)
    result = probe(unet, OBJECTIVE, X0, Y, GRID, intervention)
    assert result.groups == [s.name for s in unet.sites()] and result.change.shape == (len(result.groups), 3)
    ignores_class = CONDITIONING[conditioning].class_input is None and intervention in ("swap", "null")
    assert (result.all_sites == 0).all() if ignores_class else (result.all_sites > 0).any()
    if intervention == "freeze":
        assert result.all_sites[1] == 0 and (result.change[:, 1] == 0).all()  # the middle of the grid
    if intervention == "null":
        from diffusion_adagn.data.rng import normal

        noise = normal(0, "heldout", torch.arange(4), (1, 8, 8))
        t = torch.tensor([500] * 4)
        level = OBJECTIVE.process.level(t)
        x_t = OBJECTIVE.process.add_noise(X0, noise, level)
        m, null = unet.modulation(t, Y), unet.modulation(t, torch.tensor([3] * 4))
        name = result.groups[2]
        a, s = level.alpha[0], level.sigma[0]
        x0 = [((x_t - s * unet.denoise(x_t, d)) / a).clamp(-1, 1) for d in (m, {**m, name: null[name]})]
        assert result.change[2, 1] == pytest.approx((x0[1] - x0[0]).square().mean().sqrt().item(), rel=1e-4, abs=1e-7)


def test_probe_by_resolution_groups_sites():
    unet = tiny_unet()
    result = probe(unet, OBJECTIVE, X0, Y, GRID, "zero", by="resolution")
    assert result.groups == ["8x8", "4x4"]
    assert (zero(unet.modulation(5, 1))[unet.sites()[0].name].gamma == 0).all()


def test_class_at_one_site_is_found():
    unet = tiny_unet()
    class_site = unet.sites()[3].name
    with torch.no_grad():
        for name, rows in unet.projection_slices().items():
            if name != class_site:
                unet.projection.weight[rows] = 0
    result = probe(unet, OBJECTIVE, X0, Y, GRID, "swap")
    moved = [g for g, row in zip(result.groups, result.change) if row.any()]
    assert moved == [class_site]
    assert np.allclose(result.change[3], result.all_sites)


def test_sensitivity_and_its_band():
    unet = tiny_unet()
    result = label_sensitivity(unet, OBJECTIVE, X0, Y, GRID)
    assert result.against == "null" and (result.prediction > 0).all()
    low, high = result.band()
    assert low <= result.levels.sigmas[int(result.x0.argmax())] <= high
    assert label_sensitivity(tiny_unet(null_class=False), OBJECTIVE, X0, Y, GRID).against == "another class"
    ignores_class = label_sensitivity(tiny_unet(conditioning="none"), OBJECTIVE, X0, Y, GRID)
    assert not ignores_class.x0.any() and not ignores_class.prediction.any()


def test_impossible_probes_are_rejected():
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


class LabelAwareModel:
    """Predicts the noise plus 0.5; under a wrong class the error is larger by `penalty`."""

    device = torch.device("cpu")

    def __init__(self, dataset, penalty):
        self.config, self.penalty = SimpleNamespace(num_classes=10, null_class=True), penalty
        pixels, self.labels = dataset.gather(np.arange(len(dataset)))
        self.x0 = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1

    def __call__(self, x, t, y):
        level = OBJECTIVE.process.level(t)
        a, s = (v[:, None, None, None] for v in (level.alpha, level.sigma))
        n = len(x) // 3
        index = torch.arange(n) % len(self.x0)
        eps = (x - a * self.x0[index].repeat(3, 1, 1, 1)) / s
        wrong = (y != torch.from_numpy(self.labels)[index].repeat(3)).float()[:, None, None, None]
        return SimpleNamespace(sample=eps + 0.5 + self.penalty * wrong)


def test_used_and_misleading_labels(digits):
    used = label_check(LabelAwareModel(digits, 0.1), OBJECTIVE, digits, evaluations=90)
    assert used.used is True and "is used" in used.sentence
    misleading = label_check(LabelAwareModel(digits, -0.1), OBJECTIVE, digits, evaluations=90)
    assert misleading.used is False and "MISLEADS" in misleading.sentence


def test_images_of_one_class_are_undecided(digits):
    import dataclasses

    one = dataclasses.replace(digits, labels=digits.labels * 0)
    result = label_check(tiny_unet(num_classes=10), OBJECTIVE, one, evaluations=90)
    assert result.used is None and "of one class" in result.sentence


def test_untrained_network_is_not_used(digits):
    ignores_class = label_check(tiny_unet(num_classes=10, conditioning="none"), OBJECTIVE, digits, evaluations=90)
    assert ignores_class.used is False and "changes nothing" in ignores_class.sentence
    torch.manual_seed(0)
    untrained = AdaGNUNet(sample_size=8, in_channels=1, num_classes=10, model_channels=16, channel_mult=(1, 2), num_res_blocks=1,
                      attention_resolutions=(4,), num_head_channels=16, norm_groups=4)  # fmt: skip
    assert label_check(untrained, OBJECTIVE, digits, evaluations=90).used is False
    for block in (m for m in untrained.modules() if hasattr(m, "conv2")):  # now its outputs depend on the label
        torch.nn.init.normal_(block.conv2.weight, std=0.05)
    torch.nn.init.normal_(untrained.conv_out.weight, std=0.05)
    x = torch.randn(2, 1, 8, 8)
    assert (
        untrained(x, 500, torch.tensor([0, 0])).sample - untrained(x, 500, torch.tensor([1, 1])).sample
    ).abs().max() > 0
    assert label_check(untrained, OBJECTIVE, digits, evaluations=900).used is False


def test_label_check_without_images():
    responds = label_check(tiny_unet(), OBJECTIVE, None)
    assert responds.used is None and "responds" in responds.sentence and "--against" in responds.sentence
    assert label_check(tiny_unet(conditioning="none"), OBJECTIVE, None).used is False
    assert label_check(tiny_unet(num_classes=None), OBJECTIVE, None).used is None
