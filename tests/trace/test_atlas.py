"""The atlas is what hooks record in a real pass; what is read from it, against slow references and planted truths."""

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import LabelSpace
from diffusion_adagn.errors import InputError
from diffusion_adagn.models.conditioning import CONDITIONING
from diffusion_adagn.trace import atlas as atlas_module
from diffusion_adagn.trace.analysis import channels, class_geometry, drift, effective, shares
from diffusion_adagn.trace.atlas import Atlas

LABELS = LabelSpace(("cat", "dog", "eel"))
EVERY_KIND = pytest.mark.parametrize("kind", CONDITIONING)
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def hooked(unet, x, t, y):
    """What every site really gets in a forward pass, {site: Told}."""
    got, hooks = {}, []
    for site in unet.sites():
        module = unet.get_submodule(site.name)
        hooks.append(module.register_forward_pre_hook(lambda m, a, n=site.name: got.update({n: a[1]})))
    with torch.no_grad():
        unet(x, t, y)
    for hook in hooks:
        hook.remove()
    return got


@EVERY_KIND
@pytest.mark.parametrize("both", [False, True])
def test_the_atlas_is_what_hooks_record_in_a_forward_pass(kind, both):
    unet = tiny_unet(conditioning=kind, modulate_both_norms=both)
    atlas = Atlas.of(unet, LABELS, timesteps=[0, 499.5, 999])
    assert list(atlas.sites) == [s.name for s in unet.sites()]
    assert atlas.classes == ["cat", "dog", "eel", "null"]
    pairs = [(a, i) for a in range(3) for i in range(4)]
    t = torch.tensor([[0, 499.5, 999][a] for a, _ in pairs])
    y = torch.tensor([i for _, i in pairs])
    same_batch = hooked(unet, X[:1].expand(12, -1, -1, -1), t, y)
    for name, site in atlas.sites.items():
        assert list(site.fields) == list(same_batch[name]._fields)
        for what, f in site.fields.items():
            real = getattr(same_batch[name], what).numpy()
            assert np.array_equal(f.values.reshape(12, *f.values.shape[2:]), real)  # bit for bit
    one = hooked(unet, X, torch.tensor([999.0] * 3), torch.tensor([1, 1, 1]))
    for name, site in atlas.sites.items():
        for what, f in site.fields.items():
            real = getattr(one[name], what)[0].numpy()
            assert np.abs(f.values[2, atlas.place("dog")] - real).max() <= 1e-5 * np.abs(real).max()


@EVERY_KIND
def test_the_shares_are_a_two_way_decomposition_done_slowly(kind):
    atlas = Atlas.of(tiny_unet(conditioning=kind), LABELS, timesteps=7)
    for site in atlas.sites.values():
        for f in site.fields.values():
            x = f.values[:, :3].astype(np.float64).reshape(7, 3, -1)
            time = label = both = 0.0
            for c in range(x.shape[2]):
                grid = x[:, :, c]
                for a in range(7):
                    for k in range(3):
                        time += (grid[a].mean() - grid.mean()) ** 2
                        label += (grid[:, k].mean() - grid.mean()) ** 2
                        both += (grid[a, k] - grid[a].mean() - grid[:, k].mean() + grid.mean()) ** 2
            whole = np.square(x - x.mean((0, 1))).sum()
            s = shares(f)
            assert s.time + s.label + s.interaction == pytest.approx(1, abs=1e-9)
            assert (s.time, s.label, s.interaction) == pytest.approx(
                (time / whole, label / whole, both / whole), abs=1e-6
            )


def test_large_networks_are_streamed_and_the_statistics_are_the_same(monkeypatch):
    unet = tiny_unet()
    whole = Atlas.of(unet, LABELS, timesteps=5)
    monkeypatch.setattr(atlas_module, "ROWS", 3)
    some = Atlas.of(unet, LABELS, timesteps=5, keep=[1])
    assert some.classes == ["dog", "null"] and some.num_classes == 3
    for name in whole.sites:
        a, b = whole.sites[name].fields["gamma"], some.sites[name].fields["gamma"]
        assert b.values.shape[1] == 2 and np.allclose(b.values[:, 0], a.values[:, 1], atol=1e-6)
        assert vars(shares(a)) == pytest.approx(vars(shares(b)), abs=1e-6)
    many = LabelSpace(tuple(map(str, range(100))))
    big = Atlas.of(tiny_unet(num_classes=100), many, timesteps=2)
    assert len(big.classes) == 64 and big.classes[-1] == "null" and big.num_classes == 100
    with pytest.raises(InputError, match="keeps no values"):
        big.place("99")
    with pytest.raises(InputError, match=r"0\.\.2"):
        Atlas.of(unet, LABELS, keep=[3])


@EVERY_KIND
def test_save_and_load(tmp_path, kind):
    atlas = Atlas.of(tiny_unet(conditioning=kind), LABELS, timesteps=3)
    atlas.model = {"source": "runs/x"}
    loaded = Atlas.load(atlas.save(tmp_path / "atlas.npz"))
    assert (loaded.classes, loaded.kept_ids, loaded.model) == (atlas.classes, atlas.kept_ids, atlas.model)
    for name, site in atlas.sites.items():
        assert loaded.sites[name].site == site.site
        assert (loaded.sites[name].weight is None) == (site.weight is None)
        for what, f in site.fields.items():
            assert np.array_equal(loaded.sites[name].fields[what].values, f.values)
            assert shares(loaded.sites[name].fields[what]) == shares(f)
    with np.load(tmp_path / "atlas.npz", allow_pickle=False) as plain:
        assert any(key.startswith("values/down.0") for key in plain)
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    with pytest.raises(InputError, match="not an atlas"):
        Atlas.load(tmp_path / "bad.npz")


def test_a_network_without_classes_has_an_atlas_of_time():
    atlas = Atlas.of(tiny_unet(num_classes=None), LabelSpace(()), timesteps=4)
    s = shares(next(iter(atlas.sites.values())).fields["gamma"])
    assert s.time == pytest.approx(1) and s.label == s.interaction == 0
    assert class_geometry(atlas) is None


# ---------------------------------------------------------------------- planted truths


def test_a_class_path_cut_at_all_sites_but_one_is_found():
    unet = tiny_unet()
    with torch.no_grad():  # what a site is told is linear in silu(time + class): no weight, no class
        kept = unet.sites()[2].name
        for name, rows in unet.projection_slices().items():
            if name != kept:
                unet.projection.weight[rows] = 0
    atlas = Atlas.of(unet, LABELS, timesteps=5)
    assert [n for n, s in atlas.sites.items() if shares(s.fields["gamma"]) is not None] == [kept]
    assert shares(atlas.sites[kept].fields["beta"]).label > 0.01


def test_a_constant_time_embedding_shows_no_time_share_and_a_deaf_net_no_class_share():
    unet = tiny_unet()
    with torch.no_grad():
        unet.embedding.time[0].weight.zero_()
    for site in Atlas.of(unet, LABELS, timesteps=5).sites.values():
        s = shares(site.fields["gamma"])
        assert s.time == s.interaction == 0 and s.label == pytest.approx(1)
    for site in Atlas.of(tiny_unet(conditioning="none"), LABELS, timesteps=5).sites.values():
        s = shares(site.fields["gamma"])
        assert s.label == s.interaction == 0 and s.time == pytest.approx(1)


def test_two_classes_with_the_same_vector_come_out_as_identical():
    unet = tiny_unet()
    with torch.no_grad():
        unet.embedding.classes.weight[2] = unet.embedding.classes.weight[0]
    geometry = class_geometry(Atlas.of(unet, LABELS, timesteps=4))
    assert geometry.distance[0, 2] == 0 and geometry.cosine[0, 2] == pytest.approx(1)
    assert geometry.nearest == ["eel", "cat", "cat"] or (geometry.nearest[0] == "eel" and geometry.nearest[2] == "cat")
    assert geometry.distance[0, 1] > 0 and geometry.null_distance > 0


def test_the_effective_gain_and_shift_are_what_a_channel_meets():
    unet = tiny_unet()
    atlas = Atlas.of(unet, LABELS, timesteps=[500])
    name = unet.sites()[1].name
    gain, shift = effective(atlas.sites[name])
    h = torch.randn(1, atlas.sites[name].site.channels, 4, 4)
    norm = unet.get_submodule(name)
    told = unet.modulation(500, 1)[name]
    bare = torch.nn.functional.group_norm(h, norm.num_groups, eps=norm.eps)
    expected = norm(h, told)
    mine = bare * torch.tensor(gain[0, 1])[None, :, None, None] + torch.tensor(shift[0, 1])[None, :, None, None]
    assert torch.allclose(expected, mine.float(), atol=1e-5)
    with pytest.raises(InputError, match="neither gamma nor beta"):
        effective(next(iter(Atlas.of(tiny_unet(conditioning="additive"), LABELS, timesteps=2).sites.values())))


def test_channels_that_are_silent_flipped_or_still_are_counted():
    atlas = Atlas.of(tiny_unet(), LABELS, timesteps=4)
    site = next(iter(atlas.sites.values()))
    site.weight, site.bias = np.ones(site.site.channels), np.zeros(site.site.channels)
    gamma, beta = site.fields["gamma"].values, site.fields["beta"].values
    rng = np.random.default_rng(0)
    gamma[:], beta[:] = rng.uniform(0.1, 0.5, gamma.shape), rng.uniform(0.1, 0.5, beta.shape)
    gamma[..., 0] = -1  # silent: no gain at all
    gamma[0, 0, 1] = -3  # its sign turns once
    gamma[..., 2], beta[..., 2] = 0.2, 0.1  # still
    got = channels(site)
    assert (got.silenced, got.flipped, got.constant, got.of) == (1, 1, 1, site.site.channels)


def test_drift_is_nothing_between_equal_nets_and_known_between_scaled_ones():
    unet = tiny_unet()
    before = Atlas.of(unet, LABELS, timesteps=3)
    assert all(v == 0 for d in drift(before, before).values() for v in d.values())
    with torch.no_grad():
        unet.projection.weight *= 1.5
        unet.projection.bias *= 1.5
    moved = drift(before, Atlas.of(unet, LABELS, timesteps=3))
    assert all(v == pytest.approx(0.5, rel=1e-4) for d in moved.values() for v in d.values())
    with pytest.raises(InputError, match="other sites or timesteps"):
        drift(before, Atlas.of(unet, LABELS, timesteps=4))
