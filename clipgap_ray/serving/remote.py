"""What a gateway asks over Serve's handles: the encoder, and the shards of one version of an index."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from clipgap_ray.index import Answer
from clipgap_ray.kernels.topk import merge_topk
from clipgap_ray.serving.filters import Filter
from clipgap_ray.serving.messages import ApiError, IndexInfo
from clipgap_ray.serving.metadata import Metadata

PROBE_S = 2.0

Neighbours = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ShardQuery:
    """One caller's question to a shard: the index version it expects, (nq, d) unit rows, k, conditions on the rows."""

    version: str
    queries: np.ndarray
    k: int
    within: Filter = ()


class RemoteEncoder:
    """`backend.AsyncEncoder` over a handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    async def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Map (n, size, size, 3) uint8 to (n, d) float32 unit rows."""
        return await _encoded(self.handle.encode_images.remote(pixels))

    async def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Map n texts to (n, d) float32 unit rows."""
        return await _encoded(self.handle.encode_texts.remote(texts))


async def _encoded(response: Any) -> np.ndarray:
    try:
        return await response
    except (RayError, RayServeException):
        raise ApiError(503, "encoder_lost", "the encoder did not answer", "try again in seconds") from None


class RemoteSearcher:
    """`backend.Searcher` over one handle per shard: scatter, wait no longer than the deadline, merge once."""

    def __init__(self, info: IndexInfo, handles: list[DeploymentHandle], metadata: Metadata, timeout_s: float) -> None:
        self.info, self.handles, self.metadata, self.timeout_s = info, handles, metadata, timeout_s

    async def answer(self, queries: np.ndarray, k: int, within: Filter = ()) -> Answer:
        """Search (nq, d) unit rows; shards that are lost, late or of another version are left out and counted."""
        calls = [handle.search.remote(ShardQuery(self.info.version, queries, k, within)) for handle in self.handles]
        answers = await asyncio.gather(*(_within(call, self.timeout_s) for call in calls))
        parts: list[Neighbours] = [part for part in answers if part is not None]
        nothing = np.full((len(queries), 1), -np.inf, np.float32), np.full((len(queries), 1), -1, np.int64)
        return Answer(*merge_topk(parts or [nothing], k), len(parts), len(self.handles))

    async def shards_ok(self) -> int:
        """Return how many shards answer with the right version."""
        calls = [handle.describe.remote() for handle in self.handles]
        states = await asyncio.gather(*(_within(call, PROBE_S) for call in calls))
        return sum(state is not None and state["version"] == self.info.version for state in states)


async def _within(response: Any, timeout_s: float) -> Any:
    """The response, or None when the replica died or is too slow."""
    try:
        return await asyncio.wait_for(response, timeout_s)
    except (RayError, RayServeException, TimeoutError):
        return None
