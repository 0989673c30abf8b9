"""What an audit knows of every test set: nearest pool rows, equal bytes, perceptual hashes, captions, thresholds.

All test sets are looked for in one pass over the pool (`audit_pass`), and in one over the reference; memory holds the
test sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clipgap_ray import schema, store
from clipgap_ray.config.audit import AuditSettings
from clipgap_ray.embeddings import EmbeddingSet, check_same_encoder, identity
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import phash
from clipgap_ray.reporting.study import positions
from clipgap_ray.stages import audit_pass
from clipgap_ray.stages.audit_pass import Sought, integers, normalised, num_unknown

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
    captions = [_own_captions(table) for table in metadata]
    sought = Sought(
        np.concatenate(rows),
        frozenset(digest for table in metadata for digest in table["sha256"].to_pylist() if digest),
        _own_hashes(metadata) if settings.hash_bits >= 0 else None,
        frozenset(line for own in captions for line in own if line),
    )
    seen = audit_pass.look(pool, sought, "audit")
    pool_unknown = {"pool_bytes": seen.unknown_bytes}
    bits = None
    if sought.hashes is not None:
        pool_unknown["pool_hash"] = seen.unknown_hashes
        none = seen.unknown_hashes == pool.num_rows or not phash.telling(sought.hashes[0]).any()
        bits = None if none else seen.bits
    found = []
    for i, (name, test) in enumerate(tests.items()):
        exact = np.array([digest in seen.digests for digest in metadata[i]["sha256"].to_pylist()], bool)
        own_bits = None if bits is None or "phash" not in metadata[i].column_names else np.split(bits, ends)[i]
        unknown = {**pool_unknown, "test_bytes": num_unknown(metadata[i], "sha256")}
        if settings.hash_bits >= 0:
            unknown["test_hash"] = num_unknown(metadata[i], "phash")
        found.append(
            Target(name, test, metadata[i], np.split(seen.similarity, ends)[i], np.split(seen.nearest, ends)[i],
                   exact, own_bits, np.split(seen.hash_nearest, ends)[i], unknown,
                   _captions(captions[i], seen.captions), thresholds.get(name))
        )  # fmt: skip
    return found


def _own_hashes(metadata: list[pa.Table]) -> tuple[np.ndarray, np.ndarray]:
    """(q,) int64 perceptual hashes of all test images, and of their mirror images."""
    own, mirrored = (
        np.concatenate([integers(table, name) for table in metadata]) for name in ("phash", "phash_flipped")
    )
    return own, mirrored


# --- captions --------------------------------------------------------------------------------------------


def _own_captions(table: pa.Table) -> list[str]:
    """n captions of a test set, "" where an image has none of its own."""
    texts = ["" if text is None else text for text in table["caption"].to_pylist()]
    own = _own(texts, table["class_name"].to_pylist())
    return [text if ours else "" for text, ours in zip(texts, own.tolist(), strict=True)]


def _captions(own: list[str], seen: frozenset[str]) -> Captions | None:
    """Which of n own captions are among those of the pool that equal a sought one; None without own captions."""
    if not any(own):
        return None
    plain = {normalised(line) for line in seen}
    return Captions(
        np.array([bool(line) for line in own], bool),
        np.array([bool(line) and line in seen for line in own], bool),
        np.array([bool(line) and normalised(line) in plain for line in own], bool),
    )


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
        rows = [test.all_images() for test in tests.values()]
        tau = audit_pass.look(reference, Sought(np.concatenate(rows)), "reference").similarity
        return dict(zip(tests, np.split(tau, np.cumsum([len(block) for block in rows])[:-1]), strict=True))
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
