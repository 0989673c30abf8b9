"""The service on Ray Serve: one deployment per index shard, one for the encoder, a gateway with the HTTP routes.

    HTTP -> Gateway --+-> Encoder            texts and images of concurrent requests in one forward pass
                      +-> <index>-shard-0    FAISS in a thread, concurrent requests in one search
                      +-> <index>-shard-1
                      +-> Operator           only with an admin key: puts new versions in place (`swap`)

One deployment per shard (ray.md 3.3, layout A): each has its own health, replicas and placement. Every sub-call
carries the index version, and a shard that holds another one counts as missing, so an answer never mixes versions.
Rejected: ranks of one deployment (recycled on death, answers shrink silently) and Serve's `deployment_actors`
(one actor per shard, no replicas).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from clipgap_ray import store
from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.encoder import EncoderSettings, check
from clipgap_ray.errors import ClipgapError, ConfigError, ShardLostError
from clipgap_ray.hidden import read_hidden
from clipgap_ray.index import open_shard
from clipgap_ray.index_manifest import read_index, rows_of
from clipgap_ray.serving import swap
from clipgap_ray.serving.admin import Admin
from clipgap_ray.serving.api import make_api
from clipgap_ray.serving.backend import IndexBackend, index_info
from clipgap_ray.serving.coverage import Coverage
from clipgap_ray.serving.filters import Filter, FilteredShard
from clipgap_ray.serving.guard import write_access_log
from clipgap_ray.serving.messages import Limits
from clipgap_ray.serving.metadata import Metadata
from clipgap_ray.serving.remote import Neighbours, RemoteEncoder, RemoteSearcher, ShardQuery
from clipgap_ray.serving.together import Together
from clipgap_ray.uidmap import UidMap

logger = logging.getLogger("clipgap")

QUEUE = Limits.requests  # under way per replica; more get 503
SEARCH_BATCH = 64
LATER = 4  # niceness of searches: where cores are scarce the gateway goes first, and what waits is searched together
ENCODER_BATCH = 16
ENCODER_CPUS = 0.25
DOWNSCALE_S = 120  # an encoder that nobody needed for so long goes
ATTEMPTS = 10  # to reach all shards of a new version, each of up to `remote.PROBE_S`
SURGE = 100  # per cent: when deployed again, a new replica answers before the old one stops


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=QUEUE,
    max_surge_percent=SURGE,
    health_check_period_s=2,
    graceful_shutdown_timeout_s=5,
)
class IndexShardDeployment:
    """One index shard; the constructor loads it, so a replica without it gets no traffic."""

    def __init__(
        self, uri: str, version: str, splits: Mapping[str, str], number: int, others: Sequence[DeploymentHandle] = ()
    ) -> None:
        """Load the shard; `others` only makes the other shards of a version part of its application (`swap`)."""
        manifest = read_index(uri)
        if manifest["index_version"] != version and manifest.get("complete", True):
            raise ConfigError(f"index shard {number}: {uri} is version {manifest['index_version']}, not {version}")
        self.uri, self.version = uri, version
        own = {name: store.read_array(path) for name, path in splits.items()}
        self.shard = FilteredShard(open_shard(uri, number, manifest), rows_of(manifest), own)
        self._together = Together(self._answer, SEARCH_BATCH)
        self._one_mask = asyncio.Lock()
        os.nice(LATER)

    async def search(self, call: ShardQuery) -> Neighbours | None:
        """Search, together with what came while the last search ran.

        Returns:
            (nq, k) similarities and row ids; None where another version was expected.
        """
        if call.within and call.version == self.version:
            # Worked out before the search, in a thread of its own: a new filter holds up nobody else.
            async with self._one_mask:
                await asyncio.to_thread(self.shard.mask, call.within)
        return await self._together.ask(call)

    def _answer(self, calls: list[ShardQuery]) -> list[Neighbours | None]:
        answers: list[Neighbours | None] = [None] * len(calls)
        asked = [at for at, call in enumerate(calls) if call.version == self.version]
        for within in dict.fromkeys(calls[at].within for at in asked):
            together = [at for at in asked if calls[at].within == within]
            found = self._search([calls[at] for at in together], within)
            for at, answer in zip(together, found, strict=True):
                answers[at] = answer
        return answers

    def _search(self, calls: list[ShardQuery], within: Filter) -> list[Neighbours]:
        """One FAISS search for callers with the same conditions."""
        rows = np.concatenate([call.queries for call in calls])
        similarities, row_ids = self.shard.search(rows, max(call.k for call in calls), within)
        cuts = np.cumsum([len(call.queries) for call in calls])[:-1]
        pairs = zip(calls, np.split(similarities, cuts), np.split(row_ids, cuts), strict=True)
        return [(near[:, : call.k], ids[:, : call.k]) for call, near, ids in pairs]

    async def describe(self) -> dict[str, Any]:
        """Return the version, where it lies and the process id, for readiness, swaps and diagnosis."""
        return {"version": self.version, "uri": self.uri, "pid": os.getpid(), "rows": self.shard.shard.num_rows}


@serve.deployment(
    ray_actor_options={"num_cpus": ENCODER_CPUS},
    max_ongoing_requests=QUEUE,
    max_surge_percent=SURGE,
    graceful_shutdown_timeout_s=5,
)
class EncoderDeployment:
    """The encoder; concurrent requests share a forward pass."""

    def __init__(self, settings: EncoderSettings) -> None:
        self.encoder = settings.build()

    @serve.batch(max_batch_size=ENCODER_BATCH, batch_wait_timeout_s=0.004)
    async def encode_images(self, pixels: list[np.ndarray]) -> list[np.ndarray]:
        """Map each caller's (n_i, size, size, 3) uint8 to (n_i, d) float32 unit rows."""
        rows = await asyncio.to_thread(self.encoder.encode_images, np.concatenate(pixels))
        return _split(rows, [len(own) for own in pixels])

    @serve.batch(max_batch_size=ENCODER_BATCH, batch_wait_timeout_s=0.004)
    async def encode_texts(self, texts: list[list[str]]) -> list[np.ndarray]:
        """Map each caller's n_i texts to (n_i, d) float32 unit rows."""
        rows = await asyncio.to_thread(self.encoder.encode_texts, [text for own in texts for text in own])
        return _split(rows, [len(own) for own in texts])

    async def describe(self) -> dict[str, Any]:
        """Return the process id, for readiness."""
        return {"pid": os.getpid()}


def _split(rows: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    return np.split(rows, np.cumsum(counts)[:-1])


@dataclass(frozen=True)
class GatewayConfig:
    """What a gateway replica needs besides its handles.

    Attributes:
        indexes: Name -> folder, the default one first.
        versions: Name -> the version that its shards were deployed with: a growing index has another one soon.
        encoder: Of the queries.
        limits: What one request may ask for.
        shard_timeout_s: Deadline of an index shard.
        token_hash: sha256 of the bearer token, or None.
        admin_hash: sha256 of the admin's, or None.
        scores: A score run for /v1/similarity, or "".
        splits: Splits of its pool.
        blocklist: Takedown list, or "".
        hide: Rules over the metadata whose rows are never shown.
        origins: Web pages of which origins may ask.
        access_log: Write a line per request.
    """

    indexes: dict[str, str]
    versions: dict[str, str]
    encoder: EncoderSettings
    limits: Limits
    shard_timeout_s: float
    token_hash: str | None
    admin_hash: str | None = None
    scores: str = ""
    splits: tuple[str, ...] = ()
    blocklist: str = ""
    hide: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    access_log: bool = False


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=2 * QUEUE,  # `Guard` refuses from QUEUE on, in JSON
    max_queued_requests=QUEUE,
    backpressure_config={"retry_after_s": 1},  # where so many come at once that `Guard` is not reached
    max_surge_percent=SURGE,
    graceful_shutdown_timeout_s=20,  # what is under way ends; an idle replica stops at once
)
@serve.ingress()
class Gateway:
    """HTTP: checks the request, encodes, scatters, merges, describes."""

    def __init__(
        self,
        config: GatewayConfig,
        encoder: DeploymentHandle,
        shards: dict[str, list[DeploymentHandle]],
        operator: DeploymentHandle | None = None,
    ) -> None:
        self.config, self.operator = config, operator
        self._listed = store.version_of(config.blocklist) if config.blocklist else ""
        self.hidden = read_hidden(config.blocklist)
        searchers = {
            name: self._searcher(name, uri, config.versions[name], shards[name]) for name, uri in config.indexes.items()
        }
        coverage = Coverage(config.scores, config.splits) if config.scores else None
        self.backend = IndexBackend(searchers, RemoteEncoder(encoder), check(config.encoder), coverage)
        self._applications: dict[str, str] = {}  # of the versions that came after the deployment
        self._changing = asyncio.Lock()

    def _searcher(self, name: str, uri: str, version: str, handles: Sequence[DeploymentHandle]) -> RemoteSearcher:
        manifest = read_index(uri)
        rows = rows_of(manifest)
        rules = read_hidden("", self.config.hide, rows.metadata_columns()).rules
        hidden = replace(self.hidden, rules=rules)
        metadata = Metadata(rows, manifest["modality"], hidden=hidden, uids=UidMap.of_index(uri, manifest))
        info = index_info(name, {**manifest, "index_version": version})
        return RemoteSearcher(info, list(handles), metadata, self.config.shard_timeout_s)

    async def adopt(self, name: str, application: str, timeout_s: float = 60.0) -> bool:
        """Answer from the version of an index that another application holds, once all its shards answer here.

        Returns:
            True when no request of this replica uses the version before any more.

        Raises:
            ShardLostError: If a shard does not answer; the version before answers on.
        """
        async with self._changing:
            if self._applications.get(name) != application:
                uri, version, handles = await swap.shards_of(application)
                searcher = await asyncio.to_thread(self._searcher, name, uri, version, handles)
                for _ in range(ATTEMPTS):  # the first call over a new handle may take seconds
                    if await searcher.shards_ok() == searcher.info.shards:
                        break
                    await asyncio.sleep(0.2)
                else:
                    raise ShardLostError(f"not every shard of {application} answers", hint="try again")
                self.backend.replace(name, searcher)
                # The takedown list may have been read again while the shards were asked.
                searcher.metadata.hidden = replace(searcher.metadata.hidden, blocklist=self.hidden.blocklist)
                self._applications[name] = application
        return await self.backend.drained(name, timeout_s)

    async def check_health(self) -> None:
        """Catch up with swaps: Serve calls this before a replica's first request and every few seconds.

        A replica that starts, or starts again, knows the versions of its deployment only. The takedown list is read
        again when it has changed.
        """
        await asyncio.to_thread(self._read_list_again)
        try:
            for name, application in (await asyncio.to_thread(swap.newest_versions)).items():
                if name in self.config.indexes:
                    await self.adopt(name, application, timeout_s=0.0)
        except (RayError, RayServeException, ClipgapError) as error:
            logger.warning("gateway: versions cannot be looked up: %s", error)  # what it serves, it serves on

    def _read_list_again(self) -> None:
        if not self.config.blocklist:
            return
        try:
            listed = store.version_of(self.config.blocklist)
            if listed == self._listed:
                return
            self.hidden, self._listed = read_hidden(self.config.blocklist), listed
        except ClipgapError as error:
            logger.error("gateway: the takedown list of before holds on, the new one cannot be read: %s", error)
            return
        for searcher in self.backend.searchers.values():
            searcher.metadata.hidden = replace(searcher.metadata.hidden, blocklist=self.hidden.blocklist)
        logger.warning("gateway: the takedown list has changed and holds from now on")

    def __serve_build_asgi_app__(self) -> FastAPI:  # Serve's hook: called after the constructor
        """Build the routes over this replica's backend."""
        if self.config.access_log:
            write_access_log(sys.stderr)
        admin = None
        if self.operator is not None and self.config.admin_hash is not None:
            admin = Admin(self.config.admin_hash, swap.RemoteOperator(self.operator))
        limits, token_hash, origins = self.config.limits, self.config.token_hash, self.config.origins
        return make_api(self.backend, limits, token_hash, admin=admin, origins=origins)


def bind_encoder(settings: ServeSettings, encoder: EncoderSettings) -> Any:
    """Return the encoder's deployment: a fixed number of replicas or one that follows the load, on CPUs or GPUs.

    A replica encodes up to ENCODER_BATCH requests at once: more under way per replica means that some wait.
    """
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": ENCODER_CPUS, "num_gpus": settings.encoder_gpus}}
    if settings.encoder_max_replicas > settings.encoder_min_replicas:
        options["autoscaling_config"] = {
            "min_replicas": settings.encoder_min_replicas,
            "max_replicas": settings.encoder_max_replicas,
            "target_ongoing_requests": ENCODER_BATCH,
            "upscale_delay_s": 5,
            "downscale_delay_s": DOWNSCALE_S,
        }
    else:
        options["num_replicas"] = settings.encoder_min_replicas
    if settings.encoder_gpus:
        encoder = replace(encoder, device="cuda")
    return EncoderDeployment.options(**options).bind(encoder)  # type: ignore[attr-defined]


def bind_shards(
    uri: str, manifest: Mapping[str, Any], splits: Mapping[str, str], replicas: int, prefix: str
) -> list[Any]:
    """Return the deployments of every shard of an index, named by a prefix and their numbers.

    The first one holds the others, so that it stands for all of them as an application.
    """
    deployment = IndexShardDeployment.options(num_replicas=replicas)  # type: ignore[attr-defined]
    args = uri, manifest["index_version"], splits
    others = [deployment.options(name=f"{prefix}{n}").bind(*args, n) for n in range(1, manifest["num_shards"])]
    return [deployment.options(name=f"{prefix}0").bind(*args, 0, others), *others]
