"""The programs that `serve.py` compares, each in a process of its own, and the data that all of them hold."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

K = 10
PART_ROWS = 25_000
QUERIES = 256
START_S = 300.0
SWITCHES = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
PEER = ("clip-retrieval==2.45.0", "setuptools<70", "numpy<2")


# --- data --------------------------------------------------------------------------------------------------


def wide_projection(dim: int) -> dict[str, Any]:
    """Make this process's projection encoder as wide as the rows; queries by vector never reach it."""
    from clipgap_ray.encoder import EncoderSettings
    from clipgap_ray.encoder_projection import ProjectionEncoder

    ProjectionEncoder.DIM = dim
    return EncoderSettings("projection").build().fingerprint


def make_data(folder: Path, options: argparse.Namespace) -> None:
    """Write embeddings, our index, a FAISS file for the others, the queries and their exact neighbours."""
    import faiss
    import pyarrow as pa

    from clipgap_ray import embeddings, rundir, schema, uidmap
    from clipgap_ray.index import IndexShard, shard_uri
    from clipgap_ray.kernels import faiss_index
    from clipgap_ray.kernels.topk import exact_topk

    encoder, rng = wide_projection(options.dim), np.random.default_rng(0)
    source, index = str(folder / "emb"), str(folder / "index")
    flat = faiss.IndexFlatIP(options.dim)
    shards = [IndexShard(faiss_index.train_empty("Flat", options.dim, np.zeros((0, options.dim)), 0), number)
              for number in range(options.shards)]  # fmt: skip
    queries = _unit(rng.standard_normal((QUERIES, options.dim), dtype=np.float32))
    parts = []
    with rundir.RunDirectory(source, "embed", {}) as directory:
        for part, start in enumerate(range(0, options.rows, PART_ROWS)):
            count = min(PART_ROWS, options.rows - start)
            rows, ids = _unit(rng.standard_normal((count, options.dim), dtype=np.float32)), schema.row_ids(part, count)
            facts = [{"uid": f"{secrets.randbits(128):032x}", "row_id": int(i), "caption": f"caption {i}",
                      "image_path": f"{part:05d}{i & 0xFFFFFFFF:04d}"} for i in ids.tolist()]  # fmt: skip
            table = pa.Table.from_pylist(facts, schema=schema.METADATA)
            ledger = pa.Table.from_pylist([], schema=schema.LEDGER)
            directory.log.append([embeddings.write_part(source, part, f"{part:05d}.tar", rows, None, table, ledger)])
            shards[part % options.shards].add(rows, ids, part)
            flat.add(rows.astype(np.float32))
            best = exact_topk(queries, rows, ids, K)
            parts.append(best)
        names = {str(part): f"{part:05d}.tar" for part in range(len(parts))}
        directory.finish({"encoder": encoder, "shards": names})
    for shard in shards:
        shard.save(shard_uri(index, shard.number))
    with rundir.RunDirectory(index, "index", {}) as directory:
        directory.finish(
            {"num_shards": options.shards, "dim": options.dim, "nprobe": 0, "key": "Flat", "recall_at_10": 1.0,
             "modality": "image", "encoder": encoder, "index_version": "benchmark", "embeddings": {"uri": source},
             "shards": [{"number": shard.number, "rows": shard.num_rows} for shard in shards],
             "uid_map": uidmap.write(index, embeddings.EmbeddingSet.open(source))}
        )  # fmt: skip
    faiss.write_index(flat, str(folder / "image.index"))
    similarities, row_ids = (np.concatenate([part[at] for part in parts], axis=1) for at in (0, 1))
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :K]
    np.save(folder / "queries.npy", queries)
    np.save(folder / "exact.npy", np.take_along_axis(row_ids, order, axis=1))


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


# --- servers, each in a process of its own -----------------------------------------------------------------


def serve_ours(folder: Path, port: int, options: argparse.Namespace) -> None:
    """What `clipgap serve` runs."""
    from clipgap_ray.config.serve import ServeSettings
    from clipgap_ray.serving.run import run

    wide_projection(options.dim)
    run(ServeSettings(index=(f"pool={folder}/index",), port=port, shard_timeout_s=60.0))


def serve_in_process(folder: Path, port: int, options: argparse.Namespace) -> None:
    """Our routes over an index of this process."""
    import uvicorn

    from clipgap_ray.encoder import EncoderSettings
    from clipgap_ray.index import LocalIndex
    from clipgap_ray.serving.api import make_api
    from clipgap_ray.serving.local import LocalBackend
    from clipgap_ray.serving.metadata import Metadata

    wide_projection(options.dim)
    index = LocalIndex.open(str(folder / "index"))
    backend = LocalBackend(index, EncoderSettings("projection").build(), Metadata(str(folder / "emb")), name="pool")
    uvicorn.run(make_api(backend), host="127.0.0.1", port=port, log_level="error")


def answer(index: Any, body: dict[str, Any]) -> dict[str, Any]:
    """The handler of (a) and (b)."""
    similarities, positions = index.search(np.asarray([body["vector"]], np.float32), body["k"])
    pairs = zip(positions[0].tolist(), similarities[0].tolist(), strict=True)
    return {"results": [[{"row_id": position, "similarity": similarity} for position, similarity in pairs]]}


def serve_uvicorn(folder: Path, port: int, options: argparse.Namespace) -> None:
    """The obvious app without Ray: the handler runs in Starlette's threads."""
    import faiss
    import fastapi
    import uvicorn

    app, index = fastapi.FastAPI(), faiss.read_index(str(folder / "image.index"))

    @app.post("/v1/search")
    def search(body: dict[str, Any]) -> dict[str, Any]:
        return answer(index, body)

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def serve_obvious(folder: Path, port: int, options: argparse.Namespace) -> None:
    """The obvious app on Ray Serve as it comes."""
    import faiss
    import fastapi
    import ray
    from ray import serve

    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(address="local", num_cpus=max(4, options.replicas + 1), include_dashboard=False, log_to_driver=False)
    app = fastapi.FastAPI()

    @serve.deployment(num_replicas=options.replicas)
    @serve.ingress(app)
    class Obvious:
        def __init__(self) -> None:
            self.index = faiss.read_index(str(folder / "image.index"))

        @app.post("/v1/search")
        def search(self, body: dict) -> dict:  # what FastAPI can look up in a pickled class
            return answer(self.index, body)

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Obvious.bind())  # type: ignore[attr-defined]
    with contextlib.suppress(KeyboardInterrupt):
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


SERVERS = {
    "ours": serve_ours, "ours-switched": serve_ours, "in-process": serve_in_process, "serve": serve_obvious,
    "uvicorn": serve_uvicorn,
}  # fmt: skip

# Runs in the peer's environment. Loopback only, and no model: its weights would have to be downloaded.
PEER_CODE = """
import sys, types, flask
folder, port = sys.argv[1], int(sys.argv[2])
sys.modules["all_clip"] = types.SimpleNamespace(load_clip=lambda *a, **k: (None, None, None))
run = flask.Flask.run
flask.Flask.run = lambda self, host, port, debug: run(self, host="127.0.0.1", port=port, debug=False)
from clip_retrieval.clip_back import clip_back
clip_back(indices_paths=f"{folder}/indices.json", port=port, enable_mclip_option=False,
          provide_aesthetic_embeddings=False, columns_to_return=["uid", "caption", "image_path"])
"""


def peer_command(folder: Path, port: int, options: argparse.Namespace) -> list[str]:
    """Return the command of clip-retrieval's back end; RuntimeError says why there is none."""
    if not options.peer:
        raise RuntimeError("no --peer DIR")
    python = Path(options.peer, "bin", "python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", options.peer], check=True)
        made = subprocess.run([python, "-m", "pip", "install", "--quiet", *PEER], capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"its environment cannot be made: {made.stderr.strip().splitlines()[-1]}")
    place = folder / "peer"
    place.mkdir(exist_ok=True)
    for name, target in (("image.index", "image.index"), ("metadata", "emb/metadata")):
        with contextlib.suppress(FileExistsError):
            (place / name).symlink_to(folder / target)
    (folder / "indices.json").write_text(json.dumps({"pool": str(place)}))
    return [str(python), "-c", PEER_CODE, str(folder), str(port)]


@contextlib.contextmanager
def running(name: str, folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """A server that answers; yields its address and process id. RuntimeError when it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--server", name, "--port", str(port), "--data", str(folder)]
    words += ["--dim", str(options.dim), "--replicas", str(options.replicas)]
    command = (
        peer_command(folder, port, options)
        if name == "peer"
        else [sys.executable, str(Path(__file__).parents[1] / "serve.py"), *words]
    )
    environment = {**os.environ, **(SWITCHES if name == "ours-switched" else {})}
    for variable in ("CLIPGAP_TOKEN", "CLIPGAP_TOKEN_FILE", "RAY_ADDRESS"):
        environment.pop(variable, None)
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait_for(port, process, folder / f"{name}.log", name, folder)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path, name: str, folder: Path) -> None:
    """Until a search is answered: proxies answer earlier than what stands behind them, some with 404, some with 503."""
    import httpx

    path, body = question(name, np.load(folder / "queries.npy")[0].astype(np.float64).tolist())
    deadline, said = time.monotonic() + START_S, ""
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            reply = httpx.post(f"http://127.0.0.1:{port}{path}", content=body, headers=HEADERS, timeout=5)
            if reply.status_code == 200:
                return
            said = f"HTTP {reply.status_code}: {reply.text}"[:200]
        if process.poll() is not None:
            break
        time.sleep(0.2)
    lines = log.read_text(errors="replace").strip().splitlines() or ["nothing in its log"]
    raise RuntimeError(f"did not start: {said or lines[-1][:200]}")


HEADERS = {"content-type": "application/json"}


def question(name: str, vector: list[float]) -> tuple[str, bytes]:
    """Path and body of a search by vector."""
    if name == "peer":
        words = {"embedding_input": vector, "modality": "image", "num_images": K, "num_result_ids": K}
        return "/knn-service", json.dumps({**words, "indice_name": "pool", "deduplicate": False}).encode()
    return "/v1/search", json.dumps({"vector": vector, "k": K}).encode()
