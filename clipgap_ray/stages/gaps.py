"""The similarity gap after a cut, for many cuts in one pass over the pool.

For a split C of the pool and thresholds tau from the reference, the gap of test image i when training on C with the
reference mixed in is max(tau_i, s_i(C)) (paper 2310.09562, 1.4). After gap-matching it equals tau_i for every i; that
is checked here from the embeddings, not from the scores that made the cut.

Writes: OUT/<split>/<test>.parquet (schema.GAPS). Unit of restart: the whole pass; it is seconds per ten million rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.split import GapsSettings
from clipgap_ray.embeddings import EmbeddingSet, Part
from clipgap_ray.kernels.nearest import nearest_kept
from clipgap_ray.stages.keep import read_split
from clipgap_ray.stages.session import Progress, bounded, connect
from clipgap_ray.stages.split import read_tau

GROUP_BYTES = 1 << 27


def run(settings: GapsSettings) -> rundir.Summary:
    """Measure the gap of every split to every scored test set."""
    pool = EmbeddingSet.open(settings.pool)
    scores = rundir.read_manifest(settings.scores, "score")
    names = {uri.rsplit("/", 1)[-1].removesuffix(".npy"): uri for uri in settings.split}
    guarded = {
        "scores": scores["digest"],
        "splits": {name: store.sha256(store.read_bytes(uri)) for name, uri in names.items()},
    }
    with rundir.RunDirectory(settings.out, "gaps", guarded) as directory:
        if not directory.log.records:
            tests = {name: EmbeddingSet.open(test["uri"]) for name, test in scores["tests"].items()}
            keeps = [read_split(uri, pool) for uri in names.values()]
            best, best_id = _pass(pool, keeps, np.concatenate([test.all_images() for test in tests.values()]))
            _write(directory.uri, settings.scores, list(names), tests, best, best_id)
            directory.log.append([{"part": 0, "read": pool.num_rows, "kept": pool.num_rows}])
        return directory.finish({"splits": names, "scores": settings.scores})


def _pass(pool: EmbeddingSet, keeps: list[dict[int, np.ndarray]], queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    connect()
    shared = ray.put((pool, queries))
    task = ray.remote(num_cpus=1)(_group)
    groups = list(pool.groups(GROUP_BYTES))
    progress = Progress("gaps", len(groups), "groups of parts")
    best = np.full((len(keeps), len(queries)), -np.inf)
    best_id = np.full((len(keeps), len(queries)), -1, np.int64)

    def submit(group: list[Part]) -> Any:
        masks = np.stack([np.concatenate([keep[part.number] for part in group]) for keep in keeps])
        return task.remote(shared, group, masks)

    for similarity, row_id in bounded(submit, groups):
        better = (similarity > best) | ((similarity == best) & (row_id >= 0) & (row_id < best_id))
        best[better], best_id[better] = similarity[better], row_id[better]
        progress.advance()
    progress.close()
    return best, best_id


def _group(shared: Any, group: list[Part], masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pool, queries = shared
    rows = np.concatenate([np.asarray(pool.images(part.number)) for part in group])
    row_ids = np.concatenate([schema.row_ids(part.number, part.num_rows) for part in group])
    return nearest_kept(rows, row_ids, masks, queries)


def _write(
    uri: str, scores: str, names: list[str], tests: dict[str, EmbeddingSet], best: np.ndarray, best_id: np.ndarray
) -> None:
    start = 0
    for test, rows in tests.items():
        columns = slice(start, start + rows.num_rows)
        start += rows.num_rows
        own = rows.all_metadata(["row_id", "uid"])
        tau = read_tau(scores, test)
        for cut, name in enumerate(names):
            similarity = best[cut, columns]
            table = pa.table(
                {
                    "row_id": own.column("row_id"),
                    "uid": own.column("uid"),
                    "tau": tau,
                    "similarity": similarity,
                    "gap": np.fmax(tau, similarity),
                    "nearest_row_id": best_id[cut, columns],
                },
                schema=schema.GAPS,
            )
            store.write_table(store.join(uri, name, f"{test}.parquet"), table)
