"""Lists of identities as files: DataComp's subset files, other people's id lists.

Whatever an identity is (uid, integer LAION key, webdataset key), here it becomes 128 bits of dtype
`schema.UID`, so that one sorted array and one search (`kernels/subsets.py`) serve them all. Uids and integers stand
for themselves; other texts are hashed (blake2b), which at 128 bits is as good as comparing them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from clipgap_ray import schema, store
from clipgap_ray.errors import DataError
from clipgap_ray.kernels import subsets

Kind = Literal["uid", "integer", "key"]

INTEGER = re.compile(r"[0-9]{1,18}\Z")  # fits int64; LAION's keys have 9 to 13 digits
COLUMNS = ("uid", "key", "image_path", "__key__", "id")  # of a parquet list, the first that is there


def read_subset(uri: str) -> np.ndarray:
    """Read a subset file.

    Args:
        uri: .npy of dtype `UID`. Ours are sorted and unique; one of another tool is sorted and its repeats dropped.

    Returns:
        (u,) `schema.UID`, sorted and unique; memory-mapped when it is local and already so.

    Raises:
        DataError: If the file is missing or of another dtype.
    """
    array = store.read_array(uri)
    if array.dtype != schema.UID or array.ndim != 1:
        raise DataError(
            f"{uri} is no subset file: its dtype is {array.dtype}, shape {array.shape}; expected (n,) of u8,u8",
            hint="turn integer keys or texts into a split with `clipgap split join IDS --pool EMB --out NAME.npy`",
        )
    return subsets.sorted_unique(array)


@dataclass(frozen=True)
class IdList:
    """Somebody's list of samples.

    Attributes:
        kind: "uid"; "integer" = webdataset keys read as numbers (LAION's); "key" = webdataset keys as texts.
        ids: (n,) `schema.UID`, sorted and unique.
        num_given: Entries of the file, repeats included.
    """

    kind: Kind
    ids: np.ndarray
    num_given: int


def read_ids(uri: str, column: str = "") -> IdList:
    """Read an id list and find out what its entries are.

    Args:
        uri: .npy of dtype `UID`, of integers or of texts; .parquet; anything else is read as text, one id per line.
        column: Column of a parquet file; default the first of `COLUMNS` that is there.

    Raises:
        DataError: If the list is empty, of no known dtype, or has no such column.
    """
    if uri.endswith(".npy"):
        values = _array_values(uri)
    elif uri.endswith(".parquet"):
        values = _column_values(uri, column)
    else:
        values = [line.strip() for line in store.read_bytes(uri).decode().splitlines() if line.strip()]
    if not len(values):
        raise DataError(f"{uri} holds no id", hint="expected one uid or key per line, or an array of them")
    if isinstance(values, np.ndarray):
        kind: Kind = "uid" if values.dtype == schema.UID else "integer"
        packed = values if kind == "uid" else pack_integers(values)
    else:
        kind = kind_of(values)
        packed = pack(values, kind)
    return IdList(kind, subsets.sorted_unique(packed), len(values))


def _array_values(uri: str) -> np.ndarray | list[str]:
    try:
        array = store.read_array(uri)
    except ValueError as error:  # pickled objects are not read
        raise DataError(f"{uri} cannot be read without pickle: {error}", hint="save it as integers or texts") from None
    if array.dtype.kind in "US" and array.ndim == 1:
        return [str(value) for value in array.astype(str).tolist()]
    if array.ndim != 1 or (array.dtype != schema.UID and array.dtype.kind not in "iu"):
        raise DataError(f"{uri} is {array.dtype} of shape {array.shape}, expected (n,) of u8,u8, integers or texts")
    return array


def _column_values(uri: str, column: str) -> np.ndarray | list[str]:
    table = store.read_table(uri)
    found = [name for name in ([column] if column else COLUMNS) if name in table.column_names]
    if not found:
        raise DataError(
            f"{uri} has no column {column or ' or '.join(COLUMNS)}: it has {table.column_names}",
            hint="name the column of ids with --column",
        )
    values = table.column(found[0]).drop_null()
    if pa.types.is_integer(values.type):
        return values.to_numpy()
    return [str(value) for value in values.to_pylist()]


def kind_of(values: Sequence[str]) -> Kind:
    """Tell what texts are: uids if all are 32 hex characters, integers if all are digits, else keys."""
    if all(schema.UID_TEXT.match(value) for value in values):
        return "uid"
    return "integer" if all(INTEGER.match(value) for value in values) else "key"


def pack(values: Sequence[str], kind: Kind) -> np.ndarray:
    """Turn n texts of one kind into (n,) `schema.UID`; a text that is no integer becomes one that no list holds."""
    if kind == "uid":
        return schema.pack_uids([value.lower() for value in values])
    if kind == "key":
        return _hashed(values)
    return pack_integers(np.array([int(value) if INTEGER.match(value) else -1 for value in values], np.int64))


def pack_integers(values: np.ndarray) -> np.ndarray:
    """Turn (n,) integers into (n,) `schema.UID`: first word zero, negative ones all ones."""
    packed = np.zeros(len(values), schema.UID)
    packed["f1"] = values.astype(np.uint64)
    packed["f0"][values < 0] = np.iinfo(np.uint64).max
    return packed


def _hashed(values: Sequence[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(value.encode(), digest_size=16).digest() for value in values)
    return schema.pack_words(np.frombuffer(digests, ">u8"))
