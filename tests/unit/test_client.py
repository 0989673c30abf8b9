from __future__ import annotations

import asyncio
import base64
import dataclasses
import inspect
import json
from typing import Any

import httpx
import numpy as np
import pytest

from clipgap_ray.client import AsyncClient, ClassScore, Client, IndexInfo, Neighbour, Swap
from clipgap_ray.errors import ClipgapError
from clipgap_ray.serving import messages

ANSWER = {
    "index": "pool", "version": "v1", "shards": 2, "shards_ok": 1, "degraded": True,
    "results": [[{"row_id": (1 << 60) + 1, "row_id_str": "x", "similarity": 0.5, "uid": "u", "newer": 1}], []],
}  # fmt: skip


def _client(status: int, body: Any, seen: list[httpx.Request] | None = None) -> Client:
    return Client("http://service", "secret", httpx.MockTransport(_handler(status, body, seen)), retry_s=0)


def _handler(status: int, body: Any, seen: list[httpx.Request] | None = None) -> Any:
    def handle(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(request)
        return httpx.Response(status, content=body) if isinstance(body, bytes) else httpx.Response(status, json=body)

    return handle


def test_search_sends_what_was_given_and_reads_the_answer() -> None:
    seen: list[httpx.Request] = []
    with _client(200, ANSWER, seen) as client:
        found = client.search(image=b"\xff\xd8", k=3, index="pool")
        client.search(vector=np.array([1, 2], np.float16))
    assert found[0] == [Neighbour(row_id=(1 << 60) + 1, similarity=0.5, uid="u")]
    assert (len(found), found.degraded, found.shards_ok) == (2, True, 1)
    assert seen[0].url.path == "/v1/search"
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert json.loads(seen[0].content) == {"image": base64.b64encode(b"\xff\xd8").decode(), "k": 3, "index": "pool"}
    assert json.loads(seen[1].content) == {"vector": [1.0, 2.0], "k": 10}


def test_zero_shot_and_indices() -> None:
    seen: list[httpx.Request] = []
    scores = {"results": [[{"label": "cat", "probability": 0.9, "similarity": 0.3}]]}
    assert _client(200, scores, seen).zero_shot([b"image"], ["cat"]) == [[ClassScore("cat", 0.9, 0.3)]]
    body = json.loads(seen[0].content)
    assert body["classes"] == ["cat"]
    assert "templates" not in body  # the service's default holds
    info = {"name": "pool", "version": "v", "rows": 3, "dim": 4, "shards": 1, "key": "Flat"}
    assert _client(200, {"indices": [info]}).indices() == [IndexInfo("pool", "v", 3, 4, 1, "Flat")]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, {"error": {"code": "k_too_large", "message": "k is 9", "hint": "less"}}, "400 k_too_large: k is 9"),
        (502, b"<html>bad gateway", "answered 502 with '<html>bad gateway': the service lost the replica"),
        (500, b"Internal Server Error", "answered 500 with 'Internal Server Error': the service lost the replica"),
        (500, {"error": {"code": "internal", "message": "see its log", "hint": "x"}}, "500 internal: see its log"),
        (200, b"hello", "answered 200 with 'hello'"),
        (422, {"detail": "else"}, "answered 422"),
    ],
)
def test_refusals_become_errors_with_the_servers_words(status: int, body: Any, message: str) -> None:
    with pytest.raises(ClipgapError) as caught:
        _client(status, body).search(text="x")
    assert message in caught.value.message
    assert caught.value.hint


def test_an_unreachable_service_is_named() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(ClipgapError, match="http://service does not answer: refused"):
        Client("http://service", transport=httpx.MockTransport(refuse)).indices()


def test_an_admin_swaps_and_looks() -> None:
    seen: list[httpx.Request] = []
    state = {"state": "loading", "index": "pool", "version_before": "a", "version_after": "b", "message": None}
    client = _client(202, state, seen)
    assert client.swap("pool", "out/v2") == client.swap_state() == Swap("loading", "pool", "a", "b")
    assert [(one.method, one.url.path) for one in seen] == [("POST", "/v1/admin/swap"), ("GET", "/v1/admin/swap")]
    assert json.loads(seen[0].content) == {"index": "pool", "uri": "out/v2"}


def test_both_clients_ask_the_same_questions_in_the_same_words() -> None:
    def questions(cls: type) -> dict[str, Any]:
        return {
            name: (list(inspect.signature(method).parameters), inspect.getdoc(method))
            for name, method in vars(cls).items()
            if not name.startswith("_") and name not in ("close", "ask")
        }

    assert questions(Client) == questions(AsyncClient)
    assert {"search", "similarity", "zero_shot", "indices", "swap", "swap_state"} == set(questions(Client))


def test_the_asynchronous_client_is_the_same() -> None:
    async def ask() -> Any:
        transport = httpx.MockTransport(_handler(200, ANSWER))
        async with AsyncClient("http://service", transport=transport) as client:
            return await client.search(text="x")

    assert asyncio.run(ask()) == _client(200, ANSWER).search(text="x")


@pytest.mark.parametrize(
    ("mine", "theirs", "left_out"),
    [
        (ClassScore, messages.ClassScore, set()),
        (IndexInfo, messages.IndexInfo, set()),
        (Neighbour, messages.Neighbour, {"row_id_str"}),  # for JavaScript, whose numbers end at 2**53
    ],
)
def test_the_client_has_the_fields_of_the_service(mine: Any, theirs: Any, left_out: set[str]) -> None:
    """Written twice on purpose: the client must not need the server's packages."""
    assert {field.name for field in dataclasses.fields(mine)} == set(theirs.model_fields) - left_out
