"""One exact pass over the pool: m and margin of every row for every test set, nearest rows of every test row.

    SCORES/pool/<test>/part-00000.parquet   schema.POOL_SCORES, kept rows of the part
    SCORES/queries/<test>.parquet           schema.QUERY_SCORES
    SCORES/thresholds/<test>.parquet        schema.THRESHOLDS, readable by `--thresholds`
    SCORES/partial/group-<n>.npz            query side of one group of parts, merged at the end

Test rows go to the object store once. A task reads a group of neighbouring parts, so that the query side is
written once per group and not per part. Unit of restart: the group of parts.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.embeddings import EmbeddingSet, Part, check_same_encoder, identity
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import nearest
from clipgap_ray.stages.keep import read_keep
from clipgap_ray.stages.session import Progress, bounded, connect


@dataclass(frozen=True)
class Tests:
    """The test sets of a run: names, embeddings, thresholds (None without), stacked queries."""

    names: list[str]
    sets: list[EmbeddingSet]
    thresholds: list[pa.Table | None]
    queries: nearest.Queries


def run(settings: ScoreSettings) -> rundir.Summary:
    """Score a pool against test sets.

    Raises:
        IndexMismatchError: If pool, test sets and references were not embedded by one encoder.
        DataError: If an input is missing or a thresholds file belongs to another test set.
    """
    pool = EmbeddingSet.open(settings.pool)
    tests = load_tests(settings, pool)
    keep = read_keep(settings.keep, pool) if settings.keep else None
    provenance = {
        "pool": pool.digest,
        "keep": store.sha256(b"".join(keep[part].tobytes() for part in sorted(keep))) if keep else "",
        "tests": {name: test.digest for name, test in zip(tests.names, tests.sets, strict=True)},
        "thresholds": {n: _tau_digest(t) for n, t in zip(tests.names, tests.thresholds, strict=True)},
        "k": settings.k,
    }
    if settings.add:
        return _add(settings, provenance, pool, tests, keep)
    return _score_into(settings.out, provenance, pool, tests, keep, settings)


def _add(
    settings: ScoreSettings,
    provenance: dict[str, Any],
    pool: EmbeddingSet,
    tests: Tests,
    keep: dict[int, np.ndarray] | None,
) -> rundir.Summary:
    """Score new test sets beside earlier ones: their own run directory, then their tables join the others."""
    before = rundir.read_manifest(settings.out, "score")
    repeated = set(before["tests"]) & set(tests.names)
    if repeated:
        raise ConfigError(f"{settings.out} already scores {sorted(repeated)}", hint="give the new test sets only")
    if before["pool"]["digest"] != pool.digest:
        raise DataError(f"{settings.out} scores another pool than {settings.pool}", hint="choose another --out")
    if before["settings"]["keep"] != provenance["keep"]:  # rows of all test sets must be the same
        raise DataError(
            f"{settings.out} scores other rows: --keep was {before['keep']!r}, now {settings.keep!r}",
            hint="give the same --keep, or choose another --out",
        )
    name = "add-" + "-".join(tests.names)
    summary = _score_into(store.join(settings.out, name), provenance, pool, tests, keep, settings, tables=settings.out)
    after = rundir.read_manifest(store.join(settings.out, name), "score")
    before["tests"].update(after["tests"])
    before["digest"] = store.digest([before["digest"], after["digest"]])
    store.write_json(store.join(settings.out, "manifest.json"), before)
    return summary


def _score_into(
    out: str,
    provenance: dict[str, Any],
    pool: EmbeddingSet,
    tests: Tests,
    keep: dict[int, np.ndarray] | None,
    settings: ScoreSettings,
    tables: str = "",
) -> rundir.Summary:
    tables = tables or out
    with rundir.RunDirectory(out, "score", provenance) as directory:
        done = {part for record in directory.log.records.values() for part in record["parts"]}
        left = EmbeddingSet(pool.uri, pool.manifest, [part for part in pool.parts if part.number not in done])
        groups = list(left.groups(settings.group_bytes))
        if groups:
            connect()
        progress = Progress("score", len(pool.parts), "parts", done=len(done))
        for record in _score_groups(directory.uri, tables, left, groups, tests, keep, settings.k):
            directory.log.append([record])
            progress.advance(len(record["parts"]), rows=record["read"])
        progress.close()
        partials = [_read_partial(directory.uri, group) for group in sorted(directory.log.records)]
        found = nearest.merge(partials or [nearest.empty(len(tests.queries.rows), settings.k)])
        for segment, name in enumerate(tests.names):
            _write_queries(tables, name, segment, tests, found, pool)
        return directory.finish(
            {
                "pool": {"uri": pool.uri, "digest": pool.digest, "rows": pool.num_rows},
                "keep": settings.keep,
                "encoder": pool.encoder,
                "tests": {
                    name: {
                        "uri": test.uri,
                        "digest": test.digest,
                        "rows": test.num_rows,
                        "has_tau": tests.thresholds[i] is not None,
                    }
                    for i, (name, test) in enumerate(zip(tests.names, tests.sets, strict=True))
                },
            }
        )


# --- test sets and thresholds ----------------------------------------------------------------------------


def load_tests(settings: ScoreSettings, pool: EmbeddingSet) -> Tests:
    """Open the test sets and find their thresholds, from references or from files."""
    named = schema.named(settings.test, "--test")
    sets = [EmbeddingSet.open(uri) for uri in named.values()]
    for name, test in zip(named, sets, strict=True):
        check_same_encoder(pool.encoder, test.encoder, (f"pool {pool.uri}", f"test set {name}"))
    references = _per_test(settings.reference, list(named), "--reference")
    files = _per_test(settings.thresholds, list(named), "--thresholds")
    thresholds: list[pa.Table | None] = []
    for name, test in zip(named, sets, strict=True):
        if name in files:
            thresholds.append(read_thresholds(files[name], test))
        elif name in references:
            thresholds.append(compute_thresholds(EmbeddingSet.open(references[name]), test, name))
        else:
            thresholds.append(None)
    rows = [test.all_images() for test in sets]
    ids = [test.all_metadata(["row_id"]).column("row_id").to_numpy() for test in sets]
    tau = [
        np.full(len(r), np.nan) if t is None else t.column("tau").to_numpy()
        for r, t in zip(rows, thresholds, strict=True)
    ]
    return Tests(list(named), sets, thresholds, nearest.Queries.stack(rows, ids, tau))


def _per_test(words: tuple[str, ...], tests: list[str], what: str) -> dict[str, str]:
    """Read `PATH` (for all test sets) or `NAME=PATH` words."""
    if len(words) == 1 and "=" not in words[0]:
        return dict.fromkeys(tests, words[0])
    result = schema.named(words, what)
    unknown = set(result) - set(tests)
    if unknown:
        raise ConfigError(f"{what} names {sorted(unknown)}, which --test does not", hint=f"test sets: {tests}")
    return result


def compute_thresholds(reference: EmbeddingSet, test: EmbeddingSet, name: str) -> pa.Table:
    """Return `schema.THRESHOLDS`: every test row's exact similarity to its nearest reference row."""
    check_same_encoder(reference.encoder, test.encoder, (f"reference {reference.uri}", f"test set {name}"))
    rows = test.all_images()
    blocks = ((np.asarray(reference.images(p.number)), schema.row_ids(p.number, p.num_rows)) for p in reference.parts)
    similarity, row_ids = nearest.nearest(rows, blocks, 1)
    meta = reference.all_metadata(["row_id", "uid"])
    uid_of = dict(zip(meta.column("row_id").to_pylist(), meta.column("uid").to_pylist(), strict=True))
    own = test.all_metadata(["row_id", "uid"])
    table = pa.table(
        {
            "row_id": own.column("row_id"),
            "uid": own.column("uid"),
            "tau": similarity[:, 0],
            "reference_uid": [uid_of[i] for i in row_ids[:, 0].tolist()],
        },
        schema=schema.THRESHOLDS,
    )
    return table.replace_schema_metadata(_threshold_marks(test, reference.digest))


def _threshold_marks(test: EmbeddingSet, reference: str) -> dict[str, str]:

    return {
        "clipgap.encoder": store.digest(identity(test.encoder)),
        "clipgap.test": test.digest,
        "clipgap.reference": reference,
    }


def read_thresholds(uri: str, test: EmbeddingSet) -> pa.Table:
    """Read a thresholds file and check that it is for these test rows and this encoder.

    Raises:
        DataError: If it belongs to another test set or encoder, or has other columns.
    """
    table = store.read_table(uri)
    missing = [name for name in schema.THRESHOLDS.names if name not in table.column_names]
    if missing:
        raise DataError(f"{uri} is no thresholds file: columns {missing} are missing")
    marks = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    expected = _threshold_marks(test, "")
    for key, what in (("clipgap.test", "test set"), ("clipgap.encoder", "encoder")):
        if marks.get(key) != expected[key]:
            raise DataError(
                f"{uri} holds thresholds of another {what} than {test.uri}",
                hint="compute them with `clipgap score --reference EMB`, or embed the test set as its maker did",
            )
    return table.select(schema.THRESHOLDS.names).cast(schema.THRESHOLDS)


def _tau_digest(table: pa.Table | None) -> str:
    return "" if table is None else store.sha256(table.column("tau").to_numpy().tobytes())


# --- the pass --------------------------------------------------------------------------------------------


def _score_groups(
    uri: str,
    tables: str,
    pool: EmbeddingSet,
    groups: list[list[Part]],
    tests: Tests,
    keep: dict[int, np.ndarray] | None,
    k: int,
) -> Any:
    if not groups:
        return
    task = ray.remote(num_cpus=1)(_score_group)
    shared = ray.put((pool, tests.names, tests.queries))

    def submit(group: list[Part]) -> Any:
        masks = {part.number: keep[part.number] for part in group} if keep is not None else None
        return task.remote(uri, tables, shared, group, masks, k)

    yield from bounded(submit, groups)


def _score_group(
    uri: str, tables: str, shared: Any, group: list[Part], keep: dict[int, np.ndarray] | None, k: int
) -> dict[str, Any]:
    """Score one group of parts: write its pool tables and its query side, return the commit record."""
    pool, names, queries = shared
    partial = nearest.empty(len(queries.rows), k)
    files: dict[str, str] = {}
    read = kept = 0
    for part in group:
        mask = np.ones(part.num_rows, bool) if keep is None else keep[part.number]
        rows = np.asarray(pool.images(part.number))[mask]
        row_ids = schema.row_ids(part.number, part.num_rows)[mask]
        scores, found = nearest.score(rows, row_ids, queries, k)
        partial = nearest.merge([partial, found])
        uids = pool.metadata(part.number, ["uid"]).column("uid").filter(pa.array(mask))
        for segment, name in enumerate(names):
            data = store.table_bytes(_pool_table(scores, segment, row_ids, uids, queries))
            path = f"pool/{name}/part-{part.number:05d}.parquet"
            store.write_bytes(store.join(tables, path), data)
            files[path] = store.sha256(data)
        read += part.num_rows
        kept += len(rows)
    first = group[0].number
    buffer = io.BytesIO()
    np.savez(buffer, **partial.__dict__)
    store.write_bytes(_partial_path(uri, first), buffer.getvalue())
    dropped = {"not_kept": read - kept} if read != kept else {}
    parts = [part.number for part in group]
    return {"part": first, "parts": parts, "read": read, "kept": kept, "dropped": dropped, "files": files}


def _pool_table(
    scores: nearest.PoolScores, segment: int, row_ids: np.ndarray, uids: Any, queries: nearest.Queries
) -> pa.Table:
    ids = np.append(queries.row_ids, -1)  # position -1 (an empty test set) maps to row id -1
    return pa.table(
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


def _partial_path(uri: str, group: int) -> str:
    return store.join(uri, "partial", f"group-{group:05d}.npz")


def _read_partial(uri: str, group: int) -> nearest.QueryNearest:
    with np.load(io.BytesIO(store.read_bytes(_partial_path(uri, group))), allow_pickle=False) as arrays:
        return nearest.QueryNearest(**{name: arrays[name] for name in arrays.files})


def _write_queries(
    tables: str, name: str, segment: int, tests: Tests, found: nearest.QueryNearest, pool: EmbeddingSet
) -> None:
    rows = slice(int(tests.queries.offsets[segment]), int(tests.queries.offsets[segment + 1]))
    own = tests.sets[segment].all_metadata(["row_id", "uid"])
    tau = tests.thresholds[segment]
    known = [i for i in found.best_id[rows].tolist() if i >= 0]
    uid_of = uids_of(pool, np.array(known, np.int64))
    table = pa.table(
        {
            "row_id": own.column("row_id"),
            "uid": own.column("uid"),
            "tau": tests.queries.tau[rows],
            "reference_uid": tau.column("reference_uid") if tau is not None else pa.nulls(own.num_rows, pa.string()),
            "similarity": found.best[rows],
            "nearest_uid": [uid_of.get(i) for i in found.best_id[rows].tolist()],
            "nearest_row_ids": list(found.row_ids[rows]),
            "nearest_similarities": list(found.similarities[rows]),
        },
        schema=schema.QUERY_SCORES,
    )
    store.write_table(store.join(tables, "queries", f"{name}.parquet"), table)
    if tau is not None:
        store.write_table(store.join(tables, "thresholds", f"{name}.parquet"), tau)


def uids_of(pool: EmbeddingSet, row_ids: np.ndarray) -> dict[int, str]:
    """Return the uids of some pool rows, reading only the parts they lie in."""
    parts, positions = schema.split_row_ids(np.unique(row_ids))
    result: dict[int, str] = {}
    for part in np.unique(parts).tolist():
        inside = positions[parts == part]
        uids = pool.metadata(part, ["uid"]).column("uid").take(pa.array(inside)).to_pylist()
        result.update(zip(((part << 32) | inside).tolist(), uids, strict=True))
    return result
