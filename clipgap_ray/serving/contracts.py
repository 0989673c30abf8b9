"""What the parts of the service ask of each other: routes of a backend, a backend of its encoder and its indexes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from clipgap_ray.index import Answer
from clipgap_ray.serving.filters import Filter
from clipgap_ray.serving.inputs import Query
from clipgap_ray.serving.messages import IndexInfo, Neighbour, Readiness, SetInfo, SimilarityResult, SplitInfo
from clipgap_ray.serving.metadata import Metadata
from clipgap_ray.serving.timings import Timings


@dataclass(frozen=True)
class Found:
    """An index's answer to a batch of queries: who answered, and the neighbours of every query."""

    info: IndexInfo
    answer: Answer
    neighbours: list[list[Neighbour]]


@dataclass(frozen=True)
class Covered:
    """Where queries stand: the index's answer, and per query its coverage."""

    found: Found
    results: list[SimilarityResult]


class Backend(Protocol):
    """What `api.make_api` needs."""

    timings: Timings

    async def search(
        self, index: str | None, queries: list[Query], k: int, collapse: float | None = None, within: Filter = ()
    ) -> Found:
        """Return the k nearest rows of every query; ApiError for an unknown index or uid, or a wrong dimension."""
        ...

    async def describe(self, index: str | None, row_ids: list[int]) -> list[dict[str, Any]]:
        """Return the metadata of rows, {} for an unknown or hidden one."""
        ...

    async def zero_shot(self, images: list[bytes], classes: list[str], templates: list[str]) -> np.ndarray:
        """Return (n, c) float32 similarities of n image files to c classes."""
        ...

    async def similarity(self, index: str | None, queries: list[Query], k: int) -> Covered:
        """Return how covered every query is; ApiError 404 when the service knows no scores."""
        ...

    async def columns(self, index: str | None) -> pa.Schema:
        """Return the columns of an index's metadata; ApiError 404 for an unknown index."""
        ...

    async def splits(self) -> list[SplitInfo]:
        """Return the splits that queries are judged by."""
        ...

    async def sets(self) -> list[SetInfo]:
        """Return the test sets that queries are compared with."""
        ...

    async def thumbnail(self, index: str | None, row_id: int, version: str | None = None) -> bytes:
        """Return a small JPEG of a row of an index; ApiError 404 where there is none to show."""
        ...

    async def indices(self) -> list[IndexInfo]:
        """Return the indexes, the default one first."""
        ...

    async def ready(self) -> Readiness:
        """Ask every part of the service."""
        ...


class AsyncEncoder(Protocol):
    """An encoder that does not block the event loop."""

    async def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Map (n, size, size, 3) uint8 to (n, d) float32 unit rows."""
        ...

    async def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Map n texts to (n, d) float32 unit rows."""
        ...

    async def answers(self) -> bool:
        """Whether it is there."""
        ...


class Searcher(Protocol):
    """One index that does not block the event loop."""

    info: IndexInfo
    metadata: Metadata

    async def answer(self, queries: np.ndarray, k: int, within: Filter = ()) -> Answer:
        """Search (nq, d) unit rows among the rows that fulfil a filter."""
        ...

    async def shards_ok(self) -> int:
        """Return how many shards answer."""
        ...
