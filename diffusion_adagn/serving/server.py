"""One process with all fronts: API at /v1, tools for agents at /mcp, page at /."""

import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Sequence

import uvicorn
from fastapi import FastAPI
from mcp.server.transport_security import TransportSecuritySettings

from ..errors import InputError
from .actions import Models
from .agents import make_agent_server
from .http import MAX_BODY, make_api
from .metrics import Metrics
from .models import open_models
from .page import mount_page
from .security import Guard
from .settings import ModelSettings, ServeRequest

SECONDS_TO_FINISH = 5  # for open requests when the server stops


def make_app(models: Models, request: ServeRequest, metrics: Metrics) -> FastAPI:
    """The application with all fronts.

    Args:
        models: by name; their workers are closed when the application stops.
        request: the server's settings.
        metrics: of the server.
    """
    agents = make_agent_server(models)
    guarded = TransportSecuritySettings(enable_dns_rebinding_protection=False)  # `Guard` has one list for all fronts
    mcp = agents.streamable_http_app(stateless_http=True, transport_security=guarded, max_request_body_size=MAX_BODY)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with agents.session_manager.run():
            yield
        for model in models.values():
            model.worker.close()

    app = make_api(models, metrics, lifespan=lifespan)
    app.router.routes.extend(mcp.routes)
    mount_page(app, models)
    app.add_middleware(Guard, request=request)  # the last one added is the outermost
    return app


def serve(sources: Sequence[str], request: ServeRequest) -> None:
    """Load the models and answer requests until Ctrl-C or SIGTERM.

    Args:
        sources: the models, as `open_pipeline` takes them.
        request: the server's settings.

    Raises:
        InputError: a model cannot be loaded, or the port is in use.
    """
    listening = _listen(request)
    with listening:
        metrics = Metrics()
        models = open_models(sources, request, metrics)
        app = make_app(models, request, metrics)
        port = listening.getsockname()[1]
        print(_welcome(models, request, port), flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_FINISH)
        uvicorn.Server(config).run(sockets=[listening])


def serve_stdio(sources: Sequence[str], settings: ModelSettings) -> None:
    """Load the models and answer the agent that started this process, over stdin and stdout.

    Args:
        sources: the models, as `open_pipeline` takes them.
        settings: how models are loaded, and limits.

    Raises:
        InputError: a model cannot be loaded.
    """
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the protocol
        models = open_models(sources, settings, Metrics())
        for model in models.values():
            print(f"{model.name}: {model.description}", file=sys.stderr)
    make_agent_server(models).run("stdio")


def _listen(request: ServeRequest) -> socket.socket:
    """The socket, before models are loaded: a port in use is reported at once."""
    family = socket.AF_INET6 if ":" in request.host else socket.AF_INET
    try:
        return socket.create_server((request.host, request.port), family=family, backlog=512)
    except OSError as error:
        text = f"cannot listen on {request.host} port {request.port} ({error.strerror or error}): give another --port."
        raise InputError(text) from None


def _welcome(models: Models, request: ServeRequest, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(request.host, request.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    address = f"http://{host}:{port}"
    lines = [f"{model.name}: {model.description}" for model in models.values()]
    secret = "" if request.token is None else "?token=TOKEN"
    header = "" if request.token is None else " -H 'Authorization: Bearer TOKEN'"
    lines += [f"page     {address}/{secret}", f"API      {address}/v1, described in {address}/openapi.json"]
    lines += [f"agents   {address}/mcp (MCP, streamable HTTP)", "To try it:"]
    json = " -H 'Content-Type: application/json' -H 'Accept: image/png'"
    lines.append(f'  curl {address}/v1/sample{header}{json} -d \'{{"classes": "0"}}\' -o image.png')
    return "\n".join([*lines, "Ctrl-C stops the server."])
