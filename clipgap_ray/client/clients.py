"""Who asks: a synchronous client and an asynchronous one, with a method for every function of `questions`."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, Self

import httpx

from clipgap_ray.client import questions
from clipgap_ray.client.questions import Call, Result
from clipgap_ray.client.retries import RETRY_S, Tries, error_of, is_lost
from clipgap_ray.errors import ServiceError

TIMEOUT_S = 60.0

Question = ParamSpec("Question")


def _content(outcome: httpx.Response | httpx.HTTPError, base_url: str, asked: int) -> dict[str, Any]:
    """Return the JSON of an answer.

    Raises:
        ServiceError: With the server's message and hint, or what came instead, and how often it was asked.
    """
    often = f"; asked {asked} times" if asked > 1 else ""
    if not isinstance(outcome, httpx.Response):
        hint = "ask again; the service's log says more" if is_lost(outcome) else "is `clipgap serve` running there?"
        said = str(outcome) or type(outcome).__name__
        raise ServiceError(f"{base_url} does not answer: {said}{often}", hint) from None
    try:
        body = outcome.json()
    except ValueError:
        body = None
    if outcome.is_success and isinstance(body, dict):
        return body
    if error := error_of(outcome):
        message = f"{outcome.status_code} {error.get('code')}: {error['message']}{often}"
        raise ServiceError(message, error.get("hint"), outcome.status_code)
    said = f"{outcome.url} answered {outcome.status_code} with {outcome.text[:200]!r}"
    if outcome.status_code >= 500:
        message = f"{said}: the service lost the replica that held this request, or has none to give it to{often}"
        raise ServiceError(message, "ask again; the service's log says more", outcome.status_code)
    raise ServiceError(
        f"{said}, expected JSON of clipgap", "is this the address of `clipgap serve`?", outcome.status_code
    )


def _headers(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _at_once(
    plan: Callable[Question, Call[Result]],
) -> Callable[Concatenate[Client, Question], Result]:
    @functools.wraps(plan)
    def method(self: Client, /, *args: Question.args, **words: Question.kwargs) -> Result:
        return self.ask(plan(*args, **words))

    return method


def _later(
    plan: Callable[Question, Call[Result]],
) -> Callable[Concatenate[AsyncClient, Question], Awaitable[Result]]:
    @functools.wraps(plan)
    def method(self: AsyncClient, /, *args: Question.args, **words: Question.kwargs) -> Awaitable[Result]:
        return self.ask(plan(*args, **words))

    return method


class Client:
    """Synchronous client; also a context manager.

    Args:
        base_url: Of the service, for example http://127.0.0.1:8000.
        token: Bearer token, if the service wants one.
        transport: httpx transport, for tests.
        retry_s: Seconds in which a question that nobody answered is asked again (`retries`); 0: each is asked once.
            An answer may take another `TIMEOUT_S`.
    """

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        transport: httpx.BaseTransport | None = None,
        retry_s: float = RETRY_S,
    ) -> None:
        self.base_url, self.retry_s = base_url, retry_s
        self._http = httpx.Client(base_url=base_url, headers=_headers(token), timeout=TIMEOUT_S, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ask(self, call: Call[Result]) -> Result:
        """Send a question and return what its answer says; ServiceError with the server's message."""
        tries = Tries(self.retry_s if call.repeatable else 0.0)
        outcome: httpx.Response | httpx.HTTPError
        while True:
            try:
                outcome = self._http.request(call.method, call.path, json=call.body)
            except httpx.HTTPError as error:
                outcome = error
            if (pause := tries.pause(outcome)) is None:
                return call.read(_content(outcome, self.base_url, tries.made))
            time.sleep(pause)

    search = _at_once(questions.search)
    similarity = _at_once(questions.similarity)
    zero_shot = _at_once(questions.zero_shot)
    indices = _at_once(questions.indices)
    swap = _at_once(questions.swap)
    swap_state = _at_once(questions.swap_state)


class AsyncClient:
    """The same, asynchronous.

    Args:
        base_url: Of the service.
        token: Bearer token, if the service wants one.
        transport: httpx transport, for tests.
        retry_s: As of `Client`.
    """

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        retry_s: float = RETRY_S,
    ) -> None:
        self.base_url, self.retry_s = base_url, retry_s
        self._http = httpx.AsyncClient(
            base_url=base_url, headers=_headers(token), timeout=TIMEOUT_S, transport=transport
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ask(self, call: Call[Result]) -> Result:
        """See `Client.ask`."""
        tries = Tries(self.retry_s if call.repeatable else 0.0)
        outcome: httpx.Response | httpx.HTTPError
        while True:
            try:
                outcome = await self._http.request(call.method, call.path, json=call.body)
            except httpx.HTTPError as error:
                outcome = error
            if (pause := tries.pause(outcome)) is None:
                return call.read(_content(outcome, self.base_url, tries.made))
            await asyncio.sleep(pause)

    search = _later(questions.search)
    similarity = _later(questions.similarity)
    zero_shot = _later(questions.zero_shot)
    indices = _later(questions.indices)
    swap = _later(questions.swap)
    swap_state = _later(questions.swap_state)
