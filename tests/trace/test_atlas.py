"""The atlas against hooks in a forward pass; its statistics against slow references and networks with known properties."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_process
from diffusion_adagn.errors import InputError
from diffusion_adagn.models.conditioning import CONDITIONING
from diffusion_adagn.trace import atlas as atlas_module
from diffusion_adagn.trace.analysis import class_geometry, count_channels, drift, gain_and_shift, variance_fractions
from diffusion_adagn.trace.atlas import Atlas
from diffusion_adagn.trace.levels import evenly_spread

LABELS = LabelSpace(("cat", "dog", "eel"))
EACH_CONDITIONING = pytest.mark.parametrize("conditioning", CONDITIONING)
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def hooked(unet, x, t, y):
    """The modulation that every site receives in a forward pass, {site: params}."""
    recorded, hooks = {}, []
    for site in unet.sites():
        module = unet.get_submodule(site.name)
        hooks.append(module.register_forward_pre_hook(lambda m, a, n=site.name: recorded.update({n: a[1]})))
    with torch.no_grad():
        unet(x, t, y)
    for hook in hooks:
        hook.remove()
    return recorded


@EACH_CONDITIONING
@pytest.mark.parametrize("both", [False, True])
def test_atlas_equals_forward_pass(conditioning, both):
    unet = tiny_unet(conditioning=conditioning, modulate_both_norms=both)
    atlas = Atlas.of(unet, LABELS, timesteps=[0, 499.5, 999])
    assert list(atlas.sites) == [s.name for s in unet.sites()]
    assert atlas.classes == ["cat", "dog", "eel", "null"]
    pairs = [(a, i) for a in range(3) for i in range(4)]
    t = torch.tensor([[0, 499.5, 999][a] for a, _ in pairs])
    y = torch.tensor([i for _, i in pairs])
    same_batch = hooked(unet, X[:1].expand(12, -1, -1, -1), t, y)
    for name, site in atlas.sites.items():
        assert list(site.fields) == list(same_batch[name]._fields)
        for parameter, f in site.fields.items():
            real = getattr(same_batch[name], parameter).numpy()
            assert np.array_equal(f.values.reshape(12, *f.values.shape[2:]), real)  # bit for bit
    one = hooked(unet, X, torch.tensor([999.0] * 3), torch.tensor([1, 1, 1]))
    for name, site in atlas.sites.items():
        for parameter, f in site.fields.items():
            real = getattr(one[name], parameter)[0].numpy()
            assert np.abs(f.values[2, atlas.class_index("dog")] - real).max() <= 1e-5 * np.abs(real).max()


@EACH_CONDITIONING
def test_fractions_equal_slow_decomposition(conditioning):
    atlas = Atlas.of(tiny_unet(conditioning=conditioning), LABELS, timesteps=7)
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
            s = variance_fractions(f)
            assert s.time + s.label + s.interaction == pytest.approx(1, abs=1e-9)
            assert (s.time, s.label, s.interaction) == pytest.approx(
                (time / whole, label / whole, both / whole), abs=1e-6
            )


def test_batched_statistics_are_equal(monkeypatch):
    unet = tiny_unet()
    whole = Atlas.of(unet, LABELS, timesteps=5)
    monkeypatch.setattr(atlas_module, "BATCH_ROWS", 3)
    subset = Atlas.of(unet, LABELS, timesteps=5, class_ids=[1])
    assert subset.classes == ["dog", "null"] and subset.num_classes == 3
    for name in whole.sites:
        a, b = whole.sites[name].fields["gamma"], subset.sites[name].fields["gamma"]
        assert b.values.shape[1] == 2 and np.allclose(b.values[:, 0], a.values[:, 1], atol=1e-6)
        assert variance_fractions(a)._asdict() == pytest.approx(variance_fractions(b)._asdict(), abs=1e-6)
    many = LabelSpace(tuple(map(str, range(100))))
    big = Atlas.of(tiny_unet(num_classes=100), many, timesteps=2)
    assert len(big.classes) == 64 and big.classes[-1] == "null" and big.num_classes == 100
    with pytest.raises(InputError, match="stores no values"):
        big.class_index("99")
    with pytest.raises(InputError, match=r"0\.\.2"):
        Atlas.of(unet, LABELS, class_ids=[3])


@EACH_CONDITIONING
def test_atlas_save_and_load(tmp_path, conditioning):
    atlas = Atlas.of(tiny_unet(conditioning=conditioning), LABELS, timesteps=3)
    atlas.model = {"source": "runs/x"}
    loaded = Atlas.load(atlas.save(tmp_path / "atlas.npz"))
    assert (loaded.classes, loaded.class_ids, loaded.model) == (atlas.classes, atlas.class_ids, atlas.model)
    for name, site in atlas.sites.items():
        assert loaded.sites[name].site == site.site
        assert (loaded.sites[name].weight is None) == (site.weight is None)
        for parameter, f in site.fields.items():
            assert np.array_equal(loaded.sites[name].fields[parameter].values, f.values)
            assert variance_fractions(loaded.sites[name].fields[parameter]) == variance_fractions(f)
    with np.load(tmp_path / "atlas.npz", allow_pickle=False) as plain:
        assert any(key.startswith("values/down.0") for key in plain)
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    with pytest.raises(InputError, match="not an atlas"):
        Atlas.load(tmp_path / "bad.npz")


@pytest.mark.parametrize("name", ["ddpm", "edm", "flow"])
def test_atlas_of_each_process(tmp_path, name):
    unet, process = tiny_unet(), make_process(DiffusionConfig(process=name, sigma_data=0.5 if name == "edm" else None))
    atlas = Atlas.of(unet, LABELS, timesteps=4, process=process)
    assert atlas.timesteps.tolist() == evenly_spread(process, 4) and (np.diff(atlas.sigma) > 0).all()
    site = unet.sites()[1].name
    expected = unet.modulation(torch.tensor([atlas.timesteps[2]], dtype=torch.float32), torch.tensor([1]))[site].gamma
    assert np.allclose(atlas.sites[site].fields["gamma"].values[2, 1], expected[0].detach().numpy(), atol=1e-5)
    loaded = Atlas.load(atlas.save(tmp_path / "atlas.npz"))
    assert loaded.process == name and np.array_equal(loaded.sigma, atlas.sigma)
    assert loaded.levels.words(1) == atlas.levels.words(1)
    if name == "ddpm":
        assert atlas.timesteps.tolist() == Atlas.of(unet, LABELS, timesteps=4).timesteps.tolist()
    else:
        with pytest.raises(InputError, match="differ in process"):
            drift(Atlas.of(unet, LABELS, timesteps=4), atlas)


def test_atlas_of_an_older_version_loads(tmp_path):
    """Without noise levels and without the name of the process."""
    file = Atlas.of(tiny_unet(), LABELS, timesteps=3).save(tmp_path / "atlas.npz")
    with np.load(file) as arrays:
        values = dict(arrays)
    header = json.loads(str(values.pop("atlas")))
    del header["process"]
    np.savez(tmp_path / "old.npz", atlas=json.dumps(header), **values)
    old = Atlas.load(tmp_path / "old.npz")
    assert "sigma" not in values and (old.sigma, old.process) == (None, "ddpm")
    assert old.levels.words(2) == "t = 999"


def test_atlas_without_classes():
    atlas = Atlas.of(tiny_unet(num_classes=None), LabelSpace(()), timesteps=4)
    s = variance_fractions(next(iter(atlas.sites.values())).fields["gamma"])
    assert s.time == pytest.approx(1) and s.label == s.interaction == 0
    assert class_geometry(atlas) is None


def test_old_atlas_names_warn():
    with pytest.warns(DeprecationWarning, match="class_ids"):
        atlas = Atlas.of(tiny_unet(), LABELS, timesteps=2, keep=[1])
    with pytest.warns(DeprecationWarning, match="class_index"):
        assert atlas.place("dog") == 0
    with pytest.warns(DeprecationWarning, match="class_ids"):
        assert atlas.kept_ids == atlas.class_ids == [1, 3]


# ---------------------------------------------------------------------- networks with known properties


def test_class_at_one_site_is_found():
    unet = tiny_unet()
    with torch.no_grad():  # the modulation is linear in silu(time + class): a site with weight 0 ignores the class
        class_site = unet.sites()[2].name
        for name, rows in unet.projection_slices().items():
            if name != class_site:
                unet.projection.weight[rows] = 0
    atlas = Atlas.of(unet, LABELS, timesteps=5)
    assert [n for n, s in atlas.sites.items() if variance_fractions(s.fields["gamma"]) is not None] == [class_site]
    assert variance_fractions(atlas.sites[class_site].fields["beta"]).label > 0.01


def test_constant_embeddings_have_zero_fractions():
    unet = tiny_unet()
    with torch.no_grad():
        unet.embedding.time[0].weight.zero_()
    for site in Atlas.of(unet, LABELS, timesteps=5).sites.values():
        s = variance_fractions(site.fields["gamma"])
        assert s.time == s.interaction == 0 and s.label == pytest.approx(1)
    for site in Atlas.of(tiny_unet(conditioning="none"), LABELS, timesteps=5).sites.values():
        s = variance_fractions(site.fields["gamma"])
        assert s.label == s.interaction == 0 and s.time == pytest.approx(1)


def test_equal_class_vectors_have_zero_distance():
    unet = tiny_unet()
    with torch.no_grad():
        unet.embedding.classes.weight[2] = unet.embedding.classes.weight[0]
    geometry = class_geometry(Atlas.of(unet, LABELS, timesteps=4))
    assert geometry.distance[0, 2] == 0 and geometry.cosine[0, 2] == pytest.approx(1)
    assert geometry.nearest == ["eel", "cat", "cat"] or (geometry.nearest[0] == "eel" and geometry.nearest[2] == "cat")
    assert geometry.distance[0, 1] > 0 and geometry.null_distance > 0


def test_gain_and_shift_equal_the_norm():
    unet = tiny_unet()
    atlas = Atlas.of(unet, LABELS, timesteps=[500])
    name = unet.sites()[1].name
    gain, shift = gain_and_shift(atlas.sites[name])
    h = torch.randn(1, atlas.sites[name].site.channels, 4, 4)
    norm = unet.get_submodule(name)
    params = unet.modulation(500, 1)[name]
    bare = torch.nn.functional.group_norm(h, norm.num_groups, eps=norm.eps)
    expected = norm(h, params)
    actual = bare * torch.tensor(gain[0, 1])[None, :, None, None] + torch.tensor(shift[0, 1])[None, :, None, None]
    assert torch.allclose(expected, actual.float(), atol=1e-5)
    with pytest.raises(InputError, match="neither gamma nor beta"):
        gain_and_shift(next(iter(Atlas.of(tiny_unet(conditioning="additive"), LABELS, timesteps=2).sites.values())))


def test_unusual_channels_are_counted():
    atlas = Atlas.of(tiny_unet(), LABELS, timesteps=4)
    site = next(iter(atlas.sites.values()))
    site.weight, site.bias = np.ones(site.site.channels), np.zeros(site.site.channels)
    gamma, beta = site.fields["gamma"].values, site.fields["beta"].values
    rng = np.random.default_rng(0)
    gamma[:], beta[:] = rng.uniform(0.1, 0.5, gamma.shape), rng.uniform(0.1, 0.5, beta.shape)
    gamma[..., 0] = -1  # silenced: no gain
    gamma[0, 0, 1] = -3  # flipped: its sign changes once
    gamma[..., 2], beta[..., 2] = 0.2, 0.1  # constant
    counts = count_channels(site)
    assert (counts.silenced, counts.flipped, counts.constant, counts.total) == (1, 1, 1, site.site.channels)


def test_drift_of_scaled_network():
    unet = tiny_unet()
    before = Atlas.of(unet, LABELS, timesteps=3)
    assert all(v == 0 for d in drift(before, before).values() for v in d.values())
    with torch.no_grad():
        unet.projection.weight *= 1.5
        unet.projection.bias *= 1.5
    moved = drift(before, Atlas.of(unet, LABELS, timesteps=3))
    assert all(v == pytest.approx(0.5, rel=1e-4) for d in moved.values() for v in d.values())
    with pytest.raises(InputError, match="differ in timesteps"):
        drift(before, Atlas.of(unet, LABELS, timesteps=4))
