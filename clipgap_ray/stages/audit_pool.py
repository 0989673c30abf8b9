"""What an audit reads of a pool: every test row's nearest row, equal bytes, perceptual hashes, captions. No Ray.

The pool is streamed part by part, all test sets in one pass of each kind; memory holds one part and the test sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipgap_ray import schema, store
from clipgap_ray.config.audit import AuditSettings
from clipgap_ray.embeddings import EmbeddingSet, check_same_encoder, identity
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import phash
from clipgap_ray.kernels.concepts import words
from clipgap_ray.kernels.nearest_exact import nearest
from clipgap_ray.reporting.study import positions

COLUMNS = ["uid", "row_id", "sha256", "image_path", "class_name", "caption", "phash", "phash_flipped"]


@dataclass(frozen=True)
class Captions:
    """Captions of a test set that are its own (no prompt, not repeated) and occur in the pool.

    Attributes:
        own: (n,) bool, the image has such a caption.
        exact: (n,) bool, it occurs letter by letter.
        normalised: (n,) bool, it occurs with case, punctuation and spacing put aside.
    """

    own: np.ndarray
    exact: np.ndarray
    normalised: np.ndarray


@dataclass(frozen=True)
class Target:
    """A test set under audit, n images.

    Attributes:
        name: As `--test` names it.
        test: Its embeddings.
        metadata: Their metadata.
        similarity: (n,) float64, exact, to the nearest pool row.
        nearest: (n,) int64 its row id.
        exact: (n,) bool, the same bytes are known to occur in the pool.
        bits: (n,) int64 bits in which the perceptual hash differs from the nearest of the pool; None without hashes.
        hash_nearest: (n,) int64 row id behind `bits`, -1 where there is none.
        unknown: Pool rows and test images without sha256 or perceptual hash: `pool_bytes`, `test_bytes` and, unless
            the audit does without hashes, `pool_hash`, `test_hash`.
        captions: None when the set has no captions of its own.
        tau: (n,) float64 thresholds, or None.
    """

    name: str
    test: EmbeddingSet
    metadata: pa.Table
    similarity: np.ndarray
    nearest: np.ndarray
    exact: np.ndarray
    bits: np.ndarray | None
    hash_nearest: np.ndarray
    unknown: dict[str, int]
    captions: Captions | None
    tau: np.ndarray | None

    @property
    def bytes_known(self) -> bool:
        """Whether both sides have all sha256: only then does "not found" mean "not there"."""
        return not self.unknown["pool_bytes"] and not self.unknown["test_bytes"]

    @property
    def hashes_known(self) -> bool:
        """Whether both sides have all perceptual hashes."""
        return self.bits is not None and not self.unknown["pool_hash"] and not self.unknown["test_hash"]


def targets(settings: AuditSettings, pool: EmbeddingSet) -> list[Target]:
    """Look for every test set in the pool.

    Raises:
        IndexMismatchError: If anything was embedded by another encoder than the pool.
        DataError: If an input is missing or belongs to another test set.
    """
    named = schema.named(settings.test, "--test")
    tests = {name: EmbeddingSet.open(uri) for name, uri in named.items()}
    for name, test in tests.items():
        check_same_encoder(pool.encoder, test.encoder, (f"pool {pool.uri}", f"test set {name}"))
    thresholds = _thresholds(settings, tests)
    rows = [test.all_images() for test in tests.values()]
    metadata = [test.all_metadata(COLUMNS) for test in tests.values()]
    ends = np.cumsum([len(block) for block in rows])[:-1]
    similarity, row_ids = nearest(np.concatenate(rows), _blocks(pool), 1)
    seen, pool_unknown = _seen_bytes(pool, metadata)
    bits, hash_rows = None, np.full(len(similarity), -1, np.int64)
    if settings.hash_bits >= 0:
        bits, hash_rows, pool_unknown["pool_hash"] = _hashes(pool, metadata)
    captions = _captions(pool, metadata)
    found = []
    for i, (name, test) in enumerate(tests.items()):
        exact = np.array([digest in seen for digest in metadata[i]["sha256"].to_pylist()], bool)
        own_bits = None if bits is None or "phash" not in metadata[i].column_names else np.split(bits, ends)[i]
        unknown = {**pool_unknown, "test_bytes": _num_unknown(metadata[i], "sha256")}
        if settings.hash_bits >= 0:
            unknown["test_hash"] = _num_unknown(metadata[i], "phash")
        found.append(
            Target(name, test, metadata[i], np.split(similarity[:, 0], ends)[i], np.split(row_ids[:, 0], ends)[i],
                   exact, own_bits, np.split(hash_rows, ends)[i], unknown, captions[i], thresholds.get(name))
        )  # fmt: skip
    return found


def _blocks(embeddings: EmbeddingSet) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for part in embeddings.parts:
        if part.num_rows:
            yield np.asarray(embeddings.images(part.number)), schema.row_ids(part.number, part.num_rows)


# --- bytes, hashes, captions -----------------------------------------------------------------------------


def _seen_bytes(pool: EmbeddingSet, metadata: list[pa.Table]) -> tuple[set[str], dict[str, int]]:
    """Return the image hashes of the test sets that occur in the pool, and how many of its rows have none."""
    wanted = pa.array(sorted({h for table in metadata for h in table["sha256"].to_pylist() if h}), pa.string())
    seen: set[str] = set()
    unknown = 0
    for part in pool.parts:
        table = pool.metadata(part.number, ["sha256"])
        unknown += _num_unknown(table, "sha256")
        seen.update(table["sha256"].filter(pc.is_in(table["sha256"], wanted)).to_pylist())
    return seen - {None, ""}, {"pool_bytes": unknown}


def _num_unknown(table: pa.Table, name: str) -> int:
    """Count rows that lack a value; imported embeddings have the sha256 ""."""
    if name not in table.column_names:
        return int(table.num_rows)
    column = table[name]
    return int(column.null_count + (pc.sum(pc.equal(column, "")).as_py() or 0 if name == "sha256" else 0))


def _hashes(pool: EmbeddingSet, metadata: list[pa.Table]) -> tuple[np.ndarray | None, np.ndarray, int]:
    """Return (n,) bits to the nearest hash of the pool over all test sets, its row ids, and pool rows without hash.

    The first is None where one side has no hashes at all.
    """
    own, mirrored = (
        np.concatenate([_integers(table, name) for table in metadata]) for name in ("phash", "phash_flipped")
    )
    unknown = 0

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal unknown
        for part in pool.parts:
            table = pool.metadata(part.number, ["row_id", "phash"])
            unknown += _num_unknown(table, "phash")
            yield _integers(table, "phash"), table["row_id"].to_numpy()

    bits, rows = phash.nearest_hashes(own, mirrored, blocks())
    none = unknown == pool.num_rows or not phash.telling(own).any()
    return None if none else bits, rows, unknown


def _integers(table: pa.Table, name: str) -> np.ndarray:
    """(n,) int64; 0, which tells nothing, where a value is not known."""
    if name not in table.column_names:
        return np.zeros(table.num_rows, np.int64)
    return np.array(table[name].fill_null(0).to_numpy(), np.int64)


def normalised(caption: str) -> str:
    """Put case, punctuation and spacing aside."""
    return " ".join(words(caption))


def _captions(pool: EmbeddingSet, metadata: list[pa.Table]) -> list[Captions | None]:
    """Look for the test sets' own captions in the pool, in one pass over its captions."""
    texts = [["" if text is None else text for text in table["caption"].to_pylist()] for table in metadata]
    own = [_own(lines, table["class_name"].to_pylist()) for lines, table in zip(texts, metadata, strict=True)]
    wanted = {line for lines, mask in zip(texts, own, strict=True) for line, ours in zip(lines, mask, strict=True)
              if ours}  # fmt: skip
    if not wanted:
        return [None] * len(metadata)
    plain = {normalised(line) for line in wanted}
    seen: set[str] = set()
    for part in pool.parts:
        column = pool.metadata(part.number, ["caption"]).column("caption").to_pylist()
        for line in column:
            if line and (line in wanted or normalised(line) in plain):
                seen.add(line)
    seen_plain = {normalised(line) for line in seen}
    return [
        Captions(
            mask,
            mask & np.array([line in seen for line in lines], bool),
            mask & np.array([normalised(line) in seen_plain for line in lines], bool),
        )
        if mask.any()
        else None
        for lines, mask in zip(texts, own, strict=True)
    ]


def _own(captions: list[str], class_names: list[str | None]) -> np.ndarray:
    """(n,) bool: a caption that no other image of the set has and that is no prompt around the class name."""
    plain = [normalised(text) for text in captions]
    counts: dict[str, int] = {}
    for text in plain:
        counts[text] = counts.get(text, 0) + 1
    names = [normalised(name or "") for name in class_names]
    return np.array(
        [bool(t) and counts[t] == 1 and not (n and t.endswith(n)) for t, n in zip(plain, names, strict=True)], bool
    )


# --- thresholds and files per test set -------------------------------------------------------------------


def _thresholds(settings: AuditSettings, tests: dict[str, EmbeddingSet]) -> dict[str, np.ndarray]:
    if settings.reference:
        reference = EmbeddingSet.open(settings.reference)
        for name, test in tests.items():
            check_same_encoder(reference.encoder, test.encoder, (f"reference {reference.uri}", f"test set {name}"))
        return {name: nearest(test.all_images(), _blocks(reference), 1)[0][:, 0] for name, test in tests.items()}
    files = per_test(settings.thresholds, settings, "--thresholds")
    return {name: _read_thresholds(uri, tests[name]) for name, uri in files.items()}


def _read_thresholds(uri: str, test: EmbeddingSet) -> np.ndarray:
    """Read (n,) tau in the order of the test set; marks in the file say which encoder and test set it is for."""
    table = store.read_table(uri)
    marks = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    expected = {"clipgap.encoder": store.digest(identity(test.encoder)), "clipgap.test": test.digest}
    for key, value in expected.items():
        if marks.get(key) != value:
            raise DataError(f"{uri}: {key} differs from that of {test.uri}", hint="make it with `clipgap score`")
    at = positions(test.all_metadata(["uid"])["uid"].to_pylist(), table["uid"].to_pylist())
    if (at < 0).any():
        raise DataError(f"{uri} lacks thresholds for {(at < 0).sum()} of {len(at)} images of {test.uri}")
    return np.asarray(table["tau"].to_numpy()[at])


def per_test(words: tuple[str, ...], settings: AuditSettings, what: str) -> dict[str, str]:
    """Read FILE (for the only test set) or NAME=FILE words.

    Raises:
        ConfigError: If a word names no test set, or it is not clear which it is for.
    """
    tests = list(schema.named(settings.test, "--test"))
    if len(words) == 1 and "=" not in words[0]:
        if len(tests) > 1:
            raise ConfigError(f"{what} {words[0]!r}: which of {tests} is it for?", hint=f"{what} {tests[0]}=FILE")
        return {tests[0]: words[0]}
    named = schema.named(words, what)
    unknown = sorted(set(named) - set(tests))
    if unknown:
        raise ConfigError(f"{what} names {unknown}, --test names {tests}")
    return named
