"""Read and write a folder of embeddings: clip-retrieval's layout with provenance (design 5.3).

    EMB/img_emb/img_emb_00000.npy        float16 (n, d), unit rows
    EMB/text_emb/text_emb_00000.npy      float16 (n, d); zero rows where there is no caption
    EMB/metadata/metadata_00000.parquet  schema.METADATA, row i = row i
    EMB/ledger/ledger_00000.parquet      schema.LEDGER

One part per input shard. A part exists when the commit log says so; its record carries the sha256 of each file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa

from clipgap_ray import rundir, schema, store
from clipgap_ray.errors import ConfigError, DataError, IndexMismatchError

GROUP_BYTES = 1 << 30
METADATA_GROUP_ROWS = 1024  # what the service reads to say what one row is
# What makes two encoders the same notion of similarity; batch size and threads only change the last bits.
IDENTITY = ("model", "weights_sha256", "quick_gelu", "preprocess", "dim", "crop_border")
# In place of the hash where rows were imported: there were no weights to hash, names are all that can be compared.
AS_GIVEN = "as given: "


@dataclass(frozen=True)
class Part:
    """One committed part: its number, rows, shard name and the sha256 of its files."""

    number: int
    num_rows: int
    shard: str
    files: dict[str, str]


def part_file(kind: str, part: int) -> str:
    """Return the path of a part's file inside the folder; kind is img_emb, text_emb, metadata or ledger."""
    suffix = "npy" if kind.endswith("emb") else "parquet"
    return f"{kind}/{kind}_{part:05d}.{suffix}"


def write_part(
    uri: str,
    part: int,
    shard: str,
    images: np.ndarray,
    texts: np.ndarray | None,
    metadata: pa.Table,
    ledger: pa.Table,
    twins: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the files of one part and return its commit record (not yet committed).

    Args:
        uri: The folder.
        part: Part number.
        shard: Name of the input shard.
        images: (n, d) unit rows, stored as float16.
        texts: (n, d) likewise, zero rows where the caption is null; None writes no text file.
        metadata: n rows of `schema.METADATA`.
        ledger: Rows of `schema.LEDGER`; those with `dropped` count as read and dropped.
        twins: Files that may hold the same bytes already, by kind: they are linked instead of written.

    Returns:
        The record for `CommitLog.append`.
    """
    if images.shape[0] != metadata.num_rows or (texts is not None and texts.shape[0] != images.shape[0]):
        raise DataError(f"part {part}: {images.shape[0]} image rows beside {metadata.num_rows} metadata rows")
    contents = {
        "img_emb": store.array_bytes(np.ascontiguousarray(images, dtype=np.float16)),
        "metadata": store.table_bytes(metadata.cast(schema.METADATA), METADATA_GROUP_ROWS),
        "ledger": store.table_bytes(ledger.cast(schema.LEDGER)),
    }
    if texts is not None:
        contents["text_emb"] = store.array_bytes(np.ascontiguousarray(texts, dtype=np.float16))
    hashes = {kind: store.sha256(data) for kind, data in contents.items()}
    for kind, data in contents.items():
        target = store.join(uri, part_file(kind, part))
        twin = (twins or {}).get(kind)
        if twin is None or not store.link(twin, target, hashes[kind]):
            store.write_bytes(target, data)
    dropped, notes = _count(ledger)
    return {
        "part": part,
        "shard": shard,
        "rows": images.shape[0],
        "read": images.shape[0] + sum(dropped.values()),
        "kept": images.shape[0],
        "dropped": dropped,
        "notes": notes,
        "files": hashes,
    }


def _count(ledger: pa.Table) -> tuple[dict[str, int], dict[str, int]]:
    dropped: dict[str, int] = {}
    notes: dict[str, int] = {}
    for row in ledger.select(["reason", "dropped"]).to_pylist():
        counts = dropped if row["dropped"] else notes
        counts[row["reason"]] = counts.get(row["reason"], 0) + 1
    return dropped, notes


class EmbeddingSet:
    """A folder of embeddings, opened for reading.

    Attributes:
        uri: The folder.
        manifest: Provenance as written by `embed` or `import`.
        parts: Committed parts by rising number.
        dim: Dimension d.
        encoder: Fingerprint of the encoder.
        digest: sha256 over the files' hashes: the content's name.
    """

    def __init__(self, uri: str, manifest: dict[str, Any], parts: list[Part]) -> None:
        self.uri = uri.rstrip("/")
        self.manifest = manifest
        self.parts = parts
        self.encoder: dict[str, Any] = manifest["encoder"]
        self.dim = int(self.encoder["dim"])
        self.digest: str = manifest.get("digest", "")

    @classmethod
    def open(cls, uri: str) -> Self:
        """Open a complete folder.

        Raises:
            DataError: If the folder is missing, incomplete, empty or of another kind.
        """
        manifest = rundir.read_manifest(uri, "embed")
        log = rundir.CommitLog(uri)
        if not log.records:
            raise DataError(f"{uri} holds no embeddings: no part is committed", hint="run `clipgap embed` again")
        return cls(uri, manifest, [_part(log.records[number]) for number in sorted(log.records)])

    @classmethod
    def open_growing(cls, uri: str) -> tuple[Self, bool]:
        """Open a folder that `embed` may still be writing, as far as it is committed.

        Returns:
            The set, and whether no more parts will come.

        Raises:
            DataError: If no `embed` has begun to write there.
        """
        if not store.exists(store.join(uri, "encoder.json")):
            raise DataError(
                f"{uri} has no encoder.json: no `clipgap embed` has begun to write there",
                hint="start `clipgap embed` first, or correct the path",
            )
        # The manifest first: a part committed after this look is found by the next one.
        path = store.join(uri, "manifest.json")
        manifest = store.read_json(path) if store.exists(path) else None
        encoder = manifest["encoder"] if manifest else store.read_json(store.join(uri, "encoder.json"))
        records = _committed(uri)
        promised = {int(part) for part in manifest.get("shards", {})} if manifest else set()
        rows = cls(
            uri, {**(manifest or {}), "encoder": encoder}, [_part(records[number]) for number in sorted(records)]
        )
        return rows, manifest is not None and promised <= records.keys()

    @property
    def num_rows(self) -> int:
        """Rows in all parts."""
        return sum(part.num_rows for part in self.parts)

    def images(self, part: int) -> np.ndarray:
        """Return (n, d) float16 image rows of a part, memory-mapped when local."""
        return store.read_array(store.join(self.uri, part_file("img_emb", part)))

    def texts(self, part: int) -> np.ndarray:
        """Return (n, d) float16 text rows of a part; rows without caption are zero."""
        return store.read_array(store.join(self.uri, part_file("text_emb", part)))

    def metadata(self, part: int, columns: list[str] | None = None) -> pa.Table:
        """Return the metadata of a part, or some of its columns."""
        return store.read_table(store.join(self.uri, part_file("metadata", part)), columns)

    def metadata_columns(self) -> pa.Schema:
        """Return the columns of the metadata: what `embed` writes, and what somebody added (`punsafe`).

        Every part is taken to have those of the first one; without parts they are `embed`'s.
        """
        if not self.parts:
            return schema.METADATA
        return store.read_columns(store.join(self.uri, part_file("metadata", self.parts[0].number)))

    def metadata_groups(self, part: int) -> list[int]:
        """Return the first rows of a part's groups of metadata, which `metadata_group` reads alone."""
        return store.group_starts(store.join(self.uri, part_file("metadata", part)))

    def metadata_group(self, part: int, group: int, columns: list[str]) -> pa.Table:
        """Return some columns of one group of a part's metadata."""
        return store.read_group(store.join(self.uri, part_file("metadata", part)), group, columns)

    def image_bytes(self, part: int, facts: Mapping[str, Any]) -> bytes:
        """Read an encoded image by range.

        Args:
            part: Its part.
            facts: Of its metadata row `image_path`, `image_offset` and `image_bytes`.

        Raises:
            DataError: If the embeddings came without images, or the shard is gone.
        """
        shard = self.manifest.get("shards", {}).get(str(part))
        if shard is None:
            raise DataError(f"{self.uri} names no shard for part {part}: its images are not at hand")
        if (facts["image_offset"] or 0) >= 0:
            return store.read_bytes(shard, facts["image_offset"], facts["image_bytes"])
        return store.read_bytes(store.join(shard, facts["image_path"].rsplit("/", 1)[-1]))

    def all_images(self) -> np.ndarray:
        """Return (num_rows, d) float16 rows of all parts in order: for test sets, which fit in memory."""
        return np.concatenate([np.asarray(self.images(part.number)) for part in self.parts])

    def all_metadata(self, columns: list[str] | None = None) -> pa.Table:
        """Return the metadata of all parts in order; a column that older parts lack is null there."""
        tables = [self.metadata(part.number, columns) for part in self.parts]
        return pa.concat_tables(tables, promote_options="default")

    def uids_of(self, row_ids: np.ndarray) -> dict[int, str]:
        """Return the uids of some rows, reading only the parts they lie in; row ids below 0 are left out."""
        parts, positions = schema.split_row_ids(np.unique(row_ids[row_ids >= 0]))
        result: dict[int, str] = {}
        for part in np.unique(parts).tolist():
            inside = positions[parts == part]
            uids = self.metadata(part, ["uid"]).column("uid").take(pa.array(inside)).to_pylist()
            result.update(zip(((part << 32) | inside).tolist(), uids, strict=True))
        return result

    def groups(self, max_bytes: int = GROUP_BYTES) -> Iterator[list[Part]]:
        """Yield runs of neighbouring parts of about `max_bytes` of image rows: units of reading work."""
        group: list[Part] = []
        size = 0
        for part in self.parts:
            part_bytes = part.num_rows * self.dim * 2
            if group and size + part_bytes > max_bytes:
                yield group
                group, size = [], 0
            group.append(part)
            size += part_bytes
        if group:
            yield group


def _committed(uri: str) -> dict[int, dict[str, Any]]:
    """Read a commit log that its writer may be compacting: a segment may vanish after it was listed, its records
    are in a new one then."""
    try:
        return rundir.CommitLog(uri).records
    except DataError:
        return rundir.CommitLog(uri).records


def _part(record: dict[str, Any]) -> Part:
    return Part(record["part"], record["rows"], record["shard"], record["files"])


def identity(encoder: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a fingerprint that decide whether similarities are comparable.

    Fast decoding is left out: it is within the tolerance that `embed --decode` states.
    """
    values = {name: encoder.get(name) for name in IDENTITY}
    if isinstance(values["preprocess"], dict):
        values["preprocess"] = {name: v for name, v in values["preprocess"].items() if name != "shrink_to"}
    return values


def _names(encoder: dict[str, Any]) -> dict[str, Any]:
    """What the user can say of rows that somebody else made: weights by tag or file name."""
    pretrained = str(encoder.get("pretrained", "")).rstrip("/").rsplit("/", 1)[-1]
    return {"model": encoder.get("model"), "pretrained": pretrained, "dim": encoder.get("dim")}


def check_same_encoder(first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> None:
    """Refuse to compare rows of different encoders.

    Where one side was imported, model, weights and dimension are compared by name, else what was hashed.

    Args:
        first: Fingerprint of one side.
        second: Fingerprint of the other.
        names: What the two are, for the message.

    Raises:
        IndexMismatchError: Naming every field that differs.
    """
    by_name = any(str(side.get("weights_sha256")).startswith(AS_GIVEN) for side in (first, second))
    a, b = (_names(side) if by_name else identity(side) for side in (first, second))
    changed = [f"{name} is {a[name]!r} and {b[name]!r}" for name in a if a[name] != b[name]]
    if changed:
        raise IndexMismatchError(
            f"{names[0]} and {names[1]} were embedded by different encoders: " + "; ".join(changed),
            hint=f"embed both with the same --model and --pretrained ({first.get('model')}, {first.get('pretrained')})",
        )


def parse_part_range(text: str | None) -> tuple[int, int] | None:
    """Read `--shards 0:100` into (first, past-the-end); None stays None."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not colon or not (first or "0").isdigit() or not (last or "0").isdigit():
        raise ConfigError(f"--shards {text!r} is not FIRST:END", hint="for example --shards 0:100")
    bounds = int(first or 0), int(last or schema.MAX_ROWS_PER_PART)
    if bounds[0] >= bounds[1]:
        raise ConfigError(f"--shards {text!r} is empty: the end is not included")
    return bounds
