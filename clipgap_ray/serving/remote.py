"""What a gateway asks over Serve's handles: the encoder, and the shards of one version of an index.

A question whose replica dies under it is asked again, of another replica or of the one that comes back, within the same
deadline: where a shard has two replicas, losing one changes no answer. Searching and encoding are safe to repeat.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import numpy as np
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from clipgap_ray.index import Answer
from clipgap_ray.kernels.topk import merge_topk
from clipgap_ray.serving.filters import Filter
from clipgap_ray.serving.messages import ApiError, IndexInfo
from clipgap_ray.serving.metadata import Metadata

PROBE_S = 2.0
ENCODE_S = 30.0  # for the largest batch of texts on a busy CPU; Serve itself gives up after 60
ASKS = 3  # of a question whose replica dies
AGAIN_S = 0.05  # until Serve's router has heard of it

# What a call over a handle raises where the replica is at fault: Ray's and Serve's errors; gRPC's own come through
# where replicas talk gRPC (RAY_SERVE_THROUGHPUT_OPTIMIZED).
LOST = (RayError, RayServeException, grpc.RpcError)
DIED = (RayActorError, grpc.RpcError)

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
        return await _encoded(partial(self.handle.encode_images.remote, pixels))

    async def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Map n texts to (n, d) float32 unit rows."""
        return await _encoded(partial(self.handle.encode_texts.remote, texts))

    async def answers(self) -> bool:
        """Whether a replica is there."""
        return await _within(self.handle.describe.remote, PROBE_S) is not None


async def _encoded(ask: Callable[[], Awaitable[Any]]) -> np.ndarray:
    try:
        async with asyncio.timeout(ENCODE_S):
            rows: np.ndarray = await _patiently(ask)
        return rows
    except (*LOST, TimeoutError):
        raise ApiError(503, "encoder_lost", "the encoder did not answer", "try again in seconds") from None


class RemoteSearcher:
    """`backend.Searcher` over one handle per shard: scatter, wait no longer than the deadline, merge once."""

    def __init__(self, info: IndexInfo, handles: list[DeploymentHandle], metadata: Metadata, timeout_s: float) -> None:
        self.info, self.handles, self.metadata, self.timeout_s = info, handles, metadata, timeout_s

    async def answer(self, queries: np.ndarray, k: int, within: Filter = ()) -> Answer:
        """Search (nq, d) unit rows; shards that are lost, late or of another version are left out and counted."""
        question = ShardQuery(self.info.version, queries, k, within)
        calls = (_within(partial(handle.search.remote, question), self.timeout_s) for handle in self.handles)
        answers = await asyncio.gather(*calls)
        parts: list[Neighbours] = [part for part in answers if part is not None]
        nothing = np.full((len(queries), 1), -np.inf, np.float32), np.full((len(queries), 1), -1, np.int64)
        return Answer(*merge_topk(parts or [nothing], k), len(parts), len(self.handles))

    async def shards_ok(self) -> int:
        """Return how many shards answer with the right version."""
        states = await asyncio.gather(*(_within(handle.describe.remote, PROBE_S) for handle in self.handles))
        return sum(state is not None and state["version"] == self.info.version for state in states)


async def _within(ask: Callable[[], Awaitable[Any]], timeout_s: float) -> Any:
    """The answer, or None when no replica gave one in time."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _patiently(ask)
    except (*LOST, TimeoutError):
        return None


async def _patiently(ask: Callable[[], Awaitable[Any]]) -> Any:
    """The answer to a question, asked again while replicas die under it."""
    for _ in range(ASKS - 1):
        try:
            return await ask()
        except DIED:
            await asyncio.sleep(AGAIN_S)
    return await ask()
