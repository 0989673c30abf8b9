"""Numeric columns of a pool's metadata, stored or derived, by row id."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipgap_ray import schema
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError

Derived = tuple[tuple[str, ...], Callable[[pa.Table], pa.ChunkedArray]]

DERIVED: dict[str, Derived] = {
    "caption_words": (
        ("caption",),
        lambda t: pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(t.column("caption")))),
    ),
    "caption_chars": (("caption",), lambda t: pc.utf8_length(t.column("caption"))),
    "min_side": (("width", "height"), lambda t: pc.min_element_wise(t.column("width"), t.column("height"))),
    "aspect_ratio": (
        ("width", "height"),
        lambda t: pc.divide(
            pc.max_element_wise(t.column("width"), t.column("height")).cast(pa.float64()),
            pc.min_element_wise(t.column("width"), t.column("height")).cast(pa.float64()),
        ),
    ),
}


def read_column(pool: EmbeddingSet, name: str, row_ids: np.ndarray) -> np.ndarray:
    """Read a numeric column for some rows.

    Args:
        pool: The pool.
        name: A numeric column of its metadata, or a key of `DERIVED`.
        row_ids: (n,) int64.

    Returns:
        (n,) float64, NaN where the value is null.

    Raises:
        ConfigError: If there is no such column, or it is not numeric.
    """
    needed, derive = DERIVED.get(name, ((name,), lambda table: table.column(name)))
    numeric = [f.name for f in schema.METADATA if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]
    present = pool.metadata(pool.parts[0].number).schema
    if name not in DERIVED and (name not in present.names or not _is_number(present.field(name).type)):
        raise ConfigError(
            f"{pool.uri} has no numeric column {name!r}", hint=f"columns: {', '.join([*numeric, *DERIVED])}"
        )
    values = np.full(len(row_ids), np.nan)
    parts, inside = schema.split_row_ids(row_ids)
    for part in np.unique(parts).tolist():
        here = parts == part
        column = derive(pool.metadata(part, list(needed)))
        values[here] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)[inside[here]]
    return values


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
