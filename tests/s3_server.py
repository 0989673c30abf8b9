"""An S3 server on loopback that fails on request: moto's S3 behind werkzeug's threaded server.

It is what `moto.server.ThreadedMotoServer` runs, less its Flask application (one service needs no routing, and the
failures are decided in the same place where the requests are counted). Failures are deterministic: every nth request
of a method that matches, counted per server.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.core.request import Request
from moto.s3.models import s3_backends
from moto.s3.responses import S3Response
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Response

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


class _WsgiRequest(Request):
    from_wsgi_server = True  # moto then undoes the chunked encoding of bodies


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        """Say nothing."""


@dataclass
class S3Server:
    """A running server.

    Attributes:
        url: Its endpoint.
        requests: What was asked for, in order: (method, path with query).
        failed: How many requests were answered with a failure, by kind.
        fail_every: {kind: n}: every nth request gets an HTTP 500 ("error"), loses its connection in the middle of the
            body ("cut", GET only) or before any answer ("hang up"), is told to slow down ("throttle").
        delay_s: Seconds before every answer.
        authorizations: The requests' Authorization headers; "" where a request was not signed.
        expired: Access keys that are refused as those of credentials whose time is over.
        watcher: Called before every request with the number of requests so far.
    """

    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    fail_every: dict[str, int] = field(default_factory=dict)
    delay_s: float = 0.0
    authorizations: list[str] = field(default_factory=list)
    expired: set[str] = field(default_factory=set)
    watcher: Callable[[int], None] | None = None
    _counts: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Store an object without a request."""
        backend = s3_backends["123456789012"]["aws"]
        if bucket not in backend.buckets:
            backend.create_bucket(bucket, "us-east-1")
        backend.put_object(bucket, key, data)

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Every object below a prefix by its name without the prefix."""
        keys = s3_backends["123456789012"]["aws"].buckets[bucket].keys
        found = {name: keys[name].value for name in sorted(keys) if name.startswith(prefix)}
        return {name[len(prefix) :]: value for name, value in found.items()}

    @contextmanager
    def counting(self) -> Iterator[list[tuple[str, str]]]:
        """Collect the requests of a block of code."""
        seen: list[tuple[str, str]] = []
        first = len(self.requests)
        yield seen
        seen.extend(self.requests[first:])

    def _next_failure(self, method: str) -> str:
        """Decide by counting: the kinds are counted apart, so that each happens."""
        with self._lock:
            for kind, every in self.fail_every.items():
                if kind == "cut" and method != "GET":
                    continue
                self._counts[kind] = self._counts.get(kind, 0) + 1
                if self._counts[kind] % every == 0:
                    self.failed[kind] = self.failed.get(kind, 0) + 1
                    return kind
        return ""

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """The WSGI application."""
        request = _WsgiRequest(environ)
        request.get_data(cache=True)  # an unread body would be taken for the next request
        self.requests.append((request.method, request.full_path.rstrip("?")))
        self.authorizations.append(request.headers.get("Authorization", ""))
        if self.watcher:
            self.watcher(len(self.requests))
        if any(f"Credential={key}/" in self.authorizations[-1] for key in self.expired):
            text = "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
            body = "" if request.method == "HEAD" else text
            return Response(body, 400, content_type="application/xml")(environ, start)
        if not self.authorizations[-1]:  # everything is public here; moto would ask for a signature
            environ["HTTP_AUTHORIZATION"] = "AWS4-HMAC-SHA256 Credential=anyone/20260101/us-east-1/s3/aws4_request"
        time.sleep(self.delay_s)  # a slow server is what some tests are about
        failure = self._next_failure(request.method)
        if failure == "error":
            text = "<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
            return Response(text, 500, content_type="application/xml")(environ, start)
        if failure == "throttle":
            text = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            return Response(text, 503, content_type="application/xml")(environ, start)
        if failure == "hang up":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError("hung up on purpose")
        status, headers, content = _answer(request)
        content = content.encode() if isinstance(content, str) else content
        response = Response(content, status, headers)
        response.headers["Content-Length"] = headers.get("content-length", str(len(content)))
        if failure == "cut" and len(content) > 1 and status < 300:
            response.set_data(content[: len(content) // 2])
            response.headers["Content-Length"] = str(len(content))
            response.headers["Connection"] = "close"
        return response(environ, start)


def _answer(request: Request) -> tuple[int, dict[str, str], bytes | str]:
    parts = request.path.lstrip("/").split("/", 1)
    serve = S3Response.key_dispatch if len(parts) == 2 and parts[1] else S3Response.bucket_dispatch
    result = serve(request, request.raw_url, dict(request.headers))
    status, headers, content = result if len(result) == 3 else (200, {}, result)
    return status, {str(name).lower(): str(value) for name, value in headers.items()}, content


@contextmanager
def running() -> Iterator[S3Server]:
    """Serve on a free port of loopback until the block ends."""
    state = S3Server()
    server = make_server("127.0.0.1", 0, state, threaded=True, request_handler=_Quiet)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, name="s3", daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        s3_backends.reset()
