"""Many clients at once: every image right, no error but 429, memory that does not grow, and what batching gains."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from served import running

pytestmark = [pytest.mark.slow, pytest.mark.serial]

CLIENTS, REQUESTS, STEPS = 20, 10, 8


def wish(i):
    """Request i: its own class, seed and guidance scale."""
    return {"classes": str(i % 10), "seed": i, "scales": [1 + i % 3], "sampler": {"steps": STEPS}}


def memory():
    """Bytes of memory of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) * 1024


@pytest.fixture(scope="module")
def server():
    with running(["digits"], limits={"max_waiting": 64}) as client:
        yield client


def test_every_image_of_many_clients_is_right(server):
    pipe = server.models["digits"].pipe
    expected = [
        pipe(i % 10, float(1 + i % 3), STEPS, [i], output_type="np").images[0] for i in range(CLIENTS * REQUESTS)
    ]
    worst, sizes = 0, []

    def client(number):
        images = []
        for request in range(REQUESTS):
            i = number * REQUESTS + request
            images.append((i, server.images("/v1/sample", **wish(i))[0][0]))
        return images

    with ThreadPoolExecutor(CLIENTS) as threads:
        for images in threads.map(client, range(CLIENTS)):
            for i, image in images:
                worst = max(worst, np.abs(image - (expected[i] * 255).round()).max())
    sizes = server.metrics.registry.get_sample_value("adagn_batch_images_sum", {"model": "digits"})
    batches = server.metrics.registry.get_sample_value("adagn_batch_images_count", {"model": "digits"})
    print(
        f"\n{CLIENTS * REQUESTS} requests in {batches:.0f} batches of {sizes / batches:.1f} images; largest difference {worst:g}"
    )
    assert worst <= 1 and sizes == CLIENTS * REQUESTS and batches < CLIENTS * REQUESTS / 3


def test_only_429_over_the_limit():
    with running(["digits"], limits={"max_waiting": 4, "max_batch": 2}) as server:

        def client(i):
            return server.raw("POST", "/v1/sample", json.dumps(wish(i)), content_type="application/json")

        with ThreadPoolExecutor(CLIENTS) as threads:
            answers = list(threads.map(client, range(60)))
        codes = {status for status, _, _ in answers}
        assert codes == {200, 429}
        assert all(int(headers["retry-after"]) >= 1 for status, headers, _ in answers if status == 429)


def test_memory_does_not_grow(server):
    def ask(count):
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda i: server.images("/v1/sample", **wish(i)), range(count)))
        return memory()

    after_50, after_200 = ask(50), ask(150)
    print(f"\nmemory after 50 requests {after_50 / 2**20:.0f} MiB, after 200 {after_200 / 2**20:.0f} MiB")
    assert after_200 <= 1.1 * after_50


def test_waiting_clients_share_the_network(server):
    """Requests per second of 16 clients, against those of one client that waits for each answer."""

    def rate(clients, count):
        with ThreadPoolExecutor(clients) as threads:
            began = time.perf_counter()
            list(threads.map(lambda i: server.images("/v1/sample", **(wish(i) | {"scales": [2]})), range(count)))
            return count / (time.perf_counter() - began)

    rate(1, 3), rate(16, 32)
    alone, together = rate(1, 24), rate(16, 160)
    print(f"\n{alone:.1f} requests/s from one client, {together:.1f} from 16: {together / alone:.1f} times")
    assert together > 1.5 * alone  # 3 on an idle machine; see docs/serving.md
