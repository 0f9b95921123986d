"""Who may use the server: names under which it can be reached, and a token. One rule for API, tools and page."""

import hashlib
import hmac
import json
import socket
from collections.abc import Iterable
from urllib.parse import urlencode, urlsplit

import psutil
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .settings import EVERYWHERE, LOOPBACK, MAX_BODY, ServeRequest

COOKIE = "adagn_session"
OPEN = ("/healthz",)  # without a token
BEARER_ONLY = ("/v1", "/mcp")  # no cookie: a page of another site cannot send a header, but the browser adds the cookie


class Guard:
    """The outermost ASGI application: rejects a request, or passes it on.

    An unknown Host is rejected, since a page of another site can make its own name point to this machine (DNS
    rebinding). So is the Origin of another site.

    Args:
        app: the application.
        request: the server's settings.
    """

    def __init__(self, app: ASGIApp, request: ServeRequest):
        self.app, self.token = app, request.token
        host = own_names() if request.host in EVERYWHERE else {request.host}
        self.hosts = {name.lower().strip("[]") for name in (*LOOPBACK, *host, *request.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        host, origin = host_name(headers.get("host", "")), headers.get("origin")
        if host not in self.hosts:
            text = f"this server is not called {host[:80]!r}: start it with --allowed_host {host[:80]}."
            await _answer(scope, send, 421, text)
        elif origin is not None and host_name(urlsplit(origin).netloc) not in self.hosts:
            await _answer(scope, send, 403, f"requests of pages from {origin[:80]!r} are not accepted.")
        elif self.token is None or path in OPEN or self._has_token(headers, path):
            if _length(headers) > MAX_BODY:
                text = f"the body is larger than the {MAX_BODY:,} bytes that are accepted."
                await _answer(scope, send, 413, text, {"connection": "close"})
            else:
                await self.app(scope, _limited(receive), send)
        elif self._equals(QueryParams(scope["query_string"]).get("token", "").encode(), self.token.encode()):
            await self._set_cookie(scope, send)
        else:
            given = "authorization" in headers or "token" in QueryParams(scope["query_string"])
            text = "this token is not the server's" if given else "this server needs its token"
            text += ": send Authorization: Bearer TOKEN; in a browser open /?token=TOKEN."
            await _answer(scope, send, 401, text, {"www-authenticate": "Bearer"})

    def _has_token(self, headers: Headers, path: str) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self._equals(given.strip().encode(), self.token.encode())
        if belongs_to(path, BEARER_ONLY):
            return False
        return self._equals(cookie_parser(headers.get("cookie", "")).get(COOKIE, "").encode(), self._session().encode())

    def _session(self) -> str:
        """What the cookie holds: made of the token, which cannot be read from it."""
        return hmac.new(self.token.encode(), b"adagn page", hashlib.sha256).hexdigest()

    async def _set_cookie(self, scope: Scope, send: Send) -> None:
        """The cookie, and the same address without the token, which then is in no history."""
        rest = urlencode([(k, v) for k, v in QueryParams(scope["query_string"]).multi_items() if k != "token"])
        path = "/" + scope["path"].lstrip("/")  # two slashes would name another host
        headers = {
            "location": f"{path}?{rest}" if rest else path,
            "set-cookie": f"{COOKIE}={self._session()}; HttpOnly; SameSite=Strict; Path=/",
            "referrer-policy": "no-referrer",
        }
        await _answer(scope, send, 303, "", headers)

    @staticmethod
    def _equals(given: bytes, expected: bytes) -> bool:
        return hmac.compare_digest(given, expected)


def own_names() -> set[str]:
    """The addresses of this machine's network interfaces, and its names."""
    addresses = [address for one in psutil.net_if_addrs().values() for address in one]
    numbers = [one.address.partition("%")[0] for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)]
    name = socket.gethostname().lower()
    return {*LOOPBACK, *numbers, name, f"{name.partition('.')[0]}.local"}


def belongs_to(path: str, prefixes: Iterable[str]) -> bool:
    """Whether the path of a request is one of these or below one."""
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)


def host_name(host: str) -> str:
    """The name in a Host header, without the port: "example.org:80" and "[::1]:80" have one."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _limited(receive: Receive) -> Receive:
    """`receive`, which raises HTTPException 413 once a body without a Content-Length is too large."""
    total = 0

    async def limited() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b"")) if message["type"] == "http.request" else 0
        if total > MAX_BODY:
            raise HTTPException(413)
        return message

    return limited


def _length(headers: Headers) -> int:
    """The size of the body, as far as the client says it."""
    length = headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else 0


async def _answer(scope: Scope, send: Send, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps({"error": text}).encode() if text else b""
    fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    encoded = [(name.encode("latin-1"), value.encode("utf-8")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
