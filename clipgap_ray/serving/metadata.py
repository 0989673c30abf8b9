"""What a row id stands for: uid, caption, image path, shard; read from the embeddings when asked for.

Memory is bounded: row groups asked for last, up to a number of bytes, and eight bytes for every group there is; the
rows' embeddings stay on disk. A row costs the reading of its group (a millisecond for 1,024 rows), not of its part.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipgap_ray import schema
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.hidden import Hidden
from clipgap_ray.uidmap import UidMap

COLUMNS = ["uid", "caption", "image_path", "shard", "url"]
PLACE = ["image_path", "image_offset", "image_bytes"]  # where a row's image lies
CACHE_BYTES = 256 << 20


class Metadata:
    """Rows of a folder of embeddings by row id or uid; safe to use from several threads.

    Args:
        source: The folder that the index was built from, or the set opened from it.
        modality: Whose vectors `vector` returns: image or text.
        cache_bytes: Memory for tables; one group is always kept.
        hidden: Rows that no answer may show.
        uids: Where uids lie; None (an index of an earlier version) reads the uids of one part after another.

    Attributes:
        columns: What filters may name.
    """

    def __init__(
        self,
        source: str | EmbeddingSet,
        modality: str = "image",
        cache_bytes: int = CACHE_BYTES,
        hidden: Hidden | None = None,
        uids: UidMap | None = None,
    ) -> None:
        self.rows = EmbeddingSet.open(source) if isinstance(source, str) else source
        self.uids = uids
        self.hidden = hidden or Hidden()
        self._columns = list(dict.fromkeys([*COLUMNS, *PLACE, *self.hidden.columns]))
        self.columns = self.rows.metadata_columns()
        self.modality = modality
        self.cache_bytes = cache_bytes
        self._num_rows = {part.number: part.num_rows for part in self.rows.parts}
        self._starts: dict[int, np.ndarray] = {}
        self._tables: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def lookup(self, row_ids: np.ndarray) -> list[dict[str, Any]]:
        """Return `COLUMNS` of each of (n,) int64 row ids, in order; each row group is read once.

        A row that is unknown or hidden is {}.
        """
        parts, positions = schema.split_row_ids(row_ids)
        found: list[dict[str, Any]] = [{} for _ in range(len(parts))]
        places: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (part, group): [(where it is shown, row inside)]
        for at, (part, position) in enumerate(zip(parts.tolist(), positions.tolist(), strict=True)):
            if position < self._num_rows.get(part, 0):
                group, inside = self._place(part, position)
                places.setdefault((part, group), []).append((at, inside))
        for (part, group), wanted in places.items():
            taken = self._table(part, group).take([inside for _, inside in wanted]).to_pylist()
            for (at, _), row in zip(wanted, taken, strict=True):
                if not self.hidden.reason(row):
                    found[at] = {name: row[name] for name in COLUMNS}
        return found

    def vectors(self, row_ids: np.ndarray) -> np.ndarray:
        """Return the (n, d) float32 rows of (n,) row ids; local embeddings are read in place."""
        parts, positions = schema.split_row_ids(row_ids)
        read = self.rows.images if self.modality == "image" else self.rows.texts
        found = np.zeros((len(row_ids), self.rows.dim), np.float32)
        for part in np.unique(parts):
            here = np.flatnonzero(parts == part)
            found[here] = read(int(part))[positions[here]]
        return found

    def image(self, row_id: int) -> bytes:
        """Return the encoded image of a row, read by range from its shard.

        Raises:
            KeyError: If there is no such row, or it is hidden.
            DataError: If the embeddings came without images, or the shard is gone.
        """
        part, position = (int(value[0]) for value in schema.split_row_ids(np.array([row_id])))
        if position >= self._num_rows.get(part, 0):
            raise KeyError(row_id)
        group, inside = self._place(part, position)
        row = self._table(part, group).slice(inside, 1).to_pylist()[0]
        if self.hidden.reason(row):
            raise KeyError(row_id)
        return self.rows.image_bytes(part, row)

    def vector(self, uid: str) -> np.ndarray | None:
        """Return the (d,) float32 row of a uid, or None: none, none to show, or (text index) no caption."""
        row_id = self.uids.row_id(uid) if self.uids is not None else self._scan(uid)
        wanted = np.array([] if row_id is None else [row_id], np.int64)
        if row_id is None or (self.hidden and not self.lookup(wanted)[0]):
            return None
        row: np.ndarray = self.vectors(wanted)[0]
        return row if row.any() else None

    def _scan(self, uid: str) -> int | None:
        for part in self.rows.parts:
            at = pc.index(self.rows.metadata(part.number, ["uid"]).column("uid"), uid).as_py()
            if at >= 0:
                return int(schema.row_ids(part.number, part.num_rows)[at])
        return None

    def _place(self, part: int, position: int) -> tuple[int, int]:
        """The group of a row, and the row inside it."""
        starts = self._starts.get(part)
        if starts is None:
            starts = self._starts[part] = np.array(self.rows.metadata_groups(part), np.int64)
        group = int(np.searchsorted(starts, position, "right")) - 1
        return group, position - int(starts[group])

    def _table(self, part: int, group: int) -> pa.Table:
        key = part, group
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        table = self.rows.metadata_group(part, group, self._columns).combine_chunks()
        with self._lock:
            if key not in self._tables:  # another thread may have read it meanwhile
                self._tables[key] = table
                self._bytes += table.nbytes  # once: it takes longer than a row
            while len(self._tables) > 1 and self._bytes > self.cache_bytes:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes
        return table
