"""The second pass of `export`: one output tar from byte ranges of the input tars. See `export`."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from typing import IO, Any

import pyarrow.compute as pc

from clipgap_ray import filesystems, store
from clipgap_ray.errors import DataError
from clipgap_ray.stages.export_index import Slice, samples_file

SHARD_FORMAT = "{:08d}.tar"
STATS_FORMAT = "{:08d}_stats.json"


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


def _samples(
    uri: str, piece: Slice, write_uid: bool, notes: dict[str, int]
) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Yield (stem, [(suffix, bytes), ...]) of a slice, members in the order of the input tar."""
    table = store.read_table(store.join(uri, "index", samples_file(piece.part)))
    exported = table.filter(pc.equal(table.column("reason"), ""))
    rows = exported.slice(piece.start, piece.stop - piece.start).to_pylist()
    fs, path = filesystems.filesystem(piece.uri)
    if (size := store.size(piece.uri)) != piece.num_bytes:
        raise DataError(
            f"{piece.uri} has {size} bytes, but had {piece.num_bytes} when it was indexed",
            hint="the source changed meanwhile: export into another --out",
        )
    with filesystems.patiently(piece.uri, lambda: fs.open(path, "rb")) as file:
        for number, row in enumerate(rows, piece.start):
            data = filesystems.patiently(piece.uri, partial(_read, file, row, piece.uri))
            members = list(zip(row["suffixes"], data, strict=True))
            if write_uid and not row["has_uid"]:
                members = _with_uid(members, row["uid"], notes)
            yield f"{row['uid']}-{piece.copies.get(number, 0)}", members


def _read(file: IO[bytes], row: dict[str, Any], uri: str) -> list[bytes]:
    members = []
    for offset, size in zip(row["offsets"], row["sizes"], strict=True):
        file.seek(offset)
        data = file.read(size)
        if len(data) != size:
            raise DataError(f"{uri}: {len(data)} of {size} bytes at {offset} for sample {row['key']}")
        members.append(data)
    return members


def _with_uid(members: list[tuple[str, bytes]], uid: str, notes: dict[str, int]) -> list[tuple[str, bytes]]:
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
