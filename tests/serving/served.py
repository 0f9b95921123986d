"""A server in a thread of the test, on a free port, and a client for it."""

import base64
import http.client
import io
import json
import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import uvicorn
from PIL import Image

from diffusion_adagn.serving.metrics import Metrics
from diffusion_adagn.serving.models import open_models
from diffusion_adagn.serving.server import make_app
from diffusion_adagn.serving.settings import Limits, ServeRequest


class Client:
    """Requests to one server, each on a connection of its own."""

    def __init__(self, port):
        self.port = port

    def raw(self, method, path, body=None, timeout=120, **headers):
        """(status, headers, body)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def get(self, path, **headers):
        """(status, the JSON)"""
        status, _, body = self.raw("GET", path, **headers)
        return status, json.loads(body)

    def post(self, path, given, **headers):
        """(status, the JSON)"""
        status, _, body = self.raw("POST", path, json.dumps(given), content_type="application/json", **headers)
        return status, json.loads(body)

    def images(self, path, **given):
        """(images [N, H, W, C] in 0..255, the answer) of a request that must succeed."""
        status, answer = self.post(path, given)
        assert status == 200, answer
        return np.stack([pixels(base64.b64decode(one["png"])) for one in answer["images"]]), answer


def pixels(data):
    """uint8 [H, W, C] of a PNG file."""
    array = np.asarray(Image.open(io.BytesIO(data)))
    return array if array.ndim == 3 else array[..., None]


@contextmanager
def running(sources, models=None, **settings):
    """A running server: its client, with `models` by name."""
    limits = Limits(**settings.pop("limits", {"max_images": 24, "max_steps": 60, "max_seconds": 100}))
    request, metrics = ServeRequest(limits=limits, **settings), Metrics()
    models = open_models(sources, request, metrics) if models is None else models
    config = uvicorn.Config(make_app(models, request, metrics), log_level="error", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        client = Client(listening.getsockname()[1])
        client.models, client.metrics = models, metrics
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield client
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
