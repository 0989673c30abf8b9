"""The similarity gap before and after every cut, in one pass over the pool.

For a split C of the pool and thresholds tau from the reference, the gap of test image i when training on C with the
reference mixed in is max(tau_i, s_i(C)) (paper 2310.09562, 1.4). After gap-matching it equals tau_i for every i; that
is checked here from the embeddings, not from the scores that made the cut.

Writes: OUT/<split>/<test>.parquet (schema.GAPS) and OUT/diagnostics.json, one record per split (and `pool`: every
scored row) and test set, beside the reference's own: share of test images closer to the pool than to the reference,
duplicate rates by similarity and by equal bytes (sha256), median k-th neighbour, rows within delta of the hull. Unit of
restart: the whole pass; it is seconds per ten million rows and cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.split import GapsSettings
from clipgap_ray.embeddings import EmbeddingSet, Part
from clipgap_ray.kernels import kept, nearest
from clipgap_ray.stages.keep import read_keep, read_split
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.session import connect
from clipgap_ray.stages.split import read_tau
from clipgap_ray.stages.thresholds import nearest_in
from clipgap_ray.stages.waits import bounded

GROUP_BYTES = 1 << 27
BEFORE = "pool"  # the pool as it was scored, before any cut


def run(settings: GapsSettings) -> rundir.Summary:
    """Measure the gap of every split to every scored test set."""
    pool = EmbeddingSet.open(settings.pool)
    scores = rundir.read_manifest(settings.scores, "score")
    names = {uri.rsplit("/", 1)[-1].removesuffix(".npy"): uri for uri in settings.split}
    guarded = {
        "scores": scores["digest"],
        "splits": {name: store.sha256(store.read_bytes(uri)) for name, uri in names.items()},
        "neighbours": settings.neighbours,
        "deltas": settings.deltas,
        "duplicates": settings.duplicates,
    }
    with rundir.RunDirectory(settings.out, "gaps", guarded) as directory:
        if not directory.log.records:
            tests = {name: EmbeddingSet.open(test["uri"]) for name, test in scores["tests"].items()}
            keeps = [_scored_rows(scores, pool), *(read_split(uri, pool) for uri in names.values())]
            queries = nearest.Queries.stack(
                [test.all_images() for test in tests.values()],
                [test.all_metadata(["row_id"]).column("row_id").to_numpy() for test in tests.values()],
                [read_tau(settings.scores, name) for name in tests],
            )
            digests = np.concatenate([_digests(test) for test in tests.values()])
            left, same = _pass(pool, keeps, queries, digests, settings)
            records = []
            for segment, (name, test) in enumerate(tests.items()):
                at = slice(int(queries.offsets[segment]), int(queries.offsets[segment + 1]))
                _write(directory.uri, list(names), name, test, left, queries.tau, at)
                known = None if same is None or (digests[at] == b"").any() else same[:, at]
                records += _diagnose([BEFORE, *names], name, left, known, queries.tau, at, settings)
                own = nearest.Queries.stack([queries.rows[at]], [queries.row_ids[at]], [queries.tau[at]])
                records += _diagnose_reference(name, scores["tests"][name], own, digests[at], settings)
            store.write_json(directory.path("diagnostics.json"), records)
            directory.log.append([{"part": 0, "read": pool.num_rows, "kept": pool.num_rows}])
        return directory.finish({"splits": names, "scores": settings.scores})


def _scored_rows(scores: dict[str, Any], pool: EmbeddingSet) -> dict[int, np.ndarray]:
    if scores["keep"]:
        return read_keep(scores["keep"], pool)
    return {part.number: np.ones(part.num_rows, bool) for part in pool.parts}


def _digests(rows: EmbeddingSet) -> np.ndarray:
    """(n,) S64 sha256 of every image; b"" where embeddings came without images."""
    return np.concatenate([_part_digests(rows, part) for part in rows.parts])


def _part_digests(rows: EmbeddingSet, part: Part) -> np.ndarray:
    digests = rows.metadata(part.number, ["sha256"]).column("sha256").to_pylist()
    return np.array([digest or "" for digest in digests], "S64")


def _pass(
    pool: EmbeddingSet,
    keeps: list[dict[int, np.ndarray]],
    queries: nearest.Queries,
    digests: np.ndarray,
    settings: GapsSettings,
) -> tuple[kept.Kept, np.ndarray | None]:
    """What every cut leaves, and (C, Q) bool which test images lie in it byte for byte; None if that is not known."""
    connect()
    shared = ray.put((pool, queries, digests, settings))
    task = ray.remote(num_cpus=1)(_group)
    groups = list(pool.groups(GROUP_BYTES))
    progress = Progress("gaps", len(groups), "groups of parts")
    left: kept.Kept | None = None
    same, unknown = np.zeros((len(keeps), len(digests)), bool), 0

    def submit(group: list[Part]) -> Any:
        masks = np.stack([np.concatenate([keep[part.number] for part in group]) for keep in keeps])
        return task.remote(shared, group, masks)

    for found, here, without in bounded(submit, groups):
        left = found if left is None else kept.merge([left, found])
        same |= here
        unknown += without
        progress.advance()
    progress.close()
    assert left is not None  # an EmbeddingSet has at least one part
    return left, None if unknown else same


def _group(shared: Any, group: list[Part], masks: np.ndarray) -> tuple[kept.Kept, np.ndarray, int]:
    pool, queries, wanted, settings = shared
    rows = np.concatenate([np.asarray(pool.images(part.number)) for part in group])
    row_ids = np.concatenate([schema.row_ids(part.number, part.num_rows) for part in group])
    digests = np.concatenate([_part_digests(pool, part) for part in group])
    left = kept.around(rows, row_ids, masks, queries, settings.neighbours, settings.deltas)
    return left, kept.same_bytes(digests, masks, wanted), int((digests == b"").sum())


def _write(
    uri: str, names: list[str], test: str, rows: EmbeddingSet, left: kept.Kept, tau: np.ndarray, at: slice
) -> None:
    own = rows.all_metadata(["row_id", "uid"])
    for cut, name in enumerate(names, 1):  # 0 is the pool before any cut: its distances are in the score tables
        similarity = left.best[cut, at]
        table = pa.table(
            {
                "row_id": own.column("row_id"),
                "uid": own.column("uid"),
                "tau": tau[at],
                "similarity": similarity,
                "gap": np.fmax(tau[at], similarity),
                "nearest_row_id": left.best_id[cut, at],
                "neighbour_similarities": list(left.similarities[cut, at]),
                "within": list(left.within[cut, at]),
            },
            schema=schema.GAPS,
        )
        store.write_table(store.join(uri, name, f"{test}.parquet"), table)


def _diagnose(
    names: list[str],
    test: str,
    left: kept.Kept,
    same: np.ndarray | None,
    tau: np.ndarray,
    at: slice,
    settings: GapsSettings,
) -> list[dict[str, Any]]:
    """One record per cut: before (`pool`) and after; `same` is (C, q) bool for this test set."""
    records = []
    known = not np.isnan(tau[at]).any()
    for cut, name in enumerate(names):
        best = left.best[cut, at]
        within = left.within[cut, at]
        records.append(
            {
                "split": name,
                "test": test,
                "num_images": len(best),
                **_closeness(best, left.similarities[cut, at], settings),
                "same_bytes_rate": None if same is None else float(same[cut].mean()),
                "share_closer_than_reference": float((best > tau[at]).mean()) if known else None,
                "median_gap": _median(np.fmax(tau[at], best)),
                "mean_rows_within": _mean_within(within, settings) if known else {},
            }
        )
    return records


def _diagnose_reference(
    test: str, described: dict[str, Any], queries: nearest.Queries, digests: np.ndarray, settings: GapsSettings
) -> list[dict[str, Any]]:
    """The reference's own curves, where its embeddings were given: what density matching aims at."""
    if not described.get("reference"):
        return []
    reference = EmbeddingSet.open(described["reference"])
    similarities, _ = nearest_in(reference, queries.rows, settings.neighbours)
    closeness = _closeness(similarities[:, 0], similarities, settings)
    own = _digests(reference)
    known = not (own == b"").any() and not (digests == b"").any()
    same = float(np.isin(digests, own).mean()) if known else None
    record = {"split": "reference", "test": test, "num_images": len(digests), **closeness, "same_bytes_rate": same}
    return [{**record, "mean_rows_within": _reference_within(reference, queries, digests, settings)}]


def _reference_within(
    reference: EmbeddingSet, queries: nearest.Queries, digests: np.ndarray, settings: GapsSettings
) -> dict[str, float]:
    """Mean number of reference rows within every delta of the hull, as it is counted for the cuts: is a cut denser?"""
    if np.isnan(queries.tau).any():
        return {}
    everything = {part.number: np.ones(part.num_rows, bool) for part in reference.parts}
    left, _ = _pass(reference, [everything], queries, digests, settings)
    return _mean_within(left.within[0], settings)


def _mean_within(within: np.ndarray, settings: GapsSettings) -> dict[str, float]:
    """Means over images of (q, D) counts, by delta."""
    return {f"{delta:g}": float(within[:, i].mean()) for i, delta in enumerate(settings.deltas)}


def _closeness(best: np.ndarray, similarities: np.ndarray, settings: GapsSettings) -> dict[str, Any]:
    return {
        "median_similarity": _median(best),
        "duplicate_rate": {f"{at:g}": float((best >= at).mean()) for at in settings.duplicates},
        "median_kth_similarity": [_median(similarities[:, j]) for j in range(similarities.shape[1])],
    }


def _median(values: np.ndarray) -> float | None:
    """Median, or None where most test images have no such neighbour."""
    middle = float(np.median(values)) if len(values) else -np.inf
    return middle if np.isfinite(middle) else None
