"""What do 41,408 shards (LAION-400M) cost the driver? One row each, so that only the bookkeeping is left.

Three measurements of `clipgap embed`'s own driver (`rundir.assign_parts`, `rundir.CommitLog`, `stages.embed.run`):

    commit   41,407 commits, one by one, of records that a real shard left: seconds, bytes written, segments
             (--singly N: only N of them one by one, the others in one segment)
    resume   the same command again with one shard left, in a process of its own: seconds, and memory of that process
    run      (--run) all shards read, encoded and committed by Ray, nothing prepared: seconds, memory

Goal: a resume under 60 s and under 500 MB in the driver. What Python, torch and Ray occupy before the stage starts is
printed beside it.

    python benchmarks/resume.py [--shards 41408] [--singly 41408] [--run]
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from clipgap_ray import rundir, store
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.shards import write_tar
from clipgap_ray.sources import list_shards

REAL = 4  # shards embedded for real before the others' records are derived from theirs


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_shards(folder: Path, number: int) -> None:
    """One-row tars; all are hard links to one file."""
    folder.mkdir()
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    first = folder / "00000.tar"
    first.write_bytes(write_tar([("000000000", {"jpg": buffer.getvalue(), "txt": b"a caption"})]))
    for shard in range(1, number):
        os.link(first, folder / f"{shard:05d}.tar")


def embed(source: Path, out: Path, shards: str = "") -> dict[str, float]:
    """Run the stage in a process of its own; returns its seconds and its memory."""
    words = [sys.executable, __file__, "--child", str(source), str(out), shards]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def child(source: str, out: str, shards: str) -> None:
    """What `embed` runs: the stage, with the time of each part of its start."""
    from clipgap_ray.stages import embed as stage
    from clipgap_ray.stages.session import connect

    started = time.perf_counter()
    connect()
    ready, before = time.perf_counter(), peak_mb()
    summary = stage.run(EmbedSettings(source=source, out=out, model="projection", shards=shards or None))
    print(json.dumps({
        "ray_start_s": ready - started, "stage_s": time.perf_counter() - ready, "parts": summary.parts,
        "skipped": summary.parts_skipped, "before_mb": before, "peak_mb": peak_mb(),
    }))  # fmt: skip


def commit_all_but_one(source: Path, out: Path, number: int, singly: int) -> dict[str, float]:
    """Commit records derived from the real ones through the real log: `singly` of them one at a time."""
    shards = [shard.name for shard in list_shards(str(source))]
    parts = rundir.assign_parts(str(out), shards)
    log = rundir.CommitLog(str(out))
    model = log.records[0]
    written = [0]
    original = store.write_bytes

    def counted(uri: str, data: bytes) -> None:
        written[0] += len(data)
        original(uri, data)

    store.write_bytes = counted
    records = [{**model, "part": parts[shard], "shard": shard} for shard in shards[REAL : number - 1]]
    started = time.perf_counter()
    for record in records[:singly]:
        log.append([record])
    seconds = time.perf_counter() - started
    log.append(records[singly:])
    store.write_bytes = original
    segments = len(store.list_names(store.join(str(out), "commits")))
    size = len(json.dumps(records[-1]))
    return {"one_by_one": len(records[:singly]), "seconds": seconds, "written_mb": written[0] / 1e6,
            "segments": segments, "record_bytes": size}  # fmt: skip


def open_log(source: Path, out: Path) -> dict[str, float]:
    """Seconds of each step that a resume takes before its first task."""
    marks = [time.perf_counter()]
    shards = list_shards(str(source))
    marks.append(time.perf_counter())
    parts = rundir.assign_parts(str(out), [shard.name for shard in shards])
    marks.append(time.perf_counter())
    log = rundir.CommitLog(str(out))
    marks.append(time.perf_counter())
    left = [shard for shard in shards if parts[shard.name] not in log.records]
    steps = dict(zip(("list_s", "parts_s", "log_s"), np.diff(marks).tolist(), strict=True))
    return {**steps, "left": len(left)}


def main() -> None:
    """Prepare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=41_408)
    parser.add_argument("--singly", type=int, default=1 << 30, help="commits made one by one, default all")
    parser.add_argument("--run", action="store_true", help="all shards through Ray instead of prepared commits")
    parser.add_argument("--folder", default=None, help="where to write, default a temporary folder")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        source, out = Path(root, "pool"), Path(root, "emb")
        write_shards(source, options.shards)
        print(f"{options.shards:,} shards of one row, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        if options.run:
            print("run     " + line(embed(source, out)))
        else:
            embed(source, out, f"0:{REAL}")
            print("commit  " + line(commit_all_but_one(source, out, options.shards, options.singly)))
        print("open    " + line(open_log(source, out)))
        print("resume  " + line(embed(source, out)))
        print("again   " + line(embed(source, out)))


def line(values: dict[str, float]) -> str:
    """Values as one line."""
    return "  ".join(f"{name} {value:,.1f}" for name, value in values.items())


if __name__ == "__main__":
    main()
