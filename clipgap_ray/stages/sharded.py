"""Index shards in Ray actors: built there (`stages.index`), searched there (`ShardedIndex`).

Knows nothing of directories being written or of settings: an actor is an `IndexShard` with an address.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from clipgap_ray import schema, store
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import DataError, ShardLostError
from clipgap_ray.index import Answer, IndexShard, check_queries, open_shard, shard_uri
from clipgap_ray.index_manifest import read_index
from clipgap_ray.kernels import faiss_index
from clipgap_ray.kernels.topk import merge_topk
from clipgap_ray.stages.progress import logger
from clipgap_ray.stages.session import own_error

ACTOR_CPUS = 0.25
SAVE_EVERY_S = 30.0


@dataclass(frozen=True)
class Source:
    """The embeddings as far as they are committed; `complete` when no more parts will come."""

    rows: EmbeddingSet
    complete: bool
    modality: str

    def read(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (n, d) float16 rows of a part with (n,) int64 row ids; text rows without caption are left out."""
        rows = np.asarray(self.rows.images(part) if self.modality == "image" else self.rows.texts(part))
        known = np.ones(len(rows), bool) if self.modality == "image" else rows.any(axis=1)
        return rows[known], schema.row_ids(part, len(rows))[known]

    def sample(self, num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return about `num_rows` (m, d) float16 rows with their row ids, from all over the source."""
        share = min(1.0, num_rows / max(self.rows.num_rows, 1))
        rows, ids = [np.zeros((0, self.rows.dim), np.float16)], [np.zeros(0, np.int64)]
        generator = np.random.default_rng(seed)
        for part in self.rows.parts if num_rows else ():
            # Rounding up or down at random keeps the expectation when a part contributes less than one row.
            count = int(share * part.num_rows + generator.random())
            if count:
                all_rows, all_ids = self.read(part.number)
                chosen = np.sort(generator.permutation(len(all_rows))[:count])
                rows.append(all_rows[chosen])
                ids.append(all_ids[chosen])
        return np.concatenate(rows), np.concatenate(ids)


def write_empty(uri: str, choice: faiss_index.Choice, empty: bytes) -> None:
    """Remember the key of an index and its trained, empty FAISS index, from which every shard starts."""
    store.write_bytes(store.join(uri, "empty.faiss"), empty)
    known = {"key": choice.key, "reason": choice.reason, "sha256": store.sha256(empty)}
    store.write_json(store.join(uri, "key.json"), known)


def read_empty(uri: str) -> bytes:
    """Return the trained, empty index.

    Raises:
        DataError: If it is missing or not what `write_empty` wrote.
    """
    data = store.read_bytes(store.join(uri, "empty.faiss"))
    if store.sha256(data) != store.read_json(store.join(uri, "key.json"))["sha256"]:
        raise DataError(f"{uri}/empty.faiss is damaged", hint="delete the directory to rebuild the index")
    return data


class ShardActor:
    """One index shard in a Ray actor: opened or built, searched and saved here.

    Args:
        uri: The index. A restarted actor finds everything there and nothing in the object store.
        number: Of the shard.
        building: Continue from the saved shard, or from the trained empty index beside it, and allow adding.
    """

    def __init__(self, uri: str, number: int, building: bool = False) -> None:
        self.uri = shard_uri(uri, number)
        self._saved_at, self._save_s, self._unsaved = time.monotonic(), 0.0, False
        if not building:
            self.shard = open_shard(uri, number, read_index(uri))
            return
        self.shard = IndexShard(faiss_index.from_bytes(read_empty(uri)), number)
        if store.exists(self.uri) or store.exists(self.uri + ".old"):
            try:
                self.shard = IndexShard.load(self.uri, mmap=False)  # a mapped index cannot grow
            except DataError as error:  # a save to an object store was cut short: build it again
                logger.warning("index shard %d is built anew: %s", number, error)

    def held(self) -> dict[int, int]:
        """Return the parts in memory with their rows."""
        return dict(self.shard.parts)

    def add(self, source: Source, parts: list[int]) -> dict[int, int]:
        """Add parts, and save when it is time; return the parts held."""
        for part in parts:
            self._unsaved |= self.shard.add(*source.read(part), part)
        if time.monotonic() - self._saved_at > max(SAVE_EVERY_S, 10 * self._save_s):
            self.save()
        return self.held()

    def save(self) -> dict[int, int]:
        """Save the shard if anything is new, and return the parts that are on disk now."""
        if self._unsaved or not store.exists(self.uri):
            started = time.monotonic()
            self.shard.save(self.uri)
            self._saved_at = time.monotonic()
            self._save_s, self._unsaved = self._saved_at - started, False
        return self.held()

    def search(
        self, queries: np.ndarray, k: int, nprobe: int | None = None, among: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search this shard among some row ids or all, see `IndexShard.search`."""
        return self.shard.search(queries, k, nprobe, self.shard.places_of(among))

    def efforts(self) -> tuple[int, int]:
        """Return the smallest and the largest sensible `nprobe`, see `faiss_index.efforts`."""
        return faiss_index.efforts(self.shard.index)


class ShardedIndex:
    """The same contract as `LocalIndex`, over Ray actors: scatter, merge once, count who answered."""

    def __init__(self, actors: Sequence[Any], manifest: dict[str, Any] | None = None, timeout_s: float = 60.0) -> None:
        self.actors = list(actors)
        self.manifest = manifest or {}
        self.timeout_s = timeout_s

    @classmethod
    def open(cls, uri: str, num_cpus: float = ACTOR_CPUS, timeout_s: float = 60.0) -> Self:
        """Open an index, complete or growing: one actor per shard, restarted and reloaded by itself when it dies."""
        manifest = read_index(uri)
        actor = ray.remote(ShardActor).options(num_cpus=num_cpus, max_restarts=-1, scheduling_strategy="SPREAD")
        actors = [actor.remote(uri, number) for number in range(manifest["num_shards"])]
        return cls(actors, manifest, timeout_s)

    def answer(self, queries: np.ndarray, k: int, among: np.ndarray | None = None, nprobe: int | None = None) -> Answer:
        """Search; a shard that is dead or too slow is left out, and the answer says so.

        Args:
            queries: (nq, d).
            k: Neighbours.
            among: (m,) int64 row ids: only these are looked at; None: all.
            nprobe: Instead of the index's own.

        Raises:
            IndexMismatchError: If d differs.
            DataError: If a query is not finite.
        """
        queries = check_queries(queries, self.manifest["dim"]) if "dim" in self.manifest else np.asarray(queries)
        chosen = None if among is None else ray.put(among)  # once, not per shard
        calls = [actor.search.remote(queries, k, nprobe, chosen) for actor in self.actors]
        deadline = time.monotonic() + self.timeout_s
        parts = []
        for call in calls:
            try:
                parts.append(ray.get(call, timeout=max(deadline - time.monotonic(), 0.001)))
            except (RayActorError, GetTimeoutError):
                continue
            except RayTaskError as error:
                raise own_error(error) from None
        nothing = np.full((len(queries), 1), -np.inf, np.float32), np.full((len(queries), 1), -1, np.int64)
        return Answer(*merge_topk(parts or [nothing], k), len(parts), len(self.actors))

    def search(
        self, queries: np.ndarray, k: int, among: np.ndarray | None = None, nprobe: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search every shard; the contract of `clipgap_ray.index`, arguments as of `answer`.

        Raises:
            ShardLostError: If a shard did not answer: use `answer` where a part of the neighbours is better than none.
        """
        found = self.answer(queries, k, among, nprobe)
        if found.degraded:
            raise ShardLostError(
                f"{found.shards_ok} of {found.shards} index shards answered within {self.timeout_s:g} s",
                hint="a lost shard reloads by itself; try again",
            )
        return found.similarities, found.row_ids

    def close(self) -> None:
        """Kill the actors."""
        for actor in self.actors:
            ray.kill(actor)
