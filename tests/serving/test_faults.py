"""What goes wrong around a server: clients, bodies, files and processes."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import uvicorn
from conftest import ROOT
from served import Client, running

from diffusion_adagn.cli.main import main
from diffusion_adagn.serving.server import Server
from diffusion_adagn.serving.settings import MAX_BODY

SHIPPED = ROOT / "diffusion_adagn/pretrained/digits"
ONE = {"classes": "3", "sampler": {"steps": 2}}


@pytest.fixture(scope="module")
def server():
    with running(["digits"]) as client:
        yield client


def works(server):
    return server.post("/v1/sample", ONE)[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 20_000, b"nul", b'{"seed": 1e999}', b'{"scales": [NaN]}',
        b'{"seed": ' + b"9" * 5000 + b"}", b'{"classes": "\\u0000"}', b'{"classes": {"a": 1}}', b'{"sampler": "x"}',
        b'{"sampler": {"guidance": {"interval": "sigma:' + b"9" * 400 + b'-5"}}}', b'{"sampler": {"churn": "1:2:3:4:5"}}',
        b'{"sampler": {"guidance": {"schedule": "power:x"}}}', b'{"sampler": {"eta": 1e400}}',
    ],
)  # fmt: skip
def test_malformed_body_is_answered(server, body):
    status, _, answer = server.raw("POST", "/v1/sample", body, content_type="application/json")
    assert status in (400, 422), answer
    assert len(json.loads(answer)["error"]) < 700
    assert works(server)


def test_huge_body_is_rejected(server):
    for path in ("/v1/sample", "/mcp"):
        status, _, answer = server.raw("POST", path, b" " * (MAX_BODY + 1), content_type="application/json")
        assert status == 413 and "262,144 bytes" in json.loads(answer)["error"]

    def endless():
        for _ in range(100):
            yield b" " * 65536

    try:
        status = server.raw("POST", "/v1/sample", endless(), content_type="application/json")[0]
    except (ConnectionError, http.client.HTTPException):  # the server closed the connection while we were sending
        status = 413
    assert status == 413 and works(server)


def test_unknown_host_is_rejected_everywhere(server):
    for path in ("/", "/v1/models", "/mcp", "/openapi.json"):
        status, _, body = server.raw("GET", path, host="evil.example")
        assert status == 421 and "evil.example" in json.loads(body)["error"]


@pytest.mark.parametrize(
    "name", ["../digits", "/etc/passwd", "digits/..", "digits%2f..", "..\\digits", "~", "", "digits\n"]
)
def test_names_are_never_paths(server, name):
    status, answer = server.post("/v1/sample", ONE | {"model": name})
    assert status == 422 and "there is no model" in answer["error"]
    sampler = {"steps": 2, "guide": name, "guidance": {"scale": 2}}
    status, answer = server.post("/v1/sample", ONE | {"sampler": sampler})
    assert status == 422 and "there is no model" in answer["error"]
    status, answer = server.post("/v1/sample", ONE | {"classes": name or ","})
    assert status == 422


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/v1/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/v1//models"]
)
def test_addresses_are_never_files(server, path):
    status, _, body = server.raw("GET", path)
    assert status == 404 and b"root:" not in body


def test_half_a_request_blocks_nobody(server):
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(
            b"POST /v1/sample HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        assert works(server)
    assert works(server)


def test_clients_that_go_at_once_leave_nothing(server):
    body = json.dumps(ONE).encode()
    head = (
        b"POST /v1/sample HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head % len(body) + body)
    assert works(server)
    worker = server.models["digits"].worker
    assert worker.waiting == 0


def test_model_goes_on_without_its_folder(tmp_path):
    run = tmp_path / "runs" / "gone"
    shutil.copytree(SHIPPED, run)
    with running([str(run)]) as client:
        assert client.get("/v1/models")[1][0]["name"] == "gone"
        shutil.rmtree(run)
        assert works(client)
        assert client.get("/v1/modulation")[0] == 200
        status, answer = client.get("/v1/label_check")  # its data settings are gone
        assert status == 200 and answer["used"] is None and "--" not in answer["sentence"]
        assert works(client)


def test_missing_model_and_used_port_are_reported(capsys):
    assert main(["serve", "nothing_here"]) == 1
    assert "there is no folder nothing_here" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "digits", "--port", port]) == 1
    assert f"port {port}" in capsys.readouterr().err
    assert main(["serve", "digits", "--host", "no-such-host.invalid", "--token", "a-long-secret"]) == 1
    said = capsys.readouterr().err
    assert "--host no-such-host.invalid is not an address of this machine" in said and "--port" not in said
    assert main(["serve", ""]) == 2
    assert "a model has no name" in capsys.readouterr().err
    assert main(["serve", "digits", "--host", "0.0.0.0"]) == 2
    assert "--token" in capsys.readouterr().err


def test_second_interrupt_ends_at_once(monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stopping = Server(uvicorn.Config(None), {})
    stopping.handle_exit(signal.SIGINT, None)
    assert stopping.should_exit and not ended and "The server is stopping." in capfd.readouterr().out
    stopping.handle_exit(signal.SIGINT, None)
    assert ended == [130]


def test_short_token_names_where_it_came_from(capsys, monkeypatch):
    assert main(["serve", "digits", "--token", "short"]) == 2
    said = capsys.readouterr().err
    assert "--token: a token of 8 characters or more is required" in said and "'short'" not in said
    monkeypatch.setenv("ADAGN_TOKEN", "short")
    assert main(["serve", "digits"]) == 2
    said = capsys.readouterr().err
    assert "ADAGN_TOKEN: a token of 8 characters or more is required" in said


@pytest.mark.serial
def test_used_port_is_reported_before_torch_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code = f"import sys; from diffusion_adagn.cli.main import main; print(main(['serve', 'digits', '--port', '{port}']))"
        code += "; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"] and f"port {port}" in done.stderr


@pytest.mark.slow
@pytest.mark.serial
def test_killed_server_leaves_nothing(tmp_path):
    """SIGKILL while it samples: the client sees a closed connection, no file is left, and the port is free."""
    process, client = start(tmp_path)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        given = json.dumps({"classes": "all", "count": 4, "sampler": {"steps": 200}})
        connection.request("POST", "/v1/sample", given, {"content-type": "application/json"})
        while b'adagn_running_requests{model="digits"} 1.0' not in client.raw("GET", "/metrics")[2]:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            connection.getresponse()
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()
    assert list(tmp_path.iterdir()) == []
    with socket.create_server(("127.0.0.1", client.port)):
        pass


@pytest.mark.slow
@pytest.mark.serial
def test_interrupted_server_ends_with_its_clients(tmp_path):
    process, client = start(tmp_path)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        given = json.dumps({"classes": "all", "count": 4, "sampler": {"steps": 250, "sampler": "heun"}})
        connection.request("POST", "/v1/sample", given, {"content-type": "application/json"})
        while b'adagn_running_requests{model="digits"} 1.0' not in client.raw("GET", "/metrics")[2]:
            time.sleep(0.05)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        answer = connection.getresponse()
        assert answer.status == 503 and "stopping" in json.loads(answer.read())["error"]
        assert process.wait(40) == 0 and time.monotonic() - began < 15
        said = process.stdout.read().decode()
        assert said.count("\n") == 2 and "The server is stopping." in said
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            client.get("/healthz")
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


def start(folder):
    """`adagn serve digits` in a process, and a client for it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diffusion_adagn", "serve", "digits", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if b"Ctrl-C" in line:
            return process, Client(port)
    raise AssertionError("the server ended")
