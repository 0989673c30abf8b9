"""Copy a split's samples into new tars: DataComp's resharded layout, bytes unchanged, the same bytes at every run.

Two passes. The first reads headers, json and captions of every input tar (images only when a blocklist names
sha256) and keeps, for the samples of the split, where their members lie. From the counts follows which samples go
into which output tar: source order, `shard_size` each. The second copies byte ranges, one task per output tar.

A sample's stem in the output is `{uid}-{copy}`, as DataComp's resharder writes it: copy 0 is the first sample of that
uid in source order, copy 1 the next. So no stem repeats, whatever stems the input tars share; suffixes keep their
spelling. A uid that is hashed from the sample's place (no json uid, no url with caption) cannot be found again in
the new place: hence `write_uid`, and a warning without it.

Reads: tars. Writes: DIR/00000000.tar, 00000000_stats.json ({"successes": n}), sizes.json, meta.json, sample_ids.npy
(the uids that are in the tars), missing_ids.npy (uids of the split that the source lacks, if any), DIR/index/.
Unit of restart: the input tar in the first pass, the output tar in the second. Memory: the split at 16 bytes per uid,
one more in the driver; a task holds one member.
Rejected: one streaming pass like the resharder's (an output tar would depend on the number of workers).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from clipgap_ray import blocklist, idlists, rundir, schema, store
from clipgap_ray.config.export import ExportSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import subsets
from clipgap_ray.shards import Sample, read_shard
from clipgap_ray.sources import Shard, list_shards
from clipgap_ray.stages.session import Progress, bounded, connect, logger

SHARD_FORMAT = "{:08d}.tar"
STATS_FORMAT = "{:08d}_stats.json"
EXIT_MISSING = 3
TASK_CPUS = 0.5  # copying waits for disks and networks

# index/samples/part-00000.parquet: the samples of one input tar that are in the split, in the order of the tar.
INDEX = pa.schema(
    [
        ("position", pa.int64()),  # of the uid in the split
        ("uid", pa.string()),
        ("key", pa.string()),
        ("reason", pa.string()),  # "" = exported, else why not
        ("has_uid", pa.bool_()),  # the json says the uid
        ("suffixes", pa.list_(pa.string())),
        ("offsets", pa.list_(pa.int64())),
        ("sizes", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True)
class Slice:
    """A run of exported samples of one input tar: rows `start` to `stop` of its index, and which are second copies."""

    part: int
    uri: str
    num_bytes: int  # of the tar when it was indexed
    start: int
    stop: int
    copies: dict[int, int] = field(default_factory=dict)  # row -> copy number, where it is not 0


def run(settings: ExportSettings) -> rundir.Summary:
    """Export a split. Running again continues.

    Raises:
        ConfigError: If the source is not tars, or lies in the output directory.
        DataError: If none of the split's uids is in the source, or an input tar changed between the passes.
        StaleOutputError: If `out` was written with another split, source, blocklist or flag.
    """
    shards = _tars(settings)
    split = idlists.read_subset(settings.split)
    blocked = blocklist.read(settings.blocklist) if settings.blocklist else None
    inputs = {
        "source": settings.source,
        "shards": store.digest([shard.name for shard in shards]),
        "split": store.sha256(store.read_bytes(settings.split)),
        "blocklist": blocked and blocked.describe(),
    }
    guarded = {**inputs, "shard_size": settings.shard_size, "write_uid": settings.write_uid}
    with rundir.RunDirectory(settings.out, "export", guarded) as directory:
        records = _index(directory.path("index"), shards, split, blocked, inputs, settings.workers)
        places = Placement(directory.path("index"), shards, records, split)
        _announce(settings, places, records)
        _copy(directory, places.outputs(settings.shard_size), settings)
        return _finish(directory, settings, places, records)


def _tars(settings: ExportSettings) -> list[Shard]:
    shards = list_shards(settings.source)
    other = next((shard for shard in shards if shard.kind != "tar"), None)
    if other is not None:
        raise ConfigError(
            f"{other.uri} is a {other.kind} shard: export copies the members of tars as they are",
            hint="export from the tars; for parquet and folders train on the split where the images lie (--split)",
        )
    inside = next((shard for shard in shards if shard.uri.startswith(settings.out.rstrip("/") + "/")), None)
    if inside is not None:
        raise ConfigError(f"{inside.uri} is part of the source and lies in --out", hint="choose another --out")
    return shards


# --- first pass: where the samples of the split lie ------------------------------------------------------


def _index(
    uri: str,
    shards: list[Shard],
    split: np.ndarray,
    blocked: blocklist.Blocklist | None,
    inputs: dict[str, Any],
    workers: int,
) -> dict[int, dict[str, Any]]:
    """Index every input tar; return the commit record of each part."""
    with rundir.RunDirectory(uri, "export-index", inputs) as directory:
        parts = rundir.assign_parts(directory.uri, [shard.name for shard in shards])
        todo = [shard for shard in shards if parts[shard.name] not in directory.log.records]
        if todo:
            connect()
            shared = ray.put((np.asarray(split), blocked))  # one copy per node, read in place
            task = ray.remote(num_cpus=TASK_CPUS)(_index_shard)
            progress = Progress("export: index", len(shards), "shards", done=len(shards) - len(todo))
            submit = lambda shard: task.remote(directory.uri, parts[shard.name], shard, shared)  # noqa: E731
            for record in bounded(submit, todo, workers):
                directory.log.append([record])
                progress.advance(rows=record["read"])
            progress.close()
        directory.finish(inputs)
        return directory.log.records


def _index_shard(
    uri: str, part: int, shard: Shard, shared: tuple[np.ndarray, blocklist.Blocklist | None]
) -> dict[str, Any]:
    """Write the index of one input tar; returns its commit record."""
    split, blocked = shared
    wants_sha = blocked is not None and len(blocked.sha256) > 0
    samples: list[Sample] = []
    reasons: list[str] = []
    dropped: dict[str, int] = {}
    for item in read_shard(shard, images=wants_sha):
        if isinstance(item, Sample):
            sha256 = item.sha256 if wants_sha else ""
            reasons.append(blocked.reason(item.uid, sha256, item.url) if blocked else "")
            item.image = b""
            samples.append(item)
        elif item.is_sample:
            dropped[item.reason] = dropped.get(item.reason, 0) + 1
    uids = schema.pack_uids([sample.uid for sample in samples])
    positions = subsets.find(split, uids)
    rows = [
        _index_row(sample, at, reason)
        for sample, at, reason in zip(samples, positions.tolist(), reasons, strict=True)
        if at >= 0
    ]
    for reason in (row["reason"] for row in rows if row["reason"]):
        dropped[reason] = dropped.get(reason, 0) + 1
    if len(rows) < len(samples):
        dropped["not_in_split"] = len(samples) - len(rows)
    data = store.table_bytes(pa.Table.from_pylist(rows, schema=INDEX))
    store.write_bytes(store.join(uri, _index_file(part)), data)
    kept = sum(not row["reason"] for row in rows)
    return {
        "part": part,
        "read": kept + sum(dropped.values()),
        "kept": kept,
        "dropped": dropped,
        "without_uid": sum(not row["has_uid"] and not row["reason"] for row in rows),
        "bytes": store.size(shard.uri),
        "files": {"samples": store.sha256(data)},
    }


def _index_row(sample: Sample, position: int, reason: str) -> dict[str, Any]:
    return {
        "position": position,
        "uid": sample.uid,
        "key": sample.key,
        "reason": reason,
        "has_uid": str(sample.fields.get("uid", "")).lower() == sample.uid,
        "suffixes": [member.suffix for member in sample.members],
        "offsets": [member.offset for member in sample.members],
        "sizes": [member.size for member in sample.members],
    }


def _index_file(part: int) -> str:
    return f"samples/part-{part:05d}.parquet"


# --- from counts to places -------------------------------------------------------------------------------


class Placement:
    """Which sample goes where: source order, cut into output tars; copies of a uid numbered in that order.

    Attributes:
        found: (u,) bool, uids of the split with at least one exported sample.
        blocked: (u,) bool, uids of the split with none, because of the blocklist.
        num_rows: Exported samples.
        num_copies: Exported samples beyond the first of their uid.
    """

    def __init__(self, uri: str, shards: list[Shard], records: dict[int, dict[str, Any]], split: np.ndarray) -> None:
        self._shards = shards  # part numbers are positions: the guard holds the list of shards fixed
        self._records = records
        self.found = np.zeros(len(split), bool)
        self.blocked = np.zeros(len(split), bool)
        self._copies: dict[int, dict[int, int]] = {}
        copies_of: dict[int, int] = {}  # only of uids that repeat
        for part in range(len(shards)):
            table = store.read_table(store.join(uri, _index_file(part)), ["position", "reason"])
            position = table.column("position").to_numpy()
            stays = np.array([not reason for reason in table.column("reason").to_pylist()], bool)
            self.blocked[position[~stays]] = True
            position = position[stays]
            first = np.zeros(len(position), bool)
            first[np.unique(position, return_index=True)[1]] = True
            again = np.nonzero(~(first & ~self.found[position]))[0]
            self.found[position] = True
            for row in again.tolist():
                at = int(position[row])
                copies_of[at] = copies_of.get(at, 0) + 1
                self._copies.setdefault(part, {})[row] = copies_of[at]
        self.blocked &= ~self.found
        self.num_rows = sum(record["kept"] for record in records.values())
        self.num_copies = sum(copies_of.values())

    def outputs(self, shard_size: int) -> list[list[Slice]]:
        """Return the slices of every output tar, in order."""
        outputs: list[list[Slice]] = []
        room = 0
        for part, shard in enumerate(self._shards):
            start, kept = 0, self._records[part]["kept"]
            while start < kept:
                if room == 0:
                    outputs.append([])
                    room = shard_size
                stop = min(kept, start + room)
                copies = {row: n for row, n in self._copies.get(part, {}).items() if start <= row < stop}
                outputs[-1].append(Slice(part, shard.uri, self._records[part]["bytes"], start, stop, copies))
                room -= stop - start
                start = stop
        return outputs


def _announce(settings: ExportSettings, places: Placement, records: dict[int, dict[str, Any]]) -> None:
    num_uids, num_found, num_blocked = len(places.found), int(places.found.sum()), int(places.blocked.sum())
    if not num_found:
        raise DataError(
            f"split {settings.split}: {num_found} of its {num_uids} uids can be exported from {settings.source}"
            f" (coverage 0 %, {num_blocked} blocked)",
            hint="export from the shards that the split's pool was embedded from",
        )
    logger.info(
        "export %s: %d of %d uids in the source, %d missing, %d blocked; %d samples (%d further copies of a uid)",
        settings.split, num_found, num_uids, num_uids - num_found - num_blocked, num_blocked, places.num_rows,
        places.num_copies,
    )  # fmt: skip
    without = sum(record["without_uid"] for record in records.values())
    if without and settings.write_uid:
        logger.info("export: writing the uid into the json of %d samples that lack it", without)
    elif without:
        logger.warning(
            "export: %d samples have no uid in their json: DataComp's tools, and this split, will not find them in %s\n"
            "hint: --write-uid adds it (and changes the bytes of that member)",
            without, settings.out,
        )  # fmt: skip


# --- second pass: copy -----------------------------------------------------------------------------------


def _copy(directory: rundir.RunDirectory, outputs: list[list[Slice]], settings: ExportSettings) -> None:
    todo = [number for number in range(len(outputs)) if number not in directory.log.records]
    if not todo:
        return
    connect()
    task = ray.remote(num_cpus=TASK_CPUS)(_write_shard)
    progress = Progress("export", len(outputs), "shards", done=len(outputs) - len(todo))
    submit = lambda number: task.remote(directory.uri, number, outputs[number], settings.write_uid)  # noqa: E731
    for record in bounded(submit, todo, settings.workers):
        directory.log.append([record])
        progress.advance(rows=record["kept"])
    progress.close()


def _write_shard(uri: str, number: int, slices: list[Slice], write_uid: bool) -> dict[str, Any]:
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
    table = store.read_table(store.join(uri, "index", _index_file(piece.part)))
    exported = table.filter(pc.equal(table.column("reason"), ""))
    rows = exported.slice(piece.start, piece.stop - piece.start).to_pylist()
    fs, path = store.filesystem(piece.uri)
    if (size := store.size(piece.uri)) != piece.num_bytes:
        raise DataError(
            f"{piece.uri} has {size} bytes, but had {piece.num_bytes} when it was indexed",
            hint="the source changed meanwhile: export into another --out",
        )
    with fs.open(path, "rb") as file:
        for number, row in enumerate(rows, piece.start):
            members = list(zip(row["suffixes"], _read(file, row, piece.uri), strict=True))
            if write_uid and not row["has_uid"]:
                members = _with_uid(members, row["uid"], notes)
            yield f"{row['uid']}-{piece.copies.get(number, 0)}", members


def _read(file: IO[bytes], row: dict[str, Any], uri: str) -> Iterator[bytes]:
    for offset, size in zip(row["offsets"], row["sizes"], strict=True):
        file.seek(offset)
        data = file.read(size)
        if len(data) != size:
            raise DataError(f"{uri}: {len(data)} of {size} bytes at {offset} for sample {row['key']}")
        yield data


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


# --- the directory as a whole ----------------------------------------------------------------------------


def _finish(
    directory: rundir.RunDirectory, settings: ExportSettings, places: Placement, records: dict[int, dict[str, Any]]
) -> rundir.Summary:
    """Check the counts, write what DataComp's tools read beside the tars, and close the directory."""
    sizes = {SHARD_FORMAT.format(n): directory.log.records[n]["kept"] for n in sorted(directory.log.records)}
    if sum(sizes.values()) != places.num_rows:
        raise DataError(f"{settings.out}: wrote {sum(sizes.values())} samples, the index holds {places.num_rows}")
    split = idlists.read_subset(settings.split)
    missing = split[~places.found & ~places.blocked]
    seen = rundir.Summary("export-index")
    for part in sorted(records):
        seen.add(records[part])
    seen.check()
    store.write_json(directory.path("sizes.json"), sizes)
    store.write_bytes(directory.path("sample_ids.npy"), store.array_bytes(split[places.found]))
    if len(missing):
        store.write_bytes(directory.path("missing_ids.npy"), store.array_bytes(missing))
    store.write_json(directory.path("meta.json"), _meta(settings, len(sizes), places.num_rows, seen.read))
    coverage = {
        "uids": len(split),
        "found": int(places.found.sum()),
        "missing": len(missing),
        "blocked": int(places.blocked.sum()),
        "copies": places.num_copies,
    }
    exit_code = {"exit_code": EXIT_MISSING} if len(missing) > settings.max_missing_fraction * len(split) else {}
    return directory.finish(
        {"source": settings.source, "split": settings.split, "coverage": coverage},
        # The stage reads the source: its counts stand for those of the output tars, which are all kept.
        read=seen.read,
        dropped=seen.dropped,
        coverage=coverage,
        shards=len(sizes),
        **exit_code,
    )


def _meta(settings: ExportSettings, num_shards: int, num_samples: int, num_read: int) -> dict[str, Any]:
    """The fields of the resharder's meta.json that say what was done (its arguments are texts there); no times, no
    directories of the run, so that two exports of one split are equal."""
    return {
        "input_dir": settings.source,
        "subset_file": settings.split,
        "shard_size": str(settings.shard_size),
        "output_shard_format": SHARD_FORMAT,
        "output_shard_stats_format": STATS_FORMAT,
        "shard_table": "sizes.json",
        "write_uid": str(settings.write_uid),
        "blocklist": settings.blocklist or "None",
        "processed_count": num_read,
        "output_count": num_samples,
        "output_shard_count": num_shards,
    }
