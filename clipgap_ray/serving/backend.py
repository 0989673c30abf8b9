"""What answers requests, without HTTP and without Ray: encode, search, look up, classify.

`IndexBackend` needs an encoder and indexes that answer asynchronously. In the process these are `local.LocalEncoder`
and `local.LocalSearcher` (tests, notebooks); in the service they are handles of Ray Serve (`remote`). So everything
but the transport is the same code, and it is tested without a cluster.

A searcher is one version of an index. A request takes the searcher of its index once and asks nobody else, so an
answer never mixes versions; `replace` puts the next version in its place while requests go on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from clipgap_ray.encoder import ImageError, Preprocess
from clipgap_ray.kernels.vectors import normalise
from clipgap_ray.kernels.zero_shot import class_weights
from clipgap_ray.serving import results
from clipgap_ray.serving.contracts import AsyncEncoder, Covered, Found, Searcher
from clipgap_ray.serving.coverage import Coverage
from clipgap_ray.serving.filters import Filter
from clipgap_ray.serving.inputs import Query
from clipgap_ray.serving.messages import ApiError, IndexInfo, Neighbour, Readiness, SetInfo, SplitInfo
from clipgap_ray.serving.timings import Timings

CACHED_CLASS_SETS = 32
LOOK_S = 0.02  # between looks at whether the requests of a replaced version are done
MOST_ASKED = 64  # times k: how far a search goes for rows that are not hidden or alike
MOST_ROWS = 16_384  # per query, whatever k is: their descriptions are held at once


def index_info(name: str, manifest: Mapping[str, Any]) -> IndexInfo:
    """Describe an index by its manifest."""
    return IndexInfo(
        name=name,
        version=manifest["index_version"],
        rows=sum(shard["rows"] for shard in manifest["shards"]),
        dim=manifest["dim"],
        shards=manifest["num_shards"],
        key=manifest["key"],
        recall_at_10=manifest.get("recall_at_10"),
        modality=manifest["modality"],
        model=manifest["encoder"].get("model", ""),
    )


class IndexBackend:
    """Encode, search, look up.

    Args:
        searchers: Indexes by name, the default one first; at least one.
        encoder: Of the queries; the caller has checked that it made the indexes (`check_same_encoder`).
        preprocess: How image files become the encoder's pixels.
        coverage: Scores and splits for `similarity`; None answers it with 404.
    """

    def __init__(
        self,
        searchers: Mapping[str, Searcher],
        encoder: AsyncEncoder,
        preprocess: Preprocess,
        coverage: Coverage | None = None,
    ) -> None:
        self.searchers = dict(searchers)
        self.coverage = coverage
        self.encoder = encoder
        self.preprocess = preprocess
        self.timings = Timings()
        self._users: Counter[int] = Counter()  # requests under way, by the id of their searcher
        self._replaced: dict[str, list[Searcher]] = {}
        self._class_sets: OrderedDict[tuple[tuple[str, ...], tuple[str, ...]], np.ndarray] = OrderedDict()

    async def search(
        self, index: str | None, queries: list[Query], k: int, collapse: float | None = None, within: Filter = ()
    ) -> Found:
        """Return the k nearest rows of every query.

        Args:
            index: Its name; None is the first.
            queries: What to look for.
            k: Neighbours per query.
            collapse: Leave out a neighbour at least so alike to a nearer one.
            within: Conditions that every neighbour fulfils.

        Raises:
            ApiError: 404 for an unknown index or uid, 400 for a broken image or a vector of another dimension,
                503 when no shard answers.
        """
        with self._using(index) as searcher, self.timings.time("full_knn_request_time"):
            return await self._nearest(searcher, await self._encode(searcher, queries), k, collapse, within)

    async def describe(self, index: str | None, row_ids: list[int]) -> list[dict[str, Any]]:
        """Return the metadata of rows, {} for an unknown or hidden one.

        Raises:
            ApiError: 404 for an unknown index.
        """
        with self._using(index) as searcher, self.timings.time("metadata_get_time"):
            return await asyncio.to_thread(searcher.metadata.lookup, np.array(row_ids, np.int64))

    async def _nearest(
        self, searcher: Searcher, rows: np.ndarray, k: int, collapse: float | None = None, within: Filter = ()
    ) -> Found:
        """Search and describe; what is hidden or collapsed is replaced by what comes after it."""
        wanted = k
        while True:
            with self.timings.time("knn_index_time"):
                answer = await searcher.answer(rows, wanted, within)
            if not answer.shards_ok:
                raise ApiError(
                    503, "no_shard", f"none of {answer.shards} index shards answered", "try again in seconds"
                )
            chosen = results.Chosen(k, collapse, self.coverage, self.timings)
            neighbours = await asyncio.to_thread(results.describe, searcher.metadata, answer, chosen)
            complete = all(len(near) == k for near in neighbours) or (answer.row_ids < 0).any()
            most = max(k, min(MOST_ASKED * k, MOST_ROWS))
            if complete or wanted >= most:
                return Found(searcher.info, answer, neighbours)
            wanted = min(4 * wanted, most)

    async def thumbnail(self, index: str | None, row_id: int, version: str | None = None) -> bytes:
        """Return a small JPEG of a row.

        Args:
            index: Its name; None is the first.
            row_id: The row.
            version: Of the index that the row id came from; None: whatever is served now.

        Raises:
            ApiError: 404 for an unknown index or row, a hidden one, one without an image that can be read, or another
                version.
        """
        with self._using(index) as searcher:
            if version not in (None, searcher.info.version):
                raise ApiError(404, "no_image", "another version of the index is being served by now")
            return await asyncio.to_thread(results.thumbnail, searcher.metadata, row_id)

    async def similarity(self, index: str | None, queries: list[Query], k: int) -> Covered:
        """Return how covered every query is by the training set, beside the test sets and splits of the score run.

        Raises:
            ApiError: As `search`; 404 when the service was started without scores.
        """
        if self.coverage is None:
            raise ApiError(404, "no_scores", "this service knows no scores", "start it with --scores SCORES")
        with self._using(index) as searcher:
            rows = await self._encode(searcher, queries)
            found, wanted = await self._nearest(searcher, rows, max(k, 2)), max(k, 2)
            # A sample that is there several times is nearest to itself: look further for another one.
            while wanted < MOST_ROWS and _finds_only_itself(queries, found.neighbours, wanted):
                wanted = min(4 * wanted, MOST_ROWS)
                found = await self._nearest(searcher, rows, wanted)
        covered = await asyncio.to_thread(results.cover, self.coverage, queries, rows, found.neighbours, k)
        return Covered(found, covered)

    def replace(self, name: str, searcher: Searcher) -> None:
        """Answer for an index with another version of it from now on; requests under way end with theirs."""
        self._replaced.setdefault(name, []).append(self.searchers[name])
        self.searchers[name] = searcher

    async def drained(self, name: str, timeout_s: float) -> bool:
        """Wait until no request uses a replaced version of an index, or time is up; True when none does."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(self._users[id(old)] for old in self._replaced.get(name, [])):
                    await asyncio.sleep(LOOK_S)
        self._replaced[name] = [old for old in self._replaced.get(name, []) if self._users[id(old)]]
        return not self._replaced[name]

    @contextlib.contextmanager
    def _using(self, name: str | None) -> Iterator[Searcher]:
        """The version of an index that is current now, for the whole of a request."""
        searcher = self._searcher(name)
        self._users[id(searcher)] += 1
        try:
            yield searcher
        finally:
            self._users[id(searcher)] -= 1
            if not self._users[id(searcher)]:
                del self._users[id(searcher)]

    async def columns(self, index: str | None) -> pa.Schema:
        """Return the columns of an index's metadata, which filters may name.

        Raises:
            ApiError: 404 for an unknown index.
        """
        return self._searcher(index).metadata.columns

    async def splits(self) -> list[SplitInfo]:
        """Return the splits that queries are judged by; none without scores."""
        return self.coverage.describe() if self.coverage else []

    async def sets(self) -> list[SetInfo]:
        """Return the test sets that queries are compared with; none without scores."""
        return self.coverage.sets() if self.coverage else []

    def _searcher(self, name: str | None) -> Searcher:
        name = next(iter(self.searchers)) if name is None else name
        if name not in self.searchers:
            raise ApiError(404, "unknown_index", "no such index", f"known indexes: {', '.join(self.searchers)}")
        return self.searchers[name]

    async def _encode(self, searcher: Searcher, queries: list[Query]) -> np.ndarray:
        """Turn queries into (nq, d) float32 unit rows: all texts in one call, all images in another."""
        rows = np.zeros((len(queries), searcher.info.dim), np.float32)
        texts = {at: query.text for at, query in enumerate(queries) if query.text is not None}
        images = {at: query.image for at, query in enumerate(queries) if query.image is not None}
        for at, query in enumerate(queries):
            if query.vector is not None:
                if query.vector.shape != (searcher.info.dim,):
                    raise ApiError(
                        400, "wrong_dim", f"vector has {len(query.vector)} dims, the index has {searcher.info.dim}"
                    )
                rows[at] = query.vector
            if query.uid is not None:
                row = await asyncio.to_thread(searcher.metadata.vector, query.uid)
                if row is None:
                    raise ApiError(404, "unknown_uid", "no sample of the index has this uid")
                rows[at] = row
        if texts:
            rows[list(texts)] = await self._encode_texts(list(texts.values()))
        if images:
            rows[list(images)] = await self._encode_images(list(images.values()))
        return rows

    async def _encode_texts(self, texts: list[str]) -> np.ndarray:
        with self.timings.time("text_clip_inference_time"):
            return await self.encoder.encode_texts(texts)

    async def _encode_images(self, images: list[bytes]) -> np.ndarray:
        try:
            with self.timings.time("image_prepro_time"):
                pixels = [await asyncio.to_thread(self.preprocess.decode, image) for image in images]
        except ImageError as error:
            raise ApiError(400, error.reason, "the image does not decode: it is truncated or damaged") from None
        with self.timings.time("image_clip_inference_time"):
            return await self.encoder.encode_images(np.stack(pixels))

    async def zero_shot(self, images: list[bytes], classes: list[str], templates: list[str]) -> np.ndarray:
        """Return (n, c) float32 similarities of n image files to c classes; prompts are encoded once per class set.

        Raises:
            ApiError: 400 for a broken image.
        """
        rows = await self._encode_images(images)
        key = tuple(classes), tuple(templates)
        weights = self._class_sets.pop(key, None)
        if weights is None:
            # replace, not format: a template is data, and format would reach into attributes
            prompts = [template.replace("{}", name) for name in classes for template in templates]
            weights = class_weights(normalise(await self._encode_texts(prompts)), len(classes))
        self._class_sets[key] = weights
        if len(self._class_sets) > CACHED_CLASS_SETS:
            self._class_sets.popitem(last=False)
        return rows @ weights.T

    async def indices(self) -> list[IndexInfo]:
        """Return the indexes, the default one first."""
        return [searcher.info for searcher in self.searchers.values()]

    async def ready(self) -> Readiness:
        """Ask the encoder and every shard of every index, side by side."""
        searchers = list(self.searchers.values())
        encoder_ok, *counts = await asyncio.gather(self.encoder.answers(), *(one.shards_ok() for one in searchers))
        shards = sum(one.info.shards for one in searchers)
        ready = encoder_ok and sum(counts) == shards
        return Readiness(ready=ready, shards=shards, shards_ok=sum(counts), encoder_ok=encoder_ok)


def _finds_only_itself(queries: list[Query], found: list[list[Neighbour]], wanted: int) -> bool:
    """Whether a search by uid found as many rows as it asked for, all of them that sample."""
    return any(
        query.uid is not None and len(near) >= wanted and all(one.uid == query.uid for one in near)
        for query, near in zip(queries, found, strict=True)
    )
