"""The service on Ray Serve: one deployment per index shard, one for the encoder, a gateway with the HTTP routes.

    HTTP -> Gateway --+-> Encoder            texts and images of concurrent requests in one forward pass
                      +-> <index>-shard-0    FAISS in a thread, concurrent requests in one search
                      +-> <index>-shard-1

One deployment per shard (ray.md 3.3, layout A): each has its own health, replicas and placement. Every sub-call
carries the index version, and a shard that holds another one counts as missing, so an answer never mixes versions.
Rejected: ranks of one deployment (recycled on death, answers shrink silently) and Serve's `deployment_actors`
(one actor per shard, no replicas).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.serve import TOKEN_VARIABLE, ServeSettings
from clipgap_ray.embeddings import EmbeddingSet, check_same_encoder
from clipgap_ray.encoder import EncoderSettings, check
from clipgap_ray.errors import ConfigError
from clipgap_ray.hidden import read_hidden
from clipgap_ray.index import Answer, open_shard
from clipgap_ray.kernels.topk import merge_topk
from clipgap_ray.serving.api import make_api
from clipgap_ray.serving.backend import IndexBackend, index_info
from clipgap_ray.serving.coverage import Coverage, recipe_uri
from clipgap_ray.serving.filters import Filter, FilteredShard
from clipgap_ray.serving.guard import token_sha256
from clipgap_ray.serving.messages import ApiError, IndexInfo, Limits
from clipgap_ray.serving.metadata import Metadata
from clipgap_ray.uidmap import UidMap

QUEUE = 256  # requests waiting per replica; more get 503
ENCODER_BATCH = 16
PROBE_S = 2.0

Neighbours = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ShardQuery:
    """One caller's question to a shard: the index version it expects, (nq, d) unit rows, k, conditions on the rows."""

    version: str
    queries: np.ndarray
    k: int
    within: Filter = ()


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=QUEUE,
    health_check_period_s=2,
    graceful_shutdown_timeout_s=5,
)
class IndexShardDeployment:
    """One index shard; the constructor loads it, so a replica without it gets no traffic."""

    def __init__(self, uri: str, number: int, version: str, splits: Mapping[str, str]) -> None:
        manifest = rundir.read_manifest(uri, "index")
        if manifest["index_version"] != version:
            raise ConfigError(f"index shard {number}: {uri} is version {manifest['index_version']}, not {version}")
        self.version = version
        own = {name: store.read_array(path) for name, path in splits.items()}
        self.shard = FilteredShard(
            open_shard(uri, number, manifest), EmbeddingSet.open(manifest["embeddings"]["uri"]), own
        )

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.0)
    async def search(self, calls: list[ShardQuery]) -> list[Neighbours | None]:
        """Search for several callers at once: the requests that came while the last search ran.

        Returns:
            (nq_i, k_i) similarities and row ids of each caller; None where another version was expected.
        """
        answers: list[Neighbours | None] = [None] * len(calls)
        asked = [at for at, call in enumerate(calls) if call.version == self.version]
        for within in dict.fromkeys(calls[at].within for at in asked):
            together = [at for at in asked if calls[at].within == within]
            found = await asyncio.to_thread(self._search, [calls[at] for at in together], within)
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
        """Return the version and the process id, for readiness and diagnosis."""
        return {"version": self.version, "pid": os.getpid(), "rows": self.shard.shard.num_rows}


@serve.deployment(
    ray_actor_options={"num_cpus": 0.25},
    max_ongoing_requests=QUEUE,
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


def _split(rows: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    return np.split(rows, np.cumsum(counts)[:-1])


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


@dataclass(frozen=True)
class GatewayConfig:
    """What a gateway replica needs besides its handles.

    Attributes:
        indexes: Name -> folder, the default one first.
        encoder: Of the queries.
        limits: What one request may ask for.
        shard_timeout_s: Deadline of an index shard.
        token_hash: sha256 of the bearer token, or None.
        scores: A score run for /v1/similarity, or "".
        splits: Splits of its pool.
        blocklist: Takedown list, or "".
        hide: Rules over the metadata whose rows are never shown.
    """

    indexes: dict[str, str]
    encoder: EncoderSettings
    limits: Limits
    shard_timeout_s: float
    token_hash: str | None
    scores: str = ""
    splits: tuple[str, ...] = ()
    blocklist: str = ""
    hide: tuple[str, ...] = ()


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=QUEUE,
    max_queued_requests=QUEUE,
    graceful_shutdown_timeout_s=5,
)
@serve.ingress()
class Gateway:
    """HTTP: checks the request, encodes, scatters, merges, describes."""

    def __init__(
        self, config: GatewayConfig, encoder: DeploymentHandle, shards: dict[str, list[DeploymentHandle]]
    ) -> None:
        searchers = {}
        hidden = read_hidden(config.blocklist, config.hide)
        for name, uri in config.indexes.items():
            manifest = rundir.read_manifest(uri, "index")
            uids = UidMap.of_index(uri, manifest)
            metadata = Metadata(manifest["embeddings"]["uri"], manifest["modality"], hidden=hidden, uids=uids)
            info = index_info(name, manifest)
            searchers[name] = RemoteSearcher(info, shards[name], metadata, config.shard_timeout_s)
        coverage = Coverage(config.scores, config.splits) if config.scores else None
        self.backend = IndexBackend(searchers, RemoteEncoder(encoder), check(config.encoder), coverage)
        self.config = config

    def __serve_build_asgi_app__(self) -> FastAPI:  # Serve's hook: called after the constructor
        """Build the routes over this replica's backend."""
        return make_api(self.backend, self.config.limits, self.config.token_hash)


def build_app(args: ServeSettings | Mapping[str, Any]) -> serve.Application:
    """Check the settings and wire the deployments.

    Args:
        args: Settings, or the `args` of a Serve config file.

    Raises:
        ConfigError: On impossible settings, or a public address without a token.
        DataError: If an index or its embeddings are missing.
        IndexMismatchError: If the encoder did not make every index.
    """
    settings = args if isinstance(args, ServeSettings) else ServeSettings.load(args, "serve")
    token = check_exposure(settings)
    indexes = schema.named(settings.index, "--index")
    manifests = {name: rundir.read_manifest(uri, "index") for name, uri in indexes.items()}
    encoder = encoder_settings(settings, next(iter(manifests.values())))
    fingerprint = encoder.build().fingerprint
    shards: dict[str, list[Any]] = {}
    split_files = {store.read_json(recipe_uri(uri))["name"]: uri for uri in settings.splits}
    for name, manifest in manifests.items():
        check_same_encoder(manifest["encoder"], fingerprint, (f"index {name}", "the service's --model"))
        Metadata(manifest["embeddings"]["uri"])
        deployment = IndexShardDeployment.options(num_replicas=settings.replicas)  # type: ignore[attr-defined]
        shards[name] = [
            deployment.options(name=f"{name}-shard-{number}").bind(
                indexes[name], number, manifest["index_version"], split_files
            )
            for number in range(manifest["num_shards"])
        ]
    limits = Limits(
        k=settings.max_k,
        batch=settings.max_batch,
        body_bytes=int(settings.max_body_mb * 1e6),
        image_pixels=int(settings.max_image_megapixels * 1e6),
        image_url=settings.image_url,
        image_url_s=settings.image_url_timeout_s,
    )
    read_hidden(settings.blocklist, settings.hide)
    if settings.scores:
        Coverage(settings.scores, settings.splits).check(fingerprint)
    config = GatewayConfig(
        indexes,
        encoder,
        limits,
        settings.shard_timeout_s,
        token_sha256(token) if token else None,
        settings.scores,
        settings.splits,
        settings.blocklist,
        settings.hide,
    )
    return Gateway.bind(config, EncoderDeployment.bind(encoder), shards)  # type: ignore[attr-defined]


def encoder_settings(settings: ServeSettings, manifest: Mapping[str, Any]) -> EncoderSettings:
    """Return the encoder of the queries: the model asked for, else the index's own by name."""
    made = manifest["encoder"]
    return EncoderSettings(
        model=settings.model or made["model"],
        pretrained=settings.pretrained or ("" if settings.model else made.get("pretrained", "")),
        batch_size=ENCODER_BATCH,
        crop_border=made.get("crop_border", 0),
    )


def check_exposure(settings: ServeSettings) -> str:
    """Return the bearer token ("" for none); only its hash travels on.

    Raises:
        ConfigError: If the address is public and there is no token.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if settings.is_public and not token:
        raise ConfigError(
            f"--host {settings.host} can be reached from other machines, and {TOKEN_VARIABLE} is not set",
            hint=f"export {TOKEN_VARIABLE}=$(openssl rand -hex 32), or use --host 127.0.0.1",
        )
    return token
