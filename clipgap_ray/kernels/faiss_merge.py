"""Several FAISS indexes that grew from one trained, empty index to a single one, its rows in any order.

Codes are moved as they are, so nothing is encoded again and nothing changes: a search of the merged index visits the
same cells and computes the same similarities as the searches of its parts. FAISS's own `merge_from` appends one index
to another; here rows get the positions that are asked for, since other tools know a row by its position alone.

Memory: the merged index and one block; the parts may be memory-mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np

from clipgap_ray.errors import ConfigError

_swig: Any = faiss  # what the package's type stubs do not know

BLOCK_BYTES = 1 << 26
LEFT_OUT = -1  # as a target


def merge(empty: faiss.Index, parts: Sequence[faiss.Index], targets: Sequence[np.ndarray]) -> faiss.Index:
    """Fill an empty index with the rows of others.

    Args:
        empty: Trained; the others began as copies of it. It is filled in place.
        parts: Indexes over positions 0 to n_i - 1.
        targets: (n_i,) int64 position of every row in the merged index, or LEFT_OUT; the others are 0 to n - 1, each
            once.

    Returns:
        The filled index.

    Raises:
        ConfigError: If indexes of this kind cannot be merged (graphs such as HNSW, and packed codes).
    """
    total = sum(int((target != LEFT_OUT).sum()) for target in targets)
    _fill(_swig.downcast_index(empty), [_swig.downcast_index(part) for part in parts], targets, total)
    return empty


def _fill(empty: Any, parts: list[Any], targets: Sequence[np.ndarray], total: int) -> None:
    if isinstance(empty, _swig.IndexPreTransform):
        _fill_inner("index", empty, parts, targets, total)
    elif isinstance(empty, _swig.IndexRefine):
        _fill_inner("base_index", empty, parts, targets, total)
        _fill_inner("refine_index", empty, parts, targets, total)
    elif isinstance(empty, _swig.IndexFlatCodes):
        _fill_codes(empty, parts, targets, total)
    elif isinstance(empty, _swig.IndexIVF) and empty.invlists.code_size < 1 << 32:  # packed codes say size -1
        for cell in range(empty.nlist):
            _fill_cell(empty, parts, targets, cell)
    else:
        raise ConfigError(
            f"indexes of kind {type(empty).__name__} cannot be merged into one",
            hint="use a key of Flat, SQ, PQ or IVF (not FastScan), or build one shard: --shards 1",
        )
    empty.ntotal = total


def _fill_inner(name: str, empty: Any, parts: list[Any], targets: Sequence[np.ndarray], total: int) -> None:
    inner = _swig.downcast_index(getattr(empty, name))
    _fill(inner, [_swig.downcast_index(getattr(part, name)) for part in parts], targets, total)


def _fill_codes(empty: Any, parts: list[Any], targets: Sequence[np.ndarray], total: int) -> None:
    size = empty.code_size
    codes = [_swig.rev_swig_ptr(part.codes.data(), part.ntotal * size).reshape(-1, size) for part in parts]
    part_of, position = np.zeros(total, np.int32), np.zeros(total, np.int64)
    for number, target in enumerate(targets):
        kept = np.flatnonzero(target != LEFT_OUT)
        part_of[target[kept]], position[target[kept]] = number, kept
    step = max(1, BLOCK_BYTES // size)
    for start in range(0, total, step):
        block = np.empty((min(step, total - start), size), np.uint8)
        for number, stored in enumerate(codes):
            here = np.flatnonzero(part_of[start : start + step] == number)
            block[here] = stored[position[start + here]]
        empty.add_sa_codes(block)


def _fill_cell(empty: Any, parts: list[Any], targets: Sequence[np.ndarray], cell: int) -> None:
    size = empty.invlists.code_size
    ids, codes = [np.zeros(0, np.int64)], [np.zeros((0, size), np.uint8)]
    for part, target in zip(parts, targets, strict=True):
        count = part.invlists.list_size(cell)
        if count:
            ids.append(target[_swig.rev_swig_ptr(part.invlists.get_ids(cell), count)])
            codes.append(_swig.rev_swig_ptr(part.invlists.get_codes(cell), count * size).reshape(count, size))
    found, stored = np.concatenate(ids), np.concatenate(codes)
    order = np.argsort(found, kind="stable")[int((found == LEFT_OUT).sum()) :]
    found, stored = np.ascontiguousarray(found[order]), np.ascontiguousarray(stored[order])
    if len(found):
        empty.invlists.add_entries(cell, len(found), _swig.swig_ptr(found), _swig.swig_ptr(stored))
