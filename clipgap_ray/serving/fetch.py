"""Images by address, for services that allow it: only from the public internet, within limits, one image at a time.

A stranger chooses the address, so it must not lead to what only this machine can reach (server-side request forgery).
The check sits in the connection itself: `PublicOnly` resolves the name, refuses it unless every address is public, and
connects to an address that it has checked, so that a name which resolves differently a moment later changes nothing;
a redirect is a new connection and is checked again. Addresses are judged after resolution, which makes the spelling
(decimal, octal, IPv4 within IPv6) irrelevant. Proxies of the environment are not used. Answers are taken as they come,
never decompressed. A refused name gets one message whatever the reason: what it resolves to here is nobody's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import httpcore
import httpx

from clipgap_ray import __version__
from clipgap_ray.serving.inputs import Query, check_image
from clipgap_ray.serving.messages import ApiError, Limits
from clipgap_ray.serving.timings import Timings

MAX_REDIRECTS = 3
MAX_URL_CHARS = 2000
CONNECT_S = 2.0  # per address of a name
AT_ONCE = 8  # downloads of one process; others wait within their deadline
PORTS = frozenset({80, 443, 8080, 8443})  # not the ports of mail and databases: they would read HTTP as commands
REDIRECTS = frozenset({301, 302, 303, 307, 308})
HEADERS = [
    (b"user-agent", f"clipgap/{__version__}".encode()), (b"accept", b"image/*"), (b"accept-encoding", b"identity")
]  # fmt: skip
# Beyond `ipaddress.is_global`, which knows neither the metadata services of clouds nor addresses that wrap others.
REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24", "192.88.99.0/24",  # protocol assignments (Oracle's metadata service), 6to4 relays
        "168.63.129.16/32",  # Azure's host agent
        "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",  # Teredo and others, documentation, 6to4, documentation
    )
)  # fmt: skip
UNICAST = ipaddress.ip_network("2000::/3")  # what IPv6 routes in public; mapped IPv4 and NAT64 lie outside

Resolve = Callable[[str, int], Awaitable[list[str]]]


def is_public(address: str) -> bool:
    """Tell whether an address, as `getaddrinfo` spells it, is one that everybody on the internet reaches alike."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 6 and ip not in UNICAST:
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in REFUSED)


class PublicOnly(httpcore.AsyncNetworkBackend):
    """Connections to public addresses only.

    Args:
        resolve: Maps (host, port) to addresses; default: the system's resolver.
        below: Makes the connections.
    """

    def __init__(self, resolve: Resolve | None = None, below: httpcore.AsyncNetworkBackend | None = None) -> None:
        self._below = below or httpcore.AnyIOBackend()
        self._resolve = resolve or self._ask_system
        # Threads of its own: a name server that never answers must not hold those that search.
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="resolve")

    async def _ask_system(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve, check every address, connect to the first that answers.

        Raises:
            ApiError: 400 when there is no address, or one that is not public.
        """
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError):  # UnicodeError: a label longer than 63 characters
            addresses = []
        if not addresses or not all(is_public(address) for address in addresses):
            raise ApiError(
                400, "image_url_refused", "the host of image_url has no address, or one that is not public",
                "send the image itself: base64 or multipart",
            )  # fmt: skip
        for address in addresses[:-1]:
            try:
                return await self._below.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._below.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)


@dataclass
class Allowance:
    """Bytes that one request may still download, over all its addresses."""

    left: int

    def take(self, num_bytes: int) -> None:
        """Use some up; ApiError 413 when there are not so many left."""
        self.left -= num_bytes
        if self.left < 0:
            raise self.exceeded()

    @staticmethod
    def exceeded() -> ApiError:
        """What an address gets whose image is larger than what is left."""
        return ApiError(413, "image_url_too_large", "the images at the addresses are larger than a request may be")


class Fetcher:
    """Replaces addresses in queries by the images that lie there.

    Args:
        limits: What one request may ask for; downloads of a request count like its body.
        network: Makes the connections; default: `PublicOnly`.
    """

    def __init__(self, limits: Limits, network: httpcore.AsyncNetworkBackend | None = None) -> None:
        self.limits = limits
        self._network = network
        self._tls: ssl.SSLContext | None = None
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def fill(self, queries: list[Query], timings: Timings | None = None) -> list[Query]:
        """Return the queries with the images of their addresses; downloads are timed.

        Raises:
            ApiError: 400 or 413, naming what is wrong with an address or with what lies there.
        """
        if not any(query.image_url for query in queries):
            return queries
        with timings.time("download_time") if timings else contextlib.nullcontext():
            return await self._fill(queries)

    async def _fill(self, queries: list[Query]) -> list[Query]:
        allowance = Allowance(self.limits.body_bytes)
        try:
            async with asyncio.timeout(self.limits.image_url_s):
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._filled(query, allowance)) for query in queries]
        except TimeoutError:
            raise ApiError(
                400, "image_url_timeout", f"image_url took longer than {self.limits.image_url_s:g} s"
            ) from None
        except ExceptionGroup as errors:  # the first is enough to refuse the request; the others were cancelled
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _filled(self, query: Query, allowance: Allowance) -> Query:
        if query.image_url is None:
            return query
        async with self._slots:
            data = await self._download(check_url(query.image_url), allowance)
        return replace(query, image=check_image(data, self.limits), image_url=None)

    async def _download(self, url: httpx.URL, allowance: Allowance) -> bytes:
        if self._network is None:
            self._network = PublicOnly()
        if self._tls is None:  # reading the authorities takes tens of milliseconds: once, and only where it is used
            self._tls = httpx.create_ssl_context(trust_env=False)
        try:
            # A pool per image: no connection outlives its check.
            async with httpcore.AsyncConnectionPool(self._tls, network_backend=self._network) as pool:
                for _ in range(MAX_REDIRECTS + 1):
                    answer = await _get(pool, url, allowance)
                    if isinstance(answer, bytes):
                        return answer
                    url = answer
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError):
            raise ApiError(400, "image_url_failed", "the host of image_url did not answer as a web server") from None
        raise ApiError(400, "image_url_failed", f"image_url redirects more than {MAX_REDIRECTS} times")


async def _get(pool: httpcore.AsyncConnectionPool, url: httpx.URL, allowance: Allowance) -> bytes | httpx.URL:
    """The body at an address, or where it redirects to."""
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    words = [(b"host", url.netloc), *HEADERS]
    async with pool.stream("GET", target, headers=words, extensions={"timeout": {"connect": CONNECT_S}}) as response:
        headers = {name.lower(): value for name, value in response.headers}
        if response.status in REDIRECTS:
            return check_url(headers.get(b"location", b"").decode("latin-1"), url)
        if response.status != 200:
            raise ApiError(400, "image_url_failed", f"image_url answered {response.status}, expected 200")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > allowance.left:
            raise Allowance.exceeded()
        chunks = []
        async for chunk in response.aiter_stream():
            allowance.take(len(chunk))
            chunks.append(chunk)
        return b"".join(chunks)


def check_url(text: str, base: httpx.URL | None = None) -> httpx.URL:
    """Return an address that may be asked for, if its host turns out to be public.

    Args:
        text: As a stranger wrote it.
        base: Where a redirect came from.

    Raises:
        ApiError: 400, saying what is wrong with it.
    """
    wrong = ApiError(
        400, "invalid_image_url",
        f"image_url is not an http or https address of at most {MAX_URL_CHARS} characters, without user and password, "
        f"with a port among {', '.join(map(str, sorted(PORTS)))}",
        'for example {"image_url": "https://example.org/bird.jpg"}',
    )  # fmt: skip
    if not text or len(text) > MAX_URL_CHARS:
        raise wrong
    try:
        url = httpx.URL(text) if base is None else base.join(text)
        port = {"http": 80, "https": 443}.get(url.scheme) if url.port is None else url.port
        fine = url.scheme in ("http", "https") and bool(url.host) and not url.userinfo and port in PORTS
    except (httpx.InvalidURL, ValueError):  # ValueError: letters that no host name may hold
        raise wrong from None
    if not fine:
        raise wrong
    return url
