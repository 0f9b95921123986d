"""One report as Markdown and as an HTML page, with the same text."""

import re
from html.parser import HTMLParser

import pytest
from markupsafe import Markup
from PIL import Image

from diffusion_adagn.render.report import Code, Report, Section, Shown, Strong, Table, section_html

NASTY = "<script>alert(1)</script> | `*_\u202e\ud800\x07"
ROWS = [["scale 1", "0.5 ± 0.1"], ["scale 2", Strong("0.25")], [NASTY, Code("a`b|c")]]


class Cells(HTMLParser):
    """The texts by tag; every tag is closed."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.texts = [], {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open:
            self.texts[tag][-1] += data


@pytest.fixture
def report():
    shown = Shown("grid", lambda: Image.new("RGB", (2, 2)), "images by scale")
    sections = [
        Section("Points", [Table(["point", "FID"], ROWS, "± one standard error."), shown]),
        Section("Notes", ["A paragraph.", ["one", NASTY], Code("adagn sweep x\n  --count 9")]),
    ]
    return Report(
        "Sweep of x", sections, ["Use scale 2."], "open", "kicker", "about", Markup("<dt>term</dt><dd>meaning</dd>")
    )


def test_both_forms_have_the_same_table(report):
    cells = Cells(report.html())
    assert not cells.open and "script" not in cells.texts
    clean = "<script>alert(1)</script> | `*_?"
    assert cells.texts["td"] == ["scale 1", "0.5 ± 0.1", "scale 2", "0.25", clean, "a`b|c"]
    assert cells.texts["strong"] == ["0.25"] and cells.texts["li"] == ["one", clean]
    lines = [line for line in report.markdown().splitlines() if line.startswith("|")]
    assert [line.count(" | ") for line in lines] == [1, 0, 1, 1, 1] and "**0.25**" in lines[3]
    assert "\\<script\\>alert(1)" in lines[4] and "`a'b/c`" in lines[4]


def test_page_fetches_nothing(report):
    page = report.html()
    assert not re.search(r"https?:|url\(|@import|<link", page) and "\u202e" not in page and "\x07" not in page
    assert re.findall('src="([^,]*)', page) == ["data:image/png;base64"]
    assert "<pre>adagn sweep x\n--count 9\n</pre>" in page


def test_markdown_has_headings_commands_and_images(report):
    text = report.markdown()
    assert text.startswith("# Sweep of x\n\nUse scale 2.\n\nabout\n\n## Points\n\n| point")
    assert "![images by scale](grid.png)" in text and "```bash\nadagn sweep x\n  --count 9\n```" in text


def test_report_is_saved_with_its_images(report, tmp_path):
    files = report.save(tmp_path, text="sweep.md")
    assert [f.name for f in files] == ["report.html", "sweep.md", "grid.png"] and all(f.is_file() for f in files)


def test_section_inside_another_page(report):
    html = section_html(report.sections[1])
    assert "<h3>Notes</h3>" in html and "<style" not in html and Cells(html).open == []
