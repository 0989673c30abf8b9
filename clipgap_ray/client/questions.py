"""What can be asked of the service: a function per question, which says what to send and how to read the answer.

Written once for both clients (`clients`), and for whoever sends requests by other means.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np

Result = TypeVar("Result")
Known = TypeVar("Known")


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


@dataclass(frozen=True)
class Swap:
    """Where the exchange of an index's version stands: loading, flipping, draining, done, failed, or none."""

    state: str
    index: str | None = None
    version_before: str | None = None
    version_after: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class Call(Generic[Result]):
    """A question to the service: what to send, and what becomes of the answer.

    Attributes:
        method: GET or POST.
        path: Of the route.
        read: From the JSON of the answer to what is returned.
        body: JSON to send.
        repeatable: Asking twice changes nothing, so it may be asked again when nobody answered.
    """

    method: str
    path: str
    read: Callable[[dict[str, Any]], Result]
    body: dict[str, Any] | None = None
    repeatable: bool = True


def _known(cls: type[Known], values: dict[str, Any]) -> Known:
    """Build a dataclass from an answer; fields of a newer service are ignored."""
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]  # only dataclasses come here
    return cls(**{name: value for name, value in values.items() if name in names})


def _query(
    text: str | None, image: bytes | None, vector: Any, uid: str | None, image_url: str | None, **more: Any
) -> dict[str, Any]:
    body: dict[str, Any] = {"text": text, "uid": uid, "image_url": image_url, **more}
    if image is not None:
        body["image"] = base64.b64encode(image).decode()
    if vector is not None:
        body["vector"] = np.asarray(vector, np.float64).tolist()
    return {name: value for name, value in body.items() if value is not None}


def search(
    text: str | None = None,
    image: bytes | None = None,
    vector: Sequence[float] | np.ndarray | None = None,
    uid: str | None = None,
    queries: Sequence[dict[str, Any]] | None = None,
    k: int = 10,
    index: str | None = None,
    collapse: float | None = None,
    filter: Sequence[dict[str, Any]] | None = None,
    image_url: str | None = None,
    modality: str | None = None,
) -> Call[SearchResult]:
    """Return the k nearest rows of one query, or of each of `queries` (dicts with text, vector, uid or image).

    `collapse` leaves out a neighbour that is at least so alike to a nearer one; `filter` is conditions that all
    neighbours fulfil, as in /docs: `[{"column": "width", "at_least": 512}, {"split": "gap-sketch"}]`. `modality`
    ("image" or "text") asks the first index of that kind of rows.

    Raises:
        ServiceError: With the server's message.
    """

    def read(answer: dict[str, Any]) -> SearchResult:
        results = [[_known(Neighbour, row) for row in rows] for rows in answer["results"]]
        return _known(SearchResult, {**answer, "results": results})

    more = {"queries": queries, "k": k, "index": index, "collapse": collapse, "filter": filter, "modality": modality}
    return Call("POST", "/v1/search", read, _query(text, image, vector, uid, image_url, **more))


def similarity(
    text: str | None = None,
    image: bytes | None = None,
    vector: Sequence[float] | np.ndarray | None = None,
    uid: str | None = None,
    queries: Sequence[dict[str, Any]] | None = None,
    k: int = 5,
    index: str | None = None,
    image_url: str | None = None,
) -> Call[list[Coverage]]:
    """Return how covered one query is by the training set, or each of `queries`.

    Raises:
        ServiceError: With the server's message.
    """

    def read(answer: dict[str, Any]) -> list[Coverage]:
        return [
            _known(Coverage, {**row, "neighbours": [_known(Neighbour, near) for near in row["neighbours"]]})
            for row in answer["results"]
        ]

    body = _query(text, image, vector, uid, image_url, queries=queries, k=k, index=index)
    return Call("POST", "/v1/similarity", read, body)


def zero_shot(
    images: Sequence[bytes], classes: Sequence[str], templates: Sequence[str] | None = None, top: int = 5
) -> Call[list[list[ClassScore]]]:
    """Return the best classes of every image file, best first.

    Raises:
        ServiceError: With the server's message.
    """

    def read(answer: dict[str, Any]) -> list[list[ClassScore]]:
        return [[_known(ClassScore, row) for row in rows] for rows in answer["results"]]

    encoded = [base64.b64encode(image).decode() for image in images]
    body = {"images": encoded, "classes": list(classes), "top": top}
    return Call("POST", "/v1/zero-shot", read, body if templates is None else {**body, "templates": list(templates)})


def indices() -> Call[list[IndexInfo]]:
    """Return the indexes of the service, the default one first."""
    return Call("GET", "/v1/indices", lambda answer: [_known(IndexInfo, row) for row in answer["indices"]])


def swap(index: str, uri: str | None = None) -> Call[Swap]:
    """Begin to put another version in place of an index: the folder `uri`, default: its own, built anew.

    Needs the admin's token. Ask `swap_state` until it is done or failed.

    Raises:
        ServiceError: With the server's message.
    """
    body = {"index": index} if uri is None else {"index": index, "uri": uri}
    return Call("POST", "/v1/admin/swap", lambda answer: _known(Swap, answer), body, repeatable=False)


def swap_state() -> Call[Swap]:
    """Return where the last swap stands; needs the admin's token."""
    return Call("GET", "/v1/admin/swap", lambda answer: _known(Swap, answer))
