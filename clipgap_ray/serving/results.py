"""From what an index answers to what a user sees: metadata, hidden and repeated rows, thumbnails, coverage."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from clipgap_ray.errors import ClipgapError
from clipgap_ray.index import Answer
from clipgap_ray.pixels import ImageError, open_picture
from clipgap_ray.serving.coverage import Coverage
from clipgap_ray.serving.inputs import Query
from clipgap_ray.serving.messages import ApiError, Neighbour, SimilarityResult
from clipgap_ray.serving.metadata import Metadata
from clipgap_ray.serving.timings import Timings

THUMBNAIL_PX = 256
BLOCK = 256  # rows compared at once where near duplicates are collapsed


@dataclass(frozen=True)
class Chosen:
    """How many neighbours to show, how alike to each other at most, by which splits to mark them; who measures it."""

    k: int
    collapse: float | None
    coverage: Coverage | None
    timings: Timings


def describe(metadata: Metadata, answer: Answer, chosen: Chosen) -> list[list[Neighbour]]:
    """Return the neighbours of every query, nearest first.

    Args:
        metadata: Of the index; rows that it hides are left out.
        answer: (nq, w) similarities and row ids.
        chosen: What to leave out and to add.
    """
    coverage = chosen.coverage
    with chosen.timings.time("metadata_get_time"):
        flat = iter(metadata.lookup(answer.row_ids[answer.row_ids >= 0]))
    found = [
        [
            Neighbour(row_id=int(row_id), row_id_str=str(row_id), similarity=float(similarity), **facts)
            for row_id, similarity in zip(ids[ids >= 0], similarities[ids >= 0], strict=True)
            if (facts := next(flat))
        ]
        for ids, similarities in zip(answer.row_ids, answer.similarities, strict=True)
    ]
    if chosen.collapse is not None:
        with chosen.timings.time("dedup_time"):
            found = [_collapsed(metadata, near, chosen.collapse, chosen.k) for near in found]
    found = [near[: chosen.k] for near in found]
    if coverage is not None and coverage.splits:
        near = [neighbour for row in found for neighbour in row if neighbour.uid]
        for neighbour, names in zip(near, coverage.keeping([n.uid or "" for n in near]), strict=True):
            neighbour.splits = names
    return found


def _collapsed(metadata: Metadata, near: list[Neighbour], collapse: float, most: int) -> list[Neighbour]:
    """Keep, nearest first, up to `most` that are less alike than `collapse` to everything kept before.

    A block of rows at a time is compared with the rows kept and with itself: no (n, n) similarities.
    """
    kept: list[Neighbour] = []
    kept_rows = np.zeros((0, metadata.rows.dim), np.float32)
    for start in range(0, len(near), BLOCK):
        block = near[start : start + BLOCK]
        rows = metadata.vectors(np.array([row.row_id for row in block], np.int64))
        among = rows @ rows.T >= collapse
        fresh: list[int] = []
        for at in np.flatnonzero(~(rows @ kept_rows.T >= collapse).any(axis=1)):
            if len(kept) + len(fresh) < most and not among[at, fresh].any():
                fresh.append(int(at))
        kept += [block[at] for at in fresh]
        kept_rows = np.concatenate([kept_rows, rows[fresh]])
        if len(kept) == most:
            break
    return kept


def thumbnail(metadata: Metadata, row_id: int) -> bytes:
    """Return a JPEG of at most THUMBNAIL_PX a side.

    Raises:
        ApiError: 404 for an unknown row, a hidden one, or one without an image that can be read.
    """
    try:
        picture = open_picture(metadata.image(row_id), shrink_to=THUMBNAIL_PX).convert("RGB")
    except (KeyError, ClipgapError, ImageError, ValueError, OSError):
        raise ApiError(404, "no_image", "no image of this row can be shown") from None
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def cover(
    coverage: Coverage, queries: list[Query], rows: np.ndarray, neighbours: list[list[Neighbour]], k: int
) -> list[SimilarityResult]:
    """Return the coverage of every query.

    Args:
        coverage: The score run and its splits.
        queries: As asked.
        rows: (nq, d) float32 unit rows.
        neighbours: Of every query: at least two, where it may be a row of the index itself.
        k: Test rows to name per test set, and neighbours.
    """
    results = []
    for query, row, near in zip(queries, rows, neighbours, strict=True):
        # A row of the training set is nearest to itself, which says nothing: its nearest other row counts.
        others = [neighbour.similarity for neighbour in near if neighbour.uid is None or neighbour.uid != query.uid]
        nearest = others[0] if others else -np.inf
        results.append(
            SimilarityResult(
                similarity=nearest if others else None,
                neighbours=near[:k],
                tests=coverage.compare(row, nearest, k),
                splits=coverage.judge(row, query.uid),
            )
        )
    return results
