"""Embeddings to a sharded FAISS index, held and searched in Ray actors.

The quantiser is trained once on a sample; K builder actors get it, add the parts p with p % K = their number, and
save their shard. A part counts as done when the saved shard's manifest names it, so a crash or a rerun adds nothing
twice. With `follow` the parts are taken as `embed` commits them, and the index is published as it grows: jobs and the
service open what is saved so far. At the end recall@10 is measured through the
actors against exact search, and `nprobe` is the smallest that reaches the target.

Reads: `embeddings` layout. Writes: `clipgap_ray.index` layout. Unit of restart: the part; a shard is saved whenever
saving takes less than a tenth of the time since the last save, and at the end. Actors: one per index shard, a
quarter of a CPU each. On failure: a dead builder restarts from its saved shard and gets the missing parts again;
run the same command again for the rest.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from clipgap_ray import rundir, store, uidmap
from clipgap_ray.config.index import IndexSettings
from clipgap_ray.embeddings import EmbeddingSet, Part, identity, part_file
from clipgap_ray.errors import ShardLostError, StaleOutputError
from clipgap_ray.index import shard_uri
from clipgap_ray.index_manifest import close_growing, hide_rows, publish_growing, versions_of
from clipgap_ray.kernels import faiss_index
from clipgap_ray.stages import limits
from clipgap_ray.stages.index_merge import merge_index
from clipgap_ray.stages.index_recall import TARGET_RECALL, calibrate
from clipgap_ray.stages.progress import Progress, logger
from clipgap_ray.stages.session import connect, own_error
from clipgap_ray.stages.sharded import (
    ACTOR_CPUS,
    SAVE_EVERY_S,
    ShardActor,
    ShardedIndex,
    Source,
    read_empty,
    write_empty,
)
from clipgap_ray.stages.waits import bounded, waiting

BATCH_BYTES = 1 << 28  # rows that a builder reads and adds per call
GROWING_EFFORT = 8  # while an index grows a search visits this fraction of the cells
AWAY_S = 0.2  # between questions to a builder that is being restarted
MAX_DEATHS = 3  # of all builders together, before the run gives up
TRAIN_BYTES = 1 << 30


def open_source(settings: IndexSettings) -> Source:
    """Open the embeddings; a folder that `embed` is writing may have no manifest yet.

    Raises:
        DataError: If there is nothing to index, or nothing that `embed` has begun to write.
    """
    if settings.follow:
        return Source(*EmbeddingSet.open_growing(settings.follow), settings.modality)
    return Source(EmbeddingSet.open(settings.embeddings), True, settings.modality)


def run(settings: IndexSettings) -> rundir.Summary | dict[str, Any]:
    """Build the index, or add the parts that are new since the last run; merge it where that is asked for.

    Raises:
        ConfigError: On an impossible key, or when recall stays below `min_recall` (no manifest is written then).
        StaleOutputError: If `out` was written with other settings, or a part of the source has changed since.
        ShardLostError: If builders die again and again.
    """
    summary = build(settings) if settings.source else None
    hidden = hide_rows(settings.out, settings.blocklist) if settings.blocklist else None
    merged = merge_index(settings.out, settings.merge) if settings.merge else None
    if summary is not None:
        summary.extra |= {} if hidden is None else {"hidden": hidden}
        return summary
    found: dict[str, Any] = {} if hidden is None else {"hidden": hidden}
    return found if merged is None else {**found, "merged": settings.merge, **merged}


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
            actor.options(
                num_cpus=_builder_cpus(settings.shards), num_gpus=settings.gpus, max_restarts=MAX_DEATHS
            ).remote(directory.uri, n, building=True)
            for n in range(settings.shards)
        ]
        try:
            source = Build(directory, builders).fill(settings, choice)
            nprobe, recall = calibrate(ShardedIndex(builders), source, settings, choice.key)
        finally:
            for builder in builders:
                ray.kill(builder)
        manifest = _manifest(directory.uri, source, settings, choice, nprobe)
        manifest |= {"recall_at_10": recall, "uid_map": _map_uids(directory.uri, source)}
        summary = directory.finish(manifest, key=choice.key, recall_at_10=recall)
        close_growing(directory.uri)
        return summary


def _builder_cpus(shards: int) -> float:
    """CPUs of a builder: all of them hold theirs for the whole build, and take no more than half of what there is.

    So some node has room for a task of half a CPU, whichever way the builders lie.
    """
    there = ray.cluster_resources().get("CPU", 0.0)
    return min(ACTOR_CPUS, math.floor(1e4 * there / 2 / shards) / 1e4) or ACTOR_CPUS


def _map_uids(uri: str, source: Source) -> dict[str, Any]:
    """Write the map of uids where parts are new, in a task: the driver may be a laptop."""
    path = store.join(uri, "manifest.json")
    before = store.read_json(path).get("uid_map") if store.exists(path) else None
    task = ray.remote(num_cpus=0.5)(uidmap.write)
    needs = {"CPU": 0.5}
    written: dict[str, Any] = next(bounded(lambda _: task.remote(uri, source.rows, before), [0], needs=needs))
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
        "shards": [
            {"number": s["number"], "rows": s["rows"], "parts": len(s["parts"]), "files": s["files"]} for s in shards
        ],
        **versions_of(uri, store.digest([choice.key, nprobe, *(s["files"] for s in shards)])[:16]),
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
            limits.check()
            time.sleep(settings.poll_s)
            source = open_source(settings)
    logger.info("index: key %s per shard (%s)", choice.key, choice.reason)
    task = ray.remote(num_cpus=0.5, num_gpus=settings.gpus)(_train)
    needs = {"CPU": 0.5, **({"GPU": settings.gpus} if settings.gpus else {})}
    data = next(bounded(lambda _: task.remote(source, choice.key, settings.seed), [0], needs=needs))
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
    rows, _ = source.sample(wanted, seed)
    return faiss_index.to_bytes(faiss_index.train_empty(key, source.rows.dim, rows, seed))


class Build:
    """The driver's side of filling the shards: who holds which part, and who died."""

    def __init__(self, directory: rundir.RunDirectory, builders: Sequence[Any]) -> None:
        self.directory = directory
        self.builders = builders
        self.deaths = 0
        self.held: list[dict[int, int]] = [{} for _ in builders]
        self._away: set[int] = set()  # builders that are being restarted
        self._shown, self._show_at = 0, 0.0  # parts in what was published last, and when it is due again

    def fill(self, settings: IndexSettings, choice: faiss_index.Choice) -> Source:
        """Add every part of the source, waiting for more while it grows; all are saved and committed at return.

        While it grows the index can be opened as far as it is saved (`clipgap_ray.index.read_index`).
        """
        needs = {"CPU": _builder_cpus(settings.shards), "GPU": settings.gpus}
        with waiting(needs, settings.shards) as came:  # for a GPU that no node has, for example
            self._on_all("held")
            came()
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
                self._publish(source, settings, choice)
                limits.check()  # a source that stands still shows no progress
                time.sleep(settings.poll_s)
        self._commit(source)
        progress.close()
        return source

    def _publish(self, source: Source, settings: IndexSettings, choice: faiss_index.Choice) -> None:
        """Save all shards and let others open them: the first parts at once, later ones when saving is worth it."""
        began, held = time.monotonic(), sum(map(len, self.held))
        if held == self._shown or began < self._show_at or not self._on_all("save"):
            return
        try:
            least, most = ray.get(self.builders[0].efforts.remote())
        except RayActorError:
            return  # it died just now: the next round finds out, and publishes
        nprobe = max(least, most // GROWING_EFFORT)  # recall is measured at the end
        publish_growing(self.directory.uri, _manifest(self.directory.uri, source, settings, choice, nprobe))
        now = time.monotonic()
        self._shown, self._show_at = held, now + max(SAVE_EVERY_S, 10 * (now - began))

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
            self._away.discard(number)
            return True
        except RayActorError as error:
            if not (isinstance(error, ActorUnavailableError) and number in self._away):  # the same death still
                self.deaths += 1
            if self.deaths > MAX_DEATHS:
                raise ShardLostError(
                    f"the builder of index shard {number} with {sum(self.held[number].values())} rows died: {error}",
                    hint="is the memory enough? use more --shards; running again continues",
                ) from None
            self.held[number] = {}  # unknown: parts that it still holds are skipped when they are added again
            self._away.add(number)
            time.sleep(AWAY_S)
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
