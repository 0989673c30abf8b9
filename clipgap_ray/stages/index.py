"""Embeddings to a sharded FAISS index, held and searched in Ray actors.

The quantiser is trained once on a sample; K builder actors get it, add the parts p with p % K = their number, and
save their shard. A part counts as done when the saved shard's manifest names it, so a crash or a rerun adds nothing
twice. With `follow` the parts are taken as `embed` commits them. At the end recall@10 is measured through the
actors against exact search, and `nprobe` is the smallest that reaches the target.

Reads: `embeddings` layout. Writes: `clipgap_ray.index` layout. Unit of restart: the part; a shard is saved whenever
saving takes less than a tenth of the time since the last save, and at the end. Actors: one per index shard, a
quarter of a CPU each. On failure: a dead builder restarts from its saved shard and gets the missing parts again;
run the same command again for the rest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from clipgap_ray import rundir, store, uidmap
from clipgap_ray.config.index import IndexSettings
from clipgap_ray.embeddings import EmbeddingSet, Part, identity, part_file
from clipgap_ray.errors import ConfigError, DataError, ShardLostError, StaleOutputError
from clipgap_ray.index import shard_uri
from clipgap_ray.kernels import faiss_index
from clipgap_ray.kernels.nearest_exact import nearest
from clipgap_ray.kernels.topk import merge_topk
from clipgap_ray.stages.index_merge import merge_index
from clipgap_ray.stages.session import Progress, bounded, connect, logger, own_error
from clipgap_ray.stages.sharded import ACTOR_CPUS, ShardActor, ShardedIndex, Source, read_empty, write_empty

BATCH_BYTES = 1 << 28  # rows that a builder reads and adds per call
MAX_DEATHS = 3  # of all builders together, before the run gives up
TRAIN_BYTES = 1 << 30
RECALL_K = 10
TARGET_RECALL = 0.95


def open_source(settings: IndexSettings) -> Source:
    """Open the embeddings; a folder that `embed` is writing may have no manifest yet.

    Raises:
        DataError: If there is nothing to index, or nothing that `embed` has begun to write.
    """
    uri = settings.source
    if not settings.follow:
        return Source(EmbeddingSet.open(uri), True, settings.modality)
    if not store.exists(store.join(uri, "encoder.json")):
        raise DataError(
            f"{uri} has no encoder.json: no `clipgap embed` has begun to write there",
            hint="start `clipgap embed` first, or correct the path",
        )
    # The manifest first: a part committed after this look is found by the next one.
    path = store.join(uri, "manifest.json")
    manifest = store.read_json(path) if store.exists(path) else None
    encoder = manifest["encoder"] if manifest else store.read_json(store.join(uri, "encoder.json"))
    records = _committed(uri)
    parts = [Part(r["part"], r["rows"], r["shard"], r["files"]) for _, r in sorted(records.items())]
    promised = {int(part) for part in manifest.get("shards", {})} if manifest else set()
    rows = EmbeddingSet(uri, {**(manifest or {}), "encoder": encoder}, parts)
    return Source(rows, manifest is not None and promised <= records.keys(), settings.modality)


def _committed(uri: str) -> dict[int, dict[str, Any]]:
    """Read a commit log that its writer may be compacting: a segment may vanish after it was listed, its records
    are in a new one then."""
    try:
        return rundir.CommitLog(uri).records
    except DataError:
        return rundir.CommitLog(uri).records


def run(settings: IndexSettings) -> rundir.Summary | dict[str, Any]:
    """Build the index, or add the parts that are new since the last run; merge it where that is asked for.

    Raises:
        ConfigError: On an impossible key, or when recall stays below `min_recall` (no manifest is written then).
        StaleOutputError: If `out` was written with other settings, or a part of the source has changed since.
        ShardLostError: If builders die again and again.
    """
    summary = build(settings) if settings.source else None
    merged = merge_index(settings.out, settings.merge) if settings.merge else None
    if summary is None:
        return {"merged": settings.merge, **(merged or {})}
    return summary


def build(settings: IndexSettings) -> rundir.Summary:
    """Build the index, or add the parts that are new since the last run; errors as of `run`."""
    source = open_source(settings)
    connect()
    guarded = {**settings.fingerprint(), "embeddings": settings.source, "encoder": identity(source.rows.encoder)}
    for name in ("out", "follow"):
        guarded.pop(name)
    with rundir.RunDirectory(settings.out, "index", guarded) as directory:
        choice = _prepare(directory, settings)
        actor = ray.remote(ShardActor)
        builders: list[Any] = [
            actor.options(num_cpus=ACTOR_CPUS, max_restarts=MAX_DEATHS).remote(directory.uri, n, building=True)
            for n in range(settings.shards)
        ]
        try:
            source = Build(directory, builders).fill(settings)
            nprobe, recall = _calibrate(ShardedIndex(builders), source, settings, choice.key)
        finally:
            for builder in builders:
                ray.kill(builder)
        manifest = _manifest(directory.uri, source, settings, choice, nprobe)
        manifest |= {"recall_at_10": recall, "uid_map": _map_uids(directory.uri, source)}
        return directory.finish(manifest, key=choice.key, recall_at_10=recall)


def _map_uids(uri: str, source: Source) -> dict[str, Any]:
    """Write the map of uids where parts are new, in a task: the driver may be a laptop."""
    path = store.join(uri, "manifest.json")
    before = store.read_json(path).get("uid_map") if store.exists(path) else None
    task = ray.remote(num_cpus=0.5)(uidmap.write)
    written: dict[str, Any] = next(bounded(lambda _: task.remote(uri, source.rows, before), [0]))
    return written


def _manifest(
    uri: str, source: Source, settings: IndexSettings, choice: faiss_index.Choice, nprobe: int
) -> dict[str, Any]:
    shards = [store.read_json(store.join(shard_uri(uri, n), "manifest.json")) for n in range(settings.shards)]
    return {
        "encoder": source.rows.encoder,
        "dim": source.rows.dim,
        "modality": settings.modality,
        "num_shards": settings.shards,
        "key": choice.key,
        "key_reason": choice.reason,
        "nprobe": nprobe,
        "embeddings": {"uri": source.rows.uri, "digest": source.rows.digest},
        "shards": [{"number": s["number"], "rows": s["rows"], "parts": len(s["parts"])} for s in shards],
        "index_version": store.digest([choice.key, nprobe, *(s["files"] for s in shards)])[:16],
    }


def _prepare(directory: rundir.RunDirectory, settings: IndexSettings) -> faiss_index.Choice:
    """Choose the key and train the empty index, once; a later run reads both back."""
    path = directory.path("key.json")
    if store.exists(path):
        read_empty(directory.uri)
        known = store.read_json(path)
        return faiss_index.Choice(known["key"], known["reason"])
    source, choice = open_source(settings), None
    while choice is None:
        choice = _choose(source, settings) if source.rows.parts else None
        # Cells are trained on rows: while the source grows, wait until there are enough.
        enough = choice is not None and source.rows.num_rows >= faiss_index.training_rows(choice.key, source.rows.dim)
        if not source.complete and not enough:
            choice = None
            time.sleep(settings.poll_s)
            source = open_source(settings)
    logger.info("index: key %s per shard (%s)", choice.key, choice.reason)
    task = ray.remote(num_cpus=0.5)(_train)
    data = next(bounded(lambda _: task.remote(source, choice.key, settings.seed), [0]))
    write_empty(directory.uri, choice, data)
    return choice


def _choose(source: Source, settings: IndexSettings) -> faiss_index.Choice:
    if settings.key != "auto":
        return faiss_index.Choice(settings.key, "as asked for")
    memory = settings.memory_gb * 1e9 or 0.6 * ray.cluster_resources().get("memory", 1e9)
    wanted = TARGET_RECALL if settings.min_recall is None else settings.min_recall
    rows = -(-_expected_rows(source) // settings.shards)
    return faiss_index.choose_key(rows, source.rows.dim, memory / settings.shards, wanted)


def _expected_rows(source: Source) -> int:
    """Rows there will be: exact when complete, else by the shards that `embed` has numbered."""
    path = store.join(source.rows.uri, "parts.json")
    if source.complete or not store.exists(path):
        return source.rows.num_rows
    return source.rows.num_rows * len(store.read_json(path)) // len(source.rows.parts)


def _train(source: Source, key: str, seed: int) -> bytes:
    wanted = min(faiss_index.training_rows(key, source.rows.dim), TRAIN_BYTES // (4 * source.rows.dim))
    rows, _ = _sample(source, wanted, seed)
    return faiss_index.to_bytes(faiss_index.train_empty(key, source.rows.dim, rows, seed))


def _sample(source: Source, num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """About `num_rows` (m, d) float16 rows with their row ids, from all over the source."""
    share = min(1.0, num_rows / max(source.rows.num_rows, 1))
    rows, ids = [np.zeros((0, source.rows.dim), np.float16)], [np.zeros(0, np.int64)]
    generator = np.random.default_rng(seed)
    for part in source.rows.parts if num_rows else ():
        # Rounding up or down at random keeps the expectation when a part contributes less than one row.
        count = int(share * part.num_rows + generator.random())
        if count:
            all_rows, all_ids = source.read(part.number)
            chosen = np.sort(generator.permutation(len(all_rows))[:count])
            rows.append(all_rows[chosen])
            ids.append(all_ids[chosen])
    return np.concatenate(rows), np.concatenate(ids)


class Build:
    """The driver's side of filling the shards: who holds which part, and who died."""

    def __init__(self, directory: rundir.RunDirectory, builders: Sequence[Any]) -> None:
        self.directory = directory
        self.builders = builders
        self.deaths = 0
        self.held: list[dict[int, int]] = [{} for _ in builders]

    def fill(self, settings: IndexSettings) -> Source:
        """Add every part of the source, waiting for more while it grows; all are saved and committed at return."""
        self._on_all("held")
        source = open_source(settings)
        progress = Progress("index", len(source.rows.parts), "parts", done=sum(map(len, self.held)))
        while True:
            source = open_source(settings)
            self._check_unchanged(source)
            progress.total = len(source.rows.parts)
            self._add(source, progress)
            if source.complete and self._on_all("save") and not self._missing(source):
                break
            if not source.complete:
                time.sleep(settings.poll_s)
        self._commit(source)
        progress.close()
        return source

    def _missing(self, source: Source) -> list[Part]:
        return [p for p in source.rows.parts if p.number not in self.held[p.number % len(self.builders)]]

    def _check_unchanged(self, source: Source) -> None:
        kind = _kind(source)
        for part in source.rows.parts:
            before = self.directory.log.records.get(part.number)
            if before is not None and before["files"][kind] != part.files.get(kind):
                raise StaleOutputError(
                    f"{source.rows.uri}/{part_file(kind, part.number)} has changed since it was added to "
                    f"{self.directory.uri}: its sha256 was {before['files'][kind][:12]}",
                    hint="choose another --out, or delete the directory to rebuild it",
                )

    def _add(self, source: Source, progress: Progress) -> None:
        """Give every builder its missing parts, one batch at a time."""
        queues: list[deque[int]] = [deque() for _ in self.builders]
        rows = {part.number: part.num_rows for part in source.rows.parts}
        for part in self._missing(source):
            queues[part.number % len(self.builders)].append(part.number)
        running: dict[Any, int] = {}
        shared = ray.put(source)
        while any(queues) or running:
            for number in set(range(len(self.builders))) - set(running.values()):
                if queues[number]:
                    batch = _take(queues[number], rows, source.rows.dim)
                    running[self.builders[number].add.remote(shared, batch)] = number
            done = ray.wait(list(running))[0][0]
            number = running.pop(done)
            before = self.held[number]
            if self._update(number, done):
                new = self.held[number].keys() - before.keys()
                progress.advance(len(new), sum(rows[part] for part in new))
            else:
                queues[number].clear()  # what it lost is missing again; the next round asks and adds

    def _on_all(self, method: str) -> bool:
        """Call a method that returns the parts held on every builder; False when one died."""
        calls = [getattr(builder, method).remote() for builder in self.builders]
        return all([self._update(number, call) for number, call in enumerate(calls)])

    def _update(self, number: int, call: Any) -> bool:
        try:
            self.held[number] = ray.get(call)
            return True
        except RayActorError as error:
            self.deaths += 1
            if self.deaths > MAX_DEATHS:
                raise ShardLostError(
                    f"the builder of index shard {number} with {sum(self.held[number].values())} rows died: {error}",
                    hint="is the memory enough? use more --shards; running again continues",
                ) from None
            self.held[number] = {}  # unknown: parts that it still holds are skipped when they are added again
            return False
        except RayTaskError as error:
            raise own_error(error) from None

    def _commit(self, source: Source) -> None:
        """Record the parts that are on disk, so that the summary's counts reconcile."""
        kind = _kind(source)
        records = []
        for part in source.rows.parts:
            kept = self.held[part.number % len(self.builders)][part.number]
            record = {"part": part.number, "read": part.num_rows, "kept": kept, "files": {kind: part.files.get(kind)}}
            if kept < part.num_rows:
                record["dropped"] = {"no_caption": part.num_rows - kept}
            if self.directory.log.records.get(part.number) != record:
                records.append(record)
        self.directory.log.append(records)


def _kind(source: Source) -> str:
    return "img_emb" if source.modality == "image" else "text_emb"


def _take(queue: deque[int], rows: dict[int, int], dim: int) -> list[int]:
    batch = [queue.popleft()]
    while queue and (sum(rows[part] for part in batch) + rows[queue[0]]) * dim * 2 <= BATCH_BYTES:
        batch.append(queue.popleft())
    return batch


def _calibrate(index: ShardedIndex, source: Source, settings: IndexSettings, key: str) -> tuple[int, float]:
    """Return the smallest nprobe that reaches the target recall@10 (0 where there are no cells) and that recall."""
    queries, own = _sample(source, settings.recall_queries, settings.seed + 1)
    if not len(queries):
        return 0, 1.0
    true_similarities, true_ids = _drop_own(*_exact(source, queries), own)
    target = TARGET_RECALL if settings.min_recall is None else settings.min_recall
    cells = max(ray.get([actor.cells.remote() for actor in index.actors]))
    nprobe = 1 if cells else 0
    while True:
        _, found = _drop_own(*index.search(queries, RECALL_K + 1, nprobe or None), own)
        recall = faiss_index.recall_at_k(found, true_ids, true_similarities, RECALL_K)
        if recall >= target or nprobe >= cells:
            break
        nprobe = min(2 * nprobe, cells)
    logger.info("index: recall@10 %.4f over %d queries, nprobe %d", recall, len(queries), nprobe)
    if settings.min_recall is not None and recall < settings.min_recall:
        raise ConfigError(
            f"recall@10 of key {key} is {recall:.4f} over {len(queries)} queries (nprobe {nprobe} of {cells} cells), "
            f"below --min-recall {settings.min_recall:g}",
            hint="use --key Flat, a key with longer codes or a refinement, or a lower --min-recall",
        )
    return nprobe, recall


def _exact(source: Source, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact neighbours of (nq, d) queries over the whole source, enough of them to see ties at the tenth."""
    width = 2 * RECALL_K + 1
    shared = ray.put((source, queries))
    # Half a CPU: builders hold theirs meanwhile, and where each is on a node of one CPU, no node has a whole one free.
    task = ray.remote(num_cpus=0.5)(_exact_in_group)
    parts = bounded(lambda group: task.remote(shared, group, width), source.rows.groups(BATCH_BYTES),
                    needs={"CPU": 0.5})  # fmt: skip
    return merge_topk(list(parts), width)


def _exact_in_group(shared: Any, group: list[Part], width: int) -> tuple[np.ndarray, np.ndarray]:
    source, queries = shared
    similarities, row_ids = nearest(queries, (source.read(part.number) for part in group), width)
    return similarities.astype(np.float32), row_ids


def _drop_own(similarities: np.ndarray, row_ids: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove every query itself from its neighbours: finding oneself says nothing about recall."""
    others = np.where(row_ids == own[:, None], np.int64(-1), row_ids)
    return merge_topk([(similarities, others)], row_ids.shape[1])
