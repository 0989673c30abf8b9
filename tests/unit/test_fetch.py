"""Images by address: what a stranger may make this service connect to, and what it takes from there."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpcore
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from clipgap_ray.serving.api import make_api
from clipgap_ray.serving.fetch import Fetcher, PublicOnly, check_url, is_public
from clipgap_ray.serving.inputs import Query
from clipgap_ray.serving.local import LocalBackend
from clipgap_ray.serving.messages import ApiError, Limits
from tests.index_fixture import unit_rows, write_embeddings
from tests.service_fixture import serve_locally

LIMITS = Limits(body_bytes=20_000, image_pixels=10_000, image_url=True, image_url_s=5.0)
PUBLIC, OTHER = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"


def _png(width: int = 8, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png()


@dataclass
class Web:
    """An internet of this process: names with addresses, and one server behind all of them."""

    names: dict[str, list[str]]
    answer: Callable[[str, str, asyncio.StreamWriter], Awaitable[None]]
    connected: list[str] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def fill(self, queries: list[Query], limits: Limits = LIMITS) -> list[Query]:
        """Start the server, fetch, stop it."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            below = _Wired(port, self.connected)
            return await Fetcher(limits, PublicOnly(self._resolve, below)).fill(queries)

    async def _resolve(self, host: str, port: int) -> list[str]:
        if host not in self.names:
            raise OSError("no such name")
        return self.names[host]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split(" ")[1]
            host = next(line[6:] for line in head.split("\r\n") if line.lower().startswith("host: "))
            self.asked.append((host, path))
            await self.answer(host, path, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the fetcher had enough
        finally:
            writer.close()


class _Wired(httpcore.AsyncNetworkBackend):
    """Every address is the test's server; which ones were asked for is remembered."""

    def __init__(self, port: int, connected: list[str]) -> None:
        self.port, self.connected, self.real = port, connected, httpcore.AnyIOBackend()

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        self.connected.append(host)
        if host == "198.51.0.1":
            raise httpcore.ConnectError("nobody there")
        return await self.real.connect_tcp("127.0.0.1", self.port)


def _reply(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\nconnection: close\r\n\r\n" + body


async def _always_png(host: str, path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(_reply("200 OK", PNG, content_length=str(len(PNG))))


def _fetch(web: Web, url: str, limits: Limits = LIMITS) -> bytes | None:
    return asyncio.run(web.fill([Query(image_url=url)], limits))[0].image


def _refused(web: Web, url: str, limits: Limits = LIMITS) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        _fetch(web, url, limits)
    assert caught.value.message
    return caught.value.status, caught.value.code


def test_an_image_is_fetched_from_the_checked_address_under_its_own_name() -> None:
    web = Web({"pictures.example": [PUBLIC, OTHER]}, _always_png)
    queries = [Query(text="a"), Query(image_url="http://pictures.example:8080/bird.png?size=8#top")]
    first, second = asyncio.run(web.fill(queries))
    assert (first, second.image, second.image_url) == (Query(text="a"), PNG, None)
    assert web.connected == [PUBLIC]
    assert web.asked == [("pictures.example:8080", "/bird.png?size=8")]


def test_the_next_address_is_tried_when_nobody_answers_at_the_first() -> None:
    web = Web({"pictures.example": ["198.51.0.1", PUBLIC]}, _always_png)
    assert _fetch(web, "http://pictures.example/") == PNG
    assert web.connected == ["198.51.0.1", PUBLIC]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16", "224.0.0.1", "239.255.255.250", "240.0.0.1",
        "255.255.255.255", "192.0.2.1", "198.18.0.1",
        "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:93.184.215.14", "fe80::1", "fe80::1%lo",
        "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::1",
        "2001:0:7f00:1::1", "2001:db8::1", "3fff::1", "100::1", "", "localhost", "1.2.3",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    web = Web({"inside.example": [address]}, _always_png)
    assert _refused(web, "http://inside.example/") == (400, "image_url_refused")
    assert web.connected == []


@pytest.mark.parametrize("address", [PUBLIC, OTHER, "8.8.8.8", "1.1.1.1", "2001:4860:4860::8888", "172.32.0.1"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def test_one_private_address_among_public_ones_refuses_the_name() -> None:
    for addresses in ([PUBLIC, "127.0.0.1"], ["::1", OTHER], [PUBLIC, "::ffff:10.0.0.1"]):
        web = Web({"both.example": addresses}, _always_png)
        assert _refused(web, "http://both.example/") == (400, "image_url_refused")
        assert web.connected == []


def test_a_name_that_resolves_differently_the_second_time_is_asked_once() -> None:
    """DNS rebinding: what was checked is what is connected to."""
    web = Web({}, _always_png)
    answers = iter([[PUBLIC], ["127.0.0.1"]])

    async def rebinding(host: str, port: int) -> list[str]:
        return next(answers)

    web._resolve = rebinding  # type: ignore[method-assign]
    assert _fetch(web, "http://rebind.example/") == PNG
    assert web.connected == [PUBLIC]
    assert next(answers) == ["127.0.0.1"]


# The system's own resolver: these need no network, they are numbers.
@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "127.1", "017700000001", "0", "[::1]", "[::ffff:127.0.0.1]",
     "[::ffff:7f00:1]", "[fe80::1%25lo]", "localhost", "LOCALHOST", "localhost.", "[::]", "169.254.169.254",
     "[64:ff9b::a9fe:a9fe]"],
)  # fmt: skip
def test_every_spelling_of_a_private_address_is_refused(host: str) -> None:
    connected: list[str] = []
    fetcher = Fetcher(LIMITS, PublicOnly(below=_Wired(1, connected)))
    with pytest.raises(ApiError) as caught:
        asyncio.run(fetcher.fill([Query(image_url=f"http://{host}/latest/meta-data")]))
    assert (caught.value.status, caught.value.code) == (400, "image_url_refused")
    assert connected == []


def test_an_unknown_name_and_a_private_one_look_alike() -> None:
    web = Web({"inside.example": ["10.0.0.1"]}, _always_png)
    messages = set()
    for host in ("inside.example", "nowhere.example"):
        with pytest.raises(ApiError) as caught:
            _fetch(web, f"http://{host}/")
        messages.add(caught.value.message)
        assert "10.0.0.1" not in str(caught.value.as_dict())
    assert len(messages) == 1


@pytest.mark.parametrize(
    "url",
    ["", "bird.jpg", "//pictures.example/", "file:///etc/passwd", "ftp://pictures.example/a", "gopher://pictures.example/",
     "data:image/png;base64,AAAA", "http://", "http:///a", "http://user:pw@pictures.example/", "http://a@pictures.example/",
     "http://pictures.example:22/", "http://pictures.example:0/", "http://pictures.example:99999/", "http://0177.0.0.1/",
     "http://①②⑦.0.0.1/", "http://[::1/", "http://xn--/", "http://pictures.example/\n", "http://\u0000/",
     "http://pictures.example/" + "a" * 2000, "javascript:alert(1)", "http://[v1.a]/"],
)  # fmt: skip
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_url(url)
    assert (caught.value.status, caught.value.code) == (400, "invalid_image_url")
    assert caught.value.hint


def test_a_label_too_long_to_be_asked_for_is_no_error_of_the_server() -> None:
    fetcher = Fetcher(LIMITS, PublicOnly())
    with pytest.raises(ApiError) as caught:
        asyncio.run(fetcher.fill([Query(image_url=f"http://{'a' * 64}.example/")]))
    assert caught.value.code == "image_url_refused"


def _redirects(hops: dict[str, str]) -> Callable[[str, str, asyncio.StreamWriter], Awaitable[None]]:
    async def answer(host: str, path: str, writer: asyncio.StreamWriter) -> None:
        if path in hops:
            writer.write(_reply("302 Found", location=hops[path], content_length="0"))
        else:
            await _always_png(host, path, writer)

    return answer


def test_redirects_are_followed_a_few_times() -> None:
    hops = {"/0": "/1", "/1": "http://other.example:8080/2", "/2": "3"}
    web = Web({"pictures.example": [PUBLIC], "other.example": [OTHER]}, _redirects(hops))
    assert _fetch(web, "http://pictures.example/0") == PNG
    assert set(web.connected) == {PUBLIC, OTHER}
    assert web.asked[-1] == ("other.example:8080", "/3")
    endless = Web({"pictures.example": [PUBLIC]}, _redirects({"/0": "/0"}))
    assert _refused(endless, "http://pictures.example/0") == (400, "image_url_failed")
    assert len(endless.asked) == 4


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://127.0.0.1/", "image_url_refused"),
        ("http://inside.example/", "image_url_refused"),
        ("//[::1]:8080/", "image_url_refused"),
        ("http://2130706433/", "image_url_refused"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("http://user@pictures.example/", "invalid_image_url"),
        ("http://pictures.example:22/", "invalid_image_url"),
        ("", "invalid_image_url"),
    ],
)
def test_redirects_to_elsewhere_are_refused(location: str, code: str) -> None:
    names = {"pictures.example": [PUBLIC], "inside.example": ["10.0.0.1"], "127.0.0.1": ["127.0.0.1"],
             "::1": ["::1"], "2130706433": ["127.0.0.1"]}  # fmt: skip
    web = Web(names, _redirects({"/0": location}))
    assert _refused(web, "http://pictures.example/0") == (400, code)
    assert web.connected == [PUBLIC]


def _body(data: bytes, **headers: str) -> Callable[[str, str, asyncio.StreamWriter], Awaitable[None]]:
    async def answer(host: str, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(_reply("200 OK", data, **headers))

    return answer


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (_body(b"", content_length="99999999999"), 413, "image_url_too_large"),
        (_body(b"x" * 30_000), 413, "image_url_too_large"),  # without a length
        (_body(b"hello", content_length="5"), 400, "broken_image"),
        (_body(PNG[:30], content_length="30"), 400, "broken_image"),
        (_body(PNG, content_length="9000"), 400, "image_url_failed"),  # cut off
        (_body(_png(200, 100)), 413, "image_too_large"),
        (_body(PNG, content_encoding="gzip"), 0, ""),  # taken as it comes: here it is a PNG after all
        (_body(PNG, nonsense="a\r\nb"), 400, "image_url_failed"),
        (_body(b"", x="y" * 200_000), 400, "image_url_failed"),
    ],
)
def test_what_lies_at_an_address(answer: Any, status: int, code: str) -> None:
    web = Web({"pictures.example": [PUBLIC]}, answer)
    if not status:
        assert _fetch(web, "http://pictures.example/") == PNG
    else:
        assert _refused(web, "http://pictures.example/") == (status, code)


def test_other_statuses_and_no_web_server() -> None:
    async def missing(host: str, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(_reply("404 Not Found", PNG))

    async def mail(host: str, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")

    async def silent(host: str, path: str, writer: asyncio.StreamWriter) -> None:
        pass

    for answer in (missing, mail, silent):
        assert _refused(Web({"a.example": [PUBLIC]}, answer), "http://a.example/") == (400, "image_url_failed")
    assert _refused(Web({"a.example": [PUBLIC]}, mail), "https://a.example/") == (400, "image_url_failed")


def test_a_request_may_download_as_much_as_it_may_send() -> None:
    data = _png(90, 90) + b"\0" * 8_000
    web = Web({"a.example": [PUBLIC]}, _body(data))
    two = [Query(image_url="http://a.example/")] * 2
    assert all(query.image == data for query in asyncio.run(web.fill(two)))
    with pytest.raises(ApiError) as caught:
        asyncio.run(web.fill(two + two[:1]))
    assert (caught.value.status, caught.value.code) == (413, "image_url_too_large")


def test_slow_bodies_names_and_connections_end_at_the_deadline() -> None:
    quick = replace(LIMITS, image_url_s=0.3)

    async def drip(host: str, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(_reply("200 OK", content_length="1000"))
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    slow_name = Web({}, _always_png)
    slow_name._resolve = never  # type: ignore[method-assign]
    for web in (Web({"a.example": [PUBLIC]}, drip), Web({"a.example": [PUBLIC]}, never), slow_name):
        assert _refused(web, "http://a.example/", quick) == (400, "image_url_timeout")


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    folder = tmp_path_factory.mktemp("fetch")
    return serve_locally(write_embeddings(folder / "emb", [unit_rows(30, 0)]), folder / "index")


def test_the_routes_search_by_address_where_it_is_allowed(backend: LocalBackend) -> None:
    picture = _png(64, 64)

    class Canned(Fetcher):
        async def _download(self, url: Any, allowance: Any) -> bytes:
            return picture

    url = "https://pictures.example/bird.png"
    with TestClient(make_api(backend, LIMITS, fetcher=Canned(LIMITS))) as client:
        by_url = client.post("/v1/search", json={"image_url": url}).json()["results"]
        by_image = client.post("/v1/search", json={"image": base64.b64encode(picture).decode()}).json()["results"]
        assert by_url == by_image
        old = client.post(
            "/knn-service", json={"image_url": url, "modality": "image", "num_images": 3, "indice_name": "pool"}
        )
        assert [row["id"] for row in old.json()] == [row["row_id"] for row in by_image[0][:3]]
        assert "download_time_count 2.0" in client.get("/metrics").text
        refused = client.post("/v1/search", json={"queries": [{"text": "a"}, {"image_url": "http://127.0.0.1:22/"}]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_image_url")
    with TestClient(make_api(backend, LIMITS)) as client:  # the real one
        for route in ("/v1/search", "/knn-service"):
            body = {"image_url": "http://127.0.0.1/"}
            old_fields = {"modality": "image", "num_images": 3, "indice_name": "pool"}
            refused = client.post(route, json=body if route == "/v1/search" else {**body, **old_fields})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "image_url_refused")
            assert refused.json()["error"]["hint"]
