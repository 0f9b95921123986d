"""The HTTP API, over a real connection, with the shipped digits."""

import base64
import http.client
import io
import json
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from conftest import ROOT, tiny_unet
from PIL import Image
from served import pixels, running

from benchmarks.digits_judge import DigitsJudge
from diffusion_adagn import ClassConditionalPipeline, ClassInterpolation, LabelSpace
from diffusion_adagn.cli.main import main
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.serving import actions
from diffusion_adagn.serving.metrics import Metrics
from diffusion_adagn.serving.models import open_models
from diffusion_adagn.serving.settings import ModelSettings, SampleQuery

FEW = {"steps": 6}


@pytest.fixture(scope="module")
def server():
    with running(["digits"]) as client:
        yield client


@pytest.fixture(scope="module")
def pipe(server):
    return server.models["digits"].pipe


def test_server_lists_models_and_classes(server):
    assert server.get("/healthz") == (200, {"status": "ok", "version": "0.1.0", "models": ["digits"]})
    _, (model,) = server.get("/v1/models")
    assert (model["name"], model["classes"], model["image_size"], model["process"]) == ("digits", 10, 8, "flow")
    status, answer = server.get("/v1/classes?model=digits")
    assert status == 200 and answer["null_id"] == 10 and answer["classes"][3] == {"id": 3, "name": "3"}


def test_sampled_image_has_its_class(server):
    images, answer = server.images("/v1/sample", classes="3", scales=[2], sampler={"steps": 10})
    assert DigitsJudge().classes(images / 255).tolist() == [3]
    (record,) = answer["images"]
    assert (record["class_name"], record["seed"], record["guidance"], record["steps"]) == ("3", 0, 2, 10)
    assert record["model_hash"] == answer["model"]["hash"]


def test_images_equal_those_of_the_pipeline(server, pipe):
    images, _ = server.images("/v1/sample", classes="3,8", seed=5, scales=[1, 3], sampler=FEW)
    expected = pipe([3, 8, 3, 8], [1.0, 1.0, 3.0, 3.0], 6, [5, 6, 5, 6], output_type="np").images
    assert np.array_equal(images, (expected * 255).round())


def test_command_of_the_record_samples_the_same_images(server, tmp_path):
    sampler = {"steps": 5, "sampler": "euler", "guidance": {"interval": "sigma:0.3-5"}}
    images, answer = server.images("/v1/sample", classes="2,null", scales=[1, 2], seed=7, count=2, sampler=sampler)
    words = answer["command"].split()
    assert words[:3] == ["adagn", "sample", "digits"]
    assert main([*words[1:], "--out", str(tmp_path / "images")]) == 0
    files = sorted((tmp_path / "images").glob("0*.png"), key=lambda f: (float(f.stem.rpartition("-g")[2]), f.name))
    again = np.stack([pixels(file.read_bytes()) for file in files])
    assert np.abs(again.astype(int) - images).max() <= 1


def test_command_names_the_checkpoint_of_a_run(tmp_path, monkeypatch):
    """A run that still trains gets newer ones, and the server goes on with this one."""
    shutil.copytree(ROOT / "tests/recorded/run", tmp_path / "runs/mine", ignore=shutil.ignore_patterns("pipeline"))
    monkeypatch.chdir(tmp_path)
    models = open_models(["runs/mine"], ModelSettings(), Metrics())
    line = actions.images_command(models, SampleQuery(sampler={"steps": 2}))
    models["mine"].worker.close()
    assert line.startswith("adagn sample runs/mine/checkpoints/step-00000006 ")
    assert models["mine"].kind == "EMA weights, step 6"


def test_mix_receives_classes_by_layer(server, pipe):
    images, answer = server.images("/v1/mix", mixes=["3@coarse,8@fine", "3"], count=2, seed=1, sampler=FEW)
    expected = pipe(
        class_plan=["3@coarse,8@fine"] * 2 + ["3"] * 2, num_inference_steps=6, seeds=[1, 2, 1, 2], output_type="np"
    )
    assert np.abs(images - (expected.images * 255).round()).max() <= 1
    assert "8@fine: 3 of 8 sites" in answer["mixes"]["3@coarse,8@fine"]


def test_interpolation_goes_from_class_to_class(server, pipe):
    images, answer = server.images("/v1/interpolate", between="3,8", steps_between=1, sampler=FEW)
    plans = [ClassInterpolation.parse("3,8", pipe.labels, share) for share in (0, 0.5, 1)]
    expected = pipe(class_plan=plans, num_inference_steps=6, seeds=[0, 0, 0], output_type="np").images
    assert np.abs(images - (expected * 255).round()).max() <= 1
    assert [one["class_name"] for one in answer["images"]] == ["3", "3 0.5 8 0.5", "8"]


def test_style_is_a_sum_of_class_vectors(server, pipe):
    styles = ["3 - 1 + 7", "3 + 1.5*direction:1"]
    images, answer = server.images("/v1/style", styles=styles, psi=0.5, count=2, seed=4, sampler=FEW)
    plans = [plan for text in styles for plan in [pipe.style(text, 0.5)] * 2]
    expected = pipe(class_plan=plans, num_inference_steps=6, seeds=[4, 5, 4, 5], output_type="np").images
    assert np.abs(images - (expected * 255).round()).max() <= 1
    assert answer["command"].endswith("--steps 6 --style '3 - 1 + 7' --style '3 + 1.5*direction:1'")


def test_png_is_the_image_or_a_sheet(server):
    ask = lambda given: server.raw(  # noqa: E731
        "POST", "/v1/sample", json.dumps(given), content_type="application/json", accept="image/png"
    )
    status, headers, body = ask({"classes": "3", "sampler": FEW})
    image = Image.open(io.BytesIO(body))
    assert (status, headers["content-type"], image.size) == (200, "image/png", (8, 8))
    assert json.loads(image.text["adagn"])["images"][0]["class_name"] == "3"
    images, _ = server.images("/v1/sample", classes="3", sampler=FEW)
    assert np.array_equal(pixels(body), images[0])
    _, _, body = ask({"classes": "3,8", "sampler": FEW})
    assert pixels(body).shape[1] > 200


def test_strip_ends_at_the_image(server):
    status, answer = server.post("/v1/sample", {"classes": "3", "sampler": FEW, "strip": 4})
    (record,) = answer["images"]
    strip = [pixels(base64.b64decode(step)).astype(int) for step in record["strip"]]
    assert status == 200 and len(strip) == 4
    assert np.abs(strip[-1] - pixels(base64.b64decode(record["png"]))).max() <= 1
    assert np.abs(strip[0] - strip[-1]).max() > 30


def test_events_report_steps_and_the_result(server):
    given = {"classes": "3", "sampler": FEW, "count": 8}
    status, headers, body = server.raw(
        "POST", "/v1/sample", json.dumps(given), content_type="application/json", accept="text/event-stream"
    )
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = [dict(line.split(": ", 1) for line in event.splitlines()) for event in body.decode().strip().split("\n\n")]
    assert events[0]["event"] == "progress" and json.loads(events[0]["data"])["steps"] == 6
    done = [json.loads(event["data"])["done"] for event in events[:-1]]
    assert done == sorted(done)
    assert events[-1]["event"] == "result" and len(json.loads(events[-1]["data"])["images"]) == 8


def test_modulation_is_explained(server):
    status, answer = server.get("/v1/modulation")
    assert status == 200 and len(answer["sites"]) == 8 and len(answer["nearest_classes"]) == 10
    for site in answer["sites"]:
        assert sum(site["variance"]["gamma"].values()) == pytest.approx(1)
    status, one = server.get("/v1/modulation?class_name=3")
    assert status == 200 and one["class_id"] == 3 and one["nearest_classes"] == answer["nearest_classes"]["3"]
    assert any("class 3 differs most" in sentence for sentence in one["sentences"])


@pytest.mark.slow
def test_label_check_says_that_the_label_is_used(server):
    status, answer = server.get("/v1/label_check")
    assert status == 200 and answer["used"] is True and "held-out" in answer["sentence"]


WRONG = [
    ("sample", {"classes": "zebra"}, "there is no class 'zebra'"),
    ("sample", {"clases": "3"}, "Did you mean classes?"),
    ("sample", {"sampler": {"stepz": 3}}, "Did you mean sampler.steps"),
    ("sample", {"sampler": {"steps": 0}}, "sampler.steps: must be at least 1, got 0."),
    ("sample", {"sampler": {"steps": 61}}, "more than the limit of 60 per request: set steps to 60 or fewer."),
    ("sample", {"sampler": {"sampler": "dpmm"}}, "Did you mean dpm++?"),
    ("sample", {"sampler": {"sampler": "ddim"}}, "ddim"),
    ("sample", {"sampler": {"guide": "/etc/passwd"}}, "there is no model '/etc/passwd'"),
    ("sample", {"count": 25}, "more than the limit of 24 per request"),
    ("sample", {"count": 3}, "30 images are more than the limit of 24 per request"),
    ("sample", {"classes": "3", "count": 10**15}, "more than the limit of 24"),
    ("sample", {"seed": -1}, "seed: must be at least 0, got -1."),
    ("sample", {"classes": "3", "seed": 2**63 - 1}, "give a smaller seed"),
    ("sample", {"classes": "3", "scales": [1e30], "strip": 9}, "strip: must be at most 8"),
    ("sample", {"scales": [2], "sampler": {"guidance": {"scale": 3}}}, "give one of them"),
    ("sample", {"model": "../../etc"}, "Models of this server: digits"),
    ("sample", {"model": "digits\0"}, "there is no model"),
    ("sample", {"classes": "\ud800"}, "classes: expected a word"),
    ("sample", {"classes": "3," * 3000}, "must have at most 4,000 characters"),
    ("mix", {}, "mixes: is missing."),
    ("mix", {"mixes": 3}, 'mixes: expected texts, such as ["3@coarse,8@fine"]'),
    ("sample", {"classes": {"a": 3}}, 'classes: expected text with commas, such as "3,8"'),
    ("sample", {"sampler": "ddim"}, 'such as {"sampler": {"sampler": "ddim", "steps": 20}}, got \'ddim\''),
    ("sample", {"sampler": {"guidance": 2}}, 'such as {"sampler": {"guidance": {"scale": 2}}}, got 2'),
    ("sample", {"guidance": 2}, "there is no setting 'guidance'. Did you mean scales?"),
    ("mix", {"mixes": []}, "needs at least 1 value"),
    ("mix", {"mixes": ["3@coarse"]}, "no rule covers"),
    ("mix", {"mixes": ["3@nowhere,8"]}, "is not a place in the network"),
    ("interpolate", {"between": "3"}, "two different classes"),
    ("style", {"styles": ["3 + 8"]}, "add up to 2"),
    ("style", {"styles": ["3 + direction:10"]}, "expected direction:1 to direction:9"),
    ("style", {"styles": 3}, 'styles: expected texts, such as ["0.5*3 + 0.5*8"]'),
    ("style", {"styles": ["3"], "psi": "nowhere:1"}, "is not a place in the network"),
    ("sample", [1], "the body is a JSON object"),
    ("sample", None, "the body is a JSON object"),
    ("sample", "3", "the body is a JSON object"),
]


@pytest.mark.parametrize(("operation", "given", "said"), WRONG)
def test_wrong_request_is_answered_in_one_sentence(server, operation, given, said):
    status, answer = server.post(f"/v1/{operation}", given)
    assert status == 422 and said in answer["error"]
    assert "\n" not in answer["error"] and "pydantic" not in answer["error"] and len(answer["error"]) < 700


@pytest.mark.parametrize(
    ("operation", "given", "names"),
    [
        ("sample", {"classes": ["3", 8]}, ["3", "8"]),
        ("sample", {"classes": 3}, ["3"]),
        ("mix", {"mixes": "3@coarse,8@fine"}, ["3@coarse,8@fine"]),
        ("style", {"styles": "2*3 - 8", "psi": 0}, ["2*3 - 8 psi 0"]),
        ("interpolate", {"between": [3, "8"], "steps_between": 0}, ["3", "8"]),
    ],
)
def test_lists_and_numbers_are_texts(server, operation, given, names):
    status, answer = server.post(f"/v1/{operation}", given | {"sampler": {"steps": 1}})
    assert status == 200 and [one["class_name"] for one in answer["images"]] == names


def test_unknown_parameter_is_rejected(server):
    for path in ("/v1/classes?modle=digits", "/v1/models?modle=digits", "/v1/label_check?modle=digits"):
        status, answer = server.get(path)
        assert status == 422 and "there is no parameter 'modle'" in answer["error"]
    assert "Did you mean model?" in server.get("/v1/classes?modle=digits")[1]["error"]


@pytest.mark.parametrize(
    ("accept", "status", "kind"),
    [
        ("image/jpeg", 406, "application/json"),
        ("image/*", 200, "image/png"),
        ("text/html, */*;q=0.1", 200, "application/json"),
    ],
)
def test_accept_chooses_a_form_or_406(server, accept, status, kind):
    given = json.dumps({"classes": "3", "sampler": {"steps": 1}})
    answered, headers, body = server.raw("POST", "/v1/sample", given, content_type="application/json", accept=accept)
    assert (answered, headers["content-type"]) == (status, kind)
    assert status == 200 or "image/png" in json.loads(body)["error"]


def test_unknown_addresses_are_answered(server):
    for path in ("/v1/nothing", "/nothing", "/gradio_api/nothing"):
        status, answer = server.get(path)
        assert status == 404 and "there is nothing at" in answer["error"]
    assert server.get("/v1/sample")[0] == 405
    assert server.get("/v1/classes?model=none")[0] == 422
    status, _, body = server.raw("GET", "/")
    assert status == 200 and b"/openapi.json" in body


def test_openapi_document_is_valid(server):
    validator = pytest.importorskip("openapi_spec_validator")
    _, document = server.get("/openapi.json")
    validator.validate(document)
    assert document["openapi"].startswith("3.1")
    assert {"/v1/sample", "/v1/mix", "/v1/interpolate", "/v1/style", "/v1/modulation", "/v1/label_check"} <= set(
        document["paths"]
    )
    sampler = document["components"]["schemas"]["SamplerSettings"]["properties"]
    assert {"sampler", "steps", "eta", "spacing", "guidance"} <= set(sampler)
    assert sampler["steps"]["minimum"] == 1 and "sampler steps" in sampler["steps"]["description"]
    assert sampler["spacing"]["default"] is None and sampler["churn"]["default"] is None
    scales = document["components"]["schemas"]["SampleQuery"]["properties"]["scales"]
    assert scales["default"] is None and (scales["anyOf"][0]["minItems"], scales["anyOf"][0]["maxItems"]) == (1, 100)
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if path.startswith("/v1"):
                assert {"401", "413"} <= set(operation["responses"]) and operation["security"]


def test_waiting_requests_are_sampled_together(server, pipe):
    """Each image is within one of 255 levels of the one sampled alone."""
    requests = [{"classes": str(i), "seed": 100 + i, "scales": [1 + i % 3]} for i in range(8)]
    expected = [pipe(i, [float(1 + i % 3)], 6, [100 + i], output_type="np").images[0] for i in range(8)]
    before = server.metrics.registry.get_sample_value("adagn_batch_images_count", {"model": "digits"})
    blocked = hold(server)
    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(server.images, "/v1/sample", sampler=FEW, **one) for one in requests]
        while server.models["digits"].worker.waiting < 8:
            time.sleep(0.01)
        blocked.set()
        images = [one.result()[0][0] for one in waiting]
    for image, alone in zip(images, expected):
        assert np.abs(image - (alone * 255).round()).max() <= 1
    after = server.metrics.registry.get_sample_value("adagn_batch_images_count", {"model": "digits"})
    assert after - before == 1


def hold(server):
    """Keeps the worker busy until the event is set."""
    event, started = threading.Event(), threading.Event()

    def wait(batch):
        started.set()
        event.wait(60)

    server.models["digits"].call(wait)
    assert started.wait(30)
    return event


def test_full_queue_is_answered_with_429(server):
    limit = server.models["digits"].limits.max_waiting
    blocked = hold(server)
    jobs = [server.models["digits"].call(lambda batch: None) for _ in range(limit)]
    status, headers, body = server.raw(
        "POST", "/v1/sample", json.dumps({"classes": "3", "sampler": FEW}), content_type="application/json"
    )
    blocked.set()
    assert status == 429 and int(headers["retry-after"]) >= 1 and "as many requests wait" in json.loads(body)["error"]
    for job in jobs:
        job.wait()


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_client_that_goes_away_frees_the_worker(server, accept):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    given = json.dumps({"classes": "all", "count": 2, "sampler": {"steps": 60, "sampler": "heun"}})
    connection.request("POST", "/v1/sample", given, {"content-type": "application/json", "accept": accept})
    if accept == "text/event-stream":
        assert connection.getresponse().readline() == b"event: progress\n"
    worker = server.models["digits"].worker
    while not worker.running:
        time.sleep(0.01)
    (job,) = worker.running
    while job.steps_done < 1:
        time.sleep(0.01)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    images, _ = server.images("/v1/sample", classes="3", sampler={"steps": 1})
    assert len(images) == 1 and job.steps_done < 60
    assert job.future.exception() is not None


def test_metrics_count_requests_and_images(server):
    server.images("/v1/sample", classes="3", sampler={"steps": 1})
    status, headers, body = server.raw("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    text = body.decode()
    assert 'adagn_requests_total{operation="/v1/sample",status="200"}' in text
    assert 'adagn_images_total{model="digits"}' in text and 'adagn_waiting_requests{model="digits"} 0.0' in text


def test_two_models_have_names_and_may_guide_each_other(tmp_path):
    with running(["digits", "digits"]) as client:
        assert [model["name"] for model in client.get("/v1/models")[1]] == ["digits", "digits-2"]
        sampler = {"steps": 3, "guide": "digits-2", "guidance": {"scale": 2}}
        images, _ = client.images("/v1/sample", classes="3", sampler=sampler)
        alone, _ = client.images("/v1/sample", classes="3", model="digits-2", sampler={"steps": 3})
        assert np.abs(images - alone.astype(int)).max() <= 1  # a guide that is the model itself changes nothing


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"num_classes": None, "null_class": False}, id="unconditional"),
        pytest.param({"null_class": False}, id="no null", marks=pytest.mark.slow),
        pytest.param({"conditioning": "cross_attention"}, id="cross_attention", marks=pytest.mark.slow),
        pytest.param({"conditioning": "none"}, id="class ignored", marks=pytest.mark.slow),
    ],
)
def test_models_of_every_kind_are_answered(tmp_path, changes):
    unet = tiny_unet(**changes)
    classes = LabelSpace(("cat", "dog", "tench"), has_null=unet.config.null_class) if unet.config.num_classes else None
    ClassConditionalPipeline(unet, make_scheduler(DiffusionConfig()), classes).save_pretrained(tmp_path / "kind")
    with running([str(tmp_path / "kind")]) as client:
        assert client.images("/v1/sample", sampler={"steps": 2})[0].shape[1:] == (8, 8, 1)
        assert (
            client.get("/v1/classes")[0] == client.get("/v1/modulation")[0] == client.get("/v1/label_check")[0] == 200
        )
        for path in ("/v1/modulation?class_name=cat", "/v1/modulation?class_name=null", "/v1/modulation?class_name=0"):
            assert client.get(path)[0] in (200, 422)
        for path, given in (
            ("sample", {"classes": "null"}),
            ("sample", {"scales": [2]}),
            ("mix", {"mixes": ["cat@coarse,dog"]}),
            ("interpolate", {"between": "cat,dog"}),
        ):
            assert client.post(f"/v1/{path}", given | {"sampler": {"steps": 2}})[0] in (200, 422)


def test_token_is_asked_of_the_api():
    with running(["digits"], token="secret-of-the-test") as client:
        given = {"classes": "3", "sampler": {"steps": 1}}
        assert client.post("/v1/sample", given)[0] == 401
        assert client.post("/v1/sample", given, authorization="Bearer secret-of-the-test")[0] == 200
        assert client.raw("POST", "/mcp", "{}", content_type="application/json")[0] == 401


def test_error_of_the_model_is_not_a_traceback(server, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(server.models["digits"].pipe, "sample", fail)
    status, answer = server.post("/v1/sample", {"classes": "3", "sampler": FEW})
    assert status == 500 and "ZeroDivisionError" in answer["error"] and "inside" not in answer["error"]
