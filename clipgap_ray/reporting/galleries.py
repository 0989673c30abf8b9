"""Galleries: a test image beside its nearest reference image and nearest pool images before and after the cut.

Thumbnails are read by byte range out of the tars (design 5.3), so a gallery over 400 million images opens a hundred
of them. Images on a blocklist are never read.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from clipgap_ray import schema
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ClipgapError, DataError
from clipgap_ray.hidden import Hidden
from clipgap_ray.reporting.study import Queries, Study, positions
from clipgap_ray.reporting.theme import data_uri

THUMBNAIL_PX = 160
Find = Callable[[str], EmbeddingSet | None]
FACTS = ("uid", "image_path", "caption", "class_name", "sha256", "url", "image_offset", "image_bytes")
LADDER_RUNGS = 7
LADDER_ROWS = 200_000  # pool rows that a ladder looks at: enough for every level, bounded at any pool size


@dataclass(frozen=True)
class Tile:
    """One picture of a gallery: `image` is a data: address or "" with the reason in `missing`."""

    title: str
    image: str
    similarity: float | None
    caption: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Strip:
    """One row of a gallery."""

    name: str
    tiles: list[Tile]


class Thumbnails:
    """Reads pictures of embedded images, by row id or uid; remembers which could not be shown and why.

    Args:
        find: Embeddings by name; None where there are none.
        hidden: What is never read.
        shown: False shows no picture at all.
    """

    def __init__(self, find: Find, hidden: Hidden | None = None, shown: bool = True) -> None:
        self.find = find
        self.hidden = hidden or Hidden()
        self.shown = shown

    def by_row_id(self, name: str, row_id: int) -> tuple[str, str, str]:
        """Return (data address, caption, reason) of a row; the address is "" when there is a reason."""
        embeddings = self.find(name)
        if embeddings is None:
            return "", "", f"no embeddings of {name}"
        part, row = (int(value[0]) for value in schema.split_row_ids(np.array([row_id])))
        metadata = _metadata(embeddings, part, tuple(rule.column for rule in self.hidden.rules))
        if metadata is None or row >= metadata.num_rows:
            return "", "", f"row {row_id} is not in embed/{name}"
        facts = metadata.slice(row, 1).to_pylist()[0]
        caption = facts["caption"] or facts["class_name"] or ""
        reason = self.hidden.reason(facts)
        if reason:
            return "", "", reason
        if not self.shown:
            return "", caption, "pictures are off"
        try:
            return thumbnail(embeddings.image_bytes(part, facts)), caption, ""
        except (ClipgapError, OSError, UnidentifiedImageError) as error:
            return "", caption, f"cannot be read: {type(error).__name__}"

    def by_uid(self, name: str, uid: str | None) -> tuple[str, str, str]:
        """Like `by_row_id`, for references whose scores name uids."""
        embeddings = self.find(name)
        if embeddings is None or uid is None:
            return "", "", f"no embeddings of {name}" if embeddings is None else "unknown"
        row_id = _rows_by_uid(embeddings).get(uid)
        return ("", "", f"uid is not in embed/{name}") if row_id is None else self.by_row_id(name, row_id)


@functools.lru_cache(maxsize=8)
def columns_of(embeddings: EmbeddingSet) -> pa.Schema:
    """Return the columns of a set's metadata: what `embed` writes, and what somebody added (`punsafe`)."""
    return embeddings.metadata(embeddings.parts[0].number).schema if embeddings.parts else schema.METADATA


def rule_columns(pool: EmbeddingSet | None) -> pa.Schema:
    """Return the columns that --hide rules may name: the pool's."""
    return schema.METADATA if pool is None else columns_of(pool)


@functools.lru_cache(maxsize=8)
def _metadata(embeddings: EmbeddingSet, part: int, further: tuple[str, ...]) -> pa.Table | None:
    if not any(p.number == part for p in embeddings.parts):
        return None
    # A test set need not have what somebody added to the pool; a part of a set that lacks its set's column is an error.
    own = [column for column in further if column in columns_of(embeddings).names]
    try:
        return embeddings.metadata(part, list(dict.fromkeys([*FACTS, *own])))
    except DataError as error:
        raise DataError(str(error), hint="rules of --hide need their columns in all parts of a set") from None


@functools.lru_cache(maxsize=8)
def _rows_by_uid(embeddings: EmbeddingSet) -> dict[str, int]:
    metadata = embeddings.all_metadata(["uid", "row_id"])
    return dict(zip(metadata["uid"].to_pylist(), metadata["row_id"].to_pylist(), strict=True))


def thumbnail(data: bytes) -> str:
    """Return an encoded image as a data: address, at most THUMBNAIL_PX on its longer side.

    Raises:
        OSError: If it cannot be decoded.
    """
    with Image.open(io.BytesIO(data)) as image:
        if max(image.size) <= THUMBNAIL_PX and image.format == "JPEG":
            image.verify()
            return data_uri(data, "image/jpeg")
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
    return data_uri(buffer.getvalue(), "image/jpeg")


def tile(title: str, picture: tuple[str, str, str], similarity: float | None) -> Tile:
    """Return a tile of what `Thumbnails` found."""
    image, caption, reason = picture
    return Tile(title, image, similarity, caption, reason)


def choose(queries: Queries, count: int) -> np.ndarray:
    """Choose test images from the most to the median affected by the cut: evenly spaced ranks of similarity - tau."""
    excess = queries.similarity - (queries.tau if queries.has_reference else 0.0)
    order = np.argsort(-excess, kind="stable")
    ranks = np.unique(np.linspace(0, (len(order) - 1) // 2, count).round().astype(int))
    return order[ranks]


def neighbours(study: Study, pictures: Thumbnails, test: str, count: int) -> list[Strip]:
    """Return strips of test image, nearest reference, nearest pool image before the cut, nearest one kept after."""
    queries = study.queries(test)
    if queries is None:
        return []
    split = study.gap_matched(test)
    gaps = study.gaps(split, test) if split is not None else None
    after = positions(queries.uids, gaps["uid"].to_pylist()) if gaps is not None else None
    strips = []
    for row in choose(queries, count):
        tiles = [tile("test image", pictures.by_row_id(test, int(queries.row_ids[row])), None)]
        if queries.has_reference:
            picture = pictures.by_uid(study.reference, queries.reference_uids[row])
            tiles.append(tile("nearest reference", picture, float(queries.tau[row])))
        if queries.neighbour_ids[row]:
            picture = pictures.by_row_id("pool", queries.neighbour_ids[row][0])
            tiles.append(tile("nearest pool image", picture, float(queries.similarity[row])))
        if gaps is not None and after is not None and after[row] >= 0:
            tiles.append(_kept_tile(pictures, gaps, int(after[row])))
        strips.append(Strip(queries.uids[row], tiles))
    return strips


def _kept_tile(pictures: Thumbnails, gaps: pa.Table, row: int) -> Tile:
    row_id, similarity = gaps["nearest_row_id"][row].as_py(), gaps["similarity"][row].as_py()
    if row_id is None or row_id < 0:
        return Tile("nearest kept after the cut", "", None, missing="nothing is kept")
    return tile("nearest kept after the cut", pictures.by_row_id("pool", row_id), similarity)


def ladder(study: Study, pictures: Thumbnails, test: str) -> Strip | None:
    """Return one test image and pool images at falling similarity: what does a value look like? (figure 2)

    The rungs divide the range from the nearest to the median pool row evenly. Rows that dedup removed are no rungs. In
    a large pool only the first rows are looked at; the nearest, known from the scores, stand among them all the same.
    """
    queries, pool, own = study.queries(test), study.embeddings("pool"), study.embeddings(test)
    if queries is None or pool is None or own is None:
        return None
    row = int(choose(queries, 2)[0])
    part, position = (int(v[0]) for v in schema.split_row_ids(queries.row_ids[[row]]))
    query = np.asarray(own.images(part)[position], np.float32)
    similarities, row_ids = _scan(study, pool, query)
    median = np.median(similarities)
    known = np.array(queries.neighbour_ids[row], np.int64)
    similarities = np.concatenate([queries.neighbour_similarities[row], similarities])
    row_ids, first = np.unique(np.concatenate([known, row_ids]), return_index=True)
    similarities = similarities[first]
    order = np.argsort(-similarities, kind="stable")
    levels = np.linspace(similarities[order[0]], median, LADDER_RUNGS)
    at = np.searchsorted(-similarities[order], -levels).clip(max=len(order) - 1)
    tiles = [tile("test image", pictures.by_row_id(test, int(queries.row_ids[row])), None)]
    for rung in dict.fromkeys(order[at]):
        tiles.append(tile("", pictures.by_row_id("pool", int(row_ids[rung])), float(similarities[rung])))
    return Strip(queries.uids[row], tiles)


def _scan(study: Study, pool: EmbeddingSet, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Similarities of one query to the kept ones of the first LADDER_ROWS pool rows, and their row ids."""
    similarities, row_ids, seen = [], [], 0
    for part in pool.parts:
        if seen >= LADDER_ROWS:
            break
        own = schema.row_ids(part.number, part.num_rows)
        kept = ~np.isin(own, study.dropped_rows(part.number))
        similarities.append((np.asarray(pool.images(part.number), np.float32) @ query)[kept])
        row_ids.append(own[kept])
        seen += part.num_rows
    return np.concatenate(similarities), np.concatenate(row_ids)
