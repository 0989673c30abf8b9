"""Who asks: a synchronous client and an asynchronous one, with a method for every function of `questions`."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, Self

import httpx

from clipgap_ray.client import questions
from clipgap_ray.client.questions import Call, Result
from clipgap_ray.errors import ServiceError

TIMEOUT_S = 60.0

Question = ParamSpec("Question")


def _content(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON of an answer.

    Raises:
        ServiceError: With the server's message and hint, or what came instead.
    """
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and "message" in error:
        message = f"{response.status_code} {error.get('code')}: {error['message']}"
        raise ServiceError(message, error.get("hint"), response.status_code)
    raise ServiceError(
        f"{response.url} answered {response.status_code} with {response.text[:200]!r}, expected JSON of clipgap",
        hint="is this the address of `clipgap serve`?",
        status=response.status_code,
    )


def _unreachable(base_url: str, error: httpx.HTTPError) -> ServiceError:
    return ServiceError(f"{base_url} does not answer: {error}", hint="is `clipgap serve` running there?")


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
    """

    def __init__(self, base_url: str, token: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        self.base_url = base_url
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
        try:
            return call.read(_content(self._http.request(call.method, call.path, json=call.body)))
        except httpx.HTTPError as error:
            raise _unreachable(self.base_url, error) from None

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
    """

    def __init__(
        self, base_url: str, token: str | None = None, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self.base_url = base_url
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
        try:
            return call.read(_content(await self._http.request(call.method, call.path, json=call.body)))
        except httpx.HTTPError as error:
            raise _unreachable(self.base_url, error) from None

    search = _later(questions.search)
    similarity = _later(questions.similarity)
    zero_shot = _later(questions.zero_shot)
    indices = _later(questions.indices)
    swap = _later(questions.swap)
    swap_state = _later(questions.swap_state)
