"""The report: a self-contained page, sentences for models with known properties, sentences for given numbers."""

import re
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from PIL import Image

from diffusion_adagn import LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_process
from diffusion_adagn.evaluation.label_usage import LabelUse
from diffusion_adagn.models.conditioning import CONDITIONING
from diffusion_adagn.models.unet import Site
from diffusion_adagn.render.report import Shown, Table
from diffusion_adagn.render.text import plus_minus
from diffusion_adagn.sampling.guidance import Interval
from diffusion_adagn.trace import sentences as say
from diffusion_adagn.trace.analysis import (
    ClassGeometry,
    Variance,
    class_geometry,
    class_spread,
    count_channels,
    drift,
    short_names,
    time_shift,
    variance,
    variance_fractions,
)
from diffusion_adagn.trace.atlas import Atlas
from diffusion_adagn.trace.levels import NoiseLevels, evenly_spread, short
from diffusion_adagn.trace.probes import Influence, Sensitivity
from diffusion_adagn.trace.report import TraceReport, TraceResults, write_report

LABELS = LabelSpace(("cat", "dog", "eel"))
DDPM = make_process(DiffusionConfig())
EDM, FLOW = (make_process(DiffusionConfig(process=p, sigma_data=s)) for p, s in (("edm", 0.5), ("flow", None)))
NASTY = ("<script>alert('&')</script>", "x" * 200, "日本語 \u202e\ud800 \x07")


def atlas_of(labels=LABELS, change=None, process=DDPM, **settings):
    unet = tiny_unet(num_classes=labels.K or None, **settings)
    with torch.no_grad():
        if change:
            change(unet)
    return Atlas.of(unet, labels, timesteps=6, process=process)


def levels_at(*timesteps: int) -> NoiseLevels:
    return NoiseLevels.of(DDPM, timesteps)


def losses(gap: float, noise: float = 0.01, n: int = 400) -> LabelUse:
    """Held-out losses that are higher by `gap` under a wrong label, and by half of it under null."""
    rng = torch.Generator().manual_seed(0)
    true, spread = torch.rand(n, generator=rng).double(), noise * torch.randn(n, generator=rng).double()
    quantile = torch.arange(n).double() / n
    return LabelUse(quantile, torch.arange(n) % 50, true, true + gap + spread, true + gap / 2 + spread)


def made_up_results(atlas: Atlas, process=DDPM, **changes) -> TraceResults:
    """Results with every part, with invented numbers."""
    sites, levels = list(atlas.sites), NoiseLevels.of(process, evenly_spread(process, 5))
    rng = np.random.default_rng(0)
    bump = np.array([0.1, 0.6, 1.0, 0.6, 0.1])
    parts = {
        "title": "runs/digits",
        "description": "EMA weights of runs/digits after 400 steps",
        "atlas": atlas,
        "influence": [Influence(i, sites, levels, rng.random((len(sites), 5)), bump.copy()) for i in ("swap", "null")],
        "sensitivity": Sensitivity(levels, bump, bump / 2, "null"),
        "label_use": losses(0.1),
        "process": process,
        "mixing": (["cat", "cat coarse, dog fine"], [[np.full((8, 8, 1), v, np.uint8)] * 3 for v in (10, 200)]),
        "drift": drift(atlas, atlas),
        "next_commands": ["adagn sample runs/digits --classes 'a&b'"],
    }
    return TraceResults(**(parts | changes))


class Page(HTMLParser):
    """Parses a page: open tags, attributes, tags and headings."""

    EMPTY = frozenset({"meta", "img", "image", "br"})

    def __init__(self, text: str):
        super().__init__()
        self.open, self.attributes, self.tags, self.headings = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def section_of(results: TraceResults, heading: str):
    return next(s for s in TraceReport(results).sections() if s.heading == heading)


def sentence_of(results: TraceResults, heading: str) -> str:
    return next(part for part in section_of(results, heading).parts if isinstance(part, str))


def table_of(results: TraceResults, heading: str) -> dict[str, dict[str, str]]:
    """{first cell of a row: {head: cell}} of the table below a heading."""
    table = next(part for part in section_of(results, heading).parts if isinstance(part, Table))
    return {row[0]: dict(zip(table.head, row)) for row in table.rows}


def figure_of(results: TraceResults, heading: str):
    return next(part.drawn for part in section_of(results, heading).parts if isinstance(part, Shown))


def texts_of(figure) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


WHERE, FOLLOWS, SPREAD = "Where time and class enter", "What each site follows", "Class against time"
CLASSES, INFLUENCE, MATTERS = (
    "Distances between classes",
    "Influence of each site on the image",
    "When the label matters",
)


# ---------------------------------------------------------------------- the page


def test_page_is_self_contained(tmp_path):
    files = write_report(made_up_results(atlas_of()), tmp_path / "new" / "folder")
    names = ["map", "shares", "spread", "classes", "influence", "sensitivity", "label_use", "mixing", "drift"]
    both = [f"{name}.{kind}" for name in names for kind in ("png", "svg") if (name, kind) != ("mixing", "svg")]
    assert [f.name for f in files] == ["report.html", *both]
    text = files[0].read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"https?:|url\(|@import", text)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert len(links) == len(names) and all(
        value.startswith(("data:image/png;", "data:image/svg+xml;")) for value in links
    )
    for file in (f for f in files if f.suffix == ".png"):
        with Image.open(file) as image:
            assert image.size[0] > 200 and len(image.convert("L").getcolors()) > 1
    assert page.headings == [
        WHERE, FOLLOWS, SPREAD, "Channels", CLASSES, INFLUENCE, MATTERS, "When the label is used", "Classes mixed",
        "What moved between the checkpoints", "What to type next",
    ]  # fmt: skip


def test_same_results_give_same_files(tmp_path):
    atlas = atlas_of()
    once, again = (write_report(made_up_results(atlas), tmp_path / name) for name in ("a", "b"))
    assert len(once) > 10 and [f.read_bytes() for f in once] == [f.read_bytes() for f in again]


def test_unmeasured_sections_are_skipped(tmp_path):
    files = write_report(TraceResults("a", "b", atlas_of(conditioning="additive")), tmp_path)
    assert [f.name for f in files if f.suffix == ".png"] == ["map.png", "shares.png", "spread.png", "classes.png"]
    assert Page(files[0].read_text(encoding="utf-8")).headings == [WHERE, FOLLOWS, SPREAD, CLASSES]


def test_names_are_escaped(tmp_path):
    atlas = atlas_of()
    atlas.classes = [*NASTY, "null"]
    one_cell = [np.zeros((8, 8, 3), np.uint8)]
    mixing = (list(NASTY), [one_cell] * 3)
    results = made_up_results(atlas, title=NASTY[0] * 9, description=NASTY[2], mixing=mixing, next_commands=list(NASTY))
    text = write_report(results, tmp_path)[0].read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and "script" not in page.tags
    assert "&lt;script&gt;" in text and "\u202e" not in text and "\x07" not in text


@pytest.mark.parametrize(
    "conditioning",
    [k if k in ("adagn", "none", "cross_attention") else pytest.param(k, marks=pytest.mark.slow) for k in CONDITIONING],
)
def test_each_conditioning_has_a_report(tmp_path, conditioning):
    results = TraceResults("a", "b", atlas_of(conditioning=conditioning, modulate_both_norms=True))
    assert len(write_report(results, tmp_path)) >= 4
    followed = table_of(results, FOLLOWS)
    if conditioning == "none":
        assert sentence_of(results, WHERE).startswith("No modulation depends on the class")
    if conditioning == "cross_attention":
        assert followed["shift"]["time"] == "100%" and followed["values"]["class"] == "100%"


def test_reports_with_zero_and_one_class(tmp_path):
    for names, verdict in (((), "This network has no classes"), (("cat",), "The label is used")):
        results = made_up_results(atlas_of(LabelSpace(names)), influence=[])
        if not names:
            results.label_use = results.sensitivity = None
        assert write_report(results, tmp_path)
        assert TraceReport(results).report().title.startswith(verdict)
        assert "to compare" in sentence_of(results, WHERE) and "to compare" in sentence_of(results, CLASSES)


@pytest.mark.slow
def test_large_report_is_below_2_megabytes(tmp_path):
    labels = LabelSpace(tuple(f"a class with a long name, number {i}" for i in range(64)))
    unet = tiny_unet(num_classes=64, num_res_blocks=23, modulate_both_norms=True, model_channels=8, num_head_channels=8)
    atlas = Atlas.of(unet, labels, timesteps=50)
    assert len(atlas.sites) >= 100
    t = list(range(0, 1000, 20))
    change = np.random.default_rng(0).random((len(atlas.sites), 50))
    influence = [
        Influence(i, list(atlas.sites), NoiseLevels.of(DDPM, t), change, change[0]) for i in ("swap", "null", "freeze")
    ]
    page = write_report(made_up_results(atlas, influence=influence), tmp_path)[0]
    assert page.stat().st_size < 2e6


@pytest.mark.parametrize("process", [DDPM, EDM, FLOW], ids=lambda p: p.name)
def test_noise_levels_are_the_axis_of_each_process(process):
    results = made_up_results(atlas_of(process=process), process)
    for heading in (SPREAD, INFLUENCE, MATTERS, "When the label is used"):
        texts = " ".join(texts_of(figure_of(results, heading)))
        assert "noise level sigma" in texts
        assert ("timestep t" in texts) == (process.name != "edm")
    sentence = sentence_of(results, MATTERS)
    assert "sigma = " in sentence and ("t = " in sentence) == (process.name != "edm")
    low, high = results.sensitivity.band()
    text = re.search(r"--interval (sigma:\S+)\)", sentence)[1]
    interval = Interval.parse(text)  # of three digits, and not narrower
    assert 0.99 * low < interval.low <= low * (1 + 1e-6) < high * (1 - 1e-6) <= interval.high < 1.01 * high


def test_ticks_are_measured_levels():
    results = made_up_results(atlas_of())
    levels = results.sensitivity.levels
    ax = figure_of(results, MATTERS).axes[0]
    found = dict(zip(ax.get_xticks(), (label.get_text() for label in ax.get_xticklabels())))
    assert found and all(
        found[p] == f"{short(s)}\n{short(t)}"
        for p, s, t in zip(levels.places, levels.sigmas, levels.times)
        if p in found
    )


def test_atlas_without_a_process_is_drawn_over_t():
    results = TraceResults("a", "b", Atlas.of(tiny_unet(), LABELS, timesteps=6))
    texts = texts_of(figure_of(results, SPREAD))
    assert "timestep t" in texts and "999" in texts
    assert "sigma" not in " ".join([*texts, *(row["at noise level"] for row in table_of(results, SPREAD).values())])


# ---------------------------------------------------------------------- the charts show the numbers


def test_map_shows_class_fractions():
    atlas = atlas_of()
    results, texts = TraceResults("a", "b", atlas), texts_of(figure_of(TraceResults("a", "b", atlas), WHERE))
    for site in atlas.sites.values():
        v = sum((np.array(variance(f)) for f in site.fields.values()), np.zeros(3))
        assert f"{(v[1] + v[2]) / v.sum():.0%}" in texts and f"{site.site.channels} ch" in texts
    rows = table_of(results, WHERE)
    gamma = {}
    for site in atlas.sites.values():
        gamma.setdefault(f"{site.site.resolution}x{site.site.resolution}", []).append(
            variance(site.fields["gamma"]).classes
        )
    total = sum(map(sum, gamma.values()))
    for side, parts in gamma.items():
        shown = [
            float(row["between-class variance"].rstrip("%"))
            for name, row in rows.items()
            if name.startswith(f"{side} ")
        ]
        assert sum(shown) == pytest.approx(100 * sum(parts) / total, abs=1.6)


def test_bars_and_heat_maps_show_the_values():
    atlas = atlas_of()
    results = made_up_results(atlas)
    axes = figure_of(results, FOLLOWS).axes
    for ax, name in zip(axes, ("gamma", "beta")):
        for i, site in enumerate(atlas.sites.values()):
            v = variance(site.fields[name])
            assert [bars[i].get_height() for bars in ax.containers] == pytest.approx([part / v.total for part in v])
    meshes = [c for ax in figure_of(results, INFLUENCE).axes for c in ax.collections if hasattr(c, "get_coordinates")]
    meshes = [mesh for mesh in meshes if mesh.get_array().size == results.influence[0].change.size]
    assert len(meshes) == 2 and len({mesh.get_clim() for mesh in meshes}) == 1  # one range of colours
    for mesh, influence in zip(meshes, results.influence):
        assert np.allclose(np.asarray(mesh.get_array()).ravel(), influence.change.ravel())
    results.influence[1].all_sites[2] = 9.0  # a later panel has the largest value
    lines = [ax for ax in figure_of(results, INFLUENCE).axes if ax.lines]
    assert [list(ax.lines[0].get_ydata()) for ax in lines] == [list(i.all_sites) for i in results.influence]
    assert all(ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 9 for ax in lines)
    image = figure_of(results, CLASSES).axes[0].images[0]
    assert np.allclose(image.get_array(), class_geometry(atlas).cosine) and image.get_clim() == (-1, 1)


def test_curves_and_band_show_the_sensitivity():
    results = made_up_results(atlas_of())
    first, second = (ax.lines[0].get_ydata() for ax in figure_of(results, MATTERS).axes[:2])
    assert np.allclose(first, results.sensitivity.x0) and np.allclose(second, results.sensitivity.prediction)
    assert "candidate: sigma = 0.958 to 17.2 (t = 250 to 749)" in texts_of(figure_of(results, MATTERS))
    results.label_use = losses(0.0)
    assert not [text for text in texts_of(figure_of(results, MATTERS)) if "candidate" in text]


def test_label_use_table_equals_the_gaps():
    results = made_up_results(atlas_of(), label_use=losses(0.1))
    rows = list(table_of(results, "When the label is used").values())
    ax = figure_of(results, "When the label is used").axes[0]
    for i, (a, row) in enumerate(zip(np.linspace(0, 1, 9), rows, strict=False)):
        mean, half = results.label_use.gap("wrong", a, a + 1 / 8)
        assert row["wrong label minus true label"] == plus_minus(mean, half)
        assert ax.containers[0].lines[0].get_ydata()[i] == pytest.approx(mean)
        low, high = ax.containers[0].lines[2][0].get_segments()[i][:, 1]
        assert (high - low) / 2 == pytest.approx(half)


# ---------------------------------------------------------------------- models with known properties


def class_at_one_site(unet):
    """Zero the class part of the projection of every site but the third."""
    rows = unet.projection_slices()
    for name in [n for i, n in enumerate(rows) if i != 2]:
        unet.projection.weight[rows[name], unet.embedding.class_dim :] = 0


def test_class_at_one_site_is_reported():
    atlas = atlas_of(change=class_at_one_site, join="concat")
    site = list(atlas.sites.values())[2].site
    words = f"Class enters at one site of {len(atlas.sites)} alone: {short_names(list(atlas.sites))[site.name]} "
    assert sentence_of(TraceResults("a", "b", atlas), WHERE).startswith(words)


def test_constant_time_is_reported():
    results = TraceResults("a", "b", atlas_of(change=lambda u: u.embedding.time[2].weight.zero_()))
    assert [row["class"] for row in table_of(results, FOLLOWS).values()] == ["100%", "100%"]
    assert table_of(results, SPREAD)["time"]["RMS, at most"] == "0"


def test_equal_classes_are_reported():
    def equal(unet, rows=slice(0, 3)):
        unet.embedding.classes.weight[rows] = unet.embedding.classes.weight[0].clone()

    results = TraceResults("a", "b", atlas_of(change=equal))
    assert TraceReport(results).verdict() == (
        "unused", "The label is not used.", "The modulation does not depend on the class."
    )  # fmt: skip
    assert sentence_of(results, WHERE).startswith("No modulation depends on the class")
    assert sentence_of(results, CLASSES).startswith("All 3 classes have the same modulation")
    pair = TraceResults("a", "b", atlas_of(change=lambda u: equal(u, slice(0, 2))))
    assert sentence_of(pair, CLASSES) == "These classes have the same modulation: cat and dog."


def test_zero_projection_is_reported():
    results = TraceResults(
        "a", "b", atlas_of(change=lambda u: (u.projection.weight.zero_(), u.projection.bias.zero_()))
    )
    assert sentence_of(results, WHERE).startswith("Nothing varies")
    assert table_of(results, FOLLOWS)["gamma"]["time"] == "none"
    assert " none" in texts_of(figure_of(results, FOLLOWS))


def test_used_and_unused_labels_differ(tmp_path):
    trained, untrained = (
        made_up_results(
            atlas_of(), label_use=losses(gap), sensitivity=Sensitivity(levels_at(0, 400, 600, 999), x0, x0, "null")
        )
        for gap, x0 in ((0.1, np.array([0, 0.3, 0.2, 0.1])), (0.0, np.zeros(4)))
    )
    used, unused = (write_report(f, tmp_path / n)[0].read_text() for f, n in ((trained, "a"), (untrained, "b")))
    assert '<h1 class="used">The label is used.</h1>' in used and "candidate" in used.split("<details>")[0]
    assert '<h1 class="unused">The label is NOT measurably used.</h1>' in unused
    assert "candidate" not in unused.split("<details>")[0]


# ---------------------------------------------------------------------- sentences for given numbers


@pytest.mark.parametrize(
    ("gap", "noise", "state", "words"),
    [
        (0.1, 0.01, "used", "The label is used."),
        (-0.1, 0.01, "unused", "The label MISLEADS."),
        (0.0, 0.01, "unused", "The label is NOT measurably used."),
        (0.0, 0.0, "unused", "The label is NOT used."),
    ],
)
def test_only_losses_decide_whether_the_label_is_used(gap, noise, state, words):
    use = losses(gap, noise)
    if gap == 0.1:
        use = LabelUse(use.quantile, use.image, use.true, use.wrong + 0.1 - (use.wrong - use.true).mean(), None)
    got, headline, numbers = say.verdict(use, None, 1.0, 3)
    assert (got, headline) == (state, words)
    if noise:
        mean, half = use.gap("wrong")
        assert (
            f"50 held-out images is {mean:+.4f}" in numbers and f"{mean - half:+.4f} to {mean + half:+.4f}" in numbers
        )


def test_verdict_without_images_is_open():
    state, *sentences = say.verdict(None, Sensitivity(levels_at(0), np.array([0.25]), np.array([1.0]), "null"), 1.0, 3)
    assert state == "open" and "held-out images are needed" in sentences[0] and "0.25" in sentences[1]
    assert say.verdict(None, None, 1.0, 3)[0] == "open"
    assert say.verdict(None, None, 0.0, 3)[0] == "unused"
    one = torch.zeros(1).double()
    assert "cannot be decided" in say.verdict(LabelUse(one, one.long(), one, one + 1, None), None, 1.0, 3)[1]
    assert "of one class" in say.verdict(LabelUse(one, one.long(), one, None, None), None, 1.0, 1)[2]


def sites_with_variances(**variances):
    """Sites such as up8=(time, label, interaction) with 10 channels, and their short names."""
    results = []
    for i, (word, v) in enumerate(variances.items()):
        way, side = re.match(r"([a-z]+)(\d+)", word).groups()
        results.append((Site(f"{way}.0.stages.{i}.block.norm2", int(side), 10, i), Variance(*v)))
    return results, short_names([s.name for s, _ in results])


@pytest.mark.parametrize(
    ("variance_parts", "words"),
    [
        (
            {"down32": (9, 0.2, 0), "middle8": (1, 1, 0), "up8": (1, 6, 1), "up32": (10, 0.8, 0)},
            "Class enters mostly at 8x8 in the decoder (78% of all between-class variance of gamma, on 25% of the channels).",
        ),
        ({"down8": (1, 4, 0), "up8": (1, 4, 0), "up32": (5, 2, 0)}, "Class enters mostly at 8x8 (80% of all"),
        (
            {"down8": (1, 3, 0), "down16": (1, 1, 0), "up16": (1, 2, 0), "up32": (1, 2, 0), "up64": (1, 1, 0)},
            "in many places, the most",
        ),
        ({"down8": (1, 1, 0), "up8": (1, 1.1, 0)}, "Class enters everywhere alike"),
        ({"down8": (1, 0, 0), "up8": (0, 2, 0)}, "one site of 2 alone: up 0.1 (8x8 in the decoder)"),
        (
            {"down8": (1, 0, 0), "up8": (2, 0, 0)},
            "No modulation depends on the class: gamma follows time alone",
        ),
        ({"down8": (0, 0, 0), "up8": (0, 0, 0)}, "Nothing varies"),
    ],
)
def test_class_entry_sentences(variance_parts, words):
    sites, short = sites_with_variances(**variance_parts)
    assert words in say.class_entry("gamma", sites, 3, short)


def test_geometry_sentences():
    def geometry(vectors, null=None):
        v = np.array(vectors, float)
        away = v - v.mean(0)
        length = np.linalg.norm(away, axis=1)
        apart = np.linalg.norm(away[:, None] - away[None], axis=-1)
        names = [f"c{i}" for i in range(len(v))]
        return ClassGeometry(names, away @ away.T / np.outer(length, length), apart, names, null)

    twins = say.describe_geometry(geometry([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]], 2.5), 1.0, 1000)
    assert twins == "Of the 4 classes stored (of 1,000): These classes have the same modulation: c2 and c3."
    kin = say.describe_geometry(geometry([[5, 0, 0], [4.5, 1, 0], [-5, 0, 0], [0, 0, 3]]), 1.0, 4)
    assert kin.startswith("c0 and c1 are the most alike (cosine +0.9")


def test_influence_table():
    atlas = atlas_of()
    sites, change = list(atlas.sites), np.zeros((len(atlas.sites), 2))
    change[1, 1], change[0, 0] = 0.2, 0.1
    one = Influence("null", sites, levels_at(0, 500), change, np.array([0.1, 0.4]))
    row = table_of(TraceResults("a", "b", atlas, influence=[one]), INFLUENCE)["given the null label"]
    site = atlas.sites[sites[1]].site
    assert row == {
        "a site is": "given the null label",
        "x0 moves at most": "0.2",
        "by site": f"{site.resolution}x{site.resolution} {short_names(sites)[sites[1]]}",
        "at noise level": "sigma = 3.44, t = 500",
        "by all sites at once": "0.4 (sigma = 3.44, t = 500)",
        "without effect": f"{len(sites) - 2} of {len(sites)}",
    }


def test_band_sentences():
    def band(*x0, unused=False):
        return say.guidance_band(Sensitivity(levels_at(0, 250, 500, 750), np.array(x0), np.ones(4), "null"), unused)

    found = band(0.1, 0.3, 0.4, 0.1)
    assert (
        "over sigma = 0.958 to 3.44 (t = 250 to 500): a candidate band for guidance (--interval sigma:0.958-3.45)"
        in found
    )
    assert "nothing for guidance to amplify" in band(0, 0, 0, 0)
    assert all("no band of noise levels stands out" in band(*x0) for x0 in ((3, 3, 3.1, 3), (3, 5, 5, 3), (0, 0, 1, 0)))
    assert "candidate" not in band(0.1, 0.3, 0.4, 0.1, unused=True)


def test_channel_mixing_and_drift_tables():
    atlas = atlas_of()
    cells = [[np.full((4, 4, 1), v, np.uint8)] for v in (0, 10, 200)]
    names = list(atlas.sites)
    moved = {names[0]: {"gamma": 0.5, "beta": 0.0}, names[1]: {"gamma": 0.01, "beta": 0.2}}
    results = made_up_results(atlas, mixing=(["a", "b", "c"], cells), drift=moved)
    counts = [count_channels(site) for site in atlas.sites.values()]
    total = table_of(results, "Channels")["all sites"]
    assert total["channels"] == f"{sum(c.total for c in counts):,}"
    assert (
        total["flipped"] == f"{sum(c.flipped for c in counts):,}"
        and total["constant"] == f"{sum(c.constant for c in counts):,}"
    )
    mixed = next(part for part in section_of(results, "Classes mixed").parts if isinstance(part, Table))
    assert mixed.rows == [["a", "b", "10"], ["a", "c", "200"], ["b", "c", "190"]]
    drifted = table_of(results, "What moved between the checkpoints")
    assert drifted["gamma"]["largest at"].endswith("(50%)") and drifted["gamma"]["smallest at"].endswith("(1.0%)")
    assert drifted["gamma"]["median"] == "26%" and drifted["beta"]["largest at"].endswith("(20%)")


# ---------------------------------------------------------------------- numbers and shapes


def test_variance_equals_numpy():
    atlas = atlas_of()
    for site in atlas.sites.values():
        f = site.fields["gamma"]
        x = f.values[:, :3].astype(float)  # without null
        v = variance(f)
        assert v.total == pytest.approx(x.var(axis=(0, 1)).sum(), rel=1e-9)
        assert v.time == pytest.approx(x.mean(1).var(0).sum(), rel=1e-9)
        assert v.classes == pytest.approx(x.var(1).mean(0).sum(), rel=1e-9)
        assert v.class_fraction == pytest.approx(1 - variance_fractions(f).time)
    gamma = [s.fields["gamma"].values[:, :3].astype(float) for s in atlas.sites.values()]
    assert np.allclose(class_spread(atlas, "gamma"), [np.sqrt(g.var(1).mean(-1)) for g in gamma])
    away = [np.sqrt(np.square(g.mean(1) - g.mean((0, 1))).mean(-1)) for g in gamma]
    assert np.allclose(time_shift(atlas, "gamma"), away)


def test_short_names_are_unique():
    names = list(atlas_of(modulate_both_norms=True, resblock_updown=True).sites)
    short = short_names(names)
    assert len(set(short.values())) == len(names) and max(map(len, short.values())) <= 10
    assert short_names(["up.1.stages.0.block.norm2", "odd"]) == {"up.1.stages.0.block.norm2": "up 1.0", "odd": "odd"}


def test_thresholds_are_explained(tmp_path):
    text = unescape(write_report(TraceResults("a", "b", atlas_of()), tmp_path)[0].read_text()).split("<details>")[1]
    for share in (say.MOSTLY, say.BAND):
        assert f"{share:.0%}" in text
    for value in (say.EVEN, say.SAME_CLASS_DISTANCE):
        assert f"{value:g}" in text
