"""Search within a filter: conditions on metadata columns and on splits, as masks over an index shard's rows.

A mask is worked out where the shard lives, from the metadata of its own parts, once per filter: one bit per row and a
few filters are remembered. FAISS then looks at the rows of the mask only, so k neighbours are found however rare they
are (with IVF keys: in the cells that a search visits).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipgap_ray import schema
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.index import IndexShard
from clipgap_ray.kernels import subsets
from clipgap_ray.serving.messages import ApiError, ConditionFields

REMEMBERED = 16  # masks


@dataclass(frozen=True)
class Condition:
    """What a row has to fulfil: a value of a column, or membership in a split.

    Attributes:
        column: Of the metadata; "" for a split.
        any_of: The value is one of these; empty: any.
        at_least: Smallest value.
        at_most: Largest value.
        split: Name of a split that keeps the row.
    """

    column: str = ""
    any_of: tuple[str | int | float, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    split: str = ""


Filter = tuple[Condition, ...]


def read_filter(
    conditions: Sequence[ConditionFields], splits: Sequence[str], columns: pa.Schema = schema.METADATA
) -> Filter:
    """Check the conditions of a request.

    Args:
        conditions: As they came.
        splits: Names of the splits that the service knows.
        columns: Of the index's metadata: a pool may have more than `embed` writes.

    Raises:
        ApiError: 400, naming the condition, what is wrong and what was expected.
    """
    return tuple(_read(condition, splits, columns) for condition in conditions)


def _read(given: ConditionFields, splits: Sequence[str], columns: pa.Schema) -> Condition:
    if (given.column is None) == (given.split is None):
        raise ApiError(400, "invalid_filter", "a condition names a column or a split, one of the two")
    tests = (given.equals, given.any_of, given.at_least, given.at_most)
    if given.split is not None:
        if given.split not in splits:
            known = ", ".join(splits) or "none: start the service with --splits"
            raise ApiError(400, "invalid_filter", "no such split", f"known splits: {known}")
        if any(test is not None for test in tests):
            raise ApiError(400, "invalid_filter", "a condition on a split has no value: it is kept or not")
        return Condition(split=given.split)
    names = [column.name for column in columns if _is_text(column.type) or _is_number(column.type)]
    if given.column is None or given.column not in names:
        raise ApiError(400, "invalid_filter", "no such column", f"columns: {', '.join(names)}")
    values = [*(given.any_of or []), *([] if given.equals is None else [given.equals])]
    is_text = _is_text(columns.field(given.column).type)
    if all(test is None for test in tests):
        raise ApiError(400, "invalid_filter", f"{given.column}: expected equals, any_of, at_least or at_most")
    if any(isinstance(value, str) != is_text for value in values):
        raise ApiError(400, "invalid_filter", f"{given.column} holds {'texts' if is_text else 'numbers'}")
    if is_text and (given.at_least is not None or given.at_most is not None):
        raise ApiError(400, "invalid_filter", f"{given.column} holds texts: use equals or any_of")
    return Condition(given.column or "", tuple(values), given.at_least, given.at_most)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


@dataclass
class FilteredShard:
    """An index shard that can search within a filter; safe to use from several threads.

    Attributes:
        shard: What is searched.
        rows: The embeddings that it was built from.
        splits: Sorted uids of each split, "u8,u8".
    """

    shard: IndexShard
    rows: EmbeddingSet
    splits: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._masks: OrderedDict[Filter, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def search(self, queries: np.ndarray, k: int, within: Filter = ()) -> tuple[np.ndarray, np.ndarray]:
        """Search the rows that fulfil every condition; the contract of `index`."""
        return self.shard.search(queries, k, keep=self.mask(within) if within else None)

    def mask(self, within: Filter) -> np.ndarray:
        """Return (n,) bool over the shard's positions."""
        with self._lock:
            packed = self._masks.pop(within, None)
        if packed is None:
            packed = np.packbits(self._work_out(within))
        with self._lock:
            self._masks[within] = packed
            if len(self._masks) > REMEMBERED:
                self._masks.popitem(last=False)
        return np.unpackbits(packed, count=self.shard.num_rows).astype(bool)

    def _work_out(self, within: Filter) -> np.ndarray:
        columns = sorted({condition.column or "uid" for condition in within})
        parts, positions = schema.split_row_ids(self.shard.row_ids)
        mask = np.zeros(len(parts), bool)
        for part in self.shard.parts:
            here = np.flatnonzero(parts == part)
            table = self.rows.metadata(part, columns)
            own = np.ones(table.num_rows, bool)
            for condition in within:
                own &= self._fulfils(table, condition)
            mask[here] = own[positions[here]]
        return mask

    def _fulfils(self, table: pa.Table, condition: Condition) -> np.ndarray:
        """(n,) bool; a value that is not known fulfils nothing."""
        if condition.split:
            uids = schema.pack_uids(table.column("uid").to_pylist())
            return subsets.contains(self.splits[condition.split], uids)
        column = table.column(condition.column)
        fulfilled = pc.is_valid(column)
        if condition.any_of:
            comparable = pc.cast(column, pa.float64()) if pa.types.is_floating(column.type) else column
            fulfilled = pc.and_(fulfilled, pc.is_in(comparable, _values(condition.any_of, comparable.type)))
        for bound, compare in ((condition.at_least, pc.greater_equal), (condition.at_most, pc.less_equal)):
            if bound is not None:
                holds = compare(pc.cast(column, pa.float64(), safe=False), pa.scalar(bound, pa.float64()))
                fulfilled = pc.and_(fulfilled, pc.fill_null(holds, False))
        return np.asarray(fulfilled.combine_chunks() if isinstance(fulfilled, pa.ChunkedArray) else fulfilled, bool)


def _values(asked: Sequence[str | int | float], kind: pa.DataType) -> pa.Array:
    """The values that a column can hold; 0.5, or what is too large, equals no integer of it."""
    if not pa.types.is_integer(kind):
        return pa.array(asked, kind)
    bounds = np.iinfo(kind.to_pandas_dtype())
    whole = [int(value) for value in asked if isinstance(value, int) or float(value).is_integer()]
    return pa.array([value for value in whole if bounds.min <= value <= bounds.max], kind)
