"""Splits from splits and from id lists: set algebra, dedup tables, foreign lists; and what a split is.

Everything here is decided by uid, exactly; no scores are read. What is written has the three files of any split, so
that `train`, `gaps` and `score --keep` accept it: NAME.npy, NAME.rows.npz, NAME.recipe.json (written last).
Memory: the pool's uids, 16 bytes per row. Unit of restart: the split; nothing is left behind by one that died.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa

from clipgap_ray import __version__, idlists, rundir, schema, store
from clipgap_ray.config.subsets import AnyAlgebra, DedupSplit, IdsSettings, JoinSettings, ShowSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import subsets
from clipgap_ray.stages.keep import bitmap_bytes, bitmap_path, read_keep, read_split
from clipgap_ray.stages.progress import logger

Masks = dict[int, np.ndarray]  # part -> (rows,) bool
OPERATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "and": subsets.intersection,
    "or": subsets.union,
    "minus": subsets.difference,
}
EXAMPLES = 5
# Columns of the table that `split ids` writes.
IDS = pa.schema([("uid", pa.string()), ("key", pa.string()), ("shard", pa.string()), ("row_id", pa.int64())])


def combine(settings: AnyAlgebra) -> dict[str, Any]:
    """Combine splits of one pool by set algebra on their uids.

    A row is kept if its uid is and one of the splits (for minus: the first) keeps the row. A split cut after
    deduplication keeps only one of two rows with the same uid, so the bitmaps alone would not do.

    Returns:
        The recipe.

    Raises:
        DataError: If a split has no recipe, or was cut from another pool.
    """
    recipes = [_recipe_of(uri) for uri in settings.splits]
    pool = EmbeddingSet.open(settings.pool or recipes[0]["inputs"]["pool"]["uri"])
    uids = reduce(OPERATIONS[settings.kind], [idlists.read_subset(uri) for uri in settings.splits])
    rows = [read_split(uri, pool) for uri in settings.splits]  # refuses splits of another pool
    rows = rows[:1] if settings.kind == "minus" else rows
    by_part = _pool_uids(pool)
    masks = {part: np.any([r[part] for r in rows], axis=0) & subsets.contains(uids, by_part[part]) for part in by_part}
    scores = [recipe["inputs"].get("scores") for recipe in recipes]
    inputs: dict[str, Any] = {"scores": scores[0]} if scores[0] and all(s == scores[0] for s in scores) else {}
    inputs["splits"] = [
        {"uri": uri, "name": recipe["name"], "kind": recipe["kind"], "sha256": store.sha256(store.read_bytes(uri))}
        for uri, recipe in zip(settings.splits, recipes, strict=True)
    ]
    tests = sorted({test for recipe in recipes for test in recipe["tests"]})
    return _write(settings.out, settings.kind, pool, by_part, uids, masks, inputs, {"tests": tests})


def dedup(settings: DedupSplit) -> dict[str, Any]:
    """Turn a dedup keep table into a split: exactly the rows it keeps, and their uids; returns the recipe."""
    manifest = rundir.read_manifest(settings.keep, "dedup")
    pool = EmbeddingSet.open(manifest["pool"]["uri"])
    masks = read_keep(settings.keep, pool)
    inputs: dict[str, Any] = {"dedup": {"uri": settings.keep, "digest": manifest["digest"]}}
    if settings.scores:
        scores = rundir.read_manifest(settings.scores, "score")
        if scores["pool"]["digest"] != pool.digest:
            raise DataError(f"{settings.scores} scored another pool than {settings.keep} deduplicated ({pool.uri})")
        scored = _scored_rows(settings.scores, scores, pool)
        masks = {part: mask & scored[part] for part, mask in masks.items()}
        inputs["scores"] = {"uri": settings.scores, "digest": scores["digest"]}
    by_part = _pool_uids(pool)
    uids = subsets.sorted_unique(np.concatenate([by_part[part][mask] for part, mask in masks.items()]))
    more = {"min_similarity": manifest["settings"].get("min_similarity"), "rule": manifest["settings"].get("rule")}
    return _write(settings.out, "dedup", pool, by_part, uids, masks, inputs, more)


def join(settings: JoinSettings) -> dict[str, Any]:
    """Find an id list in a pool and write what is found as a split.

    A key that several samples of the pool share (LAION's are not unique) keeps all of them and counts as ambiguous.

    Returns:
        The recipe, with `coverage`: given, unique, found, missing, ambiguous ids.

    Raises:
        DataError: If none of the ids is in the pool.
    """
    wanted = idlists.read_ids(settings.ids, settings.column)
    pool = EmbeddingSet.open(settings.pool)
    by_part = _pool_uids(pool)
    matched: list[tuple[np.ndarray, np.ndarray]] = []  # (position in the list, uid) of the rows that match
    for part in pool.parts:
        at = subsets.find(wanted.ids, _identities(pool, part.number, wanted.kind, by_part))
        matched.append((at[at >= 0], by_part[part.number][at >= 0]))
    positions, found = (np.concatenate(columns) for columns in zip(*matched, strict=True))
    coverage = _join_coverage(wanted, positions, found)
    if not coverage["found"]:
        raise DataError(
            f"none of the {len(wanted.ids)} ids ({wanted.kind}) of {settings.ids} is in {pool.uri} (coverage 0 %)",
            hint="keys are those of the shards that the pool was embedded from; compare with its metadata",
        )
    logger.info(
        "join %s: %d of %d ids found, %d missing, %d ambiguous",
        settings.ids, coverage["found"], coverage["unique"], coverage["missing"], coverage["ambiguous"],
    )  # fmt: skip
    uids = subsets.sorted_unique(found)
    masks = {part: subsets.contains(uids, by_part[part]) for part in by_part}
    inputs = {"ids": {"uri": settings.ids, "kind": wanted.kind, "sha256": store.sha256(store.read_bytes(settings.ids))}}
    return _write(settings.out, "join", pool, by_part, uids, masks, inputs, {"coverage": coverage})


def _identities(pool: EmbeddingSet, part: int, kind: idlists.Kind, by_part: dict[int, np.ndarray]) -> np.ndarray:
    """The (rows,) `UID` of a part in the terms of the list: uids, whole webdataset keys, or their numbers."""
    if kind == "uid":
        return by_part[part]
    keys = _column(pool, part, "image_path")
    return idlists.pack(keys if kind == "key" else [_base_name(key) for key in keys], kind)


def _base_name(key: str) -> str:
    """A webdataset key without its folder: the number by which LAION's lists name a sample."""
    return key.rsplit("/", 1)[-1]


def _join_coverage(wanted: idlists.IdList, positions: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """Count ids: found by any row, by none, and by rows of more than one uid."""
    order = np.lexsort((found["f1"], found["f0"], positions))
    positions, found = positions[order], found[order]
    same_id = positions[1:] == positions[:-1]
    ambiguous = np.unique(positions[1:][same_id & (found[1:] != found[:-1])])
    hit = np.zeros(len(wanted.ids), bool)
    hit[positions] = True
    return {
        "given": wanted.num_given,
        "unique": len(wanted.ids),
        "found": int(hit.sum()),
        "missing": int((~hit).sum()),
        "ambiguous": len(ambiguous),
        "missing_examples": _examples(wanted, ~hit),
    }


def _examples(wanted: idlists.IdList, missing: np.ndarray) -> list[str]:
    """A few ids that the pool lacks; none for keys, of which only the hashes are held."""
    if wanted.kind == "key":
        return []
    some = wanted.ids[np.nonzero(missing)[0][:EXAMPLES]]
    return schema.unpack_uids(some) if wanted.kind == "uid" else [str(int(low)) for low in some["f1"]]


def ids(settings: IdsSettings) -> dict[str, Any]:
    """Write a split as webdataset keys (integers or texts) or as a table, in pool order; returns counts.

    Raises:
        ConfigError: If integers are asked for and a key is none.
    """
    pool = EmbeddingSet.open(settings.pool)
    subset = idlists.read_subset(settings.split)
    tables = []
    seen = np.zeros(len(subset), bool)
    for part in pool.parts:
        table = pool.metadata(part.number, ["uid", "image_path", "shard", "row_id"])
        at = subsets.find(subset, schema.pack_uids(table.column("uid")))
        seen[at[at >= 0]] = True
        tables.append(table.filter(pa.array(at >= 0)))
    rows = pa.concat_tables(tables).rename_columns(["uid", "key", "shard", "row_id"])
    if not seen.any():
        raise DataError(
            f"none of the {len(subset)} uids of {settings.split} is in {pool.uri} (coverage 0 %)",
            hint="give the pool that the split was cut from",
        )
    keys = rows.column("key").to_pylist()
    store.write_bytes(settings.out, _id_file(settings, rows, keys))
    return {
        "out": settings.out,
        "rows": len(keys),
        "keys": len(set(keys)),
        "repeated_keys": len(keys) - len(set(keys)),
        "coverage": {"uids": len(subset), "found": int(seen.sum()), "missing": int((~seen).sum())},
    }


def _id_file(settings: IdsSettings, rows: pa.Table, keys: list[str]) -> bytes:
    if settings.out.endswith(".parquet"):
        return store.table_bytes(rows.select(IDS.names).cast(IDS))
    if settings.out.endswith(".txt"):
        return "".join(f"{key}\n" for key in keys).encode()
    numbers = [_base_name(key) for key in keys]
    bad = next((key for key in numbers if not idlists.INTEGER.match(key)), None)
    if bad is not None:
        raise ConfigError(f"key {bad!r} of {settings.pool} is no integer", hint="write keys as texts: --out NAME.txt")
    return store.array_bytes(np.unique(np.array([int(key) for key in numbers], np.int64)))


def show(settings: ShowSettings) -> dict[str, Any]:
    """Describe a split: its counts, its recipe, whether its files agree, and its coverage of a pool."""
    array = store.read_array(settings.split)
    subset = idlists.read_subset(settings.split)
    answer: dict[str, Any] = {
        "split": settings.split,
        "uids": len(subset),
        "sorted_and_unique": subsets.is_subset(array),
        "sha256": store.sha256(store.read_bytes(settings.split)),
    }
    path = _recipe_path(settings.split)
    recipe = store.read_json(path) if store.exists(path) else None
    if recipe is not None:
        chosen = ("name", "kind", "tests", "counts", "rows", "coverage", "inputs", "version")
        answer |= {name: recipe[name] for name in chosen if name in recipe}
        answer["agrees_with_recipe"] = recipe["counts"]["kept"] == len(subset)
    answer["bitmap"] = store.exists(bitmap_path(settings.split))
    if settings.pool:
        answer["pool"] = _pool_coverage(subset, EmbeddingSet.open(settings.pool), recipe)
    return answer


def _pool_coverage(subset: np.ndarray, pool: EmbeddingSet, recipe: dict[str, Any] | None) -> dict[str, Any]:
    by_part = _pool_uids(pool)
    seen = np.zeros(len(subset), bool)
    rows = 0
    for uids in by_part.values():
        at = subsets.find(subset, uids)
        seen[at[at >= 0]] = True
        rows += int((at >= 0).sum())
    return {
        "uri": pool.uri,
        "cut_from_it": recipe is not None and recipe["inputs"]["pool"]["digest"] == pool.digest,
        "uids_found": int(seen.sum()),
        "uids_missing": int((~seen).sum()),
        "coverage": float(seen.mean()) if len(seen) else 1.0,
        "rows_found": rows,
        "rows": pool.num_rows,
    }


# --- shared ----------------------------------------------------------------------------------------------


def _write(
    out: str,
    kind: str,
    pool: EmbeddingSet,
    by_part: dict[int, np.ndarray],
    uids: np.ndarray,
    masks: Masks,
    inputs: dict[str, Any],
    more: dict[str, Any],
) -> dict[str, Any]:
    """Write the three files of a split and return its recipe."""
    num_uids = len(subsets.sorted_unique(np.concatenate(list(by_part.values()))))
    recipe = {
        "name": out.rsplit("/", 1)[-1].removesuffix(".npy"),
        "kind": kind,
        "tests": [],
        **more,
        "counts": {"pool": num_uids, "kept": len(uids), "removed": num_uids - len(uids)},
        "rows": {"pool": pool.num_rows, "kept": int(sum(mask.sum() for mask in masks.values()))},
        "inputs": {**inputs, "pool": {"uri": pool.uri, "digest": pool.digest, "rows": pool.num_rows}},
        "encoder": pool.encoder,
        "version": __version__,
    }
    store.write_bytes(bitmap_path(out), bitmap_bytes(masks))
    store.write_bytes(out, store.array_bytes(np.asarray(uids)))
    store.write_json(_recipe_path(out), recipe)
    return recipe


def _recipe_path(split: str) -> str:
    return split.removesuffix(".npy") + ".recipe.json"


def _recipe_of(split: str) -> dict[str, Any]:
    if not store.exists(_recipe_path(split)):
        raise DataError(
            f"{split} has no recipe beside it ({_recipe_path(split)}): which pool it belongs to is not known",
            hint=f"bring it in first: clipgap split join {split} --pool EMB --out NAME.npy",
        )
    recipe: dict[str, Any] = store.read_json(_recipe_path(split))
    return recipe


def _column(pool: EmbeddingSet, part: int, name: str) -> list[str]:
    values: list[str] = pool.metadata(part, [name]).column(name).to_pylist()
    return values


def _pool_uids(pool: EmbeddingSet) -> dict[int, np.ndarray]:
    """Return {part: (rows,) `UID`}: 16 bytes per row of the pool."""
    return {part.number: schema.pack_uids(_column(pool, part.number, "uid")) for part in pool.parts}


def _scored_rows(uri: str, manifest: dict[str, Any], pool: EmbeddingSet) -> Masks:
    """Return which rows of a pool a score run scored: those of any one test set's tables."""
    folder = store.join(uri, "pool", sorted(manifest["tests"])[0])
    masks = {part.number: np.zeros(part.num_rows, bool) for part in pool.parts}
    for name in store.list_names(folder):
        if name.endswith(".parquet"):
            row_ids = store.read_table(store.join(folder, name), ["row_id"]).column("row_id").to_numpy()
            parts, inside = schema.split_row_ids(row_ids)
            for part in np.unique(parts).tolist():
                masks[part][inside[parts == part]] = True
    return masks
