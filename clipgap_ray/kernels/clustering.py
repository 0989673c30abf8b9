"""Partitions of a pool: spherical k-means on a sample, then every row's nearest centroids, decided exactly.

k-means is FAISS's (`faiss.Kmeans`, inner product). The released code of the paper lets a partition run empty: its
centre becomes 0/0 = NaN and then wins every comparison (train_test_similarity.md section 8, row 9). Here an empty
partition is re-seeded with the row that its own centroid describes worst, and dropped when no such row is left.

Centroids are rounded to float16 like rows, so that the similarity of row and centroid is an exact float64 product and
assignment depends on neither block size nor BLAS. The k-means itself is float32: its last bits belong to the machine,
as an encoder's do; whoever needs the same partitions elsewhere keeps the centroids.

Shapes: n rows, d dims, K partitions, p probes. Cost: O(n K d) time for an assignment, O(block * K) memory.
"""

from __future__ import annotations

import faiss
import numpy as np

from clipgap_ray.environment import require_one_faiss
from clipgap_ray.kernels.vectors import error_bound, exact_pairs_at, to_storage

require_one_faiss()

ITERATIONS = 10
POINTS_PER_PARTITION = 256  # FAISS's own upper limit; more rows move the centroids no further
RESEED_ROUNDS = 8
BLOCK_SCORES = 1 << 24  # 64 MB of float32 similarities of rows to centroids
# A stored row is a unit row to 2**-11; a row this close to its centroid is its centroid.
SAME_DIRECTION = 1 - 2.0**-9


def spherical_kmeans(sample: np.ndarray, num_partitions: int, seed: int, iterations: int = ITERATIONS) -> np.ndarray:
    """Return centroids of which each is the nearest one of some row of the sample.

    Args:
        sample: (n, d) float16 rows, n >= 1; zero rows have no direction and are left out.
        num_partitions: Partitions wanted, >= 1.
        seed: Of the first centroids, 0 <= seed < 2**31.
        iterations: Lloyd's iterations, >= 1.

    Returns:
        (K, d) float16 unit rows, 1 <= K <= num_partitions: fewer when the sample has fewer directions. A sample of
        zero rows gives one zero centroid.

    Raises:
        ValueError: If the sample is empty or no partition is wanted.
    """
    if not len(sample) or num_partitions < 1:
        raise ValueError(f"{num_partitions} partitions of {len(sample)} rows: expected at least one of each")
    rows = to_storage(sample)
    rows = rows[rows.any(axis=1)]
    if not len(rows):
        return np.zeros((1, sample.shape[1]), np.float16)
    kmeans = faiss.Kmeans(
        rows.shape[1],
        min(num_partitions, len(rows)),
        niter=iterations,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,  # the caller chose the sample; FAISS would warn below 39
        max_points_per_centroid=len(rows),
    )
    kmeans.train(rows.astype(np.float32))
    return reseed_empty(rows, to_storage(np.asarray(kmeans.centroids)))


def reseed_empty(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Replace partitions without rows by rows that are far from their own centroid; drop those that get none.

    Args:
        rows: (n, d) float16, n >= 1, no zero row.
        centroids: (K, d) float16; zero rows and rows that are not finite count as empty partitions.

    Returns:
        (K', d) float16, 1 <= K' <= K, finite; each is the nearest centroid of at least one row.
    """
    wanted = len(centroids)
    # A NaN wins or loses every comparison by accident, and a zero centroid attracts whatever points away from the rest.
    centroids = centroids[np.isfinite(centroids).all(axis=1) & centroids.any(axis=1)]
    if not len(centroids):
        centroids = rows[:1]
    for _ in range(RESEED_ROUNDS):
        centroids, similarity = _without_empty(rows, centroids)
        far = _far_rows(rows, similarity, wanted - len(centroids))
        if not len(far):
            return centroids
        centroids = np.concatenate([centroids, rows[far]])
    return _without_empty(rows, centroids)[0]


def _without_empty(rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the centroids that are the nearest of some row, and every row's similarity to its nearest."""
    home, similarity = assign(rows, centroids, 1)
    return centroids[np.bincount(home[:, 0], minlength=len(centroids)) > 0], similarity


def _far_rows(rows: np.ndarray, similarity: np.ndarray, count: int) -> np.ndarray:
    """Return up to `count` distinct rows that are no centroid, the least alike to their centroid first."""
    far = np.argsort(similarity, kind="stable")[: 4 * count]
    far = far[similarity[far] < SAME_DIRECTION]
    _, first = np.unique(rows[far], axis=0, return_index=True)  # copies of one outlier would leave all but one empty
    return far[np.sort(first)][:count]


def assign(rows: np.ndarray, centroids: np.ndarray, probes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return every row's nearest centroids, decided on exact similarities; ties go to the lower number.

    Args:
        rows: (n, d) float16.
        centroids: (K, d) float16, K >= 1.
        probes: Centroids wanted per row, p >= 1; at most K are returned.

    Returns:
        (n, min(p, K)) int32 partitions, the nearest first, and (n,) float64 exact similarity to the nearest.

    Raises:
        ValueError: If there is no centroid or no probe.
    """
    num_partitions = len(centroids)
    if not num_partitions or probes < 1:
        raise ValueError(f"{probes} probes among {num_partitions} centroids: expected at least one of each")
    probes = min(probes, num_partitions)
    near = np.empty((len(rows), probes), np.int32)
    similarity = np.empty(len(rows))
    transposed = np.ascontiguousarray(centroids.astype(np.float32).T)
    # Twice what unit rows need: stored rows are unit rows to 2**-11 only.
    reach = np.float32(4 * error_bound(rows.shape[1]))
    block = max(1, BLOCK_SCORES // num_partitions)
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        scores = part.astype(np.float32) @ transposed
        last = np.partition(scores, num_partitions - probes, axis=1)[:, num_partitions - probes]
        row, column = np.nonzero(scores >= (last - reach)[:, None])
        exact = exact_pairs_at(part, row, centroids, column)
        order = np.lexsort((column, -exact, row))
        first = np.searchsorted(row[order], np.arange(len(part)))
        chosen = order[first[:, None] + np.arange(probes)]
        near[start : start + block] = column[chosen]
        similarity[start : start + block] = exact[chosen[:, 0]]
    return near, similarity
