"""The answers of the HTTP API to errors: one sentence for each."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ..errors import InputError, did_you_mean
from ..schema import Problem, fields_of, short_repr
from .settings import MAX_BODY, InterpolateQuery, MixQuery, SampleQuery
from .worker import Dropped, Unavailable

CLIENT_GONE = 499  # no client receives it; in the metrics
QUERIES = (SampleQuery, MixQuery, InterpolateQuery)
SECTIONS = {  # an example of each
    "sampler": '{"sampler": {"sampler": "ddim", "steps": 20}}',
    "sampler.guidance": '{"sampler": {"guidance": {"scale": 2}}}',
}
FOREIGN = {  # names of other software
    "scales": ("guidance", "guidance_scale", "scale", "cfg", "cfg_scale"),
    "sampler.steps": ("num_inference_steps", "num_steps"),
    "sampler": ("scheduler",),
    "classes": ("class", "class_labels", "label", "labels"),
    "count": ("num_images", "num_samples", "n"),
}


def _error(status: int, text: str, **headers: str) -> JSONResponse:
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate of the request
    return JSONResponse({"error": " ".join(text.split())}, status, headers)


def nothing_at(path: str) -> Response:
    """The answer for an unknown address. path: of the request."""
    known = "/v1/models, /v1/classes, /v1/sample, /v1/mix, /v1/interpolate, /v1/modulation, /v1/label_check"
    return _error(404, f"there is nothing at {path[:80]!r}. The API has {known}; /openapi.json describes it.")


def add_errors(app: FastAPI) -> None:
    """Answer every error in one sentence.

    Args:
        app: the application.
    """

    @app.exception_handler(InputError)
    async def wrong(request: Request, error: InputError) -> Response:
        return _error(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return _error(422, _sentence(error))

    @app.exception_handler(Unavailable)
    async def unavailable(request: Request, error: Unavailable) -> Response:
        return _error(
            error.status, str(error), **({"retry-after": str(error.retry_after)} if error.retry_after else {})
        )

    @app.exception_handler(Dropped)
    async def dropped(request: Request, error: Dropped) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(HTTPException)
    async def no_such_page(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return nothing_at(request.url.path)
        texts = {
            405: f"{request.method} is not a method of {request.url.path[:80]!r}; see /openapi.json.",
            413: f"the body is larger than the {MAX_BODY:,} bytes that are accepted.",
            400: "the body cannot be read as JSON.",
        }
        text = texts.get(error.status_code, str(error.detail))
        return _error(error.status_code, text, **(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _error(500, f"the server failed ({type(error).__name__}); its log shows where.")


def _sentence(error: RequestValidationError) -> str:
    """What pydantic found, as the command line says it."""
    first = error.errors()[0]
    place = first["loc"][1:] if first["loc"][:1] in (("body",), ("query",)) else first["loc"]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']} at character {place[0]}."
    if not place:
        given = "" if first["input"] is None else f", not {short_repr(first['input'])}"
        return f"the body is a JSON object of settings (with the header Content-Type: application/json){given}."
    if first["type"] == "unexpected_keyword_argument":
        known = {setting.key for query in QUERIES for setting in fields_of(query)}
        key = ".".join(map(str, place))
        foreign = next((f" Did you mean {new}?" for new, old in FOREIGN.items() if key in old), "")
        return f"there is no setting {short_repr(key)}.{foreign or did_you_mean(key[:80], known)} See /openapi.json."
    if first["type"] == "dataclass_type":
        key = ".".join(map(str, place))
        return f"{key}: expected settings, such as {SECTIONS[key]}, got {short_repr(first['input'])}."
    problem = Problem.from_details({**first, "loc": place}, None)
    return problem.message if not problem.key else f"{problem.key}: {problem.message}.{problem.hint}"
