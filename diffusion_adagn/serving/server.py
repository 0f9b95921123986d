"""One process with all fronts: API at /v1, tools for agents at /mcp, page at /."""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI
from mcp.server.transport_security import TransportSecuritySettings

from .actions import Models
from .agents import make_agent_server
from .http import make_api
from .metrics import Metrics
from .models import open_models
from .page import mount_page
from .security import Guard, own_names
from .settings import EVERYWHERE, MAX_BODY, ModelSettings, ServeRequest

SECONDS_TO_FINISH = 2  # for open connections when the server stops; waiting requests are answered before


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


class Server(uvicorn.Server):
    """A uvicorn server whose first Ctrl-C or SIGTERM answers all who wait with 503, and whose second ends the process.

    Args:
        config: of uvicorn.
        models: by name; their workers are stopped.
    """

    def __init__(self, config: uvicorn.Config, models: Models):
        super().__init__(config)
        self.models = models

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn's `Server`: called for each signal."""
        if self.should_exit:
            os._exit(128 + sig)  # nothing is to be saved
        os.write(
            1, b"\nThe server is stopping. Ctrl-C again ends it at once.\n"
        )  # print may be in the middle of a line
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn's `Server`: called after the first signal."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it reports each open connection as an error
        for model in self.models.values():
            model.worker.stop()
        await super().shutdown(sockets)


def serve(sources: Sequence[str], request: ServeRequest, listening: socket.socket) -> None:
    """Load the models and answer requests until Ctrl-C or SIGTERM.

    Args:
        sources: the models, as `open_pipeline` takes them.
        request: the server's settings.
        listening: the socket, which `listen` opened.

    Raises:
        InputError: a model cannot be loaded.
    """
    metrics = Metrics()
    models = open_models(sources, request, metrics)
    app = make_app(models, request, metrics)
    print(_welcome(models, request, listening.getsockname()[1]), flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_FINISH)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has stopped
        Server(config, models).run(sockets=[listening])


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


def _welcome(models: Models, request: ServeRequest, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(request.host, request.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    address = f"http://{host}:{port}"
    lines = [f"{model.name}: {model.description}" for model in models.values()]
    secret = "" if request.token is None else "?token=TOKEN"
    header = "" if request.token is None else " -H 'Authorization: Bearer TOKEN'"
    lines += [f"page     {address}/{secret}", f"API      {address}/v1, described in {address}/openapi.json"]
    lines.append(f"agents   {address}/mcp (MCP, streamable HTTP)")
    if request.host in EVERYWHERE:
        lines.append(f"names    {', '.join(sorted(own_names()))}; others by --allowed_host NAME")
    lines.append("To try it:")
    json = " -H 'Content-Type: application/json' -H 'Accept: image/png'"
    lines.append(f'  curl {address}/v1/sample{header}{json} -d \'{{"classes": "0"}}\' -o image.png')
    return "\n".join([*lines, "Ctrl-C stops the server."])
