"""Splits: filters over the score tables, decided exactly.

Stored scores are float32 and within a known bound of the truth. A cut therefore re-scores, in float64 and from the
embeddings that the score manifest names, the rows within the bound of its own edge, and prints how many; so a split
does not depend on how the scores were computed (design contract 3).

Writes: NAME.npy (sorted uids), NAME.rows.npz (bitmap), NAME.recipe.json (provenance, counts). Unit of restart: the
split; writing one takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from clipgap_ray import __version__, rundir, schema, store
from clipgap_ray.config.split import (
    AnySplit,
    Core,
    DensityMatch,
    Equalise,
    Far,
    GapMatch,
    Near,
    Random,
    Score,
    Threshold,
)
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels import splits
from clipgap_ray.kernels.vectors import error_bound, exact_matrix
from clipgap_ray.stages import core_set, equalise, same_classes
from clipgap_ray.stages.columns import read_column
from clipgap_ray.stages.density import edges_outside_the_hull
from clipgap_ray.stages.keep import bitmap_bytes, bitmap_path

RESCORE_BLOCK = 4096


@dataclass
class Table:
    """The score tables of a run, by unique uid. `rescored` collects the uids whose value was taken exactly."""

    scores: str
    manifest: dict[str, Any]
    row_ids: np.ndarray  # (n,) int64
    uids: np.ndarray  # (u,) schema.UID, sorted
    position: np.ndarray  # (n,) row -> uid
    bound: float
    rescored: set[int] = field(default_factory=set)
    cut_similarity: float | None = None  # near, far, core: m of the last row kept
    notes: dict[str, Any] = field(default_factory=dict)  # what a kind has to say in the recipe

    @property
    def num_uids(self) -> int:
        """Unique uids u."""
        return len(self.uids)

    def column(self, test: str, name: str) -> np.ndarray:
        """Return the (u,) float64 maximum over copies of a column ("m" or "margin") of a test set."""
        values = [store.read_table(path, [name]).column(name).to_numpy() for path in _part_paths(self.scores, test)]
        return splits.max_per_uid(np.concatenate(values), self.position, self.num_uids)

    def exact(self, wanted: np.ndarray, tests: tuple[str, ...], *, margin: bool) -> np.ndarray:
        """Return the exact largest similarity (or margin) of some uids over all rows of some test sets.

        Args:
            wanted: (b,) int64 uid positions.
            tests: Test sets.
            margin: Subtract each test row's tau.

        Returns:
            (b,) float64.
        """
        self.rescored.update(wanted.tolist())
        result = np.full(self.num_uids, -np.inf)
        if not len(wanted):
            return result[wanted]
        pool = EmbeddingSet.open(self.manifest["pool"]["uri"])
        queries = np.concatenate([EmbeddingSet.open(self.manifest["tests"][t]["uri"]).all_images() for t in tests])
        tau = np.concatenate([read_tau(self.scores, test) for test in tests]) if margin else np.zeros(len(queries))
        is_wanted = np.zeros(self.num_uids, bool)
        is_wanted[wanted] = True
        rows = np.nonzero(is_wanted[self.position])[0]
        parts, inside = schema.split_row_ids(self.row_ids[rows])
        for part in np.unique(parts).tolist():
            here = parts == part
            vectors = np.asarray(pool.images(part))[inside[here]]
            for start in range(0, len(vectors), RESCORE_BLOCK):
                block = slice(start, start + RESCORE_BLOCK)
                best = (exact_matrix(vectors[block], queries) - tau).max(axis=1)
                np.maximum.at(result, self.position[rows[here][block]], best)
        return result[wanted]


def _part_paths(scores: str, test: str) -> list[str]:
    folder = store.join(scores, "pool", test)
    return [store.join(folder, name) for name in store.list_names(folder) if name.endswith(".parquet")]


def read_tau(scores: str, test: str) -> np.ndarray:
    """Return the (q,) float64 thresholds of a test set; NaN where there are none."""
    path = store.join(scores, "queries", f"{test}.parquet")
    return store.read_table(path, ["tau"]).column("tau").to_numpy()


def open_table(scores: str, tests: tuple[str, ...]) -> Table:
    """Open score tables and check that the test sets are scored.

    Raises:
        DataError: If `scores` is no complete output of `score`.
        ConfigError: If a test set is not in it.
    """
    manifest = rundir.read_manifest(scores, "score")
    unknown = [test for test in tests if test not in manifest["tests"]]
    if unknown:
        raise ConfigError(
            f"{scores} has no scores for {unknown}; it has {sorted(manifest['tests'])}",
            hint="add them with `clipgap score --add --test NAME=EMB`",
        )
    any_test = tests[0] if tests else sorted(manifest["tests"])[0]
    tables = [store.read_table(path, ["row_id", "uid"]) for path in _part_paths(scores, any_test)]
    rows = pa.concat_tables(tables)
    if not rows.num_rows:
        raise ConfigError(f"{scores} scores no pool row: there is nothing to split")
    uids, position = splits.unique_uids(schema.pack_uids(rows.column("uid")))
    bound = manifest.get("bound") or error_bound(int(manifest["encoder"]["dim"]))
    return Table(scores, manifest, rows.column("row_id").to_numpy(), uids, position, bound)


def run(settings: AnySplit) -> dict[str, Any]:
    """Cut a split and write it.

    Returns:
        The recipe: kind, settings, inputs by digest, counts, number of rows re-scored.
    """
    table = open_table(settings.scores, getattr(settings, "test", ()))
    keep = select(settings, table)
    recipe = _recipe(settings, table, keep)
    rows = keep[table.position]
    store.write_bytes(bitmap_path(settings.out), bitmap_bytes(_by_part(table, rows)))
    store.write_bytes(settings.out, store.array_bytes(table.uids[keep]))
    store.write_json(settings.out.removesuffix(".npy") + ".recipe.json", recipe)
    return recipe


def select(settings: AnySplit, table: Table) -> np.ndarray:
    """Return the (u,) keep mask of a split over the table's unique uids."""
    if isinstance(settings, GapMatch):
        return _gap_match(settings, table)
    if isinstance(settings, Near | Far | Core):
        return _ranked(settings, table)
    if isinstance(settings, Random):
        if settings.same_classes:
            return same_classes.select(settings, table)
        size = _size_of(settings, table)
        return splits.keep_random(table.num_uids, size, np.random.default_rng(settings.seed))
    if isinstance(settings, Threshold):
        m = np.max([table.column(test, "m") for test in settings.test], axis=0)
        band = np.nonzero(np.abs(m - settings.max_similarity) <= table.bound)[0]
        m[band] = table.exact(band, settings.test, margin=False)
        return m < settings.max_similarity
    if isinstance(settings, Score):
        return _by_column(settings, table)
    if isinstance(settings, DensityMatch):
        return _density_match(settings, table)
    if isinstance(settings, Equalise):
        return equalise.select(settings, table)
    return np.ones(table.num_uids, bool)


# DataComp's rules of `basic` as (column, least, most); its language rule needs a model and is left out.
BASIC = (("caption_words", 3, np.inf), ("caption_chars", 6, np.inf), ("min_side", 201, np.inf),
         ("aspect_ratio", 0, np.nextafter(3.0, 0)))  # fmt: skip


def _by_column(settings: Score, table: Table) -> np.ndarray:
    """Copies of a uid stand by their best value where the best are kept, and fall together where rules decide."""
    pool = EmbeddingSet.open(table.manifest["pool"]["uri"])

    def per_uid(column: str) -> np.ndarray:
        values = read_column(pool, column, table.row_ids)
        # NaN (no caption, no score) fails every rule: below any number.
        return splits.max_per_uid(np.where(np.isnan(values), -np.inf, values), table.position, table.num_uids)

    if settings.preset == "basic":
        checks = [(per_uid(column), least, most) for column, least, most in BASIC]
        return np.logical_and.reduce([(values >= least) & (values <= most) for values, least, most in checks])
    values = per_uid(settings.column or "clip_score")
    if settings.min is not None or settings.max is not None:
        least = -np.finfo(np.float64).max if settings.min is None else settings.min
        return (values >= least) & (values <= (np.inf if settings.max is None else settings.max))
    return splits.keep_most(values, splits.parse_size(settings.size or "0.3", table.num_uids))


def _density_match(settings: DensityMatch, table: Table) -> np.ndarray:
    items, queries, similarity, reference = edges_outside_the_hull(table, settings.test, settings.neighbours)
    order = np.random.default_rng(settings.seed).permutation(table.num_uids)
    return splits.density_match(order, items, queries, similarity, reference)


def _gap_match(settings: GapMatch, table: Table) -> np.ndarray:
    without = [test for test in settings.test if np.isnan(read_tau(table.scores, test)).any()]
    if without or not settings.test:
        raise ConfigError(
            f"gap-match needs thresholds for {without or 'at least one --test'}",
            hint="score with --reference EMB or --thresholds NAME=FILE",
        )
    margin = np.max([table.column(test, "margin") for test in settings.test], axis=0)
    band = np.nonzero(np.abs(margin - settings.slack) <= 2 * table.bound)[0]
    margin[band] = table.exact(band, settings.test, margin=True)
    return margin <= settings.slack


def _ranked(settings: Near | Far | Core, table: Table) -> np.ndarray:
    size = splits.parse_size(settings.size, table.num_uids)
    if isinstance(settings, Core) and settings.policy != "max":
        policy = core_set.by_rank if settings.policy == "rank" else core_set.by_zscore
        return policy(table, settings.test, size)
    if isinstance(settings, Core) and settings.cap:
        return core_set.by_similarity_capped(settings, table, size)
    values = np.max([table.column(test, "m") for test in settings.test], axis=0)
    least = size if isinstance(settings, Near) else table.num_uids - size
    band = splits.boundary(values, least, table.bound)
    values[band] = table.exact(band, settings.test, margin=False)
    keep = splits.keep_least(values, size) if isinstance(settings, Near) else splits.keep_most(values, size)
    if keep.any():
        table.cut_similarity = float(values[keep].max() if isinstance(settings, Near) else values[keep].min())
    return keep


def _size_of(settings: Random, table: Table) -> int:
    if not settings.match:
        return splits.parse_size(settings.size, table.num_uids)
    return min(len(store.read_array(settings.match)), table.num_uids)


def _by_part(table: Table, rows: np.ndarray) -> dict[int, np.ndarray]:
    pool = EmbeddingSet.open(table.manifest["pool"]["uri"])
    parts, inside = schema.split_row_ids(table.row_ids[rows])
    masks = {part.number: np.zeros(part.num_rows, bool) for part in pool.parts}
    for part, mask in masks.items():
        mask[inside[parts == part]] = True
    return masks


def _recipe(settings: AnySplit, table: Table, keep: np.ndarray) -> dict[str, Any]:
    name = settings.out.rsplit("/", 1)[-1].removesuffix(".npy")
    chosen = settings.model_dump(mode="json", exclude={"scores", "out"})
    kept = int(keep.sum())
    return {
        "name": name,
        "kind": settings.kind,
        "tests": list(getattr(settings, "test", ())),
        **{key: value for key, value in chosen.items() if key not in ("kind", "test")},
        "counts": {"pool": table.num_uids, "kept": kept, "removed": table.num_uids - kept},
        "rows": {"scored": len(table.row_ids), "kept": int(keep[table.position].sum())},
        "rescored": len(table.rescored),
        "cut_similarity": table.cut_similarity,
        **table.notes,
        "inputs": {
            "scores": {"uri": settings.scores, "digest": table.manifest["digest"]},
            "pool": table.manifest["pool"],
            "tests": {test: table.manifest["tests"][test]["digest"] for test in getattr(settings, "test", ())},
        },
        "encoder": table.manifest["encoder"],
        "version": __version__,
    }
