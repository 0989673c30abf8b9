"""What two score runs remove by the same cuts, decided exactly as `split` decides, without a mask over the pool.

Stored scores are within a bound of the truth. A cut therefore has a band: values between its ends, which hold every row
that could fall on either side. Rows outside are counted bucket by bucket; rows in the band (in either run) come to the
driver, are scored again in float64 from the embeddings, and decided there: by the threshold, or by rank, ties by uid. A
band holds the rows within a few 10^-5 of the cut, and those of one cell of `kernels.ranks`: about a thousandth of a
pool, and all rows that tie with the cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from clipgap_ray import schema
from clipgap_ray.kernels import agreement, ranks, splits, subsets
from clipgap_ray.stages.score_pairs import CHUNKS, Bucket, Pairs, ScoreRun
from clipgap_ray.stages.split import Table
from clipgap_ray.stages.waits import each_part

LOW, BAND, HIGH = 0, 1, 2


@dataclass(frozen=True)
class Cut:
    """A cut of both runs by one column: the low side and the high side of it.

    Attributes:
        name: As it is reported.
        column: m or margin.
        ends: Lowest and highest value of the band, by run.
        least: Uids on the low side, by run; None: those with an exact value of 0 or less.
        removes_low: Whether the low side goes (far-pruning) or the high one.
    """

    name: str
    column: str
    ends: tuple[tuple[float, float], tuple[float, float]]
    least: tuple[int, int] | None
    removes_low: bool


@dataclass(frozen=True)
class Band:
    """Rows of uids in the band of a cut, in one run: (r,) `schema.UID` and (r,) int64 row ids."""

    uids: np.ndarray
    row_ids: np.ndarray


@dataclass(frozen=True)
class Counted:
    """A cut over some buckets.

    Attributes:
        lows: Uids surely on the low side, by run.
        both: (3, 3) int64 common uids by their place in the first and in the second run (LOW, BAND, HIGH).
        bands: By run.
        pairs: (p,) common uids with a place of BAND in either run,
        places: and (p, 2) their places.
    """

    lows: tuple[int, int]
    both: np.ndarray
    bands: tuple[Band, Band]
    pairs: np.ndarray
    places: np.ndarray


def gap_match(bounds: tuple[float, float]) -> Cut:
    """Return the cut by margin at slack 0; the margins of stored scores are within twice the bound."""
    first, second = ((-2 * bound, 2 * bound) for bound in bounds)
    return Cut("gap-match", "margin", (first, second), None, removes_low=False)


def by_rank(
    name: str,
    least: tuple[int, int],
    counts: tuple[np.ndarray, np.ndarray],
    edges: tuple[np.ndarray, np.ndarray],
    bounds: tuple[float, float],
    *,
    removes_low: bool,
) -> Cut:
    """Return the cut of the `least` uids with the lowest m from the others.

    Args:
        name: As it is reported.
        least: By run; 0 and all are cuts beyond every value.
        counts: `ranks.count` of m over all uids, by run.
        edges: Their grids.
        bounds: Of the stored scores, by run.
        removes_low: Whether the low side goes.
    """
    ends = []
    for own_least, own, grid, bound in zip(least, counts, edges, bounds, strict=True):
        if own_least in (0, int(own.sum())):
            ends.append((-np.inf, -np.inf) if own_least == 0 else (np.inf, np.inf))
        else:
            low, high = ranks.ends_of_rank(own, grid, own_least)
            ends.append((low - 2 * bound, high + 2 * bound))
    return Cut(name, "m", (ends[0], ends[1]), least, removes_low)


# --- in the tasks ----------------------------------------------------------------------------------------


def count(pairs: Pairs, bucket: Bucket, cuts: list[Cut]) -> list[Counted]:
    """Return every cut over one bucket, which must have its uids."""
    assert bucket.uids is not None
    rows = [pairs.rows(side, bucket.number) for side in (0, 1)]
    found = []
    for cut in cuts:
        own = [_places(values[cut.column], ends) for values, ends in zip(bucket.values, cut.ends, strict=True)]
        first, second = (places[at] for places, at in zip(own, bucket.common, strict=True))
        doubtful = np.nonzero((first == BAND) | (second == BAND))[0]
        bands = [_band(bucket.uids[side], own[side] == BAND, *rows[side]) for side in (0, 1)]
        found.append(
            Counted(
                (int((own[0] == LOW).sum()), int((own[1] == LOW).sum())),
                np.bincount(3 * first + second, minlength=9).reshape(3, 3),
                (bands[0], bands[1]),
                bucket.uids[0][bucket.common[0][doubtful]],
                np.stack([first[doubtful], second[doubtful]], axis=1),
            )
        )
    return found


def _places(values: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    low, high = ends
    return np.where(values < low, LOW, np.where(values > high, HIGH, BAND))


def _band(uids: np.ndarray, inside: np.ndarray, row_ids: np.ndarray, at: np.ndarray) -> Band:
    chosen = np.nonzero(inside[at])[0]
    return Band(uids[at[chosen]], row_ids[chosen])


def merge(found: Iterable[Counted]) -> Counted:
    """Add up one cut over disjoint sets of buckets, at least one."""
    parts = list(found)
    bands = [
        Band(*(np.concatenate([getattr(part.bands[side], name) for part in parts]) for name in ("uids", "row_ids")))
        for side in (0, 1)
    ]
    return Counted(
        (sum(part.lows[0] for part in parts), sum(part.lows[1] for part in parts)),
        np.sum([part.both for part in parts], axis=0),
        (bands[0], bands[1]),
        np.concatenate([part.pairs for part in parts]),
        np.concatenate([part.places for part in parts]),
    )


# --- in the driver ---------------------------------------------------------------------------------------


def removed(pairs: Pairs, test: str, cut: Cut, counted: Counted) -> dict[str, int]:
    """Decide the band of a cut and return how many common uids the first, the second and both runs remove."""
    both, places = counted.both.copy(), counted.places.copy()
    for side in (0, 1):
        band = counted.bands[side]
        uids, at = splits.unique_uids(band.uids)
        exact = _exact(pairs.runs[side], test, cut.column == "margin", band.row_ids, at, len(uids))
        if cut.least is None:
            low = exact <= 0
        else:
            low = splits.keep_least(exact, min(max(cut.least[side] - counted.lows[side], 0), len(uids)))
        doubtful = np.nonzero(places[:, side] == BAND)[0]
        hit = subsets.find(uids, counted.pairs[doubtful])
        places[doubtful, side] = np.where(low[hit], LOW, HIGH)
    both[BAND, :] = both[:, BAND] = 0
    np.add.at(both, (places[:, 0], places[:, 1]), 1)
    gone = LOW if cut.removes_low else HIGH
    return {
        "removed_first": int(both[gone].sum()),
        "removed_second": int(both[:, gone].sum()),
        "removed_both": int(both[gone, gone]),
    }


def _exact(run: ScoreRun, test: str, margin: bool, row_ids: np.ndarray, at: np.ndarray, count: int) -> np.ndarray:
    """(count,) float64 exact largest m (or margin) of uids over their rows; `at` says whose row each is."""
    result = np.full(count, -np.inf)
    if not len(row_ids):
        return result
    order = np.argsort(row_ids, kind="stable")
    parts, _ = schema.split_row_ids(row_ids[order])
    starts = np.nonzero(np.diff(parts, prepend=-1))[0]
    chunks = np.array_split(starts, min(len(starts), CHUNKS))  # whole parts of the pool
    ends = [*(int(chunk[0]) for chunk in chunks[1:]), len(order)]
    items = [order[int(chunk[0]) : end] for chunk, end in zip(chunks, ends, strict=True)]
    work = partial(_score_again, run, test, margin)
    for ids, values in each_part(work, [row_ids[item] for item in items], run.num_rows):
        # Rows come back by their id: copies of a uid may lie in several chunks.
        np.maximum.at(result, at[order[np.searchsorted(row_ids[order], ids)]], values)
    return result


def _score_again(run: ScoreRun, test: str, margin: bool, row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact m or margin of (r,) rows, each for itself."""
    everyone = np.arange(len(row_ids))
    table = Table(run.uri, run.manifest, row_ids, everyone, everyone, run.bound)
    return row_ids, table.exact(everyone, (test,), margin=margin)


def record(cut: Cut, counts: dict[str, int], num_common: int) -> dict[str, object]:
    """Return the record of a cut: what is removed, Jaccard, and what two random sets of these sizes would have."""
    first, second, both = (counts[f"removed_{name}"] for name in ("first", "second", "both"))
    return {
        "cut": cut.name,
        **counts,
        "jaccard": agreement.jaccard(first, second, both),
        "chance": agreement.chance_jaccard(num_common, first, second),
    }
