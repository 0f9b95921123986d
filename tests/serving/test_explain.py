"""The modulation in numbers and words, against loops over classes and noise levels."""

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import Atlas, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_process
from diffusion_adagn.serving.explain import draw_class, explain_class, explain_model

LABELS = LabelSpace(("cat", "dog", "tench"))


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture(scope="module")
def atlas(unet):
    return Atlas.of(unet, LABELS, [0, 300, 900], process=make_process(DiffusionConfig()))


def test_deviation_is_that_of_the_modulation(unet, atlas):
    found = explain_class(atlas, LABELS, 1)["deviation"]
    assert list(found) == [site.name for site in unet.sites()]
    with torch.no_grad():
        for site in found:
            squares = []
            for t in (0, 300, 900):
                gammas = [unet.modulation(t, torch.tensor([y]))[site].gamma[0].double() for y in range(3)]
                squares.append(((gammas[1] - sum(gammas) / 3) ** 2).mean().item())
            assert found[site] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-3)


def test_explanation_names_the_site_and_the_nearest_class(atlas):
    one = explain_class(atlas, LABELS, 0)
    largest = max(one["deviation"], key=one["deviation"].get)
    assert f"gamma of class cat differs most from the mean of all classes at {largest}" in one["sentences"][0]
    assert one["nearest_classes"] == explain_model(atlas)["nearest_classes"]["cat"]
    assert {near["class"] for near in one["nearest_classes"]} == {"dog", "tench"}
    cosines = [near["cosine"] for near in one["nearest_classes"]]
    assert cosines == sorted(cosines, reverse=True)


def test_fractions_of_the_variance_sum_to_one(atlas):
    for site in explain_model(atlas)["sites"]:
        for parts in site["variance"].values():
            assert set(parts) == {"time", "class", "both"} and sum(parts.values()) == pytest.approx(1)


def test_chart_has_a_bar_per_site(unet, atlas):
    explained = explain_class(atlas, LABELS, 2)
    (bars,) = draw_class(atlas, explained).axes[0].containers
    assert [bar.get_height() for bar in bars] == pytest.approx([explained["deviation"][s.name] for s in unet.sites()])
