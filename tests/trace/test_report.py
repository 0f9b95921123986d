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
from diffusion_adagn.evaluation.label_usage import LabelUse
from diffusion_adagn.models.conditioning import CONDITIONING
from diffusion_adagn.models.unet import Site
from diffusion_adagn.trace import sentences as say
from diffusion_adagn.trace.analysis import (
    ChannelCounts,
    ClassGeometry,
    Variance,
    class_spread,
    drift,
    short_names,
    time_shift,
    variance,
    variance_fractions,
)
from diffusion_adagn.trace.atlas import Atlas
from diffusion_adagn.trace.drawing import Drawing, diverging, sequential
from diffusion_adagn.trace.plots import ticks
from diffusion_adagn.trace.probes import Influence, Sensitivity
from diffusion_adagn.trace.report import TraceReport, TraceResults, write_report

LABELS = LabelSpace(("cat", "dog", "eel"))
NASTY = ("<script>alert('&')</script>", "x" * 200, "日本語 \u202e\ud800 \x07")


def atlas_of(labels=LABELS, change=None, **settings):
    unet = tiny_unet(num_classes=labels.K or None, **settings)
    with torch.no_grad():
        if change:
            change(unet)
    return Atlas.of(unet, labels, timesteps=6)


def losses(gap: float, noise: float = 0.01, n: int = 400) -> LabelUse:
    """Held-out losses that are higher by `gap` under a wrong label, and by half of it under null."""
    rng = torch.Generator().manual_seed(0)
    true, spread = torch.rand(n, generator=rng).double(), noise * torch.randn(n, generator=rng).double()
    quantile = torch.arange(n).double() / n
    return LabelUse(quantile, torch.arange(n) % 50, true, true + gap + spread, true + gap / 2 + spread)


def made_up_results(atlas: Atlas, **changes) -> TraceResults:
    """Results with every part, with invented numbers."""
    sites, t = list(atlas.sites), [20, 300, 500, 700, 980]
    rng = np.random.default_rng(0)
    bump = np.array([0.1, 0.6, 1.0, 0.6, 0.1])
    parts = {
        "title": "runs/digits",
        "description": "EMA weights of runs/digits after 400 steps",
        "atlas": atlas,
        "influence": [Influence(i, sites, t, rng.random((len(sites), 5)), bump) for i in ("swap", "null")],
        "sensitivity": Sensitivity(t, bump, bump / 2, "null"),
        "label_use": losses(0.1),
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


def report_sentences(results: TraceResults) -> list[str]:
    report = TraceReport(results)
    return [report.verdict()[1], *(s.sentence for s in report.sections())]


# ---------------------------------------------------------------------- the page


def test_page_is_self_contained(tmp_path):
    files = write_report(made_up_results(atlas_of()), tmp_path / "new" / "folder")
    assert [f.name for f in files] == [
        "report.html", "map.png", "shares.png", "spread.png", "classes.png", "influence.png", "sensitivity.png", "label_use.png",
        "mixing.png", "drift.png",
    ]  # fmt: skip
    text = files[0].read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"https?:|url\(|@import", text)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert links and all(value.startswith("data:image/png;base64,") for value in links)
    for file in files[1:]:
        with Image.open(file) as image:
            assert image.size[0] > 300 and len(image.convert("L").getcolors()) > 1
    assert page.headings == [
        "Where time and class enter", "What each site follows", "Class against time", "Channels", "Distances between classes",
        "Influence of each site on the image", "When the label matters", "When the label is used", "Classes mixed",
        "What moved between the checkpoints", "What to type next",
    ]  # fmt: skip


def test_unmeasured_sections_are_skipped(tmp_path):
    files = write_report(TraceResults("a", "b", atlas_of(conditioning="additive")), tmp_path)
    assert [f.name for f in files] == ["report.html", "map.png", "shares.png", "spread.png", "classes.png"]
    page = Page(files[0].read_text(encoding="utf-8"))
    assert page.headings == [
        "Where time and class enter",
        "What each site follows",
        "Class against time",
        "Distances between classes",
    ]


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


@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_each_conditioning_has_a_report(tmp_path, conditioning):
    atlas = atlas_of(conditioning=conditioning, modulate_both_norms=True)
    assert len(write_report(TraceResults("a", "b", atlas), tmp_path)) >= 4
    entered, followed = report_sentences(TraceResults("a", "b", atlas))[1:3]
    if conditioning == "none":
        assert entered.startswith("No modulation depends on the class")
    if conditioning == "cross_attention":
        assert "shift: time alone" in followed and "values: class alone" in followed
        assert (
            entered.endswith("(the class is all of the variance of values there).") or "Time does not change" in entered
        )


def test_reports_with_zero_and_one_class(tmp_path):
    for names, verdict in (((), "This network has no classes"), (("cat",), "The label is used")):
        results = made_up_results(atlas_of(LabelSpace(names)), influence=[])
        if not names:
            results.label_use = results.sensitivity = None
        assert write_report(results, tmp_path)
        assert report_sentences(results)[0].startswith(verdict)
        assert any("to compare" in s for s in report_sentences(results))


@pytest.mark.slow
def test_large_report_is_below_2_megabytes(tmp_path):
    labels = LabelSpace(tuple(f"a class with a long name, number {i}" for i in range(64)))
    unet = tiny_unet(num_classes=64, num_res_blocks=23, modulate_both_norms=True, model_channels=8, num_head_channels=8)
    atlas = Atlas.of(unet, labels, timesteps=50)
    assert len(atlas.sites) >= 100
    t = list(range(0, 1000, 20))
    change = np.random.default_rng(0).random((len(atlas.sites), 50))
    influence = [Influence(i, list(atlas.sites), t, change, change[0]) for i in ("swap", "null", "freeze")]
    page = write_report(made_up_results(atlas, influence=influence), tmp_path)[0]
    assert page.stat().st_size < 2e6


# ---------------------------------------------------------------------- models with known properties


def class_at_one_site(unet):
    """Zero the class part of the projection of every site but the third."""
    rows = unet.projection_slices()
    for name in [n for i, n in enumerate(rows) if i != 2]:
        unet.projection.weight[rows[name], unet.embedding.class_dim :] = 0


def test_class_at_one_site_is_reported():
    atlas = atlas_of(change=class_at_one_site, join="concat")
    sentence = report_sentences(TraceResults("a", "b", atlas))[1]
    site = list(atlas.sites.values())[2].site
    assert f"Class enters at one site alone: {short_names(list(atlas.sites))[site.name]}" in sentence
    assert f"{len(atlas.sites) - 1} other sites do not receive it" in sentence


def test_constant_time_is_reported():
    atlas = atlas_of(change=lambda u: u.embedding.time[2].weight.zero_())
    sentences = report_sentences(TraceResults("a", "b", atlas))
    assert "Time does not change gamma" in sentences[1]
    assert "gamma: class alone; of beta: class alone" in sentences[2]
    assert "time does not move" in sentences[3].lower()


def test_equal_classes_are_reported():
    def equal(unet, rows=slice(0, 3)):
        unet.embedding.classes.weight[rows] = unet.embedding.classes.weight[0].clone()

    sentences = report_sentences(TraceResults("a", "b", atlas_of(change=equal)))
    assert sentences[0] == "The label is not used. The modulation does not depend on the class."
    assert sentences[1].startswith("No modulation depends on the class")
    assert sentences[5].startswith("All 3 classes have the same modulation")
    pair = report_sentences(TraceResults("a", "b", atlas_of(change=lambda u: equal(u, slice(0, 2)))))
    assert pair[5].startswith("Two classes have the same modulation: cat and dog (distance 0)")


def test_zero_projection_is_reported(tmp_path):
    results = TraceResults(
        "a", "b", atlas_of(change=lambda u: (u.projection.weight.zero_(), u.projection.bias.zero_()))
    )
    sentences = report_sentences(results)
    assert sentences[1].startswith("Nothing varies") and "gamma: none" in sentences[2]
    assert ">none</text>" in write_report(results, tmp_path)[0].read_text()


def test_used_and_unused_labels_differ(tmp_path):
    trained, untrained = (
        made_up_results(atlas_of(), label_use=losses(gap), sensitivity=Sensitivity([0, 400, 600, 999], x0, x0, "null"))
        for gap, x0 in ((0.1, np.array([0, 0.3, 0.2, 0.1])), (0.0, np.zeros(4)))
    )
    used, unused = (write_report(f, tmp_path / n)[0].read_text() for f, n in ((trained, "a"), (untrained, "b")))
    assert "<h1 class=used>The label is used.</h1>" in used and "candidate" in used.split("<details>")[0]
    assert "<h1 class=unused>The label is not used.</h1>" in unused and "candidate" not in unused.split("<details>")[0]
    both = [set(re.findall("<p class=sentence>(.*?)</p>", text)) for text in (used, unused)]
    assert len(both[0] - both[1]) >= 3


# ---------------------------------------------------------------------- sentences for given numbers


@pytest.mark.parametrize(
    ("gap", "noise", "state", "words"),
    [
        (0.1, 0.01, "used", "The label is used. Under the true class, the held-out loss is 0.1000 ± 0.00"),
        (-0.1, 0.01, "unused", "The label misleads."),
        (0.0, 0.01, "unused", "which may be 0"),
        (0.0, 0.0, "unused", "the same under the true class and a wrong one"),
    ],
)
def test_only_losses_decide_whether_the_label_is_used(gap, noise, state, words):
    use = losses(gap, noise)
    if gap == 0.1:
        use = LabelUse(use.quantile, use.image, use.true, use.wrong + 0.1 - (use.wrong - use.true).mean(), None)
    got, sentence = say.verdict(use, None, 1.0, 3)
    assert (got == state and words in sentence and "50 held-out images" in sentence) or noise == 0


def test_verdict_without_images_is_open():
    state, sentence = say.verdict(None, Sensitivity([0], np.array([0.25]), np.array([1.0]), "null"), 1.0, 3)
    assert state == "open" and "held-out images are needed" in sentence and "0.25" in sentence
    assert say.verdict(None, None, 1.0, 3)[0] == "open"
    assert say.verdict(None, None, 0.0, 3)[0] == "unused"
    one = torch.zeros(1).double()
    assert "cannot be decided" in say.verdict(LabelUse(one, one.long(), one, one + 1, None), None, 1.0, 3)[1]
    assert "of one class" in say.verdict(LabelUse(one, one.long(), one, None, None), None, 1.0, 1)[1]


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
            "Class enters mostly at 8x8 in the decoder (78% of all between-class variance of gamma, on 25% of the channels). "
            "The 32x32 sites follow time (the class is at most 5% of the variance of gamma there).",
        ),
        ({"down8": (1, 4, 0), "up8": (1, 4, 0), "up32": (5, 2, 0)}, "Class enters mostly at 8x8 (80% of all"),
        (
            {"down8": (1, 3, 0), "down16": (1, 1, 0), "up16": (1, 2, 0), "up32": (1, 2, 0), "up64": (1, 1, 0)},
            "in many places, the most",
        ),
        ({"down8": (1, 1, 0), "up8": (1, 1.1, 0)}, "Class enters everywhere alike"),
        ({"down8": (1, 0, 0), "up8": (0, 2, 0)}, "one site alone: up 0.1 (8x8 in the decoder); 1 other site"),
        (
            {"down8": (1, 0, 0), "up8": (2, 0, 0)},
            "No modulation depends on the class: gamma follows time alone",
        ),
        ({"down8": (0, 0, 0), "up8": (0, 0, 0)}, "Nothing varies"),
        ({"down8": (0, 1, 0), "up4": (0, 4, 0)}, "Time does not change gamma."),
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
    assert twins.startswith(
        "Of the 4 classes stored (of 1,000): Two classes have the same modulation: c2 and c3 (distance 0)."
    )
    assert "null from the mean of the classes is 2.5 times" in twins
    assert "No two classes are related" in say.describe_geometry(geometry(np.eye(4)), 1.0, 4)
    kin = say.describe_geometry(geometry([[5, 0, 0], [4.5, 1, 0], [-5, 0, 0], [0, 0, 3]]), 1.0, 4)
    assert "c0 and c1 have much the same modulation" in kin and "the most opposed" in kin


def test_influence_and_band_sentences():
    change = np.zeros((3, 2))
    still = Influence("swap", ["a", "b", "c"], [0, 500], change, np.zeros(2))
    assert "changes nothing" in say.site_influence(still, {})
    change = change.copy()
    change[1, 1] = 0.2
    assert "Only B matters" in say.site_influence(
        Influence("swap", ["a", "b", "c"], [0, 500], change, change[1]), {"b": "B"}
    )
    change[0, 0] = 0.1
    sentence = say.site_influence(Influence("null", ["a", "b", "c"], [0, 500], change, np.array([0.1, 0.4])), {})
    assert sentence == (
        "Given the null label, b moves the predicted image most, by RMS 0.2 at t = 500; all at once by up to 0.4 (t = 500); "
        "1 of 3 move nothing."
    )

    def band(*x0, unused=False):
        return say.guidance_band(Sensitivity([0, 250, 500, 750], np.array(x0), np.ones(4), "null"), unused)

    assert "between t = 250 and t = 500: a candidate band for guidance, in timesteps" in band(0.1, 0.3, 0.4, 0.1)
    assert "nothing for guidance to amplify" in band(0, 0, 0, 0)
    assert "no band stands out" in band(0.3, 0.3, 0.31, 0.3) and "no band stands out" in band(0.3, 0.5, 0.5, 0.3)
    assert "too narrow" in band(0, 0, 1, 0)
    assert "candidate" not in band(0.1, 0.3, 0.4, 0.1, unused=True)


def test_use_over_time_sentences():
    edges = [0, 250, 500, 1000]
    sentence = say.use_over_time([(0.1, 0.02), (0.3, 0.1), (0.01, 0.02)], edges)
    assert "in 2 of 3 bins of timesteps, most at t = 250 to 499 (by 0.30 ± 0.10)" in sentence
    assert say.use_over_time([(0.1, 0.2), None, (-0.3, 0.1)], edges).endswith(
        "At t = 500 to 999 the true label makes the loss higher."
    )
    assert say.use_over_time([None] * 3, edges) == "No timestep was measured."


def test_channel_mixing_and_drift_sentences():
    health = {"up": ChannelCounts(2, 0, 5, 50), "down": ChannelCounts(0, 0, 1, 50)}
    assert say.describe_channels(health) == (
        "Of 100 channels, 2 are silenced (2%, most at up: 2 of 50); 6 are constant (6%, most at up: 5 of 50); none is flipped."
    )
    cells = [[np.full((4, 4, 1), v, np.uint8)] for v in (0, 10, 200)]
    assert say.rows_differ(["a", "b", "c"], cells).startswith(
        "Most alike are “a” and “b” (RMS 10 of 255 levels), most different “a” and “c”"
    )
    assert "makes no difference" in say.rows_differ(["a", "b"], [cells[0]] * 2)
    assert "Gamma at s moved most" not in say.how_far_drifted({"s": {"gamma": 0.0}}, {})
    assert "Gamma at s (50%) moved most" in say.how_far_drifted({"s": {"gamma": 0.5, "beta": 0.01}}, {})


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


def test_drawing_as_svg_and_png():
    d = Drawing(60, 40)
    d.rect(10, 10, 20, 20, (255, 0, 0), title="a <b>")
    d.text(40, 30, "up & down", 8, upright=True)
    d.cells(40, 5, 10, 5, np.array([[[0, 0, 255], [0, 255, 0]]], np.uint8))
    svg, image = d.svg('"name"'), d.image(1)
    assert Page(svg).open == [] and "a &lt;b&gt;" in svg and "up &amp; down" in svg and "rotate(-90" in svg
    assert image.size == (60, 40) and image.getpixel((20, 20)) == (255, 0, 0)
    assert image.getpixel((42, 7)) == (0, 0, 255) and image.getpixel((48, 7)) == (0, 255, 0)


def test_palettes():
    light = sequential(np.linspace(0, 1, 20)).astype(int) @ [3, 6, 1]
    assert (np.diff(light) < 0).all()
    low, middle, high = diverging(np.array([-1, 0, 1])).astype(int)
    assert low[2] > low[0] and high[0] > high[2] and middle.min() > 235
    assert sequential(np.array([np.nan, 9.0])).shape == (2, 3)


def test_ticks_are_round():
    assert ticks(0.23) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert ticks(0) == [0] and ticks(5) == [0, 1, 2, 3, 4, 5]


def test_thresholds_are_explained(tmp_path):
    text = unescape(write_report(TraceResults("a", "b", atlas_of()), tmp_path)[0].read_text()).split("<details>")[1]
    for share in (say.MOSTLY, say.FOLLOWS, say.BAND):
        assert f"{share:.0%}" in text
    for value in (say.EVEN, say.SAME_CLASS_DISTANCE, say.UNRELATED, say.CLEARLY_ALIKE):
        assert f"{value:g}" in text


def test_unused_label_has_no_shaded_band():
    results = made_up_results(atlas_of(), label_use=losses(0.0))
    images = {s.name: s.image for s in TraceReport(results).sections()}
    titles = [s.title for s in images["sensitivity"].shapes if hasattr(s, "title")]
    assert titles and not any(" to " in t for t in titles)
    results.label_use = losses(0.1)
    images = {s.name: s.image for s in TraceReport(results).sections()}
    assert any(getattr(s, "title", "") == "t = 300 to 700" for s in images["sensitivity"].shapes)
