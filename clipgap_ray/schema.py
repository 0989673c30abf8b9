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
import pyarrow.compute as pc

from clipgap_ray.errors import ConfigError, DataError

UID = np.dtype("u8,u8")
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*\Z")
UID_TEXT = re.compile(r"[0-9a-fA-F]{32}\Z")
MAX_ROWS_PER_PART = 1 << 32
HEX_CHUNK_ROWS = 1 << 20  # 32 MB of text: arrow strings have 32-bit offsets

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
        ("group", pa.int64()),  # row_id of the row that stands for the group
    ]
)

# Dedup: groups.parquet, the rows of groups of two and more; the row that stays first, then in the order of staying.
GROUPS = pa.schema(
    [
        ("uid", pa.string()),
        ("kept_uid", pa.string()),
        ("similarity", pa.float32()),  # as in the keep table
        ("group", pa.int64()),
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

# Attributes: labels/part-00000.parquet, row i of the part = row i of the embeddings.
ATTRIBUTES = pa.schema(
    [
        ("row_id", pa.int64()),
        ("uid", pa.string()),
        ("attribute", pa.string()),  # null: abstained
        ("best", pa.string()),  # the most similar attribute, whatever the margin
        ("runner_up", pa.string()),
        ("score", pa.float32()),  # similarity to the best
        ("margin", pa.float32()),  # by how much it beats the runner-up
        ("corrected", pa.bool_()),  # by somebody who looked
    ]
)

# Groups that a model's accuracy chose: photos.parquet.
DISCOVERED = pa.schema(
    [
        ("uid", pa.string()),
        ("class_name", pa.string()),
        ("attribute", pa.string()),
        ("group", pa.string()),  # common: the attribute that the model is best at; counter: worst
    ]
)

# The join of predictions and similarity: photos/<model>.parquet, the photos of both groups.
JOINED = pa.schema(
    [
        ("uid", pa.string()),
        ("class_name", pa.string()),
        ("group", pa.string()),
        ("similarity", pa.float64()),  # to the nearest row of what the model was trained on
        ("correct", pa.float64()),
        ("supported", pa.bool_()),  # in the common support of its class's groups
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


_NIBBLE = np.full(256, 255, np.uint8)
_NIBBLE[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_NIBBLE[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)
_PACK_ROWS = 1 << 20


def pack_uids(uids: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Turn hex uids into the pair of words that subset files hold; ten million a second from arrow.

    Args:
        uids: n strings of 32 hex characters.

    Returns:
        (n,) array of dtype `UID`, in the order given.

    Raises:
        DataError: If a uid is not 32 hex characters.
    """
    column = uids if isinstance(uids, pa.Array | pa.ChunkedArray) else pa.array(list(uids), pa.string())
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    packed = np.empty(len(column), dtype=UID)
    start = 0
    for chunk in chunks:
        for offset in range(0, len(chunk), _PACK_ROWS):
            part = chunk.slice(offset, _PACK_ROWS)
            packed[start : start + len(part)] = _pack(part)
            start += len(part)
    return packed


def _pack(uids: pa.Array) -> np.ndarray:
    lengths = pc.binary_length(uids)
    if uids.null_count or not pc.all(pc.equal(lengths, 32)).as_py():
        bad = next(uid for uid in uids.to_pylist() if uid is None or len(uid.encode()) != 32)
        raise DataError(f"uid {bad!r} is not 32 hex characters")
    wide = pa.types.is_large_string(uids.type)
    offsets = np.frombuffer(uids.buffers()[1], np.int64 if wide else np.int32)
    first = int(offsets[uids.offset])
    nibbles = _NIBBLE[np.frombuffer(uids.buffers()[2], np.uint8)[first : first + 32 * len(uids)]].reshape(-1, 32)
    wrong = np.nonzero((nibbles == 255).any(axis=1))[0]
    if len(wrong):
        raise DataError(f"uid {uids[int(wrong[0])].as_py()!r} is not hexadecimal")
    words = ((nibbles[:, 0::2] << 4) | nibbles[:, 1::2]).view(">u8")
    return pack_words(words.ravel())


def pack_words(words: np.ndarray) -> np.ndarray:
    """Pair (2n,) words, high word first, into (n,) `UID`."""
    packed = np.empty(len(words) // 2, dtype=UID)
    packed["f0"], packed["f1"] = words[0::2], words[1::2]
    return packed


def unpack_uids(packed: np.ndarray) -> list[str]:
    """Turn (n,) `UID` words back into n hex strings of 32 characters."""
    return [f"{int(high):016x}{int(low):016x}" for high, low in packed]


def hex_uids(packed: np.ndarray) -> pa.ChunkedArray:
    """Turn (n,) `UID` words into an arrow column of n hex strings, without a Python object per row."""
    chunks = []
    for start in range(0, len(packed), HEX_CHUNK_ROWS):
        part = packed[start : start + HEX_CHUNK_ROWS]
        words = np.stack([part["f0"], part["f1"]], axis=1).astype(">u8")
        offsets = np.arange(len(part) + 1, dtype=np.int32) * 32
        text = words.tobytes().hex().encode()
        chunks.append(pa.StringArray.from_buffers(len(part), pa.py_buffer(offsets), pa.py_buffer(text)))
    return pa.chunked_array(chunks, pa.string())


def hash_uids(packed: np.ndarray, seed: int) -> np.ndarray:
    """Return a hash of (seed, uid): samples drawn by it depend on neither shards nor row order (design contract 3).

    Args:
        packed: (n,) `UID` words.
        seed: 0 <= seed < 2**63.

    Returns:
        (n,) uint64, uniform; splitmix64's finaliser over the two words.
    """
    mixed = _mix(packed["f0"] ^ _mix(np.full(1, seed, np.uint64)))
    return _mix(packed["f1"] ^ mixed)


def _mix(words: np.ndarray) -> np.ndarray:
    words = words + np.uint64(0x9E3779B97F4A7C15)  # unsigned arrays wrap around
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def sort_uids(packed: np.ndarray) -> np.ndarray:
    """Return the (n,) int64 order that sorts `UID` words by first, then second word (stable)."""
    order: np.ndarray = np.argsort(packed["f0"], kind="stable")
    first = packed["f0"][order]
    same = first[1:] == first[:-1]
    if same.any():  # rare for hashes: only the runs of equal first words need the second
        runs = np.nonzero(np.concatenate([[False], same]) | np.concatenate([same, [False]]))[0]
        members = order[runs]
        order[runs] = members[np.lexsort((packed["f1"][members], packed["f0"][members]))]
    return order


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
