"""Which pool row copies what, and which row carries a fault.

A pool row must be computable alone, yet a source row has to know that it was copied. So roles are not drawn row by
row: one permutation of the pool, a pure function of the spec (8 bytes per row, made once per process), deals every
row a rank, and ranks have roles:

    [0, leaks)                   a copy of a test image
    [leaks, +copies)             a duplicate of a pool row, exact ones first
    [.., +sources)               the rows that are copied: two copies and one copy by turns
    [.., rows)                   plain rows; faults are dealt from the end of these

So counts are exact rather than expected, no copy is copied again, copies lie in other shards than their sources as
often as chance has it, and no fault spoils a planted duplicate.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from clipgap_ray.errors import ConfigError
from clipgap_ray.world.pictures import NEAR_KINDS
from clipgap_ray.world.spec import WorldSpec, evaluation_sets
from clipgap_ray.world.streams import PLAN, stream

EXACT, SOURCE = "exact", "source"

#: Faults of single samples, one of each per FAULT_EVERY rows. What a reader should make of them:
#: broken and truncated images cannot be decoded; odd_suffix is a good ".JPEG"; missing_caption has no txt and a null
#: caption in its json; repeated_key has the key of the sample two before it, doubled_key of the one before it, both
#: with a uid of their own; repeated_uid has the uid of an earlier row. png and webp are no faults.
SAMPLE_FAULTS = (
    "broken_image", "truncated_image", "odd_suffix", "missing_caption", "repeated_key", "doubled_key", "repeated_uid",
    "png", "webp",
)  # fmt: skip
GOOD_SUFFIXES = ("png", "webp")
#: Faults of shards: the last one is cut inside an image, and one more has no members.
TRUNCATED_SHARD, EMPTY_SHARD = "truncated_shard", "empty_shard"
#: Samples with these faults have no readable image.
UNREADABLE = ("broken_image", "truncated_image", TRUNCATED_SHARD)
FAULT_EVERY = 5_000
#: A fault leaves the first samples of a shard alone and keeps this distance from the next fault.
FAULT_SPACING = 3


class Role(NamedTuple):
    """Where a pool row's picture comes from.

    Attributes:
        set_name: "pool" or the test set that the picture is drawn from.
        row: Row in that set.
        variant: "" (its own picture), "exact", or one of NEAR_KINDS.
        group: Duplicate group, which is the source's row; -1 for none.
        is_source: Other rows copy this one.
    """

    set_name: str
    row: int
    variant: str = ""
    group: int = -1
    is_source: bool = False


class _Deal(NamedTuple):
    """Ranks of the pool's rows, and where the roles begin and end among them."""

    row_at: np.ndarray  # (rows,) int64, rank -> row
    rank_of: np.ndarray  # (rows,) int64, row -> rank
    leaks_per_set: int
    leaks: int
    copies: int
    exact: int
    sources: int

    @property
    def num_planned(self) -> int:
        return self.leaks + self.copies + self.sources


@lru_cache(maxsize=4)
def _deal(spec: WorldSpec) -> _Deal:
    row_at = stream(spec.seed, "pool", 0, PLAN).permutation(spec.rows)
    rank_of = np.empty_like(row_at)
    rank_of[row_at] = np.arange(spec.rows)
    leaks_per_set = _count(spec.leak_rate, spec.test_rows)
    exact, near = _count(spec.exact_rate, spec.rows), _count(spec.near_rate, spec.rows)
    copies = exact + near
    sources = _source_index(copies - 1) + 1 if copies else 0
    deal = _Deal(row_at, rank_of, leaks_per_set, leaks_per_set * len(evaluation_sets(spec)), copies, exact, sources)
    if deal.num_planned > spec.rows:
        raise ConfigError(
            f"{deal.leaks} leaks, {copies} duplicates and {sources} sources do not fit into rows={spec.rows}",
            hint="raise rows, or lower leak_rate, exact_rate or near_rate",
        )
    return deal


def _count(rate: float, rows: int) -> int:
    """Rows at a rate: rounded, but at least one for a rate above zero."""
    return max(1, round(rate * rows)) if rate else 0


def _source_index(copy: int) -> int:
    """Copies 0, 1 | 2 | 3, 4 | 5 | ... share a source."""
    return copy * 2 // 3


def role_of(spec: WorldSpec, row: int) -> Role:
    """Where the picture of a pool row comes from.

    Args:
        spec: The world.
        row: Pool row, 0 <= row < spec.rows.

    Raises:
        ConfigError: If the planned rows do not fit into the pool.
    """
    deal = _deal(spec)
    rank = int(deal.rank_of[row])
    if rank < deal.leaks:
        set_index, index = divmod(rank, deal.leaks_per_set)
        name = evaluation_sets(spec)[set_index]
        # Every third leak is a near copy; the kinds of near copies take turns.
        variant = NEAR_KINDS[index // 3 % len(NEAR_KINDS)] if index % 3 == 2 else EXACT
        return Role(name, int(_leaked_rows(spec, name)[index]), variant)
    rank -= deal.leaks
    if rank < deal.copies:
        source = int(deal.row_at[deal.leaks + deal.copies + _source_index(rank)])
        variant = EXACT if rank < deal.exact else NEAR_KINDS[rank % len(NEAR_KINDS)]
        return Role("pool", source, variant, group=source)
    if rank - deal.copies < deal.sources:
        return Role("pool", row, group=row, is_source=True)
    return Role("pool", row)


@lru_cache(maxsize=16)
def _leaked_rows(spec: WorldSpec, set_name: str) -> np.ndarray:
    """(leaks per set,) int64 rows of a test set that are also in the pool."""
    order: np.ndarray = stream(spec.seed, set_name, 0, PLAN).permutation(spec.test_rows)
    return order[: _deal(spec).leaks_per_set]


@lru_cache(maxsize=4)
def sample_faults(spec: WorldSpec) -> dict[int, str]:
    """Pool row -> one of SAMPLE_FAULTS, for a world with faults; else empty.

    Raises:
        ConfigError: If the pool is too small to hold every fault.
    """
    if not spec.faults:
        return {}
    wanted = SAMPLE_FAULTS * max(1, spec.rows // FAULT_EVERY)
    deal, last_shard = _deal(spec), (spec.rows - 1) // spec.samples_per_shard
    faults: dict[int, str] = {}
    for row in deal.row_at[deal.num_planned :][::-1].tolist():
        shard, place = divmod(row, spec.samples_per_shard)
        crowded = any(abs(row - other) < FAULT_SPACING for other in faults)
        if shard != last_shard and place >= FAULT_SPACING and not crowded:
            faults[row] = wanted[len(faults)]
            if len(faults) == len(wanted):
                return faults
    raise ConfigError(
        f"a pool of {spec.rows} rows in shards of {spec.samples_per_shard} has room for {len(faults)} of "
        f"{len(wanted)} faults",
        hint="raise rows or lower samples_per_shard; the last shard is truncated and holds no other fault",
    )


def first_lost(spec: WorldSpec) -> int:
    """The first pool row that the cut in the last shard makes unreadable; spec.rows in a world without faults."""
    if not spec.faults:
        return spec.rows
    start = (spec.rows - 1) // spec.samples_per_shard * spec.samples_per_shard
    return (start + spec.rows) // 2
