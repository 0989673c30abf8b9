"""Was what the world planted found? Exact duplicates by dedup, leaked test images by the nearest neighbours."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.reporting.study import Study, positions
from clipgap_ray.reporting.tables import Record


def planted(study: Study) -> list[Record]:
    """Return planted and found: exact duplicates by dedup, leaked test images by the nearest neighbours."""
    truth = study.truth()
    if truth is None:
        return []
    pool = truth.filter(pc.and_(pc.equal(truth["set"], "pool"), pc.equal(truth["fault"], "")))
    keep = study.keep_table(["uid", "keep", "kept_uid", "row_id"])
    records = [] if keep is None else [_planted_duplicates(pool, keep)]
    return records + _planted_leaks(study, pool, keep)


def _planted_duplicates(pool: pa.Table, keep: pa.Table) -> Record:
    """A group of a source and its exact copies keeps at most one row; the others count as found."""
    kept = dict(zip(keep["uid"].to_pylist(), keep["keep"].to_pylist(), strict=True))
    exact = pool.filter(pc.is_in(pool["duplicate_kind"], pa.array(["source", "exact"])))
    groups: dict[int, list[bool]] = {}
    for uid, group in zip(exact["uid"].to_pylist(), exact["duplicate_group"].to_pylist(), strict=True):
        if uid in kept:
            groups.setdefault(group, []).append(kept[uid])
    count = sum(len(members) - 1 for members in groups.values())
    found = sum(len(members) - max(sum(members), 1) for members in groups.values())
    return {"what": "exact duplicates in the pool", "test": "", "planted": count, "found": found}


def _planted_leaks(study: Study, pool: pa.Table, keep: pa.Table | None) -> list[Record]:
    """A leak is found when its row, or the row that stands for it, is among the test image's nearest pool rows."""
    stands_for = {} if keep is None else dict(zip(keep["uid"].to_pylist(), keep["kept_uid"].to_pylist(), strict=True))
    embeddings = study.embeddings("pool")
    leaks = pool.filter(pc.not_equal(pool["leak_of_set"], ""))
    if embeddings is None or not leaks.num_rows:
        return []
    wanted = {stands_for.get(uid) or uid for uid in leaks["uid"].to_pylist()}
    row_of = _row_ids(embeddings, wanted)
    counts: dict[tuple[str, str], list[int]] = {}
    for leak in leaks.select(["uid", "leak_of_set", "leak_of_key", "leak_kind"]).to_pylist():
        test = leak["leak_of_set"]
        neighbours = _neighbours_by_key(study, test)
        if neighbours is None:
            continue
        row = row_of.get(stands_for.get(leak["uid"]) or leak["uid"])
        count = counts.setdefault((leak["leak_kind"], test), [0, 0])
        count[0] += 1
        count[1] += row is not None and row in neighbours.get(leak["leak_of_key"], ())
    return [
        {"what": f"{kind} leaks of test images", "test": test, "planted": total, "found": found}
        for (kind, test), (total, found) in sorted(counts.items())
    ]


def _row_ids(embeddings: EmbeddingSet, wanted: set[str]) -> dict[str, int]:
    result: dict[str, int] = {}
    for part in embeddings.parts:
        metadata = embeddings.metadata(part.number, ["uid", "row_id"])
        chosen = metadata.filter(pc.is_in(metadata["uid"], pa.array(sorted(wanted), pa.string())))
        result |= dict(zip(chosen["uid"].to_pylist(), chosen["row_id"].to_pylist(), strict=True))
    return result


def _neighbours_by_key(study: Study, test: str) -> dict[str, set[int]] | None:
    """The k nearest pool rows of every test image by its webdataset key."""
    queries, embeddings = study.queries(test), study.embeddings(test)
    if queries is None or embeddings is None:
        return None
    metadata = embeddings.all_metadata(["uid", "image_path"])
    keys = metadata["image_path"].to_pylist()
    at = positions(queries.uids, metadata["uid"].to_pylist())
    return {keys[i]: set(queries.neighbour_ids[row]) for row, i in enumerate(at) if i >= 0}
