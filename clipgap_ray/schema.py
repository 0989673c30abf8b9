"""Columns and types of everything that crosses a stage boundary, and the arithmetic of identities.

One place, so that a reader of any parquet file of ours finds its meaning here. Identities:

* `uid`: 32 hex characters, stable across reshards (`shards.sample_uid`). As arrays: two big-endian uint64 words,
  dtype `UID` ("u8,u8"), DataComp's subset format.
* `row_id`: int64 `part << 32 | row in the part`. Parts are numbered at first sight and never renumbered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from clipgap_ray.errors import ConfigError, DataError

UID = np.dtype("u8,u8")
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*\Z")
UID_TEXT = re.compile(r"[0-9a-fA-F]{32}\Z")
MAX_ROWS_PER_PART = 1 << 32

# Embeddings: metadata/metadata_00000.parquet, row i of the part = row i of the arrays (design 5.3).
METADATA = pa.schema(
    [
        ("image_path", pa.string()),  # webdataset key, clip-retrieval's name for it
        ("caption", pa.string()),  # null: no caption, text row is zero
        ("uid", pa.string()),
        ("row_id", pa.int64()),
        ("shard", pa.string()),
        ("url", pa.string()),
        ("sha256", pa.string()),  # of the image bytes
        ("image_offset", pa.int64()),  # where the image lies in its tar; -1: not in a tar
        ("image_bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("phash", pa.int64()),  # 64 bits of `kernels.phash`, of the whole picture; null where no image was decoded
        ("phash_flipped", pa.int64()),  # of its mirror image
        ("clip_score", pa.float32()),  # inner product of the pair; null without caption
        ("label", pa.int32()),  # test sets and references; -1 for pools
        ("class_name", pa.string()),
        ("group", pa.string()),
    ]
)

# Skipped and remarkable samples. `dropped`: the sample is in no output; otherwise it is kept and noted.
LEDGER = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("dropped", pa.bool_()),
    ]
)

# Dedup: keep/part-00000.parquet, every row of the part.
KEEP = pa.schema(
    [
        ("row_id", pa.int64()),
        ("uid", pa.string()),
        ("keep", pa.bool_()),
        ("kept_uid", pa.string()),  # the row that stands for this one; itself when kept
        ("similarity", pa.float32()),  # to the row that removed it; 1 for exact copies, null when kept
        ("reason", pa.string()),  # "", "sha256" or "similarity"
        ("group", pa.int64()),  # row_id of the group's kept row of lowest uid
    ]
)

# Scores: pool/<test>/part-00000.parquet (design 6).
POOL_SCORES = pa.schema(
    [
        ("row_id", pa.int64()),
        ("uid", pa.string()),
        ("m", pa.float32()),  # max over test rows of the similarity
        ("arg_m", pa.int64()),  # row_id of that test row
        ("margin", pa.float32()),  # max over test rows of similarity - tau; NaN without thresholds
        ("arg_margin", pa.int64()),
    ]
)

# The further column of `score --violations`: test rows with similarity > tau, decided exactly.
VIOLATIONS = pa.field("violations", pa.int32())

# Scores: queries/<test>.parquet, one row per test image. float64 values are exact (design contract 3).
QUERY_SCORES = pa.schema(
    [
        ("row_id", pa.int64()),
        ("uid", pa.string()),
        ("tau", pa.float64()),  # similarity to the nearest reference row; NaN without reference
        ("reference_uid", pa.string()),
        ("similarity", pa.float64()),  # to the nearest pool row
        ("nearest_uid", pa.string()),
        ("nearest_row_ids", pa.list_(pa.int64())),  # k nearest pool rows, most alike first
        ("nearest_similarities", pa.list_(pa.float32())),
    ]
)

THRESHOLDS = pa.schema(
    [
        ("row_id", pa.int64()),
        ("uid", pa.string()),
        ("tau", pa.float64()),
        ("reference_uid", pa.string()),
    ]
)

# Gap after a cut: gaps/<split>/<test>.parquet.
GAPS = pa.schema(
    [
        ("row_id", pa.int64()),
        ("uid", pa.string()),
        ("tau", pa.float64()),
        ("similarity", pa.float64()),  # to the nearest kept pool row; -inf when nothing is kept
        ("gap", pa.float64()),  # max(tau, similarity): what training on cut + reference sees
        ("nearest_row_id", pa.int64()),
        ("neighbour_similarities", pa.list_(pa.float32())),  # to the k nearest kept rows, most alike first
        ("within", pa.list_(pa.int64())),  # kept rows with similarity > tau - delta, one count per delta
    ]
)

# Evaluation: per-sample predictions (design 5.5).
PREDICTIONS = pa.schema(
    [
        ("row", pa.int64()),  # position in the test set
        ("uid", pa.string()),
        ("label", pa.int32()),
        ("prediction", pa.int32()),
        ("correct", pa.bool_()),
        ("top5", pa.list_(pa.int32())),
        ("logit", pa.float32()),  # of the prediction
        ("group", pa.string()),
        ("class_name", pa.string()),
    ]
)


def row_ids(part: int, num_rows: int) -> np.ndarray:
    """Return the row ids of a part.

    Args:
        part: Part number, 0 <= part < 2**31.
        num_rows: Rows in the part, at most 2**32.

    Returns:
        (num_rows,) int64.
    """
    if not 0 <= part < 1 << 31 or not 0 <= num_rows <= MAX_ROWS_PER_PART:
        raise DataError(f"part {part} with {num_rows} rows does not fit part << 32 | row")
    return (np.int64(part) << np.int64(32)) | np.arange(num_rows, dtype=np.int64)


def split_row_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split (n,) int64 row ids into (n,) int64 part numbers and (n,) int64 positions."""
    ids = np.asarray(ids, dtype=np.int64)
    return ids >> 32, ids & 0xFFFFFFFF


def pack_uids(uids: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Turn hex uids into the pair of words that subset files hold.

    Args:
        uids: n strings of 32 hex characters.

    Returns:
        (n,) array of dtype `UID`, in the order given.

    Raises:
        DataError: If a uid is not 32 hex characters.
    """
    if isinstance(uids, pa.Array | pa.ChunkedArray):
        uids = uids.to_pylist()
    joined = "".join(uids)
    if len(joined) != 32 * len(uids) or any(len(u) != 32 for u in uids):
        bad = next(u for u in uids if len(u) != 32)
        raise DataError(f"uid {bad!r} is not 32 hex characters")
    try:
        raw = bytes.fromhex(joined)
        if len(raw) != 16 * len(uids):  # fromhex skips blanks
            raise ValueError("it holds blanks")
        words = np.frombuffer(raw, dtype=">u8")
    except ValueError as error:
        raise DataError(f"a uid is not hexadecimal: {error}") from None
    packed = np.empty(len(uids), dtype=UID)
    packed["f0"], packed["f1"] = words[0::2], words[1::2]
    return packed


def unpack_uids(packed: np.ndarray) -> list[str]:
    """Turn (n,) `UID` words back into n hex strings of 32 characters."""
    return [f"{int(high):016x}{int(low):016x}" for high, low in packed]


def sort_uids(packed: np.ndarray) -> np.ndarray:
    """Return the (n,) int64 order that sorts `UID` words by first, then second word (stable)."""
    return np.lexsort((packed["f1"], packed["f0"]))


def check_name(name: str, what: str) -> str:
    """Return `name` if it matches `[a-z0-9][a-z0-9_-]*`, else raise ConfigError naming `what` it was for."""
    if not NAME.match(name):
        raise ConfigError(
            f"{what} {name!r} does not match [a-z0-9][a-z0-9_-]*",
            hint="use lower-case letters, digits, '-' and '_', for example imagenet-v2",
        )
    return name


def named(pairs: Iterable[str], what: str) -> dict[str, str]:
    """Read `NAME=VALUE` words into a dict, in order.

    Args:
        pairs: Words such as `val=out/val`.
        what: What they are, for the error ("--test").

    Raises:
        ConfigError: If a word has no `=`, a name is malformed or repeated.
    """
    result: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not value:
            raise ConfigError(f"{what} {pair!r} is not NAME=PATH", hint=f"for example {what} val=out/embed/val")
        check_name(name, what)
        if name in result:
            raise ConfigError(f"{what} names {name!r} twice")
        result[name] = value
    return result
