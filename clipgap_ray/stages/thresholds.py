"""Test sets of a score run and their thresholds tau: from a reference's embeddings, or from a file.

A thresholds file (schema.THRESHOLDS) carries the encoder's and the test set's digest, so that a user without the
reference images can score against its hull, and cannot do so with the wrong test set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipgap_ray import schema, store
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.embeddings import EmbeddingSet, Part, check_same_encoder, identity
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import nearest, nearest_exact
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.session import connect
from clipgap_ray.stages.waits import bounded

REFERENCE_BYTES = 1 << 27


@dataclass(frozen=True)
class Tests:
    """The test sets of a run: names, embeddings, thresholds (None without), reference URIs (or ""), stacked queries."""

    names: list[str]
    sets: list[EmbeddingSet]
    thresholds: list[pa.Table | None]
    references: list[str]
    queries: nearest.Queries


def load_tests(settings: ScoreSettings, pool: EmbeddingSet) -> Tests:
    """Open the test sets and find their thresholds, from references or from files."""
    named = schema.named(settings.test, "--test")
    sets = {name: EmbeddingSet.open(uri) for name, uri in named.items()}
    for name, test in sets.items():
        check_same_encoder(pool.encoder, test.encoder, (f"pool {pool.uri}", f"test set {name}"))
    references = _per_test(settings.reference, list(named), "--reference")
    files = _per_test(settings.thresholds, list(named), "--thresholds")
    found = {name: read_thresholds(uri, sets[name]) for name, uri in files.items()}
    for uri in dict.fromkeys(references.values()):
        of_it = {name: sets[name] for name in named if references.get(name) == uri and name not in found}
        found |= _reuse_or_compute(settings.out, EmbeddingSet.open(uri), of_it)
    rows = [test.all_images() for test in sets.values()]
    ids = [test.all_metadata(["row_id"]).column("row_id").to_numpy() for test in sets.values()]
    tau = [
        found[name].column("tau").to_numpy() if name in found else np.full(len(own), np.nan)
        for name, own in zip(named, rows, strict=True)
    ]
    thresholds = [found.get(name) for name in named]
    behind = [references.get(name, "") if name not in files else "" for name in named]
    return Tests(list(named), list(sets.values()), thresholds, behind, nearest.Queries.stack(rows, ids, tau))


def _per_test(words: tuple[str, ...], tests: list[str], what: str) -> dict[str, str]:
    """Read `PATH` (for all test sets) or `NAME=PATH` words."""
    if len(words) == 1 and "=" not in words[0]:
        return dict.fromkeys(tests, words[0])
    result = schema.named(words, what)
    unknown = set(result) - set(tests)
    if unknown:
        raise ConfigError(f"{what} names {sorted(unknown)}, which --test does not", hint=f"test sets: {tests}")
    return result


def _reuse_or_compute(out: str, reference: EmbeddingSet, tests: dict[str, EmbeddingSet]) -> dict[str, pa.Table]:
    """Take thresholds that an earlier run into `out` computed from the same rows; compute the others in one pass."""
    found: dict[str, pa.Table] = {}
    for name, test in tests.items():
        check_same_encoder(reference.encoder, test.encoder, (f"reference {reference.uri}", f"test set {name}"))
        path = thresholds_path(out, name)
        if store.exists(path):
            table = store.read_table(path)
            if _marks_of(table) == _threshold_marks(test, reference.digest):
                found[name] = table
    missing = {name: test for name, test in tests.items() if name not in found}
    return found | (compute_thresholds(reference, missing) if missing else {})


def compute_thresholds(reference: EmbeddingSet, tests: dict[str, EmbeddingSet]) -> dict[str, pa.Table]:
    """Return `schema.THRESHOLDS` per test set: every test row's exact similarity to its nearest reference row.

    One pass over the reference for all test sets; a task reads a group of its parts.
    """
    rows = np.concatenate([test.all_images() for test in tests.values()])
    similarity, row_ids = nearest_in(reference, rows, 1)
    best, best_id = similarity[:, 0], row_ids[:, 0]
    uid_of = reference.uids_of(best_id)
    tables, start = {}, 0
    for name, test in tests.items():
        own = test.all_metadata(["row_id", "uid"])
        at = slice(start, start + own.num_rows)
        start = at.stop
        table = pa.table(
            {
                "row_id": own.column("row_id"),
                "uid": own.column("uid"),
                "tau": best[at],
                "reference_uid": [uid_of[i] for i in best_id[at].tolist()],
            },
            schema=schema.THRESHOLDS,
        )
        tables[name] = table.replace_schema_metadata(_threshold_marks(test, reference.digest))
    return tables


def nearest_in(reference: EmbeddingSet, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return every query's k nearest rows of a set, exactly; a task reads a group of its parts.

    Args:
        reference: Embeddings to search.
        queries: (Q, d) float16.
        k: Neighbours.

    Returns:
        (Q, k) float64 similarities, descending, padded with -inf, and (Q, k) int64 row ids, padded with -1.
    """
    connect()
    shared = ray.put((reference, queries, k))
    task = ray.remote(num_cpus=1)(_nearest_in_group)
    groups = list(reference.groups(REFERENCE_BYTES))
    progress = Progress("reference", len(groups), "groups of parts")
    found = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1, np.int64)
    for lists in bounded(lambda group: task.remote(shared, group), groups):
        found = nearest_exact.merge_exact([found, lists], k)
        progress.advance()
    progress.close()
    return found


def _nearest_in_group(shared: Any, group: list[Part]) -> tuple[np.ndarray, np.ndarray]:
    reference, queries, k = shared
    blocks = ((np.asarray(reference.images(part.number)), schema.row_ids(part.number, part.num_rows)) for part in group)
    return nearest_exact.nearest(queries, blocks, k)


def thresholds_path(scores: str, test: str) -> str:
    """Return the path of a test set's thresholds in a score directory."""
    return store.join(scores, "thresholds", f"{test}.parquet")


def _threshold_marks(test: EmbeddingSet, reference: str) -> dict[str, str]:
    return {
        "clipgap.encoder": store.digest(identity(test.encoder)),
        "clipgap.test": test.digest,
        "clipgap.reference": reference,
    }


def _marks_of(table: pa.Table) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}


def read_thresholds(uri: str, test: EmbeddingSet) -> pa.Table:
    """Read a thresholds file and check that it is for these test rows and this encoder.

    Raises:
        DataError: If it belongs to another test set or encoder, or has other columns.
    """
    table = store.read_table(uri)
    missing = [name for name in schema.THRESHOLDS.names if name not in table.column_names]
    if missing:
        raise DataError(f"{uri} is no thresholds file: columns {missing} are missing")
    marks = _marks_of(table)
    expected = _threshold_marks(test, "")
    for key, what in (("clipgap.test", "test set"), ("clipgap.encoder", "encoder")):
        if marks.get(key) != expected[key]:
            raise DataError(
                f"{uri} holds thresholds of another {what} than {test.uri}",
                hint="compute them with `clipgap score --reference EMB`, or embed the test set as its maker did",
            )
    return table.select(schema.THRESHOLDS.names).cast(schema.THRESHOLDS)


def tau_digest(table: pa.Table | None) -> str:
    """Return the sha256 of a test set's thresholds; empty without."""
    return "" if table is None else store.sha256(table.column("tau").to_numpy().tobytes())
