"""The service within one process: tests, notebooks, `uvicorn` without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import numpy as np

from clipgap_ray.embeddings import check_same_encoder
from clipgap_ray.encoder import Encoder
from clipgap_ray.index import Answer, LocalIndex
from clipgap_ray.kernels.topk import merge_topk
from clipgap_ray.serving.backend import IndexBackend, index_info
from clipgap_ray.serving.coverage import Coverage
from clipgap_ray.serving.filters import Filter, FilteredShard
from clipgap_ray.serving.messages import IndexInfo
from clipgap_ray.serving.metadata import Metadata


class LocalEncoder:
    """An encoder of this process, in a thread, one call at a time."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._one = asyncio.Lock()

    async def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Map (n, size, size, 3) uint8 to (n, d) float32 unit rows."""
        async with self._one:
            return await asyncio.to_thread(self.encoder.encode_images, pixels)

    async def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Map n texts to (n, d) float32 unit rows."""
        async with self._one:
            return await asyncio.to_thread(self.encoder.encode_texts, texts)

    async def answers(self) -> bool:
        """Return True: it lives as long as this process."""
        return True


class LocalSearcher:
    """An index of this process."""

    def __init__(
        self, info: IndexInfo, index: LocalIndex, metadata: Metadata, splits: Mapping[str, np.ndarray] | None = None
    ) -> None:
        self.info, self.index, self.metadata = info, index, metadata
        self.shards = [FilteredShard(shard, metadata.rows, splits or {}) for shard in index.shards]

    async def answer(self, queries: np.ndarray, k: int, within: Filter = ()) -> Answer:
        """Search (nq, d) unit rows in a thread."""
        found = await asyncio.to_thread(lambda: [shard.search(queries, k, within) for shard in self.shards])
        return Answer(*merge_topk(found, k), len(self.shards), len(self.shards))

    async def shards_ok(self) -> int:
        """Return the number of shards: they live as long as this process."""
        return len(self.shards)


class LocalBackend(IndexBackend):
    """One index, its encoder and its metadata, in this process.

    Args:
        index: A complete index, opened.
        encoder: Of the queries.
        metadata: Of the embeddings that the index was built from.
        name: Of the index.
        coverage: Scores and splits for `similarity`.

    Raises:
        IndexMismatchError: If another encoder made the index or the scores.
    """

    def __init__(
        self,
        index: LocalIndex,
        encoder: Encoder,
        metadata: Metadata,
        name: str = "default",
        coverage: Coverage | None = None,
    ) -> None:
        check_same_encoder(index.manifest["encoder"], encoder.fingerprint, (f"index {name}", "the service's encoder"))
        if coverage is not None:
            coverage.check(encoder.fingerprint)
        splits = coverage.uids() if coverage is not None else {}
        searcher = LocalSearcher(index_info(name, index.manifest), index, metadata, splits)
        super().__init__({name: searcher}, LocalEncoder(encoder), encoder.preprocess, coverage)
