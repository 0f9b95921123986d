"""What the server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counters of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make = {"registry": self.registry, "namespace": "adagn"}
        self.requests = Counter("requests", "requests, by operation and HTTP status", ["operation", "status"], **make)
        self.seconds = Histogram("request_seconds", "waiting and work", ["operation"], buckets=SECONDS, **make)
        self.images = Counter("images", "images sampled", ["model"], **make)
        self.batches = Histogram("batch_images", "images sampled together", ["model"], buckets=BATCHES, **make)
        self.busy = Counter("busy_seconds", "seconds in which the model worked", ["model"], **make)
        self.waiting = Gauge("waiting_requests", "requests in the queue", ["model"], **make)
        self.running = Gauge("running_requests", "requests that are sampled now", ["model"], **make)

    def watch(self, model: str, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Show how many requests wait and run."""
        self.waiting.labels(model).set_function(waiting)
        self.running.labels(model).set_function(running)

    def batch(self, model: str, images: int, seconds: float) -> None:
        """Count the images of a batch and its time. images: 0 for other work."""
        self.images.labels(model).inc(images)
        if images:
            self.batches.labels(model).observe(images)
        self.busy.labels(model).inc(seconds)

    def request(self, operation: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(operation, str(status)).inc()
        self.seconds.labels(operation).observe(seconds)

    def text(self) -> bytes:
        """All counters in Prometheus' text format."""
        return generate_latest(self.registry)
