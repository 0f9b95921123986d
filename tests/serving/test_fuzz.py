"""Random requests made from the OpenAPI document: no answer is a failure of the server."""

import json

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from served import running

pytestmark = pytest.mark.slow

CASES = 50
OPERATIONS = [
    "/healthz",
    "/metrics",
    "/v1/models",
    "/v1/classes",
    "/v1/modulation",
    "/v1/label_check",
    "/v1/sample",
    "/v1/mix",
    "/v1/interpolate",
    "/v1/style",
]


@pytest.fixture(scope="module")
def server():
    with running(["digits"], limits={"max_images": 2, "max_steps": 2}) as client:
        yield client


WITHOUT_INPUT = ("/healthz", "/metrics", "/v1/models")
MODES = [
    (path, mode) for path in OPERATIONS for mode in GenerationMode if mode.is_positive or path not in WITHOUT_INPUT
]
CHEAP = {
    "/v1/sample": {"classes": "3"},
    "/v1/mix": {"mixes": ["3@coarse,8"]},
    "/v1/interpolate": {"between": "3,8", "steps_between": 0},
    "/v1/style": {"styles": ["3 - 1 + 7"]},
}


def tame(path, body):
    """A request that is within the limits, so that the sampler itself meets the other settings."""
    sampler = body.get("sampler") if isinstance(body.get("sampler"), dict) else {}
    sampler = {key: value for key, value in sampler.items() if key != "guide"} | {"steps": 2}
    return body | {"model": "digits", "count": 1, "scales": None, "sampler": sampler} | CHEAP[path]


@pytest.mark.parametrize(("path", "mode"), MODES, ids=lambda value: getattr(value, "value", value))
def test_random_requests_are_no_failure(server, path, mode):
    _, document = server.get("/openapi.json")
    assert set(document["paths"]) == set(OPERATIONS)
    (method,) = document["paths"][path]
    operation = schemathesis.openapi.from_dict(document)[path][method.upper()]
    codes = []

    @seed(1)
    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case):
        if path in CHEAP and mode.is_positive and len(codes) % 2:
            case.body = tame(path, case.body)
        answer = case.call(base_url=f"http://127.0.0.1:{server.port}", timeout=100)
        codes.append(answer.status_code)
        assert answer.status_code < 500, (case.body, case.query, answer.text)
        if answer.status_code >= 400:
            assert json.loads(answer.content)["error"]

    check()
    print(f"\n{path} {mode.value}: {len(codes)} requests, {codes.count(200)} answered with 200")
