"""What the guidance scale changes, in the atlas and in the report."""

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_process
from diffusion_adagn.render.text import number
from diffusion_adagn.trace.analysis import class_spread
from diffusion_adagn.trace.atlas import Atlas
from diffusion_adagn.trace.report import TraceReport, TraceResults, write_report

LABELS, PROCESS = LabelSpace(("cat", "dog", "eel")), make_process(DiffusionConfig())


@pytest.mark.parametrize("conditioning", ["adagn", "cross_attention"])
def test_changes_are_those_of_the_modulation(conditioning, tmp_path):
    unet = tiny_unet(max_guidance_scale=4.0, conditioning=conditioning)
    atlas = Atlas.of(unet, LABELS, [10, 500, 900], process=PROCESS)
    assert atlas.scales.tolist() == [2, 3, 4]
    for name in list(atlas.sites)[::3]:
        for field, values in atlas.sites[name].fields.items():
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
    table = scale_section(atlas).parts[-1]
    change = np.stack([site.fields["gamma"].by_scale for site in atlas.sites.values()], axis=1)
    spread = np.sqrt(np.square(class_spread(atlas, "gamma")).mean())
    assert [row[0] for row in table.rows] == [f"{scale:g}" for scale in atlas.scales]
    for row, one in zip(table.rows, change):
        assert row[1] == number(one.max()) and row[-1] == number(np.sqrt(np.square(one).mean()) / spread)
    unet.embedding.scale.weight.data.zero_()
    unread = Atlas.of(unet, LABELS, [10, 500], process=PROCESS)
    assert scale_section(unread).parts[0].startswith("The network has not learned to read the guidance scale")


def scale_section(atlas: Atlas):
    sections = TraceReport(TraceResults("x", "", atlas)).sections()
    return next((s for s in sections if s.heading == "What the guidance scale changes"), None)


def test_other_networks_have_no_such_section(tmp_path):
    atlas = Atlas.of(tiny_unet(), LABELS, [10, 500], process=PROCESS)
    assert not len(atlas.scales) and all(f.by_scale is None for s in atlas.sites.values() for f in s.fields.values())
    assert scale_section(atlas) is None
    with np.load(atlas.save(tmp_path / "atlas.npz")) as arrays:
        assert not [name for name in arrays.files if "scale" in name]
