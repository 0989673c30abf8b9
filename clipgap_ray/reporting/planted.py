"""Was what the world planted found? Duplicates by dedup, leaked test images by the nearest neighbours, and the classes'
habitual backgrounds by the pool's labels (`join --pool-attributes`) and by a model's accuracy (`discover`).

A background is planted for a class when the truth has more pool rows of the class before it (the background of the
class's common photos) than before that of its counter photos, beyond chance: in a world without correlation none is.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.kernels.neighbours import more_common
from clipgap_ray.kernels.shift import PAIR
from clipgap_ray.reporting import found
from clipgap_ray.reporting.study import Study, positions
from clipgap_ray.reporting.tables import Record


def planted(study: Study) -> list[Record]:
    """Return planted and found: exact duplicates, leaked test images, habitual backgrounds.

    Returns:
        Records `what, test, planted, found, not_planted`; the last counts what was found though nobody planted it, None
        where that cannot be told.
    """
    truth = study.truth()
    if truth is None:
        return []
    pool = truth.filter(pc.and_(pc.equal(truth["set"], "pool"), pc.equal(truth["fault"], "")))
    keep = study.keep_table(["uid", "keep", "kept_uid", "row_id"])
    records = [] if keep is None else [_planted_duplicates(pool, keep)]
    return records + _planted_leaks(study, pool, keep) + _planted_backgrounds(study, truth, pool)


def _planted_duplicates(pool: pa.Table, keep: pa.Table) -> Record:
    """A group of a source and its exact copies keeps at most one row; the others count as found."""
    kept = dict(zip(keep["uid"].to_pylist(), keep["keep"].to_pylist(), strict=True))
    exact = pool.filter(pc.is_in(pool["duplicate_kind"], pa.array(["source", "exact"])))
    groups: dict[int, list[bool]] = {}
    for uid, group in zip(exact["uid"].to_pylist(), exact["duplicate_group"].to_pylist(), strict=True):
        if uid in kept:
            groups.setdefault(group, []).append(kept[uid])
    count = sum(len(members) - 1 for members in groups.values())
    removed = sum(len(members) - max(sum(members), 1) for members in groups.values())
    return {"what": "exact duplicates in the pool", "test": "", "planted": count, "found": removed,
            "not_planted": None}  # fmt: skip


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
        {"what": f"{kind} leaks of test images", "test": test, "planted": total, "found": seen, "not_planted": None}
        for (kind, test), (total, seen) in sorted(counts.items())
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


# --- backgrounds -----------------------------------------------------------------------------------------


def _planted_backgrounds(study: Study, truth: pa.Table, pool: pa.Table) -> list[Record]:
    """What the results of `join` and `discover` name as the classes' backgrounds, beside what the truth has."""
    if not {"group", "background", "class_name"} <= set(truth.column_names):
        return []
    photos = truth.filter(pc.is_in(truth["group"], pa.array(PAIR)))
    if not photos.num_rows:
        return []
    habitual = _habitual(photos, pool)
    records = []
    for name, result in found.joins(study).items():
        own = next((own for own in result["models"].values() if own.get("prevalence")), None)
        if own is not None and all("more_common" in c for c in own["prevalence"]["classes"]):
            named = {c["class_name"]: c[f"{c['more_common']}_background"]
                     for c in own["prevalence"]["classes"] if c["more_common"]}  # fmt: skip
            what = " ".join(filter(None, ("habitual backgrounds by the pool's labels", name and f"({name})")))
            records.append(_background_record(what, result["test"], habitual, named))
    for result in found.selections(study).values():
        named = {c["class_name"]: c["common"] for c in result["classes"] if c["kept"]}
        what = f"habitual backgrounds by the accuracy of {result['by']}"
        records.append(_background_record(what, photos["set"][0].as_py(), habitual, named))
    return records


def _habitual(photos: pa.Table, pool: pa.Table) -> dict[str, str]:
    """The background of every class's common photos, for the classes that the pool shows before it more than chance."""
    seen = Counter(zip(*(photos[c].to_pylist() for c in ("class_name", "group", "background")), strict=True))
    usual = {(name, group): background for (name, group, background), _ in reversed(seen.most_common())}
    classes = sorted({name for name, _ in usual if {(name, group) for group in PAIR} <= set(usual)})
    shown = Counter(zip(pool["class_name"].to_pylist(), pool["background"].to_pylist(), strict=True))
    counts = [[shown[name, usual[name, group]] for group in PAIR] for name in classes]
    _, sides = more_common(np.array(counts, np.int64).reshape(-1, 2))
    return {name: usual[name, PAIR[0]] for name, side in zip(classes, sides.tolist(), strict=True) if side > 0}


def _background_record(what: str, test: str, habitual: dict[str, str], named: dict[str, str]) -> Record:
    right = sum(habitual.get(name) == background for name, background in named.items())
    return {"what": what, "test": test, "planted": len(habitual), "found": right, "not_planted": len(named) - right}
