"""Commits survive crashes, one driver writes at a time, other settings are refused, counts reconcile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from clipgap_ray import filesystems, lease, rundir, store
from clipgap_ray.errors import DataError, LeaseError, StaleOutputError

LAION_PARTS = 41_408  # shards of LAION-400M
RESUME_LIMIT_S = 60.0  # design 2: a resume starts in under a minute ...
RESUME_LIMIT_BYTES = 500_000_000  # ... with under 500 MB in the driver


def record(part: int, value: int = 0) -> dict[str, Any]:
    return {"part": part, "read": 2, "kept": 1, "dropped": {"broken_image": 1}, "value": value}


def write_segments(folder: Path, records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """One segment per record, as appends leave them; returns what a reader must find."""
    (folder / "commits").mkdir()
    for number, row in enumerate(records):
        (folder / "commits" / f"log-{number:08d}.jsonl").write_text(json.dumps(row) + "\n")
    return {row["part"]: row for row in records}


def segments(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "commits"))


# --- commit log ------------------------------------------------------------------------------------------


def test_what_was_appended_is_read_again_and_the_last_record_of_a_part_wins(tmp_path: Path) -> None:
    log = rundir.CommitLog(str(tmp_path))
    assert log.records == {}
    log.append([])
    log.append([record(1), record(0)])
    log.append([record(1, value=7)])
    again = rundir.CommitLog(str(tmp_path))
    assert again.records == log.records == {0: record(0), 1: record(1, value=7)}
    again.append([record(2)])
    assert len(segments(tmp_path)) == 3  # an empty append wrote nothing, and no name was used twice


def test_many_segments_become_one_with_the_same_records(tmp_path: Path) -> None:
    before = write_segments(tmp_path, [record(part) for part in range(rundir.COMPACT_ABOVE + 1)])
    again = rundir.CommitLog(str(tmp_path))
    again.compact()
    assert len(segments(tmp_path)) == 1
    assert rundir.CommitLog(str(tmp_path)).records == before
    again.append([record(1_000)])
    assert set(rundir.CommitLog(str(tmp_path)).records) == {*range(rundir.COMPACT_ABOVE + 1), 1_000}


def test_few_segments_are_left_alone(tmp_path: Path) -> None:
    log = rundir.CommitLog(str(tmp_path))
    for part in range(rundir.COMPACT_ABOVE):
        log.append([record(part)])
    log.compact()
    assert len(segments(tmp_path)) == rundir.COMPACT_ABOVE


@pytest.mark.parametrize("deleted", [0, 1, 40])
def test_a_crash_while_compaction_deletes_old_segments_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: int
) -> None:
    # the first ten parts have two records each
    expected = write_segments(tmp_path, [record(part % 60, value=part) for part in range(70)])
    log = rundir.CommitLog(str(tmp_path))
    fs, _ = filesystems.filesystem(log.uri)
    left = [deleted]
    remove = fs.rm_file

    def crash(path: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        remove(path)

    monkeypatch.setattr(fs, "rm_file", crash, raising=False)
    monkeypatch.setattr(filesystems, "filesystem", lambda uri: (fs, uri))
    with pytest.raises(KeyboardInterrupt):
        log.compact()
    monkeypatch.undo()
    assert len(segments(tmp_path)) == 71 - deleted  # old and new stand side by side
    again = rundir.CommitLog(str(tmp_path))
    assert again.records == expected
    again.append([record(5, value=-1)])
    assert rundir.CommitLog(str(tmp_path)).records[5]["value"] == -1


def test_finishing_leaves_few_segments_for_readers(tmp_path: Path) -> None:
    with rundir.RunDirectory(str(tmp_path), "embed", {}) as directory:
        for part in range(rundir.COMPACT_ABOVE + 10):
            directory.log.append([record(part)])
        directory.finish({})
    assert len(segments(tmp_path)) <= rundir.COMPACT_ABOVE


@pytest.mark.parametrize("compacted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_resume_at_the_size_of_laion_is_quick_and_small(tmp_path: Path, compacted: bool) -> None:
    hashes = {kind: "0" * 64 for kind in ("img_emb", "text_emb", "metadata", "ledger")}
    lines = [
        json.dumps({**record(part), "shard": f"{part:05d}.tar", "rows": 10_000, "files": hashes})
        for part in range(LAION_PARTS)
    ]
    folder = tmp_path / "commits"
    folder.mkdir()
    for first in range(0, LAION_PARTS, LAION_PARTS if compacted else 16):
        chunk = lines[first : first + (LAION_PARTS if compacted else 16)]
        (folder / f"log-{first:08d}.jsonl").write_text("\n".join(chunk) + "\n")
    tracemalloc.start()
    started = time.monotonic()
    with rundir.RunDirectory(str(tmp_path), "embed", {}) as directory:
        assert len(directory.log.records) == LAION_PARTS
    seconds = time.monotonic() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < RESUME_LIMIT_S
    assert peak < RESUME_LIMIT_BYTES
    assert len(segments(tmp_path)) == 1


def test_a_long_run_does_not_leave_a_segment_per_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that dies after thousands of commits must not leave thousands of requests to its successor."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    log = rundir.CommitLog(str(tmp_path))
    for part in range(3_000):
        log.append([record(part)])
    assert len(segments(tmp_path)) < 1_000
    assert set(rundir.CommitLog(str(tmp_path)).records) == set(range(3_000))


def test_a_reader_that_meets_a_compaction_lists_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_segments(tmp_path, [record(part) for part in range(rundir.COMPACT_ABOVE + 1)])
    driver = rundir.CommitLog(str(tmp_path))
    read = store.read_bytes

    def compact_first(uri: str) -> bytes:
        monkeypatch.setattr(store, "read_bytes", read)
        driver.compact()
        return read(uri)

    monkeypatch.setattr(store, "read_bytes", compact_first)
    assert rundir.CommitLog(str(tmp_path)).records == expected
    assert len(segments(tmp_path)) == 1


# --- part numbers ----------------------------------------------------------------------------------------


def test_part_numbers_never_change_whatever_comes_later(tmp_path: Path) -> None:
    uri = str(tmp_path)
    assert rundir.assign_parts(uri, ["b", "d"]) == {"b": 0, "d": 1}
    assert rundir.assign_parts(uri, ["b", "d", "e"]) == {"b": 0, "d": 1, "e": 2}  # appended
    assert rundir.assign_parts(uri, ["a", "b", "c", "d"]) == {"a": 3, "b": 0, "c": 4, "d": 1}  # in front and between
    assert rundir.assign_parts(uri, ["e"]) == {"e": 2}  # the others went away; their numbers stay taken
    assert rundir.assign_parts(uri, ["f"]) == {"f": 5}


def test_a_shard_named_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"twice: x\.tar"):
        rundir.assign_parts(str(tmp_path), ["x.tar", "y.tar", "x.tar"])


# --- guard, summary, manifest ----------------------------------------------------------------------------


def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    rundir.guard(str(tmp_path), {"model": "a", "size": 64, "same": [1, 2]})
    rundir.guard(str(tmp_path), {"model": "a", "size": 64, "same": (1, 2)})  # JSON knows no tuples
    with pytest.raises(StaleOutputError) as error:
        rundir.guard(str(tmp_path), {"model": "b", "same": [1, 2], "new": True})
    text = str(error.value)
    assert "model was 'a', now 'b'" in text
    assert "size was 64, now None" in text
    assert "new was None, now True" in text
    assert "same" not in text
    assert "hint: choose another --out" in text


def test_a_refused_directory_is_free_again(tmp_path: Path) -> None:
    with rundir.RunDirectory(str(tmp_path), "embed", {"a": 1}):
        pass
    with pytest.raises(StaleOutputError), rundir.RunDirectory(str(tmp_path), "embed", {"a": 2}):
        pass
    with rundir.RunDirectory(str(tmp_path), "embed", {"a": 1}):
        pass


def test_counts_that_do_not_reconcile_are_an_error(tmp_path: Path) -> None:
    with rundir.RunDirectory(str(tmp_path), "embed", {}) as directory:
        directory.log.append([record(0), {"part": 1, "read": 5, "kept": 3, "dropped": {"broken_image": 1}}])
        with pytest.raises(DataError, match=r"read 7 != kept 4 \+ dropped \{'broken_image': 2\} = 6"):
            directory.finish({})
    assert not (tmp_path / "manifest.json").exists()


def test_working_time_adds_up_over_commands_that_added_parts(tmp_path: Path) -> None:
    seen = []
    for new, seconds in ((0, 10), (None, 100), (1, 5)):
        with rundir.RunDirectory(str(tmp_path), "embed", {}) as directory:
            directory._started -= seconds
            if new is not None:
                directory.log.append([record(new)])
            directory.finish({})
        seen.append(store.read_json(str(tmp_path / "summary.json"))["working_seconds"])
    assert seen == [pytest.approx(10, abs=1), seen[0], pytest.approx(15, abs=1)]


def test_a_finished_directory_says_what_it_holds(tmp_path: Path) -> None:
    with rundir.RunDirectory(str(tmp_path), "embed", {"model": "m"}) as directory:
        directory.log.append([record(0)])
    with pytest.raises(DataError, match="is not complete"):
        rundir.read_manifest(str(tmp_path), "embed")
    with rundir.RunDirectory(str(tmp_path), "embed", {"model": "m"}) as directory:
        directory.log.append([record(1)])
        summary = directory.finish({"encoder": "e"}, more=1)
    assert (summary.read, summary.kept, summary.parts, summary.parts_skipped) == (4, 2, 2, 1)
    assert summary.dropped == {"broken_image": 2}
    assert summary.dropped_share == 0.5
    assert store.read_json(str(tmp_path / "summary.json"))["more"] == 1
    manifest = rundir.read_manifest(str(tmp_path), "embed")
    assert (manifest["encoder"], manifest["settings"]) == ("e", {"model": "m"})
    with pytest.raises(DataError, match="output of `clipgap embed`, expected that of `clipgap score`"):
        rundir.read_manifest(str(tmp_path), "score")
    with pytest.raises(DataError, match="does not exist"):
        rundir.read_manifest(str(tmp_path / "other"), "embed")


def test_the_digest_names_the_content_not_the_way_there(tmp_path: Path) -> None:
    files = [{"part": n, "files": {"img_emb": f"hash{n}"}} for n in range(3)]
    digests = []
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        with rundir.RunDirectory(str(tmp_path / name), "embed", {}) as directory:
            for n in order:
                directory.log.append([files[n]])
            directory.finish({})
        digests.append(rundir.read_manifest(str(tmp_path / name), "embed")["digest"])
    with rundir.RunDirectory(str(tmp_path / "c"), "embed", {}) as directory:
        directory.log.append([*files[:2], {"part": 2, "files": {"img_emb": "other"}}])
        directory.finish({})
    assert digests[0] == digests[1] != rundir.read_manifest(str(tmp_path / "c"), "embed")["digest"]


# --- leases ----------------------------------------------------------------------------------------------

HOLD = """
import signal, sys
from clipgap_ray import rundir
with rundir.RunDirectory(sys.argv[1], "embed", {}):
    print("held", flush=True)
    signal.pause()
"""


def test_a_second_driver_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(LeaseError, match=f'"pid": {holder.pid}'), lease.Lease(str(tmp_path)):
                pass
            assert json.loads((tmp_path / "lease").read_text())["pid"] == holder.pid  # the refusal left it alone
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
        with rundir.RunDirectory(str(tmp_path), "embed", {}):
            assert json.loads((tmp_path / "lease").read_text())["pid"] == os.getpid()


def test_a_remote_lease_that_beats_refuses_and_one_that_stands_still_is_taken_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    uri = f"memory://lease-{os.getpid()}"
    with lease.Lease(uri) as holder:
        with pytest.raises(LeaseError, match=holder.owner["token"]), lease.Lease(uri):
            pass
        assert json.loads(store.read_bytes(holder.uri))["token"] == holder.owner["token"]
    assert not store.exists(holder.uri)

    dead = lease.Lease(uri)
    dead.__enter__()
    dead._stop.set()  # the thread ends and leaves the file, as a killed driver does
    assert dead._thread is not None
    dead._thread.join()
    with lease.Lease(uri) as heir:
        assert json.loads(store.read_bytes(heir.uri))["token"] == heir.owner["token"]


def test_what_killed_writers_left_is_removed_by_the_next_driver(tmp_path: Path) -> None:
    left = [tmp_path / ".summary.json.0123abcd.tmp", tmp_path / "img_emb" / ".img_emb_00001.npy.deadbeef.tmp"]
    others = [tmp_path / ".hidden.tmp", tmp_path / "img_emb" / "x.tmp", tmp_path / "a" / "b" / ".c.0123abcd.tmp"]
    for path in [*left, *others]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    with rundir.RunDirectory(str(tmp_path), "embed", {"x": 1}):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in others)
