"""The HTTP API: a thin front of `actions`."""

import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from ..errors import InputError, did_you_mean, one_line
from ..schema import short_repr
from ..version import __version__
from . import actions, answers, openapi
from .actions import Models
from .errors import add_errors
from .images import Images, png
from .metrics import Metrics
from .settings import MAX_BODY, ClassQuery, ImagesQuery, InterpolateQuery, MixQuery, ModelQuery, SampleQuery, StyleQuery
from .waiting import progress_of, result_of
from .worker import Job, Unavailable

JSON, PNG, EVENTS = "application/json", "image/png", "text/event-stream"
FORMS = {JSON: JSON, PNG: PNG, EVENTS: EVENTS, "*/*": JSON, "application/*": JSON, "image/*": PNG, "text/*": EVENTS}
TOKEN = HTTPBearer(auto_error=False, description="needed if the server was started with a token")
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": answers.ErrorAnswer, "description": "the body cannot be read"},
    401: {"model": answers.ErrorAnswer, "description": "the token is missing or wrong"},
    413: {"model": answers.ErrorAnswer, "description": f"the body is larger than {MAX_BODY} bytes"},
    422: {"model": answers.ErrorAnswer, "description": "the request is wrong"},
    429: {"model": answers.ErrorAnswer, "description": "too many requests wait; see the header Retry-After"},
    503: {"model": answers.ErrorAnswer, "description": "the server is stopping, or has no memory for the request"},
    504: {"model": answers.ErrorAnswer, "description": "the request took too long"},
}
IMAGES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": answers.ImagesAnswer,
        "description": "The images, in the form that the header Accept names: JSON; image/png, one image or a sheet; "
        "text/event-stream, events `progress` ({done, steps}) and last `result` (as the JSON) or `error`.",
        "content": {PNG: {"schema": {"type": "string", "format": "binary"}}, EVENTS: {"schema": {"type": "string"}}},
    },
    406: {"model": answers.ErrorAnswer, "description": "the header Accept names no form that there is"},
}
ModelName = Annotated[str | None, Query(description="name of a model; by default the first one")]


def make_api(models: Models, metrics: Metrics, **options: Any) -> FastAPI:
    """The API as an application, to which the other fronts are added.

    Args:
        models: by name.
        metrics: counts its requests.
        options: of FastAPI, such as `lifespan`.
    """
    app = FastAPI(
        title="diffusion_adagn", version=__version__, docs_url=None, redoc_url=None,
        description="Images by class label, and what the conditioning of the models does.", **options,
    )  # fmt: skip
    add_errors(app)
    _count_requests(app, metrics)

    @app.get("/healthz", response_model=answers.HealthAnswer, tags=["server"])
    async def health() -> dict:
        """Whether the server answers and its models work."""
        if not all(model.worker.thread.is_alive() for model in models.values()):
            raise Unavailable("the thread of a model has ended: restart the server.")
        return {"status": "ok", "version": __version__, "models": list(models)}

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def counters() -> Response:
        """Counters in Prometheus' text format."""
        return Response(metrics.text(), media_type=metrics.content_type)

    shared: dict[str, Any] = {"responses": ERRORS, "dependencies": [Security(TOKEN), Depends(_known_parameters)]}
    app.include_router(_information(models), **shared)
    app.include_router(_sampling(models), **shared)
    document = app.openapi
    app.openapi = lambda: app.openapi_schema or openapi.corrected(document())
    return app


def _known_parameters(request: Request) -> None:
    """Raises InputError for a parameter in the address that the operation does not have."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    if unknown := next((name for name in request.query_params if name not in known), None):
        hint = did_you_mean(unknown[:80], known, most=1) or f" Parameters: {', '.join(known) or 'none'}."
        raise InputError(f"there is no parameter {short_repr(unknown)}.{hint}")


def _information(models: Models) -> APIRouter:
    """Models, classes, modulation, label check."""
    v1 = APIRouter(prefix="/v1", tags=["models"])

    @v1.get("/models", response_model=list[answers.ModelAnswer])
    async def list_models() -> list[dict]:
        """The models of this server; the first one is the default."""
        return actions.list_models(models)

    @v1.get("/classes", response_model=answers.ClassesAnswer)
    async def list_classes(model: ModelName = None) -> dict:
        """The classes of a model."""
        return actions.list_classes(models, ModelQuery(model=model))

    @v1.get("/modulation", response_model=answers.ModulationAnswer)
    async def modulation(
        request: Request,
        model: ModelName = None,
        class_name: Annotated[str | None, Query(description="name or id of a class; by default all")] = None,
    ) -> Any:
        """Where time and class enter the network; or how one class differs from the others."""
        query = ClassQuery(model=model, class_name=class_name)
        return await result_of(await run_in_threadpool(actions.modulation, models, query), _gone(request))

    @v1.get("/label_check", response_model=answers.CheckAnswer)
    async def label_check(request: Request, model: ModelName = None) -> Any:
        """Whether the model uses its label, measured on held-out images."""
        job = await run_in_threadpool(actions.label_check, models, ModelQuery(model=model))
        return await result_of(job, _gone(request))

    return v1


def _sampling(models: Models) -> APIRouter:
    """Images by class, mix, interpolation and sum of class vectors."""
    v1 = APIRouter(prefix="/v1", tags=["images"])

    @v1.post("/sample", responses=IMAGES)
    async def sample(request: Request, query: SampleQuery) -> Response:
        """Sample images of classes."""
        return await _images(request, models, query)

    @v1.post("/mix", responses=IMAGES)
    async def mix(request: Request, query: MixQuery) -> Response:
        """Sample images of several classes each, by layer or noise level."""
        return await _images(request, models, query)

    @v1.post("/interpolate", responses=IMAGES)
    async def interpolate(request: Request, query: InterpolateQuery) -> Response:
        """Sample images from one class to another."""
        return await _images(request, models, query)

    @v1.post("/style", responses=IMAGES)
    async def style(request: Request, query: StyleQuery) -> Response:
        """Sample images of sums of class vectors, also truncated, or moved along principal directions."""
        return await _images(request, models, query)

    return v1


async def _images(request: Request, models: Models, query: ImagesQuery) -> Response:
    """The images in the form that the client accepts."""
    form = _accepted(request.headers.get("accept", ""))
    job = await run_in_threadpool(actions.images, models, query)
    if form == EVENTS:
        return StreamingResponse(_events(job), media_type=EVENTS, headers={"cache-control": "no-store"})
    images = await result_of(job, _gone(request))
    if form == PNG:
        return Response(await run_in_threadpool(_one_png, images), media_type=PNG)
    return JSONResponse(await run_in_threadpool(_with_images, images))


def _accepted(header: str) -> str:
    """The first form of images in a header Accept that there is. Raises HTTPException 406 if there is none."""
    kinds = [part.partition(";")[0].strip().lower() for part in header.split(",")] if header.strip() else [JSON]
    form = next((FORMS[kind] for kind in kinds if kind in FORMS), None)
    if form is None:
        text = f"images have no form {short_repr(header)}: accept {JSON}, {PNG} or {EVENTS}."
        raise HTTPException(406, text)
    return form


def _one_png(images: Images) -> bytes:
    """The image itself if there is one, else a sheet."""
    return png(images.pixels[0] if len(images.pixels) == 1 else images.sheet(), images.record)


def _with_images(images: Images) -> dict:
    """The record with the images in it."""
    encode = lambda pixels: base64.b64encode(png(pixels)).decode()  # noqa: E731
    records = [
        {**record, "png": encode(pixels), "strip": [encode(step) for step in strip]}
        for record, pixels, strip in zip(images.record["images"], images.pixels, images.strips)
    ]
    return images.record | {"images": records}


async def _events(job: Job) -> AsyncIterator[str]:
    """The progress of a job and its result as server-sent events."""
    async for done in progress_of(job):
        yield _event("progress", {"done": done, "steps": job.steps})
    try:
        yield _event("result", await run_in_threadpool(_with_images, await result_of(job)))
    except (InputError, Unavailable) as error:
        yield _event("error", {"error": one_line(error, 1000)})


def _event(name: str, data: dict) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def _gone(request: Request) -> None:
    """Returns when the client closes the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _count_requests(app: FastAPI, metrics: Metrics) -> None:
    """Count each request of the API by its operation and status."""

    class Counted:
        def __init__(self, app: Callable):
            self.app = app

        async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
            if scope["type"] != "http":
                await self.app(scope, receive, send)
                return
            began, status = time.monotonic(), 500

            async def watch(message: dict) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            try:
                await self.app(scope, receive, watch)
            finally:
                path = getattr(scope.get("route"), "path", None)
                metrics.request(path or "other", status, time.monotonic() - began)

    app.add_middleware(Counted)
