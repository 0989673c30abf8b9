"""The service under load, beside what else one would run: vectors in, the ten exact neighbours out, over loopback.

    ours            `clipgap serve`, one deployment per index shard, as it starts
    ours, switched  the same with RAY_SERVE_ENABLE_HA_PROXY=1 and RAY_SERVE_THROUGHPUT_OPTIMIZED=1 in the environment
    in process      our routes in uvicorn, the index in the same process, no Ray
    (a) serve       the obvious app: FastAPI on Ray Serve as it comes, IndexFlatIP.search per request
    (b) uvicorn     the same handler in uvicorn, no Ray
    (c) peer        clip-retrieval's back end (Flask) in an environment of its own: --peer DIR makes one there if there
                    is none; it needs a package registry. Its model is left out: vectors need none

Every program has the same float16 rows (as float32 in FAISS) and answers the same queries; every answer is compared
with the exact one, and one wrong answer fails the run. Clients are coroutines of this process (aiohttp, keep-alive)
that ask again as soon as they have an answer; on two cores they share the machine with the server. Ours also reports
the memory of its processes; `--soak 300` keeps 64 clients busy for five minutes and prints the gateway's memory.

    python benchmarks/serve.py [--rows 250000] [--seconds 15] [--only ours,serve] [--peer DIR] [--soak 300]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from parts.servers import HEADERS, PART_ROWS, SERVERS, K, make_data, question, running

CLIENTS = (1, 64)
PROGRAMS = ("ours", "ours-switched", "in-process", "serve", "uvicorn", "peer")


# --- load --------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Answers of a load: their times in milliseconds, and how many were wrong."""

    clients: int
    seconds: float
    times_ms: np.ndarray
    wrong: int

    def row(self) -> list[str]:
        """Requests per second, p50 and p99."""
        p50, p99 = np.percentile(self.times_ms, (50, 99)) if len(self.times_ms) else (np.nan, np.nan)
        return [f"{self.rate:,.1f}", f"{p50:.2f}", f"{p99:.2f}"]

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.times_ms) / self.seconds

    @property
    def p50(self) -> float:
        """Milliseconds."""
        return float(np.median(self.times_ms)) if len(self.times_ms) else float("nan")


async def load(address: str, name: str, folder: Path, clients: int, seconds: float) -> Measured:
    """Ask with so many clients for so long, after a fifth of it to warm up."""
    import aiohttp

    queries, exact = np.load(folder / "queries.npy"), np.load(folder / "exact.npy").tolist()
    asked = [question(name, query) for query in queries.astype(np.float64).tolist()]
    path, bodies = asked[0][0], [body for _, body in asked]
    times: list[float] = []
    wrong = 0
    begin = time.perf_counter() + seconds / 5
    end = begin + seconds

    async def client(first: int, session: aiohttp.ClientSession) -> None:
        nonlocal wrong
        at = first
        while (started := time.perf_counter()) < end:
            at = (at + 1) % len(bodies)
            async with session.post(address + path, data=bodies[at], headers=HEADERS) as response:
                answer = await response.read()
                status = response.status
            now = time.perf_counter()
            wrong += status != 200 or _row_ids(name, json.loads(answer)) != exact[at]
            if started >= begin:
                times.append(now - started)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:
        await asyncio.gather(*(client(7 * number, session) for number in range(clients)))
    return Measured(clients, time.perf_counter() - begin, 1e3 * np.array(times), wrong)


def _row_ids(name: str, answer: Any) -> list[int]:
    if name == "peer":
        return [_row_id(row["id"]) for row in answer]
    ids = [row["row_id"] for row in answer["results"][0]]
    return [_row_id(position) for position in ids] if name in ("serve", "uvicorn") else ids


def _row_id(position: int) -> int:
    return (position // PART_ROWS) << 32 | position % PART_ROWS


# --- memory ------------------------------------------------------------------------------------------------


def replicas_mb(pid: int) -> dict[str, float]:
    """Resident megabytes of our replicas below a process, by the name that Ray gives them (as in `ps`)."""
    found: dict[str, float] = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            children.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(
                int(entry.name)
            )
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        waiting += children.get(one, [])
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            if name.startswith("ray::ServeReplica:clipgap:"):
                resident = int(Path(f"/proc/{one}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
                found[name.removeprefix("ray::ServeReplica:clipgap:").split(".")[0]] = resident
    return found


async def soak(address: str, pid: int, folder: Path, seconds: float) -> None:
    """Print the memory of our replicas while 64 clients ask, and how much the gateway grew after the first fifth."""
    asking = asyncio.create_task(load(address, "ours", folder, 64, seconds))
    print(f"\nsoak, 64 clients, {seconds:g} s\n\n| s | resident MB |\n|---:|---|")
    started, gateway = time.monotonic(), []
    while not asking.done():
        memory = replicas_mb(pid)
        passed = time.monotonic() - started
        print(
            f"| {passed:.0f} | " + ", ".join(f"{name} {mb:,.0f}" for name, mb in sorted(memory.items())) + " |",
            flush=True,
        )
        if passed > seconds / 5 and "Gateway" in memory:
            gateway.append(memory["Gateway"])
        await asyncio.wait([asking], timeout=max(seconds / 20, 1.0))
    measured = asking.result()
    growth = gateway[-1] - gateway[0] if gateway else float("nan")
    print(f"\n{len(measured.times_ms):,} answers, {measured.wrong} wrong; the gateway grew by {growth:.1f} MB")
    if measured.wrong:
        raise SystemExit("wrong answers")


# --- the run -----------------------------------------------------------------------------------------------


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[int, Measured] | str:
    """A program under every load, or why it was left out."""
    try:
        with running(name, folder, options) as (address, pid):
            result = {n: asyncio.run(load(address, name, folder, n, options.seconds)) for n in options.clients}
            if name.startswith("ours"):
                index_mb = sum(file.stat().st_size for file in (folder / "index").rglob("index.faiss")) / 1e6
                memory = ", ".join(f"{part} {mb:,.0f}" for part, mb in sorted(replicas_mb(pid).items()))
                print(f"{name}: resident MB: {memory}; index files {index_mb:,.0f} MB in {options.shards} shards")
                if options.soak:
                    asyncio.run(soak(address, pid, folder, options.soak))
            return result
    except (RuntimeError, subprocess.CalledProcessError) as error:
        return str(error)


def report(results: dict[str, dict[int, Measured]]) -> None:
    """Print the table, and the ratios that the goals are about."""
    print("\n| program | clients | requests/s | p50 ms | p99 ms | wrong |\n|---|---:|---:|---:|---:|---:|")
    for name, loads in results.items():
        for clients, measured in loads.items():
            print(f"| {name} | {clients} | " + " | ".join(measured.row()) + f" | {measured.wrong} |")
    few, many = min(next(iter(results.values()))), max(next(iter(results.values())))
    print()
    for ours in ("ours", "ours-switched"):
        for peer, goal in (("serve", "at least 8"), ("uvicorn", ""), ("peer", "above 1")):
            if ours in results and peer in results:
                ratio = results[ours][many].rate / results[peer][many].rate
                print(
                    f"{ours} / {peer}, requests/s at {many} clients: {ratio:.2f}" + (f" (goal: {goal})" if goal else "")
                )
        for peer, goal in (("uvicorn", "at most 1.5"), ("peer", "below 1")):
            if ours in results and peer in results:
                ratio = results[ours][few].p50 / results[peer][few].p50
                print(f"{ours} / {peer}, p50 at {few} client: {ratio:.2f} (goal: {goal})")
    wrong = sum(measured.wrong for loads in results.values() for measured in loads.values())
    if wrong:
        raise SystemExit(f"{wrong} wrong answers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=250_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--shards", type=int, default=2, help="index shards of ours")
    parser.add_argument("--replicas", type=int, default=1, help="of (a)")
    parser.add_argument("--seconds", type=float, default=15.0, help="per program and number of clients")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--only", default=",".join(PROGRAMS), help="programs, with commas")
    parser.add_argument("--peer", default="", help="environment of clip-retrieval; made if it is not there")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds under 64 clients, ours only")
    parser.add_argument("--data", default="", help="keep or reuse the data in this folder")
    parser.add_argument("--server", default="", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.server:
        SERVERS[options.server](Path(options.data), options.port, options)
        return
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(PROGRAMS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(PROGRAMS)}")
    with tempfile.TemporaryDirectory(prefix="clipgap-serve-") as scratch:
        folder = Path(options.data or scratch).absolute()
        if not (folder / "exact.npy").exists():
            make_data(folder, options)
        print(f"{options.rows:,} x {options.dim}, k = {K}, Flat, {os.cpu_count()} cores")
        print(f"ours: {options.shards} shards of one replica; (a): {options.replicas} replicas; (b): one process")
        results: dict[str, dict[int, Measured]] = {}
        for name in chosen:
            measured = measure(name, folder, options)
            if isinstance(measured, str):
                print(f"{name}: left out: {measured}", flush=True)
            else:
                results[name] = measured
                rates = ", ".join(f"{found.rate:,.1f} requests/s at {n}" for n, found in measured.items())
                print(f"{name}: {rates}", flush=True)
        if results:
            report(results)


if __name__ == "__main__":
    main()
