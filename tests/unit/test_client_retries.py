"""A question that nobody answered is asked again, in time, and only where that changes nothing."""

from __future__ import annotations

import asyncio
import email.utils
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from clipgap_ray.client import AsyncClient, Client, clients, retries
from clipgap_ray.errors import ServiceError

ANSWER = {"index": "pool", "version": "v1", "shards": 1, "shards_ok": 1, "degraded": False, "results": [[]]}
BUSY = {"error": {"code": "busy", "message": "256 requests are under way", "hint": "try again in a second"}}
LOST = httpx.Response(500, text="Internal Server Error")  # what HAProxy says, as Ray sets it up
NOW = 1_700_000_000.0


class Clock:
    """Time that passes only by waiting."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return sum(self.waits)

    def time(self) -> float:
        return NOW + sum(self.waits)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    async def later(self, seconds: float) -> None:
        self.waits.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retries, "time", clock)
    monkeypatch.setattr(clients, "time", clock)
    monkeypatch.setattr(clients, "asyncio", SimpleNamespace(sleep=clock.later))
    return clock


Outcome = httpx.Response | httpx.HTTPError
Ask = Callable[..., Any]


def says(outcomes: Iterable[Outcome]) -> tuple[httpx.MockTransport, list[str]]:
    """A service that does this, one after another, the last for ever; and what it was asked."""
    todo, asked = list(outcomes), []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        now = todo.pop(0) if len(todo) > 1 else todo[0]
        if isinstance(now, httpx.HTTPError):
            raise now
        return httpx.Response(now.status_code, content=now.content, headers=now.headers)

    return httpx.MockTransport(handle), asked


def at_once(transport: Any, question: str, *args: Any, **settings: Any) -> Any:
    with Client("http://service", None, transport, **settings) as client:
        return getattr(client, question)(*args)


def later(transport: Any, question: str, *args: Any, **settings: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient("http://service", None, transport, **settings) as client:
            return await getattr(client, question)(*args)

    return asyncio.run(ask())


both = pytest.mark.parametrize("ask", [at_once, later])


@both
@pytest.mark.parametrize(
    "lost",
    [
        LOST,
        httpx.Response(500, text="The actor died because its worker process has died"),  # Serve's own proxy
        httpx.Response(502, text="<html>"),
        httpx.Response(503, json=BUSY),
        httpx.Response(503, text="Service Unavailable"),
        httpx.Response(504),
        httpx.ReadError("[Errno 104] Connection reset by peer"),
        httpx.RemoteProtocolError("Server disconnected without sending a response."),
        httpx.WriteError("broken pipe"),
    ],
    ids=str,
)
def test_what_nobody_answered_is_asked_again(clock: Clock, ask: Ask, lost: Outcome) -> None:
    transport, asked = says([lost, lost, httpx.Response(200, json=ANSWER)])
    assert ask(transport, "search", "a red bird").results == [[]]
    assert asked == ["/v1/search"] * 3
    assert len(clock.waits) == 2
    assert 0 < clock.waits[0] <= retries.FIRST_PAUSE_S
    assert sum(clock.waits) < 1


@both
@pytest.mark.parametrize(
    ("outcome", "message", "hint"),
    [
        (httpx.Response(400, json={"error": {"code": "k_too_large", "message": "k is 9"}}), "400 k_too_large", None),
        (httpx.Response(500, json={"error": {"code": "internal", "message": "a bug"}}), "500 internal: a bug", None),
        (httpx.Response(404, text="no such path"), "answered 404 with 'no such path'", "is this the address"),
        (httpx.Response(200, text="hello"), "expected JSON of clipgap", "is this the address"),
        (httpx.ConnectError("refused"), "does not answer: refused", "is `clipgap serve` running"),
        (httpx.ReadTimeout(""), "does not answer: ReadTimeout", "is `clipgap serve` running"),
    ],
    ids=str,
)
def test_an_answer_and_a_closed_door_stand(
    clock: Clock, ask: Ask, outcome: Outcome, message: str, hint: str | None
) -> None:
    transport, asked = says([outcome])
    with pytest.raises(ServiceError) as caught:
        ask(transport, "indices")
    assert message in caught.value.message
    assert "times" not in caught.value.message
    assert (caught.value.hint or "").startswith(hint or "")
    assert (len(asked), clock.waits) == (1, [])


@both
@pytest.mark.parametrize(
    ("outcome", "status", "message", "hint"),
    [
        (LOST, 500, "the service lost the replica that held this request", "ask again"),
        (httpx.Response(503, json=BUSY), 503, "503 busy: 256 requests are under way", "try again in a second"),
        (httpx.ReadError("reset"), 0, "http://service does not answer: reset", "ask again"),
    ],
    ids=str,
)
def test_it_gives_up_in_time_and_says_how_often_it_asked(
    clock: Clock, ask: Ask, outcome: Outcome, status: int, message: str, hint: str
) -> None:
    transport, asked = says([outcome])
    with pytest.raises(ServiceError) as caught:
        ask(transport, "search", "a red bird", retry_s=20.0)
    assert message in caught.value.message
    assert caught.value.message.endswith(f"; asked {len(asked)} times")
    assert caught.value.status == status
    assert (caught.value.hint or "").startswith(hint)
    assert 5 < len(asked) < 25
    assert 20 - retries.LONGEST_PAUSE_S < sum(clock.waits) <= 20
    assert max(clock.waits) <= retries.LONGEST_PAUSE_S


@both
def test_asked_once_if_so_wanted(clock: Clock, ask: Ask) -> None:
    transport, asked = says([LOST])
    with pytest.raises(ServiceError, match="lost the replica"):
        ask(transport, "search", "a red bird", retry_s=0)
    assert (len(asked), clock.waits) == (1, [])


@both
def test_what_changes_something_is_asked_once(clock: Clock, ask: Ask) -> None:
    for outcome in (LOST, httpx.ReadError("reset"), httpx.Response(503, json=BUSY)):
        transport, asked = says([outcome])
        with pytest.raises(ServiceError):
            ask(transport, "swap", "pool")
        assert asked == ["/v1/admin/swap"]
    assert clock.waits == []


@both
@pytest.mark.parametrize("header", ["5", email.utils.formatdate(NOW + 5, usegmt=True)])
def test_it_waits_as_long_as_the_service_asks(clock: Clock, ask: Ask, header: str) -> None:
    busy = httpx.Response(503, json=BUSY, headers={"retry-after": header})
    transport, _ = says([busy, httpx.Response(200, json=ANSWER)])
    ask(transport, "search", "a red bird")
    assert clock.waits == [pytest.approx(5)]


@both
def test_a_wait_that_is_too_long_is_not_begun(clock: Clock, ask: Ask) -> None:
    for header in ("11", email.utils.formatdate(NOW + 3600, usegmt=True), "9" * 400):
        transport, asked = says([httpx.Response(503, json=BUSY, headers={"retry-after": header})])
        with pytest.raises(ServiceError, match="503 busy"):
            ask(transport, "search", "a red bird")
        assert len(asked) == 1
    assert clock.waits == []


@pytest.mark.parametrize("header", ["", "soon", "-3", "1.5", "²", email.utils.formatdate(NOW - 5, usegmt=True)])
def test_other_headers_ask_for_nothing(clock: Clock, header: str) -> None:
    assert retries.asked_to_wait_s(header) == 0
