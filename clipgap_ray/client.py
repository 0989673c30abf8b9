"""A typed client of the service, synchronous and asynchronous.

client = Client("http://127.0.0.1:8000")
for neighbour in client.search(text="a red bird", k=5)[0]:
    print(neighbour.similarity, neighbour.caption)
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import httpx
import numpy as np

from clipgap_ray.errors import ClipgapError

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Neighbour:
    """A row of the index near the query; `similarity` is the inner product of unit rows."""

    row_id: int
    similarity: float
    uid: str | None = None
    caption: str | None = None
    image_path: str | None = None
    shard: str | None = None
    url: str | None = None
    splits: list[str] | None = None  # of the service, those that keep it


@dataclass(frozen=True)
class SearchResult:
    """Neighbours of every query, most alike first; indexable by query.

    Attributes:
        index: Name of the index that answered.
        version: Its version.
        shards: Index shards there are.
        shards_ok: Index shards that answered.
        degraded: True when one did not: neighbours may be missing.
        results: One list per query.
    """

    index: str
    version: str
    shards: int
    shards_ok: int
    degraded: bool
    results: list[list[Neighbour]]

    def __getitem__(self, at: int) -> list[Neighbour]:
        return self.results[at]

    def __len__(self) -> int:
        return len(self.results)


@dataclass(frozen=True)
class ClassScore:
    """A class of a zero-shot request with its probability over all classes of the request."""

    label: str
    probability: float
    similarity: float


@dataclass(frozen=True)
class IndexInfo:
    """An index of the service."""

    name: str
    version: str
    rows: int
    dim: int
    shards: int
    key: str
    recall_at_10: float | None = None
    modality: str = "image"
    model: str = ""


@dataclass(frozen=True)
class Coverage:
    """How covered a query is by the training set.

    Attributes:
        similarity: To the nearest training image; None when the index is empty.
        neighbours: Nearest training images.
        tests: Per test set: `test, similarity, margin, percentile, neighbours` (see /docs).
        splits: Per split: `name, kind, drops, decided_by`.
    """

    similarity: float | None
    neighbours: list[Neighbour]
    tests: list[dict[str, Any]]
    splits: list[dict[str, Any]]


def _search_body(
    text: str | None, image: bytes | None, vector: Any, uid: str | None, queries: Any, **more: Any
) -> dict[str, Any]:
    body: dict[str, Any] = {"text": text, "uid": uid, "queries": queries, **more}
    if image is not None:
        body["image"] = base64.b64encode(image).decode()
    if vector is not None:
        body["vector"] = np.asarray(vector, np.float64).tolist()
    return {name: value for name, value in body.items() if value is not None}


def _zero_shot_body(images: Sequence[bytes], classes: Sequence[str], templates: Any, top: int) -> dict[str, Any]:
    encoded = [base64.b64encode(image).decode() for image in images]
    body = {"images": encoded, "classes": list(classes), "top": top}
    return body if templates is None else {**body, "templates": list(templates)}


def _known(cls: Any, values: dict[str, Any]) -> Any:
    """Build a dataclass from an answer; fields of a newer service are ignored."""
    names = {field.name for field in fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


def _read_search(answer: dict[str, Any]) -> SearchResult:
    results = [[_known(Neighbour, row) for row in rows] for rows in answer["results"]]
    found: SearchResult = _known(SearchResult, {**answer, "results": results})
    return found


def _read_similarity(answer: dict[str, Any]) -> list[Coverage]:
    return [
        _known(Coverage, {**row, "neighbours": [_known(Neighbour, near) for near in row["neighbours"]]})
        for row in answer["results"]
    ]


def _read_zero_shot(answer: dict[str, Any]) -> list[list[ClassScore]]:
    return [[_known(ClassScore, row) for row in rows] for rows in answer["results"]]


def _content(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON of an answer.

    Raises:
        ClipgapError: With the server's message and hint, or what came instead.
    """
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and "message" in error:
        raise ClipgapError(f"{response.status_code} {error.get('code')}: {error['message']}", hint=error.get("hint"))
    raise ClipgapError(
        f"{response.url} answered {response.status_code} with {response.text[:200]!r}, expected JSON of clipgap",
        hint="is this the address of `clipgap serve`?",
    )


def _unreachable(base_url: str, error: httpx.HTTPError) -> ClipgapError:
    return ClipgapError(f"{base_url} does not answer: {error}", hint="is `clipgap serve` running there?")


def _headers(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


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

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            return _content(self._http.request(method, path, json=body))
        except httpx.HTTPError as error:
            raise _unreachable(self.base_url, error) from None

    def search(
        self,
        text: str | None = None,
        image: bytes | None = None,
        vector: Sequence[float] | np.ndarray | None = None,
        uid: str | None = None,
        queries: Sequence[dict[str, Any]] | None = None,
        k: int = 10,
        index: str | None = None,
        collapse: float | None = None,
        filter: Sequence[dict[str, Any]] | None = None,
    ) -> SearchResult:
        """Return the k nearest rows of one query, or of each of `queries` (dicts with text, vector, uid or image).

        `collapse` leaves out a neighbour that is at least so alike to a nearer one; `filter` is conditions that all
        neighbours fulfil, as in /docs: `[{"column": "width", "at_least": 512}, {"split": "gap-sketch"}]`.

        Raises:
            ClipgapError: With the server's message.
        """
        body = _search_body(text, image, vector, uid, queries, k=k, index=index, collapse=collapse, filter=filter)
        return _read_search(self._call("POST", "/v1/search", body))

    def similarity(
        self,
        text: str | None = None,
        image: bytes | None = None,
        vector: Sequence[float] | np.ndarray | None = None,
        uid: str | None = None,
        queries: Sequence[dict[str, Any]] | None = None,
        k: int = 5,
        index: str | None = None,
    ) -> list[Coverage]:
        """Return how covered one query is by the training set, or each of `queries`.

        Raises:
            ClipgapError: With the server's message.
        """
        body = _search_body(text, image, vector, uid, queries, k=k, index=index)
        return _read_similarity(self._call("POST", "/v1/similarity", body))

    def zero_shot(
        self,
        images: Sequence[bytes],
        classes: Sequence[str],
        templates: Sequence[str] | None = None,
        top: int = 5,
    ) -> list[list[ClassScore]]:
        """Return the best classes of every image file, best first.

        Raises:
            ClipgapError: With the server's message.
        """
        return _read_zero_shot(self._call("POST", "/v1/zero-shot", _zero_shot_body(images, classes, templates, top)))

    def indices(self) -> list[IndexInfo]:
        """Return the indexes of the service, the default one first."""
        return [_known(IndexInfo, row) for row in self._call("GET", "/v1/indices")["indices"]]


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

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            return _content(await self._http.request(method, path, json=body))
        except httpx.HTTPError as error:
            raise _unreachable(self.base_url, error) from None

    async def search(
        self,
        text: str | None = None,
        image: bytes | None = None,
        vector: Sequence[float] | np.ndarray | None = None,
        uid: str | None = None,
        queries: Sequence[dict[str, Any]] | None = None,
        k: int = 10,
        index: str | None = None,
        collapse: float | None = None,
        filter: Sequence[dict[str, Any]] | None = None,
    ) -> SearchResult:
        """See `Client.search`."""
        body = _search_body(text, image, vector, uid, queries, k=k, index=index, collapse=collapse, filter=filter)
        return _read_search(await self._call("POST", "/v1/search", body))

    async def similarity(
        self,
        text: str | None = None,
        image: bytes | None = None,
        vector: Sequence[float] | np.ndarray | None = None,
        uid: str | None = None,
        queries: Sequence[dict[str, Any]] | None = None,
        k: int = 5,
        index: str | None = None,
    ) -> list[Coverage]:
        """See `Client.similarity`."""
        body = _search_body(text, image, vector, uid, queries, k=k, index=index)
        return _read_similarity(await self._call("POST", "/v1/similarity", body))

    async def zero_shot(
        self,
        images: Sequence[bytes],
        classes: Sequence[str],
        templates: Sequence[str] | None = None,
        top: int = 5,
    ) -> list[list[ClassScore]]:
        """See `Client.zero_shot`."""
        body = _zero_shot_body(images, classes, templates, top)
        return _read_zero_shot(await self._call("POST", "/v1/zero-shot", body))

    async def indices(self) -> list[IndexInfo]:
        """See `Client.indices`."""
        return [_known(IndexInfo, row) for row in (await self._call("GET", "/v1/indices"))["indices"]]
