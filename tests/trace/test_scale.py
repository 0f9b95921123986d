"""What the guidance scale changes, in the atlas and in the report."""

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_process
from diffusion_adagn.trace.atlas import Atlas
from diffusion_adagn.trace.report import TraceReport, TraceResults, write_report

LABELS, PROCESS = LabelSpace(("cat", "dog", "eel")), make_process(DiffusionConfig())


@pytest.mark.parametrize("conditioning", ["adagn", "cross_attention"])
def test_changes_are_those_of_the_modulation(conditioning, tmp_path):
    unet = tiny_unet(max_guidance_scale=4.0, conditioning=conditioning)
    atlas = Atlas.of(unet, LABELS, [10, 500, 900], process=PROCESS)
    assert atlas.scales.tolist() == [2, 3, 4]
    for name, site in atlas.sites.items():
        for field, values in site.fields.items():
            for i, scale in enumerate(atlas.scales):
                for j, t in enumerate(atlas.timesteps):
                    both = [
                        torch.stack(
                            [getattr(unet.modulation(t, k, guidance_scale=s)[name], field)[0] for k in range(3)]
                        )
                        for s in (1.0, float(scale))
                    ]
                    wanted = (both[1] - both[0]).square().mean().sqrt().item()
                    assert values.by_scale[i, j] == pytest.approx(wanted, abs=1e-6)
    loaded = Atlas.load(atlas.save(tmp_path / "atlas.npz"))
    assert loaded.scales.tolist() == [2, 3, 4]
    for name, site in atlas.sites.items():
        for field, values in site.fields.items():
            assert np.array_equal(values.by_scale, loaded.sites[name].fields[field].by_scale)


def test_report_shows_them(tmp_path):
    unet = tiny_unet(max_guidance_scale=4.0)
    atlas = Atlas.of(unet, LABELS, [10, 500, 900], process=PROCESS)
    files = write_report(TraceResults("x", "a network", atlas), tmp_path)
    assert tmp_path / "scale.png" in files
    page = files[0].read_text()
    assert "What the guidance scale changes" in page and "From scale 1 to 4 gamma changes by up to RMS" in page
    unet.embedding.scale.weight.data.zero_()
    unread = Atlas.of(unet, LABELS, [10, 500], process=PROCESS)
    section = next(s for s in TraceReport(TraceResults("x", "", unread)).sections() if s.name == "scale")
    assert "does not change gamma at any site: the network has not learned to read it" in section.sentence


def test_other_networks_have_no_such_section(tmp_path):
    atlas = Atlas.of(tiny_unet(), LABELS, [10, 500], process=PROCESS)
    assert not len(atlas.scales) and all(f.by_scale is None for s in atlas.sites.values() for f in s.fields.values())
    assert "scale" not in [s.name for s in TraceReport(TraceResults("x", "", atlas)).sections()]
    with np.load(atlas.save(tmp_path / "atlas.npz")) as arrays:
        assert not [name for name in arrays.files if "scale" in name]
