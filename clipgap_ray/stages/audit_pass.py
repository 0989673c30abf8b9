"""One pass over a pool for an audit: per test image its nearest row, equal bytes, nearest perceptual hash, captions.

A task takes a group of neighbouring parts and looks at one part after the other; what it finds is per test image, so
merging two findings gives one of the same size, in any order, and the result is the same to the last bit however the
pool is grouped: similarities are exact, ties go to the lower row id. Small pools are looked at in this process, larger
ones by Ray tasks.

Memory: a task holds one part (its rows, or one column of its metadata) and what is sought; the driver what is sought
and one finding: 32 bytes per test image, and the captions of the pool that equal a test set's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipgap_ray import schema
from clipgap_ray.embeddings import EmbeddingSet, Part
from clipgap_ray.kernels import phash
from clipgap_ray.kernels.concepts import words
from clipgap_ray.kernels.nearest_exact import merge_exact, nearest
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.waits import each_part

GROUP_BYTES = 1 << 27  # of image rows: seconds of work against ten thousand test images


@dataclass(frozen=True)
class Sought:
    """What a pass looks for, over the q images of all test sets.

    Attributes:
        rows: (q, d) float16.
        digests: sha256 of images to look for; None: nobody asks.
        hashes: (q,) int64 perceptual hashes and those of the mirror images; None: nobody asks.
        captions: Captions to look for.
    """

    rows: np.ndarray
    digests: frozenset[str] | None = None
    hashes: tuple[np.ndarray, np.ndarray] | None = None
    captions: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Found:
    """What some parts of a pool hold of it.

    Attributes:
        similarity: (q,) float64, exact, to the nearest row; -inf without rows.
        nearest: (q,) int64 its row id, -1 without.
        digests: Those of `Sought.digests` that occur.
        bits: (q,) int64 bits in which the nearest perceptual hash differs, 64 without any.
        hash_nearest: (q,) int64 its row id, -1 without.
        captions: Captions that equal a sought one, letter by letter or normalised.
        unknown_bytes: Rows without sha256; 0 if nobody asks.
        unknown_hashes: Rows without perceptual hash; 0 if nobody asks.
    """

    similarity: np.ndarray
    nearest: np.ndarray
    digests: frozenset[str]
    bits: np.ndarray
    hash_nearest: np.ndarray
    captions: frozenset[str]
    unknown_bytes: int
    unknown_hashes: int


def look(pool: EmbeddingSet, sought: Sought, name: str) -> Found:
    """Look through all parts of a pool.

    Args:
        pool: The pool, or a reference.
        sought: What to look for.
        name: Of the progress line.
    """
    groups = list(pool.groups(GROUP_BYTES))
    progress = Progress(name, len(groups), "groups of parts")
    total: Found | None = None
    for found, rows in each_part(partial(_group, pool, sought), groups, pool.num_rows):
        total = found if total is None else merge(total, found)
        progress.advance(rows=rows)
    progress.close()
    assert total is not None  # an EmbeddingSet has at least one part
    return total


def merge(first: Found, second: Found) -> Found:
    """Put together what two disjoint sets of rows hold."""
    pairs = [(found.similarity[:, None], found.nearest[:, None]) for found in (first, second)]
    similarity, rows = merge_exact(pairs, 1)
    bits, hash_rows = phash.nearer((first.bits, first.hash_nearest), (second.bits, second.hash_nearest))
    return Found(
        similarity[:, 0],
        rows[:, 0],
        first.digests | second.digests,
        bits,
        hash_rows,
        first.captions | second.captions,
        first.unknown_bytes + second.unknown_bytes,
        first.unknown_hashes + second.unknown_hashes,
    )


def _group(pool: EmbeddingSet, sought: Sought, group: list[Part]) -> tuple[Found, int]:
    """What a group of parts holds, and its number of rows."""
    similarity, rows = nearest(sought.rows, _blocks(pool, group), 1)
    digests, unknown_bytes = _digests(pool, group, sought.digests)
    bits, hash_rows, unknown_hashes = _hashes(pool, group, sought)
    captions = _captions(pool, group, sought.captions)
    found = Found(similarity[:, 0], rows[:, 0], digests, bits, hash_rows, captions, unknown_bytes, unknown_hashes)
    return found, sum(part.num_rows for part in group)


def _blocks(pool: EmbeddingSet, group: Iterable[Part]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for part in group:
        if part.num_rows:
            yield np.asarray(pool.images(part.number)), schema.row_ids(part.number, part.num_rows)


def _digests(pool: EmbeddingSet, group: Iterable[Part], wanted: frozenset[str] | None) -> tuple[frozenset[str], int]:
    """The sought image hashes that occur, and how many rows have none."""
    if wanted is None:
        return frozenset(), 0
    values = pa.array(sorted(wanted), pa.string())
    seen: set[str] = set()
    unknown = 0
    for part in group:
        table = pool.metadata(part.number, ["sha256"])
        unknown += num_unknown(table, "sha256")
        seen.update(table["sha256"].filter(pc.is_in(table["sha256"], values)).to_pylist())
    return frozenset(seen), unknown


def _hashes(pool: EmbeddingSet, group: Iterable[Part], sought: Sought) -> tuple[np.ndarray, np.ndarray, int]:
    """(q,) bits to the nearest hash, its row ids, and rows without hash."""
    unknown = 0

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal unknown
        for part in group:
            table = pool.metadata(part.number, ["row_id", "phash"])
            unknown += num_unknown(table, "phash")
            yield integers(table, "phash"), table["row_id"].to_numpy()

    if sought.hashes is None:
        count = len(sought.rows)
        return np.full(count, 64, np.int64), np.full(count, -1, np.int64), 0
    bits, rows = phash.nearest_hashes(*sought.hashes, blocks())
    return bits, rows, unknown


def _captions(pool: EmbeddingSet, group: Iterable[Part], wanted: frozenset[str]) -> frozenset[str]:
    if not wanted:
        return frozenset()
    plain = {normalised(line) for line in wanted}
    seen: set[str] = set()
    for part in group:
        for line in pool.metadata(part.number, ["caption"]).column("caption").to_pylist():
            if line and (line in wanted or normalised(line) in plain):
                seen.add(line)
    return frozenset(seen)


def num_unknown(table: pa.Table, name: str) -> int:
    """Count rows that lack a value of "sha256" or "phash"; imported embeddings have the sha256 ""."""
    if name not in table.column_names:
        return int(table.num_rows)
    column = table[name]
    return int(column.null_count + (pc.sum(pc.equal(column, "")).as_py() or 0 if name == "sha256" else 0))


def integers(table: pa.Table, name: str) -> np.ndarray:
    """Return a column as (n,) int64; 0, which as a hash tells nothing, where a value is not known."""
    if name not in table.column_names:
        return np.zeros(table.num_rows, np.int64)
    return np.array(table[name].fill_null(0).to_numpy(), np.int64)


def normalised(caption: str) -> str:
    """Put case, punctuation and spacing aside."""
    return " ".join(words(caption))
