"""`split equalise`: the pool that two groups of a test set see alike, class by class (`kernels/equalise.py`).

The nearest scored rows of every photo come from the query tables, the rows that have to go from passes over the pool
that return edges above a floor per photo. A photo whose edges do not reach low enough gets a lower floor, and another
pass for such photos only; no round acts on half knowledge, so the cut does not depend on the floors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from clipgap_ray import store
from clipgap_ray.config.split import Equalise
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels import equalise
from clipgap_ray.stages.density import edges_above

if TYPE_CHECKING:
    from clipgap_ray.stages.split import Table

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]  # uids, photos, exact similarities

REACH = 0.02  # how far below a photo's first ceiling the first pass looks; doubled for photos that need more


def select(settings: Equalise, table: Table) -> np.ndarray:
    """Return the (u,) keep mask over the table's uids, and note in the recipe what was reached.

    Raises:
        ConfigError: If no class has photos in both groups, or the groups cannot be brought together.
    """
    queries, before, class_at, second = _photos(settings, table)
    compared = np.nonzero(class_at >= 0)[0]
    reach = np.full(len(before), REACH)
    floor = np.where(class_at >= 0, _lower(before, class_at, second, settings.slack) - reach, np.inf)
    hint = f"raise --slack ({settings.slack:g})"
    edges = _edges(table, queries, floor, compared, hint)
    keep, rounds, passes = np.ones(table.num_uids, bool), 0, 1
    while True:
        state = equalise.prune(keep, edges, floor, class_at, second, settings.slack)
        keep, rounds = state.keep, rounds + state.rounds
        if not len(state.starved):
            break
        if (floor[state.starved] < -1).any():  # every row is above -1
            raise ConfigError(
                f"no pool is left at slack {settings.slack:g}: the groups share their neighbours", hint=hint
            )
        reach[state.starved] *= 2
        floor[state.starved] -= reach[state.starved]
        edges = _replace(edges, _edges(table, queries, floor, state.starved, hint), state.starved)
        passes += 1
    after = np.where(class_at >= 0, state.similarity, before)
    table.notes["equalised"] = {
        "num_classes": len(np.unique(class_at[compared])),
        "num_images": len(compared),
        "rounds": rounds,
        "passes": passes,
        "before": _difference(before, class_at, second),
        "after": _difference(after, class_at, second),
    }
    return keep


def _photos(settings: Equalise, table: Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, similarity to the nearest scored pool row, class and group of all photos of the test sets."""
    rows, nearest, classes, groups = [], [], [], []
    for test in settings.test:
        embeddings = EmbeddingSet.open(table.manifest["tests"][test]["uri"])
        metadata = embeddings.all_metadata(["class_name", "group"])
        rows.append(embeddings.all_images())
        path = store.join(table.scores, "queries", f"{test}.parquet")
        nearest.append(store.read_table(path, ["similarity"]).column("similarity").to_numpy())
        classes += [f"{test}/{name}" for name in metadata.column("class_name").to_pylist()]
        groups += [group or "" for group in metadata.column("group").to_pylist()]
    class_at, second = equalise.constrained_classes(classes, groups, settings.groups)
    if not (class_at >= 0).any():
        found = ", ".join(sorted(set(groups))[:5]) or "none"
        raise ConfigError(
            f"no class of {list(settings.test)} has photos in both {settings.groups[0]!r} and {settings.groups[1]!r}; "
            f"groups are {found}",
            hint="name the groups with --groups FIRST SECOND",
        )
    return np.concatenate(rows), np.concatenate(nearest), class_at, second


def _lower(similarity: np.ndarray, class_at: np.ndarray, second: np.ndarray, slack: float) -> np.ndarray:
    return np.minimum(similarity, equalise.ceilings(similarity, class_at, second, slack))


def _replace(edges: Edges, more: Edges, photos: np.ndarray) -> Edges:
    """Take the edges of some photos from a later pass, which reached lower."""
    stays = ~np.isin(edges[1], photos)
    items, query, similarity = (np.concatenate([old[stays], new]) for old, new in zip(edges, more, strict=True))
    return items, query, similarity


def _edges(table: Table, queries: np.ndarray, floor: np.ndarray, photos: np.ndarray, hint: str) -> Edges:
    """Edges of some photos, in the numbering of all photos."""
    items, query, similarity = edges_above(table, queries[photos], floor[photos], hint)
    return items, photos[query], similarity


def _difference(similarity: np.ndarray, class_at: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Mean over classes of the groups' difference in mean similarity, and the largest at any quantile."""
    means = [
        [similarity[(class_at == c) & (second == bool(g))].mean() for g in (0, 1)]
        for c in np.unique(class_at[class_at >= 0])
    ]
    return {
        "difference": float(np.mean([first - other for first, other in means])),
        "largest_difference": equalise.largest_difference(similarity, class_at, second),
    }
