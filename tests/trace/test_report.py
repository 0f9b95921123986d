"""The report: sentences from planted numbers, a page that needs nothing else, and models that read as what they are."""

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
from diffusion_adagn.trace.analysis import Channels, ClassGeometry, drift, shares
from diffusion_adagn.trace.atlas import Atlas
from diffusion_adagn.trace.drawing import Drawing, diverging, sequential
from diffusion_adagn.trace.plots import ticks
from diffusion_adagn.trace.probes import Influence, Sensitivity
from diffusion_adagn.trace.readings import Variance, class_spread, short_names, time_move, variance
from diffusion_adagn.trace.report import Findings, TraceReport, write_report

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
    return LabelUse(
        1000, torch.arange(n) * 1000 // n, torch.arange(n) % 50, true, true + gap + spread, true + gap / 2 + spread
    )


def everything(atlas: Atlas, **changes) -> Findings:
    """Findings with every part, of numbers that are made up."""
    sites, t = list(atlas.sites), [20, 300, 500, 700, 980]
    rng = np.random.default_rng(0)
    bump = np.array([0.1, 0.6, 1.0, 0.6, 0.1])
    parts = {
        "title": "runs/digits",
        "what": "EMA weights of runs/digits after 400 steps",
        "atlas": atlas,
        "influence": [Influence(i, sites, t, rng.random((len(sites), 5)), bump) for i in ("swap", "null")],
        "sensitivity": Sensitivity(t, bump, bump / 2, "null"),
        "label_use": losses(0.1),
        "mixing": (["cat", "cat coarse, dog fine"], [[np.full((8, 8, 1), v, np.uint8)] * 3 for v in (10, 200)]),
        "drift": drift(atlas, atlas),
        "next_commands": ["adagn sample runs/digits --classes 'a&b'"],
    }
    return Findings(**(parts | changes))


class Page(HTMLParser):
    """Tags opened and closed, attributes, and what is written."""

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


def sentences_of(findings: Findings) -> list[str]:
    seen = TraceReport(findings)
    return [seen.verdict()[1], *(s.sentence for s in seen.sections())]


# ---------------------------------------------------------------------- the page


def test_the_page_is_whole_needs_nothing_else_and_its_pictures_open(tmp_path):
    files = write_report(everything(atlas_of()), tmp_path / "new" / "folder")
    assert [f.name for f in files] == [
        "report.html", "map.png", "shares.png", "spread.png", "classes.png", "influence.png", "sensitivity.png", "label_use.png",
        "mixing.png", "drift.png",
    ]  # fmt: skip
    text = files[0].read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"https?:|url\(|@import", text)
    places = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert places and all(value.startswith("data:image/png;base64,") for value in places)
    for file in files[1:]:
        with Image.open(file) as picture:
            assert picture.size[0] > 300 and len(picture.convert("L").getcolors()) > 1
    assert page.headings == [
        "Where time and class enter", "What each site follows", "Class against time", "Channels", "How the classes lie",
        "What each site does to the picture", "When the label matters", "When the label is used", "Classes mixed",
        "What moved between the checkpoints", "What to type next",
    ]  # fmt: skip


def test_what_was_not_measured_is_left_out(tmp_path):
    files = write_report(Findings("a", "b", atlas_of(conditioning="additive")), tmp_path)
    assert [f.name for f in files] == ["report.html", "map.png", "shares.png", "spread.png", "classes.png"]
    page = Page(files[0].read_text(encoding="utf-8"))
    assert page.headings == [
        "Where time and class enter",
        "What each site follows",
        "Class against time",
        "How the classes lie",
    ]


def test_names_from_outside_are_escaped_and_do_not_break_the_page(tmp_path):
    atlas = atlas_of()
    atlas.classes = [*NASTY, "null"]
    one_cell = [np.zeros((8, 8, 3), np.uint8)]
    mixing = (list(NASTY), [one_cell] * 3)
    found = everything(atlas, title=NASTY[0] * 9, what=NASTY[2], mixing=mixing, next_commands=list(NASTY))
    text = write_report(found, tmp_path)[0].read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and "script" not in page.tags
    assert "&lt;script&gt;" in text and "\u202e" not in text and "\x07" not in text


@pytest.mark.parametrize("kind", CONDITIONING)
def test_every_kind_is_reported_and_drawn(tmp_path, kind):
    atlas = atlas_of(conditioning=kind, modulate_both_norms=True)
    assert len(write_report(Findings("a", "b", atlas), tmp_path)) >= 4
    entered, followed = sentences_of(Findings("a", "b", atlas))[1:3]
    if kind == "none":
        assert entered.startswith("Nothing a site is told depends on the class")
    if kind == "cross_attention":
        assert "shift: time alone" in followed and "values: class alone" in followed
        assert (
            entered.endswith("(the class is all of the variance of values there).") or "Time does not change" in entered
        )


def test_networks_without_classes_and_with_one_are_reported(tmp_path):
    for names, verdict in (((), "This network has no classes"), (("cat",), "The label is used")):
        found = everything(atlas_of(LabelSpace(names)), influence=[])
        if not names:
            found.label_use = found.sensitivity = None
        assert write_report(found, tmp_path)
        assert sentences_of(found)[0].startswith(verdict)
        assert any("to compare" in s for s in sentences_of(found))


@pytest.mark.slow
def test_a_large_network_makes_a_page_below_2_megabytes(tmp_path):
    labels = LabelSpace(tuple(f"a class with a long name, number {i}" for i in range(64)))
    unet = tiny_unet(num_classes=64, num_res_blocks=23, modulate_both_norms=True, model_channels=8, num_head_channels=8)
    atlas = Atlas.of(unet, labels, timesteps=50)
    assert len(atlas.sites) >= 100
    t = list(range(0, 1000, 20))
    change = np.random.default_rng(0).random((len(atlas.sites), 50))
    influence = [Influence(i, list(atlas.sites), t, change, change[0]) for i in ("swap", "null", "freeze")]
    page = write_report(everything(atlas, influence=influence), tmp_path)[0]
    assert page.stat().st_size < 2e6


# ---------------------------------------------------------------------- planted models read as what they are


def cut_but_one(unet):
    """Zero what the class says to every site but the third."""
    rows = unet.projection_slices()
    for name in [n for i, n in enumerate(rows) if i != 2]:
        unet.projection.weight[rows[name], unet.embedding.class_dim :] = 0


def test_a_class_path_cut_at_all_sites_but_one_is_said():
    atlas = atlas_of(change=cut_but_one, join="concat")
    sentence = sentences_of(Findings("a", "b", atlas))[1]
    site = list(atlas.sites.values())[2].site
    assert f"Class enters at one site alone: {short_names(list(atlas.sites))[site.name]}" in sentence
    assert f"{len(atlas.sites) - 1} other sites hear nothing of it" in sentence


def test_constant_time_is_said():
    atlas = atlas_of(change=lambda u: u.embedding.time[2].weight.zero_())
    said = sentences_of(Findings("a", "b", atlas))
    assert "Time does not change gamma" in said[1]
    assert "gamma: class alone; of beta: class alone" in said[2]
    assert "time does not move" in said[3].lower()


def test_equal_classes_are_said_and_a_pair_of_them():
    def equal(unet, rows=slice(0, 3)):
        unet.embedding.classes.weight[rows] = unet.embedding.classes.weight[0].clone()

    said = sentences_of(Findings("a", "b", atlas_of(change=equal)))
    assert said[0] == "The label is not used. Nothing that a site is told depends on the class."
    assert said[1].startswith("Nothing a site is told depends on the class")
    assert said[5].startswith("All 3 classes are told the same")
    pair = sentences_of(Findings("a", "b", atlas_of(change=lambda u: equal(u, slice(0, 2)))))
    assert pair[5].startswith("Two classes are told the same: cat and dog (distance 0)")


def test_a_network_that_is_told_nothing_says_so(tmp_path):
    found = Findings("a", "b", atlas_of(change=lambda u: (u.projection.weight.zero_(), u.projection.bias.zero_())))
    said = sentences_of(found)
    assert said[1].startswith("Nothing varies") and "gamma: none" in said[2]
    assert ">none</text>" in write_report(found, tmp_path)[0].read_text()


def test_trained_and_untrained_read_differently(tmp_path):
    trained, untrained = (
        everything(atlas_of(), label_use=losses(gap), sensitivity=Sensitivity([0, 400, 600, 999], x0, x0, "null"))
        for gap, x0 in ((0.1, np.array([0, 0.3, 0.2, 0.1])), (0.0, np.zeros(4)))
    )
    used, unused = (write_report(f, tmp_path / n)[0].read_text() for f, n in ((trained, "a"), (untrained, "b")))
    assert "<h1 class=used>The label is used.</h1>" in used and "candidate" in used.split("<details>")[0]
    assert "<h1 class=unused>The label is not used.</h1>" in unused and "candidate" not in unused.split("<details>")[0]
    both = [set(re.findall("<p class=says>(.*?)</p>", text)) for text in (used, unused)]
    assert len(both[0] - both[1]) >= 3


# ---------------------------------------------------------------------- sentences from planted numbers


@pytest.mark.parametrize(
    ("gap", "noise", "state", "words"),
    [
        (0.1, 0.01, "used", "The label is used. Told the true class, the held-out loss is 0.1000 ± 0.00"),
        (-0.1, 0.01, "unused", "The label misleads."),
        (0.0, 0.01, "unused", "which may as well be 0"),
        (0.0, 0.0, "unused", "the same told the true class or a wrong one"),
    ],
)
def test_only_losses_decide_whether_the_label_is_used(gap, noise, state, words):
    use = losses(gap, noise)
    if gap == 0.1:
        use = LabelUse(
            use.num_timesteps, use.t, use.picture, use.true, use.wrong + 0.1 - (use.wrong - use.true).mean(), None
        )
    got, sentence = say.verdict(use, None, 1.0, 3)
    assert (got == state and words in sentence and "50 held-out pictures" in sentence) or noise == 0


def test_without_pictures_a_network_may_only_be_said_to_respond():
    state, sentence = say.verdict(None, Sensitivity([0], np.array([0.25]), np.array([1.0]), "null"), 1.0, 3)
    assert state == "open" and "whether it uses it needs pictures" in sentence and "0.25" in sentence
    assert say.verdict(None, None, 1.0, 3)[0] == "open"
    assert say.verdict(None, None, 0.0, 3)[0] == "unused"
    one = torch.zeros(1).double()
    assert "cannot be said" in say.verdict(LabelUse(10, one.long(), one.long(), one, one + 1, None), None, 1.0, 3)[1]
    assert "of one class" in say.verdict(LabelUse(10, one.long(), one.long(), one, None, None), None, 1.0, 1)[1]


def places(**variances):
    """Sites such as up8=(time, label, both), of 10 channels."""
    found = []
    for i, (word, v) in enumerate(variances.items()):
        way, side = re.match(r"([a-z]+)(\d+)", word).groups()
        found.append((Site(f"{way}.0.stages.{i}.block.norm2", int(side), 10, i), Variance(*v)))
    return found, short_names([s.name for s, _ in found])


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            {"down32": (9, 0.2, 0), "middle8": (1, 1, 0), "up8": (1, 6, 1), "up32": (10, 0.8, 0)},
            "Class enters mostly at 8x8 in the decoder (78% of all between-class variance of gamma, on 25% of the channels). "
            "The 32x32 sites follow time (the class is at most 5% of the variance of gamma there).",
        ),
        ({"down8": (1, 4, 0), "up8": (1, 4, 0), "up32": (5, 2, 0)}, "Class enters mostly at 8x8 (80% of all"),
        (
            {"down8": (1, 3, 0), "down16": (1, 1, 0), "up16": (1, 2, 0), "up32": (1, 2, 0), "up64": (1, 1, 0)},
            "in many places, most",
        ),
        ({"down8": (1, 1, 0), "up8": (1, 1.1, 0)}, "Class enters everywhere alike"),
        ({"down8": (1, 0, 0), "up8": (0, 2, 0)}, "one site alone: up 0.1 (8x8 in the decoder); 1 other site"),
        (
            {"down8": (1, 0, 0), "up8": (2, 0, 0)},
            "Nothing a site is told depends on the class: gamma follows time alone",
        ),
        ({"down8": (0, 0, 0), "up8": (0, 0, 0)}, "Nothing varies"),
        ({"down8": (0, 1, 0), "up4": (0, 4, 0)}, "Time does not change gamma."),
    ],
)
def test_where_the_class_enters(told, words):
    sites, short = places(**told)
    assert words in say.class_entry("gamma", sites, 3, short)


def test_class_geometry_in_words():
    def lying(vectors, null=None):
        v = np.array(vectors, float)
        away = v - v.mean(0)
        length = np.linalg.norm(away, axis=1)
        apart = np.linalg.norm(away[:, None] - away[None], axis=-1)
        names = [f"c{i}" for i in range(len(v))]
        return ClassGeometry(names, away @ away.T / np.outer(length, length), apart, names, null)

    twins = say.classes_lie(lying([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]], 2.5), 1.0, 1000)
    assert twins.startswith("Of the 4 classes kept (of 1,000): Two classes are told the same: c2 and c3 (distance 0).")
    assert "Null lies 2.5 times as far" in twins
    assert "No two classes are kin" in say.classes_lie(lying(np.eye(4)), 1.0, 4)
    kin = say.classes_lie(lying([[5, 0, 0], [4.5, 1, 0], [-5, 0, 0], [0, 0, 3]]), 1.0, 4)
    assert "c0 and c1 are told much the same" in kin and "the most opposed" in kin


def test_influence_and_the_band_in_words():
    change = np.zeros((3, 2))
    still = Influence("swap", ["a", "b", "c"], [0, 500], change, np.zeros(2))
    assert "changes nothing" in say.site_influence(still, {})
    change = change.copy()
    change[1, 1] = 0.2
    assert "Only B matters" in say.site_influence(
        Influence("swap", ["a", "b", "c"], [0, 500], change, change[1]), {"b": "B"}
    )
    change[0, 0] = 0.1
    said = say.site_influence(Influence("null", ["a", "b", "c"], [0, 500], change, np.array([0.1, 0.4])), {})
    assert said == (
        "Told the null label, b moves the predicted picture most, by RMS 0.2 at t = 500; all at once by up to 0.4 (t = 500); "
        "1 of 3 move nothing."
    )

    def band(*x0, unused=False):
        return say.guidance_band(Sensitivity([0, 250, 500, 750], np.array(x0), np.ones(4), "null"), unused)

    assert "between t = 250 and t = 500: a candidate band for guidance, in timesteps" in band(0.1, 0.3, 0.4, 0.1)
    assert "nothing for guidance to amplify" in band(0, 0, 0, 0)
    assert "no band stands out" in band(0.3, 0.3, 0.31, 0.3) and "no band stands out" in band(0.3, 0.5, 0.5, 0.3)
    assert "too narrow" in band(0, 0, 1, 0)
    assert "candidate" not in band(0.1, 0.3, 0.4, 0.1, unused=True)


def test_use_over_time_in_words():
    edges = [0, 250, 500, 1000]
    said = say.use_over_time([(0.1, 0.02), (0.3, 0.1), (0.01, 0.02)], edges)
    assert "in 2 of 3 bins of timesteps, most at t = 250 to 499 (loss lower by 0.30 ± 0.10)" in said
    assert say.use_over_time([(0.1, 0.2), None, (-0.3, 0.1)], edges).endswith(
        "At t = 500 to 999 the true label makes the loss higher."
    )
    assert say.use_over_time([None] * 3, edges) == "No timestep was measured."


def test_channels_mixing_and_drift_in_words():
    health = {"up": Channels(2, 0, 5, 50), "down": Channels(0, 0, 1, 50)}
    assert say.channel_health(health) == (
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


def test_variance_is_numpys():
    atlas = atlas_of()
    for site in atlas.sites.values():
        f = site.fields["gamma"]
        x = f.values[:, :3].astype(float)  # without null
        v = variance(f)
        assert v.total == pytest.approx(x.var(axis=(0, 1)).sum(), rel=1e-9)
        assert v.time == pytest.approx(x.mean(1).var(0).sum(), rel=1e-9)
        assert v.classes == pytest.approx(x.var(1).mean(0).sum(), rel=1e-9)
        assert v.class_share == pytest.approx(1 - shares(f).time)
    gamma = [s.fields["gamma"].values[:, :3].astype(float) for s in atlas.sites.values()]
    assert np.allclose(class_spread(atlas, "gamma"), [np.sqrt(g.var(1).mean(-1)) for g in gamma])
    away = [np.sqrt(np.square(g.mean(1) - g.mean((0, 1))).mean(-1)) for g in gamma]
    assert np.allclose(time_move(atlas, "gamma"), away)


def test_sites_have_short_names_that_differ():
    names = list(atlas_of(modulate_both_norms=True, resblock_updown=True).sites)
    short = short_names(names)
    assert len(set(short.values())) == len(names) and max(map(len, short.values())) <= 10
    assert short_names(["up.1.stages.0.block.norm2", "odd"]) == {"up.1.stages.0.block.norm2": "up 1.0", "odd": "odd"}


def test_a_drawing_is_the_same_shapes_as_svg_and_png():
    d = Drawing(60, 40)
    d.rect(10, 10, 20, 20, (255, 0, 0), title="a <b>")
    d.text(40, 30, "up & down", 8, upright=True)
    d.cells(40, 5, 10, 5, np.array([[[0, 0, 255], [0, 255, 0]]], np.uint8))
    svg, image = d.svg('"name"'), d.image(1)
    assert Page(svg).open == [] and "a &lt;b&gt;" in svg and "up &amp; down" in svg and "rotate(-90" in svg
    assert image.size == (60, 40) and image.getpixel((20, 20)) == (255, 0, 0)
    assert image.getpixel((42, 7)) == (0, 0, 255) and image.getpixel((48, 7)) == (0, 255, 0)


def test_palettes_grow_dark_and_part_in_the_middle():
    light = sequential(np.linspace(0, 1, 20)).astype(int) @ [3, 6, 1]
    assert (np.diff(light) < 0).all()
    low, middle, high = diverging(np.array([-1, 0, 1])).astype(int)
    assert low[2] > low[0] and high[0] > high[2] and middle.min() > 235
    assert sequential(np.array([np.nan, 9.0])).shape == (2, 3)


def test_ticks_are_round():
    assert ticks(0.23) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert ticks(0) == [0] and ticks(5) == [0, 1, 2, 3, 4, 5]


def test_the_thresholds_are_said(tmp_path):
    text = unescape(write_report(Findings("a", "b", atlas_of()), tmp_path)[0].read_text()).split("<details>")[1]
    for share in (say.MOSTLY, say.FOLLOWS, say.BAND):
        assert f"{share:.0%}" in text
    for value in (say.EVEN, say.SAME_CLASS_DISTANCE, say.UNRELATED, say.CLEARLY_ALIKE):
        assert f"{value:g}" in text


def test_a_band_is_not_shaded_where_the_label_is_unused():
    found = everything(atlas_of(), label_use=losses(0.0))
    pictures = {s.name: s.picture for s in TraceReport(found).sections()}
    titles = [s.title for s in pictures["sensitivity"].shapes if hasattr(s, "title")]
    assert titles and not any(" to " in t for t in titles)
    found.label_use = losses(0.1)
    pictures = {s.name: s.picture for s in TraceReport(found).sections()}
    assert any(getattr(s, "title", "") == "t = 300 to 700" for s in pictures["sensitivity"].shapes)
