"""A stage's output directory: commit log, lease, guard of settings, summary, manifest. Any fsspec URI.

The unit of work is one part (one input shard). A stage writes the files of a part, then appends one record to
the directory's commit log: the record is the commit. What has no record does not exist and is written again.
The log is a folder of small JSON-lines segments, so it needs neither append nor rename (object stores have
neither); opening it lists one prefix and compacts it, so a resume at 41,408 shards reads one file.

    DIR/settings.json   what the directory was written with; other settings are refused
    DIR/lease           the driver that writes here now (`lease`)
    DIR/parts.json      shard name -> part number, given at first sight and never changed
    DIR/commits/*.jsonl one record per committed part: rows, sha256 of files, counts
    DIR/manifest.json   provenance, written when the stage is complete
    DIR/summary.json    counts: read = kept + dropped by reason

Rejected: marker files per part (41,408 requests at each resume) and Ray Data's row checkpoints (they re-read
every shard and know nothing of appended ones).
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass, field
from typing import Any, Self

from clipgap_ray import __version__, store, worker_memory
from clipgap_ray.errors import DataError, StaleOutputError
from clipgap_ray.lease import Lease

COMPACT_ABOVE = 64
READ_ATTEMPTS = 5


class CommitLog:
    """Committed parts of a directory: `{part: record}` in memory, JSON-lines segments on disk.

    Only the directory's one driver (see `Lease`) writes; records are small (counts and hashes).
    """

    def __init__(self, uri: str) -> None:
        self.uri = store.join(uri, "commits")
        self.records: dict[int, dict[str, Any]] = {}
        self._segments: list[str] = []
        for attempt in range(READ_ATTEMPTS):
            try:
                self._read()
                break
            except DataError:  # the driver compacted between our listing and our reading
                if attempt == READ_ATTEMPTS - 1:
                    raise
        self._next = 1 + max((int(name.split("-")[1][:8]) for name in self._segments), default=-1)

    def _read(self) -> None:
        self._segments = [name for name in store.list_names(self.uri) if name.endswith(".jsonl")]
        self.records = {}
        for name in self._segments:
            for line in store.read_bytes(store.join(self.uri, name)).splitlines():
                record = json.loads(line)
                self.records[record["part"]] = record

    def append(self, records: list[dict[str, Any]]) -> None:
        """Commit parts: one new segment, whole or absent. Each record needs an int `part`."""
        if not records:
            return
        name = f"log-{self._next:08d}.jsonl"
        store.write_bytes(store.join(self.uri, name), b"".join(json.dumps(r).encode() + b"\n" for r in records))
        self._next += 1
        self._segments.append(name)
        self.records.update({record["part"]: record for record in records})
        # In proportion to the records: a run of 41,408 commits leaves hundreds of segments, and rewrites 1 GB in all.
        if len(self._segments) > COMPACT_ABOVE + len(self.records) // COMPACT_ABOVE:
            self.compact()

    def compact(self) -> None:
        """Fold many segments into one; the new one is complete before the old ones go."""
        if len(self._segments) <= COMPACT_ABOVE:
            return
        old = self._segments
        self._segments = []
        self.append([self.records[part] for part in sorted(self.records)])
        for name in old:
            store.remove(store.join(self.uri, name))


def assign_parts(uri: str, shards: list[str]) -> dict[str, int]:
    """Give every shard its part number; numbers given earlier stay, new shards take the next ones in order.

    Args:
        uri: The run directory; `parts.json` in it is read and, if anything is new, rewritten.
        shards: Shard names in source order; a name may not repeat.

    Returns:
        Part numbers of these shards, in the order of `shards`.
    """
    path = store.join(uri, "parts.json")
    known: dict[str, int] = store.read_json(path) if store.exists(path) else {}
    new = [shard for shard in shards if shard not in known]
    if len(set(new)) != len(new):
        raise DataError(f"the sources name a shard twice: {next(s for s in new if new.count(s) > 1)}")
    first = 1 + max(known.values(), default=-1)
    known.update({shard: first + i for i, shard in enumerate(new)})
    if new:
        store.write_json(path, known)
    return {shard: known[shard] for shard in shards}


def guard(uri: str, settings: dict[str, Any]) -> None:
    """Remember the settings a directory is written with; refuse others.

    Args:
        uri: The run directory; `settings.json` is written at first sight.
        settings: Everything that changes the output (not workers, devices or progress).

    Raises:
        StaleOutputError: With every difference, when the directory was written with other settings.
    """
    path = store.join(uri, "settings.json")
    settings = json.loads(json.dumps(settings, default=str))
    if not store.exists(path):
        store.write_json(path, settings)
        return
    before = store.read_json(path)
    changed = [
        f"{key} was {before.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted(before.keys() | settings.keys())
        if before.get(key) != settings.get(key)
    ]
    if changed:
        raise StaleOutputError(
            f"{uri} was written with other settings: " + "; ".join(changed),
            hint="choose another --out, or delete the directory to rebuild it",
        )


@dataclass
class Summary:
    """What a stage did, in numbers that reconcile: read = kept + the sum of dropped.

    `dropped` maps a reason to a count; `notes` counts kept but remarkable samples; `extra` is for the stage.
    """

    stage: str
    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    parts: int = 0
    parts_skipped: int = 0  # already committed by an earlier run
    seconds: float = 0.0
    working_seconds: float = 0.0  # of all commands that added parts and came to their end
    driver_bytes: int = 0  # most memory of the command's process, up to its end
    worker_bytes: int = 0  # most memory of one of Ray's workers on this machine; 0 where that cannot be seen
    extra: dict[str, Any] = field(default_factory=dict)

    def add(self, record: dict[str, Any]) -> None:
        """Add the counts of one commit record (keys `read`, `kept`, `dropped`, `notes`)."""
        self.read += record.get("read", 0)
        self.kept += record.get("kept", 0)
        self.parts += 1
        for name in ("dropped", "notes"):
            counts: dict[str, int] = getattr(self, name)
            for reason, count in record.get(name, {}).items():
                counts[reason] = counts.get(reason, 0) + count

    def check(self) -> None:
        """Raise DataError unless every row read is kept or dropped for a reason."""
        total = self.kept + sum(self.dropped.values())
        if self.read != total:
            raise DataError(f"{self.stage}: read {self.read} != kept {self.kept} + dropped {self.dropped} = {total}")

    @property
    def dropped_share(self) -> float:
        """Share of the rows read that were dropped, 0 when nothing was read."""
        return sum(self.dropped.values()) / self.read if self.read else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {
            "stage": self.stage,
            "read": self.read,
            "kept": self.kept,
            "dropped": self.dropped,
            "notes": self.notes,
            "parts": self.parts,
            "parts_skipped": self.parts_skipped,
            "seconds": round(self.seconds, 3),
            "working_seconds": round(self.working_seconds, 3),
            **({"driver_bytes": self.driver_bytes} if self.driver_bytes else {}),
            **({"worker_bytes": self.worker_bytes} if self.worker_bytes else {}),
            **self.extra,
        }


class RunDirectory:
    """A stage's output directory while the stage writes it: lease, guard, commit log, summary, manifest.

    Use as a context manager. What is committed survives anything; a second run sees it in `log.records`.
    """

    def __init__(self, uri: str, stage: str, settings: dict[str, Any]) -> None:
        self.uri = uri.rstrip("/")
        self.stage = stage
        self.settings = settings
        self.summary = Summary(stage)
        self._lease = Lease(self.uri)

    def __enter__(self) -> Self:
        self._lease.__enter__()
        try:
            guard(self.uri, {"stage": self.stage, **self.settings})
            store.remove_leftovers(self.uri)
            self.log = CommitLog(self.uri)
            self.log.compact()
        except BaseException:
            self._lease.__exit__()
            raise
        self.summary.parts_skipped = len(self.log.records)
        worker_memory.watch.forget()
        self._started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._lease.__exit__()

    def path(self, *names: str) -> str:
        """Return the URI of a file in the directory."""
        return store.join(self.uri, *names)

    def finish(self, manifest: dict[str, Any], **extra: Any) -> Summary:
        """Write manifest and summary; the stage is complete.

        Args:
            manifest: Provenance: inputs by hash, encoder, and whatever readers need.
            extra: Further fields of the summary.

        Raises:
            DataError: If the counts of the commit records do not reconcile.
        """
        skipped = self.summary.parts_skipped
        self.summary = Summary(self.stage, parts_skipped=skipped, seconds=time.monotonic() - self._started)
        for part in sorted(self.log.records):
            self.summary.add(self.log.records[part])
        self.summary.extra.update(extra)
        self.summary.check()
        path = self.path("summary.json")
        before = store.read_json(path) if store.exists(path) else {}
        idle = skipped > 0 and skipped == self.summary.parts
        self.summary.working_seconds = before.get("working_seconds", 0.0) + (0.0 if idle else self.summary.seconds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.summary.driver_bytes = max(before.get("driver_bytes", 0), 0 if idle else peak)
        self.summary.worker_bytes = max(before.get("worker_bytes", 0), 0 if idle else worker_memory.watch.most())
        self.log.compact()
        content = store.digest([self.log.records[part].get("files", {}) for part in sorted(self.log.records)])
        manifest = {
            "stage": self.stage,
            "version": __version__,
            "settings": self.settings,
            "digest": content,
            **manifest,
        }
        store.write_json(self.path("manifest.json"), manifest)
        store.write_json(path, self.summary.as_dict())
        return self.summary


def read_manifest(uri: str, stage: str) -> dict[str, Any]:
    """Read a complete directory's manifest.

    Args:
        uri: The run directory.
        stage: The stage that must have written it.

    Raises:
        DataError: If the directory has no manifest, or another stage wrote it.
    """
    path = store.join(uri, "manifest.json")
    if not store.exists(path):
        state = (
            "is not complete"
            if store.exists(store.join(uri, "settings.json"))
            else "does not exist or is of another tool"
        )
        raise DataError(f"{uri}: expected the output of `clipgap {stage}`, but it {state}", hint=_remedy(stage))
    manifest: dict[str, Any] = store.read_json(path)
    if manifest.get("stage") != stage:
        raise DataError(
            f"{uri} is the output of `clipgap {manifest.get('stage')}`, expected that of `clipgap {stage}`",
            hint=_remedy(stage),
        )
    return manifest


def _remedy(stage: str) -> str:
    return f"run `clipgap {stage} ... --out DIR` first, or correct the path"
