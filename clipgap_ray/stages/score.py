"""One exact pass over the pool: m and margin of every row for every test set, nearest rows of every test row.

    SCORES/pool/<test>/part-00000.parquet   schema.POOL_SCORES, kept rows of the part
    SCORES/queries/<test>.parquet           schema.QUERY_SCORES
    SCORES/thresholds/<test>.parquet        schema.THRESHOLDS, readable by `--thresholds`
    SCORES/partial/group-<n>.npz            query side of some groups of parts, merged at the end

Test rows go to the object store once. A task reads a group of neighbouring parts and returns its query side; the
driver merges query sides in memory and writes them (`score_queries`), with the commit of their parts, only once they
are below 0.8 % of the embeddings read: so bytes written stay under 1 % of the bytes read, and a crash costs seconds.
Unit of restart: that commit. Parts that join the pool later are scored alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.embeddings import EmbeddingSet, Part
from clipgap_ray.errors import ConfigError, DataError, StaleOutputError
from clipgap_ray.kernels import nearest
from clipgap_ray.stages.keep import read_keep
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.score_queries import QuerySide, read_partial, write_queries
from clipgap_ray.stages.session import cluster_gpus, connect, physical_cpus, resolve_device
from clipgap_ray.stages.thresholds import Tests, load_tests, tau_digest
from clipgap_ray.stages.waits import bounded

Keep = dict[int, np.ndarray]  # part -> (rows,) bool, True = stays

logger = logging.getLogger("clipgap")

GROUP_BYTES = 1 << 28
GROUPS_PER_WORKER = 2


def run(settings: ScoreSettings) -> rundir.Summary:
    """Score a pool against test sets.

    Raises:
        IndexMismatchError: If pool, test sets and references were not embedded by one encoder.
        DataError: If an input is missing or a thresholds file belongs to another test set.
        StaleOutputError: If a part that is scored already has changed since.
    """
    pool = EmbeddingSet.open(settings.pool)
    tests = load_tests(settings, pool)
    keep = read_keep(settings.keep, pool) if settings.keep else None
    if settings.add:
        return _add(settings, pool, tests, keep)
    summary = _score_into(settings.out, pool, tests, keep, settings)
    _rejoin_added(settings.out)
    return summary


def _add(settings: ScoreSettings, pool: EmbeddingSet, tests: Tests, keep: Keep | None) -> rundir.Summary:
    """Score new test sets beside earlier ones: their own run directory, then their tables join the others."""
    before = rundir.read_manifest(settings.out, "score")
    repeated = set(before["tests"]) & set(tests.names)
    if repeated:
        raise ConfigError(f"{settings.out} already scores {sorted(repeated)}", hint="give the new test sets only")
    if before["pool"]["digest"] != pool.digest:
        raise DataError(
            f"{settings.out} scores another pool than {settings.pool}",
            hint="if shards joined the pool, run `clipgap score` without --add first; else choose another --out",
        )
    if before["kept_rows"] != _kept_digest(keep):  # rows of all test sets must be the same
        raise DataError(
            f"{settings.out} scores other rows: --keep was {before['keep']!r}, now {settings.keep!r}",
            hint="give the same --keep, or choose another --out",
        )
    name = "add-" + "-".join(tests.names)
    summary = _score_into(store.join(settings.out, name), pool, tests, keep, settings)
    _rejoin_added(settings.out)
    return summary


def _rejoin_added(out: str) -> None:
    """Let the added test sets that score the same rows appear in the manifest; name those that lack new parts."""
    manifest = rundir.read_manifest(out, "score")
    manifest.update(tests=dict(manifest["own"]["tests"]), digest=manifest["own"]["digest"])
    for name in store.list_names(out):
        if not name.startswith("add-") or not store.exists(store.join(out, name, "manifest.json")):
            continue
        added = rundir.read_manifest(store.join(out, name), "score")
        if (added["pool"]["digest"], added["kept_rows"]) == (manifest["pool"]["digest"], manifest["kept_rows"]):
            manifest["tests"].update(added["tests"])
            manifest["digest"] = store.digest([manifest["digest"], added["digest"]])
            manifest["bound"] = max(manifest["bound"], added["bound"])
        else:
            logger.warning("%s lack the pool's new parts: `clipgap score --add` scores them", sorted(added["tests"]))
    store.write_json(store.join(out, "manifest.json"), manifest)


def _score_into(
    out: str, pool: EmbeddingSet, tests: Tests, keep: Keep | None, settings: ScoreSettings
) -> rundir.Summary:
    """Score the parts that `out` lacks; tables go to `settings.out`, which an added set shares with the first."""
    guarded = {
        "tests": {name: test.digest for name, test in zip(tests.names, tests.sets, strict=True)},
        "thresholds": {n: tau_digest(t) for n, t in zip(tests.names, tests.thresholds, strict=True)},
        "k": settings.k,
        "violations": settings.violations,
    }
    inputs = {part.number: _input_digest(part, keep) for part in pool.parts}
    with rundir.RunDirectory(out, "score", guarded) as directory:
        done = _scored(directory, inputs)
        left = [part for part in pool.parts if part.number not in done]
        progress = Progress("score", len(pool.parts), "parts", done=len(done))
        query_side = QuerySide(directory, len(tests.queries.rows), settings)
        try:
            for record, partial in _score_groups(pool, left, inputs, tests, keep, settings):
                query_side.add(record, partial)
                progress.advance(len(record["parts"]), rows=record["read"])
        finally:
            query_side.commit()
            progress.close()
        records = directory.log.records
        found = nearest.merge([read_partial(out, group) for group in sorted(records)] or [query_side.nothing])
        for segment, name in enumerate(tests.names):
            write_queries(settings.out, name, segment, tests, found, pool)
        files = {path: sha for record in records.values() for path, sha in record["files"].items()}
        described = _describe(tests)
        digest = store.digest(files)
        return directory.finish(
            {
                "pool": {"uri": pool.uri, "digest": pool.digest, "rows": pool.num_rows},
                "keep": settings.keep,
                "kept_rows": _kept_digest(keep),
                "encoder": pool.encoder,
                "bound": max((record["bound"] for record in records.values()), default=0.0),
                "tests": described,
                "digest": digest,
                "own": {"tests": described, "digest": digest},
            },
            embedding_bytes=sum(record["bytes"] for record in records.values()),
            query_bytes=sum(record["query_bytes"] for record in records.values()),
        )


def _input_digest(part: Part, keep: Keep | None) -> str:
    """Name what a part's scores depend on, so that a part that changed is noticed and a new one is welcome."""
    return store.digest([part.files, "" if keep is None else store.sha256(np.packbits(keep[part.number]).tobytes())])


def _kept_digest(keep: Keep | None) -> str:
    return store.sha256(b"".join(keep[part].tobytes() for part in sorted(keep))) if keep else ""


def _scored(directory: rundir.RunDirectory, inputs: dict[int, str]) -> set[int]:
    """Return the parts that are scored; refuse if one of them is no longer what was scored."""
    before = {int(p): digest for record in directory.log.records.values() for p, digest in record["inputs"].items()}
    changed = sorted(part for part, digest in before.items() if inputs.get(part) != digest)
    if changed:
        raise StaleOutputError(
            f"{directory.uri} scores other rows: {len(changed)} of {len(before)} scored parts of the pool or of --keep "
            f"have changed since (first: part {changed[0]})",
            hint="choose another --out; only parts that are new may join an output",
        )
    return set(before)


def _describe(tests: Tests) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "uri": test.uri,
            "digest": test.digest,
            "rows": test.num_rows,
            "has_tau": thresholds is not None,
            "reference": reference,
        }
        for name, test, thresholds, reference in zip(
            tests.names, tests.sets, tests.thresholds, tests.references, strict=True
        )
    }


# --- the pass --------------------------------------------------------------------------------------------


def _score_groups(
    pool: EmbeddingSet,
    parts: list[Part],
    inputs: dict[int, str],
    tests: Tests,
    keep: Keep | None,
    settings: ScoreSettings,
) -> Iterator[tuple[dict[str, Any], nearest.QueryNearest]]:
    """Yield (counts and files, query side) of groups of parts as their tasks finish."""
    if not parts:
        return
    connect()
    device = resolve_device(settings.device)
    left = EmbeddingSet(pool.uri, pool.manifest, parts)
    groups = list(left.groups(settings.group_bytes or _group_bytes(left, len(tests.queries.rows), settings.k, device)))
    gpus = 1.0 if device == "cuda" else 0.0
    task = ray.remote(num_cpus=1, num_gpus=gpus)(_score_group)
    shared = ray.put(Shared(settings.out, left, tests.names, tests.queries, settings.k, settings.violations, device))

    def submit(group: list[Part]) -> Any:
        masks = {part.number: keep[part.number] for part in group} if keep is not None else None
        return task.remote(shared, group, {str(part.number): inputs[part.number] for part in group}, masks)

    yield from bounded(submit, groups, needs={"CPU": 1.0, "GPU": gpus})


def _group_bytes(pool: EmbeddingSet, num_queries: int, k: int, device: str) -> int:
    """256 MB a task; less where that would leave workers without work.

    A GPU computes for less time than the query side takes to travel, so there a task reads at least 20 times as much
    as it returns. On a CPU that would only mean hours of work lost with a task.
    """
    on_gpu = device == "cuda"
    workers = cluster_gpus() if on_gpu else physical_cpus()
    most = max(GROUP_BYTES, 20 * num_queries * (16 + 12 * k)) if on_gpu else GROUP_BYTES
    return max(1, min(most, pool.num_rows * pool.dim * 2 // (GROUPS_PER_WORKER * workers)))


@dataclass(frozen=True)
class Shared:
    """What every task of a pass needs; in the object store once."""

    out: str
    pool: EmbeddingSet
    names: list[str]
    queries: nearest.Queries
    k: int
    violations: bool
    device: str


def _score_group(
    shared: Shared, group: list[Part], inputs: dict[str, str], keep: Keep | None
) -> tuple[dict[str, Any], nearest.QueryNearest]:
    """Score one group of parts: write its pool tables, return their record and the group's query side."""
    one = nearest.begin(shared.queries, shared.k, violations=shared.violations, device=shared.device)
    files: dict[str, str] = {}
    read = kept = 0
    for part, rows, row_ids, uids in _read_ahead(shared.pool, group, keep):
        scores = one.feed(rows, row_ids)
        for segment, name in enumerate(shared.names):
            data = store.table_bytes(_pool_table(scores, segment, row_ids, uids, shared.queries))
            path = f"pool/{name}/part-{part.number:05d}.parquet"
            store.write_bytes(store.join(shared.out, path), data)
            files[path] = store.sha256(data)
        read += part.num_rows
        kept += len(rows)
    return {
        "parts": [part.number for part in group],
        "inputs": inputs,
        "read": read,
        "kept": kept,
        "bytes": 2 * shared.pool.dim * read,
        "bound": one.bound,
        "files": files,
    }, one.found()


def _read_ahead(
    pool: EmbeddingSet, group: list[Part], keep: Keep | None
) -> Iterator[tuple[Part, np.ndarray, np.ndarray, pa.ChunkedArray]]:
    """Yield (part, kept rows, their row ids, their uids), reading the next part while this one is computed."""

    def read(part: Part) -> tuple[np.ndarray, np.ndarray, pa.ChunkedArray]:
        rows, row_ids = pool.images(part.number), schema.row_ids(part.number, part.num_rows)
        uids = pool.metadata(part.number, ["uid"]).column("uid")
        if keep is None:
            return np.array(rows), row_ids, uids  # a copy: a memory map would be read inside the product
        mask = keep[part.number]
        return np.asarray(rows)[mask], row_ids[mask], uids.filter(pa.array(mask))

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, group[0])
        for part, following in zip(group, [*group[1:], None], strict=True):
            rows, row_ids, uids = coming.result()
            if following is not None:
                coming = reader.submit(read, following)
            yield part, rows, row_ids, uids


def _pool_table(
    scores: nearest.PoolScores, segment: int, row_ids: np.ndarray, uids: Any, queries: nearest.Queries
) -> pa.Table:
    ids = np.append(queries.row_ids, -1)  # position -1 (an empty test set) maps to row id -1
    table = pa.table(
        {
            "row_id": row_ids,
            "uid": uids,
            "m": scores.m[:, segment],
            "arg_m": ids[scores.arg_m[:, segment]],
            "margin": scores.margin[:, segment],
            "arg_margin": ids[scores.arg_margin[:, segment]],
        },
        schema=schema.POOL_SCORES,
    )
    if scores.violations is None:
        return table
    return table.append_column(schema.VIOLATIONS, pa.array(scores.violations[:, segment]))
