"""The gate before every route: bearer token, queue, deadline, body size, metrics, a line in the log.

Plain ASGI, so that nothing is parsed before it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import IO, Any

import prometheus_client
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipgap_ray.serving.admin import PREFIX as ADMIN_PREFIX
from clipgap_ray.serving.messages import ApiError, Limits

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json"})
OPEN_PREFIX = "/page/"  # the static files of the search page: what it shows needs the token
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}\Z")  # of a caller or a proxy; anything else is replaced
UNKNOWN = "other"  # one label for all paths that are no route: strangers must not create time series

access = logging.getLogger("clipgap.access")


class Meters:
    """Prometheus metrics of one process."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "clipgap_requests", "Requests by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = prometheus_client.Histogram(
            "clipgap_request_seconds", "Time to answer", ["route"], registry=self.registry
        )
        self.degraded = prometheus_client.Counter(
            "clipgap_degraded_answers", "Answers that miss an index shard", registry=self.registry
        )

    def text(self) -> bytes:
        """Return the exposition format."""
        return prometheus_client.generate_latest(self.registry)


def write_access_log(stream: IO[str]) -> None:
    """Write a line of JSON per request of this process to a stream."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.handlers, access.propagate = [handler], False
    access.setLevel(logging.INFO)


def token_sha256(token: str) -> str:
    """Return what the service keeps of a bearer token: its hash."""
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True)
class Keys:
    """`token_sha256` of the bearer tokens.

    Attributes:
        read: Opens what anybody may ask, also as the password of HTTP's Basic scheme; None lets everybody in.
        admin: Opens everything; None: the admin's routes do not exist.
    """

    read: str | None = None
    admin: str | None = None

    def admit(self, path: str, authorization: bytes) -> bool:
        """Tell whether a header opens a path."""
        kind, _, credentials = authorization.partition(b" ")
        is_bearer, is_basic = kind.lower() == b"bearer", kind.lower() == b"basic"
        token = credentials.strip() if is_bearer else _password(credentials) if is_basic else b""
        presented = hashlib.sha256(token).hexdigest() if token else ""
        # A browser adds Basic credentials by itself, whatever page asks: they must not swap anything.
        is_admin = is_bearer and self.admin is not None and hmac.compare_digest(presented, self.admin)
        if self.admin is not None and path.startswith(ADMIN_PREFIX):
            return is_admin
        if self.read is None or path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return True
        return hmac.compare_digest(presented, self.read) or is_admin


class Guard:
    """ASGI middleware.

    Args:
        app: What it guards.
        limits: Largest body, most requests at once, longest wait.
        keys: Who may come in.
        meters: Where requests are counted.
        routes: Known paths, the labels of the metrics.
    """

    def __init__(self, app: ASGIApp, limits: Limits, keys: Keys, meters: Meters, routes: frozenset[str]) -> None:
        self.app, self.limits, self.keys = app, limits, keys
        self.meters, self.routes = meters, routes
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or count and pass on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        status, begun = 500, False
        request_id = scope["request_id"] = _request_id(scope)

        async def watched(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            self._authorise(scope)
            await self._answer(scope, receive, watched)
        except ApiError as error:
            if begun:  # too late for another answer: the connection ends
                raise
            headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}.get(error.status)
            await JSONResponse(error.as_dict(), error.status, headers)(scope, receive, watched)
        finally:
            route, seconds = self._label(scope["path"]), time.monotonic() - started
            self.meters.requests.labels(route, str(status)).inc()
            self.meters.seconds.labels(route).observe(seconds)
            # What was asked, and by whom, is nobody's business.
            line = {"request_id": request_id, "method": scope["method"], "route": route, "status": status}
            access.info(json.dumps({**line, "ms": round(1e3 * seconds, 1)}))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, unless too many are under way, and no longer than the deadline."""
        if self._under_way >= self.limits.requests and scope["path"] not in OPEN_PATHS:
            raise ApiError(503, "busy", f"{self.limits.requests} requests are under way", "try again in a second")
        self._under_way += 1
        try:
            async with asyncio.timeout(self.limits.request_s):
                body = await self._body(scope, receive)
                await self.app(scope, _replay(body, receive), send)
        except TimeoutError:
            raise ApiError(503, "timeout", f"no answer within {self.limits.request_s:g} s", "ask for less") from None
        finally:
            self._under_way -= 1

    def _label(self, path: str) -> str:
        if path in self.routes:
            return path
        return next((prefix for prefix in ("/v1/thumbnails/", OPEN_PREFIX) if path.startswith(prefix)), UNKNOWN)

    def _authorise(self, scope: Scope) -> None:
        if not self.keys.admit(scope["path"], dict(scope["headers"]).get(b"authorization", b"")):
            raise ApiError(401, "unauthorised", "a valid bearer token is required", "Authorization: Bearer TOKEN")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Read the whole body: it is parsed as a whole anyway, and never more than the limit is held."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = ApiError(413, "body_too_large", f"the body is larger than {self.limits.body_bytes} bytes")
        if declared.isdigit() and int(declared[:20]) > self.limits.body_bytes:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"".join(chunks)
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.limits.body_bytes:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(chunks)


def _password(credentials: bytes) -> bytes:
    """The password of HTTP's Basic scheme: clients that know no tokens, clip-retrieval's, send ours as one."""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode() if REQUEST_ID.match(given) else uuid.uuid4().hex


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand the body over once, then whatever the connection says (its end)."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message
