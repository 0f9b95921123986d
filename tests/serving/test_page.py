"""The page: what its functions return, without a browser; and each tab used in headless Chromium."""

import asyncio
import base64
import importlib.util
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("gradio", reason="the extra ui is not installed")

import gradio as gr
from conftest import ROOT
from served import running

from diffusion_adagn.errors import InputError
from diffusion_adagn.labels import LabelSpace
from diffusion_adagn.serving import actions
from diffusion_adagn.serving.page import folders, inside, interpolate, markup, mix, reports, runs, sweeps
from diffusion_adagn.serving.page import tab as page_tab
from diffusion_adagn.serving.page.choices import class_choices, class_text
from diffusion_adagn.serving.page.sampling import sample, sampler_choices
from diffusion_adagn.serving.page.tab import class_update, classes_control
from diffusion_adagn.serving.settings import SampleQuery

RUN = {"previews": ["step-00000010.png", "step-00000020.png"]}
METRICS = [{"step": i, "loss": 1 / (i + 1), **({"label_gap_wrong": 0.01 * i} if i % 5 == 0 else {})} for i in range(21)]
POINTS = ["g1_ddim5_leading", "g2_ddim5_leading"]


def write_run(folder):
    """A run's log and previews, beside the pipeline of the shipped model."""
    shutil.copytree(ROOT / "diffusion_adagn/pretrained/digits", folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    (folder / "previews").mkdir()
    for name in RUN["previews"]:
        Image.new("RGB", (120, 80), "gray").save(folder / "previews" / name)


def write_sweep(folder):
    """A sweep of two points with images."""
    rows = []
    for i, point in enumerate(POINTS):
        (folder / "points" / point).mkdir(parents=True)
        np.save(folder / "points" / point / "shown.npy", np.full((3, 2, 8, 8, 1), 100 * i + 20, np.uint8))
        metrics = {"kid": {"value": 1.5 + i, "standard_error": 0.1}, "frechet": {"value": None}}
        rows.append({"id": point, "scale": 1.0 + i, "sampler": "ddim", "steps": 5, "metrics": metrics})
    sweep = {"class_names": ["0", "1", "2"], "command": "adagn sweep runs/mine --guidance 1,2"}
    saved = {"sweep": sweep, "rows": rows, "advice": {"sentence": "Use scale 1."}, "sentences": []}
    (folder / "sweep.json").write_text(json.dumps(saved))
    Image.new("RGB", (300, 200), "white").save(folder / "curves.png")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working directory with a run, its sweep and its trace report."""
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        write_run(work / "runs/mine")
        write_sweep(work / "sweeps/mine/step-00000800")
        report = work / "traces/mine/step-00000800/report.html"
        report.parent.mkdir(parents=True)
        report.write_text("<h1>Report of mine</h1><script>parent.document.title = 'taken over'</script>")
        yield work


@pytest.fixture(scope="module")
def server(work):
    with running(["digits", "runs/mine"]) as client:
        client.work = work
        yield client


@pytest.fixture(scope="module")
def found(server):
    return folders.find_folders(server.models["mine"])


def collect(models, query):
    async def run():
        return [html async for html in sample(models, lambda: query, markup.sampled)]

    return asyncio.run(run())


def test_request_shows_progress_then_images(server):
    query = SampleQuery(classes="3", scales=(1.0, 2.0), strip=8, sampler={"steps": 8})
    *before, last = collect(server.models, query)
    assert before and all("<progress" in html for html in before)
    assert last.count("<img") == 2 + 2 * 8
    assert last.count(' alt="') == last.count("<img") and 'alt=""' not in last
    assert "3, seed 0, scale 1" in last and "3, seed 0, scale 2" in last
    assert "one noise, scales of row 1" in last


def test_wrong_request_shows_one_sentence(server):
    (html,) = collect(server.models, SampleQuery(classes="3", sampler={"steps": 61}))
    assert 'role="alert"' in html and "61 steps" in html


def test_error_text_is_escaped():
    assert "<b>" not in markup.alert("a class <b>x</b>")


def test_reader_that_leaves_stops_the_job(server, monkeypatch):
    jobs, images = [], actions.images
    monkeypatch.setattr(actions, "images", lambda *args: jobs.append(images(*args)) or jobs[0])
    query = SampleQuery(classes="3", sampler={"steps": 60})

    async def leave():
        reading = sample(server.models, lambda: query, markup.sampled)
        await anext(reading)
        await reading.aclose()

    asyncio.run(leave())
    assert jobs[0].future.done() and jobs[0].future.exception()


def test_classes_go_by_name_where_it_is_clear():
    labels = LabelSpace(("cat", "1", "0", "dog, big"))
    assert class_text(labels, ["0"]) == "cat"
    for values in (["1"], ["2", "1"], ["3"], ["0", "null"]):
        ids = [labels.null_id if v == "null" else int(v) for v in values]
        assert labels.parse(class_text(labels, values)) == ids
    with pytest.raises(InputError, match="no class is chosen"):
        class_text(labels, [])


def test_choices_have_null_label(server):
    choices = class_choices(server.models["digits"], null=True)
    assert len(choices) == 11 and choices[3] == ("3", "3") and choices[-1] == ("no class", "null")


def test_many_classes_are_a_searchable_list(server, monkeypatch):
    boxes = classes_control(server.models)
    monkeypatch.setattr(page_tab, "MAX_BOXES", 9)
    listed = classes_control(server.models)
    assert isinstance(boxes, gr.CheckboxGroup) and isinstance(listed, gr.Dropdown) and listed.multiselect
    assert listed.choices == boxes.choices and listed.value == boxes.value == ["0", "1"]
    for control in (boxes, listed):
        assert class_update(control, ["3", "99", "null"], server.models["digits"])["value"] == ["3", "null"]


@pytest.mark.parametrize(
    ("where", "text", "maps"),
    [("coarse", "3,8@coarse", 1), ("resolution", "3,8@4", 1), ("level", "3,8@sigma>1", 2)],
)
def test_mix_is_drawn_by_class(server, where, text, maps):
    model = server.models["digits"]
    assert mix.mix_text(model, "3", "8", where, 4, 1) == text
    html = mix.draw_mix(model, text)
    drawn = [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html)]
    assert len(drawn) == maps
    both = len(model.pipe.unet.sites()) * maps
    threes, eights = (sum(svg.count(f">{c}</text>") for svg in drawn) for c in (3, 8))
    assert threes + eights == both and threes and eights


def test_mix_rejects_unknown_resolution(server):
    with pytest.raises(InputError, match="no site has resolution 5"):
        mix.mix_text(server.models["digits"], "3", "8", "resolution", 5, 1)


def test_modulation_has_drawings(server):
    html = asyncio.run(inside._shown(lambda: actions.sections(server.models, actions.ModelQuery())))
    assert (
        "Where time and class enter" in html
        and "Distances between classes" in html
        and html.count("image/svg+xml") >= 4
    )


@pytest.mark.slow
def test_influence_has_drawing(server):
    html = asyncio.run(inside._shown(lambda: actions.sections(server.models, actions.ModelQuery(), influence=True)))
    assert html.count("<h3>") == 1 and "Influence of each site" in html and "image/svg+xml" in html


def test_run_is_read_as_it_grows(found, tmp_path):
    log = folders.Log(tmp_path / "metrics.jsonl")
    assert log.read() == []
    with log.file.open("a") as file:
        for row in METRICS[:5]:
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 5, "lo')
        file.flush()
        assert len(log.read()) == 5
        file.write('ss": 0.5}\n')
        file.flush()
        assert log.curve("loss")[-1] == (5, 0.5)
    log.file.write_text('{"step": 1, "loss": 9}\n')
    assert log.curve("loss") == [(1, 9)]
    assert "Step 20, loss 0.04762, label gap 0.2." in runs.describe(found.log)


def test_run_shows_previews(found):
    html = runs.film_strip(found)
    assert html.count("<img") == 2 and html.index("step 10") < html.index("step 20")


def test_sweep_has_table_and_images(found):
    folder = found.sweeps["step-00000800"]
    headers, rows = sweeps.table_of(folders.read_sweep(folder))
    assert headers == ["scale", "sampler", "steps", "kid"] and rows[1] == [2.0, "ddim", 5, "2.5"]
    html = sweeps.images_of(folder, 1)
    assert html.count("<img") == 6 and "Image of class 2, scale 2" in html
    assert 'alt="Metrics over the guidance scale"' in sweeps.figures_of(folder)


def test_models_without_folders_say_what_to_type(server):
    none = folders.find_folders(server.models["digits"])
    assert not none.reports and not none.sweeps
    assert "no saved report" in inside.frame("digits", none, None)
    assert "no metrics.jsonl" in runs.describe(none.log)


def test_reports_are_found_when_they_are_written(work):
    """Also those of a second `adagn trace`, which end in -2; but not those of a run of that name."""
    with running(["digits"]) as client:
        none = folders.find_folders(client.models["digits"])
        assert not none.reports
        for name in ("digits", "digits-2", "digits-small", "digits-3/step-00000001"):
            file = work / "traces/pretrained" / name / "report.html"
            file.parent.mkdir(parents=True)
            file.write_text(f"<h1>{name}</h1>")
        try:
            assert list(none.reports) == ["digits", "digits-2"]
            assert client.raw("GET", "/reports/digits/digits-2")[2] == b"<h1>digits-2</h1>"
            for kind in ("evaluations", "sweeps"):
                shutil.copytree(work / "traces/pretrained/digits", work / kind / "pretrained/digits")
            assert list(none.reports) == ["digits", "digits-2", "evaluation digits", "sweep digits"]
            for name in none.reports:
                assert client.raw("GET", reports.address("digits", name))[0] == 200
                assert f'src="{reports.address("digits", name)}"' in inside.frame("digits", none, name)
            link = sweeps.link_to_report("digits", "digits", none)
            assert 'href="/reports/digits/sweep%20digits"' in link and not sweeps.link_to_report("digits", "x", none)
        finally:
            for kind in ("traces", "evaluations", "sweeps"):
                shutil.rmtree(work / kind / "pretrained", ignore_errors=True)


def test_command_is_of_what_is_sampled(server):
    for wrong, said in (({"steps": 61}, "61 steps"), ({"seed": -5}, "seed: "), ({"seed": 1.5}, "whole number")):
        with pytest.raises(InputError, match=said):
            query = {"classes": "3", "sampler": {"steps": wrong.get("steps", 5)}} | {
                k: v for k, v in wrong.items() if k == "seed"
            }
            actions.images_command(server.models, SampleQuery(**query))
    line = actions.images_command(server.models, SampleQuery(classes="3", scales=(100,), sampler={"steps": 5}))
    assert line == "adagn sample digits --classes 3 --count 1 --guidance 100 --steps 5"


def test_samplers_fit_the_process(server):
    offered = [value for _, value in sampler_choices(server.models["digits"])]
    assert offered == ["", "dpm++", "unipc", "euler", "heun"]


def test_captions_of_an_interpolation():
    assert interpolate.captions(["3", "a", "b", "c", "8"])[1:4] == [
        "75 % 3, 25 % 8",
        "50 % 3, 50 % 8",
        "25 % 3, 75 % 8",
    ]
    assert interpolate.captions(["3", "8"]) == ["3", "8"]


def test_served_weights_are_shown(server):
    assert server.models["digits"].kind == "EMA weights, step 800"


def test_report_is_sandboxed(server):
    status, headers, body = server.raw("GET", "/reports/mine/step-00000800")
    assert status == 200 and b"Report of mine" in body
    assert headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    for path in ("/reports/mine/..%2f..%2f..%2fruns", "/reports/mine/none", "/reports/digits/step-00000800"):
        assert server.raw("GET", path)[0] == 404


def test_page_leaves_api_addresses_to_api(server):
    for method, path, status in (("GET", "/v1/none", 404), ("GET", "/v1/sample", 405)):
        answered, _, body = server.raw(method, path)
        assert answered == status and "error" in json.loads(body)


def test_page_has_guard(work):
    with running(["digits"], token="secret-of-test") as client:
        assert client.raw("GET", "/")[0] == 401
        assert client.raw("GET", "/gradio_api/info")[0] == 401
        assert client.raw("GET", "/", host="evil.example")[0] == 421


# ---------------------------------------------------------------------- in a browser


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WITHOUT = (
    "needs Chromium and the package playwright" if not (CHROMIUM and importlib.util.find_spec("playwright")) else ""
)
WIDTHS = {390: 844, 1280: 900}


@pytest.fixture(scope="module")
def browser():
    if WITHOUT:
        pytest.skip(WITHOUT)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page in a browser window of its own; what it requests and what it complains about is collected."""

    def __init__(self, browser, server, query, width):
        permissions = ["clipboard-read", "clipboard-write"]
        self.context = browser.new_context(viewport={"width": width, "height": WIDTHS[width]}, permissions=permissions)
        self.page, self.requests, self.errors, self.width = self.context.new_page(), [], [], width
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.address = f"http://127.0.0.1:{server.port}/"
        self.tab = re.search(r"tab=(\w+)", query)[1]
        self.open(f"{self.address}?{query}")

    def open(self, address):
        """Open an address and wait until its settings are in the page."""
        self.page.goto(address)
        self.wait(f"#{self.tab}-copy:visible")
        self.page.wait_for_function(f"document.querySelector('#{self.tab}-command textarea').value !== ''")

    def wait(self, selector):
        return self.page.wait_for_selector(selector, timeout=60_000)

    def copied(self, button):
        self.page.evaluate("navigator.clipboard.writeText('')")
        self.page.click(f"#{self.tab}-{button}")
        for _ in range(300):  # the command comes from the server
            if text := self.page.evaluate("navigator.clipboard.readText()"):
                return text
            self.page.wait_for_timeout(100)
        raise AssertionError("nothing was copied")

    def check(self):
        """What holds for every tab."""
        assert {url.split("/")[2] for url in self.requests if "://" in url} == {self.address.split("/")[2]}
        assert self.errors == []
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width
        assert self.page.locator("img:not([alt]), img[alt='']").count() == 0
        if SCREENSHOTS:
            self.page.screenshot(path=f"{SCREENSHOTS}/{self.tab}-{self.width}.png", full_page=True)
        self.context.close()


SCREENSHOTS = os.environ.get("ADAGN_SCREENSHOTS")  # a folder for them


@pytest.fixture(params=WIDTHS)
def opened(request, browser, server):
    return lambda query: Opened(browser, server, query, request.param)


@pytest.mark.slow
def test_sample_tab(opened):
    tab = opened("tab=sample&classes=3,8&scale=2&more=1&steps=8&seed=5")
    tab.page.click("#sample-start")
    tab.wait("#sample-result figure")
    assert tab.page.locator("#sample-result img").count() == 4 + 4 * 8
    assert tab.page.locator("#sample-result figcaption").first.inner_text() == "3, seed 5, scale 2"
    assert tab.copied("copy") == "adagn sample digits --classes 3,8 --count 1 --seed 5 --guidance 2,1 --steps 8"
    link = tab.copied("link")
    assert "classes=3%2C8" in link and "seed=5" in link and "more=1" in link
    tab.open(link)
    assert "--seed 5 --guidance 2,1" in tab.page.input_value("#sample-command textarea")
    tab.check()


@pytest.mark.slow
def test_wrong_settings_are_shown_as_text(opened):
    tab = opened("tab=sample&classes=99&steps=x&more=zebra&seed=1e99&sampler=ddim&model=nope")
    ignored = tab.page.inner_text("#ignored")
    assert all(one in ignored for one in ("model nope", "classes 99", "steps x", "seed 1e99", "sampler ddim"))
    tab.page.click("#sample-start")
    assert "zebra" in tab.wait("#sample-result .adagn-alert").inner_text()
    tab.page.evaluate("adagn.address = location.href")  # as before the settings are in the page
    assert tab.copied("link") == tab.page.url
    tab.check()


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "said"), [("-5", "at least 0"), ("1.5", "whole number")])
def test_number_out_of_range_is_a_sentence(opened, seed, said):
    tab = opened("tab=sample&classes=3&steps=8&more=1")
    tab.page.get_by_label("Seed").first.fill(seed)
    copied = tab.copied("copy")  # at once: the command of the new seed
    assert copied.startswith("# seed: ") and said in copied
    tab.page.click("#sample-start")
    assert said in tab.wait("#sample-result .adagn-alert").inner_text()
    tab.check()


@pytest.mark.slow
def test_stop_ends_sampling(opened, server):
    tab = opened("tab=sample&classes=3,8,0&count=8&steps=60")
    tab.page.click("#sample-start")
    tab.wait("#sample-result progress")
    tab.page.click("#sample-stop")
    tab.page.wait_for_function("document.querySelector('#sample-result').innerText.includes('Stopped')")
    tab.check()


@pytest.mark.slow
def test_mix_tab(opened):
    tab = opened("tab=mix&first=3&second=8&where=level&sigma=1&steps=8")
    tab.wait("#mix-map img")
    assert tab.page.locator("#mix-map img").count() == 2
    tab.page.click("#mix-start")
    tab.wait("#mix-result figure")
    assert "--mix '3,8@sigma>1'" in tab.copied("copy")
    tab.check()


@pytest.mark.slow
def test_interpolate_tab(opened):
    tab = opened("tab=interpolate&first=3&second=8&count=3&steps=8")
    tab.page.click("#interpolate-start")
    tab.wait("#interpolate-result figure")
    assert tab.page.locator("#interpolate-result .adagn-strip figure").count() == 5
    tab.page.fill("#interpolate-share input[type=number]", "1")
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_function("document.querySelector('.adagn-large figcaption').innerText === '8'")
    assert "--interpolate 3,8" in tab.copied("copy")
    assert "share=1" in tab.copied("link")
    tab.check()


@pytest.mark.slow
def test_style_tab(opened):
    tab = opened("tab=style&style=3&psi=0.5&direction=2&reach=3&steps=8")
    tab.page.click("#style-start")
    tab.wait("#style-result figure")
    assert tab.page.locator("#style-result figure").count() == 5
    command = tab.copied("copy")
    assert "--psi 0.5" in command and "'3 - 3*direction:2'" in command and "'3 + 1.5*direction:2'" in command
    tab.check()


@pytest.mark.slow
def test_inside_tab(opened):
    tab = opened("tab=inside&model=mine")
    tab.page.click("#inside-start")
    tab.wait("#inside-result img")
    tab.page.click("#inside-influence")
    tab.wait("#inside-influence-result img")
    frame = tab.page.frame_locator("#inside-frame iframe")
    assert frame.locator("h1").inner_text() == "Report of mine"
    assert tab.page.title() == "diffusion_adagn"  # the report's script did not run
    assert tab.copied("copy") == "adagn trace runs/mine"
    tab.errors = [error for error in tab.errors if "Blocked script execution" not in error]
    tab.check()


@pytest.mark.slow
def test_runs_tab_refreshes(opened, server):
    tab = opened("tab=runs&model=mine")
    tab.wait("#runs-previews img")
    step = int(re.search(r"Step ([\d,]+)", tab.page.inner_text("#runs-status"))[1].replace(",", ""))
    with (server.work / "runs/mine/metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": step + 1, "loss": 0.01}) + "\n")
    tab.page.wait_for_function(f"document.querySelector('#runs-status').innerText.includes('Step {step + 1}')")
    assert tab.page.locator("#runs-previews img").count() == 2
    assert tab.copied("copy") == "adagn train --resume runs/mine"
    tab.check()


@pytest.mark.slow
def test_sweeps_tab(opened):
    tab = opened("tab=sweeps&model=mine")
    tab.wait("#sweeps-curves img")
    tab.page.locator("#sweeps-table [role=gridcell]:has-text('2.5')").first.click()
    tab.wait("#sweeps-images img")
    assert tab.page.locator("#sweeps-images img").count() == 6
    assert tab.copied("copy") == "adagn sweep runs/mine --guidance 1,2"
    tab.check()
