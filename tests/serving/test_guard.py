"""Who may use the server: names, origins, the token and its cookie."""

import asyncio
import json
import socket

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from diffusion_adagn.errors import InputError
from diffusion_adagn.serving.security import COOKIE, Guard, host_name, own_names
from diffusion_adagn.serving.settings import MAX_BODY, ServeRequest

TOKEN = "secret-of-the-test"


async def inside(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inside"})


def ask(path="/", query="", kind="http", host="127.0.0.1:7860", app_settings=None, **headers):
    """(status, headers, body) of a request; of a websocket ("closed", {}, b"")."""
    sent = []

    async def send(message):
        sent.append(message)

    named = {"host": host, **headers}
    encoded = [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in named.items() if v is not None]
    scope = {"type": kind, "path": path, "query_string": query.encode(), "headers": encoded}
    asyncio.run(Guard(inside, app_settings or ServeRequest())(scope, None, send))
    if sent[0]["type"] == "websocket.close":
        return "closed", {}, b""
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, sent[1]["body"]


def secret(**changes):
    return ServeRequest(token=TOKEN, **changes)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.1:7860", "[::1]:7860", "LOCALHOST:80"])
def test_loopback_names_are_allowed(host):
    assert ask(host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", "", None, "127.0.0.1.evil.example"]
)
@pytest.mark.parametrize("path", ["/", "/v1/models", "/mcp", "/healthz"])
def test_other_names_are_rejected(host, path):
    status, _, body = ask(path, host=host)
    assert status == 421 and "--allowed_host" in json.loads(body)["error"]


def test_allowed_host_is_allowed():
    settings = secret(host="0.0.0.0", allowed_hosts=("images.example",))
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert ask(host="images.example:80", app_settings=settings, **bearer)[0] == 200
    assert ask(host="0.0.0.0:80", app_settings=settings, **bearer)[0] == 421
    assert ask(host="other.example", app_settings=settings, **bearer)[0] == 421
    for name in (socket.gethostname().upper(), *own_names()):
        host = f"[{name}]:80" if ":" in name else f"{name}:80"
        assert ask(host=host, app_settings=settings, **bearer)[0] == 200
    assert ask(host="10.0.0.7", app_settings=secret(host="10.0.0.7"), **bearer)[0] == 200


def test_pages_of_other_sites_are_rejected():
    assert ask("/v1/sample", origin="http://localhost:7860")[0] == 200
    for origin in ("http://evil.example", "null", "http://evil.example:7860"):
        assert ask("/v1/sample", origin=origin)[0] == 403


def test_websocket_of_another_site_is_closed():
    assert ask(kind="websocket", host="evil.example")[0] == "closed"
    assert ask(kind="websocket", app_settings=secret())[0] == "closed"


def test_api_needs_the_bearer_token():
    for path in ("/", "/v1/models", "/mcp", "/metrics", "/openapi.json"):
        status, headers, body = ask(path, app_settings=secret())
        assert (
            status == 401 and headers["www-authenticate"] == "Bearer" and "Authorization" in json.loads(body)["error"]
        )
        assert ask(path, app_settings=secret(), authorization=f"Bearer {TOKEN}")[0] == 200
        assert ask(path, app_settings=secret(), authorization=f"Bearer {TOKEN}x")[0] == 401
        assert ask(path, app_settings=secret(), authorization=f"Basic {TOKEN}")[0] == 401
    assert ask("/healthz", app_settings=secret())[0] == 200


def test_page_takes_the_token_once():
    status, headers, _ = ask("/", f"token={TOKEN}&seed=3&class=%C3%A9", app_settings=secret())
    assert (status, headers["location"]) == (303, "/?seed=3&class=%C3%A9")
    cookie = headers["set-cookie"]
    assert TOKEN not in cookie and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    cookie = cookie.partition(";")[0]
    assert ask("/", app_settings=secret(), cookie=cookie)[0] == 200
    assert ask("/", app_settings=secret(), cookie=f"{COOKIE}=wrong")[0] == 401
    other = ServeRequest(token="another-secret")
    assert ask("/", app_settings=other, cookie=cookie)[0] == 401
    for path in ("/v1/sample", "/mcp"):  # a page of another site could make the browser send the cookie
        assert ask(path, app_settings=secret(), cookie=cookie)[0] == 401


def test_token_never_redirects_to_another_host():
    _, headers, _ = ask("//evil.example/", f"token={TOKEN}", app_settings=secret())
    assert headers["location"] == "/evil.example/"
    assert ask("/", "token=wrong-secret", app_settings=secret())[0] == 401


def test_other_machines_need_a_token():
    with pytest.raises(InputError, match="--token"):
        ServeRequest(host="0.0.0.0")
    with pytest.raises(InputError, match="--token"):
        ServeRequest(host="192.168.0.2")
    assert ServeRequest(host="::1").token is None
    for bad, said in (("short", "token: .*8 characters"), ("with space in", "token: "), ("zürich-zürich", "token: ")):
        with pytest.raises(InputError, match=said):
            ServeRequest(token=bad)


def test_error_says_whether_the_token_is_missing_or_wrong():
    said = lambda **given: json.loads(ask("/v1/models", app_settings=secret(), **given)[2])["error"]  # noqa: E731
    assert "needs its token" in said()
    assert "is not the server's" in said(authorization="Bearer wrong-token")
    assert "is not the server's" in said(query="token=wrong-token")


def test_large_body_is_rejected_before_it_is_read():
    status, _, body = ask("/v1/sample", content_length=str(MAX_BODY + 1))
    assert status == 413 and "262,144 bytes" in json.loads(body)["error"]
    assert ask("/v1/sample", content_length=str(MAX_BODY))[0] == 200


def test_host_name_has_no_port():
    assert [host_name(h) for h in ("a.b:80", "[::1]:80", "[::1]", "::1", "A")] == ["a.b", "::1", "::1", "::1", "a"]
