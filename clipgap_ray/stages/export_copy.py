"""The second pass of `export`: one output tar from byte ranges of tars, rows of parquet or files of folders.

See `export`. A slice of parquet is read from the shard's beginning; its row becomes an image, a caption and a json.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import warnings
from collections.abc import Iterator
from functools import partial
from typing import IO, Any

import pyarrow.compute as pc
from PIL import Image

from clipgap_ray import filesystems, store
from clipgap_ray.errors import DataError
from clipgap_ray.shards import Sample, read_shard
from clipgap_ray.stages.export_index import Slice, samples_file

Members = list[tuple[str, bytes]]  # (suffix, bytes) in order

SHARD_FORMAT = "{:08d}.tar"
STATS_FORMAT = "{:08d}_stats.json"
CHANGED = "the source changed meanwhile: export into another --out"


def write_shard(uri: str, number: int, slices: list[Slice], write_uid: bool) -> dict[str, Any]:
    """Write one output tar and its stats; returns the commit record."""
    count = 0
    notes: dict[str, int] = {}
    with store.atomic_file(store.join(uri, SHARD_FORMAT.format(number))) as file:
        hashing = _Hashing(file)
        with tarfile.open(fileobj=hashing, mode="w", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
            for piece in slices:
                for stem, members in _samples(uri, piece, write_uid, notes):
                    for suffix, data in members:
                        _add(tar, f"{stem}.{suffix}" if suffix else stem, data)
                    count += 1
    stats = json.dumps({"successes": count}).encode()
    store.write_bytes(store.join(uri, STATS_FORMAT.format(number)), stats)
    files = {"tar": hashing.hash.hexdigest(), "stats": store.sha256(stats)}
    return {"part": number, "read": count, "kept": count, "notes": notes, "files": files}


class _Hashing:
    """What tarfile needs of a file it writes, hashing what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member with a deterministic header: TarInfo's own mtime 0, owner 0, mode 0644."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _samples(uri: str, piece: Slice, write_uid: bool, notes: dict[str, int]) -> Iterator[tuple[str, Members]]:
    """Yield (stem, [(suffix, bytes), ...]) of a slice, in the order of the input shard."""
    table = store.read_table(store.join(uri, "index", samples_file(piece.part)))
    exported = table.filter(pc.equal(table.column("reason"), ""))
    rows = exported.slice(piece.start, piece.stop - piece.start).to_pylist()
    read = {"tar": _from_tar, "parquet": _from_parquet, "folder": _from_folder}[piece.shard.kind]
    for number, (row, members) in enumerate(zip(rows, read(piece, rows), strict=True), piece.start):
        if write_uid and not row["has_uid"]:
            members = _with_uid(members, row["uid"], notes)
        yield f"{row['uid']}-{piece.copies.get(number, 0)}", members


def _from_tar(piece: Slice, rows: list[dict[str, Any]]) -> Iterator[Members]:
    """Members in the order of the input tar."""
    _check_size(piece)
    uri = piece.shard.uri
    fs, path = filesystems.filesystem(uri)
    with filesystems.patiently(uri, lambda: fs.open(path, "rb")) as file:
        for row in rows:
            data = filesystems.patiently(uri, partial(_read, file, row, uri))
            yield list(zip(row["suffixes"], data, strict=True))


def _from_parquet(piece: Slice, rows: list[dict[str, Any]]) -> Iterator[Members]:
    """The image's bytes as they are; the caption as txt, all columns but those of bytes as json."""
    _check_size(piece)
    samples = (item for item in read_shard(piece.shard) if isinstance(item, Sample))
    numbered = enumerate(samples)
    for row in rows:
        sample = next((one for number, one in numbered if number == row["row"]), None)
        if sample is None or sample.uid != row["uid"]:
            raise DataError(f"{piece.shard.uri}: row {row['row']} is no longer {row['uid']}", hint=CHANGED)
        yield _row_members(sample)


def _row_members(sample: Sample) -> Members:
    members = [(_image_suffix(sample.image), sample.image)]
    if sample.caption:
        members.append(("txt", sample.caption.encode()))
    fields = {name: _plain(value) for name, value in sample.fields.items() if not isinstance(value, bytes)}
    return [*members, ("json", json.dumps(fields, default=str).encode())] if fields else members


def _plain(value: Any) -> Any:
    """What JSON can say of a value: it knows neither bytes nor NaN (null), and dates only as texts."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value)) else value


def _image_suffix(image: bytes) -> str:
    """The suffix by content; jpg for what nobody can open, which then is as broken as it was."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(image)) as picture:  # the header only
            kind = (picture.format or "jpeg").lower()
    except (OSError, ValueError, Image.DecompressionBombError):
        return "jpg"
    return "jpg" if kind == "jpeg" else kind


def _from_folder(piece: Slice, rows: list[dict[str, Any]]) -> Iterator[Members]:
    """The files of each sample: an image and, if it has one, its txt."""
    for row in rows:
        name = row["key"].rsplit("/", 1)[-1]
        files = [name, f"{name.rsplit('.', 1)[0]}.txt"][: len(row["suffixes"])]
        data = [store.read_bytes(store.join(piece.shard.uri, file)) for file in files]
        yield list(zip(row["suffixes"], data, strict=True))


def _check_size(piece: Slice) -> None:
    uri = piece.shard.uri
    if (size := store.size(uri)) != piece.num_bytes:
        raise DataError(
            f"{uri} has {size} bytes, but had {piece.num_bytes} when it was indexed",
            hint=CHANGED,
        )


def _read(file: IO[bytes], row: dict[str, Any], uri: str) -> list[bytes]:
    members = []
    for offset, size in zip(row["offsets"], row["sizes"], strict=True):
        file.seek(offset)
        data = file.read(size)
        if len(data) != size:
            raise DataError(f"{uri}: {len(data)} of {size} bytes at {offset} for sample {row['key']}")
        members.append(data)
    return members


def _with_uid(members: Members, uid: str, notes: dict[str, int]) -> Members:
    """Put the uid into the json member; add one where there is none or where it is no JSON object (counted)."""
    at = next((i for i, (suffix, _) in enumerate(members) if suffix.lower() == "json"), None)
    fields: dict[str, Any] = {}
    note = "uid_added"
    if at is not None:
        try:
            loaded = json.loads(members[at][1])
        except ValueError:
            loaded = None
        fields, note = (loaded, "uid_written") if isinstance(loaded, dict) else ({}, "bad_json_replaced")
    notes[note] = notes.get(note, 0) + 1
    member = (members[at][0] if at is not None else "json", json.dumps({**fields, "uid": uid}).encode())
    return [*members, member] if at is None else [*members[:at], member, *members[at + 1 :]]
