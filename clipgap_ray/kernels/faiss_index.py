"""FAISS behind the search contract: inner product, row ids as they are stored, -inf/-1 for missing.

Row ids stay outside FAISS (an array from position to row id), so any factory string works and they can be
memory-mapped. FAISS's padding (-3.4e38, -1) is converted here and nowhere else.

A Flat index answers exactly: FAISS proposes k candidates and some spare ones, their similarities are computed in
float64 from the stored values, and more are fetched until the k-th is certain. So its answers are the same bits
for any batch size, division into shards and machine (FAISS alone differs by 3.6e-7 between batch sizes and cuts
ties arbitrarily, style.md 3.1). Other indexes answer with FAISS's own similarities.
"""

from __future__ import annotations

import errno
import math
import os
from typing import Any, NamedTuple

import faiss
import numpy as np

from clipgap_ray.environment import require_one_faiss
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels.faiss_gpu import gpu_flat
from clipgap_ray.kernels.topk import merge_topk
from clipgap_ray.kernels.vectors import error_bound, to_storage

require_one_faiss()  # two wheels overwrite each other's files: better a clear error than a crash in C++
_swig: Any = faiss  # what the package's type stubs do not know

FLAT_BYTES = 1 << 28  # below 256 MB a full scan takes about 20 ms: nothing to gain from cells
SPARE = 8  # candidates fetched beyond k, so that one fetch almost always settles the exact order
POINTS_PER_CELL = 64  # training rows per cell: FAISS's own range is 39 to 256
# Below this many queries FAISS's scan per query is faster than BLAS; its own default is 128,000 / d = 250 queries
# at d = 512, where the scan takes 29 times as long as it could (performance.md finding 5).
BLAS_FROM_QUERIES = 12
MASKED_ROWS = 1 << 14  # rows gathered at once where a batch of queries looks at some of the rows only
MOST_CANDIDATES = 1024  # of HNSW


class Choice(NamedTuple):
    """A factory string and why it was chosen."""

    key: str
    reason: str


def choose_key(num_rows: int, dim: int, memory_bytes: float, min_recall: float = 0.95) -> Choice:
    """Choose an index for a number of rows.

    Args:
        num_rows: Rows in one index shard, estimated if it is still growing.
        dim: Dimension d.
        memory_bytes: Memory that the shard may take.
        min_recall: Recall@10 to reach; 1 asks for exact answers.

    Returns:
        The factory string with its reason, for people.

    Raises:
        ConfigError: If exact answers are asked for and the rows do not fit.
    """
    full = num_rows * dim * 4
    size = f"{num_rows:,} rows x {dim} take {full / 1e9:.2f} GB in full, {memory_bytes / 1e9:.2f} GB allowed"
    if min_recall >= 1 and full > memory_bytes:
        raise ConfigError(f"recall 1 needs a Flat index, but {size}", hint="use more --shards, or --min-recall 0.95")
    if min_recall >= 1 or (full <= FLAT_BYTES and full <= memory_bytes):
        return Choice("Flat", f"exact; {size}")
    cells = _cells(num_rows)
    if full <= memory_bytes:
        return Choice(f"IVF{cells},Flat", f"cells of about {num_rows // cells} rows; {size}")
    # One byte per four dims, refined by one byte per dim when that fits (a quarter of the full rows).
    code = next(m for m in range(max(1, dim // 4), 0, -1) if dim % m == 0)
    refine = ",Refine(SQ8)" if num_rows * (code + 8 + dim) <= memory_bytes and min_recall > 0.5 else ""
    return Choice(f"IVF{cells},PQ{code}{refine}", f"codes of {code} bytes; {size}")


def _cells(num_rows: int) -> int:
    """About 4 * sqrt(n) cells as a power of two, few enough to train on the rows there are."""
    wanted = 2 ** round(math.log2(max(4 * math.sqrt(num_rows), 1)))
    most = 2 ** int(math.log2(max(num_rows / POINTS_PER_CELL, 1)))
    return int(max(1, min(wanted, most)))


def training_rows(key: str, dim: int) -> int:
    """Return how many sampled rows train an index of this key well; 0 when it needs none (Flat, HNSW)."""
    index = _create(key, dim)
    return 0 if index.is_trained else max(POINTS_PER_CELL * num_cells(index), 256 * 64)


def _create(key: str, dim: int) -> faiss.Index:
    try:
        return faiss.index_factory(dim, key, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).rsplit("Error: ", 1)[-1][:200]
        raise ConfigError(
            f"--key {key!r} is not a FAISS factory string for {dim} dims: {reason}",
            hint="for example Flat, IVF1024,Flat, IVF4096,PQ64 or HNSW32; 'auto' chooses",
        ) from None


def train_empty(key: str, dim: int, sample: np.ndarray, seed: int) -> faiss.Index:
    """Build an empty, trained index.

    Args:
        key: FAISS factory string.
        dim: Dimension d.
        sample: (n, d) rows to train on; may be empty for keys that need no training.
        seed: Of the quantisers.

    Raises:
        ConfigError: If the key is malformed, or has more cells than there are rows to train on.
    """
    index = _create(key, dim)
    if index.is_trained:
        return index
    _seed(index, seed)
    ivf: Any = faiss.try_extract_index_ivf(index)
    assigner = None if ivf is None else gpu_flat(ivf.d, ivf.metric_type)
    if ivf is not None and assigner is not None:  # k-means assigns there; everything else stays as it is
        ivf.clustering_index = assigner
    try:
        index.train(np.ascontiguousarray(to_storage(sample), np.float32))
    except RuntimeError as error:
        reason = str(error).rsplit("Error: ", 1)[-1][:200]
        raise ConfigError(
            f"--key {key!r} cannot be trained on {len(sample)} rows: {reason}", hint="use fewer cells, or --key Flat"
        ) from None
    finally:
        if ivf is not None:
            ivf.clustering_index = None
    return index


def _seed(index: faiss.Index, seed: int) -> None:
    """Seed the quantisers that the key brings, and silence their advice on small samples."""
    ivf = faiss.try_extract_index_ivf(index)
    holders: list[Any] = [ivf] if ivf is not None else []
    holders += [holder.pq for holder in (*holders, index) if hasattr(holder, "pq")]
    for holder in holders:
        holder.cp.seed = seed
        holder.cp.min_points_per_centroid = 1


def add(index: faiss.Index, rows: np.ndarray) -> None:
    """Append (n, d) rows, rounded to storage precision; their positions follow those already there.

    Where there is a GPU and faiss-gpu, the cells of IVF rows are found there.
    """
    if not len(rows):
        return
    stored = np.ascontiguousarray(to_storage(rows), np.float32)
    inner: Any = faiss.downcast_index(index)
    assigner = gpu_flat(index.d, inner.quantizer.metric_type) if isinstance(inner, faiss.IndexIVF) else None
    if assigner is None:
        index.add(stored)
        return
    assigner.add(inner.quantizer.reconstruct_n(0, inner.nlist))
    cells = np.ascontiguousarray(assigner.search(stored, 1)[1][:, 0])
    inner.add_core(len(stored), faiss.swig_ptr(stored), None, faiss.swig_ptr(cells))


def search(
    index: faiss.Index,
    row_ids: np.ndarray,
    queries: np.ndarray,
    k: int,
    nprobe: int = 0,
    keep: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Search an index.

    Args:
        index: Trained, possibly empty.
        row_ids: (n,) int64, the id of the row at every position; unique.
        queries: (nq, d) finite rows, rounded to float16 here as the stored rows were.
        k: Neighbours, k >= 1; may exceed the rows there are.
        nprobe: Cells to visit (IVF keys), or candidates to hold (HNSW); 0 = the index's own setting.
        keep: (n,) bool over positions; False rows are not found. None keeps all.

    Returns:
        (nq, k) float32 similarities, descending, padded with -inf, and (nq, k) int64 row ids, padded with -1;
        ties go to the smaller row id (for other keys than Flat: among those that FAISS returned).
    """
    stored = np.ascontiguousarray(to_storage(queries), np.float32)
    num_queries = len(stored)
    if num_queries == 0 or index.ntotal == 0:
        return np.full((num_queries, k), -np.inf, np.float32), np.full((num_queries, k), -1, np.int64)
    bitmap = None if keep is None else np.packbits(keep, bitorder="little")  # lives as long as the selector
    selector = None if bitmap is None else _swig.IDSelectorBitmap(bitmap)
    params = _parameters(faiss.downcast_index(index), nprobe, selector)
    faiss.cvar.distance_compute_blas_threshold = BLAS_FROM_QUERIES * index.d
    if isinstance(index, faiss.IndexFlat):
        # With a selector FAISS scans once per query, however many there are.
        places = np.flatnonzero(keep) if keep is not None and num_queries >= BLAS_FROM_QUERIES else None
        return _search_exactly(index, row_ids, stored, k, params, places)
    similarities, positions = _faiss_search(index, stored, min(k, index.ntotal), params)
    return merge_topk([(similarities, _ids_at(row_ids, positions))], k)


def _parameters(index: faiss.Index, nprobe: int, selector: faiss.IDSelector | None) -> faiss.SearchParameters | None:
    """Parameters in the shape that this index type (and the ones it wraps) wants."""
    if selector is None and not nprobe:
        return None
    common = {"sel": selector} if selector is not None else {}
    if isinstance(index, faiss.IndexPreTransform):
        return _swig.SearchParametersPreTransform(
            index_params=_parameters(faiss.downcast_index(index.index), nprobe, selector)
        )
    if isinstance(index, faiss.IndexRefine):
        base = _parameters(faiss.downcast_index(index.base_index), nprobe, selector)
        return _swig.IndexRefineSearchParameters(k_factor=4.0, base_index_params=base)
    if isinstance(index, faiss.IndexIVF):
        return _swig.SearchParametersIVF(nprobe=min(nprobe or index.nprobe, index.nlist), **common)
    if isinstance(index, faiss.IndexHNSW):
        return _swig.SearchParametersHNSW(efSearch=nprobe or index.hnsw.efSearch, **common)
    if selector is None:
        return None
    return _swig.SearchParameters(**common)


def _faiss_search(
    index: faiss.Index, stored: np.ndarray, k: int, params: faiss.SearchParameters | None
) -> tuple[np.ndarray, np.ndarray]:
    """FAISS's answer with its padding converted: the one place that knows -3.4e38."""
    similarities, positions = index.search(stored, k, params=params)
    return np.where(positions < 0, np.float32(-np.inf), similarities), positions


def _ids_at(row_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Row ids at positions; -1 stays -1."""
    return np.where(positions < 0, np.int64(-1), np.asarray(row_ids)[np.maximum(positions, 0)])


def _search_places(index: Any, stored: np.ndarray, k: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What FAISS answers with a selector, by matrix products: the best k of the rows at (m,) sorted places."""
    rows = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    best = np.full((len(stored), k), -np.inf, np.float32), np.full((len(stored), k), -1, np.int64)
    for start in range(0, len(places), MASKED_ROWS):
        here = places[start : start + MASKED_ROWS]
        similarities = stored @ rows[here].T
        width = min(k, len(here))
        columns = np.argpartition(-similarities, width - 1, axis=1)[:, :width]
        best = merge_topk([best, (np.take_along_axis(similarities, columns, axis=1), here[columns])], k)
    return best


def _search_exactly(
    index: faiss.Index,
    row_ids: np.ndarray,
    stored: np.ndarray,
    k: int,
    params: faiss.SearchParameters | None,
    places: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rescore candidates in float64; fetch more for the queries whose k-th neighbour is not certain yet.

    Candidates are FAISS's, or where `places` are given the best of the rows there.
    """
    similarities = np.empty((len(stored), k), np.float32)
    ids = np.empty((len(stored), k), np.int64)
    norms = np.linalg.norm(stored, axis=1)
    open_queries = np.arange(len(stored))
    width = min(k + SPARE, index.ntotal)
    while len(open_queries):
        queries = stored[open_queries]
        if places is None:
            proposed, found = _faiss_search(index, queries, width, params)
        else:
            proposed, found = _search_places(index, queries, width, places)
        exact = np.full(found.shape, -np.inf, np.float32)
        known = found >= 0
        rows = index.reconstruct_batch(found[known])
        which = np.nonzero(known)[0]
        exact[known] = np.einsum("nd,nd->n", queries[which].astype(np.float64), rows.astype(np.float64))
        best, best_ids = merge_topk([(exact, _ids_at(row_ids, found))], k)
        similarities[open_queries], ids[open_queries] = best, best_ids
        # Rows not proposed are at most as alike as the last proposed one, up to FAISS's rounding.
        reach = 2 * error_bound(index.d) * np.maximum(1.0, norms[open_queries])
        certain = ~known.all(axis=1) | (proposed[:, -1] + reach < best[:, -1])
        open_queries = open_queries[~certain] if width < index.ntotal else open_queries[:0]
        width = min(4 * width, index.ntotal)
    return similarities, ids


def to_bytes(index: faiss.Index) -> bytes:
    """Serialise an index."""
    return faiss.serialize_index(index).tobytes()


def from_bytes(data: bytes) -> faiss.Index:
    """Read a serialised index. FAISS parses in C++: check where the bytes come from first."""
    return faiss.deserialize_index(np.frombuffer(data, np.uint8))


def read(path: str, mmap: bool = True) -> faiss.Index:
    """Read an index file, memory-mapped if its type can be (others are read whole). Check its sha256 first."""
    return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC) if mmap else faiss.read_index(path)


def write(index: faiss.Index, path: str) -> None:
    """Write an index file; atomicity is the caller's business.

    Raises:
        OSError: ENOSPC if the disk is full, which FAISS reports in words only.
    """
    try:
        faiss.write_index(index, path)
    except RuntimeError as error:
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from None
        raise


def num_cells(index: faiss.Index) -> int:
    """Return the number of IVF cells, 0 for other indexes."""
    ivf = faiss.try_extract_index_ivf(index)
    return int(ivf.nlist) if ivf is not None else 0


def efforts(index: faiss.Index) -> tuple[int, int]:
    """Return the smallest and the largest sensible `nprobe`, in cells (IVF) or candidates (HNSW); else (0, 0)."""
    cells = num_cells(index)
    if cells:
        return 1, cells
    inner = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform | faiss.IndexRefine):
        wrapped = inner.index if isinstance(inner, faiss.IndexPreTransform) else inner.base_index
        inner = faiss.downcast_index(wrapped)
    return (16, MOST_CANDIDATES) if isinstance(inner, faiss.IndexHNSW) else (0, 0)


def recall_at_k(found_ids: np.ndarray, true_ids: np.ndarray, true_similarities: np.ndarray, k: int) -> float:
    """Return the share of the k true neighbours that were found; rows tied with the k-th count as true.

    Args:
        found_ids: (nq, >= k) int64 in order; -1 for missing.
        true_ids: (nq, w) int64, exact, w >= k: the wider, the more ties are recognised; -1 for missing.
        true_similarities: (nq, w) float, descending, -inf for missing.
        k: Neighbours that count.

    Returns:
        0 to 1; 1 when there is nothing to find.
    """
    hits = wanted = 0
    for found, ids, similarities in zip(found_ids[:, :k], true_ids, true_similarities, strict=True):
        count = min(k, int((ids >= 0).sum()))
        if count == 0:
            continue
        accepted = ids[(similarities >= similarities[count - 1]) & (ids >= 0)]
        hits += min(count, len(np.intersect1d(found[found >= 0], accepted)))
        wanted += count
    return hits / wanted if wanted else 1.0
