"""Read webdataset tars, parquet of images and folders of images; account for every sample in them.

A shard is read in two passes over one local file: the tar's headers first (seeks, no data), then the members.
So members of a sample need not be neighbours, keys may repeat, and the byte range of every image is known for
galleries and training. Remote shards are copied to a temporary file first: one code path, a cut connection
resumes inside the copy, and a read task holds one shard on disk and one sample in memory.

Nothing vanishes: whatever cannot become a `Sample` becomes a `Skip`, with the shard, the key and a reason.

Rejected: Ray's `read_webdataset` (raises on non-contiguous keys, knows no jpeg or webp, loses a whole task over
one bad member) and webdataset's own iterator (drops silently).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipgap_ray import filesystems, schema, store
from clipgap_ray.errors import DataError, StorageError
from clipgap_ray.sources import IMAGE_SUFFIXES, Shard, list_shards, suffix_of
from clipgap_ray.tars import Member, Members, Skip, index_tar

CAPTION_FIELDS = ("caption", "text", "TEXT")
URL_FIELDS = ("url", "URL")
_COPY_BLOCK_BYTES = 8 << 20
_PARQUET_BATCH_ROWS = 256


@dataclass
class Sample:
    """One image with what came beside it. `image` holds the encoded bytes, not pixels.

    `members` are all files of the sample, in the order of its tar, for those who copy or count them.
    """

    key: str
    uid: str
    image: bytes
    caption: str | None = None
    url: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    label: int = -1
    class_name: str = ""
    group: str = ""
    offset: int = -1
    notes: tuple[str, ...] = ()
    members: tuple[Member, ...] = field(default=(), compare=False, repr=False)

    @functools.cached_property
    def sha256(self) -> str:
        """Hex sha256 of the encoded image."""
        return hashlib.sha256(self.image).hexdigest()


# --- identity --------------------------------------------------------------------------------------------


def uid_rule(fields: dict[str, Any], url: str | None, caption: str | None) -> str:
    """Return by which rule a sample gets its uid: "uid" (it has one), "url+caption" or "key"."""
    given = fields.get("uid")
    if isinstance(given, str) and schema.UID_TEXT.match(given):
        return "uid"
    return "url+caption" if url and caption else "key"


def sample_uid(fields: dict[str, Any], url: str | None, caption: str | None, shard: Shard, key: str) -> str:
    """Return a sample's uid by the first rule that applies (design 5.2).

    Args:
        fields: The sample's json or parquet fields; a `uid` of 32 hex characters wins.
        url: Source address; together with a caption it is hashed.
        caption: Caption, if any.
        shard: Where the sample lies. Without url and caption the uid is a hash of (source, shard base name, key),
            base names only, so that a pool that moves keeps its uids.
        key: webdataset key.

    Returns:
        32 hex characters.
    """
    rule = uid_rule(fields, url, caption)
    if rule == "uid":
        return str(fields["uid"]).lower()
    if rule == "url+caption":
        return _hash("url", str(url), str(caption))
    return _hash("key", shard.source, shard.name.rsplit("/", 1)[-1], key)


def _hash(*words: str) -> str:
    joined = "\0".join(words).encode()
    return hashlib.blake2b(joined, digest_size=16).hexdigest()


# --- reading ---------------------------------------------------------------------------------------------


def read_shard(shard: Shard, *, images: bool = True) -> Iterator[Sample | Skip]:
    """Yield every sample of a shard, or the reason why it cannot be one, in the order of the shard.

    Args:
        shard: A tar, a parquet file with a column of encoded images, or a folder of image files.
        images: False leaves `Sample.image` empty where images need not be read (tars): uids, captions and
            places alone, which costs a small part of the reading.

    Yields:
        `Sample` or `Skip`. A truncated tar gives the samples before the cut, then a Skip.
    """
    if shard.kind == "tar":
        with _local_file(shard.uri) as file:
            yield from _read_tar(file, shard, images)
    elif shard.kind == "parquet":
        with _local_file(shard.uri) as file:
            yield from _read_parquet(file, shard)
    else:
        yield from _read_folder(shard)


@contextlib.contextmanager
def _local_file(uri: str) -> Iterator[IO[bytes]]:
    """Open a shard as a local seekable file; a remote one is copied first, resuming where a connection broke."""
    if filesystems.is_local(uri):
        try:
            with open(filesystems.filesystem(uri)[1], "rb") as file:
                yield file
        except FileNotFoundError:
            raise DataError(f"shard {uri} does not exist") from None
        return
    size = store.size(uri)
    with tempfile.TemporaryFile(prefix="clipgap-shard-") as spool:
        while (done := spool.tell()) < size:
            # Every block is retried on its own, so a connection that breaks costs at most one block.
            block = store.read_bytes(uri, done, min(_COPY_BLOCK_BYTES, size - done))
            if not block:
                raise StorageError(f"{uri} ended at byte {done} of {size}: it was replaced while it was read")
            spool.write(block)
        spool.seek(0)
        yield spool


def _read_tar(file: IO[bytes], shard: Shard, images: bool) -> Iterator[Sample | Skip]:
    groups, problem = index_tar(file)
    if not groups and problem is None:
        yield Skip("", "empty_shard", "no members", is_sample=False)
    for members in groups:
        yield _assemble(file, members, shard, images)
    if problem is not None:
        yield problem


def _assemble(file: IO[bytes], members: Members, shard: Shard, images: bool) -> Sample | Skip:
    def read(suffix: str) -> bytes | None:
        if suffix not in members.ranges:
            return None
        member = members.ranges[suffix]
        file.seek(member.offset)
        return file.read(member.size)

    place = members.image()
    if place is None:
        return Skip(members.key, "no_image", f"members: {', '.join(sorted(members.ranges)) or 'none'}")
    image = b""
    if images:
        file.seek(place.offset)
        image = file.read(place.size)
    notes = []
    fields: dict[str, Any] = {}
    raw_json = read("json")
    if raw_json is not None:
        try:
            loaded = json.loads(raw_json)
            fields = loaded if isinstance(loaded, dict) else {}
        except ValueError:
            notes.append("bad_json")
    raw_text = read("txt")
    caption = raw_text.decode("utf-8", errors="replace") if raw_text is not None else _first(fields, CAPTION_FIELDS)
    if not caption:
        notes.append("missing_caption")
        caption = None
    if "#" in members.key:
        notes.append("repeated_key")
    if place.suffix not in IMAGE_SUFFIXES:
        notes.append("odd_suffix")
    raw_label = read("cls")
    try:
        label = int(raw_label) if raw_label is not None else -1
    except ValueError:
        return Skip(members.key, "bad_label", f"cls is {raw_label[:40]!r}, expected an integer" if raw_label else "")
    url = _first(fields, URL_FIELDS)
    uid = sample_uid(fields, url, caption, shard, members.key)
    inside = tuple(members.ranges.values())
    return Sample(
        members.key, uid, image, caption, url, fields, label, offset=place.offset, notes=tuple(notes), members=inside
    )


def _first(fields: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((fields[name] for name in names if isinstance(fields.get(name), str) and fields[name]), None)


def _read_parquet(file: IO[bytes], shard: Shard) -> Iterator[Sample | Skip]:
    """Rows with a column of encoded images: binary, or a struct with `bytes` (Hugging Face's image feature)."""
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        yield Skip("", "truncated_shard", f"not parquet: {error}", is_sample=False)
        return
    column = _image_column(parquet.schema_arrow)
    if column is None:
        raise DataError(
            f"{shard.uri} has no column of images: columns are {parquet.schema_arrow.names}",
            hint="expected a binary column named image, jpg, bytes or image_bytes",
        )
    position = 0
    for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
        for row in batch.to_pylist():
            image = row.pop(column)
            image = image.get("bytes") if isinstance(image, dict) else image
            key = str(row.get("key") or f"{position:09d}")
            position += 1
            if not image:
                yield Skip(key, "no_image", f"{column} is null")
                continue
            caption, url = _first(row, CAPTION_FIELDS), _first(row, URL_FIELDS)
            uid = sample_uid(row, url, caption, shard, key)
            label = row.get("label", row.get("cls", -1))
            notes = () if caption else ("missing_caption",)
            label = label if isinstance(label, int) else -1
            yield Sample(key, uid, image, caption, url, row, label, notes=notes, members=(Member(column),))


def _image_column(columns: pa.Schema) -> str | None:
    for name in ("image", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes"):
        if name in columns.names:
            kind = columns.field(name).type
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind):
                return name
    return None


def _read_folder(shard: Shard) -> Iterator[Sample | Skip]:
    """Image files of one folder (not of its sub-folders); a .txt of the same stem is the caption."""
    names = store.list_names(shard.uri)
    images = [name for name in names if suffix_of(name) in IMAGE_SUFFIXES]
    if not images:
        yield Skip("", "empty_shard", "no image files", is_sample=False)
    texts = {name for name in names if name.lower().endswith(".txt")}
    for name in images:
        key = f"{shard.name}/{name}"  # the full relative path: stems may collide (a.jpg beside a.png)
        image = store.read_bytes(store.join(shard.uri, name))
        text = name.rsplit(".", 1)[0] + ".txt"
        caption = store.read_bytes(store.join(shard.uri, text)).decode(errors="replace") if text in texts else None
        uid = sample_uid({}, None, None, shard, key)
        if not image:
            yield Skip(key, "no_image", "zero bytes")
            continue
        notes = () if caption else ("missing_caption",)
        members = tuple(Member(suffix_of(file)) for file in (name, *([text] if text in texts else [])))
        yield Sample(key, uid, image, caption, notes=notes, members=members)


def estimate_rows(shard: Shard) -> int:
    """Return about how many samples a shard holds, without reading its images.

    Exact for local tars (headers), parquet (footer), folders and manifests (listing). Of a remote tar the first 8 MB
    are read, and what is in them is scaled to its size.
    """
    if shard.kind == "manifest" and suffix_of(shard.uri) == "csv":
        return max(0, len(store.read_bytes(shard.uri).splitlines()) - 1)
    if shard.kind == "folder":
        return sum(suffix_of(name) in IMAGE_SUFFIXES for name in store.list_names(shard.uri))
    if shard.kind in ("parquet", "manifest"):
        return store.num_table_rows(shard.uri)
    if filesystems.is_local(shard.uri):
        with _local_file(shard.uri) as file:
            return sum(one.image() is not None for one in index_tar(file)[0])
    size = store.size(shard.uri)
    head = store.read_bytes(shard.uri, 0, min(size, _COPY_BLOCK_BYTES)) if size else b""
    starts = [one.image().offset for one in index_tar(io.BytesIO(head))[0] if one.image() is not None]  # type: ignore[union-attr]
    if len(head) == size or len(starts) < 2:
        return len(starts)
    return round(size * (len(starts) - 1) / (starts[-1] - starts[0]))


def write_tar(samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    """Write samples as a deterministic webdataset tar (mtime 0, owner 0, members in the order given).

    Args:
        samples: (key, {suffix: bytes}) in order.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


__all__ = [
    "IMAGE_SUFFIXES",
    "Member",
    "Sample",
    "Shard",
    "Skip",
    "estimate_rows",
    "list_shards",
    "read_shard",
    "sample_uid",
    "uid_rule",
    "write_tar",
]
